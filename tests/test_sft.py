"""--method sft against transformers' gradients: the mean over a batch's tokens, on chosen responses alone."""

import dataclasses

import pytest
import torch
from conftest import END, RecordingOptimizer, named_gradients, oracle_logps, random_pairs, train_in_place
from transformers import AutoModelForCausalLM

from batches import epoch_order
from folder import load
from negatives import Pair, Response


@pytest.fixture
def record(tiny, tmp_path):
    """(pairs, arguments) -> (what the optimizer was given, rows of metrics.jsonl); no weight moves."""
    def get(pairs: list[Pair], **arguments) -> tuple[RecordingOptimizer, list[dict]]:
        optimizer = RecordingOptimizer(load(tiny))
        _, rows = train_in_place(optimizer, pairs, tmp_path / "metrics.jsonl", method="sft", **arguments)
        return optimizer, rows

    return get


@pytest.mark.parametrize("pass_tokens", [8192, 40, 1])
def test_a_step_is_the_mean_over_the_batchs_tokens(pass_tokens, record, tiny):
    """Loss and gradient: sum of -log p over all chosen tokens / their number, end token too, however cut."""
    pairs = random_pairs(5, end=True)
    optimizer, rows = record(pairs, batch=3, pass_tokens=pass_tokens, seed=4)
    order = epoch_order(5, 4, 0)
    assert [row["pairs"] for row in rows] == [3, 2]
    for gradients, row, indices in zip(optimizer.gradients, rows, (order[:3], order[3:]), strict=True):
        oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        batch = [pairs[i] for i in indices]
        assert len({len(pair.chosen.ids) for pair in batch}) > 1  # else a mean over pairs would be the same
        nll = -torch.cat([oracle_logps(oracle, pair.prompt_ids, pair.chosen.ids) for pair in batch])
        nll.mean().backward()
        assert row["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
        assert row["tokens"] == sum(len(pair.prompt_ids) + len(pair.chosen.ids) for pair in batch)
        expected = named_gradients(oracle)
        clip = min(1.0, 1 / row["grad_norm"])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name] * clip, rtol=1e-3, atol=2e-6)


def test_the_end_token_counts(record, tiny):
    """One pair: the loss is the mean over |y| tokens, and not that of the response without its end."""
    (pair,) = random_pairs(1, end=True)
    assert pair.chosen.ids[-1] == END
    _, (row,) = record([pair])
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    nll = -oracle_logps(oracle, pair.prompt_ids, pair.chosen.ids).detach()
    assert row["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert abs(nll[:-1].mean() - nll.mean()) > 1e-2


def test_rejected_responses_are_not_seen(record):
    """Other rejected responses, or none: the same gradients and losses to the last bit."""
    pairs = random_pairs(4, end=True)
    others = [dataclasses.replace(pair, rejected=[Response("?", [7, 7, 7], True, [9])]) for pair in pairs]
    none = [dataclasses.replace(pair, rejected=[]) for pair in pairs]
    expected, rows = record(pairs, batch=2)
    for changed in (others, none):
        optimizer, other_rows = record(changed, batch=2)
        assert [row["loss"] for row in rows] == [row["loss"] for row in other_rows]
        for a, b in zip(expected.gradients, optimizer.gradients, strict=True):
            assert all(torch.equal(gradient, b[name]) for name, gradient in a.items())
