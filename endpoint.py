"""endpoint.py - questions to an OpenAI-compatible endpoint, and what becomes of each.

One place builds the request (`Endpoint.body`), and it follows what the server says: some models take no
max_tokens but max_completion_tokens, no temperature, or no system prompt (`CHANGES`). One place decides what
a refusal means (`Endpoint.outcome`):

    the question    filtered, too long, any other 400: this question has no reply, the others are asked
    the endpoint    401, 402, 403, 404, an unknown model, or a row of unexplained refusals: UserError
    the moment      429, 500, silence, nonsense: asked again after a pause, ATTEMPTS times

The key is read from the environment variable OPENAI_API_KEY, is sent to this one address alone, and stands in
no message. Only Python's own library is used. A client library would bring pauses and named errors, the
smaller part of this file; it would not know whether an error is about one question or about all of them.

What differs from the paper: it does not say how it asked its judges.

    python -m pytest tests/test_endpoint.py
"""

import concurrent.futures
import contextlib
import email.utils
import http.client
import json
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from run import UserError, parse_json

ATTEMPTS = 6  # at one question; pauses of 1, 2, 4, ... seconds, or what the server asks for
REFUSALS = 5  # so many unexplained ones in a row are the endpoint's fault, not the questions'
LARGEST = 2**24  # bytes of an answer, which is some kilobytes long
USER_AGENT = "mipo-judge/1"  # several providers turn away the name that urllib gives itself

Question = tuple[str, str]  # system prompt, user message


# ------------------------------------------------------------------------- what may come back

@dataclass(frozen=True)
class NoReply:
    """What stands in a reply's place where a question has none.

    reason: in a word or two, by which such questions are counted. text: what was said instead.
    """

    reason: str
    text: str = ""


@dataclass(frozen=True)
class Completion:
    """The text of a chat completion; `is_whole` is false where it was cut off at its last token."""

    text: str
    is_whole: bool = True


class TryAgain(Exception):
    """What went wrong with a request that may well succeed later."""

    def __init__(self, problem: str, retry_after: str | None = None):
        super().__init__(problem)
        self.retry_after = retry_after  # the server's Retry-After header


class Refusal(Exception):
    """A request that this server will not answer, however often it is asked. text: what it said, in full."""

    def __init__(self, status: int, text: str):
        super().__init__(f"{status}: {explanation_of(text)}")
        self.status, self.text = status, text


# What servers say, in whatever words, of a single question, ...
FILTERED = re.compile(
    r"content[ _-]?(?:filter|polic|management|exists risk)|filtered|moderation|flagged|inappropriate"
    r"|usage polic|safety|data[ _]?inspection|high risk|responsible ?ai|sensitive (?:content|information)",
    re.IGNORECASE)
TOO_LONG = re.compile(
    r"context[ _-]?(?:length|size|window)|maximum (?:model |input |prompt )?length|max_model_len"
    r"|(?:prompt|input|request|message|text|string)s?\b(?!\"\s*:)[^.]{0,80}\b"
    r"(?:too (?:long|large)|longer than|exceed)"
    r"|too many (?:input )?tokens|string_above_max|tokens.{0,60}must be <=", re.IGNORECASE)
# ... of the name or the account, ...
ENDPOINT = re.compile(
    r"model\b.{0,80}\b(?:not found|not exist|unknown|not a valid|not available|decommissioned)"
    r"|(?:invalid|unknown|no such) model|model_not_found|api[ _-]?key|credit|billing|quota|unauthori[sz]ed",
    re.IGNORECASE)
# ... and of a part of the request that the model does not take: change -> the part.
REJECTED = re.compile(
    r"unsupported|not support|n't support|unrecogni[sz]ed|unknown|unexpected|extra (?:input|field|param)"
    r"|not (?:permitted|allowed|enabled)|deprecated|instead|\bonly\b|strictly positive|must alternate",
    re.IGNORECASE)
CHANGES = {
    "max_completion_tokens instead of max_tokens": re.compile(r"max_tokens"),
    "no temperature, so replies are drawn at the server's own": re.compile(r"temperature", re.IGNORECASE),
    "no system prompt, so it stands before the question": re.compile(
        r"system (?:role|prompt|message|instruction)|developer instruction|role.{0,30}system|roles must",
        re.IGNORECASE),
}
NEW_LIMIT, NO_TEMPERATURE, NO_SYSTEM = CHANGES


def explanation_of(text: str) -> str:
    """The message in an error's body, one short line without control characters.

    >>> explanation_of('{"error": {"message": "No such model."}}')
    'No such model.'
    """
    try:
        error = parse_json(text)
        error = error.get("error", error)
        message = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError):
        message = None
    message = message if isinstance(message, str) else text
    printable = "".join(c if c.isprintable() else " " for c in message)
    return " ".join(printable.split())[:200]


def completion_of(body: bytes) -> Completion | NoReply:
    """What a successful answer says: a chat completion, or a stream of them that was not asked for.

    Raises Refusal or TryAgain if it is an error after all, or makes no sense.
    """
    try:
        answer = joined_stream(body) if body.lstrip().startswith(b"data:") else json.loads(body)
        if "choices" not in answer and "error" in answer:
            raise_error(answer)
        choice = answer["choices"][0]
        content, ending = choice["message"].get("content"), choice.get("finish_reason")
        if ending == "error":  # the provider broke off
            raise TryAgain("a reply that ended in an error")
        if isinstance(content, list):  # parts: thoughts have a type of their own
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if content is not None and not isinstance(content, str):
            raise TryAgain("a reply that is no text")
        if not content and (ending == "content_filter" or choice["message"].get("refusal")):
            return NoReply("filtered", str(choice["message"].get("refusal") or ending))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise TryAgain("a reply that is no chat completion") from None
    # Lone surrogates, which no file holds, go.
    is_whole = ending not in ("length", "content_filter")
    return Completion((content or "").encode("utf-8", "replace").decode(), is_whole)


def raise_error(answer: dict) -> None:
    """Raise the exception for an error sent with a success status, as some gateways do."""
    error = answer["error"]
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code < 500 and code not in (408, 409, 425, 429):
        raise Refusal(code, json.dumps(answer))
    raise TryAgain(explanation_of(json.dumps(answer)))


def joined_stream(body: bytes) -> dict:
    """Server-sent events, "data: {...}" each, as the one completion that they are pieces of."""
    text, ending = "", None
    for line in body.splitlines():
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            return event
        for choice in event["choices"][:1]:
            text += choice["delta"].get("content") or ""
            ending = choice.get("finish_reason") or ending
    return dict(choices=[dict(message=dict(content=text), finish_reason=ending)])


def retry_after(header: str | None, default: float) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; at most a minute."""
    if header is None:
        return default
    if re.fullmatch(r"\d+(\.\d*)?", header.strip()):
        return min(60.0, float(header))
    try:
        wait = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return default
    return min(60.0, max(0.0, wait))


# ------------------------------------------------------------------------- addresses

HOST = re.compile(r"(?:[^/?#]*:)?/*([^/?#]*)")  # with whatever stands before it
SECRET = re.compile(r"api[-_]?key|auth|password|secret|token$|^(?:key|sig|code)$", re.IGNORECASE)  # its name


def completions_address(url: str) -> str:
    """Where questions go: the base address with /chat/completions, before its query if it has one.

    UserError if the address is malformed, or holds a password or a key: it is saved with the results.

    >>> completions_address("https://x.openai.azure.com/openai/deployments/m?api-version=2024-10-21")
    'https://x.openai.azure.com/openai/deployments/m/chat/completions?api-version=2024-10-21'
    """
    if "@" in HOST.match(url)[1]:
        raise UserError("--judge-url holds a name or a password: put the key into OPENAI_API_KEY instead")
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port, (parts.hostname or "").encode("idna")  # ValueError where they are malformed
    except ValueError:
        raise UserError(f"--judge-url {url!r} is not an address") from None
    secrets = [name for name in urllib.parse.parse_qs(parts.query) if SECRET.search(name)]
    if secrets:
        raise UserError(f"--judge-url holds a secret, {secrets[0]}: put it into OPENAI_API_KEY instead, and "
                        "name the header that carries it with --judge-key-header")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--judge-url {url!r} does not begin with http:// or https:// and a name")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"--judge-url {url!r} holds characters that no address has")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def is_azure(address: str) -> bool:
    """Whether an address is Azure's, where a key stands in a header of its own."""
    parts = urllib.parse.urlsplit(address)
    hosts = (".azure.com", ".azure-api.net", ".azure.us", ".azure.cn")
    return parts.hostname.endswith(hosts) or "api-version" in urllib.parse.parse_qs(parts.query)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key along, to wherever the server points."""

    def redirect_request(self, *args) -> None:
        return None


class Hasty(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Cuts its connection after some seconds, whatever is still on its way: a socket's own timeout begins
    anew with every byte, and so never ends where a server sends a header's letter now and then."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.socket = seconds, None
        self.under_way = threading.Lock()

    def __enter__(self) -> "Hasty":
        self.under_way.acquire()
        threading.Thread(target=self.cut_when_late, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.under_way.release()

    def do_open(self, http_class, request, **options):
        handler = self

        class Connection(http_class):
            def connect(self) -> None:
                super().connect()
                handler.socket = self.sock

        return super().do_open(Connection, request, **options)

    def cut_when_late(self) -> None:
        if not self.under_way.acquire(timeout=self.seconds) and self.socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


def read_all(response, deadline: float) -> bytes:
    """The body of a response, by the deadline and of a sane size: some servers send a byte now and then."""
    body = b""
    while chunk := response.read1(2**16):
        body += chunk
        if time.monotonic() >= deadline:
            break
        if len(body) > LARGEST:
            raise TryAgain(f"an answer of more than {LARGEST} bytes")
    if time.monotonic() >= deadline:  # what was cut then may look whole
        raise TimeoutError("timed out")
    if response.length:  # the header promised more bytes than have come
        raise http.client.IncompleteRead(body, response.length)
    return body


# ------------------------------------------------------------------------- asking

class Endpoint:
    """One model behind one address.

    url: the base address, as --judge-url. at_once: requests at one time. timeout: seconds for each. options:
    more fields of every request; None takes one out. key_header: what carries the key; "": the usual one.
    Raises UserError if the address or the header's name is malformed.
    """

    def __init__(self, url: str, model: str, at_once: int = 8, timeout: float = 60.0,
                 options: dict | None = None, key_header: str = ""):
        if not re.fullmatch(r"[A-Za-z0-9_-]*", key_header):
            raise UserError(f"--judge-key-header {key_header!r} is not the name of a header")
        self.address = completions_address(url)
        self.name = self.address.split("?")[0]  # for messages: a query may hold what is nobody's business
        self.model, self.at_once, self.timeout = model, at_once, timeout
        self.options, self.key_header = options or {}, key_header
        self.changes: frozenset[str] = frozenset()  # of CHANGES, that this model has asked for
        self.refused_in_a_row = 0
        self.lock = threading.Lock()

    def ask_all(self, questions: list[Question], max_tokens: int,
                store: Callable[[int, Completion | NoReply], None]) -> None:
        """Ask every question; `store` is given its number and what came back as soon as that is there.

        After a failure, or an interrupt, no other question is asked, but replies that are on their way are
        still stored. Raises UserError if the endpoint refuses or stays silent.
        """
        stop = threading.Event()

        def ask_one(i: int) -> None:
            if stop.is_set():
                return
            try:
                reply = self.ask(questions[i], max_tokens, stop)
            except BaseException:
                stop.set()
                raise
            with self.lock:
                store(i, reply)

        with concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            try:
                jobs = [pool.submit(ask_one, i) for i in range(len(questions))]
                for job in concurrent.futures.as_completed(jobs):
                    job.result()  # raises what the job has raised
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def ask(self, question: Question, max_tokens: int, stop: threading.Event) -> Completion | NoReply:
        """Ask one question, again after a fault that may pass, or in another form if the model wants one.

        stop: ends the pauses. Raises UserError as `ask_all` does.
        """
        attempt = 0
        while True:
            changes = self.changes
            request = self.request(question, max_tokens, changes)
            try:
                reply = self.send(request)
                self.refused_in_a_row = 0
                return reply
            except Refusal as refusal:
                if self.change(refusal, changes):
                    continue
                return self.outcome(refusal)
            except TryAgain as e:
                problem = e
            # Random, so that requests which failed together do not all come back together.
            pause = retry_after(problem.retry_after, 2.0**attempt * random.uniform(0.5, 1))
            attempt += 1
            if attempt == ATTEMPTS or stop.wait(pause):
                break
        raise UserError(f"{self.name} did not answer in {attempt} attempts, at last: {problem}; all "
                        "replies so far are kept: give the same command again")

    def body(self, question: Question, max_tokens: int, changes: frozenset[str]) -> dict:
        """The JSON of a request, as this model wants it."""
        system, user = question
        messages = [dict(role="system", content=system), dict(role="user", content=user)]
        if NO_SYSTEM in changes:
            messages = [dict(role="user", content=f"{system}\n\n{user}")]
        limit = "max_completion_tokens" if NEW_LIMIT in changes else "max_tokens"
        body = {"model": self.model, "messages": messages, "temperature": 0, limit: max_tokens}
        if NO_TEMPERATURE in changes:
            del body["temperature"]
        body |= dict(stream=False) | self.options
        return {key: value for key, value in body.items() if value is not None}

    def request(self, question: Question, max_tokens: int,
                changes: frozenset[str]) -> urllib.request.Request:
        """The HTTP request of one question, with the key."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": USER_AGENT}
        if secret := key():
            if self.key_header:
                headers[self.key_header] = secret
            elif is_azure(self.address):
                headers["api-key"] = secret
            else:
                headers["Authorization"] = f"Bearer {secret}"
        data = json.dumps(self.body(question, max_tokens, changes)).encode()
        return urllib.request.Request(self.address, data, headers)

    def send(self, request: urllib.request.Request) -> Completion | NoReply:
        """What the server answers. TryAgain if it is busy, broken, silent or makes no sense; Refusal if it
        refuses. The key is masked in what it says then."""
        deadline = time.monotonic() + self.timeout
        connection = Hasty(self.timeout)
        opener = urllib.request.build_opener(NoRedirect, connection)
        try:
            with connection:
                try:
                    with opener.open(request, timeout=self.timeout) as response:
                        return completion_of(read_all(response, deadline))
                except urllib.error.HTTPError as e:
                    refusal, text = e, b""
                    with e, contextlib.suppress(OSError, http.client.HTTPException, TryAgain):
                        text = read_all(e, deadline)  # an error needs no explanation
        except (OSError, http.client.HTTPException) as e:
            late = "timed out" if time.monotonic() >= deadline else ""
            raise TryAgain(late or masked(str(getattr(e, "reason", e)) or type(e).__name__)) from None
        said = masked(text.decode("utf-8", "replace"))
        will_pass = refusal.code in (408, 409, 425, 429) or refusal.code >= 500
        if will_pass and "insufficient_quota" not in said:  # no pause fills an empty account
            problem = f"{refusal.code} {explanation_of(masked(refusal.reason))}: {explanation_of(said)}"
            raise TryAgain(problem, refusal.headers.get("Retry-After"))
        raise Refusal(refusal.code, said)

    def change(self, refusal: Refusal, changes: frozenset[str]) -> bool:
        """Whether the refusal asks for another form of request, which all later ones take.

        changes: those that the refused request had.
        """
        about_request = refusal.status in (400, 422) and REJECTED.search(refusal.text)
        if not about_request or FILTERED.search(refusal.text) or TOO_LONG.search(refusal.text):
            return False
        for change, part in CHANGES.items():
            if change not in changes and part.search(refusal.text):
                with self.lock:
                    if change not in self.changes:
                        print(f"{self.model} takes {change}")
                    self.changes |= {change}
                return True
        return False

    def outcome(self, refusal: Refusal) -> NoReply:
        """What a refused question has in its reply's place; UserError where all would be refused alike."""
        status, said = refusal.status, refusal.text
        if status in (400, 403, 422, 451) and FILTERED.search(said):
            return NoReply("filtered", str(refusal))
        if status in (400, 413, 422) and (status == 413 or TOO_LONG.search(said)):
            return NoReply("too long", str(refusal))
        with self.lock:
            self.refused_in_a_row += 1
        about_one = status in (400, 422) and not ENDPOINT.search(said)
        if about_one and self.refused_in_a_row < REFUSALS:
            return NoReply("refused", str(refusal))
        raise UserError(f"{self.name} refuses, {refusal}")


def key() -> str:
    """The key, without the line end that keys from files have; UserError if it is no key at all."""
    secret = os.environ.get("OPENAI_API_KEY", "").strip()
    if not secret.isascii() or not secret.isprintable():
        raise UserError("OPENAI_API_KEY holds characters that no key has")
    return secret


def masked(text: str) -> str:
    """A text without the key."""
    return text.replace(key(), "***") if key() else text
