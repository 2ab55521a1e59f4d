"""formats.py: preference data in the formats of trainers, and columns that resemble ours.

Awkward files stand in tables, a row a member of their kind.
"""

import json
import re

import pytest

from data import load_jsonl
from run import UserError

Q, GOOD, BAD = "Why is the sky blue?", "It scatters blue light.", "No idea."


def user(text: str = Q) -> dict:
    """What a user says, in the manner of OpenAI."""
    return dict(role="user", content=text)


def assistant(text: str) -> dict:
    """What the assistant says."""
    return dict(role="assistant", content=text)


BRIEF = "Be brief."
SYSTEM = dict(role="system", content=BRIEF)
PARTS = dict(role="user", content=[dict(type="text", text=Q)])
HUMAN, GPT = {"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}
ANSWERS = dict(chosen=GOOD, rejected=BAD)
TURNS = dict(chosen=[assistant(GOOD)], rejected=[assistant(BAD)])
WHOLE = dict(chosen=[user(), assistant(GOOD)], rejected=[user(), assistant(BAD)])
LONG = dict(chosen=[user(), assistant("x"), user("y"), assistant(GOOD)],
            rejected=[user(), assistant("x"), user("y"), assistant(BAD)])

READ = {  # a row of a format, and the system prompt that it holds
    "TRL, conversations": (dict(prompt=[user()], **TURNS), None),
    "TRL, a message each": (dict(prompt=[user()], chosen=assistant(GOOD), rejected=assistant(BAD)), None),
    "TRL, a system turn": (dict(prompt=[SYSTEM, user()], **TURNS), BRIEF),
    "TRL, parts of text": (dict(prompt=[PARTS], **TURNS), None),
    "TRL, implicit prompt": (WHOLE, None),
    "TRL, implicit prompt with a system turn": (
        dict(chosen=[SYSTEM, *WHOLE["chosen"]], rejected=[SYSTEM, *WHOLE["rejected"]]), BRIEF),
    "UltraFeedback": (
        dict(prompt=Q, prompt_id="7", score_chosen=8.0, messages=WHOLE["chosen"], **WHOLE), None),
    "UltraFeedback, blanks around the prompt": (dict(prompt=f"{Q}\n", **WHOLE), None),
    "UltraFeedback, a system turn": (
        dict(prompt=Q, chosen=[SYSTEM, *WHOLE["chosen"]], rejected=[SYSTEM, *WHOLE["rejected"]]), BRIEF),
    "a prompt as text, answers as turns": (dict(prompt=Q, **TURNS), None),
    "HH": ({name: f"\n\nHuman: {Q}\n\nAssistant: {text}" for name, text in ANSWERS.items()}, None),
    "HH, without the blank lines before": (
        {name: f"Human: {Q}\n\nAssistant: {text}" for name, text in ANSWERS.items()}, None),
    "HH, the prompt apart": (dict(prompt=f"\n\nHuman: {Q}\n\nAssistant:", **ANSWERS), None),
    "ShareGPT": (dict(conversations=[HUMAN], chosen=GPT, rejected=GPT | dict(value=BAD)), None),
    "ShareGPT, a system turn": (
        dict(conversations=[{"from": "system", "value": BRIEF}, HUMAN], chosen=GPT,
             rejected=GPT | dict(value=BAD)), BRIEF),
    "ShareGPT, a system column": (
        dict(conversations=[HUMAN], system=BRIEF, chosen=GPT, rejected=GPT | dict(value=BAD)), BRIEF),
    "Axolotl": (dict(messages=[user()], chosen=assistant(GOOD), rejected=assistant(BAD)), None),
    "Alpaca": (dict(instruction=Q, input="", history=[], **ANSWERS), None),
    "Alpaca, a system column": (dict(instruction=Q, system=BRIEF, **ANSWERS), BRIEF),
    "Alpaca, an input": (dict(instruction="Why is", input="the sky blue?", **ANSWERS), None),
    "Argilla": (dict(instruction=Q, chosen_response=GOOD, rejected_response=BAD), None),
    "Orca": (dict(system=BRIEF, question=Q, **ANSWERS), BRIEF),
    "distilabel": (dict(input=Q, **ANSWERS), None),
    "OpenAI": (dict(input=dict(messages=[user()]), preferred_output=[assistant(GOOD)],
                    non_preferred_output=[assistant(BAD)]), None),
    "PKU-SafeRLHF": (dict(prompt=Q, response_0=BAD, response_1=GOOD, better_response_id=1), None),
    "our own": (dict(prompt=Q, system=BRIEF, **ANSWERS), BRIEF),
}
DROPPED = {  # a row that stands beside a good one, and why it is left out
    "several turns": (LONG, "more than one question and one answer"),
    "several turns, HH": (dict(chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                               rejected="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"),
                          "more than one question and one answer"),
    "a history": (dict(instruction=Q, history=[["a", "b"]], **ANSWERS), "more than one question"),
    "a prompt of several turns": (dict(prompt=[user(), assistant("x"), user()], **TURNS),
                                  "more than one question"),
    "different prompts": (dict(chosen=WHOLE["chosen"], rejected=[user("Who?"), assistant(BAD)]),
                          "answer different prompts"),
    "another prompt": (dict(prompt="Who?", **WHOLE), "answer different prompts"),
    "a system turn in one of them": (dict(chosen=[SYSTEM, *WHOLE["chosen"]], rejected=WHOLE["rejected"]),
                                     "answer different prompts"),
    "a tool's turn": (dict(prompt=[user(), dict(role="tool", content="4")], **TURNS), "a turn of 'tool'"),
    "an image": (dict(prompt=[dict(role="user", content=[dict(type="image")])], **TURNS),
                 "something else than text"),
    "a call instead of text": (dict(prompt=[user()], chosen=[dict(role="assistant", content=None)],
                                    rejected=[assistant(BAD)]), "something else than text"),
    "no answer at the end": (dict(chosen=[user()], rejected=[user(), assistant(BAD)]),
                             "does not end with the"),
}
REFUSED = {  # a row, and what the message has to say
    "KTO": (dict(prompt=Q, completion=GOOD, label=True), "unpaired preference data.*a chosen and a rejected"),
    "completions": (dict(prompt=Q, completion=GOOD), "'completion' 'chosen' for --method sft"),
    "all completions": (dict(instruction=Q, completions=[{}]), "UltraFeedback.*binarized"),
    "instructions": (dict(instruction=Q, input="", output=GOOD),
                     "Alpaca's instructions.*'instruction' 'prompt'"),
    "ranked": (dict(prompt=Q, answers=[{}]), "Nectar"),
    "SHP": (dict(history=Q, human_ref_A=GOOD, human_ref_B=BAD, labels=1), "SHP"),
    "HelpSteer": (dict(context=[user()], response1=GOOD, response2=BAD), "HelpSteer.*'prompt'"),
    "arena": (dict(conversation_a=[user()], conversation_b=[user()], winner="a"), "arena"),
    "messages": (dict(messages=WHOLE["chosen"]), "without a rejected answer.*'prompt'"),
    "conversations": (dict(conversations=[HUMAN, GPT]), "ShareGPT.*without a rejected answer"),
    "no prompt apart": (ANSWERS, "whose prompt is not told apart"),
    "text": (dict(text="Once upon a time"), "plain text"),
    "wrapped": (dict(data=[dict(prompt=Q)]), "no 'prompt' .the columns here are data"),
    "texts in a list": (dict(prompt=Q, chosen=[GOOD], rejected=[BAD]), "'chosen' holds list"),
    "a number in a turn": (dict(prompt=[user()], chosen=[assistant(3)], rejected=[assistant(BAD)]),
                           "holds int"),
    "a number beside turns": (dict(prompt=Q, chosen=TURNS["chosen"], rejected=4), "'rejected' holds int"),
}
NAMED = {  # columns that resemble ours beside what a row needs
    "idx": dict(prompt=Q, context="I am ten.", idx="7"),
    "uid": dict(prompt=Q, context="I am ten.", uid="7"),
    "preference": dict(prompt=Q, context="I am ten.", preference="7"),
    "references": dict(prompt=Q, context="I am ten.", references="x"),
    "content": dict(prompt=Q, content="x"),
    "contexts": dict(prompt=Q, contexts="x", **ANSWERS),  # pairs need no context
    "prompts": dict(prompt=Q, context="c", prompts=[Q]),
    "completion": dict(prompt=Q, context="c", completion=GOOD),
}


def write(path, *rows: dict):
    """A .jsonl file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_tables_have_at_least_sixty_rows():
    """None of them has been lost."""
    assert sum(map(len, (READ, DROPPED, REFUSED, NAMED))) >= 60


@pytest.mark.parametrize("name", READ)
def test_one_turn_preference_data_are_read(name, tmp_path):
    """The question, the better answer, the worse one and what the system says, whatever the format."""
    row, system = READ[name]
    (e,) = load_jsonl(write(tmp_path / "a.jsonl", row), 0)
    question = "Why is\nthe sky blue?" if name == "Alpaca, an input" else Q
    assert (e.prompt.strip(), e.chosen, e.rejected, e.system) == (question, GOOD, BAD, system)


@pytest.mark.parametrize("name", DROPPED)
def test_a_row_of_more_than_one_turn_is_dropped_counted_and_named(name, tmp_path, capsys):
    """The others are read; where none is left the file is refused."""
    row, reason = DROPPED[name]
    file = write(tmp_path / "a.jsonl", dict(prompt=[user()], **TURNS), row, row)
    assert [e.prompt for e in load_jsonl(file, 0)] == [Q]
    out = capsys.readouterr().out
    assert f"{file}: 2 of 3 rows dropped: " in out and reason in out and "(first: 2, 3)" in out
    with pytest.raises(UserError, match=f"no row can be used: .*{reason}"):
        load_jsonl(write(tmp_path / "b.jsonl", row), 0)


def test_rows_that_are_dropped_are_counted_of_all(tmp_path, capsys):
    """Whatever the reasons of the others."""
    rows = [DROPPED[name][0] for name in DROPPED]
    file = write(tmp_path / "a.jsonl", dict(prompt=[user()], **TURNS), *rows)
    load_jsonl(file, 0)
    counts = re.findall(r"(\d+) of (\d+) rows dropped", capsys.readouterr().out)
    assert sum(int(dropped) for dropped, _ in counts) == len(rows) and len(counts) > 1
    assert {int(of) for _, of in counts} == {len(rows) + 1}


@pytest.mark.parametrize(("row", "name"), [
    (dict(question=Q, input="A long text.", chosen=GOOD, rejected=BAD), "input"),
    (dict(prompt=[user()], response_0="x", **TURNS), "response_0"),
])
def test_a_column_that_another_format_reads_is_named_where_it_is_not_read(row, name, tmp_path, capsys):
    load_jsonl(write(tmp_path / "a.jsonl", row), 0)
    assert f"columns not used: {name}" in capsys.readouterr().out


def test_a_blank_system_prompt_is_none(tmp_path):
    """As a blank context is none: the template's own stays."""
    row = dict(prompt=Q, chosen=GOOD, rejected=BAD, system=" ")
    assert load_jsonl(write(tmp_path / "a.jsonl", row), 0)[0].system is None


@pytest.mark.parametrize("name", REFUSED)
def test_other_data_are_refused_by_name_with_what_to_do(name, tmp_path):
    """With file and line."""
    row, message = REFUSED[name]
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{message}"):
        load_jsonl(write(tmp_path / "a.jsonl", row), 0)


@pytest.mark.parametrize("name", NAMED)
def test_a_column_that_resembles_ours_is_only_named(name, tmp_path, capsys):
    """A hint is for rows that lack what they need."""
    file = write(tmp_path / "a.jsonl", NAMED[name])
    assert load_jsonl(file, 0)[0].prompt == Q
    assert capsys.readouterr().out == f"{file}: columns not used: {name}\n"


@pytest.mark.parametrize("column", ["preference", "persona", "profile"])
def test_a_text_that_may_be_the_context_gets_a_hint(column, tmp_path, capsys):
    """Where there is no context; a number is none."""
    load_jsonl(write(tmp_path / "a.jsonl", {"prompt": Q, column: "I am ten."}), 0)
    assert f"{column} (did you mean 'context'?)" in capsys.readouterr().out
    load_jsonl(write(tmp_path / "b.jsonl", {"prompt": Q, column: 3}), 0)
    assert "did you mean" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_as_its_rows(name, indent, tmp_path):
    """On one line or on many; a row is named by its place."""
    rows = [dict(prompt=Q, **ANSWERS), dict(prompt=[user()], **TURNS)]
    (tmp_path / name).write_text("\ufeff" + json.dumps(rows, indent=indent), encoding="utf-8")
    first, second = load_jsonl(tmp_path / name, 0)
    assert (first.prompt, first.chosen) == (second.prompt, second.chosen) == (Q, GOOD)
    assert (first.id, second.name) == ("1", f"{tmp_path / name}: row 2")


@pytest.mark.parametrize(("text", "message"), [
    ("[1]", "row 1: not a JSON object but int"), ('[{"prompt": "p"}', "begins as a JSON array and is not"),
    ('{\n "prompt": "p"\n}\n', ":1: not a JSON object"),
])  # fmt: skip
def test_a_broken_array_is_told(text, message, tmp_path):
    """In one line that names the file."""
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"a.jsonl.*{message}"):
        load_jsonl(tmp_path / "a.jsonl", 0)


@pytest.mark.parametrize("blank", [None, "", " \n", [], ["", " "]])
def test_a_blank_context_is_none(blank, tmp_path):
    """As a text and as a list; blank items of a list are left out."""
    rows = [dict(prompt=Q, context=blank), dict(prompt=Q, context=["I am ten.", " "])]
    first, second = load_jsonl(write(tmp_path / "a.jsonl", *rows), 0)
    assert (first.context, first.items) == (None, None)
    assert (second.context, second.items) == ("I am ten.", ["I am ten."])
