"""Objectives against closed forms, SFT against transformers, choosing among candidates, dry run, --reuse."""

import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, write_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from checks import honours
from data import load_examples
from losses import dpo, response_logps
from model import load
from pairs import Pair, load_pairs
from run import Metrics, UserError, read_json, read_jsonl
from sample import Sample
from tokenizer import Tokenizer
from train import Args, all_logps, epoch_order, objective, training_rows

END = 1  # the tiny model's end token


# ------------------------------------------------------------------------------------------- closed forms

def some(n: int, b: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs and reference, (b, 1 + n) each, fp64."""
    generator = torch.Generator().manual_seed(seed)
    logps = -20 + 6 * torch.randn(b, 1 + n, generator=generator, dtype=torch.float64)
    return logps, logps + 4 * torch.randn(b, 1 + n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_softmax_starts_at_ln_of_its_ways(n, beta):
    """At the reference the loss is ln(N + 1) and every margin 0, whatever the responses are."""
    logps, _ = some(n)
    loss, metrics = dpo(logps, logps.clone(), beta)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(n + 1)), rtol=0, atol=1e-12)
    assert not metrics["margin"].any() and not metrics["reward_chosen"].any()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_softmax_by_hand(n):
    """-log(e^r0 / sum_j e^rj), r = beta (log pi - log pi_ref), pair by pair in plain arithmetic."""
    logps, reference = some(n)
    loss, metrics = dpo(logps, reference, 0.3)
    for i in range(len(logps)):
        r = [0.3 * (logps[i, j].item() - reference[i, j].item()) for j in range(1 + n)]
        assert loss[i].item() == pytest.approx(-math.log(math.exp(r[0]) / sum(map(math.exp, r))), rel=1e-12)
        assert metrics["margin"][i].item() == pytest.approx(r[0] - sum(r[1:]) / n, rel=1e-5)
        assert bool(metrics["accuracy"][i]) == (r[0] > max(r[1:]))


def test_one_negative_is_minus_log_sigmoid():
    """Eq. 8 with N = 1 is Eq. 5."""
    logps, reference = some(1)
    h = logps - reference
    torch.testing.assert_close(dpo(logps, reference, 0.2)[0], -F.logsigmoid(0.2 * (h[:, 0] - h[:, 1])))


def test_the_order_of_the_rejected_is_nothing():
    """Every permutation of three columns leaves loss, metrics and the gradient of the chosen one."""
    logps, reference = some(3)
    expected, metrics = dpo(logps, reference, 0.3, 0.2)
    for order in ([0, 1, 3, 2], [0, 2, 3, 1], [0, 3, 2, 1]):
        loss, others = dpo(logps[:, order], reference[:, order], 0.3, 0.2)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for key, value in metrics.items():
            torch.testing.assert_close(others[key], value)
    assert (dpo(logps[:, [1, 0, 2, 3]], reference[:, [1, 0, 2, 3]], 0.3)[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n", [1, 3])
def test_gradcheck(n, smoothing):
    """Against finite differences, and at the reference beta ((1/(N+1) - 1), 1/(N+1), ...) by hand."""
    logps, reference = some(n, b=3)
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dpo(x, reference, 0.3, smoothing)[0], logps)
    if not smoothing:
        (grad,) = torch.autograd.grad(dpo(logps, logps.detach(), 0.3)[0].sum(), logps)
        expected = 0.3 * torch.tensor([1 / (n + 1) - 1] + [1 / (n + 1)] * n, dtype=torch.float64)
        torch.testing.assert_close(grad, expected.expand_as(grad))


@pytest.mark.parametrize("e", [0.0, 0.1, 0.4])
def test_label_smoothing_is_trls(e):
    """N = 1: -(1 - e) log sigmoid(m) - e log sigmoid(-m), the formula of TRL's sigmoid loss."""
    logps, reference = some(1)
    h = 0.3 * (logps - reference)
    m = h[:, 0] - h[:, 1]
    expected = -(1 - e) * F.logsigmoid(m) - e * F.logsigmoid(-m)
    torch.testing.assert_close(dpo(logps, reference, 0.3, e)[0], expected, rtol=1e-12, atol=0)
    loss, _ = objective(logps, reference, torch.ones(7), Args(beta=0.3, label_smoothing=e))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_smoothing_takes_every_rejected_alike(n):
    """The loss is linear in the share e, and at the reference ln(N + 1) for any."""
    logps, reference = some(n)
    at = {e: dpo(logps, reference, 0.3, e)[0] for e in (0.0, 0.2, 0.4)}
    torch.testing.assert_close(at[0.2], (at[0.0] + at[0.4]) / 2, rtol=1e-12, atol=0)
    shares = (0.3 * (logps - reference)).softmax(-1).log()
    other = -shares[:, 1:].sum(-1) / n
    torch.testing.assert_close(at[0.4], 0.6 * at[0.0] + 0.4 * other)
    assert dpo(logps, logps, 0.3, 0.4)[0].tolist() == pytest.approx([math.log(n + 1)] * 7, rel=1e-12)


def test_the_defaults_add_nothing():
    """No smoothing, no NLL: the objective is the plain one at beta 0.1."""
    logps, reference = some(2)
    assert (Args().label_smoothing, Args().nll) == (0, 0)
    h = 0.1 * (logps - reference)
    expected = h.logsumexp(-1) - h[:, 0]
    loss, _ = objective(logps, reference, torch.ones(7), Args())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("w", "n"), [(1.0, 1), (0.25, 3)])
def test_nll_adds_the_chosen_responses_mean_nll(w, n):
    """w * (-log pi(y_c) / |y_c|) a pair, not over the reference; the logged loss has it, the rest not."""
    (logps, reference), lengths = some(n), torch.tensor([1, 2, 3, 5, 8, 13, 21])
    logps.requires_grad_()
    plain, without = objective(logps, reference, lengths, Args(n_neg=n))
    loss, measured = objective(logps, reference, lengths, Args(n_neg=n, nll=w))
    added = [w * -logps[i, 0].item() / lengths[i].item() for i in range(7)]
    assert (loss - plain).tolist() == pytest.approx(added, rel=1e-9)
    (grad,) = torch.autograd.grad((loss - plain).sum(), logps)
    assert not grad[:, 1:].any() and grad[:, 0].tolist() == pytest.approx([-w / k.item() for k in lengths])
    assert measured["loss"].tolist() == pytest.approx(loss.tolist(), rel=1e-6)
    assert torch.equal(measured["margin"], without["margin"])


# ------------------------------------------------------------------------------------------- SFT

def make_pairs(count: int, rejected: int = 1, seed: int = 0) -> list[Pair]:
    """Random ids of unequal lengths; chosen responses of 2 to 9 tokens end with the end token."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(2, 320) for _ in range(draw.randint(low, high))]

    return [Pair(f"row{i}", "x", "c", "good", ["bad"] * rejected, ids(3, 12), [*ids(1, 8), END],
                 [ids(1, 8) for _ in range(rejected)], [ids(3, 12)] * rejected, [True] * (1 + rejected))
            for i in range(count)]


@pytest.fixture(autouse=True)
def no_benchmark(monkeypatch):
    """The matrix product that measures the machine takes longer than all of a test's training."""
    monkeypatch.setattr(train, "matmul_ceiling", lambda *_: 1e12)


@pytest.fixture
def fit(tiny, tmp_path, monkeypatch):
    """(pairs, arguments) -> (each step's gradients before clipping, rows of metrics.jsonl); weights stay."""
    gradients: list[list[Tensor]] = []

    def record(parameters, *_, **__):
        gradients.append([p.grad.clone() for p in parameters])
        return torch.tensor(1.0)

    def get(pairs: list[Pair], **arguments) -> tuple[list[list[Tensor]], list[dict]]:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
        gradients.clear()
        args, file = Args(**arguments), tmp_path / "metrics.jsonl"
        file.unlink(missing_ok=True)
        pairs, model = training_rows(pairs, args), load(tiny)
        zeros = torch.zeros(len(pairs), 1)
        reference = zeros if args.method == "sft" else all_logps(model, pairs, args)
        train.train(model, pairs, reference, args, Metrics(file))
        return list(gradients), [row for _, row in read_jsonl(file)]

    return get


def full_logps(model, prompt: list[int], response: list[int]) -> Tensor:
    """log p of every response token from transformers' full logits, (R,)."""
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("pass_tokens", [8192, 40, 1])
def test_sft_is_the_mean_over_the_batchs_tokens(pass_tokens, fit, tiny):
    """Loss and gradient: sum of -log p over all chosen tokens / their number, end token too, however cut."""
    pairs = make_pairs(5)
    gradients, steps = fit(pairs, method="sft", batch=3, pass_tokens=pass_tokens, seed=4)
    order, names = epoch_order(5, 4, 0), [name for name, _ in load(tiny).named_parameters()]
    assert [row["pairs"] for row in steps] == [3, 2]
    for found, row, part in zip(gradients, steps, (order[:3], order[3:]), strict=True):
        oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        nll = -torch.cat([full_logps(oracle, pairs[i].prompt_ids, pairs[i].chosen_ids) for i in part])
        assert len({len(pairs[i].chosen_ids) for i in part}) > 1  # else a mean over pairs would be the same
        nll.mean().backward()
        assert row["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
        want = dict(oracle.named_parameters())
        for name, g in zip(names, found, strict=True):
            torch.testing.assert_close(g, want[name].grad, rtol=1e-3, atol=2e-6)


def test_sft_counts_the_end_token(fit, tiny):
    """One pair: the loss is the mean over |y| tokens, and not that of the response without its end."""
    (pair,) = make_pairs(1)
    _, (row,) = fit([pair], method="sft")
    with torch.no_grad():
        oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        nll = -full_logps(oracle, pair.prompt_ids, pair.chosen_ids)
    assert row["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert abs(nll[:-1].mean() - nll.mean()) > 1e-2


def test_sft_does_not_see_the_rejected(fit):
    """Other rejected responses, or none: the same gradients and losses to the last bit."""
    sets = make_pairs(4), make_pairs(4), make_pairs(4)
    for other, none in zip(*sets[1:], strict=True):
        other.rejected_ids, none.rejected_ids = [[7, 7, 7]], []
    (first, a), *rest = (fit(pairs, method="sft", batch=2) for pairs in sets)
    for gradients, b in rest:
        assert [row["loss"] for row in a] == [row["loss"] for row in b]
        assert all(torch.equal(x, y) for s, t in zip(first, gradients, strict=True)
                   for x, y in zip(s, t, strict=True))


# ------------------------------------------------------------------------------------------- the count

@pytest.mark.parametrize("groups, fed, seen, predicted", [
    ([([5, 6, 7], [[8, 9], [10]])], 3 + 1, 4.5 + 3.5, 3),
    ([([5, 6, 7], [[8, 9], [10]]), ([5, 6, 8, 9], [[7], [11, 12, 13]])],
     2 + 1 + 1 + 2 + 2, 2 + 2.5 + 3.5 + 6 + 10, 7),
], ids=["alone", "sharing"])  # fmt: skip
def test_flops_are_those_that_run(groups, fed, seen, predicted):
    """Counted by hand; and for the products with weights as torch counts a forward and backward pass, but for
    the logits that backward makes again."""
    model = random_model()
    c = model.config
    width = c.num_attention_heads * c.head_dim
    weights = c.num_hidden_layers * c.hidden_size * (
        2 * width + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    head = c.vocab_size * c.hidden_size * predicted
    assert train.flops(c, groups) == 6 * (weights * fed + head + 2 * c.num_hidden_layers * width * seen)
    with FlopCounterMode(display=False) as counter:
        torch.stack([lp.sum() for responses in response_logps(model, groups) for lp in responses]).sum().backward()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 6 * weights * fed + 8 * head


# ------------------------------------------------------------------------------------------- negatives

def test_rows_of_n_negatives():
    """Pairwise: a row a rejected response, all with the chosen one; softmax and sft: a row a pair."""
    pairs = make_pairs(4, rejected=3)
    pairwise = training_rows(pairs, Args(n_neg=3))
    assert [(r.id, r.chosen_ids, r.rejected_ids) for r in pairwise] == [
        (p.id, p.chosen_ids, [ids]) for p in pairs for ids in p.rejected_ids]
    for args in (Args(n_neg=3, softmax=True), Args(method="sft")):
        assert [(r.id, len(r.rejected_ids)) for r in training_rows(pairs, args)] == [(p.id, 3) for p in pairs]


@pytest.mark.parametrize(("softmax", "steps", "start"), [(False, 6, math.log(2)), (True, 2, math.log(4))])
def test_the_first_step_of_three_negatives(softmax, steps, start, fit):
    """Four pairs in batches of 2: six steps from ln 2, or two from ln 4; the margin is 0."""
    _, metrics = fit(make_pairs(4, rejected=3), n_neg=3, softmax=softmax, batch=2)
    assert len(metrics) == steps and all(row["pairs"] == 2 for row in metrics)
    assert metrics[0]["loss"] == pytest.approx(start, abs=1e-6) and metrics[0]["margin"] == 0.0


def test_pairwise_and_softmax_gradients_at_the_reference(fit):
    """Means of beta/2 (h_r - h_c) and of beta/4 sum_r (h_r - h_c): over one batch, 2/3 of each other."""
    pairs = make_pairs(2, rejected=3)
    (pairwise,), _ = fit(pairs, n_neg=3, batch=6)
    (softmax,), _ = fit(pairs, n_neg=3, batch=2, softmax=True)
    for a, b in zip(pairwise, softmax, strict=True):
        torch.testing.assert_close(a, b * 2 / 3, rtol=1e-3, atol=2e-6)


# ------------------------------------------------------------------------------------------- program

FLAGS = ["--max-new-tokens", "6", "--batch", "2", "--lr", "1e-4", "--dtype", "float32",
         "--save-dtype", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Fifteen rows with contexts: eight to train, four to validate, three to test."""
    parts = ["train"] * 8 + ["validation"] * 4 + ["test"] * 3
    lines = [{"id": f"r{i}", "prompt": f"{split} question {i}?", "context": f"I am number {i % 3}.",
              "split": split} for i, split in enumerate(parts)]
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def program(argv: list, folder: Path, main=train.program) -> None:
    """A program of the project inside this process, run in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
        patch.setattr(train, "matmul_ceiling", lambda *_: 1e12)
        main()


@pytest.fixture(scope="module")
def made(data, tiny, tmp_path_factory) -> Path:
    """The folder of one plain DPO run with three negatives a pair."""
    folder = tmp_path_factory.mktemp("made")
    program(["--data", data, "--model", tiny, "--n-neg", "3", "--out", "run", *FLAGS], folder)
    return folder / "run"


@pytest.fixture
def call(data, tiny, tmp_path):
    """(flags) -> the run folder of train.py on the data, called in an empty folder."""
    def get(*flags) -> Path:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        program(["--data", data, "--model", tiny, "--out", "o", *FLAGS, *flags], folder)
        return folder / "o"

    return get


def steps_of(folder: Path) -> list[dict]:
    return [row for _, row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def validations(folder: Path) -> list[dict]:
    return [row for _, row in read_jsonl(folder / "metrics.jsonl") if "loss" not in row]


CLOCK = {"tokens_per_second", "matmul_share"}
COMMON = {"candidate", "step", "epoch", "loss", "logp_chosen", "grad_norm", "lr", "pairs", "tokens",
          "skipped"}
REWARDS = {"margin", "accuracy", "reward_chosen", "reward_rejected", "accuracy_chosen", "accuracy_rejected",
           "logp_rejected"}
PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_has_its_figure_and_all_keys(made):
    """learning_curve.png is a PNG; a line a step with every DPO metric; pairwise rows are three a pair."""
    assert (made / "learning_curve.png").read_bytes().startswith(PNG)
    steps, pairs = steps_of(made), load_pairs(made)
    assert all(row.keys() == COMMON | CLOCK | REWARDS for row in steps) and not validations(made)
    assert all(len(p.rejected_ids) == 3 for p in pairs)
    assert sum(row["pairs"] for row in steps) == 3 * len(pairs) == read_json(made / "summary.json")["pairs"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_sft_samples_no_rejected_responses(call):
    """A chosen response an example and nothing else; no metric of rewards; a figure all the same."""
    folder = call("--method", "sft")
    lines = [row for _, row in read_jsonl(folder / "pairs.jsonl")]
    assert len(lines) >= 6
    assert all(row["rejected"] == row["rejected_ids"] == row["source_ids"] == [] for row in lines)
    assert all(row.keys() == COMMON | CLOCK for row in steps_of(folder))
    assert read_json(folder / "args.json")["arguments"]["n_neg"] == 0
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG)


def test_sft_on_the_chosen_of_dpo_pairs(made, call, tmp_path):
    """--pairs of a DPO run: one row a pair, and other rejected responses there give the same weights."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(made / "pairs.json", other)
    lines = [row for _, row in read_jsonl(made / "pairs.jsonl")]
    for row in lines:
        row["rejected_ids"] = [[9, 9], [8], [7]]
    (other / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    weights = []
    for k, folder in enumerate((made, other)):
        call("--method", "sft", "--pairs", folder, "--out", f"o{k}")
        run = tmp_path / "work" / f"o{k}"
        assert read_json(run / "summary.json")["pairs"] == len(lines)
        assert not REWARDS & steps_of(run)[0].keys()
        weights.append((run / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_softmax_is_a_row_a_pair(made, call):
    """The same pairs with --softmax: a third of the rows, the first step at ln 4."""
    folder = call("--pairs", made, "--softmax")
    assert read_json(folder / "summary.json")["pairs"] == len(load_pairs(made))
    assert steps_of(folder)[0]["loss"] == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize(("flags", "word"), [
    (["--method", "sft", "--softmax"], "--softmax"),
    (["--method", "sft", "--label-smoothing", "0.1"], "--label-smoothing"),
    (["--method", "sft", "--nll", "1"], "--nll"), (["--method", "sft", "--n-neg", "3"], "--n-neg"),
    (["--n-neg", "0"], "--n-neg"), (["--n-neg", "-1"], "--n-neg"),
    (["--label-smoothing", "0.5"], "--label-smoothing"), (["--label-smoothing", "-1"], "--label-smoothing"),
    (["--nll", "-1"], "--nll"), (["--patience", "2"], "--patience"), (["--eval-every", "-1"], "--eval-every"),
    (["--lr", "1e-4,0"], "--lr"), (["--beta", "0.1,x"], "--beta"), (["--epochs", "1,0"], "--epochs"),
    (["--label-smoothing", "0.1,0.2"], "--label-smoothing"), (["--method", "ppo"], "--method"),
])  # fmt: skip
def test_what_does_not_go_together_leaves_nothing(flags, word, call, tmp_path):
    """A UserError that names the flag, before any folder is made."""
    with pytest.raises(UserError, match=word):
        call(*flags)
    assert os.listdir(tmp_path / "work") == []


def test_dpo_needs_rejected_responses_in_given_pairs(call, made, tmp_path):
    """--pairs of an SFT run is refused, and nothing is left."""
    bare = tmp_path / "bare"
    bare.mkdir()
    about = read_json(made / "pairs.json")
    about["settings"]["n_neg"] = 0
    (bare / "pairs.json").write_text(json.dumps(about))
    lines = [row | dict(rejected=[], rejected_ids=[], source_ids=[], gain_rejected=[], finished=[True])
             for _, row in read_jsonl(made / "pairs.jsonl")]
    (bare / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(UserError, match=r"--pairs|--n-neg"):
        call("--pairs", bare)
    assert os.listdir(tmp_path / "work") == []


# ------------------------------------------------------------------------------------------- choosing

@pytest.fixture
def script(monkeypatch):
    """(scores) -> Selection.measure returns them in turn; the weights that it was shown."""
    def arrange(*scores: float) -> list[dict[str, Tensor]]:
        shown: list[dict[str, Tensor]] = []

        def measure(self, model) -> float:
            shown.append({key: p.detach().clone() for key, p in model.state_dict().items()})
            return scores[len(shown) - 1]

        monkeypatch.setattr(train.Selection, "measure", measure)
        return shown

    return arrange


def kept(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_best_of_four_candidates_is_kept(call, script, made):
    """lr x beta, 0 to 3; of equal ones the earlier; model, args.json and summary.json are the chosen's."""
    shown = script(0.1, 0.4, 0.4, 0.2)
    folder = call("--pairs", made, "--lr", "1e-4,1e-3", "--beta", "0.1,0.2")
    assert len(shown) == 4 and same(kept(folder), shown[1])
    assert [row["candidate"] for row in validations(folder)] == [0, 1, 2, 3]
    assert [row["validation_margin_accuracy"] for row in validations(folder)] == [0.1, 0.4, 0.4, 0.2]
    about, steps = read_json(folder / "args.json"), steps_of(folder)
    settings = [(c["lr"], c["beta"]) for c in about["candidates"]]
    assert sorted(settings) == [(1e-4, 0.1), (1e-4, 0.2), (1e-3, 0.1), (1e-3, 0.2)]
    each = len(steps) // 4
    assert [row["candidate"] for row in steps] == [k for k in range(4) for _ in range(each)]
    for k, (lr, _) in enumerate(settings):
        mine = [row for row in steps if row["candidate"] == k]
        assert [row["step"] for row in mine] == list(range(1, each + 1))
        assert max(row["lr"] for row in mine) == lr and mine[0]["margin"] == 0.0
    chosen = read_json(folder / "summary.json")["chosen"]
    assert (chosen["candidate"], chosen["score"], chosen["step"]) == (1, 0.4, each)
    assert (about["arguments"]["lr"], about["arguments"]["beta"]) == settings[1]
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG)
    lr, beta = map(str, settings[1])
    call("--pairs", made, "--lr", lr, "--beta", beta, "--out", "alone")
    assert same(kept(folder), kept(folder.parent / "alone"))


def test_early_stopping_keeps_the_best_step(call, script, made):
    """Scores .1 .5 .5 .3 .9 at patience 2: it ends after the fourth, with the weights of the second."""
    shown = script(0.1, 0.5, 0.5, 0.3, 0.9)
    folder = call("--pairs", made, "--eval-every", "2", "--patience", "2")
    assert len(shown) == 4 and len(steps_of(folder)) == 8
    assert same(kept(folder), shown[1]) and not same(shown[1], shown[2])
    assert [row["step"] for row in validations(folder)] == [2, 4, 6, 8]
    summary = read_json(folder / "summary.json")
    assert summary["chosen"]["step"] == 4 and summary["steps"] == 8


def test_without_patience_every_step_is_taken(call, script, made):
    """And the last one is validated too, once, though 5 does not divide the steps."""
    shown = script(0.9, *[0.1] * 9)
    folder = call("--pairs", made, "--softmax", "--eval-every", "3")
    total = math.ceil(len(load_pairs(made)) / 2)
    expected = [*range(3, total, 3), total]
    assert [row["step"] for row in validations(folder)] == expected and len(steps_of(folder)) == total
    assert same(kept(folder), shown[0])


def test_the_choice_never_sees_the_test_part(call, tiny, data, monkeypatch):
    """No test prompt becomes ids; scores are the validation pairs' by transformers' full logits."""
    turns, chat = [], Tokenizer.chat

    def spy(self, user: str, *rest) -> list[int]:
        turns.append(user)
        return chat(self, user, *rest)

    monkeypatch.setattr(Tokenizer, "chat", spy)
    folder = call("--lr", "1e-3,3e-3", "--epochs", "2")
    read = [any(f"{part} question" in turn for turn in turns) for part in ("train", "validation", "test")]
    assert read == [True, True, False]
    pairs = load_pairs(folder / "validation")
    assert {p.id for p in pairs} <= {e.id for e in load_examples(str(data), "validation")}
    assert not {p.id for p in pairs} & {p.id for p in load_pairs(folder)}
    base, ours = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
                  for source in (tiny, folder / "model"))

    @torch.no_grad()
    def moved(prompt: list[int], response: list[int]) -> float:
        return (full_logps(ours, prompt, response) - full_logps(base, prompt, response)).sum().item()

    margins = [moved(p.prompt_ids, p.chosen_ids) - moved(p.prompt_ids, p.rejected_ids[0]) for p in pairs]
    assert min(map(abs, margins)) > 1e-3  # none is a matter of rounding
    chosen = read_json(folder / "summary.json")["chosen"]
    assert chosen["score"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert chosen["score"] == max(row["validation_margin_accuracy"] for row in validations(folder))


def test_data_with_checks_are_chosen_by_win_rate(tiny, tmp_path, monkeypatch):
    """Share of validation responses that honour their context, drawn at temperature 0.1 and top-p 0.9."""
    args = Args(data="demo", model=str(tiny), val_limit=40, max_new_tokens=5)
    selection = train.Selection(args, tmp_path, tiny)
    assert selection.name == "win_rate" and {e.split for e in selection.examples} == {"validation"}
    text, seen = 'yes! ok! "oh!" is it?', []

    def generate(model, prompts, sampling, *_, **__) -> list[Sample]:
        seen.append(sampling)
        return [Sample(selection.tokenizer.response(text)) for _ in prompts]

    monkeypatch.setattr(train, "generate", generate)
    expected = [honours(e.check, text) for e in selection.examples]
    assert len(expected) == 40 and 0 < sum(expected) < 40
    assert selection.measure(load(tiny)) == pytest.approx(sum(expected) / 40)
    assert [(s.temperature, s.top_p, s.max_new_tokens) for s in seen] == [(0.1, 0.9, 5)]


def test_tasks_are_chosen_by_accuracy(tiny, tmp_path, monkeypatch):
    """Share of validation responses with the right letter, drawn as ARC is evaluated: at temperature 1."""
    (tmp_path / "ARC-Easy").mkdir()
    for split in ("train", "validation", "test"):
        rows = [dict(id=f"{split}{i}", question=f"{split} {i}?", answerKey="1" if i % 3 else "3",
                     choices=dict(text=["red", "blue", "green"], label=["1", "2", "3"])) for i in range(6)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "ARC-Easy" / f"{split}.jsonl").write_text(lines)
    args = Args(data=f"arc-easy:{tmp_path}", neg="random", model=str(tiny), max_new_tokens=5)
    selection = train.Selection(args, tmp_path, tiny)
    assert selection.name == "win_rate" and {e.split for e in selection.examples} == {"validation"}
    seen = []

    def generate(model, prompts, sampling, *_, **__) -> list[Sample]:
        seen.append(sampling)
        return [Sample(selection.tokenizer.response("The answer is: A")) for _ in prompts]

    monkeypatch.setattr(train, "generate", generate)
    assert selection.measure(load(tiny)) == pytest.approx(4 / 6)
    assert [(s.temperature, s.top_p, s.max_new_tokens) for s in seen] == [(1.0, 0.9, 5)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_saved_in_the_type_asked_for(dtype, call, made):
    """The tensors' type and config.json's word for it."""
    folder = call("--pairs", made, "--softmax", "--save-dtype", dtype)
    assert {str(p.dtype) for p in kept(folder).values()} == {f"torch.{dtype}"}
    config = read_json(folder / "model" / "config.json")
    assert dtype in (config.get("dtype"), config.get("torch_dtype"))


# ------------------------------------------------------------------------------------------- dry run

@pytest.mark.parametrize("flags", [[], ["--neg", "random", "--n-neg", "3"], ["--n-neg", "3", "--softmax"],
                                   ["--method", "sft", "--epochs", "2"]])
def test_a_dry_run_leaves_nothing_and_counts_right(flags, call, tmp_path, capsys):
    """An example with special tokens and masks, seconds, GB; its pairs and steps are the real run's."""
    call("--dry-run", *flags)
    out = capsys.readouterr().out
    assert os.listdir(tmp_path / "work") == []
    assert "<|im_start|>user\ntrain question" in re.sub(r"\n +", "\n", out) and "<|im_start|>assistant" in out
    sides = out.count("\nrejected")
    rejected = 0 if "sft" in flags else 3 if "3" in flags else 1
    assert "mask 0" in out and out.count("mask 1\n") == 1 + rejected and bool(sides) == bool(rejected)
    (count, steps), = re.findall(r"(\d+) pairs of about \d+ tokens, (\d+) steps an epoch", out)
    assert re.search(r"estimate: \d+ s \(.*\d+\.\d GB", out)
    folder = call(*flags)
    summary = read_json(folder / "summary.json")
    assert int(count) == summary["pairs"] and int(steps) * (2 if "sft" in flags else 1) == summary["steps"]


# ------------------------------------------------------------------------------------------- reuse

EVAL = ["--max-new-tokens", "5", "--dtype", "float32"]


@pytest.fixture(scope="module")
def evaluated(made) -> Path:
    """The run of `made`, evaluated anew."""
    program(["--model", made, *EVAL], made.parent, evaluation.program)
    return made


def close(a, b) -> None:
    """Equal JSON values; numbers within fp32 rounding."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        [close(a[key], b[key]) for key in a]
    elif isinstance(a, list):
        [close(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-4) if isinstance(b, float) else b)


@pytest.mark.parametrize("own", [False, True])
def test_reused_responses_give_the_same_numbers(own, evaluated, tmp_path, monkeypatch):
    """And the same lines; only the trained system is sampled again, with the run's own folder nothing."""
    source = evaluated if own else shutil.copytree(evaluated, tmp_path / "other")
    drawn, generate = [], evaluation.generate

    def spy(model, prompts, *rest, **options):
        drawn.append(len(prompts))
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(evaluation, "generate", spy)
    program(["--model", evaluated, *EVAL, "--reuse", source, "--out", tmp_path / "again"], tmp_path,
            evaluation.program)
    assert drawn == ([] if own else [3])
    for key in ("parts", "contexts", "settings"):
        close(*(read_json(folder / "eval.json")[key] for folder in (tmp_path / "again", evaluated)))
    lines = [sorted((row for _, row in read_jsonl(folder / "responses.jsonl")),
                    key=lambda row: (row["system"], row["id"])) for folder in (tmp_path / "again", evaluated)]
    assert len(lines[0]) == 9
    close(*lines)


@pytest.mark.parametrize(("flags", "word"), [
    (["--seed", "1"], "seed"), (["--max-new-tokens", "3"], "sampling"), (["--temperature", "1"], "sampling"),
    (["--dtype", "bfloat16"], "dtype"), (["--date", "2020-01-01"], "date"), (["--limit", "2"], "examples"),
])  # fmt: skip
def test_reuse_of_other_settings_is_refused(flags, word, evaluated, tmp_path):
    """By the name of what differs, and nothing is written."""
    with pytest.raises(UserError, match=f"--reuse.*made with {word}"):
        program(["--model", evaluated, *EVAL, *flags, "--reuse", evaluated, "--out", tmp_path / "again"],
                tmp_path, evaluation.program)
    assert os.listdir(tmp_path) == []


def test_reuse_of_another_base_model_is_refused(evaluated, tiny, data, tmp_path):
    """A run that started from another folder has other base responses."""
    other = write_model(tmp_path / "other", seed=5)
    about = read_json(evaluated / "args.json")
    about["arguments"]["model"] = str(other)
    shutil.copytree(evaluated, tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"--reuse.*made with model"):
        program(["--model", tmp_path / "run", "--data", data, *EVAL, "--reuse", evaluated, "--out",
                 tmp_path / "again"], tmp_path, evaluation.program)
    assert not (tmp_path / "again").exists()


def test_reuse_by_the_bare_model_is_refused(evaluated, tiny, data, tmp_path):
    """Nothing would be left to sample: a UserError, no folder."""
    with pytest.raises(UserError, match=r"--reuse.*bare model"):
        program(["--model", tiny, "--data", data, *EVAL, "--reuse", evaluated, "--out", tmp_path / "o"],
                tmp_path, evaluation.program)
    assert os.listdir(tmp_path) == []
