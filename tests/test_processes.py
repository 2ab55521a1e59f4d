"""Two processes do what one does: gradients, weights and metrics in fp64, then whole programs under torchrun.

Run as a script under gloo this file is also the worker: it repeats EXPERIMENTS and saves what they gave. How
items are shared, gathered and broadcast: test_shares.py.
"""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import (CLOCK, assert_json_close, metrics_of, random_pairs, run_inside, run_processes,
                      start_workers, write_data)
from safetensors.torch import load_file, save_file
from torch import Tensor

import eval as evaluation
import train
from batches import all_logps, training_rows
from model import Decoder, load
from optimizer import MasterAdamW, all_reduce_gradients
from pairs import load_pairs
from run import Metrics, main, rank, read_json, read_jsonl, world
from train import Args

METHODS = dict(dpo=dict(), pairwise=dict(n_neg=3), softmax=dict(n_neg=3, softmax=True),
               sft=dict(method="sft"))
PASS_TOKENS = (8192, 60, 1)  # a batch is whole, cut, or cut into single pairs
COUNTS = (5, 7)  # in batches of 3: the last one has two pairs, or one and the second process has none
EXPERIMENTS = [(m, t, n) for m in METHODS for t in PASS_TOKENS for n in COUNTS]
BF16 = ("dpo", 60, 5)  # the one that is trained by MasterAdamW in bf16, too


# ------------------------------------------------------------------------- the experiments

class PlainSGD:
    """In MasterAdamW's place: linear in the gradients, so that an error in them is as large in the weights."""

    def __init__(self, model: Decoder):
        self.model = model

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        for p in self.model.parameters():
            p -= lr * p.grad

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def share_changed(self) -> float:
        return 0.0


def flat(tensors) -> Tensor:
    """All numbers of some tensors in one."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def experiment(folder: Path, scratch: Path, method: str, pass_tokens: int, count: int,
               scale: float = 1.0) -> dict:
    """A run of plain SGD at lr 0.1 in fp64: each step's gradients before clipping, weights, metrics.

    scale: what the second process's gradients are multiplied by before they are added up.
    """
    gradients, clip = [], torch.nn.utils.clip_grad_norm_

    def reduce_scaled(model: Decoder) -> None:
        for p in model.parameters():
            if p.grad is not None and rank():
                p.grad *= scale
        all_reduce_gradients(model)

    def clip_recorded(parameters, *rest) -> Tensor:
        parameters = list(parameters)
        gradients.append(flat(p.grad for p in parameters))
        return clip(parameters, *rest)

    args = Args(batch=3, lr=0.1, pass_tokens=pass_tokens, **METHODS[method])
    pairs = training_rows(random_pairs(count, rejected=args.n_neg), args)
    file = scratch / f"metrics-{method}-{pass_tokens}-{count}-{scale}-{world()}.jsonl"
    model = load(folder, torch.float64)
    reference = all_logps(model, pairs, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "all_reduce_gradients", reduce_scaled)
        patch.setattr(train, "clip_grad_norm_", clip_recorded)
        train.train(PlainSGD(model), pairs, reference, args, Metrics(file))
    weights = flat(model.parameters())
    if rank():
        return dict(weights=weights)
    return dict(weights=weights, gradients=gradients, metrics=[row for _, row in read_jsonl(file)])


def experiment_in_bf16(folder: Path, scratch: Path) -> dict:
    """A run of MasterAdamW in bf16: the working copy and the masters that this process ends with."""
    method, pass_tokens, count = BF16
    args = Args(batch=3, lr=1e-3, pass_tokens=pass_tokens, **METHODS[method])
    pairs = training_rows(random_pairs(count), args)
    model = load(folder, torch.bfloat16)
    optimizer = MasterAdamW(model, args.lr, args.seed)
    reference = all_logps(model, pairs, args)
    train.train(optimizer, pairs, reference, args, Metrics(scratch / f"bf16-{world()}.jsonl"))
    return dict(weights=flat(optimizer.weights), masters=flat(optimizer.masters))


def work() -> None:
    """The worker: arguments are the model's folder, and one for results."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    for i, key in enumerate(EXPERIMENTS):
        store(experiment(folder, out, *key), out / f"{rank()}-{i}")
    store(experiment(folder, out, "dpo", 8192, 5, scale=2.0), out / f"{rank()}-broken")
    store(experiment_in_bf16(folder, out), out / f"{rank()}-bf16")


def store(result: dict, stem: Path) -> None:
    """Tensors as safetensors; metrics, which process 0 alone has, as JSON."""
    tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    if "gradients" in result:
        tensors["gradients"] = torch.stack(result["gradients"])  # (steps, parameters)
        stem.with_suffix(".json").write_text(json.dumps(result["metrics"]))
    save_file(tensors, stem.with_suffix(".safetensors"))


def restore(stem: Path) -> dict:
    """What `store` wrote."""
    result, metrics = load_file(stem.with_suffix(".safetensors")), stem.with_suffix(".json")
    if metrics.exists():
        result |= dict(gradients=list(result["gradients"]), metrics=json.loads(metrics.read_text()))
    return result


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> list[dict]:
    """What two processes that run this file have saved, a dict each."""
    out = tmp_path_factory.mktemp("two")
    start_workers(2, __file__, tiny, out)
    results = []
    for r in range(2):
        result = {key: restore(out / f"{r}-{i}") for i, key in enumerate(EXPERIMENTS)}
        results.append(result | {name: restore(out / f"{r}-{name}") for name in ("broken", "bf16")})
    return results


# ------------------------------------------------------------------------- in fp64

def assert_same_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Every step's gradient within 1e-12 of the other's norm."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 1e-3 and ((a - b).norm() / b.norm()).item() < 1e-12


def without_clock(row: dict) -> dict:
    """A line of metrics.jsonl without what the clock decides."""
    return {key: value for key, value in row.items() if key not in CLOCK}


@pytest.mark.parametrize(("method", "pass_tokens", "count"), EXPERIMENTS)
def test_two_processes_are_one(method, pass_tokens, count, two, tiny, tmp_path):
    """Gradients of every step, weights after it, loss, margin and norm; an idle process keeps up."""
    expected = experiment(tiny, tmp_path, method, pass_tokens, count)
    first, second = (result[method, pass_tokens, count] for result in two)
    total = count * (3 if method == "pairwise" else 1)
    sizes = [3] * (total // 3) + [total % 3] * bool(total % 3)
    assert [row["pairs"] for row in expected["metrics"]] == sizes
    assert_same_gradients(first["gradients"], expected["gradients"])
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert torch.equal(first["weights"], second["weights"])
    for a, b in zip(first["metrics"], expected["metrics"], strict=True):
        assert a.keys() == b.keys() >= {"loss", "grad_norm"}
        assert without_clock(a) == pytest.approx(without_clock(b), rel=1e-6, abs=1e-9)


def test_micro_batches_do_not_matter(tiny, tmp_path):
    """One process: whole, cut, and single pairs give the same gradients; every method moves the weights."""
    before = flat(load(tiny, torch.float64).parameters())
    for method in METHODS:
        whole, *others = (experiment(tiny, tmp_path, method, tokens, 7) for tokens in PASS_TOKENS)
        for other in others:
            assert_same_gradients(other["gradients"], whole["gradients"])
        assert (whole["weights"] - before).abs().max() > 1e-3


def test_the_comparison_can_fail(two, tiny, tmp_path):
    """With the second process's gradients doubled it does, though both processes still agree."""
    expected = experiment(tiny, tmp_path, "dpo", 8192, 5)
    with pytest.raises(AssertionError):
        assert_same_gradients(two[0]["broken"]["gradients"], expected["gradients"])
    assert (two[0]["broken"]["weights"] - expected["weights"]).abs().max() > 1e-6
    assert torch.equal(two[0]["broken"]["weights"], two[1]["broken"]["weights"])


# ------------------------------------------------------------------------- in bf16

def test_two_processes_hold_one_bf16_copy(two, tiny, tmp_path):
    """Masters and what is rounded from them are equal to the last bit in both, near those of one process."""
    first, second = (result["bf16"] for result in two)
    for name in ("weights", "masters"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["weights"], first["masters"])
    alone = experiment_in_bf16(tiny, tmp_path)
    assert (first["masters"] - alone["masters"]).abs().median() < 1e-5


# ------------------------------------------------------------------------- programs

FLAGS = ["--max-new-tokens", "6", "--batch", "3", "--lr", "1e-4", "--dtype", "float32", "--eval-every", "2"]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> tuple[Path, Path, str]:
    """The same training by one process and by two; what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(tmp_path_factory.mktemp("data") / "own.jsonl", contexts=14, rows_per_prompt=2, train=7,
                      validation=3, test=4)
    flags = ["--data", data, "--model", tiny, *FLAGS]
    run_inside(train.program, folder, *flags, "--out", folder / "one")
    done = run_processes(2, "train.py", *flags, "--out", "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two", done.stdout


def test_two_processes_train_the_model_of_one(runs):
    """The same pairs, a line of metrics a step, nearly the same weights, the same files and no others."""
    one, two, out = runs
    pairs = load_pairs(one)
    assert len(pairs) > 3
    for a, b in zip(pairs, load_pairs(two), strict=True):
        assert [response.ids for response in a.responses] == [response.ids for response in b.responses]
    lines = metrics_of(two)
    assert lines == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in metrics_of(one)]
    steps = math.ceil(len(pairs) / 3)
    assert [row["step"] for row in lines if "loss" in row] == [*range(1, steps + 1)]
    files = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in (one, two)]
    assert files[0] == files[1] and sorted(os.listdir(two.parent)) == ["one", "two"]
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    apart = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])  # AdamW: noise has a sign too
    assert apart.median() < 1e-8 and (apart > 1e-6).float().mean() < 1e-3
    assert read_json(two / "args.json")["processes"] == 2 and read_json(one / "args.json")["processes"] == 1
    a, b = (read_json(folder / "summary.json") for folder in (one, two))
    assert a.keys() == b.keys()
    assert_json_close(a["chosen"], b["chosen"])
    assert out.count("evaluate it with") == 1  # one process speaks


def test_a_wrong_flag_under_two_processes(tmp_path):
    """Not zero, the error line that names the flag, no traceback of ours, no folder."""
    done = run_processes(2, "train.py", "--bath", "3", "--out", "o", cwd=tmp_path)
    assert done.returncode != 0 and os.listdir(tmp_path) == []
    assert "train.py: error: unknown argument --bath (did you mean --batch?)" in done.stderr
    assert "UserError" not in done.stderr


def test_two_processes_evaluate_as_one(runs, tmp_path):
    """The same responses in the same order, the same numbers."""
    flags = ["--model", runs[0], "--max-new-tokens", "5", "--dtype", "float32", "--out"]
    run_inside(evaluation.program, tmp_path, *flags, tmp_path / "one")
    done = run_processes(2, "eval.py", *flags, tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "two")) == ["eval.json", "responses.jsonl"]
    one, two = (read_json(tmp_path / name / "eval.json") for name in ("one", "two"))
    for key in ("parts", "contexts", "settings"):
        assert_json_close(two[key], one[key], abs=1e-4)
    one, two = ([row for _, row in read_jsonl(tmp_path / name / "responses.jsonl")] for name in ("one", "two"))
    assert len(one) == 12
    assert_json_close(two, one, abs=1e-4)


if __name__ == "__main__":
    main(work)
