"""Two processes do what one does: gradients, weights and metrics in fp64, then whole programs under torchrun.

Run as a script under gloo this file is also the worker: it repeats EXPERIMENTS and saves what they gave.
"""

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eval as evaluation
import train
from model import load
from pairs import Pair, load_pairs
from run import Metrics, gather, main, rank, read_json, read_jsonl, shard, world
from train import Args, all_logps, training_rows

ROOT = Path(__file__).parents[1]

METHODS = dict(dpo=dict(), pairwise=dict(n_neg=3), softmax=dict(n_neg=3, softmax=True),
               sft=dict(method="sft"))
PASSES = (8192, 60, 1)  # most tokens in one pass: a step is whole, cut, or cut into single pairs
COUNTS = (5, 7)  # in batches of 3: the last one has two pairs, or one and the second process has none
EXPERIMENTS = [(m, t, n) for m in METHODS for t in PASSES for n in COUNTS]


def make_pairs(count: int, rejected: int) -> list[Pair]:
    """Random ids of unequal lengths."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(2, 320) for _ in range(draw.randint(low, high))]

    return [Pair(f"row{i}", "x", "c", "good", ["bad"] * rejected, ids(3, 12), ids(1, 8),
                 [ids(1, 8) for _ in range(rejected)], [ids(3, 12)] * rejected, [True] * (1 + rejected))
            for i in range(count)]


def experiment(folder: Path, scratch: Path, method: str, pass_tokens: int, count: int,
               scale: float = 1.0) -> dict:
    """A run of plain SGD at lr 0.1 in fp64: each step's gradients before clipping, weights, metrics.

    scale: what the second process's gradients are multiplied by before they are added up.
    """
    gradients, sum_gradients, clip = [], train.sum_gradients, torch.nn.utils.clip_grad_norm_

    def scaled(model) -> None:
        for p in model.parameters():
            if p.grad is not None and rank():
                p.grad *= scale
        sum_gradients(model)

    def recorded(parameters, *rest):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, *rest)

    class Plain(torch.optim.SGD):
        def __init__(self, parameters, lr, *_, **__):
            super().__init__(parameters, lr)

    args = Args(batch=3, lr=0.1, pass_tokens=pass_tokens, **METHODS[method])
    pairs = training_rows(make_pairs(count, rejected=args.n_neg or 1), args)
    file = scratch / f"metrics-{method}-{pass_tokens}-{count}-{scale}-{world()}.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sum_gradients", scaled)
        patch.setattr(train, "matmul_ceiling", lambda *_: 1e12)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
        patch.setattr(torch.optim, "AdamW", Plain)
        model = load(folder, torch.float64)
        zeros = torch.zeros(len(pairs), 1)
        reference = zeros if method == "sft" else all_logps(load(folder, torch.float64), pairs, args)
        train.train(model, pairs, reference, args, Metrics(file))
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    if rank():
        return dict(weights=weights)
    return dict(weights=weights, gradients=gradients, metrics=[row for _, row in read_jsonl(file)])


def shares() -> list[tuple[list, list]]:
    """This process's share of lists of 0 to 7 items, and what all shares together give."""
    lists = [[dict(item=i) for i in range(n)] for n in range(8)]
    return [(shard(items), gather(shard(items))) for items in lists]


def work() -> None:
    """The worker: arguments are the model's folder, one for results, and whether to train as well."""
    folder, out, trains = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "train"
    (out / f"{rank()}-shares.json").write_text(json.dumps(shares()))
    if trains:
        for i, key in enumerate(EXPERIMENTS):
            store(experiment(folder, out, *key), out / f"{rank()}-{i}")
        store(experiment(folder, out, "dpo", 8192, 5, scale=2.0), out / f"{rank()}-broken")


def store(found: dict, stem: Path) -> None:
    """Weights and gradients as safetensors; metrics, which process 0 alone has, as JSON."""
    tensors = dict(weights=found["weights"])
    if "gradients" in found:
        tensors["gradients"] = torch.stack(found["gradients"])  # (steps, parameters)
        stem.with_suffix(".json").write_text(json.dumps(found["metrics"]))
    save_file(tensors, stem.with_suffix(".safetensors"))


def restore(stem: Path) -> dict:
    """What `store` wrote."""
    found, metrics = load_file(stem.with_suffix(".safetensors")), stem.with_suffix(".json")
    if not metrics.exists():
        return found
    return found | dict(gradients=list(found["gradients"]), metrics=json.loads(metrics.read_text()))


# ------------------------------------------------------------------------------------------- in fp64

def start(count: int, folder: Path, out: Path, kind: str) -> list[dict]:
    """Run this file in `count` processes; what each of them saved."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    shared = dict(WORLD_SIZE=count, MASTER_ADDR="localhost", MASTER_PORT=port, OMP_NUM_THREADS=1,
                  PYTHONPATH=ROOT)
    each = [subprocess.Popen([sys.executable, __file__, folder, out, kind], stderr=subprocess.PIPE, text=True,
                             env={**os.environ, **{k: str(v) for k, v in shared.items()}, "RANK": str(r)})
            for r in range(count)]
    errors = [p.communicate()[1] for p in each]
    assert not any(p.returncode for p in each), "\n".join(errors)
    results = [dict(shares=json.loads((out / f"{r}-shares.json").read_text())) for r in range(count)]
    if kind == "train":
        for r, result in enumerate(results):
            result |= {key: restore(out / f"{r}-{i}") for i, key in enumerate(EXPERIMENTS)}
            result["broken"] = restore(out / f"{r}-broken")
    return results


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> list[dict]:
    """The results of two processes."""
    return start(2, tiny, tmp_path_factory.mktemp("two"), "train")


@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory) -> list[dict]:
    """Shares of three processes."""
    return start(3, tiny, tmp_path_factory.mktemp("three"), "gather")


def assert_same_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    """Every step's gradient within 1e-12 of the other's norm."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-3 and ((a - b).norm() / b.norm()).item() < 1e-12


@pytest.mark.parametrize(("method", "pass_tokens", "count"), EXPERIMENTS)
def test_two_processes_are_one(method, pass_tokens, count, two, tiny, tmp_path):
    """Gradients of every step, weights after it, loss, margin and norm; an idle process keeps up."""
    expected = experiment(tiny, tmp_path, method, pass_tokens, count)
    first, second = (result[method, pass_tokens, count] for result in two)
    total = count * (3 if method == "pairwise" else 1)
    assert [row["pairs"] for row in expected["metrics"]] == [3] * (total // 3) + [total % 3] * bool(total % 3)
    assert_same_gradients(first["gradients"], expected["gradients"])
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert torch.equal(first["weights"], second["weights"])
    clock = ("tokens_per_second", "matmul_share")
    for a, b in zip(first["metrics"], expected["metrics"], strict=True):
        assert a.keys() == b.keys() >= {"loss", "grad_norm"}
        assert {k: v for k, v in a.items() if k not in clock} == pytest.approx(
            {k: v for k, v in b.items() if k not in clock}, rel=1e-6, abs=1e-9)


def test_the_passes_do_not_matter(tiny, tmp_path):
    """One process: whole, cut, and single pairs give the same gradients; every method moves the weights."""
    start_weights = torch.cat([p.detach().flatten() for p in load(tiny, torch.float64).parameters()])
    for method in METHODS:
        whole, *others = (experiment(tiny, tmp_path, method, tokens, 7) for tokens in PASSES)
        for other in others:
            assert_same_gradients(other["gradients"], whole["gradients"])
        assert (whole["weights"] - start_weights).abs().max() > 1e-3


def test_the_comparison_can_fail(two, tiny, tmp_path):
    """With the second process's gradients doubled it does, though both processes still agree."""
    expected = experiment(tiny, tmp_path, "dpo", 8192, 5)
    with pytest.raises(AssertionError):
        assert_same_gradients(two[0]["broken"]["gradients"], expected["gradients"])
    assert (two[0]["broken"]["weights"] - expected["weights"]).abs().max() > 1e-6
    assert torch.equal(two[0]["broken"]["weights"], two[1]["broken"]["weights"])


@pytest.mark.parametrize("name", ["two", "three"])
def test_gather_is_the_inverse_of_mine(name, request):
    """Lists of 0 to 7: shares are alike in size and a partition; together, in order, on every process."""
    results = request.getfixturevalue(name)
    for n in range(8):
        items = [dict(item=i) for i in range(n)]
        parts = [result["shares"][n][0] for result in results]
        assert sorted(d["item"] for part in parts for d in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(result["shares"][n][1] == items for result in results)


def test_one_process_has_it_all():
    """Without a process group `mine` and `gather` leave a list as it is."""
    assert all(part == whole == [dict(item=i) for i in range(n)] for n, (part, whole) in enumerate(shares()))


# ------------------------------------------------------------------------------------------- programs

FLAGS = ["--max-new-tokens", "6", "--batch", "3", "--lr", "1e-4", "--dtype", "float32",
         "--save-dtype", "float32", "--eval-every", "2"]


def torchrun(*argv, cwd: Path) -> subprocess.CompletedProcess:
    """A program of the project in two processes on one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *argv]
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven rows to train, three to validate, four of two prompts to test."""
    parts = ["train"] * 7 + ["validation"] * 3 + ["test"] * 4
    lines = [{"id": f"r{i}", "prompt": f"{split} question {i // 2}?", "context": f"I am number {i}.",
              "split": split} for i, split in enumerate(parts)]
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def runs(data, tiny, tmp_path_factory) -> tuple[Path, Path, str]:
    """The same training by one process and by two; what the two printed."""
    folder, named = tmp_path_factory.mktemp("runs"), ["--data", data, "--model", tiny, *FLAGS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, named), "--out", str(folder / "one")])
        patch.setattr(train, "matmul_ceiling", lambda *_: 1e12)
        train.program()
    done = torchrun(ROOT / "train.py", *named, "--out", "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two", done.stdout


def test_two_processes_train_the_model_of_one(runs):
    """The same pairs, a line of metrics a step, nearly the same weights, the same files and no others."""
    one, two, out = runs
    pairs = load_pairs(one)
    assert len(pairs) > 3 and [p.chosen_ids for p in load_pairs(two)] == [p.chosen_ids for p in pairs]
    assert [p.rejected_ids for p in load_pairs(two)] == [p.rejected_ids for p in pairs]
    lines = [[{k: v for k, v in row.items() if k not in ("tokens_per_second", "matmul_share")}
              for _, row in read_jsonl(folder / "metrics.jsonl")] for folder in (one, two)]
    assert lines[1] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in lines[0]]
    assert [row["step"] for row in lines[1] if "loss" in row] == [*range(1, math.ceil(len(pairs) / 3) + 1)]
    files = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (one, two)]
    assert files[0] == files[1] and sorted(os.listdir(two.parent)) == ["one", "two"]
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    apart = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])  # AdamW: noise has a sign too
    assert a.keys() == b.keys() and apart.median() < 1e-8 and (apart > 1e-6).float().mean() < 1e-3
    assert read_json(two / "args.json")["processes"] == 2 and read_json(one / "args.json")["processes"] == 1
    a, b = (read_json(folder / "summary.json") for folder in (one, two))
    assert a.keys() == b.keys() and a["chosen"] == pytest.approx(b["chosen"])
    assert out.count("evaluate it with") == 1  # one process speaks


def test_a_wrong_flag_under_two_processes(tmp_path):
    """Not zero, the error line that names the flag, no traceback of ours, no folder."""
    done = torchrun(ROOT / "train.py", "--bath", "3", "--out", "o", cwd=tmp_path)
    assert done.returncode != 0 and os.listdir(tmp_path) == []
    assert "train.py: error: unknown argument --bath (did you mean --batch?)" in done.stderr
    assert "UserError" not in done.stderr


def close(a, b) -> None:
    """Equal JSON values; numbers within fp32 rounding."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            close(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-4) if isinstance(b, float) else b)


def test_two_processes_evaluate_as_one(runs, tmp_path, monkeypatch):
    """The same responses in the same order, the same numbers."""
    named = ["--model", str(runs[0]), "--max-new-tokens", "5", "--dtype", "float32", "--out"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *named, str(tmp_path / "one")])
    evaluation.program()
    done = torchrun(ROOT / "eval.py", *named, tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "two")) == ["eval.json", "responses.jsonl"]
    one, two = (read_json(tmp_path / name / "eval.json") for name in ("one", "two"))
    for key in ("parts", "contexts", "settings"):
        close(two[key], one[key])
    one, two = ([row for _, row in read_jsonl(tmp_path / name / "responses.jsonl")]
                for name in ("one", "two"))
    assert len(one) == 12
    close(two, one)


if __name__ == "__main__":
    main(work)
