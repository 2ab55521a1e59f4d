"""train.py --dry-run: it shows an example, counts and estimates, and leaves nothing behind."""

import os
import re
import shutil

import pytest
from conftest import run_processes, write_data

import dry_run
from run import read_json
from dry_run import decoding_depth


@pytest.mark.parametrize(("flags", "rejected", "epochs"), [
    ([], 1, 1), (["--neg", "random", "--n-neg", "3"], 3, 1), (["--n-neg", "3", "--softmax"], 3, 1),
    (["--method", "sft", "--epochs", "2"], 0, 2),
], ids=["plain", "random-3", "softmax-3", "sft"])  # fmt: skip
def test_a_dry_run_leaves_nothing_and_counts_right(flags, rejected, epochs, call_train, work, capsys):
    """An example with special tokens and masks, seconds, GB; its pairs and steps are the real run's."""
    call_train("--dry-run", *flags)
    out = capsys.readouterr().out
    assert os.listdir(work) == []
    text = re.sub(r"\n +", "\n", out)  # what is shown is indented
    assert "<|im_start|>user\ntrain question" in text and "<|im_start|>assistant" in text
    assert "mask 0" in out and out.count("mask 1\n") == 1 + rejected
    assert ("\nrejected" in out) == bool(rejected)
    ((count, steps),) = re.findall(r"(\d+) pairs of about \d+ tokens, (\d+) steps an epoch", out)
    assert re.search(r"estimate: \d+ s \(.*\d+\.\d GB", out)
    summary = read_json(call_train(*flags) / "summary.json")
    assert int(count) == summary["pairs"] and int(steps) * epochs == summary["steps"]


def test_a_dry_run_on_given_pairs_samples_none(call_train, dpo_run, work, monkeypatch, capsys):
    """Nor does it estimate how long sampling takes."""
    monkeypatch.setattr(dry_run, "make_pairs", None)
    call_train("--dry-run", "--pairs", dpo_run)
    out = capsys.readouterr().out
    assert "estimate" in out and "sampling" not in out.split("estimate")[1]
    assert os.listdir(work) == []


def test_a_dry_run_on_its_own_pairs_predicts_memory(call_train, dpo_run, work, capsys):
    """As on pairs that are given, or sampled for it."""
    (work / "o").mkdir()
    for name in ("pairs.json", "pairs.jsonl"):
        shutil.copy(dpo_run / name, work / "o" / name)
    call_train("--dry-run", "--n-neg", "3")
    out = capsys.readouterr().out
    assert "memory of a process" in out and "sampling" not in out.split("estimate")[1]


def test_candidates_are_counted_and_validation_is_not(call_train, dpo_run, capsys):
    """Three values of --epochs: their sum; the line says what it leaves out."""
    call_train("--dry-run", "--pairs", dpo_run, "--epochs", "1,2,4")
    out = capsys.readouterr().out
    assert "7 epochs in all" in out and "validation not counted" in out


@pytest.mark.parametrize(("flags", "left_out"), [
    (("--rounds", "3"), "rounds after the first not counted"),
    (("--method", "sft-revise", "--eval-every", "2"), "validation and the revision not counted"),
])  # fmt: skip
def test_what_the_estimate_leaves_out_is_named(call_train, dpo_run, capsys, flags, left_out):
    call_train("--dry-run", *flags, *(() if "--rounds" in flags else ("--pairs", dpo_run)))
    assert left_out in capsys.readouterr().out


@pytest.mark.parametrize(("lr", "noted"), [("1e-6", True), ("1e-7,1e-6", True), ("1e-5", False),
                                          ("1e-6,1e-5", False)])
def test_a_rate_for_large_models_is_noted_on_a_small_one(call_train, dpo_run, capsys, lr, noted):
    """Where no value that is tried is larger."""
    call_train("--dry-run", "--pairs", dpo_run, "--lr", lr)
    assert ("note: --lr 1e-06 is for 1B parameters and more" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(("lengths", "count", "slots", "depth"), [
    ([5], 8, 8, 5), ([5], 9, 8, 10), ([5], 3, 8, 5), ([7], 100, 1, 700), ([1], 1000, 128, 8),
])  # fmt: skip
def test_decoding_depth_is_that_of_slots_that_are_refilled(lengths, count, slots, depth):
    """Responses of one length go in rounds of as many as there are slots."""
    assert decoding_depth(lengths, count, slots) == depth


def test_decoding_depth_of_uneven_lengths_is_near_their_mean():
    """A slot that is free early takes the next response: 1,000 of 1 to 9 tokens in 10 slots, 500 steps."""
    assert decoding_depth(list(range(1, 10)), 1000, 10) == pytest.approx(500, rel=0.1)


def test_more_examples_than_slots_are_estimated_from_some(call_train, tmp_path, capsys):
    """Twenty rows, eight of them sampled: all are counted."""
    data = write_data(tmp_path / "many.jsonl", train=20, test=1)
    call_train("--dry-run", "--data", data, "--slots", "2")
    out = capsys.readouterr().out
    assert "16/16 responses" in out and re.search(r"^20 pairs of about", out, re.M)


def test_more_processes_than_there_is_work_for(own_data, tiny, tmp_path):
    """Two processes, one pair a batch and one row to sample: the second has nothing to do, and no error."""
    flags = ["--data", own_data, "--model", tiny, "--max-new-tokens", "5", "--batch", "1", "--limit", "1"]
    done = run_processes(2, "train.py", *flags, "--method", "sft", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory of a process" in done.stdout and "estimate:" in done.stdout
