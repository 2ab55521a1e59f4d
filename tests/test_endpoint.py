"""endpoint.py: a server that speaks in other ways, one that refuses, one that misbehaves in every way."""

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import JUDGE_KEY, JudgeServer, completion

import endpoint
import judge
from judge import Judge, JudgeArgs
from run import UserError, main

ROOT = Path(__file__).parents[1]


class Quick(threading.Event):
    """An event that cuts pauses to a twentieth and remembers how long they were meant to be."""

    pauses = []  # noqa: RUF012

    def wait(self, timeout=None):
        self.pauses += [timeout] * (timeout is not None)
        return super().wait(timeout and timeout / 20)


@pytest.fixture
def quick(monkeypatch) -> list[float]:
    """Pauses between attempts are short; the list of those that were meant."""
    monkeypatch.setattr(threading, "Event", Quick)
    monkeypatch.setattr(Quick, "pauses", [])
    return Quick.pauses


ROWS = [(f"query {i}", f"response {i}.", "preference") for i in range(60)]
RIGHT = [i % 5 + 1 for i in range(60)]


def answer(text, nth=0, arrival=0, **more) -> dict:
    """The right score of one of ROWS."""
    return dict(content=str(RIGHT[int(re.search(r"response (\d+)\.", text)[1])]), **more)


def args_for(server: JudgeServer, folder: Path, **changes) -> JudgeArgs:
    """A judge's arguments for this server, with its cache in a folder that does not exist yet."""
    cache = str(folder / "new" / "verdicts.jsonl")
    return JudgeArgs(**dict(judge="m", judge_url=server.url, judge_cache=cache, judge_timeout=5.0) | changes)


def scores(server: JudgeServer, folder: Path, count: int, **changes) -> list[int | None]:
    """What a new judge says of the first `count` of ROWS."""
    return judge.rate(Judge(args_for(server, folder, **changes)), ROWS[:count])


def kept(folder: Path) -> bytes:
    """The cache file's bytes so far."""
    file = folder / "new" / "verdicts.jsonl"
    return file.read_bytes() if file.exists() else b""


# -------------------------------------------------------------------------------- questions on their way

def test_requests_at_one_time_are_bounded(serve, tmp_path):
    """Never more than --judge-at-once, and that many indeed."""
    server = serve(lambda text, *_: answer(text, wait=lambda: time.sleep(0.02)))
    assert scores(server, tmp_path, 40, judge_at_once=3) == RIGHT[:40]
    assert server.peak == 3 and len(server.asked) == 40


def whole(content, ending="stop", **message) -> bytes:
    """The body of a chat completion that says how it has ended."""
    choice = dict(message=dict(role="assistant", content=content) | message, finish_reason=ending)
    return json.dumps(dict(choices=[choice])).encode()


FAULTS = dict(
    stall=dict(fault="stall"), drop=dict(fault="drop"), reset=dict(fault="reset"), error=dict(status=500),
    busy=dict(status=429, headers=dict(Retry_After=0)), gateway=dict(status=502, body=b"<html>"),
    html=dict(body=b"<html>5</html>"), empty=dict(), bytes=dict(body=b"\xff\xfe5"), number=dict(body=b"5"),
    cut=dict(body=completion("5"), fault="cut"), hang=dict(fault="hang"), null=dict(body=b"null"),
    no_choices=dict(body=b'{"error": {"message": "overloaded, 5"}}'), none=dict(body=b'{"choices": []}'),
    no_message=dict(body=b'{"choices": [{}]}'), no_text=dict(body=completion(5)),
    broke_off=dict(body=whole("5", "error")), broke_off_empty=dict(body=whole("", "error")),
)  # fmt: skip
RARE = dict(nested=dict(body=b"[" * 100_000), drip=dict(fault="drip", body=completion("5")),
            broken_error=dict(status=500, body=b"oh", fault="hang"),
            dripped_error=dict(status=500, body=b"oh", fault="drip"))


@pytest.mark.parametrize("fault", [*FAULTS, *RARE])
def test_after_a_fault_the_question_is_asked_again(fault, serve, tmp_path, quick):
    """Whatever the fault, once more is enough, within the timeout."""
    server = serve(lambda text, nth, _: answer(text) if nth else (FAULTS | RARE)[fault])
    start = time.perf_counter()
    assert scores(server, tmp_path, 1, judge_timeout=0.5) == [1]
    assert len(server.asked) == 2 and kept(tmp_path).count(b"\n") == 1
    assert time.perf_counter() - start < 5  # half a second, and an answer; a drip would take six


def test_pauses_double_unless_the_server_says(serve, tmp_path, quick):
    """About 1, 2, 4, 8 seconds, not all alike; Retry-After comes first."""
    server = serve(lambda text, nth, _: dict(status=503) if nth < 4 else answer(text))
    assert scores(server, tmp_path, 1) == [1] and len(quick) == 4
    factors = [pause / 2**attempt for attempt, pause in enumerate(quick)]
    assert all(0.25 <= f <= 2 for f in factors) and len(set(factors)) > 1
    quick.clear()
    server.plan = lambda text, nth, _: answer(text) if nth else dict(status=429, headers=dict(Retry_After=7))
    assert scores(server, tmp_path, 2) == [1, 2] and quick == [7]


@pytest.mark.parametrize("header, seconds", [
    ("3", 3), ("0", 0), ("600", 60), (None, 4), ("", 4), ("soon", 4), ("nan", 4),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 2099 07:28:00 GMT", 60),
    ("Mon, 99999999999999999999 Jan 2020 00:00:00 GMT", 4),
])  # fmt: skip
def test_retry_after_is_a_number_or_a_date(header, seconds):
    """At most a minute; what is neither is ignored."""
    assert endpoint.retry_after(header, 4.0) == seconds


@pytest.mark.parametrize("plan", [dict(status=500), dict(fault="drop"), dict(body=b"<html>"), None], ids=str)
def test_a_server_that_never_answers_is_given_up(plan, serve, tmp_path, quick, monkeypatch):
    """After ATTEMPTS, with one line that names it; nothing is cached."""
    monkeypatch.setattr(endpoint, "ATTEMPTS", 3)
    server = serve(lambda *_: plan)
    if plan is None:
        server.socket.close()
    with pytest.raises(UserError, match=re.escape(server.url)) as error:
        scores(server, tmp_path, 1)
    assert "\n" not in str(error.value) and len(server.asked) == (3 if plan else 0)
    assert len(quick) == 2 and kept(tmp_path) == b""


# -------------------------------------------------------------------------------- other dialects

def error(message: str, **more) -> bytes:
    """The body of an error, as OpenAI's look."""
    return json.dumps(dict(error=dict(message=message, type="invalid_request_error") | more)).encode()


NEW_LIMIT = error("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                  "'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter")
ONLY_ONE = error("Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
                 "value is supported.", param="temperature", code="unsupported_value")
EXTRA = json.dumps(dict(detail=[dict(type="extra_forbidden", loc=["body", "max_tokens"],
                                     msg="Extra inputs are not permitted")])).encode()
DIALECTS = {  # what a server refuses: (the part of a request that it takes offence at, status, body), ...
    "o-series": [("max_tokens", 400, NEW_LIMIT), ("temperature", 400, ONLY_ONE)],
    "temperature first": [("temperature", 400, ONLY_ONE), ("max_tokens", 400, NEW_LIMIT)],
    "o1-mini": [("system", 400, error("Unsupported value: 'messages[0].role' does not support 'system' with "
                                      "this model.")), ("max_tokens", 400, NEW_LIMIT)],
    "pydantic": [("max_tokens", 422, EXTRA)],
    "Kimi": [("temperature", 400, error("invalid temperature: only 1 is allowed for this model"))],
    "TGI": [("temperature", 422, b'{"error": "`temperature` must be strictly positive"}')],
    "Gemma in vLLM": [("system", 400, b'{"object": "error", "message": "System role not supported"}')],
    "Mistral's template": [("system", 400, error("Conversation roles must alternate user/assistant/..."))],
    "Gemma at Google": [("system", 400, error("Developer instruction is not enabled for models/gemma"))],
    "deprecated": [("temperature", 400, error("`temperature` is deprecated for this model."))],
}


def parts_of(request: dict) -> set[str]:
    """The names of a request's fields and of the roles of its messages."""
    return {*request, *(message["role"] for message in request["messages"])}


@pytest.mark.parametrize("name", DIALECTS)
def test_a_request_is_put_as_the_server_wants_it(name, serve, tmp_path, quick, capsys):
    """Each change is learned from one refusal, said in a line, and kept; nothing else is changed."""
    def plan(text, nth, arrival):
        parts = parts_of(server.requests[-1][2])
        refused = [dict(status=status, body=body) for part, status, body in DIALECTS[name] if part in parts]
        return refused[0] if refused else answer(text)

    server = serve(plan)
    assert scores(server, tmp_path, 3, judge_at_once=1) == RIGHT[:3] and not quick
    changes = len(DIALECTS[name])
    assert len(server.requests) == 3 + changes and capsys.readouterr().out.count("m takes ") == changes
    last = server.requests[-1][2]
    gone = {part for part, _, _ in DIALECTS[name]}
    wanted = {"model", "messages", "user", "system", "temperature", "max_tokens", "stream"} - gone
    assert parts_of(last) == wanted | ({"max_completion_tokens"} if "max_tokens" in gone else set())
    assert judge.SCORE in str(last["messages"]) and 8 in last.values()


def test_many_requests_at_once_learn_together(serve, tmp_path):
    """Eight are refused at the same time: each is asked again, none is lost."""
    def plan(text, nth, arrival):
        request = next(r for _, _, r in server.requests[::-1] if r["messages"][-1]["content"] == text)
        return dict(status=400, body=NEW_LIMIT) if "max_tokens" in request else answer(text)

    server = serve(plan)
    assert scores(server, tmp_path, 20) == RIGHT[:20]


@pytest.mark.parametrize("body", [NEW_LIMIT, ONLY_ONE], ids=["max_tokens", "temperature"])
def test_a_server_that_is_never_content_is_told_of(body, serve, tmp_path, quick):
    """It refuses what it has asked for: no endless loop, and its own words."""
    server = serve(lambda *_: dict(status=400, body=body))
    with pytest.raises(UserError, match="refuses, 400: Unsupported"):
        scores(server, tmp_path, 9, judge_at_once=1)
    assert len(server.asked) <= 10


ADDRESSES = {
    "http://h/v1": "http://h/v1/chat/completions",
    "http://h/v1/": "http://h/v1/chat/completions",
    "http://h/v1/chat/completions": "http://h/v1/chat/completions",
    "http://h:8000": "http://h:8000/chat/completions",
    "http://[::1]:8000/v1": "http://[::1]:8000/v1/chat/completions",
    "https://h/d/m?api-version=1": "https://h/d/m/chat/completions?api-version=1",
    "https://h/d/m/?a=1&b=2": "https://h/d/m/chat/completions?a=1&b=2",
    "https://h/d/m/chat/completions?a=1#x": "https://h/d/m/chat/completions?a=1",
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_the_path_stands_before_the_query(url):
    """Of base addresses, of whole ones, with a port, a query, a fragment."""
    assert endpoint.completions_address(url) == ADDRESSES[url]


@pytest.mark.parametrize("url", [
    "h/v1", "http://", "http:///v1", "ftp://h", "http://h:port/v1", "http://[::1/v1", "http://h/v 1",
    "http://h/\x1b[31m", "http://h\u00e9/v1", "https://me:pass@h/v1", "http://a..b/v1",
    f"http://{'a' * 64}/v1",
])  # fmt: skip
def test_a_malformed_address_is_refused_in_one_line(url):
    """Nothing of a password is repeated."""
    with pytest.raises(UserError) as error:
        endpoint.completions_address(url)
    message = str(error.value)
    assert "--judge-url" in message and message.isprintable() and "pass@" not in message


@pytest.mark.parametrize("query, header, expected", [
    ("", "", "Authorization"), ("?api-version=2024-10-21", "", "api-key"), ("", "X-Api-Key", "X-Api-Key"),
    ("?api-version=1", "Ocp-Apim-Subscription-Key", "Ocp-Apim-Subscription-Key"),
])  # fmt: skip
def test_the_key_is_in_one_header(query, header, expected, serve, tmp_path):
    """Authorization, at Azure's addresses api-key, or the one that is named."""
    server = serve(answer)
    assert scores(server, tmp_path, 1, judge_url=server.url + query, judge_key_header=header) == [1]
    [(path, headers, _)] = server.requests
    holders = {name.lower(): value for name, value in headers.items() if JUDGE_KEY in value}
    assert list(holders) == [expected.lower()]
    assert holders[expected.lower()] == ("Bearer " if expected == "Authorization" else "") + JUDGE_KEY
    assert path == "/v1/chat/completions" + query


@pytest.mark.parametrize("url", ["https://x.openai.azure.com/openai/v1", "https://x.azure-api.net/m",
                                 "https://x.services.ai.azure.com/models?api-version=1"])
def test_azure_is_known_by_its_address(url):
    """And no other address is taken for it."""
    assert endpoint.is_azure(url) and not endpoint.is_azure("https://azure.com.example.org/v1")


def test_no_request_goes_out_under_urllibs_name(serve, tmp_path):
    """Some providers ban it."""
    server = serve(answer)
    scores(server, tmp_path, 1)
    assert server.requests[0][1]["User-Agent"] == endpoint.USER_AGENT and "urllib" not in endpoint.USER_AGENT


def test_options_are_more_fields_of_every_request(serve, tmp_path):
    """null takes one out; another option is another question; what is no object is refused."""
    server = serve(answer)
    options = '{"temperature": null, "reasoning_effort": "low", "max_tokens": 99}'
    assert scores(server, tmp_path, 1, judge_options=options) == [1]
    request = server.requests[0][2]
    assert (request["reasoning_effort"], request["max_tokens"]) == ("low", 99)
    assert "temperature" not in request
    assert scores(server, tmp_path, 1) == [1] and len(server.asked) == 2
    for wrong in ("low", "[1]", '{"a": '):
        with pytest.raises(UserError, match="--judge-options"):
            scores(server, tmp_path, 1, judge_options=wrong)


def test_a_judge_that_thinks_gets_room(serve, tmp_path):
    """--judge-tokens beside the 8 of a score and the 1,024 of a text."""
    preferences = dict(content='{"a": "Be brief."}')
    server = serve(lambda text, *_: preferences if "Option A" in text else answer(text))
    thinker = Judge(args_for(server, tmp_path, judge_tokens=2000))
    assert judge.rate(thinker, ROWS[:1]) == [1] and judge.infer(thinker, ROWS[:1]) == [["Be brief."]]
    assert [request["max_tokens"] for _, _, request in server.requests] == [2008, 3024]


def chunk(text: str | None, ending: str | None = None) -> bytes:
    """One event of a stream."""
    choice = dict(index=0, delta=dict(content=text), finish_reason=ending)
    return b"data: " + json.dumps(dict(choices=[choice])).encode() + b"\n\n"


NO_ROOM = "no text within its tokens (give --judge-tokens)"
THOUGHTS = dict(type="thinking", thinking=[dict(type="text", text="2 things")])
BODIES = {  # a successful answer's body -> its score, or why there is none
    "stream": (chunk("") + chunk("4") + chunk(None, "stop") + b"data: [DONE]\n\n", 4),
    "parts": (whole([THOUGHTS, dict(type="text", text="4")]), 4),
    "reasoning beside": (whole("4", reasoning_content="There are 2 things."), 4),
    "cut verdict": (whole("4\n\n\n", "length"), 4),
    "null": (whole(None), "no text"),
    "blank": (whole(" \n "), "no text"),
    "thought only": (whole(None, "length", reasoning_content="2"), NO_ROOM),
    "empty": (whole("", "length"), NO_ROOM),
    "filter": (whole("", "content_filter"), "filtered"),
    "refusal": (whole(None, refusal="I can't help with that."), "filtered"),
    "error": (error("flagged by moderation", code=403), "filtered"),
    "thoughts": (whole("<think>a 2 b"), "thinking that does not end (give --judge-tokens)"),
    "words": (whole("I give it a 2"), "not in the form asked for"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_is_read_or_its_reason_counted(name, serve, tmp_path, quick, capsys):
    """Asked once; the reason is counted and printed."""
    body, expected = BODIES[name]
    server, unread = serve(lambda *_: dict(body=body)), collections.Counter()
    found = judge.rate(Judge(args_for(server, tmp_path)), ROWS[:2], unread=unread)
    assert len(server.asked) == 2 and not quick
    if isinstance(expected, int):
        assert found == [expected] * 2 and not unread
    else:
        assert found == [None] * 2 and unread == {expected: 2}
        assert f"scores: 2 of 2 replies can't be read: 2 {expected}, such as " in capsys.readouterr().out


def test_of_a_text_that_was_cut_off_nothing_is_read(serve, tmp_path):
    """A draft within thoughts that nothing marks, and the whole text; told by how they end."""
    draft = 'Perhaps {"tone": "cold"}, but then'
    server = serve(lambda *_: dict(body=whole(draft, "length")))
    asker = Judge(args_for(server, tmp_path))
    assert judge.infer(asker, ROWS[:1]) == [None]
    server.plan = lambda *_: dict(body=whole(draft, "content_filter"))
    assert judge.infer(asker, ROWS[2:3]) == [None]
    server.plan = lambda *_: dict(body=whole(draft))
    assert judge.infer(asker, ROWS[1:2]) == [["cold"]]
    again = Judge(args_for(server, tmp_path))
    assert judge.infer(again, ROWS[:2]) == [None, ["cold"]] and len(server.asked) == 3


# -------------------------------------------------------------------------------- refusals

VLLM_LONG = ("This model's maximum context length is 2048 tokens. However, you requested 4000 tokens (3992 "
             "in the messages, 8 in the completion). Please reduce the length of the messages.")
VLLM_ROOM = ("'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context "
             "length is 512 tokens and your request has 300 input tokens.")
ONE_QUESTION = {  # refusals of a single question: status, body, and what they are counted as
    "Azure": (400, error("The response was filtered due to the prompt triggering Azure OpenAI's content "
                         "management policy.", code="content_filter", param="prompt"), "filtered"),
    "OpenAI": (400, error("Invalid prompt: your prompt was flagged as potentially violating our usage "
                          "policy.", code="invalid_prompt"), "filtered"),
    "DeepSeek": (400, error("Content Exists Risk"), "filtered"),
    "DashScope": (400, error("Input data may contain inappropriate content.", code="data_inspection_failed"),
                  "filtered"),
    "OpenRouter": (403, error("Your chosen model requires moderation and your input was flagged"),
                   "filtered"),
    "Moonshot": (400, error("The request was rejected because it was considered high risk"), "filtered"),
    "vLLM": (400, json.dumps(dict(object="error", message=VLLM_LONG, code=400)).encode(), "too long"),
    "no room": (400, error(VLLM_ROOM), "too long"),
    "only so much": (400, error("This model only supports a maximum context length of 512 tokens: lower "
                                "max_tokens, or shorten the messages."), "too long"),
    "OpenAI long": (400, error("Please reduce the length.", code="context_length_exceeded"), "too long"),
    "llama.cpp": (400, error("the request exceeds the available context size, try increasing it"),
                  "too long"),
    "TGI": (422, b'{"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096"}',
            "too long"),
    "Groq": (413, error("Request too large for model m on tokens per minute: Limit 6000"), "too long"),
    "proxy": (413, b"<html>413 Request Entity Too Large</html>", "too long"),
    "Anthropic": (400, error("prompt is too long: 210000 tokens > 200000 maximum"), "too long"),
    "unexplained": (400, b"Bad Request", "refused"),
    "odd": (422, error("this text is not for me"), "refused"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_QUESTION)
def test_a_refused_question_is_unread_and_the_others_are_asked(name, serve, tmp_path, quick, capsys):
    """Its reason is counted and what the server said is printed; another run asks it, and only it, again."""
    status, body, reason = ONE_QUESTION[name]
    server = serve(lambda text, *_: dict(status=status, body=body) if "query 2\n" in text else answer(text))
    for asked in (6, 7):
        unread = collections.Counter()
        found = judge.rate(Judge(args_for(server, tmp_path)), ROWS[:6], unread=unread)
        assert found == [*RIGHT[:2], None, *RIGHT[3:6]] and unread == {reason: 1}
        assert len(server.asked) == asked and not quick and kept(tmp_path).count(b"\n") == 5
        assert f"1 {reason}, such as '{status}: " in capsys.readouterr().out.replace('"', "'")


ALL_QUESTIONS = {  # refusals that every question would meet
    "key": (401, error("Incorrect API key provided.")), "money": (402, error("Insufficient Balance")),
    "rights": (403, error("You have no access to this model")), "edge": (403, b"error code: 1010"),
    "name": (404, error("The model `m` does not exist", code="model_not_found")),
    "path": (404, b'{"detail": "Not Found"}'), "method": (405, b""), "moved": (308, b""),
    "LiteLLM": (400, error("Invalid model name passed in model=m. Call `/v1/models`")),
    "OpenRouter": (400, error("m is not a valid model ID: unknown model")),
    "Groq": (400, error("The model `m` has been decommissioned", code="model_decommissioned")),
    "Google": (400, error("API key not valid. Please pass a valid API key.")),
    "Anthropic": (400, error("Your credit balance is too low")),
    "quota": (429, error("You exceeded your current quota", code="insufficient_quota")),
    "success": (200, error("No auth credentials found", code=401)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_QUESTIONS)
def test_a_refusal_of_the_endpoint_stops_at_once(name, serve, tmp_path, quick):
    """One request, one line with the address and what the server said; no pause, nothing cached."""
    status, body = ALL_QUESTIONS[name]
    server = serve(lambda *_: dict(status=status, body=body))
    with pytest.raises(UserError, match=re.escape(server.url)) as raised:
        scores(server, tmp_path, 9, judge_at_once=1)
    assert len(server.asked) == 1 and not quick and kept(tmp_path) == b""
    said = endpoint.explanation_of(body.decode())
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_too_large_a_limit_is_no_long_question(serve, tmp_path):
    """`message` in quotes is the body's key, not the question: so it stops, instead of leaving all unread."""
    body = error("max_tokens is too large: 8192. This model supports at most 4096 completion tokens")
    server = serve(lambda *_: dict(status=400, body=body))
    with pytest.raises(UserError, match="max_tokens is too large: 8192"):
        scores(server, tmp_path, 30, judge_at_once=1)
    assert len(server.asked) <= endpoint.REFUSALS + 1


def test_unexplained_refusals_in_a_row_stop(serve, tmp_path):
    """One here and there does not, however many there are in all; a row of them is the endpoint's."""
    def every_second(text, nth, arrival):
        return dict(status=400, body=b"no") if arrival % 2 else answer(text)

    server = serve(every_second)
    assert scores(server, tmp_path, 20, judge_at_once=1).count(None) == 10
    server.plan = lambda *_: dict(status=400, body=b"no")
    with pytest.raises(UserError, match="refuses, 400: no"):
        judge.rate(Judge(args_for(server, tmp_path, judge_at_once=1)), ROWS[20:])
    assert len(server.asked) == 20 + endpoint.REFUSALS


def test_filtered_questions_never_stop(serve, tmp_path):
    """However many there are in a row."""
    status, body, _ = ONE_QUESTION["Azure"]
    server = serve(lambda *_: dict(status=status, body=body))
    assert scores(server, tmp_path, 30) == [None] * 30


@pytest.mark.parametrize("said", [b"\x1b[31mred\x07", "a\u202eb\u2028c".encode(), b"x" * 10**6], ids=ascii)
def test_what_a_server_says_is_one_short_printable_line(said, serve, tmp_path):
    """No escape sequences reach the terminal."""
    server = serve(lambda *_: dict(status=401, body=said))
    with pytest.raises(UserError) as raised:
        scores(server, tmp_path, 1)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400


def test_an_endless_answer_is_given_up(serve, tmp_path, quick, monkeypatch):
    """After LARGEST bytes, as nonsense."""
    monkeypatch.setattr(endpoint, "LARGEST", 10_000)
    server = serve(lambda text, nth, _: answer(text) if nth else dict(body=b" " * 100_000 + completion("5")))
    assert scores(server, tmp_path, 1) == [1] and len(server.asked) == 2


# -------------------------------------------------------------------------------- the first question

@pytest.mark.parametrize("name", ALL_QUESTIONS)
def test_an_endpoint_is_tried_before_the_work(name, serve, tmp_path, quick):
    """One question, one line."""
    status, body = ALL_QUESTIONS[name]
    server = serve(lambda *_: dict(status=status, body=body))
    with pytest.raises(UserError, match=re.escape(server.url)):
        Judge(args_for(server, tmp_path)).check_endpoint()
    assert len(server.asked) == 1


def test_a_first_reply_that_cannot_be_read_is_told(serve, tmp_path, capsys):
    """With its reason; one that can be read is not mentioned, and neither is kept."""
    server = serve(lambda *_: dict(body=whole("<think>Well", "length")))
    Judge(args_for(server, tmp_path)).check_endpoint()
    assert "thinking that does not end (give --judge-tokens): '<think>Well'" in capsys.readouterr().out
    server.plan = lambda *_: dict(content="4")
    Judge(args_for(server, tmp_path)).check_endpoint()
    assert capsys.readouterr().out == "" and kept(tmp_path) == b"" and len(server.asked) == 2


@pytest.mark.parametrize("unread, refused", [(0, False), (3, False), (4, True), (6, True)])
def test_a_judge_whose_first_rewards_are_unread_is_refused(unread, refused, serve, tmp_path):
    """More than half of them; the others are kept, so that rewards cost nothing twice."""
    def plan(text, nth, arrival):
        return dict(content="?" if int(re.search(r"query (\d)", text)[1]) < unread else "4")

    server = serve(plan)
    asker = Judge(args_for(server, tmp_path))
    prompts, responses, contexts = (list(column) for column in zip(*ROWS[:6], strict=True))
    with pytest.raises(UserError, match=f"{unread} of its first 6") if refused else contextlib.nullcontext():
        judge.require_readable(asker, prompts, contexts, responses)
    expected = [None] * unread + [4.0] * (6 - unread)
    assert judge.reward(asker, prompts, contexts, responses) == expected and len(server.asked) == 6


# -------------------------------------------------------------------------------- the cache

def test_nothing_is_asked_twice(serve, tmp_path):
    """Equal questions, and those of earlier runs, come from the cache, which only grows."""
    server = serve(answer)
    assert judge.rate(Judge(args_for(server, tmp_path)), ROWS[:3] + ROWS[2::-1]) == [1, 2, 3, 3, 2, 1]
    before = kept(tmp_path)
    assert len(server.asked) == before.count(b"\n") == 3
    assert scores(server, tmp_path, 3) == RIGHT[:3] and len(server.asked) == 3 and kept(tmp_path) == before
    assert scores(server, tmp_path, 5) == RIGHT[:5] and len(server.asked) == 5
    assert kept(tmp_path).startswith(before) and kept(tmp_path).count(b"\n") == 5
    assert all(isinstance(json.loads(line), dict) for line in kept(tmp_path).splitlines())


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_line_that_was_cut_off_is_asked_again(lost, serve, tmp_path):
    """And only that one; afterwards the cache is as it was."""
    server = serve(answer)
    scores(server, tmp_path, 6, judge_at_once=1)
    cache, last = kept(tmp_path), server.asked.pop()
    os.truncate(tmp_path / "new" / "verdicts.jsonl", len(cache) - lost)
    server.asked.clear()
    assert scores(server, tmp_path, 6) == RIGHT[:6] and kept(tmp_path) == cache
    assert server.asked == [last] * (lost > 1)  # without its line end alone the reply is complete


@pytest.mark.parametrize("reply, score", [
    (None, None), ("", None), ("none", None), ('4\n\u2028\x85"\\', 4), ("\x00 4", None), ("\ud800 4", None),
], ids=ascii)  # fmt: skip
def test_any_reply_is_kept(reply, score, serve, tmp_path):
    """Empty, missing, with control characters or half surrogate pairs: cached and read."""
    server = serve(lambda *_: dict(body=completion(reply)))
    assert scores(server, tmp_path, 2) == scores(server, tmp_path, 2) == [score] * 2
    assert len(server.asked) == 2


def test_other_judges_and_limits_are_other_questions(serve, tmp_path):
    """Another name, endpoint, limit or field border is another key; speed is not."""
    server, other = serve(answer), serve(answer)
    base = Judge(args_for(server, tmp_path))
    judges = [base, Judge(args_for(server, tmp_path, judge="n")), Judge(args_for(other, tmp_path))]
    keys = {j.key("s", "u", max_tokens) for j in judges for max_tokens in (8, 9)}
    assert len(keys | {base.key("su", "", 8), base.key("", "su", 8), base.key("u", "s", 8)}) == 9
    for changes in ({}, dict(judge="n"), dict(judge_at_once=1), dict(judge_url=other.url)):
        assert scores(server, tmp_path, 2, **changes) == RIGHT[:2]
    assert len(server.asked) == 4 and len(other.asked) == 2
    for max_tokens in (8, 9, 8):
        base.ask([("s", ROWS[0][1])], max_tokens, "")
    assert len(server.asked) == 6


def test_a_file_of_another_kind_is_refused_as_a_cache(serve, tmp_path):
    """Rows without key and reply: one line that names the file, which stays as it is."""
    server, file = serve(answer), tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p"}\n')
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))} [^\n]*--judge-cache$"):
        scores(server, tmp_path, 1, judge_cache=str(file))
    assert file.read_text() == '{"prompt": "p"}\n' and not server.asked


# -------------------------------------------------------------------------------- the key

@pytest.mark.parametrize("plan", [
    answer, dict(status=500, body=JUDGE_KEY.encode()), dict(status=401, body=f"wrong {JUDGE_KEY}".encode()),
    dict(status=400, body=f"wrong {JUDGE_KEY}, no model".encode()), dict(body=JUDGE_KEY.encode()),
], ids=["answer", "error", "refusal", "question", "garbage"])
def test_the_key_is_sent_and_never_told(plan, serve, tmp_path, quick, monkeypatch, capfd):
    """Not on the terminal, in an error or in the cache, even if the server repeats it."""
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    server = serve(plan if callable(plan) else lambda *_: plan)
    is_answered = callable(plan) or plan.get("status") == 400
    with contextlib.suppress(UserError) if is_answered else pytest.raises(UserError) as error:
        scores(server, tmp_path, 2)
    assert {headers.get("Authorization") for _, headers, _ in server.requests} == {f"Bearer {JUDGE_KEY}"}
    assert JUDGE_KEY not in "".join(capfd.readouterr()) + str(error and error.value) + kept(tmp_path).decode()


@pytest.mark.parametrize("status", [302, 307])
def test_the_key_follows_no_redirect(status, serve, tmp_path, quick):
    """Another server never sees it."""
    elsewhere = serve(answer)
    there = f"http://localhost:{elsewhere.server_port}/v1/chat/completions"
    server = serve(lambda *_: dict(status=status, headers=dict(Location=there)))
    with contextlib.suppress(UserError):
        scores(server, tmp_path, 1)
    assert server.asked and JUDGE_KEY not in str(elsewhere.requests)


@pytest.mark.parametrize("key, sent", [(JUDGE_KEY + "\n", f"Bearer {JUDGE_KEY}"), ("", None), (None, None)],
                         ids=ascii)
def test_a_key_may_end_in_a_newline_or_be_missing(key, sent, serve, tmp_path, quick, monkeypatch):
    """As keys from files do."""
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(answer)
    assert scores(server, tmp_path, 1) == [1] and server.requests[0][1].get("Authorization") == sent


# -------------------------------------------------------------------------------- ends in the middle

@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refusal_midway_keeps_what_is_on_its_way(status, serve, tmp_path):
    """Of four requests under way one is refused, one told to come back in 30 s, two answered a little later.
    """
    def plan(text, nth, arrival):
        if arrival == 8:
            server.until(lambda s: len(s.asked) == 12)
            threading.Timer(0.5, server.gate.set).start()
            return dict(status=status, body=b"is\nno")
        if arrival == 9:
            return dict(status=429, headers=dict(Retry_After=30))
        return answer(text, wait=server.gate.wait if arrival > 9 else lambda: None)

    server, start = serve(plan), time.monotonic()
    with pytest.raises(UserError, match=rf"{status}.*is no") as error:
        scores(server, tmp_path, 40, judge_at_once=4)
    assert "\n" not in str(error.value) and time.monotonic() - start < 20
    assert len(server.asked) == 12 and kept(tmp_path).count(b"\n") == len(server.answered) == 10
    server.plan = answer
    assert scores(server, tmp_path, 40) == RIGHT[:40]
    assert len(server.answered) == len(set(server.answered)) == 40


def child() -> None:
    """A subprocess: prints the scores of ROWS."""
    threading.Event = Quick
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(lambda: print(json.dumps(judge.rate(Judge(JudgeArgs(**json.loads(sys.argv[1]))), ROWS))))


def spawn(args: JudgeArgs) -> subprocess.Popen:
    """`child` in a process of its own."""
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_endpoint; test_endpoint.child()"
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(vars(args))], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_an_interrupt_keeps_what_is_on_its_way(serve, tmp_path):
    """Exit code 130, one line, and every reply that was under way is in the cache."""
    server = serve(lambda text, _, arrival: answer(
        text, wait=(lambda: server.gate.wait(30)) if arrival >= 8 else lambda: None))
    process = spawn(args_for(server, tmp_path, judge_at_once=4, judge_timeout=40.0))
    server.until(lambda s: len(s.asked) == 12 and s.now == 4)
    process.send_signal(signal.SIGINT)
    time.sleep(2)  # it is told while all four still wait
    server.gate.set()
    lines = [line for line in process.communicate(timeout=300)[1].splitlines() if line.strip()]
    assert process.returncode == 130 and len(server.asked) == 12 and kept(tmp_path).count(b"\n") == 12
    [line] = [line for line in lines if not line.startswith("scores: ")]
    assert "interrupted" in line


def test_a_killed_run_goes_on_through_every_fault(serve, tmp_path):
    """Stalls, drops, 429, 500 and garbage, and SIGKILL midway: no verdict is lost or asked twice."""
    def plan(text, nth, arrival):
        i, faults = int(re.search(r"query (\d+)", text)[1]), [*FAULTS.values()]
        return faults[(7 * i + nth) % len(faults)] if nth < i % 3 else answer(text)

    server, at_once = serve(plan), 8
    args = args_for(server, tmp_path, judge_at_once=at_once, judge_timeout=2.0)
    key = Judge(args_for(server, tmp_path / "else")).key
    questions = judge.score_questions(ROWS)
    keyed = {key(*question, judge.MAX_TOKENS["verdict"]): question[1] for question in questions}
    process = spawn(args)
    server.until(lambda s: len(s.answered) >= 25)
    process.kill()
    process.communicate(timeout=300)
    cached = kept(tmp_path)
    saved = {text for key, text in keyed.items() if f'"{key}"'.encode() in cached}
    assert len(keyed) == 60 and len(saved) == cached.count(b"\n") and 25 - at_once <= len(saved) < 60
    server.asked.clear()
    process = spawn(args)
    output = process.communicate(timeout=300)
    assert process.returncode == 0 and json.loads(output[0].splitlines()[-1]) == RIGHT
    assert JUDGE_KEY not in str(output)
    assert not saved & set(server.asked) and set(server.answered) == set(keyed.values())
    assert sum(n - 1 for n in collections.Counter(server.answered).values()) <= at_once
    assert kept(tmp_path).startswith(cached[: cached.rfind(b"\n") + 1]) and kept(tmp_path).count(b"\n") == 60
    server.asked.clear()
    assert judge.rate(Judge(args), ROWS) == RIGHT and not server.asked


# -------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("mistake", [
    dict(judge=""), dict(judge="nowhere/at/all", judge_url=""), dict(judge_url="ftp://127.0.0.1/v1"),
    dict(judge_url="localhost:8000/v1"), dict(judge_url="http://"), dict(judge_at_once=0),
    dict(judge_at_once=-1), dict(judge_timeout=0.0), dict(judge_timeout=-1.0),
], ids=str)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_asked(mistake, serve, tmp_path, quick):
    """One line, no request, no file."""
    server = serve(answer)
    with pytest.raises(UserError) as error:
        scores(server, tmp_path, 1, **mistake)
    assert "\n" not in str(error.value) and not server.asked and not quick and kept(tmp_path) == b""
