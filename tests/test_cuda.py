"""What runs on a GPU alone, as far as it can be checked without one.

PyTorch's kernel for attention over packed sequences gets a plain stand-in for CPUs, below its public function
and its autograd: so its arguments and its results are checked. The device "meta" stands for a GPU where
launches are counted: it has shapes and no memory, every operation on it is one launch (a view is none), what
comes from main memory is seen, and reading a number, for which a GPU would stop the host, raises. That a
kernel is right or fast on a GPU, or can be captured in a graph, is not seen here.

    python -m pytest tests/test_cuda.py
"""

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import CONFIG, FAMILIES, ROOT, child_environment, random_model, random_pairs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import varlen
from torch.utils._python_dispatch import (
    TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack)
from torch.utils._pytree import tree_leaves

import fast
import gpu_kernels
import optimizer as optimizer_module
import run
import train
from batches import training_rows
from config import Config
from folder import load
from losses import OBJECTIVES, response_logps
from model import Decoder, Packed, rotary_tables
from optimizer import MasterAdamW, gradient_norm
from sample import Cache, Decode, Prefill, Sampling, SharedPrefill, generate
from training_log import Metrics

IDS = torch.randint(320, (200,), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------- a stand-in for the kernel

def sequences(query_ends: Tensor, key_ends: Tensor) -> list[tuple[slice, slice]]:
    """Of each sequence, where its queries and its keys stand."""
    queries, keys = ([slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
                     for ends in (query_ends, key_ends))
    return list(zip(queries, keys, strict=True))


def weights(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """The masked softmax of one sequence, whose queries are the last of what they see. (H, m, n)"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (n, H, D)
    scores = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[-1] ** -0.5
    m, n = scores.shape[1:]
    later = torch.ones(m, n, dtype=torch.bool).triu(n - m + 1)
    return scores.masked_fill(later, -math.inf).softmax(-1) if is_causal else scores.softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def forward_stand_in(q, k, v, query_ends, key_ends, most_queries, most_keys, is_causal=False, scale=None,
                     *rest):
    """One product after another; what a GPU would read without looking is checked."""
    assert query_ends.dtype == key_ends.dtype == torch.int32 and query_ends[0] == key_ends[0] == 0
    assert most_queries == query_ends.diff().max() and most_keys == key_ends.diff().max()
    assert len(q) == query_ends[-1] and len(k) == len(v) == key_ends[-1]
    out = torch.empty_like(q)
    for rows, keys in sequences(query_ends, key_ends):
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[rows] = torch.einsum("hmn,nhd->mhd", weights(q[rows], k[keys], is_causal), values)
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float), q.new_zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward_stand_in(grad, q, k, v, out, lse, query_ends, key_ends, most_queries, most_keys, is_causal,
                      *rest):
    """The same by hand: autograd is off where PyTorch calls a kernel."""
    shared = q.shape[1] // k.shape[1]  # query heads that use one key head
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
    for rows, keys in sequences(query_ends, key_ends):
        p = weights(q[rows], k[keys], is_causal)  # (H, m, n)
        part_k, part_v = (x[keys].repeat_interleave(shared, dim=1) for x in (k, v))  # (n, H, D)
        d_p = torch.einsum("mhd,nhd->hmn", grad[rows], part_v)
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        d_q[rows] = torch.einsum("hmn,nhd->mhd", d_scores, part_k)
        d_k[keys] += torch.einsum("hmn,mhd->nhd", d_scores, q[rows]).unflatten(1, (-1, shared)).sum(2)
        d_v[keys] += torch.einsum("hmn,mhd->nhd", p, grad[rows]).unflatten(1, (-1, shared)).sum(2)
    return d_q, d_k, d_v


@pytest.fixture
def flash(monkeypatch):
    """Attention is computed as on a GPU."""
    monkeypatch.setattr(fast, "runs_flash", lambda x: True)


# ------------------------------------------------------------------------- what is set at the start

def test_cudnn_attention_is_off_in_every_program(capsys):
    """Whatever it was before: each program starts with the same settings."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert run.outcome(lambda: None) == (0, "")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("device", "capability", "dtype", "size", "runs"), [
    ("cuda", (9, 0), torch.bfloat16, 128, True), ("cuda", (8, 0), torch.float16, 64, True),
    ("cuda", (7, 5), torch.float16, 64, False), ("cuda", (9, 0), torch.float32, 64, False),
    ("cuda", (9, 0), torch.bfloat16, 60, False), ("cuda", (9, 0), torch.bfloat16, 264, False),
    ("cpu", (9, 0), torch.bfloat16, 128, False), ("cuda", (9, 0), torch.bfloat16, 256, True),
])  # fmt: skip
def test_the_kernel_is_used_where_it_exists(device, capability, dtype, size, runs, monkeypatch):
    """In 16 bits, on Ampere GPUs and later, for heads of at most 256 channels in eights."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(3, 2, size, dtype=dtype, device=device)
    assert fast.runs_flash(x) == runs


# ------------------------------------------------------------------------- attention for all parts at once

SHAPES = {
    "one": ([(5, [])], 0), "group": ([(4, [3, 1, 5])], 0), "groups": ([(2, [2, 1]), (6, [4]), (3, [])], 0),
    "root": ([(2, [2, 1]), (3, [4, 4]), (1, [])], 5), "empty_responses": ([(3, [0, 2, 0]), (2, [0])], 2),
}  # fmt: skip


class PackedAfter(Packed):
    """Packed, after some tokens whose keys and values are given."""

    def past_keys(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Those given."""
        return self.given


def attended(shapes: list, root: int, past: int) -> list[Tensor]:
    """The output of Packed.attend in fp64 for four query and two key heads, and the gradient of q, k, v and
    the past's keys and values."""
    rng = torch.Generator().manual_seed(0)
    layout = PackedAfter(shapes, root, past)
    tokens = len(layout.positions)
    sizes = [(tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 8), (2, past, 8), (2, past, 8)]
    leaves = [torch.randn(size, generator=rng, dtype=torch.float64).requires_grad_() for size in sizes]
    layout.given = tuple(leaves[3:]) if past else None
    out = layout.attend(0, *leaves[:3])
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize(("shapes", "root"), SHAPES.values(), ids=SHAPES)
def test_all_parts_at_once_are_part_by_part(shapes, root, past, monkeypatch):
    """Values and gradients in fp64: a root, groups, empty responses, and a past before all of them."""
    expected = attended(shapes, root, past)
    monkeypatch.setattr(fast, "runs_flash", lambda x: True)
    found = attended(shapes, root, past)
    assert len(found) == len(expected) == (6 if past else 4)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_seen_keys_are_those_of_the_docstring():
    """Packed's example, a prefix of two tokens and responses of two and one, after a past of one token."""
    layout = Packed([(2, [2, 1])], past=1)
    seen = layout.seen_keys
    assert layout.seen_keys is seen  # all layers use the same one
    assert seen.tokens.tolist() == [*range(3), *range(5), *range(3), 5]
    assert seen.query_ends.tolist() == [0, 2, 4, 5] and seen.key_ends.tolist() == [0, 3, 8, 12]
    assert (seen.most_queries, seen.most_keys) == (2, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_the_same(saved, name, monkeypatch):
    """Of a whole model in fp64, over pairs with a common beginning and responses of one token."""
    groups = [([5, 6, 7, 8], [[1, 2, 3], [4]]), ([5, 6, 9], [[2, 2], [3]])]
    results = []
    for runs_flash in (True, False):
        monkeypatch.setattr(fast, "runs_flash", lambda x, answer=runs_flash: answer)
        model = load(saved(name)[0], torch.float64)
        logps = torch.cat([each for responses in response_logps(model, groups) for each in responses])
        logps.square().sum().backward()
        results.append([logps.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("alike", [3, 70])
def test_text_is_the_same(tiny, alike, monkeypatch):
    """With prompts prefilled at once: a beginning in common, several slots of one prompt, slots that are used
    again and closed up. The same ids, and log-probs to rounding."""
    model, s = load(tiny), Sampling(1.0, 1.0, 8)
    prompts = [[5 + i % 200 for i in range(alike)] + [9, *IDS[i : i + 2 + i % 5].tolist()] for i in range(12)]
    prompts += prompts[:6]
    results = []
    for runs_flash in (True, False):
        monkeypatch.setattr(fast, "runs_flash", lambda x, answer=runs_flash: answer)
        results.append(generate(model, prompts, s, frozenset(range(40)), 0, slots=7))
    for a, b in zip(*results, strict=True):
        assert a.ids == b.ids and a.finished == b.finished
        torch.testing.assert_close(a.logps, b.logps, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------- launches

NO_LAUNCH = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view"}
FORWARD, BACKWARD, DECODING, PREFILLING = 17, 31, 15, 23  # a layer's launches in bf16


class Launches(TorchDispatchMode):
    """Counts what runs on a device, and what comes there from another, by name."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = device
        self.launches, self.copies = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        is_view = alias is not None and not alias.is_write
        if self.device in devices and not is_view and func._schema.name not in NO_LAUNCH:
            self.launches[func._schema.name] += 1
        if len(devices) > 1:
            self.copies[func._schema.name] += 1
        return out


def one_launch(function: Callable) -> Callable:
    """function, counted as if it were a kernel."""
    def call(*args):
        modes = _get_current_dispatch_mode_stack()
        with _disable_current_modes():
            out = function(*args)
        for mode in modes:
            mode.launches[function.__name__] += 1
        return out
    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Results like those of the kernel."""
    return torch.empty_like(x), x[..., :1].float()


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def swiglu_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def round_to_nearest(x: Tensor, out: Tensor, seed: int, first: int) -> None:
    out.copy_(x)


@pytest.fixture
def gpu(flash, monkeypatch):
    """"meta" is a GPU: what is chosen by device is chosen as there, and each Triton kernel is one launch."""
    monkeypatch.setitem(fast.LOGITS_AT_ONCE, "meta", fast.LOGITS_AT_ONCE["cuda"])
    monkeypatch.setattr(fast, "runs_triton", lambda x: True)
    monkeypatch.setattr(gpu_kernels, "pick_logps", lambda logits, targets: logits.new_zeros(2, len(logits)))
    for name in ("logps_gradient", "rotate", "swiglu", "decode_attention"):
        monkeypatch.setattr(gpu_kernels, name, lambda x, *rest: torch.zeros_like(x))
    for function in (rms_norm, rms_norm_gradient, swiglu_gradient):
        monkeypatch.setattr(gpu_kernels, function.__name__, one_launch(function))


def model_on_meta(layers: int) -> Decoder:
    """A decoder in bf16, norms in fp32, of shapes alone."""
    with torch.device("meta"):
        model = Decoder(Config.from_dict(CONFIG | dict(num_hidden_layers=layers)))
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data = p.data.bfloat16()
    return model


def per_layer(work: Callable[[Decoder], Launches]) -> tuple[int, int]:
    """The launches of one layer, and those outside of the layers; the rest of what comes from main memory is
    the same for any number of them."""
    two, three = (work(model_on_meta(layers)) for layers in (2, 3))
    assert two.copies == three.copies
    layer = three.launches - two.launches
    return layer.total(), (two.launches - layer - layer).total()


def scored(model: Decoder, pairs: int) -> tuple[Launches, Launches]:
    """What a forward and a backward pass launch for pairs of unequal lengths with a common beginning."""
    groups = [([5, 6, 7 + i, *range(i)], [[1] * (2 + i), [2]]) for i in range(pairs)]
    with Launches() as forward:
        logps = response_logps(model, groups)
        total = torch.stack([each.sum() for responses in logps for each in responses]).sum()
    with Launches() as backward:
        total.backward()
    return forward, backward


@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_launches_of_a_training_pass_do_not_grow_with_its_parts(pairs, gpu):
    """A layer launches as much for seven pairs as for one, forward and backward; outside of the layers each
    response costs its own sum. Seven tensors of indices come from main memory, whatever the size."""
    layer, outside = per_layer(lambda model: scored(model, pairs)[0])
    assert layer <= FORWARD and outside <= 40 + 2 * pairs
    layer, outside = per_layer(lambda model: scored(model, pairs)[1])
    assert layer <= BACKWARD and outside <= 35
    forward, backward = scored(model_on_meta(2), pairs)
    assert forward.copies.total() <= 7 and not backward.copies


def test_an_optimizer_step_is_one_adamw_and_one_launch_a_matrix(monkeypatch):
    """All moments are updated by one fused operation; each of a layer's nine tensors, norms in bf16 among
    them, is then rounded from its master by a kernel. On a CPU, where fused AdamW exists too."""
    monkeypatch.setattr(optimizer_module, "runs_triton", lambda x: True)
    monkeypatch.setattr(gpu_kernels, "round_up_or_down", one_launch(round_to_nearest))

    def step(layers: int) -> Launches:
        model = random_model(num_hidden_layers=layers).bfloat16()
        optimizer = MasterAdamW(model, 1e-3, seed=0)
        for weight in optimizer.weights:
            weight.grad = torch.ones_like(weight, dtype=torch.float32)
        with Launches("cpu") as counted:
            optimizer.step(0, 1e-3, gradient_norm(optimizer.weights))
        assert counted.launches["aten::_fused_adamw_"] == 1
        return counted

    two, three = step(2), step(3)
    layer = three.launches - two.launches
    assert layer["round_to_nearest"] == 9  # norms are in bf16 too here
    assert set(layer) == {"round_to_nearest", "aten::randint", "aten::_local_scalar_dense"}


class Unread(fast.Reading):
    """Numbers that nobody can read, and that are 1 all the same."""

    def __init__(self, tensor: Tensor):
        super().__init__(torch.ones(tensor.shape))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_whole_training_step_reads_nothing(method, gpu, tmp_path, monkeypatch):
    """Passes, loss, norm, optimizer, rounding, the share of weights changed, of four steps of every method:
    on a device whose numbers cannot be read, and to which nothing goes but by fast.sent."""
    make = torch.tensor

    def in_main_memory(*args, device: str = "cpu", **kwargs) -> Tensor:
        assert torch.device(device).type == "cpu"
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", in_main_memory)
    monkeypatch.setattr(optimizer_module, "runs_triton", lambda x: True)
    monkeypatch.setattr(gpu_kernels, "round_up_or_down", lambda x, out, seed, first: out.copy_(x))
    monkeypatch.setattr(fast, "Reading", Unread)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda adamw: None)  # which knows no such device
    args = train.resolve(train.Args(method=method, batch=2, pass_tokens=30))
    optimizer = MasterAdamW(model_on_meta(2), args.lr, args.seed)
    pairs = training_rows(random_pairs(8), args)
    reference = torch.zeros(len(pairs), 2, device="meta")
    state = train.State()
    train.train(optimizer, pairs, reference, args, Metrics(tmp_path / "metrics.jsonl"), state)
    assert state.step == 4 and state.tokens > 0 and len((tmp_path / "metrics.jsonl").open().readlines()) == 4


@pytest.mark.parametrize("shared_length", [0, 64])
@pytest.mark.parametrize("slots", [1, 128])
@torch.no_grad()
def test_a_decoding_step_launches_the_same_for_any_slots_and_stays_on_the_gpu(slots, shared_length, gpu):
    """Nothing comes from main memory and no number is read: it would raise."""
    def step(model: Decoder) -> Launches:
        cache = Cache(model.config, slots, 256, shared_length, torch.bfloat16, "meta")
        latest = torch.zeros(slots, dtype=torch.long, device="meta")
        with Launches() as counted:
            model.logits(model(latest, Decode(cache, slots)))
        assert not counted.copies
        return counted

    layer, outside = per_layer(step)
    assert layer <= DECODING and outside <= 14


@pytest.mark.parametrize("prompts", [1, 16])
@torch.no_grad()
def test_a_prefill_launches_the_same_for_any_number_of_prompts(prompts, gpu):
    """Each with two slots of its own. The shared tokens themselves, too."""
    def prefill(model: Decoder, shared_length: int) -> Launches:
        cache = Cache(model.config, 32, 256, shared_length, torch.bfloat16, "meta")
        slots = [[2 * i, 2 * i + 1] for i in range(prompts)]
        with Launches() as counted:
            layout = Prefill(cache, [3 + i for i in range(prompts)], slots, root=2)
            ids = torch.zeros(len(layout.positions), dtype=torch.long, device="meta")
            model(ids, layout)
        assert counted.copies.total() <= 5
        return counted

    def shared(model: Decoder) -> Launches:
        cache = Cache(model.config, 2, 64, 128, torch.bfloat16, "meta")
        ids = torch.zeros(128, dtype=torch.long, device="meta")
        with Launches() as counted:
            model(ids, SharedPrefill(cache))
        return counted

    assert per_layer(lambda model: prefill(model, 0))[0] <= PREFILLING
    assert per_layer(lambda model: prefill(model, 64))[0] <= PREFILLING  # the past's keys and values
    assert per_layer(shared)[0] <= PREFILLING - 4


# ------------------------------------------------------------------------- compilers

def test_a_block_compiles_as_one_graph(flash):
    """With its attention, forward and backward, once for all layers and for packs of every shape, as long as
    the pack has looked up its keys before: the same values and gradients."""
    model = random_model(num_hidden_layers=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = [torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
                for block in model.model.layers]
    for shapes in ([(3, [2, 4])], [(4, [3]), (5, [1, 2])], [(7, [3, 3]), (2, [2]), (3, [])]):
        layout = Packed(shapes)
        assert layout.seen_keys  # looked up before: Dynamo does not enter the lock of a cached_property
        cos, sin = rotary_tables(layout.positions, model.config)
        x = torch.randn(len(layout.positions), 64, generator=torch.Generator().manual_seed(0))
        results = []
        for blocks in (compiled, model.model.layers):
            leaf = out = x.clone().requires_grad_()
            for block in blocks:
                out = block(out, cos, sin, layout)
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import gpu_kernels as g

NAMES = {
    "*bf16": "logits q k v slot_k slot_v shared_k shared_v out x y gate up d_x d_gate d_up grad",
    "*fp32": "lse picked probs mass least weight scale d_weight cos sin", "*i64": "targets counts",
    "i32": "columns stride length shared group size rows heads sign seed first count", "fp32": "eps",
}
TYPES = {name: kind for kind, names in NAMES.items() for name in names.split()}
OTHER = {g._rounding_kernel: dict(x="*fp32", out="*i16"), g._decode_kernel: dict(scale="fp32"),
         g._gradient_kernel: dict(grad="*fp32")}
ODD = {"group", "heads", "sign", "seed", "columns", "shared"}  # numbers that need be no multiples of 16

CASES = [
    (g._pick_kernel, dict(BLOCK=8192), 8), (g._gradient_kernel, dict(BLOCK=8192), 8),
    (g._nucleus_kernel, dict(BLOCK=4096), 16), (g._rounding_kernel, dict(BLOCK=1024), 4),
    (g._norm_kernel, dict(BLOCK=4096), 4), (g._norm_gradient_kernel, dict(BLOCK=4096), 4),
    (g._gate_kernel, dict(BLOCK=2048), 4), (g._gate_gradient_kernel, dict(BLOCK=2048), 4),
    (g._rotate_kernel, dict(ROWS=32, HALF=64, BLOCK=64), 4),
    *((g._decode_kernel, dict(ROWS=16, SIZE=size, itemsize=itemsize), 4)
      for size in (64, 128, 256) for itemsize in (2, 4)),
]
for kernel, constants, warps in CASES:
    types, options = TYPES | OTHER.get(kernel, {}), dict(num_warps=warps)
    if itemsize := constants.pop("itemsize", 0):
        blocks = g.decode_blocks(constants["SIZE"], itemsize)
        constants["BLOCK"], options["num_stages"] = blocks["BLOCK"], blocks["num_stages"]
        if itemsize == 4:
            types = {name: kind.replace("bf16", "fp32") for name, kind in types.items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or signature[name] == "i32" and name not in ODD}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert ".target sm_90" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024, (kernel, constants, compiled.metadata.shared)
"""


def test_triton_kernels_compile_for_a_gpu(tmp_path):
    """To machine code of sm_90 (H100, H200): Triton brings NVIDIA's assembler and needs no GPU for it. As
    they are launched, and within the shared memory of small cards."""
    pytest.importorskip("triton")
    environment = child_environment() | dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    script = tmp_path / "compile_kernels.py"  # Triton wants the source in a file
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=environment | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------- processes

@pytest.mark.parametrize("changes", [dict(LOCAL_RANK="2"), dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="3")],
                         ids=["the-third", "the-first-of-three"])
def test_more_processes_than_gpus_are_refused(changes, monkeypatch):
    """Two GPUs and three processes: every process says how many there can be, and none waits for another."""
    for name, value in (dict(WORLD_SIZE="3", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
                        | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, line = run.outcome(lambda: None)
    assert code == 2 and "more processes than GPUs" in line and "--nproc_per_node 2" in line
