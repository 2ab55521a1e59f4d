"""judge.py - whether a response is good, by asking a model (section 5.4, appendix D.2).

    rate       a score from 1 to 5: how well a response suits a preference      Tables 1 and 7
    reward     the same, as RLAIF words it                                      RLAIF
    compare    which of two responses is better, asked in both orders           Fig. 3
    infer      the preferences behind a user's choice of two responses          PRISM, Community Alignment
    rewrite    a described preference in the user's own words                   Multi-Bench
    rubrics    how to judge whether a response respects a preference            Multi-Bench, Fig. 3

The judge is a local model, decoded greedily, or any OpenAI-compatible endpoint (--judge-url; its key is read
from the environment variable OPENAI_API_KEY). Every reply is appended to a cache file as it arrives, under a
hash of what was asked, so no question is asked twice and a crash loses nothing. A verdict is read from the
judge's reply alone. No text inside a question can pretend to be another part of the question (`quote`). A
reply that cannot be read gives None, which the caller counts; it never becomes a score.

What differs from the paper: the prompts are appendix D.2's, word for word; how their fields are laid out,
which it leaves open, is ours.

    python judge.py --judge DIR --query "How do I bake?" --preference "I have no oven." "Use a pan."

asks a judge to rate one response and prints the score.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from model import find, load
from run import (UserError, broadcast, default_device, gather, main, option, parse, progress, rank,
                 read_appended, read_json, seed_from, shard)
from sample import Sample, Sampling, generate
from tokenizer import TEMPLATE_DATE, Tokenizer

# ------------------------------------------------------------------------- asking a model

MAX_TOKENS = dict(verdict=8, text=1024)  # of a reply: a number or a name; a JSON object
ATTEMPTS = 6  # at one question to an endpoint; pauses of 1, 2, 4, ... seconds, or what the server asks for

Question = tuple[str, str]  # system prompt, user message
Store = Callable[[str, str], None]  # called with a question's key and its reply as soon as that is there


@dataclass
class JudgeArgs:
    """Who judges: the arguments of every program that may ask a judge."""

    judge: str = option("", "a local model, or the endpoint's name for one", "judge")
    judge_url: str = option("", "OpenAI-compatible endpoint, such as https://api.openai.com/v1", "judge")
    judge_cache: str = option("runs/verdicts.jsonl", "file that keeps every reply", "judge")
    judge_at_once: int = option(8, "requests to the endpoint at one time", "judge")
    judge_timeout: float = option(60.0, "seconds to wait for one of its replies", "judge")


class TryAgain(Exception):
    """What went wrong with a request that may well succeed later."""

    def __init__(self, problem: str, retry_after: str | None = None):
        super().__init__(problem)
        self.retry_after = retry_after  # the server's Retry-After header


class Judge:
    """Asks one model questions, and keeps its replies in a file.

    args: who is asked; UserError if they name no judge or a malformed endpoint. slots, date: how many replies
    a local model decodes together, and the date in its chat template.
    """

    def __init__(self, args: JudgeArgs, slots: int = 64, date: str = TEMPLATE_DATE):
        self.args, self.slots, self.date = args, slots, date
        self.url = args.judge_url.rstrip("/")
        self.tokenizer, self.model = None, None  # of a local judge; loaded at its first question
        if not args.judge:
            raise UserError("no judge is named: give --judge MODEL (and --judge-url for an endpoint)")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url {args.judge_url!r} does not begin with http:// or https://")
        if args.judge_at_once < 1 or args.judge_timeout <= 0:
            raise UserError("--judge-at-once and --judge-timeout must be positive")

        self.identity = f"{self.url} {args.judge}"  # part of every key: another judge, other replies
        if not self.url:  # another model may have been written to the same folder since
            weights = sorted(find(args.judge).glob("*.safetensors"))
            times = [str(file.stat().st_mtime_ns) for file in weights]
            self.identity = " ".join([self.identity, date, *times])

        # Each process appends to a file of its own; process 0 reads them all for everyone.
        cache = Path(args.judge_cache)
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.cache = cache.with_name(f"{cache.name}.process-{rank()}") if rank() else cache
        self.replies: dict[str, str] = broadcast({} if rank() else read_cache(cache))

    def key(self, system: str, user: str, max_tokens: int) -> str:
        """The name of a question in the cache: a hash of the judge and of all that it is asked."""
        asked = json.dumps([self.identity, system, user, max_tokens])
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    def ask(self, questions: list[Question], max_tokens: int, label: str) -> list[str]:
        """The reply, of at most `max_tokens` tokens, to each question (system prompt, user message).

        A question that is cached is not asked, equal ones are asked once, and processes share the rest.
        label: names the progress bar. Raises UserError if an endpoint refuses or stays silent.
        """
        keys = [self.key(*question, max_tokens) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True)
               if key not in self.replies}
        share = shard(list(new.items()))
        replies = {}
        bar = progress(len(share), "replies", label)
        with open(self.cache, "a", encoding="utf-8") as file:

            def store(key: str, reply: str) -> None:
                replies[key] = reply
                file.write(json.dumps(dict(key=key, judge=self.args.judge, reply=reply)) + "\n")
                file.flush()
                bar.update(1)

            if share and self.url:
                self._ask_endpoint(share, max_tokens, store)
            elif share:
                self._ask_local_model(share, max_tokens, store)
        bar.close()
        all_replies = gather([replies[key] for key, _ in share])
        self.replies |= zip(new, all_replies, strict=True)
        return [self.replies[key] for key in keys]

    def _ask_local_model(self, share: list[tuple[str, Question]], max_tokens: int, store: Store) -> None:
        if self.model is None:
            self.tokenizer = Tokenizer(self.args.judge, self.date)
            self.model = load(self.args.judge, torch.bfloat16, device=default_device())

        def on_finished(i: int, sample: Sample) -> None:
            store(share[i][0], self.tokenizer.decode(sample.ids))

        prompts = [self.tokenizer.chat(user, system) for _, (system, user) in share]
        greedy = Sampling(temperature=0, top_p=1, max_new_tokens=max_tokens)
        generate(self.model, prompts, greedy, self.tokenizer.stop_ids, seed=0, slots=self.slots,
                 on_finished=on_finished)

    def _ask_endpoint(self, share: list[tuple[str, Question]], max_tokens: int, store: Store) -> None:
        """Ask with --judge-at-once requests at a time.

        After a failure, or an interrupt, no other question is asked, but replies that are on their way are
        still stored.
        """
        lock, stop = threading.Lock(), threading.Event()

        def ask_one(key: str, question: Question) -> None:
            if stop.is_set():
                return
            try:
                reply = self._post(*question, max_tokens, stop)
            except BaseException:
                stop.set()
                raise
            with lock:
                store(key, reply)

        with concurrent.futures.ThreadPoolExecutor(self.args.judge_at_once) as pool:
            try:
                jobs = [pool.submit(ask_one, key, question) for key, question in share]
                for job in concurrent.futures.as_completed(jobs):
                    job.result()  # raises what the job has raised
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _post(self, system: str, user: str, max_tokens: int, stop: threading.Event) -> str:
        """One question to the endpoint, asked again after a fault that may pass; `stop` ends the pauses."""
        secret = os.environ.get("OPENAI_API_KEY", "").strip()
        if not secret.isascii():
            raise UserError("OPENAI_API_KEY holds letters that no key has")
        headers = {"Content-Type": "application/json"}
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        messages = [dict(role="system", content=system), dict(role="user", content=user)]
        body = dict(model=self.args.judge, messages=messages, temperature=0, max_tokens=max_tokens)
        request = urllib.request.Request(self.url + "/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(ATTEMPTS):
            try:
                return self._request(request, secret)
            except TryAgain as e:
                problem = e
            # Random, so that requests which failed together do not all come back together.
            pause = retry_after(problem.retry_after, 2.0**attempt * random.uniform(0.5, 1))
            if attempt + 1 == ATTEMPTS or stop.wait(pause):
                break
        raise UserError(f"{self.url} did not answer in {attempt + 1} attempts, at last: {problem}; all "
                        "replies so far are kept: give the same command again")

    def _request(self, request: urllib.request.Request, secret: str) -> str:
        """One chat completion's text. TryAgain if the server is busy, broken, silent or makes no sense.

        UserError if it refuses; the key (`secret`) is masked in what it says then.
        """
        try:
            reply = json.loads(self._read(request))["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as e:
            if e.code in (408, 409, 425, 429) or e.code >= 500:
                raise TryAgain(f"{e.code} {e.reason}", e.headers.get("Retry-After")) from None
            explanation = ""
            with contextlib.suppress(OSError, http.client.HTTPException):  # a refusal needs no explanation
                explanation = " ".join(e.read(500).decode("utf-8", "replace").split())
            if secret:
                explanation = explanation.replace(secret, "***")
            raise UserError(f"{self.url} refuses, {e.code}: {explanation[:200]}") from None
        except (OSError, http.client.HTTPException) as e:
            raise TryAgain(str(getattr(e, "reason", e)) or type(e).__name__) from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise TryAgain("a reply that is no chat completion") from None
        if reply is not None and not isinstance(reply, str):
            raise TryAgain("a reply that is no text")
        # A reply without text is one that cannot be read. Half surrogate pairs, which no file holds, go.
        return (reply or "").encode("utf-8", "replace").decode()

    def _read(self, request: urllib.request.Request) -> bytes:
        """The body of a response, all of it within --judge-timeout: some servers send a byte now and then."""
        deadline = time.monotonic() + self.args.judge_timeout
        opener = urllib.request.build_opener(NoRedirect)
        body = b""
        with opener.open(request, timeout=self.args.judge_timeout) as response:
            while chunk := response.read1(2**16):
                body += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
            if response.length:  # the header promised more bytes than have come
                raise http.client.IncompleteRead(body, response.length)
        return body


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key along, to wherever the server points."""

    def redirect_request(self, *args) -> None:
        return None


def read_cache(path: Path) -> dict[str, str]:
    """Key -> reply, from a judge's cache and from the files that other processes wrote beside it."""
    replies = {}
    for file in [path, *sorted(path.parent.glob(path.name + ".process-*"))]:
        for row in read_appended(file):
            if "key" not in row or "reply" not in row:
                raise UserError(f"{file} does not hold a judge's replies: name another --judge-cache")
            replies[row["key"]] = row["reply"]
    return replies


def retry_after(header: str | None, default: float) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; at most a minute."""
    if header is None:
        return default
    if re.fullmatch(r"\d+(\.\d*)?", header.strip()):
        return min(60.0, float(header))
    try:
        wait = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return default
    return min(60.0, max(0.0, wait))


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
# (<|im_end|>, <s>, [INST]) where a space breaks it up.
FIELD_NAMES = r"user|assistant|system|option[ _-]*[ab]|response[ _-]*(?:[ab]|options)"
FIELD = re.compile(rf"[\W_]*(?:{FIELD_NAMES})(?![^\W_])[^:]*:", re.IGNORECASE)
MARKUP = re.compile(r"(?<=<)(?=[|<]|/?s>|/?(?=\w+>)\w+_of_\w)|(?<=\[)(?=/?INST\])", re.IGNORECASE)


def quote(text: str) -> str:
    """A text as it goes into a question, where it must stay a text.

    Lines that look like one of the question's fields are marked as quoted, with "> ", and chat markup is
    broken up by a space.
    """
    text = text.encode("utf-8", "replace").decode()  # without half surrogate pairs
    lines = MARKUP.sub(" ", text).splitlines()  # at every kind of line end
    return "\n".join("> " + line if FIELD.match(line) else line for line in lines)


def read_score(reply: str) -> int | None:
    """The first whole number of a reply, clamped to 1..5."""
    found = re.search(r"-?\d{1,4000}", reply)  # Python converts no longer ones
    return min(5, max(1, int(found[0]))) if found else None


def read_choice(reply: str) -> str | None:
    """'a' or 'b', if the reply names exactly one of the two responses."""
    named = {letter.lower() for letter in re.findall(r"response[ _-]?([ab])\b", reply, re.I)}
    return named.pop() if len(named) == 1 else None


def read_object(reply: str) -> dict | None:
    """The first JSON object in a reply, whatever stands around it."""
    decoder = json.JSONDecoder()
    # Only a brace before a first name and its colon, or before a closing brace, can open an object.
    for start in re.finditer(r'\{(?=[ \t\r\n]*(?:\}|"(?:[^"\\]|\\.)*"[ \t\r\n]*:))', reply, re.DOTALL):
        try:
            return decoder.raw_decode(reply[start.start():])[0]
        except RecursionError:  # nested a thousand times: no judge's reply
            return None
        except ValueError:
            continue
    return None


def read_objects(replies: Iterable[str]) -> list[dict]:
    """The first JSON object of each reply; an empty one where there is none."""
    return [read_object(reply) or {} for reply in replies]


def rate(judge: Judge, rows: list[tuple[str, str, str]], label: str = "scores") -> list[int | None]:
    """A score from 1 to 5 for each (prompt, response, preference), by D.2's reward evaluation instruction."""
    questions = [(SCORE, f"User: {quote(prompt)}\nAssistant: {quote(response)}\n"
                         f"User's preference: {quote(preference)}")
                 for prompt, response, preference in rows]
    return [read_score(reply) for reply in judge.ask(questions, MAX_TOKENS["verdict"], label)]


def reward(judge: Judge, rows: list[tuple[str, str, str]]) -> list[int | None]:
    """The same by D.2's RLAIF scoring instruction, which puts the preference first."""
    questions = [(SCORE, f"User preference: {quote(preference)}\nUser: {quote(prompt)}\n"
                         f"Assistant: {quote(response)}")
                 for prompt, response, preference in rows]
    return [read_score(reply) for reply in judge.ask(questions, MAX_TOKENS["verdict"], "rewards")]


def compare(judge: Judge, rows: list[tuple[str, str, str]],
            label: str = "comparisons") -> list[tuple[float | None, bool]]:
    """(verdict, flipped) for each (criteria, a, b), asked in both orders.

    verdict: 1 if a wins both times, 0 if b does, 1/2 if the judge prefers the same place both times (the
    verdict flips with the order), None if a reply cannot be read.
    """
    questions = []
    for criteria, a, b in rows:
        for first, second in ((a, b), (b, a)):
            fields = f"{quote(criteria)}\nResponse_a: {quote(first)}\nResponse_b: {quote(second)}"
            questions.append((COMPARE, fields))
    choices = [read_choice(reply) for reply in judge.ask(questions, MAX_TOKENS["verdict"], label)]
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
    questions = []
    for prompt, chosen, rejected in rows:
        chosen_is_a = seed_from("option", prompt, chosen) % 2 == 1
        a, b = (chosen, rejected) if chosen_is_a else (rejected, chosen)
        fields = (f"User's prompt: {quote(prompt)}\nResponse options:\nOption A: {quote(a)}\n"
                  f"Option B: {quote(b)}\nUser's preferred response: Option {'A' if chosen_is_a else 'B'}")
        questions.append((INFER, fields))
    preferences = []
    for reply in read_objects(judge.ask(questions, MAX_TOKENS["text"], "preferences")):
        texts = [value.strip() for value in reply.values() if isinstance(value, str) and value.strip()]
        preferences.append(texts or None)
    return preferences


def rewrite(judge: Judge, preferences: list[dict]) -> list[str | None]:
    """What a user who has each of these preferences would say.

    A preference has Multi-Bench's keys: dimension, subdimension, preference and description.
    """
    example = json.dumps(read_json(PAPER)["preference_example"])
    blank = "fill this with your response"
    questions = []
    for preference in preferences:
        new = {"dimension": preference["dimension"], "sub-dimension": preference["subdimension"],
               "preference": preference["preference"], "explanation": preference["description"],
               "user-statement": blank}
        questions.append((CREATIVE, REWRITE.format(example=example, new=json.dumps(new))))
    statements = []
    for reply in read_objects(judge.ask(questions, MAX_TOKENS["text"], "statements")):
        statement = reply.get("user-statement")
        readable = isinstance(statement, str) and statement.strip() not in ("", blank)
        statements.append(statement.strip() if readable else None)
    return statements


def rubric_text(rubric: dict) -> str:
    """A rubric as the judge that compares reads it: its criteria, then what each score from 1 to 5 means."""
    scores = rubric.get("score_descriptions") or rubric.get("score-descriptions")
    return (f"{rubric['criteria']} Use the following scoring rubric: "
            f"{json.dumps(scores, ensure_ascii=False)}")


def rubrics(judge: Judge, preferences: list[str]) -> list[str | None]:
    """A rubric for each preference, as text."""
    examples = [json.dumps(example) for example in read_json(PAPER)["rubric_examples"]]
    questions = [(CREATIVE, RUBRIC.format(*examples, preference=quote(preference)))
                 for preference in preferences]
    texts = []
    for reply in read_objects(judge.ask(questions, MAX_TOKENS["text"], "rubrics")):
        scores = reply.get("score-descriptions", reply.get("score_descriptions"))
        readable = isinstance(reply.get("criteria"), str) and isinstance(scores, dict)
        texts.append(rubric_text(reply) if readable else None)
    return texts


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
