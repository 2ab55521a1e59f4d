"""train.py against its contract: schedule, DPO steps against transformers' gradients, skips, the program."""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from model import load
from optimizer import learning_rate
from pairs import Pair, load_pairs
from run import Metrics, UserError, read_json, read_jsonl
from train import Args, all_logps, epoch_order

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------- schedule

@pytest.mark.parametrize(("steps", "warmup"), [
    (1, 1), (10, 1), (33, 1), (34, 2), (100, 3), (101, 4), (1000, 30),
])  # fmt: skip
def test_learning_rate_is_its_closed_form(steps, warmup):
    """Up in a line over ceil(3%) of the steps to the peak, then down a cosine that reaches 10% at `steps`."""
    rates = [learning_rate(step, steps, 2e-6) for step in range(steps + 1)]
    line = [2e-6 * (i + 1) / warmup for i in range(warmup)]
    rest = steps - warmup
    cosine = [2e-7 + 1.8e-6 * math.cos(math.pi / 2 * t / rest) ** 2 for t in range(rest)]
    assert rates[:steps] == pytest.approx(line + cosine, rel=1e-12)
    assert max(rates) == rates[warmup - 1] == pytest.approx(2e-6)
    assert steps == warmup or rates[steps] == pytest.approx(2e-7)
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone():
    """Whatever the global generators are; other seeds and epochs give other orders."""
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            torch.manual_seed(epoch), random.seed(epoch)
            orders[seed, epoch] = tuple(epoch_order(50, seed, epoch))
            torch.rand(7), random.random()
            assert orders[seed, epoch] == tuple(epoch_order(50, seed, epoch))
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 9


# ------------------------------------------------------------------------------------------- training

def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Random ids of unequal lengths."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(2, 320) for _ in range(draw.randint(low, high))]

    return [Pair(f"row{i}", "x", "c", "good", ["bad"], ids(3, 12), ids(1, 8), [ids(1, 8)], [ids(3, 12)],
                 [True, True]) for i in range(count)]


@pytest.fixture
def fit(tiny, tmp_path):
    """(pairs, arguments) -> (model, summary, rows of metrics.jsonl) of one run."""
    def get(pairs: list[Pair], compute=torch.float32, folder=tiny, **arguments):
        args, file = Args(**arguments), tmp_path / "metrics.jsonl"
        file.unlink(missing_ok=True)
        reference = all_logps(load(folder, compute), pairs, args)
        model = load(folder, torch.float32, compute)
        summary = train.train(model, pairs, reference, args, Metrics(file))
        return model, summary, [row for _, row in read_jsonl(file)]

    return get


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[list[torch.Tensor], float]]:
    """Takes AdamW's place and moves nothing: each step's gradients, as clipped, and its learning rate."""
    steps = []

    class Recorder(torch.optim.SGD):
        def __init__(self, parameters, *_, **__):
            super().__init__(parameters, 0.0)

        def step(self):
            (group,) = self.param_groups
            steps.append(([p.grad.clone() for p in group["params"]], group["lr"]))

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return steps


def naive_gradient(folder: Path, pairs: list[Pair], beta: float) -> tuple[list[torch.Tensor], float]:
    """Gradient of the mean DPO loss at the reference, from transformers' full logits, and its norm."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logp(prompt: list[int], response: list[int]) -> torch.Tensor:
        logps = oracle(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))

    losses = []
    for p in pairs:
        difference = logp(p.prompt_ids, p.chosen_ids) - logp(p.prompt_ids, p.rejected_ids[0])
        losses.append(-F.logsigmoid(beta * (difference - difference.detach())))
    torch.stack(losses).mean().backward()
    found = dict(oracle.named_parameters())
    order = [found[name].grad for name, _ in load(folder).named_parameters()]
    return order, math.sqrt(sum(g.double().square().sum() for g in order))


def assert_same_gradient(found: list[torch.Tensor], naive: list[torch.Tensor], norm: float) -> None:
    """Up to fp32 rounding, the naive one clipped to norm 1."""
    for a, b in zip(found, naive, strict=True):
        torch.testing.assert_close(a, b * min(1, 1 / norm), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(("beta", "clipped"), [(0.02, False), (2.0, True)])
def test_first_gradient_is_a_naive_dpo_gradient(beta, clipped, fit, recorded, tiny):
    """Summed log-probs under the right prompt, mean over the batch, norm clipped at 1, logged unclipped."""
    pairs = make_pairs(5)
    _, _, (row,) = fit(pairs, batch=5, beta=beta)
    naive, norm = naive_gradient(tiny, pairs, beta)
    assert (norm > 1) == clipped
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_same_gradient(recorded[0][0], naive, norm)


@pytest.mark.parametrize("pass_tokens", [8192, 1])
def test_a_short_last_batch_is_averaged_over_its_own_pairs(pass_tokens, fit, recorded, tiny):
    """Five pairs in batches of three: the second step is the mean over two, in the order of the epoch."""
    pairs = make_pairs(5)
    _, _, rows = fit(pairs, batch=3, seed=4, beta=0.02, pass_tokens=pass_tokens)
    assert [row["pairs"] for row in rows] == [3, 2]
    order = epoch_order(5, 4, 0)
    for (found, _), part in zip(recorded, (order[:3], order[3:]), strict=True):
        naive, norm = naive_gradient(tiny, [pairs[i] for i in part], 0.02)
        assert norm < 1
        assert_same_gradient(found, naive, norm)


def test_cutting_a_step_into_passes_changes_nothing(fit, recorded):
    """One pass, two or three, a pass a pair: the same gradients of every step within fp32 rounding."""
    pairs = make_pairs(8)
    for pass_tokens in (8192, 60, 1):
        fit(pairs, batch=4, beta=0.02, pass_tokens=pass_tokens)
    gradients = [found for found, _ in recorded]
    whole, some, single = gradients[:2], gradients[2:4], gradients[4:]
    for other in (some, single):
        for a, b in zip(whole, other, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_schedule_reaches_the_optimizer(fit, recorded):
    """Every step is taken at learning_rate(step, steps, --lr)."""
    fit(make_pairs(40), batch=1, lr=3e-4, pass_tokens=1)
    assert [rate for _, rate in recorded] == [learning_rate(i, 40, 3e-4) for i in range(40)]


def test_weights_do_not_depend_on_the_passes(fit):
    """AdamW itself, three steps: weights equal up to the sign of gradients that are rounding noise."""
    models = [fit(make_pairs(12), batch=4, lr=1e-4, pass_tokens=tokens)[0] for tokens in (8192, 1)]
    pairs = zip(*(m.parameters() for m in models), strict=True)
    apart = torch.cat([(a - b).detach().abs().flatten() for a, b in pairs])
    assert apart.median() < 1e-8 and (apart > 1e-6).float().mean() < 1e-3 and apart.max() <= 6.1e-4


def test_a_step_is_adamw_without_weight_decay(fit, tiny):
    """The first one moves every weight by -lr * g / (|g| + 1e-8), g the naive gradient clipped."""
    pairs = make_pairs(4)
    model, _, (row,) = fit(pairs, batch=4, lr=1e-3)
    naive, norm = naive_gradient(tiny, pairs, 0.1)
    for before, after, g in zip(load(tiny).parameters(), model.parameters(), naive, strict=True):
        g = g * min(1, 1 / norm)
        sure = g.abs() > 1e-4
        assert sure.any()
        torch.testing.assert_close((after - before)[sure], -1e-3 * g[sure].sign(), rtol=0, atol=2e-6)
    assert row["lr"] == 1e-3


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pass_tokens", [8192, 40])
def test_the_first_step_is_at_the_reference_exactly(compute, pass_tokens, fit):
    """Loss ln 2 and margin 0.0, not nearly, in fp32 and bf16 and however the step is cut."""
    _, _, rows = fit(make_pairs(12), compute, batch=6, lr=1e-3, pass_tokens=pass_tokens)
    assert rows[0]["margin"] == rows[0]["reward_chosen"] == rows[0]["reward_rejected"] == 0.0
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[0]["accuracy"] == 0.0
    assert rows[1]["margin"] != 0.0


def test_the_reference_is_scored_in_the_passes_of_the_first_epoch(fit, monkeypatch):
    """The same pairs side by side, so that even rounding is the same; the second epoch has its own passes."""
    passes, pair_logps = [], train.pair_logps

    def spy(model, some, args):
        passes.append([pair.id for pair in some])
        return pair_logps(model, some, args)

    monkeypatch.setattr(train, "pair_logps", spy)
    fit(make_pairs(12), batch=5, epochs=2, pass_tokens=60)
    first = next(i for i in range(1, len(passes)) if sum(map(len, passes[:i])) == 12)
    assert first > 3 and max(map(len, passes)) > 1  # steps are cut, and not into single pairs
    assert passes[:first] == passes[first : 2 * first] != passes[2 * first :]


def test_the_first_step_is_exact_for_any_norm_weights(fit, tiny, tmp_path):
    """bf16 arithmetic on fp32 masters whose norms are no bf16 numbers: the margin is still 0.0."""
    folder = Path(shutil.copytree(tiny, tmp_path / "norms"))
    weights = load_file(folder / "model.safetensors")
    for name, w in weights.items():
        if w.dim() == 1:
            weights[name] = w + torch.linspace(-0.3, 0.3, len(w))
    save_file(weights, folder / "model.safetensors")
    _, _, rows = fit(make_pairs(6), torch.bfloat16, folder, batch=6)
    assert rows[0]["margin"] == rows[0]["reward_chosen"] == rows[0]["reward_rejected"] == 0.0


def test_eight_pairs_are_learnt(fit):
    """Several epochs at lr 1e-3: accuracy 1, margins grow, chosen over rejected; masters stay fp32."""
    model, summary, rows = fit(make_pairs(8), torch.bfloat16, lr=1e-3, batch=4, epochs=8)
    margins = [(a["margin"] + b["margin"]) / 2 for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert len(margins) == 8 and margins[-1] > 1 and margins == sorted(margins)
    assert rows[-1]["accuracy"] == rows[-2]["accuracy"] == 1.0
    assert rows[-1]["loss"] < 0.3 and rows[-1]["reward_chosen"] > rows[-1]["reward_rejected"]
    assert summary["steps"] == 16 and summary["pairs"] == 8 and summary["skipped"] == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


KEYS = {"loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "accuracy_chosen",
        "accuracy_rejected", "logp_chosen", "logp_rejected", "grad_norm", "lr", "pairs", "tokens",
        "tokens_per_second", "matmul_share", "skipped"}


def test_metrics_have_a_line_a_step(fit):
    """All keys, the schedule's rates, every pair once an epoch, its prompt once a step."""
    pairs = make_pairs(7)
    _, _, rows = fit(pairs, batch=3, epochs=2, lr=1e-4)
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["pairs"] for row in rows] == [3, 3, 1, 3, 3, 1]
    assert [row["lr"] for row in rows] == [learning_rate(i, 6, 1e-4) for i in range(6)]
    sizes = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids[0]) for p in pairs]
    for epoch in range(2):
        order = epoch_order(7, 0, epoch)
        assert [row["tokens"] for row in rows[3 * epoch : 3 * epoch + 3]] == [
            sum(sizes[i] for i in part) for part in (order[:3], order[3:6], order[6:])]
    assert all(row["tokens_per_second"] > 0 and row["skipped"] == 0 for row in rows)


def test_metrics_are_means_over_the_pairs_of_a_step(fit, tiny):
    """logp_chosen and logp_rejected of the first step, uneven passes, against transformers' logits."""
    pairs = make_pairs(5)
    _, _, (row,) = fit(pairs, batch=5, pass_tokens=60)
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for key, side in (("logp_chosen", "chosen_ids"), ("logp_rejected", "rejected_ids")):
        total = 0
        for p in pairs:
            ids = getattr(p, side) if key == "logp_chosen" else getattr(p, side)[0]
            with torch.no_grad():
                logps = oracle(torch.tensor([p.prompt_ids + ids])).logits[0].log_softmax(-1)
            total += sum(logps[len(p.prompt_ids) + i - 1, token].item() for i, token in enumerate(ids))
        assert row[key] == pytest.approx(total / 5, abs=1e-4)


# ------------------------------------------------------------------------------------------- not finite

@pytest.fixture
def break_steps(monkeypatch):
    """(steps, value) -> dpo's loss is that value in these steps (one pass a step, counted from 1)."""
    true_dpo = train.dpo

    def arrange(broken: set[int], value: float) -> None:
        calls = []

        def dpo(*arguments):
            calls.append(0)
            loss, metrics = true_dpo(*arguments)
            if len(calls) not in broken:
                return loss, metrics
            return loss * value, {**metrics, "loss": metrics["loss"] * value}

        monkeypatch.setattr(train, "dpo", dpo)

    return arrange


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_weights(value, fit, break_steps, tiny, capsys):
    """It is skipped, counted, and printed with its pairs."""
    break_steps({1}, value)
    model, summary, rows = fit(make_pairs(2), batch=2, lr=1e-2)
    for before, after in zip(load(tiny).parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    out = capsys.readouterr().out
    assert summary["skipped"] == 1 and rows[0]["skipped"] == 1
    assert "step 1 skipped" in out and "row0" in out and "row1" in out


def test_training_goes_on_after_a_skipped_step(fit, break_steps):
    """The others are taken with clean gradients: weights are finite and the margin grows."""
    break_steps({2, 3}, math.nan)
    model, summary, rows = fit(make_pairs(2), batch=2, lr=1e-3, epochs=6)
    assert all(p.isfinite().all() for p in model.parameters())
    assert summary["skipped"] == 2 and [row["skipped"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert rows[1]["margin"] == rows[2]["margin"] == rows[3]["margin"] < rows[4]["margin"] < rows[5]["margin"]


def test_five_in_a_row_stop_the_run(fit, break_steps):
    """Four do not, twice over; the fifth is a UserError."""
    break_steps({1, 2, 3, 4, 6, 7, 8, 9}, math.nan)
    assert fit(make_pairs(2), batch=2, epochs=10)[1]["skipped"] == 8
    break_steps({2, 3, 4, 5, 6}, math.nan)
    with pytest.raises(UserError, match="five"):
        fit(make_pairs(2), batch=2, epochs=10)


# ------------------------------------------------------------------------------------------- program

FLAGS = ["--max-new-tokens", "6", "--batch", "2", "--lr", "1e-4", "--dtype", "float32"]


def process(*argv, cwd: Path) -> subprocess.CompletedProcess:
    """A program of the project as its own process."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                          check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve rows with contexts: eight to train, two and two held out."""
    rows = [{"id": f"r{i}", "prompt": f"Question {i}?", "context": f"I am number {i % 3}.",
             "split": "train" if i < 8 else "validation" if i < 10 else "test"} for i in range(12)]
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def whole_run(data, tiny, tmp_path_factory):
    """(the command, its folder, what it printed) of one whole run in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    named = ["--data", data, "--neg", "missing", "--model", tiny, "--out", "mine"]
    command = [ROOT / "train.py", *named, *FLAGS]
    done = process(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return command, folder / "mine", done.stdout


@pytest.fixture
def call(data, tiny, tmp_path, monkeypatch):
    """(flags) -> the same program inside this process, in an empty folder."""
    def program(*flags) -> None:
        monkeypatch.chdir(tmp_path)
        argv = ["--data", data, "--model", tiny, *FLAGS, *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        train.program()

    return program


def steps_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    rows = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "matmul_share")} for row in rows]


def test_a_run_folder_is_complete(whole_run, data, tiny):
    """Arguments, pairs of the training rows only, a line a step, a summary and a model; nothing else."""
    _, folder, out = whole_run
    files = ["args.json", "learning_curve.png", "metrics.jsonl", "model", "pairs.json", "pairs.jsonl",
             "summary.json"]
    assert sorted(os.listdir(folder)) == files and os.listdir(folder.parent) == ["mine"]
    arguments = read_json(folder / "args.json")["arguments"]
    assert arguments == dataclasses.asdict(Args(data=str(data), model=str(tiny), out="mine", max_new_tokens=6,
                                                batch=2, lr=1e-4, dtype="float32"))
    pairs, rows = load_pairs(folder), steps_of(folder)
    assert {p.id for p in pairs} <= {f"r{i}" for i in range(8)} and len(pairs) >= 6
    assert all(row.keys() >= KEYS - {"tokens_per_second", "matmul_share"} for row in rows)
    assert sum(row["pairs"] for row in rows) == len(pairs) and len(rows) == math.ceil(len(pairs) / 2)
    assert rows[0]["margin"] == 0.0 and rows[-1]["skipped"] == 0
    summary = read_json(folder / "summary.json")
    assert (summary["steps"], summary["pairs"], summary["skipped"]) == (len(rows), len(pairs), 0)
    assert "eval.py" in out and str(folder.name) in out


def test_the_trained_model_opens_in_transformers(whole_run, tiny):
    """Every weight is there, every matrix has moved; the tokenizer and its template came along."""
    folder = whole_run[1] / "model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    ours = load(folder)
    for name, p in ours.named_parameters():
        assert torch.equal(model.state_dict()[name], p)
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False)
    assert 0 in ids and 1 in ids
    start = load_file(tiny / "model.safetensors")
    for name, p in ours.named_parameters():
        assert p.dim() == 1 or not torch.equal(p, start[name].bfloat16().float())


def test_the_same_command_again_is_refused(whole_run):
    """Exit code 2, one line that names the folder, every file as it was."""
    command, folder, _ = whole_run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    done = process(*command, cwd=folder.parent)
    assert done.returncode == 2 and "mine" in done.stderr and done.stderr.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_torchrun_trains_on_the_pairs_of_a_folder(whole_run, data, tiny, tmp_path):
    """One process of torch.distributed.run, --pairs: the steps and weights of the run that drew them."""
    done = process("-m", "torch.distributed.run", "--nproc_per_node", "1", ROOT / "train.py", "--data", data,
                   "--model", tiny, "--pairs", whole_run[1], "--out", "again", *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "again") == steps_of(whole_run[1])
    files = [folder / "model" / "model.safetensors" for folder in (tmp_path / "again", whole_run[1])]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_random_negatives_train_too(call, tmp_path, tiny, whole_run):
    """A folder under runs/ is named by the arguments; rejected responses have other sources."""
    call("--neg", "random")
    (folder,) = (tmp_path / "runs").iterdir()
    assert all(word in folder.name for word in ("own", "random", tiny.name))
    assert (folder / "model" / "model.safetensors").exists()
    sources = {p.id: p.source_ids for p in load_pairs(folder)}
    assert all(sources[p.id] != p.source_ids for p in load_pairs(whole_run[1]) if p.id in sources)


def test_pairs_of_another_folder_are_not_sampled_again(call, whole_run, tmp_path, monkeypatch):
    """--pairs needs no sampling, and leaves its folder alone."""
    monkeypatch.setattr(train, "pairs_for", None)
    call("--pairs", whole_run[1], "--out", "o")
    assert read_json(tmp_path / "o" / "summary.json")["pairs"] == len(load_pairs(whole_run[1]))


def test_a_run_on_given_pairs_remembers_their_data_and_seed(whole_run, tiny, tmp_path, monkeypatch):
    """With --pairs alone they are those of pairs.json (or it is refused): eval.py goes by args.json."""
    made = tmp_path / "made"
    shutil.copytree(whole_run[1], made, ignore=shutil.ignore_patterns("model", "metrics.jsonl"))
    about = read_json(made / "pairs.json")
    about["settings"]["seed"] = 3
    (made / "pairs.json").write_text(json.dumps(about))
    argv = ["train.py", "--pairs", str(made), "--model", str(tiny), "--out", str(tmp_path / "o"), *FLAGS]
    monkeypatch.setattr(sys, "argv", argv)
    with contextlib.suppress(UserError):
        train.program()
        arguments = read_json(tmp_path / "o" / "args.json")["arguments"]
        assert (arguments["data"], arguments["seed"]) == (about["settings"]["data"], 3)


@pytest.mark.parametrize(("flags", "word"), [
    (["--batch", "0"], "--batch"), (["--epochs", "0"], "--epochs"), (["--lr", "0"], "--lr"),
    (["--lr", "-1e-6"], "--lr"), (["--beta", "0"], "--beta"), (["--pass-tokens", "0"], "--pass-tokens"),
    (["--pairs", "nowhere"], "nowhere"), (["--model", "no/such/place"], "no/such/place"),
    (["--data", "demos"], "--data"),
])  # fmt: skip
def test_wrong_arguments_leave_nothing(flags, word, call, tmp_path):
    """A UserError that names them, before any folder is made."""
    with pytest.raises(UserError, match=word):
        call(*flags)
    assert os.listdir(tmp_path) == []


def test_pairs_of_another_tokenizer_are_refused(whole_run, data, tiny, tmp_path):
    """Sampled ids go to the loss as they are: under another chat template they would be another text."""
    _, folder, _ = whole_run
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("assistant", "robot")
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    command = [ROOT / "train.py", "--data", data, "--model", other, "--pairs", folder, "--out", "out"]
    done = process(*command, cwd=tmp_path)
    assert done.returncode == 2 and "other tokens" in done.stderr and not (tmp_path / "out").exists()
