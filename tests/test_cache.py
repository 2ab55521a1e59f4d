"""The KV cache of sample.py and the layouts that fill and read it, against one full forward pass.

Everything that is fed through a cache, token by token or prompt by prompt, must have the logits that
transformers gives it in one pass over the whole sequence. The last part is about bf16: attention scores are
fp32, so that a constant in all of them costs no precision.

    python -m pytest tests/test_cache.py
"""

import copy
import math

import pytest
import torch
from conftest import FAMILIES, close, oracle_logits, random_model
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from folder import load
from losses import response_logps
from model import Decoder, Packed
from run import UserError
from sample import Cache, Decode, Prefill, SharedPrefill, Sampling, generate

IDS = torch.randint(320, (200,), generator=torch.Generator().manual_seed(0))


def cache_of(model: Decoder, slots: int, length: int, root: Tensor = IDS[:0]) -> Cache:
    """An empty cache, in the model's type, whose slots all continue the root's tokens."""
    cache = Cache(model.config, slots, length, len(root), model.compute)
    if len(root):
        with torch.no_grad():
            model(root, SharedPrefill(cache))
    return cache


@torch.no_grad()
def prefill(model: Decoder, cache: Cache, prompts: list[Tensor], slots: list[list[int]],
            common: int = 0) -> Tensor:
    """Feed prompts, whose first `common` tokens are alike, into slots of their own. Logits of all tokens that
    were fed: of those in common, then of the rest of each prompt."""
    layout = Prefill(cache, [len(prompt) for prompt in prompts], slots, common)
    ids = torch.cat([prompts[0][:common], *(prompt[common:] for prompt in prompts)])
    for prompt, group in zip(prompts, slots, strict=True):
        cache.lengths[group] = len(prompt)
    return model.logits(model(ids, layout))


@torch.no_grad()
def decode(model: Decoder, cache: Cache, tokens: Tensor) -> Tensor:
    """Logits (n, V) after one more token for each of the first n slots."""
    logits = model.logits(model(tokens, Decode(cache, len(tokens))))
    cache.lengths[: len(tokens)] += 1
    return logits


def test_a_model_of_nan_is_one_line():
    """Whether its tokens are drawn from all, from a nucleus, or the likeliest is taken."""
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for sampling in (Sampling(1.0, 1.0, 4), Sampling(1.0, 0.9, 4), Sampling(0.0, 1.0, 4)):
        with pytest.raises(UserError, match="log-probs are not numbers"):
            generate(model, [[1, 2, 3]] * 3, sampling, frozenset(), seed=0)


# ------------------------------------------------------------------------- one full pass

@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token_is_one_pass(saved, name):
    """Fed through a cache one at a time, 40 tokens have the logits of one full pass of transformers'."""
    folder, oracle = saved(name)
    model = load(folder)
    cache = cache_of(model, 1, 40)
    steps = [decode(model, cache, token[None]) for token in IDS[:40]]
    close(torch.cat(steps), oracle_logits(oracle, IDS[:40]))


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_of_different_lengths_step_together(saved, name):
    """Two slots, one seven tokens behind, each see their own past alone."""
    folder, oracle = saved(name)
    model, a, b = load(folder), IDS[:20], IDS[30:43]
    cache, steps = cache_of(model, 2, 24), []
    for i in range(20):
        late = max(i - 7, 0)
        steps.append(decode(model, cache, torch.stack((a[i], b[late]))))
        cache.lengths[1] = max(i - 6, 0)  # until the second has begun, its slot is written over
    close(torch.stack([logits[0] for logits in steps]), oracle_logits(oracle, a))
    close(torch.stack([logits[1] for logits in steps[7:]]), oracle_logits(oracle, b))


@pytest.mark.parametrize("common", [0, 2])
@pytest.mark.parametrize("shared_length", [0, 1, 6])
def test_prefilled_slots_continue(saved, shared_length, common):
    """Prompts packed into slots (one of them into two), after a root or none, with a beginning in common or
    none, continue as if every token had been fed at once."""
    folder, oracle = saved("qwen3")
    model, rest = load(folder), IDS[100:106]
    root = IDS[50 : 50 + shared_length]
    prompts = [IDS[:9], torch.cat((IDS[:common], IDS[20 : 24 - common]))]
    cache = cache_of(model, 4, 40, root)
    fed = prefill(model, cache, prompts, [[2], [0, 3]], common)
    expected = [oracle_logits(oracle, torch.cat((root, prompt, rest))) for prompt in (*prompts, IDS[:0])]
    close(fed[:9], expected[0][shared_length : shared_length + 9])
    close(fed[9:], expected[1][shared_length + common : shared_length + 4])

    steps = torch.stack([decode(model, cache, token.expand(4)) for token in rest])  # (6, 4, V)
    for slot, which in ((2, 0), (0, 1), (3, 1), (1, 2)):
        close(steps[:, slot], expected[which][-len(rest) :])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_root_changes_no_logit(saved, name):
    """The same tokens with 70 of them in the root, 1 or none: prefilled and decoded, all logits agree with
    one full pass."""
    folder, oracle = saved(name)
    model, ids = load(folder), IDS[:90]
    expected = oracle_logits(oracle, ids)
    for shared_length in (0, 1, 70):
        cache = cache_of(model, 2, 128, ids[:shared_length])
        fed = prefill(model, cache, [ids[shared_length:80]], [[0, 1]])
        close(fed, expected[shared_length:80])
        for i in range(80, 90):
            logits = decode(model, cache, ids[i].expand(2))
            close(logits, expected[i].expand(2, -1))


@pytest.mark.parametrize("shared_length", [0, 5])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decoding_step_can_be_recorded(saved, name, shared_length):
    """Traced once, the operations of a step give later steps too: they depend on tensors that are written in
    place (what was fed, how long each slot is) and on no number read from them, as a CUDA graph must."""
    model = load(saved(name)[0])
    traced, plain = (cache_of(model, 3, 16, IDS[50 : 50 + shared_length]) for _ in range(2))
    latest = IDS[:3].clone()

    def step(cache: Cache) -> Tensor:
        return model.logits(model(latest, Decode(cache, 3)))

    with torch.no_grad():
        recorded = make_fx(lambda: step(traced))()
        for i in range(6):
            latest.copy_(IDS[3 * i : 3 * i + 3])
            torch.testing.assert_close(recorded(), step(plain))
            for cache in (traced, plain):
                cache.lengths += torch.tensor([1, 2, i % 2])


# ------------------------------------------------------------------------- a cache can't be written wrongly

def test_a_reused_slot_forgets(saved):
    """A slot of length 0 gives the logits of a fresh one, whatever its cache still holds."""
    folder, oracle = saved("llama")
    model = load(folder)
    cache = cache_of(model, 1, 16)
    cache.k.fill_(1e3)
    cache.v.fill_(1e3)
    close(decode(model, cache, IDS[:1]), oracle_logits(oracle, IDS[:1]))


@pytest.mark.parametrize("shared_length", [0, 5])
def test_garbage_beyond_a_slots_length_is_masked(saved, shared_length):
    """Keys and values of 1e4 at every place that a slot has not come to, on either side of other slots:
    not a bit of the logits changes, step after step."""
    model = load(saved("qwen2")[0])
    clean = cache_of(model, 3, 32, IDS[:shared_length])
    prefill(model, clean, [IDS[10:19], IDS[20:24]], [[0], [2]])
    dirty = copy.deepcopy(clean)
    for slot, length in enumerate(dirty.lengths.tolist()):
        dirty.k[:, slot, :, length:] = 1e4
        dirty.v[:, slot, :, :, length:] = 1e4
    for i in range(5):
        tokens = IDS[30 + 3 * i : 33 + 3 * i]
        assert torch.equal(decode(model, dirty, tokens), decode(model, clean, tokens))


def test_a_layer_written_twice_is_written_once():
    """Tokens of slots and of the root: the second writing takes the first one's place in its layer, and
    no other layer, slot, place or length changes."""
    model = random_model(num_hidden_layers=3)
    shape = (4, 2, 16)  # (n, G, D)
    first, second = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    once, twice = (cache_of(model, 3, 8, IDS[:4]) for _ in range(2))
    slots, places = torch.tensor([0, 2, 2, 0]), torch.tensor([0, 3, 1, 1])
    twice.write(1, slots, places, first, first)
    for cache in (once, twice):
        cache.write(1, slots, places, second, second)
    SharedPrefill(twice).keep(2, first, first)
    for cache in (once, twice):
        SharedPrefill(cache).keep(2, second, second)
    for name in ("k", "v", "shared_k", "shared_v", "lengths"):
        a, b = getattr(once, name), getattr(twice, name)
        assert torch.equal(a, b) and (name == "lengths" or len(b) == 3)
    assert not twice.k[[0, 2]].any() and not twice.v[[0, 2]].any() and twice.shared_k[2].any()
    for token, (slot, place) in enumerate(zip(slots.tolist(), places.tolist(), strict=True)):
        assert twice.k[1, slot, :, place].equal(second[token])
        assert twice.v[1, slot, :, :, place].equal(second[token])
        twice.k[1, slot, :, place] = 0
    assert not twice.k.any()


def test_writing_a_slot_leaves_the_others(saved):
    """Prefilling one slot anew, while others are at work, changes none of what those hold."""
    model = load(saved("llama")[0])
    cache = cache_of(model, 3, 32)
    prefill(model, cache, [IDS[:9], IDS[20:24], IDS[30:35]], [[0], [1], [2]])
    before = copy.deepcopy(cache)
    prefill(model, cache, [IDS[40:52]], [[1]])
    others = [0, 2]
    assert torch.equal(cache.k[:, others], before.k[:, others])
    assert torch.equal(cache.v[:, others], before.v[:, others])
    assert cache.lengths.tolist() == [9, 12, 5]


def test_moved_slots_go_on(saved):
    """A slot that has moved into another's place gives the logits that it gave where it was."""
    model = load(saved("llama")[0])
    moved, still = (cache_of(model, 4, 32, IDS[:3]) for _ in range(2))
    for cache in (moved, still):
        prefill(model, cache, [IDS[:9], IDS[20:24]], [[0, 1], [2, 3]])
    moved.move(torch.tensor([3]), torch.tensor([0]))
    assert moved.lengths.tolist() == [4, 9, 4, 4]
    close(decode(model, moved, IDS[50:51]), decode(model, still, IDS[50:51].expand(4))[3:], atol=1e-5)


# ------------------------------------------------------------------------- scores in fp32

def model_with_offsets(score: float) -> Decoder:
    """A tiny bf16 Qwen2 whose query and key biases add `score` to every attention score.

    One pair of channels of every head holds nothing but the bias. It is the pair that turns slowest, by less
    than 1e-3 over the positions used here, so that all scores are shifted alike: in exact arithmetic the
    softmax does not see it. Qwen2's own keys hold large constants in such channels.
    """
    model = random_model(scale=0.25, model_type="qwen2", rope_theta=1e6, num_hidden_layers=3)
    size = model.config.head_dim
    channels = [size // 2 - 1, size - 1]  # the slowest pair
    for block in model.model.layers:
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
            weight = projection.weight.data.unflatten(0, (-1, size))  # (heads, D, E)
            bias = projection.bias.data.unflatten(0, (-1, size))  # (heads, D)
            weight[:, channels] = 0
            projection.bias.data.zero_()
            bias[:, channels] = math.sqrt(score * size**0.5 / 2)
        block.self_attn.v_proj.bias.data.zero_()
    return model.bfloat16()


def prompts_with(shared_length: int) -> list[list[int]]:
    """Sixteen prompts of 10 tokens each after a beginning that all of them share."""
    root = IDS[:shared_length].tolist()
    return [root + IDS[70 + 7 * i : 80 + 7 * i].tolist() for i in range(16)]


@torch.no_grad()
def bf16_errors(score: float, shared_length: int) -> tuple[float, float]:
    """How far bf16 log-probs are from fp64's on the same ids, root mean square over tokens: those that the
    sampler gives with its samples, and those of a scoring pass."""
    model = model_with_offsets(score)
    exact = copy.deepcopy(model).double()
    prompts = prompts_with(shared_length)
    samples = generate(model, prompts, Sampling(1.0, 1.0, 8), frozenset(), seed=0)
    groups = [(prompt, [sample.ids]) for prompt, sample in zip(prompts, samples, strict=True)]
    sampled = torch.tensor([sample.logps for sample in samples])
    scored, expected = (torch.stack([logps for (logps,) in response_logps(m, groups)])
                        for m in (model, exact))
    return tuple((logps - expected).square().mean().sqrt().item() for logps in (sampled, scored))


@pytest.mark.parametrize("shared_length", [0, 64])
def test_offsets_do_not_show_in_exact_arithmetic(shared_length):
    """The model above is what it claims to be: its scores are shifted, and in fp64 its logits are not."""
    ids = torch.tensor(prompts_with(shared_length)[0])
    plain, offset = (model_with_offsets(score).double() for score in (0, 400))
    with torch.no_grad():
        logits = [m.logits(m(ids, Packed([(len(ids), [])]))) for m in (plain, offset)]
        q, k = (projection.bias.view(-1, 16) for projection in
                (offset.model.layers[0].self_attn.q_proj, offset.model.layers[0].self_attn.k_proj))
    assert ((q[0] * k[0]).sum() / 4).item() == pytest.approx(400, rel=0.01)
    close(*logits, atol=1e-3)


@pytest.mark.parametrize("score", [20, 100, 400])
@pytest.mark.parametrize("shared_length", [0, 64])
def test_offset_keys_cost_bf16_no_precision(score, shared_length):
    """Log-probs of samples and of a scoring pass are at most half as far again from fp64 as they are without
    offsets. With scores in bf16 they are twice as far at 20 and ten times at 400."""
    without, with_offset = bf16_errors(0, shared_length), bf16_errors(score, shared_length)
    for error, least in zip(with_offset, without, strict=True):
        assert 0.005 < least < 0.1
        assert error < 1.5 * least
