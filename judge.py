"""judge.py - asking a model: scores, comparisons, a user's preferences, rubrics (section 5.4, appendix D.2).

    score      1..5: how well a response suits a user's preference              Tables 1 and 7; reward: RLAIF
    compare    which of two responses is better, asked in both orders           Fig. 3
    infer      the preferences behind a user's choice of two responses          PRISM, Community Alignment
    rewrite    a described preference in the user's own words                   Multi-Bench
    rubrics    how to judge whether a response respects a preference            Multi-Bench, Fig. 3

The judge is a local model, sampled greedily, or any OpenAI-compatible endpoint (--judge-url; its key comes
from the environment variable OPENAI_API_KEY). Every reply is appended to a cache as it arrives, under a hash
of what was asked, so nothing is asked twice and a crash loses nothing. A verdict is read from the judge's
reply alone; in the question a response can't open a field or a turn of its own (`quote`). What can't be read
is None: counted by the caller, never scored.
What differs from the paper: the words are D.2's; how fields stand on lines, which it leaves open, is ours.

    python judge.py --judge DIR --query "How do I bake?" --preference "I have no oven." "Use a pan."
"""

import concurrent.futures
import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model import find, load
from run import (UserError, default_device, derive, gather, main, mine, option, parse, progress, rank,
                 read_grown, read_json)
from sample import TEMPLATE_DATE, Sample, Sampling, Tokenizer, generate

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

ATTEMPTS = 6  # at one question; between them 1, 2, 4, ... seconds, or what the server asks for
TOKENS = dict(verdict=8, text=1024)  # a reply's most: a number or a name; a JSON object


# -------------------------------------------------------------------------------- asking

@dataclass
class JudgeArgs:
    """Who judges; every program that may ask a judge adds these."""

    judge: str = option("", "a local model, or the endpoint's name for one", "judge")
    judge_url: str = option("", "OpenAI-compatible endpoint, such as https://api.openai.com/v1", "judge")
    judge_cache: str = option("runs/verdicts.jsonl", "file that keeps every reply", "judge")
    judge_at_once: int = option(8, "requests to the endpoint at one time", "judge")
    judge_timeout: float = option(60.0, "seconds to wait for one of its replies", "judge")


class Judge:
    """Asks one model, and remembers its replies in a file that only grows."""

    def __init__(self, args: JudgeArgs, slots: int = 64, date: str = TEMPLATE_DATE):
        self.args, self.slots, self.date, self.loaded = args, slots, date, None
        self.url = args.judge_url.rstrip("/")
        if not args.judge:
            raise UserError("no judge is named: give --judge MODEL (and --judge-url for an endpoint)")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url {args.judge_url!r} does not begin with http:// or https://")
        if args.judge_at_once < 1 or args.judge_timeout <= 0:
            raise UserError("--judge-at-once and --judge-timeout must be positive")
        self.who = f"{self.url} {args.judge}"
        if not self.url:  # a folder may be written anew under its name
            weights = find(args.judge).glob("*.safetensors")
            self.who += " ".join(["", date, *(str(f.stat().st_mtime_ns) for f in sorted(weights))])
        path = Path(args.judge_cache)
        self.file = path.with_name(path.name + f".process-{rank()}") if rank() else path
        self.file.parent.mkdir(parents=True, exist_ok=True)
        files = [path, *sorted(path.parent.glob(path.name + ".process-*"))]
        rows = [] if rank() else [row for file in files for row in read_grown(file)]
        self.replies: dict[str, str] = gather([{row["key"]: row["reply"] for row in rows}]
                                              if not rank() else [])[0]

    def key(self, system: str, user: str, most: int) -> str:
        return hashlib.sha256(json.dumps([self.who, system, user, most]).encode()).hexdigest()[:32]

    def ask(self, questions: list[tuple[str, str]], most: int, label: str) -> list[str]:
        """The reply, of at most `most` tokens, to each (system prompt, user's turn); equal ones asked once.

        Processes share the questions. Raises UserError where an endpoint refuses or stays silent.
        """
        keys = [self.key(*question, most) for question in questions]
        todo = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.replies}
        share, fresh = mine(list(todo.items())), {}
        bar = progress(len(share), "replies", label)
        with open(self.file, "a", encoding="utf-8") as file:

            def keep(key: str, reply: str) -> None:
                fresh[key] = reply
                file.write(json.dumps(dict(key=key, judge=self.args.judge, reply=reply)) + "\n")
                file.flush()
                bar.update(1)

            if share:
                (self._endpoint if self.url else self._local)(share, most, keep)
        bar.close()
        self.replies |= zip(todo, gather([fresh[key] for key, _ in share]), strict=True)
        return [self.replies[key] for key in keys]

    def _local(self, share: list[tuple[str, tuple[str, str]]], most: int, keep: Callable) -> None:
        if self.loaded is None:
            dtype = torch.bfloat16
            self.loaded = Tokenizer(self.args.judge, self.date), load(self.args.judge, dtype,
                                                                       device=default_device())
        tokenizer, model = self.loaded

        def ended(i: int, sample: Sample) -> None:
            keep(share[i][0], tokenizer.decode(sample.ids))

        prompts = [tokenizer.chat(user, system) for _, (system, user) in share]
        generate(model, prompts, Sampling(0, 1, most), tokenizer.stop_ids, 0, slots=self.slots, ended=ended)

    def _endpoint(self, share: list[tuple[str, tuple[str, str]]], most: int, keep: Callable) -> None:
        lock, stop = threading.Lock(), threading.Event()

        def one(key: str, question: tuple[str, str]) -> None:
            if stop.is_set():  # one has failed: replies on their way are still kept, nothing else is asked
                return
            try:
                reply = self._post(*question, most, stop)
            except BaseException:
                stop.set()
                raise
            with lock:
                keep(key, reply)

        with concurrent.futures.ThreadPoolExecutor(self.args.judge_at_once) as pool:
            try:
                for done in concurrent.futures.as_completed([pool.submit(one, *job) for job in share]):
                    done.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _read(self, request: urllib.request.Request) -> bytes:
        """A reply's body, within --judge-timeout as a whole: some servers send a byte now and then."""
        deadline, body = time.monotonic() + self.args.judge_timeout, b""
        opener = urllib.request.build_opener(NoRedirect)
        with opener.open(request, timeout=self.args.judge_timeout) as answer:
            while chunk := answer.read1(2**16):
                body += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
            if answer.length:  # what the header promised and never came
                raise http.client.IncompleteRead(body, answer.length)
        return body

    def _post(self, system: str, user: str, most: int, stop: threading.Event) -> str:
        """One chat completion. A busy, broken, silent or senseless server is asked again; a refusal is not.
        """
        messages = [dict(role="system", content=system), dict(role="user", content=user)]
        body = dict(model=self.args.judge, messages=messages, temperature=0, max_tokens=most)
        headers = {"Content-Type": "application/json"}
        secret = os.environ.get("OPENAI_API_KEY", "").strip()
        if not secret.isascii():
            raise UserError("OPENAI_API_KEY holds letters that no key has")
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(self.url + "/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(ATTEMPTS):
            pause = 2.0**attempt * random.uniform(0.5, 1)
            try:
                reply = json.loads(self._read(request))["choices"][0]["message"]["content"]
                if reply is None or isinstance(reply, str):  # one without text is unreadable, not missing
                    return (reply or "").encode("utf-8", "replace").decode()  # and no half surrogate pairs
                problem = "a reply that is no text"
            except urllib.error.HTTPError as e:
                if e.code not in (408, 409, 425, 429) and e.code < 500:
                    said = ""
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        said = " ".join(e.read(500).decode("utf-8", "replace").split())
                    said = said.replace(secret, "***") if secret else said
                    raise UserError(f"{self.url} refuses, {e.code}: {said[:200]}") from None
                problem, pause = f"{e.code} {e.reason}", retry_after(e.headers.get("Retry-After"), pause)
            except (OSError, http.client.HTTPException) as e:
                problem = str(getattr(e, "reason", e)) or type(e).__name__
            except (ValueError, LookupError, TypeError, RecursionError):
                problem = "a reply that is no chat completion"
            if attempt + 1 == ATTEMPTS or stop.wait(pause):
                break
        raise UserError(f"{self.url} did not answer in {attempt + 1} attempts, at last: {problem}; all "
                        "replies so far are kept: give the same command again")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever it is redirected."""

    def redirect_request(self, *args) -> None:
        return None


def retry_after(header: str | None, default: float) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; at most a minute."""
    if header is None:
        return default
    if re.fullmatch(r"\d+(\.\d*)?", header.strip()):
        return min(60.0, float(header))
    try:
        return min(60.0, max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time()))
    except ValueError:
        return default


# -------------------------------------------------------------------------------- questions and verdicts

NAMES = r"user|assistant|system|option[ _-]*[ab]|response[ _-]*(?:[ab]|options)"  # of the fields below
FIELD = re.compile(rf"^(?=(?:[^\w\n]|_)*(?:{NAMES})(?![^\W_])[^:\n]*:)", re.I | re.M)
MARKUP = re.compile(r"<(?=[|<]|/?s>|/?\w+_of_\w+>)|\[(?=/?INST\])", re.I)


def quote(text: str) -> str:
    """Text that goes into a question, so that it stays text: lines that look like one of the question's
    fields are marked as quoted, and chat markup (<|im_end|>, [INST], <s>) is broken up."""
    text = "\n".join(text.encode("utf-8", "replace").decode().splitlines())  # every kind of line end
    return FIELD.sub("> ", MARKUP.sub(lambda found: found.group() + " ", text))


def read_score(reply: str) -> int | None:
    """The first whole number, clamped to 1..5."""
    found = re.search(r"-?\d{1,4000}", reply)  # Python reads no longer ones
    return found and min(5, max(1, int(found.group())))


def read_choice(reply: str) -> str | None:
    """'a' or 'b', if the reply names one of the two responses alone."""
    named = {letter.lower() for letter in re.findall(r"response[ _-]?([ab])\b", reply, re.I)}
    return named.pop() if len(named) == 1 else None


def read_object(reply: str) -> dict | None:
    """The first JSON object in a reply, whatever stands around it."""
    for brace in re.finditer("{", reply):
        try:
            return json.JSONDecoder().raw_decode(reply[brace.start():])[0]
        except (ValueError, RecursionError):
            continue
    return None


def score(judge: Judge, rows: list[tuple[str, str, str]], label: str = "scores") -> list[int | None]:
    """1..5 for each (query, response, preference): D.2's reward evaluation instruction."""
    questions = [(SCORE, f"User: {quote(x)}\nAssistant: {quote(y)}\nUser's preference: {quote(c)}")
                 for x, y, c in rows]
    return [read_score(reply) for reply in judge.ask(questions, TOKENS["verdict"], label)]


def reward(judge: Judge, rows: list[tuple[str, str, str]]) -> list[int | None]:
    """1..5 for each (query, response, preference): D.2's RLAIF scoring instruction, the preference first."""
    questions = [(SCORE, f"User preference: {quote(c)}\nUser: {quote(x)}\nAssistant: {quote(y)}")
                 for x, y, c in rows]
    return [read_score(reply) for reply in judge.ask(questions, TOKENS["verdict"], "rewards")]


def compare(judge: Judge, rows: list[tuple[str, str, str]],
            label: str = "comparisons") -> list[tuple[float | None, bool]]:
    """(verdict, flipped) for each (criteria, a, b): 1 where a wins in both orders, 0 where b does, 1/2 where
    the verdict flips with the order; None where a reply can't be read."""
    questions = [(COMPARE, f"{quote(criteria)}\nResponse_a: {quote(one)}\nResponse_b: {quote(two)}")
                 for criteria, a, b in rows for one, two in ((a, b), (b, a))]
    replies = judge.ask(questions, TOKENS["verdict"], label)
    verdicts = []
    for first, second in zip(map(read_choice, replies[::2]), map(read_choice, replies[1::2]), strict=True):
        if first is None or second is None:
            verdicts.append((None, False))
        elif first == second:  # the same place won twice
            verdicts.append((0.5, True))
        else:
            verdicts.append((float(first == "a"), False))
    return verdicts


def infer(judge: Judge, rows: list[tuple[str, str, str]]) -> list[list[str] | None]:
    """The preferences that explain each (prompt, chosen, rejected): the values of the judge's JSON object.

    Whether the chosen one is option A or B follows from a hash: either in half of the rows.
    """
    questions = []
    for prompt, chosen, rejected in rows:
        first = derive("option", prompt, chosen) % 2
        a, b = (chosen, rejected) if first else (rejected, chosen)
        questions.append((INFER, f"User's prompt: {quote(prompt)}\nResponse options:\nOption A: {quote(a)}\n"
                                 f"Option B: {quote(b)}\nUser's preferred response: Option {'BA'[first]}"))
    found = [read_object(reply) or {} for reply in judge.ask(questions, TOKENS["text"], "preferences")]
    texts = ([v.strip() for v in o.values() if isinstance(v, str) and v.strip()] for o in found)
    return [values or None for values in texts]


def rewrite(judge: Judge, preferences: list[dict]) -> list[str | None]:
    """What a user would say who has each of these preferences (dimension, subdimension, preference,
    description)."""
    example = read_json(PAPER)["preference_example"]
    keys = {"dimension": "dimension", "sub-dimension": "subdimension", "preference": "preference",
            "explanation": "description"}
    questions, blank = [], "fill this with your response"
    for p in preferences:
        new = {name: p[key] for name, key in keys.items()}
        new["user-statement"] = blank
        questions.append((CREATIVE, REWRITE.format(example=json.dumps(example), new=json.dumps(new))))
    found = [read_object(reply) or {} for reply in judge.ask(questions, TOKENS["text"], "statements")]
    said = (o.get("user-statement") for o in found)
    return [s.strip() if isinstance(s, str) and s.strip() not in ("", blank) else None for s in said]


def rubric_text(rubric: dict) -> str:
    """A rubric as the pairwise judge reads it: its criteria, then what each score from 1 to 5 means."""
    scores = json.dumps(rubric.get("score_descriptions") or rubric.get("score-descriptions"),
                        ensure_ascii=False)
    return f"{rubric['criteria']} Use the following scoring rubric: {scores}"


def rubrics(judge: Judge, preferences: list[str]) -> list[str | None]:
    """A rubric for each preference, as text."""
    examples = [json.dumps(example) for example in read_json(PAPER)["rubric_examples"]]
    questions = [(CREATIVE, RUBRIC.format(*examples, preference=quote(p))) for p in preferences]
    found = [read_object(reply) or {} for reply in judge.ask(questions, TOKENS["text"], "rubrics")]
    return [rubric_text(o) if isinstance(o.get("criteria"), str)
            and isinstance(o.get("score-descriptions", o.get("score_descriptions")), dict) else None
            for o in found]


# -------------------------------------------------------------------------------- command line

@dataclass
class Args(JudgeArgs):
    prompt: str = option("", "the response to be judged")
    query: str = option("", "what the user asked")
    preference: str = option("", "what the user prefers")


def program() -> None:
    args = parse(Args, usage=__doc__)
    if not (args.judge and args.prompt and args.query and args.preference):
        raise UserError('usage: python judge.py --judge DIR --query Q --preference P "response"')
    verdict, = score(Judge(args), [(args.query, args.prompt, args.preference)])
    print("no score can be read from the judge's reply" if verdict is None else f"score: {verdict} of 5")


if __name__ == "__main__":
    main(program)
