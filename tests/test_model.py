"""model.py against transformers: same logits, same readings of config.json, files that open on both sides."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, random_model, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from model import (Cache, Config, Decoder, Packed, _Attention, _Linear, _RMSNorm, _SwiGLU, load, rotate,
                   save)
from run import UserError

transformers_logging.disable_progress_bar()

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
         "bos_token_id": None, "eos_token_id": 1}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", **SCALING}
ARCHITECTURES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama_llama3_rope": {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 10_000.0}},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama_theta_eps": {"model_type": "llama", "rms_norm_eps": 0.1, "num_key_value_heads": 1,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "qwen3_untied_biases": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16,
                            "attention_bias": True},
}
FAMILIES = ("llama_llama3_rope", "qwen2", "qwen3")
IDS = torch.randint(320, (200,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder that transformers saved, transformers' model): random weights, biases and norms."""
    made = {}

    def get(name: str):
        if name not in made:
            torch.manual_seed(len(name))
            config = AutoConfig.for_model(**{**SIZES, **ARCHITECTURES[name]})
            oracle = AutoModelForCausalLM.from_config(config)
            for key, p in oracle.named_parameters():
                torch.nn.init.normal_(p, mean=float("norm" in key), std=0.5 if p.dim() == 1 else 0.15)
            oracle.save_pretrained(folder := tmp_path_factory.mktemp(name))
            made[name] = folder, oracle.eval()
        return made[name]

    return get


def theirs(oracle, ids: Tensor) -> Tensor:
    """transformers' logits of one sequence, (T, V)."""
    with torch.no_grad():
        return oracle(ids[None]).logits[0].float()


@torch.no_grad()
def ours(model: Decoder, ids: Tensor) -> Tensor:
    """Our logits of one sequence, (T, V)."""
    return model.logits(model(ids, model.pack([(len(ids), [])])))


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -------------------------------------------------------------------------------- logits

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_transformers(saved, name):
    """A folder that transformers saved, loaded here, gives transformers' logits."""
    folder, oracle = saved(name)
    expected = theirs(oracle, IDS)
    assert expected.std() > 0.5
    close(ours(load(folder), IDS), expected)


def test_llama3_scaling_matters_at_the_tested_positions(saved):
    """Without it the same weights give other logits, so agreement above means that it is computed."""
    folder, _ = saved("llama_llama3_rope")
    model = load(folder)
    plain = Decoder(Config.from_dict({**model.config.raw, "rope_parameters": {"rope_theta": 10_000.0}}))
    plain.load_state_dict(model.state_dict())
    assert (ours(model, IDS) - ours(plain, IDS)).abs().max() > 0.1


def test_smollm2_logits_are_transformers(smollm2):
    """The same for SmolLM2-135M-Instruct in fp32."""
    oracle = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.randint(3, 49_000, (48,), generator=torch.Generator().manual_seed(0))
    close(ours(load(smollm2), ids), theirs(oracle, ids), atol=5e-4)


def test_logits_are_fp32_and_hidden_states_in_the_compute_type(tiny):
    """forward: (T,) -> (T, E); logits: (N, E) -> (N, V)."""
    model = load(tiny, torch.bfloat16)
    hidden = model(IDS[:5], model.pack([(5, [])]))
    assert hidden.shape == (5, 64) and hidden.dtype == torch.bfloat16
    logits = model.logits(hidden[:2])
    assert logits.shape == (2, 320) and logits.dtype == torch.float32


# -------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token_is_one_pass(saved, name):
    """Fed through a Cache one at a time, 80 tokens have the logits of one full pass of transformers'."""
    folder, oracle = saved(name)
    model, cache, ids = load(folder), Cache(load(folder).config, 1, 80, torch.float32), IDS[:80]
    steps = []
    with torch.no_grad():
        for token in ids:
            steps.append(model.logits(model(token[None], cache)))
            cache.lengths += 1
    close(torch.cat(steps), theirs(oracle, ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_of_different_lengths_step_together(saved, name):
    """Two slots, one seven tokens behind, each see their own past alone."""
    folder, oracle = saved(name)
    model, a, b = load(folder), IDS[:20], IDS[30:43]
    cache, steps = Cache(model.config, 2, 24, torch.float32), []
    with torch.no_grad():
        for i in range(20):
            j = max(i - 7, 0)
            steps.append(model.logits(model(torch.stack((a[i], b[j])), cache)))
            cache.lengths += torch.tensor([1, int(i >= 7)])
    close(torch.stack([s[0] for s in steps]), theirs(oracle, a))
    close(torch.stack([s[1] for s in steps[7:]]), theirs(oracle, b))


@pytest.mark.parametrize("shared", [0, 1, 6])
def test_prefilled_slots_continue(saved, shared):
    """Prompts packed into slots (one of them into two), after a root or none, continue as if every token had
    been fed at once."""
    folder, oracle = saved("qwen3")
    model, rest = load(folder), IDS[100:106]
    root, prompts = IDS[50 : 50 + shared], [IDS[:9], IDS[20:24]]
    cache, slots = Cache(model.config, 4, 40, torch.float32), [[2], [0, 3]]
    with torch.no_grad():
        if shared:
            model(root, Packed([(shared, [])], "cpu", cache, [None]))
        assert cache.shared == shared
        model(torch.cat(prompts), Packed([(9, []), (4, [])], "cpu", cache, slots))
        cache.lengths = torch.tensor([4, 0, 9, 4])
        steps = []
        for token in rest:
            steps.append(model.logits(model(token.expand(4), cache)))
            cache.lengths += 1
    for slot, prompt in ((2, prompts[0]), (0, prompts[1]), (3, prompts[1]), (1, IDS[:0])):
        expected = theirs(oracle, torch.cat((root, prompt, rest)))[shared + len(prompt):]
        close(torch.stack([s[slot] for s in steps]), expected)


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decode_step_can_be_recorded(saved, name, shared):
    """Traced once, the operations of a step give later steps too: they depend on tensors that are written in
    place (what was fed, how long each slot is) and on no number read from them, as a CUDA graph must."""
    folder, _ = saved(name)
    model = load(folder)
    caches = [Cache(model.config, 3, 16, torch.float32) for _ in range(2)]
    latest = IDS[:3].clone()
    with torch.no_grad():
        for cache in caches[: 2 * bool(shared)]:
            model(IDS[50 : 50 + shared], Packed([(shared, [])], "cpu", cache, [None]))
        recorded = make_fx(lambda: model.logits(model(latest, caches[0])))()
        for step in range(6):
            latest.copy_(IDS[3 * step : 3 * step + 3])
            torch.testing.assert_close(recorded(), model.logits(model(latest, caches[1])))
            for cache in caches:
                cache.lengths += torch.tensor([1, 2, step % 2])


def test_a_reused_slot_forgets(saved):
    """A slot set back to length 0 gives the logits of a fresh one, whatever its cache still holds."""
    folder, oracle = saved("llama")
    model = load(folder)
    cache = Cache(model.config, 1, 16, torch.float32)
    for x in (*cache.k, *cache.v):
        x.fill_(1e3)
    with torch.no_grad():
        logits = model.logits(model(IDS[:1], cache))
    close(logits, theirs(oracle, IDS[:1]))


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
        logits = model.logits(model(ids, model.pack(shapes, root)))
    at = root
    for prefix, responses in shapes:
        head = torch.cat((ids[:root], ids[at : at + prefix]))
        close(torch.cat((logits[:root], logits[at : at + prefix])), theirs(oracle, head))
        at += prefix
        for n in responses:
            close(logits[at : at + n], theirs(oracle, torch.cat((head, ids[at : at + n])))[root + prefix:])
            at += n


# -------------------------------------------------------------------------------- load, save

def test_sharded_weights_load(saved, tmp_path):
    """A save cut into many files is read through its index."""
    _, oracle = saved("qwen3_untied_biases")
    oracle.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    close(ours(load(tmp_path), IDS), theirs(oracle, IDS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_folders_open_in_transformers(saved, tiny, tmp_path, name):
    """save writes what AutoModelForCausalLM and AutoTokenizer open: same logits, same type, same ids."""
    folder, oracle = saved(name)
    save(load(folder), tmp_path / "out", tiny, torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(opened) is type(oracle) and opened.dtype == torch.float32
    close(theirs(opened, IDS), theirs(oracle, IDS), atol=1e-5)
    written, source = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "out", tiny))
    assert written.encode("What is a nucleus?") == source.encode("What is a nucleus?")
    assert written.chat_template == source.chat_template


def test_save_keeps_generation_config(tiny, tmp_path):
    """The stop ids beside the weights travel with them."""
    save(load(tiny), tmp_path / "out", tiny)
    written, source = (d / "generation_config.json" for d in (tmp_path / "out", tiny))
    assert written.read_bytes() == source.read_bytes()


def test_save_is_bf16_by_default_and_says_so(tiny, tmp_path):
    """bf16 tensors marked as PyTorch's, a config.json that names bf16 and otherwise is the source's."""
    model = load(tiny)
    save(model, tmp_path / "out", tiny)
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
    save(model, tmp_path / "out", tiny, torch.float32)
    again = load(tmp_path / "out").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], p) for key, p in model.state_dict().items())


def test_tied_head_stored_twice_loads(tiny, tmp_path):
    """A redundant lm_head.weight in a tied model's file is not an unknown tensor."""
    shutil.copytree(tiny, tmp_path / "m")
    weights = load_file(tiny / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
              tmp_path / "m/model.safetensors")
    assert torch.equal(ours(load(tmp_path / "m"), IDS), ours(load(tiny), IDS))


# -------------------------------------------------------------------------------- strictness

def edit(folder: Path, change) -> None:
    """Rewrite a folder's weights as change(weights) leaves them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGE = {
    "missing_tensor": (lambda d: edit(d, lambda w: w.pop(NORM)), NORM),
    "extra_tensor": (lambda d: edit(d, lambda w: w.update(surplus=torch.ones(1))), "surplus"),
    "extra_bias": (lambda d: edit(d, lambda w: w.update({"model.norm.bias": torch.ones(64)})), "norm.bias"),
    "wrong_shape": (lambda d: edit(d, lambda w: w.update({UP: w[UP].T.contiguous()})), UP),
    "truncated_file": (truncate, "model.safetensors"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "empty_file": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "no_config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken_config": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "missing_shard": (lambda d: (d / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NORM: "model-00001-of-00009.safetensors"}})), "model-00001-of-00009"),
}  # fmt: skip


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


# -------------------------------------------------------------------------------- precision

def test_fp32_masters_with_bf16_compute(tiny):
    """Gradients arrive in fp32 and logits within bf16 error of fp32's, from the same fp32 weights."""
    model, exact = load(tiny, compute=torch.bfloat16), load(tiny)
    logits = model.logits(model(IDS, model.pack([(200, [])])))
    reference = exact.logits(exact(IDS, exact.pack([(200, [])])))
    error = (logits - reference).abs().max() / reference.abs().max()
    assert 2**-14 < error < 2**-5
    for m, out in ((model, logits), (exact, reference)):
        out.logsumexp(-1).sum().backward()
        assert {p.dtype for p in m.parameters()} == {torch.float32}
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.linalg.vector_norm(p.grad - q.grad) < 0.05 * torch.linalg.vector_norm(q.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compute_type_defaults_to_the_weights(tiny, dtype):
    """load(dtype) alone keeps matrices and computes in one type; norms are kept in fp32 at least."""
    model, kept = load(tiny, dtype), torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {dtype}
    assert {p.dtype for p in model.parameters() if p.dim() == 1} == {kept}
    assert model(IDS[:3], model.pack([(3, [])])).dtype == dtype


BF16_GROUPS = {**GROUPS, "long": [(1030, [])], "long_pack": [(1000, [40, 30])]}


@pytest.mark.parametrize("shapes", BF16_GROUPS.values(), ids=BF16_GROUPS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bf16_packs_are_fp32_packs(saved, name, shapes):
    """Every group and length sees in bf16 what it sees in fp32: logits differ by rounding alone."""
    folder, _ = saved(name)
    ids = IDS.repeat(6)[: sum(prefix + sum(responses) for prefix, responses in shapes)]
    rounded, exact = load(folder, torch.bfloat16), load(folder)
    with torch.no_grad():
        a, b = (m.logits(m(ids, m.pack(shapes))) for m in (rounded, exact))
    error = (a - b).norm(dim=-1) / b.norm(dim=-1)
    assert error.max() < 0.15 and error.mean() < 0.04


# -------------------------------------------------------------------------------- config

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
    assert torch.equal(ours(random_model(**SPELLINGS[scaling], seed=3), IDS), ours(reference, IDS))


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


# -------------------------------------------------------------------------------- own backward passes

@pytest.mark.parametrize("m", [5, 2])
def test_attention_and_its_gradient(m):
    """Spelled out, in fp64: torch's own, and finite differences; the last m of 5 tokens, shared heads."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, n, 4, generator=g, dtype=torch.float64, requires_grad=True)
               for h, n in ((6, m), (2, 5), (2, 5)))
    mask = torch.ones(m, 5, dtype=torch.bool).tril(5 - m)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
    bias = torch.zeros(m, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(_Attention.apply(q, k, v, bias), expected)
    assert torch.autograd.gradcheck(lambda *x: _Attention.apply(*x, bias), (q, k, v))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradient(bias):
    """In fp64: finite differences; a frozen weight gets no gradient, and no pass keeps a cast of it."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True)
               for s in ((4, 3), (5, 3), (5,)))
    given = (x, w, b) if bias else (x, w, None)
    torch.testing.assert_close(_Linear.apply(*given), F.linear(*given))
    assert torch.autograd.gradcheck(_Linear.apply, given)
    frozen = w.detach()
    _Linear.apply(x, frozen, b).sum().backward()
    torch.testing.assert_close(x.grad, frozen.sum(0).expand(4, 3))
    assert frozen.grad is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _Linear.apply(x.detach().bfloat16(), w.detach().float().requires_grad_(), None)
    assert [(tuple(t.shape), t.dtype) for t in kept] == [((4, 3), torch.bfloat16), ((5, 3), torch.float32)]


def test_swiglu_and_its_gradient():
    """In fp64: torch's own, and finite differences."""
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(_SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))


def test_rotation_and_its_gradient():
    """In fp64: by complex numbers, channel i and i + D/2 as one; and finite differences."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, generator=g, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(3, 1, 4, generator=g, dtype=torch.float64)
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    sin = torch.cat((-angle.sin(), angle.sin()), -1)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)])
def test_rms_norm_and_its_gradient(shape):
    """In fp64: torch's, and finite differences; for tokens and for heads."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(shape[-1:], generator=g, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, shape[-1:], weight, 1e-5))
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (x, weight))
