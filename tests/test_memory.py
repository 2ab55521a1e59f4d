"""memory.py against what autograd keeps, the optimizer's and the cache's own tensors, and measured runs.

MEASURED: peak memory of SmolLM2-135M-Instruct on one thread of a CPU, glibc 2.36, torch 2.13. The rows marked
True are those that PROGRAM, HOLES and FILLED were fitted on.
"""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG, kept_bytes, random_model, random_pairs

import fast
from config import Config
from fast import LOGITS_AT_ONCE
from lora import add_adapters
from losses import response_logps
import memory
import train
from memory import (Pass, Sizes, activation_bytes, cache_bytes, cards_needed, out_of_reach, peak,
                    predicted_memory, require_fit)
from optimizer import MasterAdamW
from run import UserError
from sample import Cache

SMOLLM2 = dict(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_70B = dict(
    model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
CARD = 141e9
GROUPS = [(pair.prompt_ids, [response.ids for response in pair.responses])
          for pair in random_pairs(30, rejected=2)]


@dataclass(frozen=True)
class Settings:
    """The arguments of a run that memory depends on."""

    dtype: str = "float32"
    save_dtype: str = "float32"
    lora_rank: int = 0
    checkpoint_activations: bool = False
    shard: bool = False
    slots: int = 0
    max_new_tokens: int = 8
    pass_tokens: int = 8192
    method: str = "dpo"


# ------------------------------------------------------------------------- parts, one by one

ARCHITECTURES = dict(
    llama=dict(),
    wide=dict(num_hidden_layers=5, intermediate_size=400, num_key_value_heads=1),
    qwen3=dict(model_type="qwen3", tie_word_embeddings=False),
    qwen2=dict(model_type="qwen2"),
)
KINDS = (Settings(), Settings(checkpoint_activations=True), Settings(lora_rank=8), Settings(dtype="bfloat16"))


@pytest.mark.parametrize("settings", KINDS, ids=["plain", "checkpoint", "lora", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_are_what_autograd_keeps(name, settings):
    """Within 3%: left out are ids, masks, and what the first block need not keep where all is frozen."""
    model = random_model(**ARCHITECTURES[name]).to(getattr(torch, settings.dtype))
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank, 16, seed=0)
    model.checkpoint_activations = settings.checkpoint_activations
    kept = kept_bytes(model, lambda: response_logps(model, GROUPS)[0][0])
    predicted = activation_bytes(model.config, settings, Pass.of(GROUPS), "cpu")
    predicted -= 2 * LOGITS_AT_ONCE["cpu"] * getattr(torch, settings.dtype).itemsize  # not kept
    if settings.checkpoint_activations:  # and neither is the one block that is being computed again
        fewer = replace(model.config, num_hidden_layers=model.config.num_hidden_layers - 1)
        predicted -= (activation_bytes(model.config, Settings(), Pass.of(GROUPS), "cpu")
                      - activation_bytes(fewer, Settings(), Pass.of(GROUPS), "cpu"))
    assert predicted == pytest.approx(kept, rel=0.03)


def test_a_pass_has_the_tokens_that_are_fed():
    """A root of two, prefixes of three and one beside it, responses without their last tokens."""
    groups = [([5, 6, 7, 8, 9], [[1, 2, 3], [4]]), ([5, 6, 1], [[2, 2]])]
    assert Pass.of(groups) == Pass([(5, [3, 1]), (3, [2])], root=2)
    assert Pass.of(groups).parts() == [(2, 2), (3, 5), (2, 7), (1, 3), (1, 4)]
    assert Pass.of(groups).tokens() == 9 and Pass.of(groups).predicted() == 6


@pytest.mark.parametrize("settings", [Settings(), Settings(dtype="bfloat16"), Settings(lora_rank=8)],
                         ids=["plain", "bfloat16", "lora"])
def test_weights_and_optimizer_are_their_tensors(settings):
    """Within 2%: norms are in fp32 where matrices are not."""
    model = random_model(num_hidden_layers=3).to(getattr(torch, settings.dtype))
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank, 16, seed=0)
    optimizer = MasterAdamW(model, 1e-3, seed=0)
    parts = predicted_memory(model.config, settings, [Pass.of(GROUPS)], prompt=0)
    assert parts["weights"] == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.02)
    state = [value for moments in optimizer.adamw.state.values() for value in moments.values()]
    masters = [m for m, w in zip(optimizer.masters, optimizer.weights, strict=True) if m is not w]
    assert parts["optimizer"] == pytest.approx(sum(t.nbytes for t in [*state, *masters]), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_its_tensors(dtype):
    """Keys and values of all slots; keys are in fp32 on a CPU."""
    config = Config.from_dict(CONFIG)
    settings = Settings(dtype=dtype, slots=5, max_new_tokens=30)
    cache = Cache(config, 5, 128, 0, getattr(torch, dtype))
    own = cache.k.nbytes + cache.v.nbytes + 5 * 4 * 4 * config.vocab_size
    assert cache_bytes(config, settings, prompt=70, device="cpu") == own
    assert cache_bytes(config, settings, prompt=0, device="cpu") == 0
    narrower = cache_bytes(config, settings, prompt=70, device="cuda")
    assert narrower == own if settings.dtype == "float32" else narrower < own  # bf16 keys too
    other = SimpleNamespace(**{**vars(config), "head_dim": 96})  # for which there is no kernel
    assert cache_bytes(other, settings, prompt=70, device="cuda") == cache_bytes(
        other, settings, prompt=70, device="cpu")


def test_shared_parts_are_divided_among_processes():
    """Four processes hold a quarter of weights, moments and the adapters' gradients each, and their own pass.
    """
    config, settings = Config.from_dict(LLAMA_70B), Settings("bfloat16", lora_rank=32, shard=True)
    one, four = (predicted_memory(config, settings, [Pass([(64, [64])])], 0, n, "cuda") for n in (1, 4))
    for name, value in one.items():
        divided = name in ("weights", "optimizer", "gradients")
        assert four[name] == pytest.approx(value / 4 if divided else value)


# ------------------------------------------------------------------------- whole runs

ONE = [(64, [32, 32])]
TWO = [(128, [96, 96]), (128, [96, 96])]
CHECKPOINT = dict(checkpoint_activations=True)
BF16 = dict(dtype="bfloat16", save_dtype="bfloat16")
# The groups of a pass and passes a step; settings, "prompt": tokens of sampled ones, "saved": whether the run
# saved its model; measured GB; whether the constants were fitted on it.
MEASURED = [
    (TWO, 1, dict(), 3.301, True),
    (TWO, 1, CHECKPOINT, 2.984, True),
    (ONE, 3, dict(), 3.115, True),
    ([(100, [80, 80]), (90, [70, 70])], 2, dict(), 3.836, True),
    ([(100, [80, 80])], 2, dict(lora_rank=16), 1.738, True),
    (TWO, 1, CHECKPOINT | dict(lora_rank=32), 1.614, True),
    (TWO, 2, CHECKPOINT | dict(lora_rank=16), 2.107, True),
    ([(60, [50, 50])], 2, dict(lora_rank=8, slots=24, max_new_tokens=30, prompt=90), 1.604, True),
    ([(256, [256])], 1, dict(), 3.256, False),
    (ONE, 1, dict(slots=16, max_new_tokens=48, prompt=100), 2.997, False),
    (ONE, 1, dict(saved=True), 2.847, False),
    (ONE, 1, dict(saved=True, save_dtype="bfloat16"), 3.121, False),
    (ONE, 1, dict(saved=True, lora_rank=32), 1.622, False),
    (ONE, 1, dict(saved=True, lora_rank=32, save_dtype="bfloat16", slots=8, max_new_tokens=40, prompt=60),
     2.217, False),
    ([(200, [56])], 1, CHECKPOINT | dict(lora_rank=8), 1.222, False),
    (TWO, 1, dict(lora_rank=32), 2.075, False),
    ([(150, [60, 60])], 2, CHECKPOINT, 3.054, False),
    ([(90, [60, 60])], 3, CHECKPOINT | dict(lora_rank=32), 1.392, False),
    ([(120, [90, 90])], 2, dict(lora_rank=4), 1.770, False),
    ([(140, [110, 110])], 2, CHECKPOINT, 3.087, False),
    ([(20, [12, 12])], 1, BF16 | dict(lora_rank=32), 0.890, False),
    ([(16, [10, 10])], 1, BF16, 3.297, False),
]


@pytest.mark.parametrize(("groups", "passes", "changes", "measured", "fitted"), MEASURED)
def test_the_peak_is_predicted_within_15_percent(groups, passes, changes, measured, fitted):
    """Full and LoRA, checkpointed or not, in fp32 and bf16, with sampling and saving; 5% where fitted."""
    run = dict(prompt=0, saved=False) | changes
    prompt, is_saved = run.pop("prompt"), run.pop("saved")
    parts = predicted_memory(Config.from_dict(SMOLLM2), Settings(**run), [Pass(groups)] * passes, prompt)
    if not is_saved:
        parts["copies"] = 0.0
    assert peak(parts) / 1e9 == pytest.approx(measured, rel=0.05 if fitted else 0.15)


# ------------------------------------------------------------------------- many cards

def test_llama_70b_takes_two_cards_with_adapters():
    """Sharded, rank 32, checkpointed, 8,176 tokens a pass; one card of 141 GB holds not even the weights."""
    config = Config.from_dict(LLAMA_70B)
    settings = Settings("bfloat16", "bfloat16", lora_rank=32, checkpoint_activations=True, shard=True)
    passes = [Pass([(512, [256, 256])] * 8)] * 2
    assert Sizes.of(config, 32) == Sizes(70_553_706_496, 855_654_400, 2_101_354_496, 414_187_520)
    assert cards_needed(config, settings, passes, CARD) == 2
    assert cards_needed(config, replace(settings, checkpoint_activations=False), passes, CARD) is None
    full = cards_needed(config, replace(settings, lora_rank=0), passes, CARD)
    assert 70.6 * 18 / 141 < full < 16
    sampling, measuring = out_of_reach(config, settings, CARD)
    assert "141.1 GB" in sampling and "--pairs" in sampling and "282.2 GB" in measuring


def test_a_small_model_is_within_reach():
    """One card, and nothing that it can't do."""
    config, settings = Config.from_dict(SMOLLM2), Settings("bfloat16", "bfloat16", shard=True)
    assert cards_needed(config, settings, [Pass(TWO)], CARD) == 1
    assert out_of_reach(config, settings, CARD) == []


# ------------------------------------------------------------------------- a model that cannot fit

QWEN_1B = dict(
    model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True,
)  # fmt: skip
TRAINED = Settings("bfloat16", "bfloat16")


@pytest.fixture
def card(monkeypatch):
    """size -> this process has a GPU of so many bytes."""
    def give(size: float) -> None:
        monkeypatch.setattr(memory, "default_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda device: SimpleNamespace(total_memory=int(size)))
    return give


def test_a_model_that_cannot_be_trained_is_refused_with_the_arithmetic(card):
    """1.54 billion weights of 18 bytes do not fit on 24 GB: adapters do, and so do three such cards."""
    config = Config.from_dict(QWEN_1B)
    card(24e9)
    with pytest.raises(UserError) as e:
        require_fit(TRAINED, config, "Qwen/Qwen2.5-1.5B-Instruct")
    said = str(e.value)
    assert said.startswith("Qwen/Qwen2.5-1.5B-Instruct: training takes 28.7 GB on every GPU (weights 3.1 GB, "
                           "gradients 7.1 GB, optimizer 18.5 GB), and this one has 24.0 GB: ")
    assert re.search(r"give --lora-rank 32, which takes \d\.\d GB and a pass", said)
    assert said.endswith("or take at least 2 GPUs, with torchrun and --shard") and "\n" not in said
    require_fit(replace(TRAINED, lora_rank=32), config, "")


def test_ppo_takes_a_critic_and_a_reference_beside_the_model(card):
    """The same 1.54 billion weights: two trained models of 18 bytes and, without adapters, one of 2 more."""
    config = Config.from_dict(QWEN_1B)
    ppo = replace(TRAINED, method="ppo-mi")
    card(48e9)
    require_fit(TRAINED, config, "")
    with pytest.raises(UserError, match=r"weights 9.3 GB, gradients 13.3 GB, optimizer 37.0 GB"):
        require_fit(ppo, config, "")
    adapters = [predicted_memory(config, replace(args, lora_rank=32), [Pass([(1, [1])])], 0, device="cuda")
                for args in (TRAINED, ppo)]
    assert adapters[1]["weights"] == 2 * adapters[0]["weights"]  # no reference


def test_what_ppo_samples_with_stays_while_it_trains():
    """On a GPU its cache stands beside the training step, where DPO's has gone; with --shard so do copies of
    actor and reference, which no number of cards makes smaller."""
    config, passes = Config.from_dict(QWEN_1B), [Pass([(500, [500])])]
    largest = {}
    for method in ("dpo", "ppo-mi"):
        few, many = (replace(TRAINED, method=method, slots=slots) for slots in (1, 128))
        bytes_of = [peak(predicted_memory(config, args, passes, 768, device="cuda"), "cuda")
                    for args in (few, many)]
        largest[method] = bytes_of[1] - bytes_of[0]
    caches = [cache_bytes(config, replace(TRAINED, slots=slots), 768, "cuda") for slots in (1, 128)]
    assert largest["dpo"] == 0 and largest["ppo-mi"] == pytest.approx(caches[1] - caches[0])
    on_cpu = [peak(predicted_memory(config, replace(TRAINED, method="ppo-mi", slots=slots), passes, 768))
              for slots in (1, 128)]
    of_cache = [cache_bytes(config, replace(TRAINED, slots=slots), 768, "cpu") for slots in (1, 128)]
    assert on_cpu[1] - on_cpu[0] == pytest.approx(of_cache[1] - of_cache[0])  # once
    sharded = replace(TRAINED, method="ppo-mi", shard=True, slots=1)
    parts = predicted_memory(config, sharded, passes, 768, processes=64, device="cuda")
    assert parts["sampler"] == pytest.approx(2 * 2 * Sizes.of(config, 0).total + caches[0])
    assert cards_needed(config, sharded, passes, 4e9) is None


def test_attention_in_fp32_on_a_gpu_keeps_its_tables():
    """Where query heads share keys no fused kernel takes them. PyTorch then keeps the weights, and k and v of
    every head: counted on its own plain form."""
    config = Config.from_dict(QWEN_1B)
    one_head_each = Config.from_dict(QWEN_1B | dict(num_key_value_heads=12))
    args, largest = Settings(), Pass([(300, [])])
    more = [activation_bytes(c, args, largest, "cuda") - activation_bytes(c, args, largest, "cpu")
            for c in (config, one_head_each)]
    tables = 28 * 4 * (12 * 300 * 300 + 2 * 300 * 12 * 128)
    assert more[0] - more[1] == pytest.approx(tables)


def test_a_model_that_fits_nowhere_is_told_so(card):
    """70 billion weights on cards of 4 GB, with adapters already: no number of them is enough."""
    card(4e9)
    with pytest.raises(UserError, match="take GPUs with more memory, or a smaller model"):
        require_fit(replace(TRAINED, lora_rank=32), Config.from_dict(LLAMA_70B), "")


def test_a_pass_that_may_be_too_large_is_warned_of(card, capsys):
    """What every step keeps fits on 40 GB; a full pass of 8,192 tokens beside it may not. On 80 GB it does.
    """
    config = Config.from_dict(QWEN_1B)
    card(40e9)
    require_fit(TRAINED, config, "")
    assert re.search(r"warning: a pass of --pass-tokens 8192 takes about [\d.]+ GB beside 28.7 GB",
                     capsys.readouterr().out)
    require_fit(replace(TRAINED, pass_tokens=256), config, "")
    card(80e9)
    require_fit(TRAINED, config, "")
    assert capsys.readouterr().out == ""


def test_a_cpu_is_not_asked(monkeypatch):
    """Whatever the model."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    require_fit(TRAINED, Config.from_dict(LLAMA_70B), "")


def test_a_model_that_cannot_fit_is_refused_before_anything_is_sampled(card, call_train, monkeypatch, work):
    """By train.py, which has made no run folder then."""
    card(1e6)
    monkeypatch.setattr(train, "run_training", None)
    with pytest.raises(UserError, match=r"training takes .* on every GPU .* has 0\.001 GB"):
        call_train()
    assert not list(work.rglob("args.json"))


def test_the_optimizer_is_there_while_pairs_are_sampled():
    """On a GPU the peak of sampling counts masters and moments, which are made before."""
    parts = dict.fromkeys(("program", "gradients", "activations", "heap", "copies", "file"), 0.0)
    assert peak(parts | dict(weights=3.0, optimizer=18.0, cache=30.0), "cuda") == 51.0


def test_a_gpu_keeps_what_autograd_keeps(monkeypatch):
    """With all keys that each part sees side by side, in bf16, within 3%."""
    monkeypatch.setattr(fast, "runs_flash", lambda x: True)
    monkeypatch.setattr(fast, "packed_attention", lambda q, k, v, seen: PackedStandIn.apply(
        q, k.index_select(0, seen.tokens), v.index_select(0, seen.tokens)))
    model = random_model().bfloat16()
    kept = kept_bytes(model, lambda: response_logps(model, GROUPS)[0][0])
    predicted = activation_bytes(model.config, Settings("bfloat16"), Pass.of(GROUPS), "cuda")
    assert predicted - 2 * LOGITS_AT_ONCE["cuda"] * 2 == pytest.approx(kept, rel=0.03)


class PackedStandIn(torch.autograd.Function):
    """Keeps what PyTorch's kernel keeps: its arguments, its output, an fp32 sum for each head and query."""

    @staticmethod
    def forward(ctx, q, k, v):
        """The queries, as an output."""
        out, sums = q.clone(), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out
