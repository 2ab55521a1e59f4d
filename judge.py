"""judge.py - whether a response is good, by asking a model (section 5.4, appendix D.2).

    rate       a score from 1 to 5: how well a response suits a preference      Tables 1 and 7
    reward     the same, as RLAIF words it                                      RLAIF
    compare    which of two responses is better, asked in both orders           Fig. 3
    infer      the preferences behind a user's choice of two responses          PRISM, Community Alignment
    rewrite    a described preference in the user's own words                   Multi-Bench
    rubrics    how to judge whether a response respects a preference            Multi-Bench, Fig. 3

The judge is a local model, decoded greedily, or any OpenAI-compatible endpoint (--judge-url, endpoint.py).
Every reply is appended to a cache file as it arrives, under a hash of what was asked, so no question is asked
twice and a crash loses nothing. No text inside a question can pretend to be another part of the question
(`quote`; in `rewrite` JSON keeps lines apart). A verdict is read from what the judge says after its thoughts
(`final_answer`), and only where that is a verdict and nothing else: a lone number, `Score: 4`, `4/5`, JSON.
Every other reply gives None, which is counted with its reason (`read_replies`); it never becomes a score.

What differs from the paper: the prompts are appendix D.2's, word for word; how their fields are laid out and
replies are read, which it leaves open, is ours.

    python judge.py --judge DIR --query "How do I bake?" --preference "I have no oven." "Use a pan."

asks a judge to rate one response and prints the score.
"""

import collections
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from endpoint import SECRET, Completion, Endpoint, NoReply, Question
from folder import load, weight_times
from replies import final_answer, read_choice, read_object, read_score
from run import (UserError, broadcast, default_device, gather, main, naming, option, parse, parse_json,
                 progress, rank, read_appended, read_json, seed_from, share_of)
from sample import SLOTS, Sample, Sampling, generate
from schema import TEXT, optional, record
from tokenizer import TEMPLATE_DATE, Tokenizer

# ------------------------------------------------------------------------- asking a model

MAX_TOKENS = dict(verdict=8, text=1024)  # of a reply: a number or a name; a JSON object
MORE_ROOM = " (give --judge-tokens)"  # what helps a judge that thinks

Reply = str | NoReply
Value = TypeVar("Value")


@dataclass
class JudgeArgs:
    """Who judges: the arguments of every program that may ask a judge."""

    judge: str = option("", "a local model, or the endpoint's name for one", "judge")
    judge_url: str = option("", "OpenAI-compatible endpoint, such as https://api.openai.com/v1", "judge")
    judge_cache: str = option("runs/verdicts.jsonl", "file that keeps every reply", "judge")
    judge_at_once: int = option(8, "requests to the endpoint at one time", "judge")
    judge_timeout: float = option(60.0, "seconds to wait for one of its replies", "judge")
    judge_tokens: int = option(0, "tokens to think in, beside those of the reply (8 of a score)", "judge")
    judge_options: str = option("", "JSON object of more fields for every request to the endpoint, such as "
                                    '{"reasoning_effort": "low"}; null takes a field out', "judge")
    judge_key_header: str = option("", "header that carries the key (default: Authorization, at Azure "
                                       "api-key)", "judge")


class Judge:
    """Asks one model questions, and keeps its replies in a file.

    args: who is asked; UserError if they name no judge or a malformed endpoint. slots, date: how many replies
    a local model decodes together, and the date in its chat template.
    """

    def __init__(self, args: JudgeArgs, slots: int = SLOTS, date: str = TEMPLATE_DATE):
        self.args, self.slots, self.date = args, slots, date
        self.tokenizer, self.model = None, None  # of a local judge; loaded at its first question
        if not args.judge:
            raise UserError("no judge is named: give --judge MODEL (and --judge-url for an endpoint)")
        if not 1 <= args.judge_at_once <= 1024 or not 0 < args.judge_timeout <= 86_400:
            raise UserError("--judge-at-once must be from 1 to 1024, --judge-timeout positive and at most a "
                            "day, 86400")
        if args.judge_tokens < 0:
            raise UserError("--judge-tokens must be at least 0")
        if args.judge_url:
            options = request_options(args.judge_options)
            self.endpoint = Endpoint(args.judge_url, args.judge, args.judge_at_once, args.judge_timeout,
                                     options, args.judge_key_header)
        elif args.judge_options or args.judge_key_header:
            raise UserError("--judge-options and --judge-key-header are an endpoint's: give --judge-url too")
        else:
            self.endpoint = None

        # Part of every key: another judge, other replies.
        self.identity = f"{args.judge_url.rstrip('/')} {args.judge}{args.judge_options}"
        if not self.endpoint:  # another model may have been written to the same folder since
            self.identity = " ".join([self.identity, date, *weight_times(args.judge)])

        # Each process appends to a file of its own; process 0 reads them all for everyone.
        cache = Path(args.judge_cache)
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.cache = cache.with_name(f"{cache.name}.process-{rank()}") if rank() else cache
        self.replies: dict[str, Reply] = broadcast({} if rank() else read_cache(cache))

    def key(self, system: str, user: str, max_tokens: int) -> str:
        """The name of a question in the cache: a hash of the judge and of all that it is asked."""
        asked = json.dumps([self.identity, system, user, max_tokens])
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    def ask(self, questions: list[Question], max_tokens: int, label: str) -> list[Reply]:
        """The reply to each question (system prompt, user message), or why it has none.

        max_tokens: of a reply, to which --judge-tokens are added. A question that is cached is not asked,
        equal ones are asked once, and processes share the rest. label: names the progress bar. Raises
        UserError if an endpoint refuses or stays silent.
        """
        must_be_whole = max_tokens > MAX_TOKENS["verdict"]  # half a text is none; a verdict may end early
        max_tokens += self.args.judge_tokens
        keys = [self.key(*question, max_tokens) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True)
               if key not in self.replies}
        share = share_of(list(new.items()))
        replies = {}
        bar = progress(len(share), "replies", label)
        with naming(self.cache), open(self.cache, "a", encoding="utf-8") as file:

            def store(i: int, answer: Completion | NoReply) -> None:
                key, _ = share[i]
                replies[key] = reply = reply_of(answer, must_be_whole)
                if isinstance(answer, Completion):  # a question that was refused may be asked again
                    file.write(json.dumps(cache_row(key, self.args.judge, reply)) + "\n")
                    file.flush()
                bar.update(1)

            asked = [question for _, question in share]
            if asked and self.endpoint:
                self.endpoint.ask_all(asked, max_tokens, store)
            elif asked:
                self.ask_local_model(asked, max_tokens, store)
        bar.close()
        all_replies = gather([replies[key] for key, _ in share])
        self.replies |= zip(new, all_replies, strict=True)
        return [self.replies[key] for key in keys]

    def ask_local_model(self, questions: list[Question], max_tokens: int,
                        store: Callable[[int, Completion | NoReply], None]) -> None:
        """Ask the local model every question; `store` is given its number and the reply, as by
        Endpoint.ask_all."""
        if self.model is None:
            self.tokenizer = Tokenizer(self.args.judge, self.date)
            self.model = load(self.args.judge, torch.bfloat16, device=default_device())

        prompts = [self.tokenizer.chat(user, system) for system, user in questions]
        room = self.model.config.max_position_embeddings - max_tokens
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]

        def on_finished(k: int, sample: Sample) -> None:
            # Some templates open the thoughts themselves: the reply then begins within them.
            opened = "<think>" if self.tokenizer.thoughts_began else ""
            store(fitting[k], Completion(opened + self.tokenizer.decode(sample.ids), sample.finished))

        for i, prompt in enumerate(prompts):
            if len(prompt) > room:
                store(i, NoReply("too long"))
        greedy = Sampling(temperature=0, top_p=1, max_new_tokens=max_tokens)
        generate(self.model, [prompts[i] for i in fitting], greedy, self.tokenizer.stop_ids, seed=0,
                 slots=self.slots, on_finished=on_finished)

    def check_endpoint(self) -> None:
        """Ask an endpoint one harmless question, whatever the cache holds, before any other work is done.

        Raises UserError if it refuses or stays silent; says so if the reply cannot be read. Of a local model
        nothing is asked: its folder was found, and it would take memory from what comes first.
        """
        problem = ""
        if self.endpoint and not rank():
            [question] = score_questions([("How do I keep bread fresh?", "Freeze it.", "I live in Nairobi.")])
            max_tokens = MAX_TOKENS["verdict"] + self.args.judge_tokens
            try:
                answer = self.endpoint.ask(question, max_tokens, threading.Event())
            except UserError as e:
                problem = str(e)
            else:
                reply = reply_of(answer)
                _, reason = read_reply(reply, read_score)
                if reason:
                    print(f"--judge {self.args.judge}: its first reply can't be read: {reason}: "
                          f"{text_of(reply)!r}")
        problem = broadcast(problem)
        if problem:
            raise UserError(problem)


def request_options(text: str) -> dict:
    """--judge-options as a dictionary; UserError if it is no JSON object."""
    try:
        options = parse_json(text or "{}")
    except ValueError as e:
        raise UserError(f"--judge-options {text!r} is not JSON: {e}") from None
    if not isinstance(options, dict):
        raise UserError(f"--judge-options {text!r} is not a JSON object")
    secrets = [name for name in re.findall(r'"([^"]*)"\s*:', text) if SECRET.search(name)]
    if secrets:  # they are saved with the results
        raise UserError(f"--judge-options holds a secret, {secrets[0]}: put it into OPENAI_API_KEY instead")
    return options


def reply_of(answer: Completion | NoReply, must_be_whole: bool = False) -> Reply:
    """What is kept of an answer. must_be_whole: of a text that was cut off nothing is read."""
    if isinstance(answer, NoReply):
        return answer
    if not answer.text.strip():
        return NoReply("no text" if answer.is_whole else f"no text within its tokens{MORE_ROOM}", answer.text)
    if must_be_whole and not answer.is_whole:
        return NoReply(f"cut off{MORE_ROOM}", answer.text)
    return answer.text


def text_of(reply: Reply) -> str:
    """The beginning of what a judge, or its server, has said."""
    text = reply.text if isinstance(reply, NoReply) else reply
    return text if len(text) <= 100 else text[:100] + "..."


def cache_row(key: str, judge: str, reply: Reply) -> dict:
    """A line of the cache."""
    if isinstance(reply, NoReply):
        return dict(key=key, judge=judge, reply=reply.text, unread=reply.reason)
    return dict(key=key, judge=judge, reply=reply)


CACHED_REPLY = record(dict(key=TEXT, reply=TEXT, unread=optional(TEXT)))  # a line of the cache


def read_cache(path: Path) -> dict[str, Reply]:
    """Key -> reply, from a judge's cache and from the files that other processes wrote beside it."""
    replies: dict[str, Reply] = {}
    for file in [path, *sorted(path.parent.glob(path.name + ".process-*"))]:
        for row in read_appended(file):
            if not CACHED_REPLY.holds(row):
                raise UserError(f"{file} does not hold a judge's replies: name another --judge-cache")
            reply = row["reply"]
            replies[row["key"]] = NoReply(row["unread"], reply) if row.get("unread") else reply
    return replies


# ------------------------------------------------------------------------- questions and verdicts

# Appendix D.2, word for word. {..} are the fields.
SCORE = ("You are a helpful assistant, that evaluates another assistant's response based on how well the "
         "response is personalized to this user based on their stated preference. Give a score between 1 and "
         "5, 1 if the response is general, and 5 if the response sufficiently addresses the user's "
         "preference. Only respond with a number between 1 and 5 and do not provide an explanation.")
COMPARE = ("You are a fair judge. Use the following rubric to decide whether response_a or response_b is "
           "better. Respond with response_a or response_b. Do not include any additional text.")
INFER = ("You are a helpful assistant that infers a user's preferences based on their selections from a "
         "previous conversation example. Write personalization instructions based on these inferred "
         "preferences. The instructions should be general enough to apply to future conversations on "
         "different topics and formatted as a JSON object. In JSON, all keys and string values must be "
         'enclosed in double quotes ("). For example, "key name": "value" is valid, but key name: "value" or '
         "'key name': 'value' are not. Each key should use snake case, summarizing the corresponding "
         "instruction in one or two words, and the value should be detailed instructions of no more than two "
         "sentences. Avoid using any topic specific instructions and focus on the user's general "
         "preferences.")
CREATIVE = ("You are a helpful and creative assistant tasked with generating different user preference "
            "descriptions.")
REWRITE = ("Given the following information about the user's preferences, rewrite it as something the user "
           "would say to the assistant. Output the response in JSON format. For example: {example}. Here's a "
           "new example: {new}.")
RUBRIC = ("Given the following user's preference, generate a JSON scoring rubric with criteria and "
          "score-descriptions. Here are some examples: Example 1: {0} Example 2: {1} Example 3: {2} New "
          "preference: {preference}.")
PAPER = Path(__file__).parent / "assets" / "paper.json"  # D.2's longer examples, among other things

# A line that looks like one of the fields of a question, and the place in chat markup
# (<|im_end|>, <s>, [INST], </think>) where a space breaks it up.
FIELD_NAMES = r"user|assistant|system|option[ _-]*[ab]|response[ _-]*(?:[ab]|options)"
FIELD = re.compile(rf"[\W_]*(?:{FIELD_NAMES})(?![^\W_])[^:]*:", re.IGNORECASE)
MARKUP = re.compile(r"(?<=<)(?=[|<]|/?s>|/?(?=\w+>)\w+_of_\w|/?[\w:]{0,9}think(?:ing)?>)"
                    r"|(?<=\[)(?=/?(?:INST|THINK)\])", re.IGNORECASE)


def quote(text: str) -> str:
    """A text as it goes into a question, where it must stay a text.

    Lines that look like one of the question's fields are marked as quoted, with "> ", and chat markup is
    broken up by a space.
    """
    text = text.encode("utf-8", "replace").decode()  # without half surrogate pairs
    lines = MARKUP.sub(" ", text).splitlines()  # at every kind of line end
    return "\n".join("> " + line if FIELD.match(line) else line for line in lines)


# ------------------------------------------------------------------------- what a judge is asked

def read_reply(reply: Reply, read: Callable[[str], Value | None]) -> tuple[Value | None, str]:
    """What a reply says, and ""; or None, and why it cannot be read."""
    if isinstance(reply, NoReply):
        return None, reply.reason
    if final_answer(reply) is None:
        return None, f"thinking that does not end{MORE_ROOM}"
    value = read(reply)
    return value, "not in the form asked for" if value is None else ""


def read_replies(judge: Judge, questions: list[Question], kind: str, label: str,
                 read: Callable[[str], Value | None],
                 unread: collections.Counter | None = None) -> list[Value | None]:
    """Ask, and read each reply by `read`; None where it cannot be read, which is counted and printed.

    kind: of MAX_TOKENS. unread: a counter to which the reasons are added.
    """
    replies = judge.ask(questions, MAX_TOKENS[kind], label)
    reasons: collections.Counter = collections.Counter()
    examples, values = {}, []
    for reply in replies:
        value, reason = read_reply(reply, read)
        values.append(value)
        if reason:
            reasons[reason] += 1
            examples.setdefault(reason, text_of(reply))
    if unread is not None:
        unread.update(reasons)
    if reasons:
        parts = [f"{count} {reason}, such as {examples[reason]!r}" for reason, count in reasons.items()]
        print(f"{label}: {sum(reasons.values())} of {len(replies)} replies can't be read: {'; '.join(parts)}")
    return values


def score_questions(rows: list[tuple[str, str, str]]) -> list[Question]:
    """D.2's reward evaluation instruction for each (prompt, response, preference)."""
    return [(SCORE, f"User: {quote(prompt)}\nAssistant: {quote(response)}\n"
                    f"User's preference: {quote(preference)}")
            for prompt, response, preference in rows]


def rate(judge: Judge, rows: list[tuple[str, str, str]], label: str = "scores",
         unread: collections.Counter | None = None) -> list[int | None]:
    """A score from 1 to 5 for each (prompt, response, preference); None where it cannot be read.

    unread: a counter to which the reasons of these are added.
    """
    return read_replies(judge, score_questions(rows), "verdict", label, read_score, unread)


def reward(judge: Judge, prompts: list[str], contexts: list[str], responses: list[str],
           label: str = "rewards") -> list[int | None]:
    """A score from 1 to 5 for each response, by D.2's RLAIF scoring instruction; None where it is unread.

    contexts: what each prompt's user prefers. The wording is `rate`'s, but the preference comes first.
    """
    questions = [(SCORE, f"User preference: {quote(context)}\nUser: {quote(prompt)}\n"
                         f"Assistant: {quote(response)}")
                 for prompt, context, response in zip(prompts, contexts, responses, strict=True)]
    return read_replies(judge, questions, "verdict", label, read_score)


def require_readable(judge: Judge, prompts: list[str], contexts: list[str], responses: list[str]) -> None:
    """UserError where most of a judge's first rewards cannot be read: nothing could be learned from it.

    The replies are kept, so that those responses' rewards cost nothing more.
    """
    rewards = reward(judge, prompts, contexts, responses, "first rewards")
    unread = rewards.count(None)
    if 2 * unread > len(rewards):
        raise UserError(f"--judge {judge.args.judge}: {unread} of its first {len(rewards)} replies can't be "
                        "read as a score: take another judge (one that thinks needs --judge-tokens)")


def compare(judge: Judge, rows: list[tuple[str, str, str]]) -> list[tuple[float | None, bool]]:
    """(verdict, flipped) for each (criteria, a, b), asked in both orders.

    verdict: 1 if a wins both times, 0 if b does, 1/2 if the judge prefers the same place both times (the
    verdict flips with the order), None if a reply cannot be read.
    """
    questions = []
    for criteria, a, b in rows:
        for first, second in ((a, b), (b, a)):
            fields = f"{quote(criteria)}\nResponse_a: {quote(first)}\nResponse_b: {quote(second)}"
            questions.append((COMPARE, fields))
    choices = read_replies(judge, questions, "verdict", "comparisons", read_choice)
    verdicts = []
    for in_order, swapped in zip(choices[::2], choices[1::2], strict=True):
        if in_order is None or swapped is None:
            verdicts.append((None, False))
        elif in_order == swapped:
            verdicts.append((0.5, True))
        else:
            verdicts.append((float(in_order == "a"), False))
    return verdicts


def infer(judge: Judge, rows: list[tuple[str, str, str]]) -> list[list[str] | None]:
    """The preferences that explain each (prompt, chosen, rejected): the values of the judge's JSON object.

    Whether the chosen response is option A or B follows from a hash; each is the case in half of the rows.
    """
    def read(reply: str) -> list[str] | None:
        values = (read_object(reply) or {}).values()
        texts = [value.strip() for value in values if isinstance(value, str)]
        return [text for text in texts if text not in ("", "value")] or None  # "value": the form it was shown

    questions = []
    for prompt, chosen, rejected in rows:
        chosen_is_a = seed_from("option", prompt, chosen) % 2 == 1
        a, b = (chosen, rejected) if chosen_is_a else (rejected, chosen)
        fields = (f"User's prompt: {quote(prompt)}\nResponse options:\nOption A: {quote(a)}\n"
                  f"Option B: {quote(b)}\nUser's preferred response: Option {'A' if chosen_is_a else 'B'}")
        questions.append((INFER, fields))
    return read_replies(judge, questions, "text", "preferences", read)


def rewrite(judge: Judge, preferences: list[dict]) -> list[str | None]:
    """What a user who has each of these preferences would say.

    A preference has Multi-Bench's keys: dimension, subdimension, preference and description.
    """
    example = read_json(PAPER)["preference_example"]
    blank = "fill this with your response"
    shown = ("", blank, example["user-statement"])  # neither a blank nor the example is this user's

    def read(reply: str) -> str | None:
        statement = (read_object(reply) or {}).get("user-statement")
        is_own = isinstance(statement, str) and statement.strip() not in shown
        return statement.strip() if is_own else None

    questions = []
    for preference in preferences:
        new = {"dimension": preference["dimension"], "sub-dimension": preference["subdimension"],
               "preference": preference["preference"], "explanation": preference["description"],
               "user-statement": blank}
        questions.append((CREATIVE, REWRITE.format(example=json.dumps(example), new=json.dumps(new))))
    return read_replies(judge, questions, "text", "statements", read)


def score_descriptions(rubric: dict) -> dict | None:
    """What each score from 1 to 5 means by a rubric; None where it does not say."""
    scores = rubric.get("score_descriptions") or rubric.get("score-descriptions")
    return scores if isinstance(scores, dict) else None


def rubric_text(rubric: dict) -> str:
    """A rubric as the judge that compares reads it: its criteria, then what each score from 1 to 5 means.
    KeyError where it lacks either."""
    scores = score_descriptions(rubric)
    if scores is None:
        raise KeyError("score_descriptions")
    return (f"{rubric['criteria']} Use the following scoring rubric: "
            f"{json.dumps(scores, ensure_ascii=False)}")


def rubrics(judge: Judge, preferences: list[str]) -> list[str | None]:
    """A rubric for each preference, as text."""
    examples = read_json(PAPER)["rubric_examples"]
    shown = [example["criteria"] for example in examples]

    def read(reply: str) -> str | None:
        rubric = read_object(reply) or {}
        criteria = rubric.get("criteria")
        is_own = isinstance(criteria, str) and criteria not in shown
        return rubric_text(rubric) if is_own and score_descriptions(rubric) else None

    texts = [json.dumps(example) for example in examples]
    questions = [(CREATIVE, RUBRIC.format(*texts, preference=quote(preference)))
                 for preference in preferences]
    return read_replies(judge, questions, "text", "rubrics", read)


# ------------------------------------------------------------------------- command line

@dataclass
class Args(JudgeArgs):
    """The command line of judge.py itself."""

    response: str = option("", "the response to be judged", positional=True)
    query: str = option("", "what the user asked")
    preference: str = option("", "what the user prefers")


def program() -> None:
    """Have one response rated, and print the score."""
    args = parse(Args, usage=__doc__)
    if not (args.judge and args.response and args.query and args.preference):
        raise UserError('usage: python judge.py --judge DIR --query Q --preference P "response"')
    [score] = rate(Judge(args), [(args.query, args.response, args.preference)])
    print("no score can be read from the judge's reply" if score is None else f"score: {score} of 5")


if __name__ == "__main__":
    main(program)
