"""rows.py: rows without the context that a method needs, rows that are too long, parts that are missing."""

import json

import pytest
from conftest import chat_ids, training_example, write_data, write_model

from data import load_jsonl
from folder import load
from negatives import negative_messages
from pairs import make_pairs
from rows import fitting_rows, missing_part, require_contexts, rows_with_contexts
from run import UserError
from sample import Sampling
from tokenizer import Tokenizer

PLACES = 160
SETTINGS = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6)
MIXED = [training_example(i, None if i in (1, 4) else f"I am number {i}.") for i in range(6)]


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    """A tiny model with few places."""
    folder = write_model(tmp_path_factory.mktemp("short"), max_position_embeddings=PLACES)
    return load(folder), Tokenizer(folder)


def dropped_ids(examples: list, pairs: list) -> set[str]:
    """The rows of which no pair was made."""
    return {e.id for e in examples} - {pair.id for pair in pairs}


# ------------------------------------------------------------------------- contexts

def test_random_negatives_keep_their_own_prompt_where_some_rows_have_no_context(model_and_tokenizer, capsys):
    """Rows without one are dropped, counted and named; all others' rejected responses come from their own
    prompt with another row's context."""
    tokenizer = model_and_tokenizer[1]
    made, statistics = make_pairs(*model_and_tokenizer, MIXED, "random", SETTINGS, 0)
    assert dropped_ids(MIXED, made) >= {"1", "4"} and len(made) >= 3
    contexts = {e.context for e in MIXED if e.context}
    by_id = {e.id: e for e in MIXED}
    for pair in made:
        e = by_id[pair.id]
        others = [e.user_message(context) for context in contexts - {e.context}]
        assert pair.rejected[0].prompt_ids in [tokenizer.chat(message) for message in others]
    assert capsys.readouterr().out.count("2 of 6 rows dropped: no context") == 1
    assert statistics["dropped"]["unusable"] == 2 and statistics["examples"] == 6


@pytest.mark.parametrize("rows", [[MIXED[1], MIXED[4]], [MIXED[0], MIXED[2]]], ids=["none", "all"])
def test_random_negatives_drop_no_row_where_all_are_alike(rows, capsys):
    """All with a context or all without."""
    assert rows_with_contexts(rows, "random", tell=True) == rows and capsys.readouterr().out == ""


@pytest.mark.parametrize("neg", ["missing", "reshuffle", "noise"])
def test_other_negatives_take_rows_as_they_are(neg):
    """reshuffle and noise need no context; missing refuses rows without one."""
    assert rows_with_contexts(MIXED, neg) == MIXED


@pytest.mark.parametrize(("neg", "message"), [
    ("missing", r"2 have none \(first: '1', '4'\)"), ("random", r"2 of 6 have none \(first: '1', '4'\)"),
])  # fmt: skip
def test_rows_without_the_context_that_they_need_are_refused_by_name(neg, message):
    """Nothing is turned into another method in silence."""
    with pytest.raises(UserError, match=message):
        require_contexts(MIXED, neg)
    with pytest.raises(UserError, match=message):
        negative_messages(MIXED, neg, 0)


def test_a_row_is_named_by_file_and_line(tmp_path):
    """Where it comes from a user's file, whatever its id."""
    rows = [dict(prompt="p", id="a", context="c"), dict(prompt="q", id="b", context=" ")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"1 have none \(first: .*a\.jsonl:2\)"):
        require_contexts(load_jsonl(tmp_path / "a.jsonl", 0), "missing")


# ------------------------------------------------------------------------- length

LONG = "very " * PLACES


@pytest.mark.parametrize("neg", ["missing", "random", "reshuffle", "noise"])
def test_a_row_that_is_too_long_is_dropped_and_counted(neg, model_and_tokenizer, capsys):
    """And no other row with it, nor does any borrow its context."""
    rows = [training_example(i, LONG if i == 2 else f"I am {i}.") for i in range(6)]
    made, statistics = make_pairs(*model_and_tokenizer, rows, neg, SETTINGS, 0)
    assert "2" in dropped_ids(rows, made) and len(made) >= 4
    assert statistics["dropped"]["unusable"] == 1
    out = capsys.readouterr().out
    assert "1 of 6 rows dropped: prompt and 6 new tokens take more than the model's 160" in out
    for pair in made:
        for response in pair.responses:
            assert len(pair.prompt_ids) + len(response.ids) <= PLACES
            assert len(response.prompt_ids) + SETTINGS.max_new_tokens <= PLACES


def test_the_last_place_can_be_used(model_and_tokenizer, tmp_path):
    """A prompt that leaves exactly the room of a response stays, one more token and it goes."""
    tokenizer = model_and_tokenizer[1]
    rows = [training_example(i, None, prompt="x" * n) for i, n in enumerate(range(40, 140))]
    fitting = fitting_rows(rows, lambda e: [e.prompt], tokenizer, PLACES, 20)
    lengths = [len(chat_ids(tokenizer.folder, e.prompt)) for e in rows]
    assert [e.id for e in fitting] == [e.id for e, n in zip(rows, lengths, strict=True) if n + 20 <= PLACES]
    assert max(lengths) + 20 > PLACES and len(fitting) > 10


@pytest.mark.parametrize("long", ["prompt", "chosen", "rejected"])
def test_a_ready_pair_that_is_too_long_is_dropped_and_counted(long, model_and_tokenizer, capsys):
    """By its prompt or by either response."""
    texts = dict(prompt="Why?", chosen="Good.", rejected="Bad.")
    rows = [training_example(i, **texts | ({long: LONG} if i == 1 else {})) for i in range(4)]
    made, statistics = make_pairs(*model_and_tokenizer, rows, "missing", SETTINGS, 0)
    assert dropped_ids(rows, made) == {"1"} and statistics["dropped"]["unusable"] == 1
    assert "1 of 4 rows dropped: prompt and response take more" in capsys.readouterr().out


def test_nothing_is_sampled_where_no_row_fits(model_and_tokenizer):
    """A UserError that says what to do."""
    rows = [training_example(i, LONG) for i in range(3)]
    with pytest.raises(UserError, match="lower --max-new-tokens"):
        make_pairs(*model_and_tokenizer, rows, "missing", SETTINGS, 0)


# ------------------------------------------------------------------------- parts

@pytest.mark.parametrize(("parts", "missing"), [
    (dict(train=2), ["validation", "test"]), (dict(train=1, test=1), ["validation"]),
    (dict(train=1, validation=1, test=1), []),
])  # fmt: skip
def test_a_part_without_rows_is_told(parts, missing, tmp_path):
    """Which part, and of how many rows."""
    file = str(write_data(tmp_path / "a.jsonl", **parts))
    for part in ("train", "validation", "test"):
        told = missing_part(file, part, 0)
        assert bool(told) == (part in missing)
        assert not told or f"no example in the {part} part (of {sum(parts.values())} in all)" in told
