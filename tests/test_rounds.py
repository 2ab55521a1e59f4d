"""Rounds of self-training (train.py --rounds): what each samples from, is compared with, and draws.

    python -m pytest tests/test_rounds.py
"""

import itertools
import json

import pytest
import torch
from conftest import metrics_of, steps_of

import train
from folder import load
from pairs import load_pairs, round_seed
from run import UserError, read_json
from selection import Selection

ROUNDS = ("--neg", "random", "--rounds", "2", "--lr", "1e-3")


@pytest.fixture
def watched(monkeypatch):
    """The weights that each round's pairs were sampled from, as `pairs_for` finds them."""
    weights = []

    def watch(args, split, folder, model=None, round=0):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return original(args, split, folder, model, round)

    original = train.pairs_for
    monkeypatch.setattr(train, "pairs_for", watch)
    return weights


def test_a_round_samples_from_the_last_rounds_model(call_train, tiny, watched):
    """The first from the start model, the second from what the first has trained, which is not the end."""
    folder = call_train(*ROUNDS)
    start, end = (dict(load(path).named_parameters()) for path in (tiny, folder / "model"))
    first, second = watched
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(first[name], start[name])
    assert not torch.equal(second[name], first[name]) and not torch.equal(second[name], end[name])


def test_a_rounds_reference_is_the_model_it_finds(call_train):
    """Its first step's margin is exactly 0, and steps are counted on."""
    rows = [row for row in metrics_of(call_train(*ROUNDS)) if "loss" in row]
    rounds = [row["round"] for row in rows]
    assert rounds == sorted(rounds) and set(rounds) == {0, 1}
    second = [row for row in rows if row["round"] == 1]
    assert second[0]["margin"] == 0 and second[-1]["margin"] != 0
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[rounds.index(1) - 1]["margin"] != 0


def test_every_round_has_its_own_draws_and_the_same_examples(call_train):
    """Other responses, the same ids; the settings of later rounds' pairs say which round made them."""
    folder = call_train(*ROUNDS)
    first, second = load_pairs(folder), load_pairs(folder / "round-2")
    assert [pair.id for pair in first] == [pair.id for pair in second]
    assert sum(a.chosen.ids != b.chosen.ids for a, b in zip(first, second, strict=True)) > len(first) / 2
    settings = [read_json(path / "pairs.json")["settings"] for path in (folder, folder / "round-2")]
    assert settings[1] == settings[0] | dict(round=1)
    assert round_seed(3, 0) == 3 and len({round_seed(3, n) for n in range(5)}) == 5


@pytest.mark.parametrize(("flags", "words"), [
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--rounds", "2", "--lr", "1e-4,1e-5"], "one value of every option"),
])  # fmt: skip
def test_rounds_that_cannot_be_are_refused(flags, words, call_train):
    """In one line."""
    with pytest.raises(UserError, match=words):
        call_train(*flags)


def test_rounds_of_given_pairs_are_refused(call_train, dpo_run):
    """Later rounds would not be of those pairs."""
    with pytest.raises(UserError, match="1 with --pairs"):
        call_train("--pairs", dpo_run, "--rounds", "2")


def test_rounds_of_the_datas_own_responses_are_refused(call_train, tmp_path):
    """Every round would train on the same ones; one round does."""
    rows = [dict(prompt=f"Question {i}?", chosen=f"Good {i}.", rejected=f"No {7 * i}!") for i in range(5)]
    data = tmp_path / "ready.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"--rounds 2: .*ready.jsonl supplies the responses itself"):
        call_train("--data", data, "--rounds", "2")
    call_train("--data", data)


def test_early_stopping_ends_a_round_and_not_the_next_one(call_train, monkeypatch):
    """Patience 1, every second validation worse: each round takes two steps."""
    scores = itertools.cycle([0.5, 0.1])
    monkeypatch.setattr(Selection, "measure", lambda self, model: next(scores))
    folder = call_train("--neg", "random", "--rounds", "2", "--eval-every", "1", "--patience", "1")
    assert [row["round"] for row in steps_of(folder)] == [0, 0, 1, 1]


def test_a_round_is_trained_and_scored_in_an_order_of_its_own(call_train, monkeypatch):
    """Both by the round's seed: else the second would visit the examples in the first one's order."""
    seeds = []
    for name, place in (("all_logps", 2), ("train", 3)):
        original = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *given, place=place, original=original: seeds.append(
            given[place].seed) or original(*given))
    call_train(*ROUNDS, "--seed", "3")
    assert seeds == [3, 3, round_seed(3, 1), round_seed(3, 1)]


def test_a_round_revises_by_a_seed_of_its_own(call_train, monkeypatch):
    """Otherwise the second round would draw its revisions with the first one's numbers."""
    seeds = []
    monkeypatch.setattr(train, "revise",
                        lambda model, pairs, args, folder, seed: seeds.append(seed) or pairs)
    call_train("--method", "sft-revise", "--rounds", "2", "--seed", "3")
    assert seeds == [3, round_seed(3, 1)]
