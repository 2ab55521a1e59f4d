"""shard.py: a model divided among processes trains as a whole one does, in fp64, fp32 and bf16.

Run as a script under gloo this file is also the worker: it repeats CASES and whole runs, and saves what they
gave. What gloo refuses it refuses in fp32 alone, so every case is run in both types.
"""

import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import (assert_json_close, metrics_of, model_weights, random_pairs, run_inside, same_weights,
                      start_workers, write_data)
from safetensors.torch import load_file, save_file
from test_ppo import arguments, row, run_ppo_in_place
from test_processes import PlainSGD, flat, without_clock
from torch import Tensor

import memory
import ppo
import train
from batches import all_logps, training_rows
from checkpoint import StopSignal
from folder import load, read_config
from losses import OBJECTIVES
from model import Decoder
from optimizer import MasterAdamW, gradient_norm
from run import Stopped, UserError, main, rank, read_json, read_jsonl, share_of, world
from shard import copy_own, gathered, is_sharded, local, refresh, shard_weights, shards, span, whole
from training_log import Metrics

# Of seven pairs in batches of three the second process has one, one, and none. At 44 tokens a pass some sets
# of three take two passes and some take three.
CASES = dict(
    dpo=dict(),
    dpo_cut=dict(pass_tokens=1),
    softmax=dict(n_neg=3, softmax=True, pass_tokens=60),
    sft=dict(method="sft"),
    infonce=dict(method="infonce", n_neg=2, temperature_loss=10.0),
    infonce_in_two_passes=dict(method="infonce", n_neg=2, temperature_loss=10.0, pass_tokens=44),
    sami_in_two_passes=dict(method="sami", n_neg=2, temperature_loss=1.0, pass_tokens=44),
    checkpointed=dict(checkpoint_activations=True, pass_tokens=60),
    infonce_checkpointed=dict(method="infonce", n_neg=2, temperature_loss=10.0, pass_tokens=44,
                              checkpoint_activations=True),
    lora=dict(lora_rank=4, pass_tokens=60),
    lora_checkpointed=dict(lora_rank=4, pass_tokens=60, checkpoint_activations=True),
    ppo=dict(method="ppo-mi", pass_tokens=60),
    ppo_lora=dict(method="rlvr", lora_rank=4, pass_tokens=60),
)
TYPES = ("float64", "float32")
TOLERANCE = dict(float64=1e-9, float32=1e-4)  # of differences, beside the norm of what is expected
IN_THREE = ("dpo_cut", "infonce_in_two_passes", "lora")  # 64 rows can't be divided evenly
# Other cases of two processes with whole weights: test_processes.py, test_ppo.py.
UNSHARDED = ("infonce_in_two_passes", "sami_in_two_passes", "checkpointed", "lora_checkpointed", "ppo_lora")
RUNS = dict(
    float32=[],
    lora=["--lora-rank", "4"],
    bfloat16=["--dtype", "bfloat16", "--n-neg", "2"],
    lora_bfloat16=["--dtype", "bfloat16", "--lora-rank", "4"],
)


# ------------------------------------------------------------------------- the experiments

def experiment(folder: Path, scratch: Path, case: str, dtype: str, sharded: bool, scale: float = 1.0) -> dict:
    """A run of plain SGD at lr 0.1: the gradients of every step before clipping, the weights after the last
    one, and metrics. scale: what the second process's losses are multiplied by."""
    name = f"{case}-{dtype}-{sharded}-{scale}-{world()}"
    gradients = []

    def recorded_norm(weights) -> Tensor:
        gradients.append(flat(whole(p.grad) for p in weights))
        return gradient_norm(weights)

    def scaled(objective):
        def loss(*given):
            losses, values = objective.loss(*given)
            return losses * (scale if rank() else 1.0), values

        return dataclasses.replace(objective, loss=loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gradient_norm", recorded_norm)
        patch.setattr(ppo, "gradient_norm", recorded_norm)
        patch.setattr(train, "OBJECTIVES", {key: scaled(value) for key, value in OBJECTIVES.items()})
        run = run_ppo if case.startswith("ppo") else run_pairs
        models = run(folder, scratch / f"{name}.jsonl", dict(CASES[case], dtype=dtype, shard=sharded))
    assert all(is_sharded(model) == sharded for model in models)
    weights = flat(whole(p) for model in models for _, p in shards(model))
    rows = [] if rank() else [line for _, line in read_jsonl(scratch / f"{name}.jsonl")]
    return dict(weights=weights, gradients=gradients, metrics=rows)


def run_pairs(folder: Path, file: Path, changes: dict) -> list[Decoder]:
    """train.train on seven pairs in batches of three: the model, trained."""
    args = train.Args(**dict(batch=3, lr=0.1, pass_tokens=8192) | changes)
    pairs = training_rows(random_pairs(7, rejected=args.n_neg), args)
    model = train.load_trainable(folder, args)
    train.train(PlainSGD(model), pairs, all_logps(model, pairs, args), args, Metrics(file), train.State())
    return [model]


def run_ppo(folder: Path, file: Path, changes: dict) -> list[Decoder]:
    """ppo.ppo on seven prompts, three a batch, two an update: actor and critic, trained."""
    sizes = dict(rollout_batch=3, train_batch=2, max_new_tokens=6)
    args = arguments(**dict(lr=0.1, critic_lr=0.1) | sizes | changes)
    actor = train.load_trainable(folder, args)
    critic = ppo.load_critic(folder, args, train.load_trainable)
    run_ppo_in_place(PlainSGD(actor), PlainSGD(critic), folder, file, args, [row(i) for i in range(7)])
    return [actor, critic]


def bf16_is_rounded_alike(folder: Path) -> dict[str, bool]:
    """Two steps of AdamW on equal gradients, sharded and whole: which of their results are equal to the last
    bit on every process. Then one of whose gradients one number is none: whether every process skips it."""
    sharded, plain = (MasterAdamW(make(load(folder, torch.bfloat16)), 1e-4, seed=0)
                      for make in (shard_weights, lambda model: model))
    copied = gathered(sharded.model)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(sharded.weights, plain.weights, strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = torch.zeros_like(p, dtype=torch.float32)
            copy_own(p.grad, q.grad)
        for optimizer in (sharded, plain):
            optimizer.step(step, 1e-4, gradient_norm(optimizer.weights))
    stale = same_weights(dict(copied.named_parameters()), dict(plain.model.named_parameters()))
    refresh(copied, sharded.model)
    fresh = gathered(sharded.model).state_dict()
    saved, expected = sharded.weights_to_save(torch.float32), plain.weights_to_save(torch.float32)
    results = dict(
        masters=all(torch.equal(whole(p), q) for p, q in zip(sharded.masters, plain.masters, strict=True)),
        copies=same_weights(fresh, plain.model.state_dict()),
        refreshed=same_weights(copied.state_dict(), fresh) and not stale,
        shares=bool(sharded.share_changed() == plain.share_changed() > 0),
        saved=same_weights(saved, {} if rank() else expected),
        spans=all(torch.equal(local(p).flatten(), q.flatten()[span(p)])
                  for p, q in zip(sharded.weights, plain.weights, strict=True)),
    )
    masters = [whole(master) for master in sharded.masters]
    for p in sharded.weights:
        p.grad = torch.ones_like(p, dtype=torch.float32)
    if rank() == 1:  # one number of its rows
        local(sharded.weights[0].grad).view(-1)[0] = torch.nan
    norm = gradient_norm(sharded.weights)
    sharded.step(2, 1e-2, norm)
    stay = all(torch.equal(a, whole(b)) for a, b in zip(masters, sharded.masters, strict=True))
    return results | dict(skipped=stay and not norm.isfinite())


def bf16_training(folder: Path, scratch: Path, sharded: bool) -> dict[str, Tensor]:
    """Three steps of MasterAdamW in bf16, from passes of one pair: masters, weights, the last gradients."""
    args = train.Args(batch=3, lr=1e-3, pass_tokens=1, dtype="bfloat16", shard=sharded)
    pairs, gradients = training_rows(random_pairs(7), args), []

    def recorded_norm(weights) -> Tensor:
        gradients[:] = [whole(p.grad) for p in weights]
        return gradient_norm(weights)

    optimizer = MasterAdamW(train.load_trainable(folder, args), args.lr, args.seed)
    reference = all_logps(optimizer.model, pairs, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gradient_norm", recorded_norm)
        metrics = Metrics(scratch / f"bf16-{world()}.jsonl")
        train.train(optimizer, pairs, reference, args, metrics, train.State())
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    parts = dict(weights=optimizer.weights, masters=optimizer.masters, gradients=gradients)
    return {name: flat(map(whole, tensors)) for name, tensors in parts.items()}


# ------------------------------------------------------------------------- whole runs

def own_data(folder: Path) -> Path:
    """Rows enough for four steps of three pairs, the last of one."""
    return write_data(folder / "own.jsonl", contexts=14, rows_per_prompt=2, train=10, validation=3, test=4)


def whole_run(data: Path, tiny: Path, folder: Path, out: str, *flags: str) -> Path:
    """A run of train.py in fp32, unless flags say otherwise, validated every second step."""
    base = ["--data", data, "--model", tiny, "--max-new-tokens", "6", "--batch", "3", "--lr", "1e-4"]
    run_inside(train.program, folder, *base, "--eval-every", "2", "--out", out, *flags)
    return folder / out


def interrupted_run(*given: str | Path) -> None:
    """The same, stopped by a signal after its second step, and resumed."""
    def signal_in_the_second_step(self) -> int:
        calls.append(self)
        return 15 if len(calls) == 2 else 0

    calls: list[StopSignal] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "came", signal_in_the_second_step)
        with pytest.raises(Stopped):
            whole_run(*given)
    whole_run(*given, "--resume")


# ------------------------------------------------------------------------- the worker

def work() -> None:
    """The worker: arguments are the model's folder, and one for results."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    for case in CASES if world() == 2 else IN_THREE:
        store(experiment(folder, out, case, "float64", True), out / f"{rank()}-{case}-float64")
        if world() == 2:
            store(experiment(folder, out, case, "float32", True), out / f"{rank()}-{case}-float32")
    (out / f"{rank()}-alike.json").write_text(json.dumps(bf16_is_rounded_alike(folder)))
    if world() == 3:
        return
    for case in UNSHARDED:
        store(experiment(folder, out, case, "float64", False), out / f"{rank()}-{case}-unsharded")
    store(experiment(folder, out, "dpo", "float64", True, scale=2.0), out / f"{rank()}-broken")
    store(dict(bf16_training(folder, out, True)), out / f"{rank()}-bf16")
    for name, flags in RUNS.items():
        given = out / "own.jsonl", folder, out
        dtype = [] if "--dtype" in flags else ["--dtype", "float32"]
        whole_run(*given, name, "--shard", *dtype, *flags)
        interrupted_run(*given, f"{name}-resumed", "--shard", *dtype, *flags)


def store(result: dict, stem: Path) -> None:
    """Tensors as safetensors, and metrics, which process 0 alone has, as JSON."""
    tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    gradients = result.get("gradients", [])
    if isinstance(gradients, list):
        tensors |= {f"gradient-{i:03d}": gradient for i, gradient in enumerate(gradients)}
    save_file(tensors, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(result.get("metrics", [])))


def restore(stem: Path) -> dict:
    """What `store` wrote."""
    tensors = load_file(f"{stem}.safetensors")
    gradients = [tensors.pop(name) for name in sorted(tensors) if name.startswith("gradient-")]
    rows = json.loads(Path(f"{stem}.json").read_text())
    return dict(metrics=rows) | (dict(gradients=gradients) if gradients else {}) | tensors


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> Path:
    """The folder of what two processes that run this file have saved."""
    out = tmp_path_factory.mktemp("two")
    own_data(out)
    start_workers(2, __file__, tiny, out)
    return out


@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory) -> Path:
    """The same of three."""
    out = tmp_path_factory.mktemp("three")
    start_workers(3, __file__, tiny, out)
    return out


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """(case, dtype) -> what one process gives, with whole weights; each is computed once."""
    scratch, results = tmp_path_factory.mktemp("one"), {}

    def get(case: str, dtype: str = "float64") -> dict:
        key = case, dtype
        if key not in results:
            results[key] = experiment(tiny, scratch, case, dtype, sharded=False)
        return results[key]

    return get


# ------------------------------------------------------------------------- the same training

def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    """Gradients of every step and the weights after the last, beside their norms; loss, margin, norm."""
    assert len(ours["gradients"]) == len(theirs["gradients"])
    for a, b in zip([*ours["gradients"], ours["weights"]], [*theirs["gradients"], theirs["weights"]],
                    strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1e-3)  # one response alone may earn nothing
    for a, b in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert a.keys() == b.keys() >= {"loss", "grad_norm"}
        assert without_clock(a) == pytest.approx(without_clock(b), rel=max(1e-6, tolerance), abs=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_the_weights_are_one(case, dtype, two, one):
    """Losses, gradients, and weights after steps of SGD, with uneven shares, of which the last is empty."""
    assert_same(restore(two / f"0-{case}-{dtype}"), one(case, dtype), TOLERANCE[dtype])
    first, second = (restore(two / f"{r}-{case}-{dtype}")["weights"] for r in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", UNSHARDED)
def test_two_processes_with_whole_weights_are_one(case, two, one):
    """The same without --shard."""
    assert_same(restore(two / f"0-{case}-unsharded"), one(case), TOLERANCE["float64"])


@pytest.mark.parametrize("case", IN_THREE)
def test_three_processes_with_uneven_rows_are_one(case, three, one):
    """64 rows are 22, 22 and 20, and the first pass has a process without pairs."""
    assert_same(restore(three / f"0-{case}-float64"), one(case), TOLERANCE["float64"])


def test_cases_move_the_weights(tiny, one):
    """The comparisons are of something: every case leaves the start model, and they leave it differently."""
    start = flat(load(tiny, torch.float64).parameters())
    moved = [one(case)["weights"] for case in ("dpo", "sft", "infonce", "sami_in_two_passes")]
    assert all((weights - start).abs().max() > 1e-3 for weights in moved)
    assert all((weights - moved[0]).abs().max() > 1e-3 for weights in moved[1:])


def test_the_comparison_can_fail(two, one):
    """With the second process's losses, and so its gradients, doubled it does."""
    with pytest.raises(AssertionError):
        assert_same(restore(two / "0-broken"), one("dpo"), TOLERANCE["float32"])


# ------------------------------------------------------------------------- bf16

@pytest.mark.parametrize("folder", ["two", "three"])
def test_shards_are_rounded_as_the_whole_is(folder, request):
    """Masters, working copies, gathered and saved weights are equal to the last bit, and so is the share that
    has changed."""
    results = [read_json(file) for file in sorted(request.getfixturevalue(folder).glob("*-alike.json"))]
    assert len(results) == dict(two=2, three=3)[folder]
    assert all(result and all(result.values()) for result in results), results


def test_bf16_training_is_that_of_one_process(two, tiny, tmp_path):
    """Up to bf16's own noise: gradients add up in fp32, both processes hold the same masters."""
    first, second = (restore(two / f"{r}-bf16") for r in range(2))
    alone = bf16_training(tiny, tmp_path, sharded=False)
    for name in ("weights", "masters"):
        assert torch.equal(first[name], second[name])
    assert (first["masters"] - alone["masters"]).abs().median() < 1e-5
    a, b = first["gradients"], alone["gradients"]
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98
    assert not torch.equal(first["weights"], first["masters"])


# ------------------------------------------------------------------------- runs

@pytest.mark.parametrize("name", ["float32", "lora"])
def test_a_sharded_run_saves_the_model_of_one_process(name, two, tiny, tmp_path):
    """The same files and pairs, validations and lines of metrics; weights, and adapters, to rounding."""
    alone = whole_run(two / "own.jsonl", tiny, tmp_path, name, "--dtype", "float32", *RUNS[name])
    files = [sorted(str(file.relative_to(run)) for file in run.rglob("*")) for run in (alone, two / name)]
    assert files[0] == files[1]
    assert (alone / "pairs.jsonl").read_bytes() == (two / name / "pairs.jsonl").read_bytes()
    assert_json_close(metrics_of(two / name), metrics_of(alone), rel=1e-3, abs=1e-4)
    saved = [model_weights(two / name), model_weights(alone)]
    if name == "lora":
        saved += [load_file(run / "adapter" / "adapter_model.safetensors") for run in (two / name, alone)]
    for a, b in zip(saved[::2], saved[1::2], strict=True):
        assert a.keys() == b.keys()
        apart = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
        assert apart.median() < 1e-7 and (apart > 1e-5).float().mean() < 1e-2  # AdamW: noise has a sign too


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_goes_on_bit_for_bit(name, two):
    """Stopped after two steps and resumed: the same model, the same metrics."""
    whole_one, resumed = two / name, two / f"{name}-resumed"
    assert len(metrics_of(whole_one)) > 4
    assert metrics_of(whole_one) == metrics_of(resumed)
    assert same_weights(model_weights(whole_one), model_weights(resumed))


def test_one_process_keeps_its_weights_whole(tiny, capsys):
    """--shard is said to have no effect."""
    model = shard_weights(load(tiny))
    assert not is_sharded(model) and gathered(model) is model
    assert "there is one process, so nothing is divided" in capsys.readouterr().out


def test_where_no_copy_fits_pairs_are_asked_for(tiny, monkeypatch):
    """One line before the model is loaded; with --pairs the model is loaded."""
    monkeypatch.setattr(memory, "card_memory", lambda: 1e6)
    monkeypatch.setattr(train, "require_fit", lambda *anything: None)
    args = train.Args(shard=True, dtype="float32")
    with pytest.raises(UserError, match=r"sampling takes a copy of the whole model .*--pairs"):
        train.load_trainable(tiny, args)
    train.load_trainable(tiny, dataclasses.replace(args, pairs="elsewhere"))


def test_a_copy_must_fit_beside_the_shares(tiny, monkeypatch):
    """Of fp32 weights in one process: themselves, two moments, and a copy; a byte less is too little."""
    args, config = train.Args(shard=True, dtype="float32"), read_config(tiny)
    needed = 16 * memory.Sizes.of(config, 0).total
    for card, fits in ((needed / memory.USABLE + 1, True), (needed / memory.USABLE - 1, False)):
        monkeypatch.setattr(memory, "card_memory", lambda card=card: card)
        with nullcontext() if fits else pytest.raises(UserError, match=r"takes a copy of .* of its shares"):
            memory.require_copy(args, config, "sampling", "")


def test_shares_can_be_asked_for():
    """Of any process, by any."""
    assert share_of([1, 2, 3], 0) == [1, 2, 3] == share_of([1, 2, 3])


if __name__ == "__main__":
    main(work)
