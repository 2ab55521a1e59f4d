# ruff: noqa: RUF001 - curly quotes and dashes are what some of the cases are about
"""The demo's checks, its files (assets/demo), and the time that checks and readers take on hostile text."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import seconds_of

import checks
import judge
from checks import CHECKS, extract, honours

DEMO = Path(__file__).parents[1] / "assets" / "demo"

# checker, its arguments -> responses that meet it, responses that do not
TABLE = [
    ("starts_with", ["Dear friend"],
     ["Dear friend, rest a little.", "  \n**Dear friend**, rest.", "“dear FRIEND: rest.", "Dear friend"],
     ["", "My dear friend, rest.", "Dear friends, rest.", "Dear, friend, rest.", "Rest. Dear friend"]),
    ("ends_with", ["Good luck"],
     ["Try it. Good luck!", "Good luck", "Try it.\n\n**good luck!** 🍀 \n", "Try it: “Good luck!”"],
     ["", "Good luck to you!", "Have good lucky", "Try it with notgood luck", "Good  luck"]),
    ("ends_with_question", [],
     ["And you?", "And you? \n", "He asked: “And you?”", "**And _you_?** 😊", "Really?!", "(You, too?)"],
     ["", "?", "And you? Tell me.", "Why? Because.", "And you", "Choose (a or b?)."]),
    ("max_words", [3],
     ["One two three", "  one\n", "**One** – two , three!", "don’t re-enter, naïvely"],
     ["", " \n", "- * !", "One two three four", "1 2 3 4", "a\nb\nc\nd"]),
    ("max_sentences", [2],
     ["Sleep well.", "Sleep! Then **rest.** \n", "It costs 3.50 a day. “Why not?” 😊", "Sleep...\n\nRest?"],
     ["", "...", "Sleep well", "Sleep. Rest. Eat.", "Sleep. Then you should", "Tips\n- sleep\n- rest.",
      "1. Sleep. Rest."]),
    ("lowercase", [],
     ["sleep well.", " été, 3 times!\n", "**rest** 😊"],
     ["", "123 😊", "Sleep well.", "sleep, says É."]),
    ("bullets", [2],
     ["- sleep\n- rest", "* **Sleep**: yes\n\n  • rest \n", "Tips:\n- sleep\n- rest\n", "- 1\n- 2"],
     ["", "- sleep", "- sleep\n- \n* **", "-sleep\n-rest", "**Sleep**\n**Rest**", "1. sleep\n2. rest",
      "---\n---", "Tips:\n- sleep\n- rest\nGood night."]),
    ("emoji", [],
     ["Rest 😊", "🎉", "Rest ❤️ well", "☀ rest"],
     ["", "Rest :-)", "Été – “naïve” • ½ →", "Rest!"]),
    ("exclaims", [3],
     ["Rest! Sleep! Eat!", "!!!", "**Rest!!** “Eat!” \n"],
     ["", "Rest!", "Rest! Eat!", "Rest. Sleep? Eat.", "¡¡¡"]),
    ("quoted", [],
     ['"Rest well."', " “Rest well.”\n", "“It’s late, isn't it?”", '"Rest.\n\nSleep."'],
     ["", '""', "'Rest.'", '"Rest."!', "“Rest.", '"Rest," he said, "and sleep."', '**"Rest."**']),
    ("mentions", ["nurses?", "nursing"],
     ["A nurse knows.", "NURSES!", "Is **nursing** fun", "the nurse’s day", "the _nurse_"],
     ["", "nursery", "a wetnurse", "nurse2", "nürse", "patients"]),
]


def read(name: str) -> list[dict]:
    """The rows of one of the demo's files."""
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def cases(passing: bool) -> list[tuple]:
    """(check, its arguments, response) of TABLE, of the responses that meet it or that do not."""
    return [(name, args, text) for name, args, good, bad in TABLE for text in (good if passing else bad)]


@pytest.mark.parametrize("name, args, text", cases(passing=True))
def test_a_check_accepts_what_meets_it(name, args, text):
    """Whatever case, marks and spaces stand around."""
    assert CHECKS[name](text, *args) is True
    assert honours([name, *args], text) is True


@pytest.mark.parametrize("name, args, text", cases(passing=False))
def test_a_check_rejects_what_only_looks_like_it(name, args, text):
    """Near misses, and nothing at all."""
    assert CHECKS[name](text, *args) is False
    assert honours([name, *args], text) is False


def test_every_alternative_of_mentions_must_be_a_whole_word():
    """Word borders hold for each of the words, not only for the outer ones."""
    assert CHECKS["mentions"]("a b", "a", "b") and CHECKS["mentions"]("b", "a", "b")
    assert not CHECKS["mentions"]("ab", "a", "b")


def test_every_check_is_in_the_table_and_in_the_demo():
    """No check is untested, none unused."""
    used = {context["check"][0] for context in read("contexts")}
    assert set(CHECKS) == {name for name, *_ in TABLE} == used


def test_demo_prompts_are_short_and_no_two_are_alike():
    """120, 16 and 40 of them, so none is in two splits, whatever its case and marks."""
    prompts = read("prompts")
    assert all(set(row) == {"id", "prompt", "split"} for row in prompts)
    assert Counter(row["split"] for row in prompts) == {"train": 120, "validation": 16, "test": 40}
    assert len({row["id"] for row in prompts}) == len(prompts)
    assert len({"".join(filter(str.isalnum, row["prompt"].lower())) for row in prompts}) == len(prompts)
    assert all(4 <= len(row["prompt"].split()) <= 14 for row in prompts)


def test_demo_contexts_are_24_seen_and_8_unseen_ones_all_different():
    """Half of each ask for a form, half for a content."""
    contexts = read("contexts")
    assert all(set(row) == {"id", "kind", "split", "context", "check"} for row in contexts)
    assert Counter((row["split"], row["kind"]) for row in contexts) == {
        ("seen", "form"): 12, ("seen", "content"): 12, ("unseen", "form"): 4, ("unseen", "content"): 4}
    for key in ("id", "context", "check"):
        assert len({str(row[key]) for row in contexts}) == len(contexts), key


@pytest.mark.parametrize("context", read("contexts"), ids=lambda context: context["id"])
def test_a_context_names_the_words_that_its_check_looks_for(context):
    """And no blank response passes the check."""
    name, *args = context["check"]
    assert name in CHECKS
    for blank in ("", " \n\t"):
        assert honours(context["check"], blank) is False
    if name in ("starts_with", "ends_with"):
        assert f'"{args[0]}' in context["context"]
        assert honours(context["check"], args[0])


def test_a_context_about_a_content_mentions_it_itself():
    """Its own words pass its check."""
    for context in read("contexts"):
        if context["check"][0] == "mentions" and context["kind"] == "content":
            assert honours(context["check"], context["context"]), context["id"]


# 100 kB of text that makes a reader try everything: what is repeated, and what stands around it.
PIECES = [" ", "1", "1,000,", "1/2 ", "-", "#### ", "a", "a. ", ".", "?", "_", '"a', "the answer is",
          "Example", "\nQuestion: ", "\u0e01",
          "Good luck ", "arr", "<", "_of", "{", '{"a":', "user "]
AROUND = [('"', ""), ("a", "?b"), ("#### 1", "/2"), ("<a", "b"), ("#### 1\nExample", "x"),
          ("#### 1\nQuestion", "x")]
READERS = {read.__name__: read for read in (checks.number, judge.read_score, judge.read_choice,
                                            judge.read_object, judge.quote)}
READERS |= {f"{style}, flexible": lambda text, style=style: extract(style, text, 4, flexible=True)
            for style in ("math", "choice", "number", "letter")}
READERS |= {"words": checks.words, "says": lambda text: checks.says(text, "no a b")}
READERS |= {name: lambda text, name=name, args=args: CHECKS[name](text, *args) for name, args, *_ in TABLE}
READERS["mentions"] = lambda text: CHECKS["mentions"](text, "arr+", "nurses?")


@pytest.mark.parametrize("reader", READERS)
def test_hostile_text_is_read_in_linear_time(reader):
    """100 kB of it in less than 0.2 s, where a quadratic pattern takes a minute or more."""
    for piece in PIECES:
        for before, after in AROUND:
            text = before + piece * (100_000 // len(piece)) + after
            assert seconds_of(READERS[reader], text) < 0.2, (piece, before, after)
