# ruff: noqa: RUF001 - curly quotes and dashes are what some of the cases are about

import json
from collections import Counter
from pathlib import Path

import pytest

from pairs import CHECKS, honours

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
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def cases(passing: bool) -> list[tuple]:
    return [(name, args, text) for name, args, good, bad in TABLE for text in (good if passing else bad)]


@pytest.mark.parametrize("name, args, text", cases(passing=True))
def test_checker_accepts(name, args, text):
    assert CHECKS[name](text, *args) is True
    assert honours([name, *args], text) is True


@pytest.mark.parametrize("name, args, text", cases(passing=False))
def test_checker_rejects(name, args, text):
    assert CHECKS[name](text, *args) is False
    assert honours([name, *args], text) is False


def test_every_word_of_mentions_counts_whole():
    assert CHECKS["mentions"]("a b", "a", "b") and CHECKS["mentions"]("b", "a", "b")
    assert not CHECKS["mentions"]("ab", "a", "b")  # the word borders hold for each of the alternatives


def test_every_checker_is_tested_and_used():
    used = {context["check"][0] for context in read("contexts")}
    assert set(CHECKS) == {name for name, *_ in TABLE} == used


def test_prompts():
    prompts = read("prompts")
    assert all(set(row) == {"id", "prompt", "split"} for row in prompts)
    assert Counter(row["split"] for row in prompts) == {"train": 120, "validation": 16, "test": 40}
    assert len({row["id"] for row in prompts}) == len(prompts)
    # unique beyond case and marks, over all splits: no prompt is in two of them
    assert len({"".join(filter(str.isalnum, row["prompt"].lower())) for row in prompts}) == len(prompts)
    assert all(4 <= len(row["prompt"].split()) <= 14 for row in prompts)


def test_contexts():
    contexts = read("contexts")
    assert all(set(row) == {"id", "kind", "split", "context", "check"} for row in contexts)
    assert Counter((row["split"], row["kind"]) for row in contexts) == {
        ("seen", "form"): 12, ("seen", "content"): 12, ("unseen", "form"): 4, ("unseen", "content"): 4}
    for key in ("id", "context", "check"):
        assert len({str(row[key]) for row in contexts}) == len(contexts), key


@pytest.mark.parametrize("context", read("contexts"), ids=lambda context: context["id"])
def test_check_of_context(context):
    name, *args = context["check"]
    assert name in CHECKS
    for blank in ("", " \n\t"):
        assert honours(context["check"], blank) is False
    if name in ("starts_with", "ends_with"):  # the context names the very words that are checked
        assert f'"{args[0]}' in context["context"]
        assert honours(context["check"], args[0])


def test_content_context_contains_what_it_asks_to_mention():
    for context in read("contexts"):
        if context["check"][0] == "mentions" and context["kind"] == "content":
            assert honours(context["check"], context["context"]), context["id"]
