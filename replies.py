"""replies.py - what a model's reply says: its answer after its thoughts, a score, a choice, a JSON object.

A verdict is read only where the answer is a verdict and nothing else (`SCORE_FORM`, `CHOICE_FORM`), so that
no number out of a judge's thoughts, out of the scale that it repeats or the response that it quotes, becomes
a score. Everything else is None. All patterns take time linear in the reply's length.

What differs from the paper: it does not say how replies are read.

    python -m doctest replies.py       runs the example below
"""

import json
import re

# How thoughts begin and end in the replies of models that think before they answer: <think> (DeepSeek, Qwen,
# GLM and many others), <thought> (EXAONE), <seed:think>, [THINK] (Magistral), <|START_THINKING|> (Command A),
# <|begin_of_thought|> (OpenThinker), Kimi's triangles, gpt-oss's channels, with its special tokens or without
# them ("analysis...assistantfinal..."), Apertus's <|inner_prefix|>, Gemma's <unused94>, Granite's sentences.
THOUGHTS = r"(?:\w{1,9}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad)"
THOUGHTS_BEGIN = re.compile(
    rf"(?i:[<\[]\|?(?:begin_of_|start_of_|begin_|start_)?{THOUGHTS}\|?[>\]]|\u25c1think\u25b7"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought)|<\|inner_prefix\|>|<unused94>"
    r"|here is my thought process:)|\Aanalysis(?=[A-Z])")
THOUGHTS_END = re.compile(
    rf"(?i:[<\[](?:\|?/|\|?end_of_|\|?end_){THOUGHTS}\|?[>\]]|\u25c1/think\u25b7"
    r"|<\|channel\|>\s*final[^<]{0,40}<\|message\|>|<channel\|>|<\|inner_suffix\|>|<unused95>"
    r"|here is my response:)|\Aanalysis(?=[A-Z])(?s:.*)assistantfinal")

# What may stand around a verdict: tags, chat markup, emphasis, quotes, brackets.
DECORATION = re.compile(r"</?\w{1,20}>|<\|\w{1,30}\|>|\\boxed|[*_`#\"'$()\[\]{}\\]")
FENCE = re.compile(r"```(?:json|text)?(?P<inside>[^`]*)```", re.IGNORECASE)
NAMED = (r"(?:(?:the|my|final|overall|better) )*(?:score|rating|answer|verdict|choice|winner)"
         r"(?: is)?(?: ?[:=])? ?")
SCORE_FORM = re.compile(rf"(?:{NAMED})?(-?\d{{1,9}})(?:\.\d{{1,9}})?(?: ?(?:/|out of|of) ?5(?:\.0)?)?[.!]?",
                        re.IGNORECASE)
CHOICE_FORM = re.compile(rf"(?:{NAMED}|(?:the )?better response(?: is)?:? )?response ?-?([ab])"
                         r"(?: is (?:the )?better(?: one| response)?)?[.!]?", re.IGNORECASE)


def final_answer(reply: str) -> str | None:
    """What a reply says after its thoughts; None where these do not end.

    >>> final_answer("<think>There are 2 things...</think> 4"), final_answer("<think>There are 2 things")
    ('4', None)
    """
    ends = [found.end() for found in THOUGHTS_END.finditer(reply)]
    answer = reply[max(ends, default=0) :]
    return None if THOUGHTS_BEGIN.search(answer) else answer.strip()


def verdict_of(reply: str, form: re.Pattern, names: tuple[str, ...]) -> str | None:
    """The first group of `form` where it describes all that a reply says after its thoughts, but for what
    may stand around a verdict; else where it does the one value of a JSON object that has one of `names`."""
    answer = final_answer(reply)
    if answer is None:
        return None
    fence = FENCE.fullmatch(answer)
    answer = fence["inside"].strip() if fence else answer
    if answer.startswith("{"):
        try:
            pairs = json.loads(answer, object_pairs_hook=list)  # a name may be there twice
        except (ValueError, RecursionError):
            return None
        values = [value for name, value in pairs if name.lower() in names]
        is_plain = len(values) == 1 and isinstance(values[0], str | int | float)
        answer = str(values[0]) if is_plain else ""
    found = form.fullmatch(" ".join(DECORATION.sub(" ", answer).split()))
    return found[1] if found else None


def read_score(reply: str) -> int | None:
    """The score of a reply that is a lone number, `Score: 4`, `4/5`, {"score": 4} or one of these in bold.

    Of 3.7 the whole part; clamped to 1..5. None for every other reply, whatever numbers are in it.
    """
    score = verdict_of(reply, SCORE_FORM, ("score", "rating"))
    return None if score is None else min(5, max(1, int(score)))


def read_choice(reply: str) -> str | None:
    """'a' or 'b', if a reply names one of the two responses and says nothing else."""
    choice = verdict_of(reply, CHOICE_FORM, ("better", "better_response", "choice", "verdict", "winner"))
    return None if choice is None else choice.lower()


def read_object(reply: str) -> dict | None:
    """The JSON object in a reply, whatever stands around it; None where there are several, or half of one."""
    answer = final_answer(reply) or ""
    decoder = json.JSONDecoder()
    # Only a brace before a first name and its colon, or before a closing brace, can open an object.
    opening = re.compile(r'\{(?=[ \t\r\n]*(?:\}|"(?:[^"\\]|\\.)*"[ \t\r\n]*:))', re.DOTALL)
    start = opening.search(answer)
    if start is None:
        return None
    try:
        value, end = decoder.raw_decode(answer, start.start())
    except (ValueError, RecursionError):  # what is inside half an object is not what was asked for
        return None
    if opening.search(answer, end):
        return None
    # An escape can spell half a surrogate pair, which no file can hold.
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
