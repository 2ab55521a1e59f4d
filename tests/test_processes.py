"""Two processes train as one does: gradients, weights and metrics in fp64; MasterAdamW in bf16.

Run as a script under gloo this file is also the worker: it repeats EXPERIMENTS and saves what they gave.
Whole programs in two processes: test_torchrun.py.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLOCK, random_pairs, start_workers
from safetensors.torch import load_file, save_file
from torch import Tensor

import train
from batches import all_logps, training_rows
from folder import load
from model import Decoder
from optimizer import MasterAdamW, all_reduce_gradients, gradient_norm
from run import main, rank, read_jsonl, world
from train import Args
from training_log import Metrics

METHODS = dict(dpo=dict(), pairwise=dict(n_neg=3), softmax=dict(n_neg=3, softmax=True),
               sft=dict(method="sft"))
PASS_TOKENS = (8192, 60, 1)  # a batch is whole, cut, or cut into single pairs
COUNTS = (5, 7)  # in batches of 3: the last one has two pairs, or one and the second process has none
EXPERIMENTS = [(m, t, n) for m in METHODS for t in PASS_TOKENS for n in COUNTS]
BF16 = ("dpo", 60, 5)  # the one that is trained by MasterAdamW in bf16, too


# ------------------------------------------------------------------------- the experiments

class PlainSGD:
    """In MasterAdamW's place: linear in the gradients, so that their errors are as large in the weights."""

    def __init__(self, model: Decoder):
        self.model = model
        self.weights = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def step(self, number: int, lr: float, norm: Tensor) -> None:
        if norm.isfinite():
            for p in self.weights:
                p -= lr * p.grad / norm.clamp(min=1)

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def share_changed(self) -> Tensor:
        return torch.zeros(())


def flat(tensors) -> Tensor:
    """All numbers of some tensors in one."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def experiment(folder: Path, scratch: Path, method: str, pass_tokens: int, count: int,
               scale: float = 1.0) -> dict:
    """A run of plain SGD at lr 0.1 in fp64: each step's gradients before clipping, weights, metrics.

    scale: what the second process's gradients are multiplied by before they are added up.
    """
    gradients = []

    def reduce_scaled(model: Decoder) -> None:
        for p in model.parameters():
            if p.grad is not None and rank():
                p.grad *= scale
        all_reduce_gradients(model)

    def recorded_norm(weights) -> Tensor:
        gradients.append(flat(p.grad for p in weights))
        return gradient_norm(weights)

    args = Args(batch=3, lr=0.1, pass_tokens=pass_tokens, **METHODS[method])
    pairs = training_rows(random_pairs(count, rejected=args.n_neg), args)
    file = scratch / f"metrics-{method}-{pass_tokens}-{count}-{scale}-{world()}.jsonl"
    model = load(folder, torch.float64)
    reference = all_logps(model, pairs, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "all_reduce_gradients", reduce_scaled)
        patch.setattr(train, "gradient_norm", recorded_norm)
        train.train(PlainSGD(model), pairs, reference, args, Metrics(file), train.State())
    result = dict(weights=flat(model.parameters()), reference=reference)
    if rank():
        return result
    return result | dict(gradients=gradients, metrics=[row for _, row in read_jsonl(file)])


def experiment_in_bf16(folder: Path, scratch: Path) -> dict:
    """A run of MasterAdamW in bf16: the working copy and the masters that this process ends with."""
    method, pass_tokens, count = BF16
    args = Args(batch=3, lr=1e-3, pass_tokens=pass_tokens, **METHODS[method])
    pairs = training_rows(random_pairs(count), args)
    model = load(folder, torch.bfloat16)
    optimizer = MasterAdamW(model, args.lr, args.seed)
    reference = all_logps(model, pairs, args)
    train.train(optimizer, pairs, reference, args, Metrics(scratch / f"bf16-{world()}.jsonl"),
                train.State())
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
    """Gradients of every step, weights after it, loss, margin and norm; an idle process keeps up. Both know
    the reference of all pairs, which later epochs divide among them in other ways."""
    expected = experiment(tiny, tmp_path, method, pass_tokens, count)
    first, second = (result[method, pass_tokens, count] for result in two)
    total = count * (3 if method == "pairwise" else 1)
    sizes = [3] * (total // 3) + [total % 3] * bool(total % 3)
    assert [row["pairs"] for row in expected["metrics"]] == sizes
    assert_same_gradients(first["gradients"], expected["gradients"])
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["reference"], expected["reference"], rtol=0, atol=1e-10)
    assert torch.equal(first["reference"], second["reference"])
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


if __name__ == "__main__":
    main(work)
