"""SFT with revision: what the model is asked, what is trained, and that nothing is made twice.

    python -m pytest tests/test_revise.py
"""

import json
import shutil

import pytest
from conftest import metrics_of, training_example

import revise
import train
from negatives import Pair, Response
from pairs import load_pairs
from revise import check_revisable, revision_message
from rows import fitting_rows
from run import UserError, read_json, read_jsonl

FLAGS = ("--method", "sft-revise")


def made_pair(context: str | None) -> Pair:
    chosen, rejected = (Response(text, [5, 6], True, [7]) for text in ("A good one.", "A bad one."))
    return Pair("r0", "What now?", context, chosen, [rejected])


def test_with_a_context_the_model_sees_both_responses():
    """Appendix D.2's words, with everything in its place."""
    message = revision_message(made_pair("I am tall."), training_example(0, "I am tall."))
    assert message == (
        "You are a helpful assistant. Modify the assistant's message to make sure the response is "
        "personalized to this user based on the information available about them. You will be given an "
        "example of a good response and a bad response to the same prompt. I am tall. What now? Good "
        "assistant's response: A good one. Bad assistant's response: A bad one.. Rewrite the good "
        "assistant's response to make it better.")


def test_on_tasks_it_is_told_the_right_answer():
    """And sees its question and its own attempt, no other response."""
    example = training_example(0, prompt="What is 6 x 7?", answer="42")
    message = revision_message(made_pair(None), example)
    assert message.startswith("What is 6 x 7?") and "A good one." in message and "answer is 42." in message
    assert "A bad one." not in message


def test_what_cannot_be_revised_is_refused():
    """Neither context nor answer: by id."""
    rows = [training_example(0, "c"), training_example(1, answer="3"), training_example(2)]
    check_revisable(rows[:2], train.Args())
    with pytest.raises(UserError, match="1 have neither"):
        check_revisable(rows, train.Args())


@pytest.mark.parametrize(("neg", "refused"), [("missing", False), ("random", False), ("reshuffle", True),
                                              ("noise", True), ("same", True)])
def test_the_bad_response_is_one_to_a_random_context(neg, refused):
    """What was left at its default becomes random; what cannot be is refused, not overruled."""
    args = train.resolve(train.Args(method="sft-revise", neg=neg))
    if refused:
        with pytest.raises(UserError, match=f"--neg {neg}: --method sft-revise shows the model"):
            train.check(args)
    else:
        train.check(args)
        assert args.neg == "random"


def test_revisions_are_trained_under_the_plain_prompt(call_train):
    """revised.jsonl holds one for each pair: its text is not the chosen one, its prompt is the pair's."""
    folder = call_train(*FLAGS)
    pairs = {pair.id: pair for pair in load_pairs(folder)}
    rows = {row["id"]: Response(**row["response"]) for _, row in read_jsonl(folder / "revised.jsonl")}
    assert rows.keys() == pairs.keys()
    assert all(revised.prompt_ids == pairs[id].prompt_ids for id, revised in rows.items())
    assert any(revised.ids != pairs[id].chosen.ids for id, revised in rows.items())
    steps = [row for row in metrics_of(folder) if "loss" in row]
    size = sum(len(pairs[id].prompt_ids) + len(revised.ids) for id, revised in rows.items())
    assert sum(row["tokens"] for row in steps) == size


def test_the_response_beside_it_is_of_a_random_context(call_train):
    """Whatever --neg says (section 5.1)."""
    folder = call_train(*FLAGS, "--neg", "missing")
    assert read_json(folder / "pairs.json")["settings"]["neg"] == "random"
    assert read_json(folder / "args.json")["arguments"]["neg"] == "random"


def test_given_pairs_keep_the_negatives_they_were_made_with(call_train, dpo_run):
    """args.json says what is in the pairs, which were sampled without contexts."""
    made = read_json(dpo_run / "args.json")["arguments"]["neg"]
    folder = call_train(*FLAGS, "--pairs", dpo_run)
    assert made == "missing" == read_json(folder / "args.json")["arguments"]["neg"]


def test_revision_that_was_interrupted_goes_on(call_train):
    """Revisions that are there are kept, a line that was cut is not; the others are those of a whole run."""
    folder = call_train(*FLAGS)
    file = folder / "revised.jsonl"
    rows = [row for _, row in read_jsonl(file)]
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").unlink()  # else the folder already holds a run
    rows[0]["response"] |= dict(ids=[9, 9, 9], text="kept")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + '{"id": "cut')
    call_train(*FLAGS)
    again = {row["id"]: row["response"] for _, row in read_jsonl(file)}
    assert again == {row["id"]: row["response"] for row in rows}


def test_without_a_rejected_response_it_is_refused(call_train):
    """The revision's prompt shows one: said before anything is sampled."""
    with pytest.raises(UserError, match="shows the model a rejected response"):
        call_train(*FLAGS, "--n-neg", "0")


def test_revisions_that_do_not_fit_are_dropped_and_named(call_train, capsys, monkeypatch):
    """The revision's prompt is longer than the pair's: what does not fit costs its pair, not the run."""
    lengths = []

    def limited(examples, messages, tokenizer, positions, new_tokens):
        lengths.extend(len(tokenizer.chat(messages(e)[0], e.system)) for e in examples)
        return fitting_rows(examples, messages, tokenizer, sorted(lengths)[0] + new_tokens, new_tokens)

    monkeypatch.setattr(revise, "fitting_rows", limited)
    folder = call_train(*FLAGS)
    kept = sum(length == min(lengths) for length in lengths)
    assert 0 < kept < len(lengths)
    assert len(read_jsonl(folder / "revised.jsonl")) == kept
    assert f"{len(lengths) - kept} of {len(lengths)} rows dropped" in capsys.readouterr().out


def test_given_pairs_that_cannot_be_revised_are_refused(call_train, dpo_run, tmp_path):
    """Pairs of rows that the data have lost: one line."""
    shutil.copytree(dpo_run, tmp_path / "pairs")
    file = tmp_path / "pairs" / "pairs.jsonl"
    rows = [row for _, row in read_jsonl(file)]
    file.write_text("".join(json.dumps(row | dict(id=f"lost {row['id']}")) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"{len(rows)} of {len(rows)} pairs are no rows of"):
        call_train(*FLAGS, "--pairs", tmp_path / "pairs")


def test_ready_responses_are_not_revised(call_train, work):
    """They are not the model's own: said without a word of options that were not given."""
    line = dict(prompt="p", context="c", chosen="good", rejected="bad", split="train")
    (work / "ready.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="revises the model's own responses"):
        call_train(*FLAGS, "--data", "ready.jsonl")


def test_a_line_that_is_no_revision_is_named(call_train, work):
    (work / "o").mkdir()
    (work / "o" / "revised.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"revised\.jsonl: 'id' is missing"):
        call_train(*FLAGS)
