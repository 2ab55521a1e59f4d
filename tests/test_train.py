"""train.train against its contract: batches, steps against transformers' gradients, metrics, skipped steps.

The program around it: test_run_folder.py. The optimizer: test_optimizer.py.
"""

import itertools
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (RecordingOptimizer, named_gradients, oracle_logp, oracle_logps, random_pairs,
                      train_in_place)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import batches
import losses
import train
from batches import epoch_batches, epoch_order, training_rows
from folder import load
from losses import OBJECTIVES, Objective, require_one_each
from model import Decoder
from optimizer import MasterAdamW, learning_rate
from negatives import Pair, Response
from run import UserError, read_jsonl
from train import Args

Gradients = dict[str, Tensor]


# ------------------------------------------------------------------------- order, rows

def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone():
    """Whatever the global generators are; other seeds and epochs give other orders."""
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            torch.manual_seed(epoch)
            random.seed(epoch)
            orders[seed, epoch] = tuple(epoch_order(50, seed, epoch))
            torch.rand(7)
            random.random()
            assert orders[seed, epoch] == tuple(epoch_order(50, seed, epoch))
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 9


def test_batches_are_an_epoch_in_its_order():
    """Each has --batch pairs, the last one what is left."""
    made = epoch_batches(11, Args(batch=4, seed=2), epoch=1)
    assert [len(batch) for batch in made] == [4, 4, 3]
    assert [i for batch in made for i in batch] == epoch_order(11, 2, 1)


def test_a_training_row_keeps_its_own_rejected_response_whole():
    """N = 3: ids, text, source prompt, end and gain of each stay together, beside the pair's chosen one."""
    pairs = []
    for i in range(4):
        chosen = Response(f"chosen {i}", [i, 1], True, prompt_ids=[100 + i], gain=float(i))
        rejected = [Response(f"rejected {i} {k}", [10 * i + k], k % 2 == 0, prompt_ids=[200 + 10 * i + k],
                             gain=-float(10 * i + k)) for k in range(3)]
        pairs.append(Pair(f"row{i}", f"prompt {i}", f"context {i}", chosen, rejected, style="short"))
    rows = training_rows(pairs, Args(n_neg=3))
    assert len(rows) == 12
    for j, row in enumerate(rows):
        pair = pairs[j // 3]
        assert row == Pair(pair.id, pair.prompt, pair.context, pair.chosen, [pair.rejected[j % 3]], "short")
        assert row.prompt_ids == pair.prompt_ids and len(row.responses) == 2
    assert all(len(pair.rejected) == 3 for pair in pairs)


@pytest.mark.parametrize("args", [Args(n_neg=3, softmax=True), Args(method="sft")], ids=["softmax", "sft"])
def test_softmax_and_sft_have_a_row_a_pair(args):
    """All rejected responses stay with their chosen one."""
    pairs = random_pairs(4, rejected=3)
    assert training_rows(pairs, args) == pairs


# ------------------------------------------------------------------------- one step

@pytest.fixture
def record(tiny, tmp_path):
    """(pairs, arguments) -> (what the optimizer was given, rows of metrics.jsonl); no weight moves."""
    def get(pairs: list[Pair], **arguments) -> tuple[RecordingOptimizer, list[dict]]:
        optimizer = RecordingOptimizer(load(tiny))
        _, rows = train_in_place(optimizer, pairs, tmp_path / "metrics.jsonl", **arguments)
        return optimizer, rows

    return get


@pytest.fixture
def fit(tiny, tmp_path):
    """(pairs, arguments) -> (model, state, rows of metrics.jsonl) of one run of MasterAdamW."""
    def get(pairs: list[Pair], dtype: torch.dtype = torch.float32, folder: Path = tiny, **arguments):
        model = load(folder, dtype)
        args = train.resolve(Args(**arguments))
        optimizer = MasterAdamW(model, args.lr, args.seed)
        state, rows = train_in_place(optimizer, pairs, tmp_path / "metrics.jsonl", **arguments)
        return model, state, rows

    return get


def dpo_gradient(folder: Path, pairs: list[Pair], beta: float) -> tuple[Gradients, float]:
    """Gradient of the mean DPO loss at the reference, from transformers' full logits, and its norm."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    each = []
    for pair in pairs:
        chosen, rejected = (oracle_logps(oracle, pair.prompt_ids, response.ids).sum()
                            for response in pair.responses)
        difference = chosen - rejected
        each.append(-F.logsigmoid(beta * (difference - difference.detach())))
    torch.stack(each).mean().backward()
    gradients = named_gradients(oracle)
    return gradients, math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))


def assert_same_gradients(ours: Gradients, theirs: Gradients, scale: float = 1.0, rtol: float = 1e-3,
                          atol: float = 2e-6) -> None:
    """Ours are `scale` times theirs up to fp32 rounding."""
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name] * scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("beta", "is_clipped"), [(0.02, False), (2.0, True)])
def test_the_first_gradient_is_a_naive_dpo_gradient(beta, is_clipped, record, tiny):
    """Summed log-probs under the right prompt, mean over the batch, norm clipped at 1, logged unclipped."""
    pairs = random_pairs(5)
    optimizer, (row,) = record(pairs, batch=5, beta=beta)
    naive, norm = dpo_gradient(tiny, pairs, beta)
    assert (norm > 1) == is_clipped
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_same_gradients(optimizer.gradients[0], naive, min(1, 1 / norm))


@pytest.mark.parametrize("pass_tokens", [8192, 1])
def test_a_short_last_batch_is_averaged_over_its_own_pairs(pass_tokens, record, tiny):
    """Five pairs in batches of three: the second step is the mean over two, in the order of the epoch."""
    pairs = random_pairs(5)
    optimizer, rows = record(pairs, batch=3, seed=4, beta=0.02, pass_tokens=pass_tokens)
    assert [row["pairs"] for row in rows] == [3, 2]
    order = epoch_order(5, 4, 0)
    for gradients, indices in zip(optimizer.gradients, (order[:3], order[3:]), strict=True):
        naive, norm = dpo_gradient(tiny, [pairs[i] for i in indices], 0.02)
        assert norm < 1
        assert_same_gradients(gradients, naive)


def test_cutting_a_batch_into_micro_batches_changes_nothing(record):
    """One pass, two or three, a pass a pair: the same gradients of every step within fp32 rounding."""
    pairs = random_pairs(8)
    whole, *others = (record(pairs, batch=4, beta=0.02, pass_tokens=tokens)[0] for tokens in (8192, 60, 1))
    for other in others:
        for ours, theirs in zip(whole.gradients, other.gradients, strict=True):
            assert_same_gradients(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_schedule_reaches_the_optimizer(record):
    """Every step is taken at learning_rate(step, steps, --lr), and is logged with it."""
    optimizer, rows = record(random_pairs(40), batch=1, lr=3e-4, pass_tokens=1)
    expected = [learning_rate(i, 40, 3e-4) for i in range(40)]
    assert optimizer.rates == expected and [row["lr"] for row in rows] == expected


@pytest.mark.parametrize(("softmax", "steps", "start"), [(False, 6, math.log(2)), (True, 2, math.log(4))])
def test_the_first_step_of_three_negatives(softmax, steps, start, record):
    """Four pairs in batches of 2: six steps from ln 2, or two from ln 4; the margin is 0."""
    _, rows = record(random_pairs(4, rejected=3), n_neg=3, softmax=softmax, batch=2)
    assert len(rows) == steps and all(row["pairs"] == 2 for row in rows)
    assert rows[0]["loss"] == pytest.approx(start, abs=1e-6) and rows[0]["margin"] == 0.0


def test_pairwise_and_softmax_gradients_at_the_reference(record):
    """Means of beta/2 (h_r - h_c) and of beta/4 sum_r (h_r - h_c): over one batch, 2/3 of each other."""
    pairs = random_pairs(2, rejected=3)
    pairwise, (a,) = record(pairs, n_neg=3, batch=6, beta=0.02)
    softmax, (b,) = record(pairs, n_neg=3, batch=2, beta=0.02, softmax=True)
    assert max(a["grad_norm"], b["grad_norm"]) < 1  # nothing is clipped
    assert_same_gradients(pairwise.gradients[0], softmax.gradients[0], 2 / 3)


# ------------------------------------------------------------------------- whole runs

def test_weights_do_not_depend_on_the_micro_batches(fit):
    """AdamW itself, three steps: weights equal up to the sign of gradients that are rounding noise."""
    models = [fit(random_pairs(12), batch=4, lr=1e-4, pass_tokens=tokens)[0] for tokens in (8192, 1)]
    weights = zip(*(model.parameters() for model in models), strict=True)
    apart = torch.cat([(a - b).detach().abs().flatten() for a, b in weights])
    assert apart.median() < 1e-8 and (apart > 1e-6).float().mean() < 1e-3 and apart.max() <= 6.1e-4


def test_a_step_is_adamw_without_weight_decay(fit, tiny):
    """The first one moves every weight by -lr * g / (|g| + 1e-8), g the naive gradient clipped."""
    pairs = random_pairs(4)
    model, _, (row,) = fit(pairs, batch=4, lr=1e-3)
    naive, norm = dpo_gradient(tiny, pairs, 0.1)
    before = load(tiny).state_dict()
    for name, after in model.state_dict().items():
        gradient = naive[name] * min(1, 1 / norm)
        is_sure = gradient.abs() > 1e-4  # of its sign
        assert is_sure.any()
        expected = -1e-3 * gradient[is_sure].sign()
        torch.testing.assert_close((after - before[name])[is_sure], expected, rtol=0, atol=2e-6)
    assert row["lr"] == 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pass_tokens", [8192, 40])
def test_the_first_step_is_at_the_reference_exactly(dtype, pass_tokens, fit):
    """Loss ln 2 and margin 0.0, not nearly, in fp32 and bf16 and however the batch is cut."""
    _, _, rows = fit(random_pairs(12), dtype, batch=6, lr=1e-3, pass_tokens=pass_tokens)
    assert rows[0]["margin"] == rows[0]["reward_chosen"] == rows[0]["reward_rejected"] == 0.0
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[0]["accuracy"] == 0.0
    assert rows[1]["margin"] != 0.0


def test_the_reference_is_scored_in_the_micro_batches_of_the_first_epoch(fit, monkeypatch):
    """The same pairs side by side, so that even rounding is the same; the second epoch has its own."""
    chunks, pair_logps = [], batches.pair_logps

    def watched(model: Decoder, pairs: list[Pair], *rest) -> tuple[Tensor, Tensor]:
        chunks.append([pair.id for pair in pairs])
        return pair_logps(model, pairs, *rest)

    for module in (batches, train):
        monkeypatch.setattr(module, "pair_logps", watched)
    fit(random_pairs(12), batch=5, epochs=2, pass_tokens=60)
    sizes = list(itertools.accumulate(len(chunk) for chunk in chunks))
    first = sizes.index(12) + 1  # as many micro-batches as the reference's twelve pairs take
    assert first > 3 and max(map(len, chunks)) > 1  # batches are cut, and not into single pairs
    assert chunks[:first] == chunks[first : 2 * first] != chunks[2 * first :]


def test_the_first_step_is_exact_for_any_norm_weights(fit, tiny, tmp_path):
    """bf16 matrices beside fp32 norms that are no bf16 numbers: the margin is still 0.0."""
    folder = Path(shutil.copytree(tiny, tmp_path / "norms"))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 1:
            weights[name] = weight + torch.linspace(-0.3, 0.3, len(weight))
    save_file(weights, folder / "model.safetensors")
    _, _, rows = fit(random_pairs(6), torch.bfloat16, folder, batch=6)
    assert rows[0]["margin"] == rows[0]["reward_chosen"] == rows[0]["reward_rejected"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_pairs_are_learnt(dtype, fit):
    """Several epochs at lr 1e-3: accuracy 1, margins grow, chosen over rejected; matrices keep their type."""
    model, state, rows = fit(random_pairs(8), dtype, lr=1e-3, batch=4, epochs=8)
    margins = [(a["margin"] + b["margin"]) / 2 for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert len(margins) == 8 and margins[-1] > 1 and margins == sorted(margins)
    assert rows[-1]["accuracy"] == rows[-2]["accuracy"] == 1.0
    assert rows[-1]["loss"] < 0.3 and rows[-1]["reward_chosen"] > rows[-1]["reward_rejected"]
    assert state.step == 16 and state.skipped == 0
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {dtype}


def test_a_new_objective_is_a_row_of_the_table(record, monkeypatch):
    """A loss of the chosen response alone: its gradient is half the sum of SFT's, its metrics are logged."""
    def half(logps: Tensor, reference: Tensor, lengths: Tensor, args: Args):
        loss = -logps[:, 0] / 2  # (B,)
        return loss, dict(loss=loss.detach(), length=lengths[:, 0].float())

    objective = Objective(half, uses_rejected=False, uses_reference=False, mean_over="pairs")
    monkeypatch.setitem(OBJECTIVES, "half", objective)
    pairs = random_pairs(3)
    ours, (row,) = record(pairs, method="half", batch=3)
    sft, (expected,) = record(pairs, method="sft", batch=3)
    tokens = sum(len(pair.chosen.ids) for pair in pairs)
    assert row["length"] == pytest.approx(tokens / 3)
    assert row["loss"] == pytest.approx(expected["loss"] * tokens / 3 / 2, rel=1e-6)
    scales = [min(1, 1 / each["grad_norm"]) for each in (row, expected)]
    assert_same_gradients(ours.gradients[0], sft.gradients[0], tokens / 6 * scales[0] / scales[1])


def test_a_new_objective_that_takes_the_mean_is_refused(fit, monkeypatch):
    """It would be divided by the batch's size twice, and no logged number would tell."""
    def mean(logps: Tensor, reference: Tensor, lengths: Tensor, args: Args):
        loss = -logps[:, 0]  # (B,)
        return loss.mean(), dict(loss=loss.detach())

    objective = Objective(mean, uses_rejected=False, uses_reference=False, mean_over="pairs")
    monkeypatch.setitem(OBJECTIVES, "mean", objective)
    with pytest.raises(ValueError, match=r"are \(2,\), a value a pair; here the loss itself is \(\)$"):
        fit(random_pairs(2), method="mean", batch=2)


@pytest.mark.parametrize(("metrics", "message"), [
    (dict(loss=torch.zeros(3), margin=torch.zeros(3, 2)), r"here margin is \(3, 2\)$"),
    (dict(margin=torch.zeros(3)), "here the metric loss is missing$")], ids=["shape", "no loss"])  # fmt: skip
def test_metrics_have_a_value_a_pair(metrics, message):
    """The loss is among them."""
    require_one_each(3, torch.zeros(3), dict(loss=torch.zeros(3), margin=torch.zeros(3)))
    with pytest.raises(ValueError, match=message):
        require_one_each(3, torch.zeros(3), metrics)


# ------------------------------------------------------------------------- metrics

KEYS = {"candidate", "round", "step", "epoch", "loss", "margin", "accuracy", "reward_chosen",
        "reward_rejected", "accuracy_chosen", "accuracy_rejected", "logp_chosen", "logp_rejected",
        "grad_norm", "lr", "pairs", "tokens", "tokens_per_second", "skipped", "weights_changed"}


def test_metrics_have_a_line_a_step(fit):
    """All keys, the schedule's rates, every pair once an epoch, its prompt once a step."""
    pairs = random_pairs(7)
    _, state, rows = fit(pairs, batch=3, epochs=2, lr=1e-4)
    assert all(row.keys() == KEYS for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["pairs"] for row in rows] == [3, 3, 1, 3, 3, 1]
    assert [row["lr"] for row in rows] == [learning_rate(i, 6, 1e-4) for i in range(6)]
    sizes = [len(pair.prompt_ids) + sum(len(response.ids) for response in pair.responses) for pair in pairs]
    expected = []
    for epoch in range(2):
        order = epoch_order(7, 0, epoch)
        expected += [sum(sizes[i] for i in batch) for batch in (order[:3], order[3:6], order[6:])]
    assert [row["tokens"] for row in rows] == expected and state.tokens == sum(expected)
    assert all(row["tokens_per_second"] > 0 and row["skipped"] == 0 for row in rows)
    changed = [row["weights_changed"] for row in rows]
    assert changed[0] > 0 and changed[-1] <= 1


def test_metrics_are_means_over_the_pairs_of_a_batch(fit, tiny):
    """logp_chosen and logp_rejected of the first step, uneven micro-batches, against transformers' logits."""
    pairs = random_pairs(5)
    _, _, (row,) = fit(pairs, batch=5, pass_tokens=60)
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    chosen = [oracle_logp(oracle, pair.prompt_ids, pair.chosen.ids) for pair in pairs]
    rejected = [oracle_logp(oracle, pair.prompt_ids, pair.rejected[0].ids) for pair in pairs]
    assert row["logp_chosen"] == pytest.approx(sum(chosen) / 5, abs=1e-4)
    assert row["logp_rejected"] == pytest.approx(sum(rejected) / 5, abs=1e-4)


# ------------------------------------------------------------------------- steps that are not finite

@pytest.fixture
def break_steps(monkeypatch):
    """(steps, value) -> dpo's loss is that value in these steps (one micro-batch a step, counted from 1)."""
    real_dpo = losses.dpo

    def arrange(broken: set[int], value: float) -> None:
        calls = []

        def dpo(*arguments):
            calls.append(0)
            loss, metrics = real_dpo(*arguments)
            if len(calls) not in broken:
                return loss, metrics
            return loss * value, metrics | dict(loss=metrics["loss"] * value)

        monkeypatch.setattr(losses, "dpo", dpo)

    return arrange


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_weights(value, fit, break_steps, tiny, capsys):
    """It is skipped, counted, and printed with its pairs."""
    break_steps({1}, value)
    model, state, rows = fit(random_pairs(2), batch=2, lr=1e-2)
    for before, after in zip(load(tiny).parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    out = capsys.readouterr().out
    assert state.skipped == 1 and rows[0]["skipped"] == 1
    assert "step 1 skipped" in out and "row0" in out and "row1" in out


def test_training_goes_on_after_a_skipped_step(fit, break_steps):
    """The others are taken with clean gradients: weights are finite and the margin grows."""
    break_steps({2, 3}, math.nan)
    model, state, rows = fit(random_pairs(2), batch=2, lr=1e-3, epochs=6)
    assert all(p.isfinite().all() for p in model.parameters())
    assert state.skipped == 2 and [row["skipped"] for row in rows] == [0, 1, 2, 2, 2, 2]
    margins = [row["margin"] for row in rows]
    assert margins[1] == margins[2] == margins[3] < margins[4] < margins[5]


def test_five_in_a_row_stop_the_run(fit, break_steps, tmp_path):
    """Four do not, twice over; the fifth is a UserError, once its line is written."""
    break_steps({1, 2, 3, 4, 6, 7, 8, 9}, math.nan)
    assert fit(random_pairs(2), batch=2, epochs=10)[1].skipped == 8
    break_steps({2, 3, 4, 5, 6}, math.nan)
    with pytest.raises(UserError, match="five"):
        fit(random_pairs(2), batch=2, epochs=10)
    lines = [line for _, line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3, 4, 5]


def test_a_gradient_that_is_not_finite_is_not_taken_though_the_loss_is(fit, tiny, monkeypatch):
    """An overflow in the backward pass alone: clipping would make it NaN in every weight."""
    def overflow(model) -> None:
        model.model.norm.weight.grad[0] = math.inf

    monkeypatch.setattr(train, "all_reduce_gradients", overflow)
    model, state, rows = fit(random_pairs(2), batch=2, lr=1e-2)
    assert math.isfinite(rows[0]["loss"]) and state.skipped == rows[0]["skipped"] == 1
    for before, after in zip(load(tiny).parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("flags", "limit"), [([], train.TEST_ROWS), (["--limit", "5"], 5)])
def test_a_run_is_evaluated_on_as_many_rows_as_it_is_given(flags, limit, call_train, monkeypatch):
    """--limit, else a number that takes minutes."""
    asked = []
    monkeypatch.setattr(train, "evaluation", lambda args: asked.append(args.limit))
    call_train("--test", *flags)
    assert asked == [limit]
