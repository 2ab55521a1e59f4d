"""lora.py against PEFT, the plain model and finite arithmetic; two processes against one.

Run as a script under gloo this file is also the worker of the last part.
"""

import contextlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FAMILIES, close, kept_bytes, oracle_logits, random_pairs, sequence_logits, start_workers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora
from batches import groups_of, micro_batches, pair_logps
from folder import load, save_adapter
from lora import LoRALinear, adapted_layers, adapters_off, add_adapters
from losses import dpo, sequence_logps
from model import Decoder
from optimizer import MasterAdamW, all_reduce_gradients, gradient_norm
from negatives import Pair
from run import main, rank, read_json
from selection import save_model
from train import Args

RANK, ALPHA = 4, 8.0
IDS = torch.tensor([5, 9, 200, 31, 77, 12, 140])  # a sequence of the tiny vocabulary
PAIRS = random_pairs(5)
ARGS = Args(pass_tokens=40)
GROUPS = [(pair.prompt_ids, [response.ids for response in pair.responses]) for pair in PAIRS]


def with_adapters(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, trained: bool = False,
                  checkpoint: bool = False) -> Decoder:
    """A model with adapters; trained: B is random, so that they matter."""
    model = load(folder, dtype)
    add_adapters(model, RANK, ALPHA, seed)
    model.checkpoint_activations = checkpoint
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model).values() if trained else ():
        nn.init.normal_(layer.lora_B, std=0.05, generator=generator)
    return model


def base_weights(model: Decoder) -> dict[str, Tensor]:
    """A copy of all weights but the adapters'."""
    return {name: p.detach().clone() for name, p in model.named_parameters()
            if not name.endswith(lora.ADAPTER)}


def backward(model: Decoder, pairs: list[Pair] = PAIRS, reference: Tensor | None = None) -> Tensor:
    """The mean DPO loss of the pairs at beta 0.1, back-propagated; reference: the model itself by default."""
    losses = []
    for indices in micro_batches(range(len(pairs)), lambda i: groups_of(pairs[i], ARGS), ARGS):
        logps, _ = pair_logps(model, [pairs[i] for i in indices], ARGS)
        start = logps.detach() if reference is None else reference[indices]
        loss, _ = dpo(logps, start, 0.1)
        (loss.sum() / len(pairs)).backward()
        losses += loss.tolist()
    return torch.tensor(losses)


def one_step(model: Decoder, lr: float = 1e-3) -> MasterAdamW:
    """The optimizer of a model after one step of DPO."""
    optimizer = MasterAdamW(model, lr, seed=0)
    backward(model)
    optimizer.step(0, lr, gradient_norm(optimizer.weights))
    optimizer.zero_grad()
    return optimizer


# ------------------------------------------------------------------------- a layer

def test_a_layer_adds_its_scaled_update():
    """y = W x + bias + alpha / r B A x, in numpy."""
    torch.manual_seed(0)
    plain = nn.Linear(6, 5, dtype=torch.float64)
    layer = LoRALinear(plain, 3, 12.0, torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6, dtype=torch.float64)
    w, b, bias, xs = (t.detach().numpy() for t in (plain.weight, layer.lora_B, plain.bias, x))
    a = layer.lora_A.detach().numpy()
    expected = xs @ (w + 12 / 3 * b @ a).T + bias
    assert layer(x).detach().numpy() == pytest.approx(expected, rel=1e-12)


def test_a_frozen_matrix_keeps_no_input():
    """With its adapter a layer keeps x and x A; with it off nothing, though x has a gradient."""
    x = torch.randn(50, 64, requires_grad=True)
    plain = nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer = LoRALinear(plain, 4, 16.0, torch.Generator())
    assert kept_bytes(layer, lambda: layer(x)) == 4 * 50 * (64 + 4)
    layer.enabled = False
    assert kept_bytes(layer, lambda: layer(x)) == 0


def test_adapters_start_as_pefts_do(tiny):
    """A uniform between -1/sqrt(I) and 1/sqrt(I), B zero; a seed repeats, another one does not."""
    layers = adapted_layers(with_adapters(tiny)).values()
    for layer in layers:
        bound = layer.weight.shape[1] ** -0.5
        a = layer.lora_A.detach()
        assert a.shape == (RANK, layer.weight.shape[1]) and not layer.lora_B.any()
        assert 0.95 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    again, other = (adapted_layers(with_adapters(tiny, seed=seed)).values() for seed in (0, 1))
    assert all(torch.equal(a.lora_A, b.lora_A) for a, b in zip(layers, again, strict=True))
    assert not any(torch.equal(a.lora_A, b.lora_A) for a, b in zip(layers, other, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_are_pefts_all_linear(name, saved):
    """Seven a block; neither the embedding nor the output layer. All else is frozen."""
    folder, oracle = saved(name)
    oracle = AutoModelForCausalLM.from_pretrained(folder)  # a copy: PEFT changes it in place
    theirs = get_peft_model(oracle, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = {key.removeprefix("base_model.model.").replace(".default.weight", ""): p.shape
                for key, p in theirs.named_parameters() if p.requires_grad}
    model = with_adapters(folder)
    ours = {key: p.shape for key, p in model.named_parameters() if p.requires_grad}
    assert ours == expected and len(ours) == 2 * 7 * model.config.num_hidden_layers


# ------------------------------------------------------------------------- training

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_from_the_very_model(dtype, tiny):
    """Every margin of the first step is exactly 0 against the plain model's log-probs."""
    plain, model = load(tiny, dtype), with_adapters(tiny, dtype)
    with torch.no_grad():
        reference, _ = pair_logps(plain, PAIRS, ARGS)
        logps, _ = pair_logps(model, PAIRS, ARGS)
    assert not dpo(logps, reference, 0.1)[1]["margin"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_moves_the_adapters_alone(dtype, tiny):
    """Every B is nonzero, the base is the same to the last bit; masters of adapters alone, in fp32."""
    model = with_adapters(tiny, dtype)
    before = base_weights(model)
    optimizer = one_step(model)
    layers = adapted_layers(model).values()
    assert all(layer.lora_B.any() for layer in layers)
    after = base_weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert len(optimizer.masters) == 2 * len(layers) == len(optimizer.adamw.state)
    assert {master.dtype for master in optimizer.masters} == {torch.float32}
    assert {layer.lora_A.dtype for layer in layers} == {dtype}


def test_frozen_weights_have_no_gradient(tiny):
    """Only A and B do, and clipping is by their norm alone."""
    model = with_adapters(tiny, trained=True)
    backward(model)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if name.endswith(lora.ADAPTER)}


def test_gradients_follow_from_those_of_the_full_matrix(tiny):
    """With dW of the merged plain model: dB = alpha / r dW A^T and dA = alpha / r B^T dW, in fp64."""
    model = with_adapters(tiny, torch.float64, trained=True)
    plain = load(tiny, torch.float64)
    plain.load_state_dict(MasterAdamW(model, 1e-3, seed=0).weights_to_save(torch.float64))
    start = torch.zeros(len(PAIRS), 2, dtype=torch.float64)
    torch.testing.assert_close(backward(model, reference=start), backward(plain, reference=start))
    matrices = dict(plain.named_parameters())
    for name, layer in adapted_layers(model).items():
        d = matrices[f"{name}.weight"].grad
        torch.testing.assert_close(layer.lora_B.grad, layer.scale * d @ layer.lora_A.T, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(layer.lora_A.grad, layer.scale * layer.lora_B.T @ d, rtol=1e-9, atol=1e-14)


def flat_gradients(model: Decoder) -> Tensor:
    """The gradients of all adapters in one tensor."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_checkpointing_changes_no_gradient(tiny):
    """In fp64, to 1e-9 of the gradient's norm."""
    gradients = []
    for checkpoint in (False, True):
        model = with_adapters(tiny, torch.float64, trained=True, checkpoint=checkpoint)
        backward(model)
        gradients.append(flat_gradients(model))
    plain, checkpointed = gradients
    assert plain.norm() > 1e-3 and (plain - checkpointed).norm() <= 1e-9 * plain.norm()


# ------------------------------------------------------------------------- the reference

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapters_it_is_the_start_model(dtype, tiny):
    """To the last bit, in log-probs and logits; with them again it is another one, even after an error."""
    plain, model = load(tiny, dtype), with_adapters(tiny, dtype, trained=True)
    with adapters_off(model):
        assert sequence_logps(model, GROUPS) == sequence_logps(plain, GROUPS)
        assert torch.equal(sequence_logits(model, IDS), sequence_logits(plain, IDS))
    with contextlib.suppress(KeyboardInterrupt), adapters_off(model):
        raise KeyboardInterrupt
    assert sequence_logps(model, GROUPS) != sequence_logps(plain, GROUPS)


def test_a_plain_model_is_not_its_own_reference(tiny):
    """Adapters that are not there can't be switched off."""
    with pytest.raises(ValueError, match="no adapters"), adapters_off(load(tiny)):
        pass


# ------------------------------------------------------------------------- saving

def test_merged_it_computes_the_same(tiny):
    """A plain model with W + alpha / r B A: log-probs within 1e-6 a token, which adapters moved by 0.01."""
    model, plain = with_adapters(tiny, trained=True), load(tiny)
    start = sequence_logps(plain, GROUPS)
    plain.load_state_dict(MasterAdamW(model, 1e-3, seed=0).weights_to_save(torch.float32))
    merged, unmerged = sequence_logps(plain, GROUPS), sequence_logps(model, GROUPS)
    tokens = sum(len(ids) for _, responses in GROUPS for ids in responses)
    error, moved = (torch.tensor(merged) - torch.tensor(table) for table in (unmerged, start))
    assert error.abs().sum() < 1e-6 * tokens and moved.abs().sum() > 0.01 * tokens


def test_merged_in_bf16_it_is_rounded_stochastically(tiny):
    """Each weight is a bf16 neighbour of the exact one, right in the mean; repeated, it is the same."""
    optimizer = MasterAdamW(with_adapters(tiny, torch.bfloat16, trained=True), 1e-3, seed=0)
    exact, merged, again = (optimizer.weights_to_save(dtype)
                            for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    assert exact.keys() == load(tiny).state_dict().keys()
    errors = []
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, again[name])
        step = 2.0 ** (exact[name].abs().clamp(min=1e-30).log2().floor() - 7)  # between two bf16 numbers
        error = (weight.float() - exact[name]) / step
        assert error.abs().max() < 1
        errors.append(error.flatten())
    errors = torch.cat(errors)
    changed = errors[errors != 0]
    assert len(changed) > 10_000 and abs(changed.mean()) < 5 * changed.std() / math.sqrt(len(changed))


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_opens_the_adapter(name, saved, tmp_path):
    """On transformers' model it gives our logits, and PEFT's merged matrices are ours."""
    folder, _ = saved(name)
    model = with_adapters(folder, trained=True)
    optimizer = MasterAdamW(model, 1e-3, seed=0)
    save_adapter(model, optimizer.master_of, tmp_path / "adapter", str(folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    ours = sequence_logits(model, IDS)
    close(oracle_logits(theirs, IDS), ours, 1e-3 if name == "qwen2" else 1e-4)
    assert (ours - sequence_logits(load(folder), IDS)).abs().max() > 0.1
    merged = theirs.merge_and_unload().state_dict()
    for key, weight in optimizer.weights_to_save(torch.float32).items():
        close(merged[key], weight, 1e-6)


def test_the_adapters_files_are_pefts(tiny, tmp_path):
    """Two matrices a layer, in fp32, and no more in adapter_config.json than PEFT needs; no pickle."""
    model = with_adapters(tiny, torch.bfloat16)
    optimizer = one_step(model)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    save_adapter(model, optimizer.master_of, tmp_path / "adapter", "owner/name")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert read_json(tmp_path / "adapter" / "adapter_config.json") == dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="owner/name", r=RANK,
        lora_alpha=ALPHA, lora_dropout=0.0, bias="none", inference_mode=True,
        target_modules=["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    )  # fmt: skip
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = adapted_layers(model)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        for part in lora.ADAPTER:
            stored = tensors[f"base_model.model.{name}.{part}.weight"]
            assert stored.dtype == torch.float32
            assert torch.equal(stored, optimizer.master_of(getattr(layer, part)))


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_a_run_folder_holds_both(save_dtype, tiny, tmp_path, capsys):
    """model/, merged, which transformers opens, and adapter/; what rounding to bf16 keeps is printed."""
    optimizer = one_step(with_adapters(tiny, trained=True))
    args = Args(model=str(tiny), dtype="float32", save_dtype=save_dtype)
    kept = save_model(optimizer, PAIRS, args, tmp_path, tiny)
    printed = capsys.readouterr().out
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(tiny)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    distance = (oracle_logits(opened, IDS) - sequence_logits(optimizer.model, IDS)).abs().max().item()
    if save_dtype == "float32":
        assert kept == dict(share=1.0) and distance < 1e-4
        return
    margins = []
    for model in (optimizer.model, load(tmp_path / "model")):
        now, before = sequence_logps(model, GROUPS), sequence_logps(load(tiny), GROUPS)
        differences = [(a - x) - (b - y) for (a, b), (x, y) in zip(now, before, strict=True)]
        margins.append(sum(differences) / len(differences))
    assert (kept["margin"], kept["margin_saved"]) == pytest.approx(margins, rel=1e-3, abs=1e-5)
    told = f"mean margin (without beta) of {kept['margin_saved']:.3f} nats"
    assert (told in printed) == (kept["margin"] > 0)
    assert 1e-4 < distance < 0.5


# ------------------------------------------------------------------------- two processes

def work_of_one_step(folder: Path) -> tuple[dict[str, Tensor], list[int]]:
    """A step of plain SGD at lr 0.1 in fp64 on this process's share, checkpointed: the gradients that all
    processes agree on, the adapters after it, and the sizes of what was sent."""
    model = with_adapters(folder, torch.float64, trained=True, checkpoint=True)
    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor) -> None:
        sizes.append(tensor.numel())
        all_reduce(tensor)

    backward(model, reference=torch.zeros(len(PAIRS), 2, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        all_reduce_gradients(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    gradients = flat_gradients(model)
    weights = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in trained])
    return dict(gradients=gradients, weights=weights), sizes


def work() -> None:
    """The worker: arguments are the model's folder, and one for results."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    tensors, sizes = work_of_one_step(folder)
    save_file(tensors, out / f"{rank()}.safetensors")
    (out / f"{rank()}.json").write_text(json.dumps(sizes))


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> list[tuple[dict[str, Tensor], list[int]]]:
    """What two processes that run this file have saved."""
    out = tmp_path_factory.mktemp("two")
    start_workers(2, __file__, tiny, out)
    return [(load_file(out / f"{r}.safetensors"), read_json(out / f"{r}.json")) for r in range(2)]


def test_two_processes_are_one(two, tiny):
    """Gradients and adapters to 1e-9 of their norm, though one has three of the five pairs."""
    expected, _ = work_of_one_step(tiny)
    for name, tensor in expected.items():
        for tensors, _ in two:
            assert (tensors[name] - tensor).norm() <= 1e-9 * tensor.norm() > 0


def test_frozen_weights_are_not_sent(two, tiny):
    """One message for each A and B, and nothing else."""
    model = with_adapters(tiny)
    expected = [p.numel() for p in model.parameters() if p.requires_grad]
    for _, sizes in two:
        assert sizes == expected
    assert sum(expected) < sum(p.numel() for p in model.parameters()) / 5


if __name__ == "__main__":
    main(work)
