"""checks.py - whether a response is right, by rule: final answers, and the demo's checkers.

    extract     the final answer of a response to a math or multiple-choice question (Table 2), or to a
                question of a user's own file whose answer is a number, a letter or a few words
    honours     whether a response respects one of the demo's contexts, by a small program
    verify      either of the two, whichever an example asks for
    words       the words of a text in any script

Only what a response says after its thoughts, <think> ... </think>, counts.
What differs from the paper: it does not say how answers are read; strict and flexible readings are reported,
and for math one that takes the whole response's last ####. A small model goes on after its answer with an
"Example 9" of its own, as the prompt's worked examples do; what follows is no answer to the question that was
asked. Own answers, the demo and its checks are ours.

    python -m pytest tests/test_answers.py tests/test_checks.py
"""

import functools
import re
import unicodedata
from collections.abc import Callable

from tokenizer import without_thoughts

# ------------------------------------------------------------------------- words in any script

# Scripts that are written without spaces between words: Thai and Lao, Burmese, Khmer, kana and bopomofo, Han.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf"
                      "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
                      "\U00020000-\U0003ffff]")
JOINERS = "\u200c\u200d"  # they hold letters of a word, or the parts of an emoji, together


@functools.cache
def kind_of(character: str) -> str:
    """What a character is to `words`: space, mark, unspaced, letter (or digit, or _) or sign."""
    if character.isspace():
        return "space"
    if unicodedata.category(character).startswith("M") or character in JOINERS:
        return "mark"
    if UNSPACED.match(character) and character.isalnum():
        return "unspaced"
    return "letter" if character.isalnum() or character == "_" else "sign"


def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks: the tokens of distinct-2 and self-BLEU.

    In a script without spaces each character is a token. Marks, such as the vowel signs of Hindi or Thai,
    stay with the letter before them.
    """
    if text.isascii():
        return re.findall(r"\w+|[^\w\s]", text.lower())
    tokens: list[str] = []
    before = "space"
    for character in text.lower():
        kind = kind_of(character)
        if (kind == "mark" and before != "space") or (kind == before == "letter"):
            tokens[-1] += character
            continue
        if kind != "space":
            tokens.append(character)
        before = kind
    return tokens


# ------------------------------------------------------------------------- right answers by rule

LETTERS = "ABCDEFGHIJ"  # of multiple-choice questions

# Responses can be long and strange, so every pattern of this file takes time linear in the text's length: no
# two neighbouring repetitions match the same characters, and look-aheads keep a number from matching in part.
MARKS = re.compile(r"[\s*_\\(=:]*")  # what may stand before a number, "**" or "\(" for instance
NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*(?:[$\u00a3\u20ac]\s*)?(?P<minus>[-\u2212]?)"
    r"(?P<value>(?:\d{1,3}(?:,\d{3})+|\d+)(?!,?\d)(?:\.\d+(?!\d))?|\.\d+(?!\d))"
    r"(?![\d,]*\d)"  # digits that are left over make it no number: 1,08,0
    r"(?!\s*/\s*\d)"  # nor is a fraction one: 1/2
)
# Where a number begins in running text. A sign belongs to it unless it directly follows a word or a number,
# as in 10-3, or a space stands between, as after a bullet; a currency may stand apart. The second case passes
# over a row of signs that no digit follows.
NUMBER_START = re.compile(
    r"(?<![\w.,])(?:(?:[-+\u2212$\u00a3\u20ac]*(?:[$\u00a3\u20ac]\s|[-+\u2212$\u00a3\u20ac]))?"
    r"\.?(?P<digit>\d)|[-+\u2212$\u00a3\u20ac]+)"
)


NUMBER_ALONE = re.compile(rf"\s*{NUMBER.pattern}\s*%?\s*")  # a text that is a number and nothing else


def number(text: str, start: int = 0) -> str | None:
    """The number at the start of a text, or at `start`, exact and in its shortest form, or None.

    1,080.50 is read as "1080.5" and -$7 as "-7". A sign, a currency and thousands commas are understood;
    marks before the number ("**") and everything after it are ignored.
    """
    found = NUMBER.match(text, MARKS.match(text, start).end())
    if found is None:
        return None
    integer, _, decimals = found["value"].replace(",", "").partition(".")
    value = integer.lstrip("0") or "0"
    if decimals.rstrip("0"):
        value += "." + decimals.rstrip("0")
    negative = found["sign"] in ("-", "\u2212") or found["minus"] != ""
    return "-" + value if negative and value != "0" else value


def last_number(text: str) -> str | None:
    """The last number in a text, as `number` reads it."""
    starts = [match.start() for match in NUMBER_START.finditer(text) if match["digit"]]
    numbers = (number(text, start) for start in reversed(starts))
    return next((value for value in numbers if value is not None), None)


# The head of another example, as in the worked ones of the prompt: in bold, as a heading, numbered or not.
NEXT_EXAMPLE = re.compile(r"[\s*#]*(?:new |next )?(?:example|problem)\b[\s*]*(?:\d+[\s*]*)?(?:[:.]|$)", re.I)
NEXT_QUESTION = re.compile(r"[\s*#]*(?:new |next )?question\b[\s*]*(?:\d+[\s*]*)?:", re.I)


def before_next_question(text: str) -> str:
    """A response up to the example or question that the model makes up after its answer.

    "Example 9:" ends an answer once there is a number. "Question:" does so only after ####, for it may also
    open a step of the reasoning. A question that is repeated at the beginning ends nothing.
    """
    position, has_number, has_marker = 0, False, False
    for line in text.splitlines(keepends=True):
        example, question = NEXT_EXAMPLE.match(line), NEXT_QUESTION.match(line)
        if (example and has_number) or (question and has_marker):
            return text[:position]
        if not example and not question:
            has_number = has_number or any(map(str.isdigit, line))
            has_marker = has_marker or "####" in line
        position += len(line)
    return text


def math_answer(text: str, flexible: bool) -> str | None:
    """The number after the last ####; flexible: where there is none, the last number."""
    _, marker, after = text.rpartition("####")
    answer = number(after) if marker else None
    return last_number(text) if answer is None and flexible else answer


def choice_answer(text: str, choices: int, flexible: bool) -> str | None:
    """The letter after the last "the answer is:"; flexible: where there is none, the last letter on its own.

    choices: how many letters there are, from A on. The colon may be missing; an A or I is then none where it
    may begin a phrase ("the answer is A good idea").
    """
    letter = rf"([{LETTERS[:choices]}])(?!\w|'\w)"
    stated = (r"(?i:the (?:correct |right |best )?answer is)"
              rf"(?:\s*:[\s*(<\['\"`]*{letter}|[\s*(<\['\"`]+{letter}(?!(?<=[AI])\s+[a-z]))")
    found = re.findall(stated, text)
    if found:
        with_colon, without_colon = found[-1]
        return with_colon or without_colon
    alone = re.findall(rf"(?<!\w)(?<!\w'){letter}(?!\s+[a-z])", text) if flexible else []
    return alone[-1] if alone else None


# A user's own questions ask for no form of answer. So a number is the last one that is called the answer, or
# the last one at all; a letter likewise, or one that stands alone; a few words count wherever they are said.
STATED = re.compile(r"(?i:\banswer(?:\s+is)?)|\\boxed\{")
SHORT = 60  # characters, and a tenth as many words, of an answer that is compared by rule
OPPOSITES = ({"yes", "no"}, {"true", "false"})  # an explanation may say the other too: the first one counts


def answer_style(answer: str) -> str | None:
    """How a user's own answer is compared: as a "number", a "letter" or "words"; None: it is too long."""
    answer = answer.strip()
    if NUMBER_ALONE.fullmatch(answer):
        return "number"
    if len(answer) == 1 and answer.upper() in LETTERS:
        return "letter"
    is_short = len(answer) <= SHORT and len(answer.split()) <= SHORT // 10
    return "words" if is_short and plain_words(answer) else None


def own_number(text: str) -> str | None:
    """The number after ####, else the last one that is called the answer, else the last one."""
    stated = [number(text, match.end()) for match in STATED.finditer(text)]
    called = [value for value in stated if value is not None]
    return math_answer(text, flexible=False) or (called[-1] if called else last_number(text))


def plain_words(text: str) -> list[str]:
    """The words of a text in one spelling, without punctuation and articles."""
    found = words(unicodedata.normalize("NFKC", text))
    return [word for word in found if word[0].isalnum() and word not in ("a", "an", "the")]


def says(text: str, answer: str) -> bool:
    """Whether a response says an answer's words in a row; of yes and no, the one said first counts.
    """
    said, wanted = plain_words(without_thoughts(text)), plain_words(answer)
    for pair in OPPOSITES:
        if set(wanted) < pair:
            return next((word for word in said if word in pair), None) == wanted[0]
    n = len(wanted)
    return any(said[i : i + n] == wanted for i in range(len(said) - n + 1))


def final_style(example) -> str | None:
    """How an example's answer is compared: "math" or "choice" of the paper's data, "number", "letter" or
    "words" of a user's own; None where there is no answer, or no rule for it."""
    if example.answer is None:
        return None
    return example.style if example.style in ("math", "choice") else answer_style(example.answer)


def extract(style: str, text: str, choices: int = 0, flexible: bool = False) -> str | None:
    """The final answer of a response, or None if it gives none.

    style: "math" or "number" (a number in its shortest form), "choice" or "letter". choices: how many a
    question has. flexible: accept an answer that is not given in the form that the prompt asks for.
    """
    text = without_thoughts(text)
    if style == "math":
        return math_answer(before_next_question(text), flexible)
    if style == "number":
        return own_number(text)
    return choice_answer(text, choices or len(LETTERS), flexible or style == "letter")


def verify(example, text: str) -> bool | None:
    """Whether a response is right, by the example's check or its answer; None if the example has neither.

    example: any object with the attributes check, answer, style and choices, such as data.Example (which
    this file cannot import, because data.py imports this one).
    """
    if example.check:
        return honours(example.check, text)
    style = final_style(example)
    if style is None:
        return None
    if style == "words":
        return says(text, example.answer)
    answer = example.answer
    if style in ("number", "letter"):
        answer = number(answer) if style == "number" else answer.strip().upper()
    return extract(style, text, len(example.choices or ())) == answer


# The demo's checks: each tells whether a response does what one context asks for. Contexts name them
# (assets/demo/contexts.jsonl), so their names are part of the data. [^\W_] is a letter or a digit.

def after_last_word(text: str) -> str:
    """The marks and spaces after the last letter or digit; empty if the text has no letter or digit."""
    found = re.search(r"[^\W_]([\W_]*)\Z", text)
    return found[1] if found else ""


def starts_with(text: str, phrase: str) -> bool:
    """The first words are the phrase, in any case; spaces and marks before it are ignored."""
    return bool(re.match(rf"[\W_]*{re.escape(phrase)}(?![^\W_])", text, re.I))


def ends_with(text: str, phrase: str) -> bool:
    """The last words are the phrase, in any case; spaces and marks after it are ignored."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(phrase)}[\W_]*$", text, re.I))


def ends_with_question(text: str) -> bool:
    """A question mark follows the last word, and no full stop, comma, colon or semicolon follows the mark."""
    _, mark, rest = after_last_word(text).rpartition("?")
    return mark == "?" and not any(stop in rest for stop in ".,:;")


def max_words(text: str, n: int) -> bool:
    """There are 1 to n words; a word is a run without spaces that has a letter or a digit."""
    runs = [run for run in text.split() if any(map(str.isalnum, run))]
    return 1 <= len(runs) <= n


def max_sentences(text: str, n: int) -> bool:
    """There are 1 to n sentences and the last one is finished.

    A sentence ends at marks that include one of .!? and stand before a space, or at the end of a line.
    """
    only_ends = re.sub(r"[^\w\s.!?]|_", "", text)  # without the other marks, an end stands next to its space
    parts = re.split(r"[.!?]\s|\n", only_ends)
    sentences = [part for part in parts if any(map(str.isalnum, part))]
    finished = any(end in after_last_word(text) for end in ".!?")
    return finished and 1 <= len(sentences) <= n


def lowercase(text: str) -> bool:
    """There are letters, and none of them is a capital."""
    return text.islower()


def bullets(text: str, n: int) -> bool:
    """At least n lines, and over half of those not blank, are a bullet (-, * or •), a space and words."""
    lines = [line for line in text.splitlines() if line.strip()]
    items = [line for line in lines if re.match(r"\s*[-*•]\s.*[^\W_]", line)]
    return len(items) >= n and 2 * len(items) > len(lines)


def emoji(text: str) -> bool:
    """There is a symbol, dingbat or pictograph, by the Unicode blocks U+2600-27BF and U+1F300-1FAFF."""
    return bool(re.search("[\u2600-\u27bf\U0001f300-\U0001faff]", text))


def exclaims(text: str, n: int) -> bool:
    """There are at least n exclamation marks."""
    return text.count("!") >= n


def quoted(text: str) -> bool:
    """All the text stands between two double quotation marks, straight or curly, with no others inside."""
    found = re.fullmatch(r'\s*["“]([^"“”]*)["”]\s*', text)
    return bool(found and re.search(r"\w", found[1]))


def mentions(text: str, *words: str) -> bool:
    """One of the words, which are regular expressions, occurs as a whole word, in any case."""
    return bool(re.search(rf"(?<![^\W_])(?:{'|'.join(words)})(?![^\W_])", text, re.I))


CHECKS: dict[str, Callable[..., bool]] = {check.__name__: check for check in (
    starts_with, ends_with, ends_with_question, max_words, max_sentences, lowercase, bullets, emoji,
    exclaims, quoted, mentions)}


def honours(check: list, response: str) -> bool:
    """Whether a response passes a context's check, [name, *arguments]; a blank response passes none."""
    name, *arguments = check
    response = without_thoughts(response)
    return bool(response.strip()) and CHECKS[name](response, *arguments)


def check_rates(examples: list, pairs: list, neg: str) -> list[dict]:
    """For each demo context: how often its chosen responses honour it, and how often context-free ones do.

    examples: data.Example, pairs: pairs.Pair, row by row.
    """
    context_free = []
    if neg == "missing":
        context_free = [response.text for pair in pairs for response in pair.rejected]
    checks = {example.context_id: example.check for example in examples}
    rates = []
    for context_id, check in sorted(checks.items()):
        own = [honours(check, pair.chosen.text) for example, pair in zip(examples, pairs, strict=True)
               if example.context_id == context_id]
        chance = [honours(check, text) for text in context_free]
        rates.append(dict(context=context_id, check=list(check), chosen=sum(own) / len(own), n=len(own),
                          context_free=sum(chance) / len(chance) if chance else None))
    return rates
