"""model.py against transformers: same logits, same readings of config.json, files that open on both sides.

    python -m pytest tests/test_model.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (ARCHITECTURES, CONFIG, FAMILIES, LLAMA3, close, oracle_logits, random_model,
                      sequence_logits, write_model)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import Config
from folder import load, save
from model import Decoder, Packed, causal_attention, causal_mask, rotary_tables, rotate
from run import UserError

IDS = torch.randint(320, (200,), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------- logits

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_transformers(saved, name):
    """A folder that transformers saved, loaded here, gives transformers' logits."""
    folder, oracle = saved(name)
    expected = oracle_logits(oracle, IDS)
    assert expected.std() > 0.5
    close(sequence_logits(load(folder), IDS), expected)


def test_llama3_scaling_matters_at_the_tested_positions(saved):
    """Without it the same weights give other logits, so agreement above means that it is computed."""
    folder, _ = saved("llama_llama3_rope")
    model = load(folder)
    plain = Decoder(Config.from_dict({**model.config.raw, "rope_parameters": {"rope_theta": 10_000.0}}))
    plain.load_state_dict(model.state_dict())
    assert (sequence_logits(model, IDS) - sequence_logits(plain, IDS)).abs().max() > 0.1


def test_smollm2_logits_are_transformers(smollm2):
    """The same for SmolLM2-135M-Instruct in fp32."""
    oracle = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.randint(3, 49_000, (16,), generator=torch.Generator().manual_seed(0))
    close(sequence_logits(load(smollm2), ids), oracle_logits(oracle, ids), atol=5e-4)


def test_logits_are_fp32_and_hidden_states_in_the_compute_type(tiny):
    """forward: (T,) -> (T, E); logits: (N, E) -> (N, V)."""
    model = load(tiny, torch.bfloat16)
    hidden = model(IDS[:5], Packed([(5, [])]))
    assert hidden.shape == (5, 64) and hidden.dtype == torch.bfloat16
    logits = model.logits(hidden[:2])
    assert logits.shape == (2, 320) and logits.dtype == torch.float32


# ------------------------------------------------------------------------- layouts

GROUPS = {
    "one_group": [(5, [3, 1, 4])],
    "no_response": [(4, []), (3, [])],
    "unequal": [(1, [6, 2]), (7, [1]), (3, []), (4, [5, 5, 1, 9])],
    "empty_responses": [(3, [0, 2, 0]), (2, [0]), (2, [0, 0])],
}


@pytest.mark.parametrize("root", [0, 3])
@pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_groups_are_each_sequence_alone(saved, name, shapes, root):
    """Every token of a pack has the logits it has in its own root + prefix + response."""
    folder, oracle = saved(name)
    model = load(folder)
    ids = IDS[: root + sum(prefix + sum(responses) for prefix, responses in shapes)]
    with torch.no_grad():
        logits = model.logits(model(ids, Packed(shapes, root)))
    end = root
    for prefix, responses in shapes:
        start, end = end, end + prefix
        whole_prefix = torch.cat((ids[:root], ids[start:end]))
        expected = oracle_logits(oracle, whole_prefix)
        close(logits[:root], expected[:root])
        close(logits[start:end], expected[root:])
        for length in responses:
            start, end = end, end + length
            expected = oracle_logits(oracle, torch.cat((whole_prefix, ids[start:end])))
            close(logits[start:end], expected[root + prefix :])


def test_positions_and_parts_are_those_of_the_docstring():
    """With shapes [(2, [2, 1])] the five tokens stand at 0 1 2 3 2; a root and a past push all of them on."""
    assert Packed([(2, [2, 1])]).positions.tolist() == [0, 1, 2, 3, 2]
    assert Packed([(2, [2, 1])], root=3).positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5]
    assert Packed([(2, [2, 1])], past=4).positions.tolist() == [4, 5, 6, 7, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [5, 2, 1])
def test_causal_attention_is_a_masked_softmax(m, dtype):
    """The last m of 5 tokens see all that came before them, by a double loop over heads and queries."""
    rng = torch.Generator().manual_seed(m)
    q = torch.randn(6, m, 4, generator=rng).to(dtype)  # (H, m, D)
    k, v = (torch.randn(2, 5, 4, generator=rng).to(dtype) for _ in range(2))  # (G, n, D)
    out = causal_attention(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    for head in range(6):
        keys, values = k[head // 3].double(), v[head // 3].double()  # three query heads share each of the two
        for i in range(m):
            seen = 5 - m + i + 1
            weights = (keys[:seen] @ q[head, i].double() / 2).softmax(0)  # sqrt(D) = 2
            error = (out[head, i].double() - weights @ values[:seen]).abs().max()
            assert error < (1e-14 if dtype == torch.float64 else 2e-2)


def test_a_mask_that_sampling_has_made_serves_training():
    """Masks are kept from pass to pass; one made in inference mode could not be saved for a backward pass."""
    q, k, v = (torch.randn(2, n, 4, requires_grad=True) for n in (3, 11, 11))
    causal_mask.cache_clear()
    with torch.inference_mode():
        expected = causal_attention(q.detach(), k.detach(), v.detach())
    out = causal_attention(q, k, v)
    out.sum().backward()
    assert torch.equal(out, expected) and q.grad.isfinite().all()


# ------------------------------------------------------------------------- load, save

def test_sharded_weights_load(saved, tmp_path):
    """A save cut into many files is read through its index."""
    _, oracle = saved("qwen3_untied_biases")
    oracle.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    close(sequence_logits(load(tmp_path), IDS), oracle_logits(oracle, IDS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_folders_open_in_transformers(saved, tiny, tmp_path, name):
    """save writes what AutoModelForCausalLM and AutoTokenizer open: same logits, same type, same ids."""
    folder, oracle = saved(name)
    model = load(folder)
    save(model.state_dict(), model.config, tmp_path / "out", tiny, torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(opened) is type(oracle) and opened.dtype == torch.float32
    close(oracle_logits(opened, IDS), oracle_logits(oracle, IDS), atol=1e-5)
    written, source = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "out", tiny))
    assert written.encode("What is a nucleus?") == source.encode("What is a nucleus?")
    assert written.chat_template == source.chat_template


def test_save_keeps_generation_config(tiny, tmp_path):
    """The stop ids beside the weights travel with them."""
    model = load(tiny)
    save(model.state_dict(), model.config, tmp_path / "out", tiny)
    written, source = (d / "generation_config.json" for d in (tmp_path / "out", tiny))
    assert written.read_bytes() == source.read_bytes()


def test_save_is_bf16_by_default_and_says_so(tiny, tmp_path):
    """bf16 tensors marked as PyTorch's, a config.json that names bf16 and otherwise is the source's."""
    model = load(tiny)
    save(model.state_dict(), model.config, tmp_path / "out", tiny)
    stored = load_file(tmp_path / "out/model.safetensors")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert stored.keys() == dict(model.named_parameters()).keys()
    for key, p in model.named_parameters():
        assert torch.equal(stored[key], p.bfloat16())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert {**config, "torch_dtype": "float32"} == json.loads((tiny / "config.json").read_text())


def test_save_then_load_is_exact(saved, tiny, tmp_path):
    """fp32 weights come back bit for bit."""
    model = load(saved("qwen3")[0])
    save(model.state_dict(), model.config, tmp_path / "out", tiny, torch.float32)
    again = load(tmp_path / "out").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], p) for key, p in model.state_dict().items())


def test_tied_head_stored_twice_loads(tiny, tmp_path):
    """A redundant lm_head.weight in a tied model's file is not an unknown tensor."""
    shutil.copytree(tiny, tmp_path / "m")
    weights = load_file(tiny / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
              tmp_path / "m/model.safetensors")
    assert torch.equal(sequence_logits(load(tmp_path / "m"), IDS), sequence_logits(load(tiny), IDS))


# ------------------------------------------------------------------------- strictness

def edit_weights(folder: Path, change) -> None:
    """Rewrite a folder's weights as change(weights) leaves them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    """Cut the end of a folder's weights off, as an interrupted copy does."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
SHARD = "model-00001-of-00009.safetensors"


def index_of_a_missing_shard(folder: Path) -> None:
    """An index that sends the reader to a file that is not there."""
    index = {"weight_map": {NORM: SHARD}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def weights_with(**tensors) -> Callable[[Path], None]:
    """Damage that adds these tensors to a folder's weights."""
    return lambda folder: edit_weights(folder, lambda weights: weights.update(tensors))


def transpose_up_projection(folder: Path) -> None:
    """Store a matrix the wrong way round."""
    edit_weights(folder, lambda weights: weights.update({UP: weights[UP].T.contiguous()}))


DAMAGE = {  # what is done to a folder, and what the error names
    "missing_tensor": (lambda d: edit_weights(d, lambda weights: weights.pop(NORM)), NORM),
    "extra_tensor": (weights_with(surplus=torch.ones(1)), "surplus"),
    "extra_bias": (weights_with(**{"model.norm.bias": torch.ones(64)}), "norm.bias"),
    "wrong_shape": (transpose_up_projection, UP),
    "truncated_file": (truncate, "model.safetensors"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "empty_file": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "no_config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken_config": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "missing_shard": (index_of_a_missing_shard, SHARD),
}


@pytest.mark.parametrize("damage, named", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_are_refused_by_name(tiny, tmp_path, damage, named):
    """Nothing is guessed or left at its initial value: the message names the tensor or the file."""
    damage(shutil.copytree(tiny, tmp_path / "m"))
    with pytest.raises(UserError) as e:
        load(tmp_path / "m")
    assert named in str(e.value) and str(tmp_path / "m") in str(e.value)


def test_an_untied_model_needs_its_head(tmp_path):
    """A tied file under an untied config lacks lm_head.weight."""
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "../nowhere", "owner/"])
def test_neither_folder_nor_hub_id(name):
    """A name of another shape is refused before any download, and repeated in the message."""
    with pytest.raises(UserError, match="neither a folder nor a hub id") as e:
        load(name)
    assert repr(name) in str(e.value)


# ------------------------------------------------------------------------- precision

def test_bf16_is_fp32_up_to_rounding(tiny):
    """Logits, and gradients in the type of their parameters, are within bf16's error of fp32's."""
    rounded, exact = load(tiny, torch.bfloat16), load(tiny)
    logits, reference = (m.logits(m(IDS[:40], Packed([(40, [])]))) for m in (rounded, exact))
    error = (logits - reference).abs().max() / reference.abs().max()
    assert 2**-14 < error < 2**-5
    for out in (logits, reference):
        out.logsumexp(-1).sum().backward()
    for p, q in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        assert torch.linalg.vector_norm(p.grad - q.grad) < 0.05 * torch.linalg.vector_norm(q.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_model_computes_in_the_type_it_was_loaded_in(saved, dtype):
    """Matrices and biases are kept and used in that type, the weights of norms in fp32 at least."""
    model = load(saved("qwen2")[0], dtype)
    for name, p in model.named_parameters():
        kept = torch.promote_types(dtype, torch.float32) if name.endswith("norm.weight") else dtype
        assert p.dtype == kept, name
    assert model.compute == dtype
    assert model(IDS[:3], Packed([(3, [])])).dtype == dtype


BF16_GROUPS = {**GROUPS, "long": [(1030, [])], "long_pack": [(1000, [40, 30])]}


@pytest.mark.parametrize("shapes", BF16_GROUPS.values(), ids=BF16_GROUPS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bf16_packs_are_fp32_packs(saved, name, shapes):
    """Every group and length sees in bf16 what it sees in fp32: logits differ by rounding alone."""
    folder, _ = saved(name)
    ids = IDS.repeat(6)[: sum(prefix + sum(responses) for prefix, responses in shapes)]
    rounded, exact = load(folder, torch.bfloat16), load(folder)
    with torch.no_grad():
        a, b = (m.logits(m(ids, Packed(shapes))) for m in (rounded, exact))
    error = (a - b).norm(dim=-1) / b.norm(dim=-1)
    assert error.max() < 0.15 and error.mean() < 0.04


# ------------------------------------------------------------------------- config

SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
OLD = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
NEITHER = {k: v for k, v in OLD.items() if k not in ("head_dim", "num_key_value_heads")}
SPELLINGS = {
    "theta_beside": {**OLD, "rope_theta": 5e5, "rope_scaling": None},
    "theta_inside": {**OLD, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "no_theta": OLD,
    "old_type": {**OLD, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
    "old_rope_type": {**OLD, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "new_llama3": {**OLD, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "new_llama3_theta_beside": {**OLD, "rope_theta": 5e5, "rope_parameters": LLAMA3},
    "keys_in_another_order": {**OLD, "rope_theta": 5e5, "rope_scaling": dict(reversed(LLAMA3.items()))},
    "head_dim_absent": NEITHER,
    "head_dim_null": {**OLD, "head_dim": None, "num_key_value_heads": None},
    "head_dim_given": {**OLD, "head_dim": 32, "num_key_value_heads": 1},
    "untied_by_default": {k: v for k, v in OLD.items() if k != "tie_word_embeddings"},
    "qwen2_window_off": {**OLD, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096},
}


@pytest.mark.parametrize("raw", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_are_read_as_transformers_reads_them(raw):
    """Old and new ways to write RoPE, head size and the like."""
    got, expected = Config.from_dict(raw, "here"), AutoConfig.for_model(**json.loads(json.dumps(raw)))
    rope = expected.rope_parameters
    assert got.rope_theta == rope["rope_theta"]
    assert (got.rope_llama3 is not None) == (rope["rope_type"] == "llama3")
    assert got.rope_llama3 is None or all(got.rope_llama3[k] == rope[k] for k in SCALING)
    assert got.head_dim == (getattr(expected, "head_dim", None) or 16)
    assert got.num_key_value_heads == expected.num_key_value_heads
    assert got.tie_word_embeddings == expected.tie_word_embeddings


@pytest.mark.parametrize("scaling", ["old_type", "old_rope_type", "new_llama3", "new_llama3_theta_beside",
                                     "keys_in_another_order"])
def test_every_llama3_spelling_gives_one_model(scaling):
    """The spelling of the same RoPE changes no logit."""
    reference = random_model(**SPELLINGS["new_llama3"], seed=3)
    model = random_model(**SPELLINGS[scaling], seed=3)
    assert torch.equal(sequence_logits(model, IDS), sequence_logits(reference, IDS))


def test_a_default_that_is_spelled_out_as_null_is_taken():
    """As transformers writes options that are not set."""
    assert Config.from_dict(random_model().config.raw | dict(partial_rotary_factor=None), "config.json")


UNSUPPORTED = {
    "model_type": ({"model_type": "gemma2"}, "gemma2"),
    "no_model_type": ({"model_type": None}, "model_type"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "old_linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "new_dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "activation": ({"hidden_act": "gelu_new"}, "gelu_new"),
    "sliding_window": ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4095}, "4095"),
    "sliding_layers": ({"sliding_window": 4095, "layer_types": ["sliding_attention"]}, "4095"),
    "quantization": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    "missing_key": ({"vocab_size": ...}, "vocab_size"),
    "missing_factor": ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0}}, "'factor'"),
}


@pytest.mark.parametrize("changes, named", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_configs_are_refused_by_name(changes, named):
    """The message holds the value and the file it stands in."""
    raw = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    with pytest.raises(UserError) as e:
        Config.from_dict(raw, "folder/config.json")
    assert named in str(e.value) and "folder/config.json" in str(e.value)


def test_qwen3_head_dim_absent_is_transformers_128():
    """Qwen3 is the family whose head size, where config.json is silent, is 128 and not hidden / heads."""
    raw = {**NEITHER, "model_type": "qwen3", "num_key_value_heads": 2}
    assert Config.from_dict(raw, "here").head_dim == AutoConfig.for_model(**raw).head_dim


# ------------------------------------------------------------------------- rotary position embedding

def test_rotation_turns_points_in_the_plane():
    """Channels i and i + D/2 are one complex number, multiplied by e^(i angle): values and gradient, fp64."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, generator=rng, dtype=torch.float64, requires_grad=True)  # (T, heads, D)
    angle = torch.rand(3, 1, 4, generator=rng, dtype=torch.float64)  # (T, 1, D/2)
    cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
    point = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((point.real, point.imag), -1))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_scores_of_rotated_vectors_depend_on_their_distance_alone():
    """q at position 7 and k at 4 score what they score at 103 and 100; norms are kept."""
    config = random_model().config
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 16, generator=rng) for _ in range(2))
    scores = []
    for positions in ((7, 4), (103, 100)):
        cos, sin = rotary_tables(torch.tensor(positions), config)  # (2, 1, D) each
        turned_q, turned_k = rotate(q, cos[:1], sin[:1]), rotate(k, cos[1:], sin[1:])
        torch.testing.assert_close(turned_q.norm(), q.norm())
        scores.append((turned_q * turned_k).sum())
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
