"""fast.py - what is there for speed and memory alone. The method can be understood without this file.

The computations down to invert_cumulative have a plain form, given in their docstrings. tests/test_fast.py
compares the two, values and gradients, in fp64 and bf16; tests/test_cuda.py what only GPUs run, in fp64, and
tests/test_gpu_kernels.py the kernels. What they save is in bench/README.md.

    linear_logps     log-softmax-gather of the output layer: no logits are kept
    attention        on a CPU in bf16: scores and softmax in fp32, the other products in bf16
    packed_attention a GPU's attention for all parts of a pack at once, not part by part
    rms_norm         keeps its input in the compute type, not an fp32 copy of it
    swiglu           keeps its two arguments and not a third tensor of their size
    least_of_nucleus    finds where top-p cuts without sorting the vocabulary
    invert_cumulative   draws a token without a cumulative sum over the vocabulary
    sent, Reading    numbers travel while the host goes on; Moment tells when they are there
    graphed          a decoding step as one CUDA graph
    tune_allocator   freed memory stays in the process
    skip_cudnn_attention   a GPU prepares nothing anew for every length
    is_out_of_memory whether that is what an error means

Legend: N rows, V vocabulary, E hidden size, F feed-forward size, H query heads, G key/value heads, D head
size, m queries, n keys.

    python -m pytest tests/test_fast.py tests/test_cuda.py
"""

import ctypes
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_kernels

# Logits that exist at a time: 8 MB of fp32 on a CPU, which its cache can hold; 256 MB of bf16 on a GPU.
LOGITS_AT_ONCE = dict(cpu=2**21, cuda=2**27)
# PyTorch's varlen_attn must be told since 2.12 that query heads share keys.
SHARED_HEADS = dict(enable_gqa=True) if torch.__version__ >= (2, 12) else {}


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is fp64: the type of norms, rotations, softmax and every sum."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def has_bf16_products(device: torch.device) -> bool:
    """Whether bf16 matrix products are fast: on GPUs since Ampere, and on CPUs with instructions for them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel of gpu_kernels.py takes the place of the plain form for tensors like x."""
    return x.device.type == "cuda" and x.dtype != torch.float64


# ------------------------------------------------------------------------- between host and device

def sent(values: list | Tensor, device: torch.device | str) -> Tensor:
    """Integers, or a tensor in main memory, on a device. For a GPU the copy is queued, and the host does not
    wait. Plain form: torch.as_tensor(values, device=device)."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.long)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # else the host waits for all that the GPU has been given
    return tensor.to(device, non_blocking=True)


class Moment:
    """The moment at which a device has done all that was queued before."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record()
        self.time = time.perf_counter()  # a CPU's, which has done it

    def wait(self) -> None:
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Both moments must have passed."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.time - earlier.time


class Reading:
    """A copy of a tensor on its way to main memory. The host goes on until it reads it."""

    def __init__(self, tensor: Tensor):
        self.copy = tensor.to("cpu", non_blocking=True, copy=True)
        self.arrival = Moment(tensor.device)

    def read(self) -> list:
        """The numbers, as tensor.tolist() gives them."""
        self.arrival.wait()
        return self.copy.tolist()


# ------------------------------------------------------------------------- log-probs of target tokens

def linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target] for every row, without holding all logits at once.

    hidden (N, E), weight (V, E), targets (N,) int64 -> (N,) in fp32, or in fp64 from fp64. Plain form:

        upcast(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    """
    return _LinearLogps.apply(hidden, weight, targets)


class _LinearLogps(torch.autograd.Function):
    """Forward and backward go through the vocabulary slice by slice.

    Forward keeps the log-sum-exp of each row and drops the logits; backward computes them again. With the
    upstream gradient g and d = g * (onehot(target) - softmax(logits)):

        d hidden = d @ weight,   d weight = d.T @ hidden
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.full(targets.shape, -math.inf, dtype=exact, device=hidden.device)  # (N,)
        picked = torch.zeros_like(lse)  # (N,) the target's logit
        for start, _, logits in vocabulary_slices(hidden, weight):
            slice_lse, slice_picked = slice_forward(logits, targets - start)
            lse = torch.logaddexp(lse, slice_lse)
            picked += slice_picked
        ctx.save_for_backward(hidden, weight, targets, lse)
        return picked - lse

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start, part, logits in vocabulary_slices(hidden, weight):
            d = slice_backward(logits, targets - start, lse, grad)  # (N, columns)
            if d_hidden is not None:
                d_hidden += d @ part
            if d_weight is not None:
                d_weight[start : start + len(part)] = d.T @ hidden  # (columns, E)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None


def vocabulary_slices(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first token id, rows of the weight, logits of all N positions) of each slice of the vocabulary."""
    columns = max(1, LOGITS_AT_ONCE[hidden.device.type] // len(hidden))
    if columns > 64:
        columns -= columns % 64  # products of round shapes are faster
    for start in range(0, len(weight), columns):
        part = weight[start : start + columns]  # (columns, E)
        yield start, part, F.linear(hidden, part)  # (N, columns)


def slice_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For one slice of the vocabulary: the log-sum-exp of each row, and the target's logit if it lies in the
    slice (0 <= target < columns), else 0.

    logits (N, columns), targets (N,) int64 -> (N,) and (N,), in fp32, or in fp64 from fp64.
    """
    if runs_triton(logits):
        return gpu_kernels.pick_logps(logits, targets)
    logits = upcast(logits)
    inside = (targets >= 0) & (targets < logits.shape[1])
    index = targets.clamp(0, logits.shape[1] - 1)
    picked = logits.gather(1, index[:, None]).squeeze(1)  # (N,)
    return logits.logsumexp(-1), picked.where(inside, 0)


def slice_backward(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The gradient of one slice's logits, grad * (onehot(target) - exp(logits - lse)).

    logits (N, columns); targets, lse (over the whole vocabulary) and grad (N,) -> (N, columns) in the type of
    logits.
    """
    if runs_triton(logits):
        return gpu_kernels.logps_gradient(logits, targets, lse, grad)
    d = (logits - lse[:, None]).exp_().mul_(-grad[:, None])
    inside = (targets >= 0) & (targets < d.shape[1])
    rows = inside.nonzero().squeeze(1)
    d[rows, targets[rows]] += grad[rows]
    return d.to(logits.dtype)


# ------------------------------------------------------------------------- layers

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention softmax(q k.T / sqrt(D) + mask) v; scores and softmax in fp32, the other
    products in the type of q.

    q (H, m, D), k and v (G, n, D), mask (m, n) fp32, 0 where a query may look and -inf elsewhere
    -> (H, m, D). Plain form:

        F.scaled_dot_product_attention(q[None], k[None], v[None], mask.to(q.dtype), enable_gqa=True)[0]
    """
    return _Attention.apply(q, k, v, mask)


class _Attention(torch.autograd.Function):
    """With s the scores, p the attention weights and o the output:

        d v = p.T d o,   d s = p * (d o v.T - rowsum(d o * o)),
        d q = d s k / sqrt(D),   d k = d s.T q / sqrt(D)

    Scores are fp32: in bf16 a score of 100, as keys with a large constant offset give, is off by up to 1/4.
    Of the (m, n) tables only p is kept, in the type of q.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        kv_heads, n, size = k.shape
        m = q.shape[1]
        # The H/G query heads that share a key/value head become rows of one product.
        rows = q.reshape(kv_heads, -1, size)  # (G, H/G * m, D)
        scores = (upcast(rows) * size**-0.5) @ upcast(k).transpose(1, 2)  # (G, H/G * m, n)
        scores = scores.view(-1, m, n).add_(mask)  # (H, m, n)
        p = scores.softmax(-1).to(q.dtype).view(kv_heads, -1, n)  # (G, H/G * m, n)
        out = p @ v  # (G, H/G * m, D)
        ctx.save_for_backward(q, k, v, p, out)
        return out.view(-1, m, size)  # (H, m, D)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, p, out = ctx.saved_tensors
        rows, d_out = q.reshape(out.shape), grad.reshape(out.shape)  # (G, H/G * m, D) each
        row_sum = (upcast(d_out) * out).sum(-1, keepdim=True)  # (G, H/G * m, 1)
        d_scores = (d_out @ v.transpose(1, 2) - row_sum).mul_(p)  # (G, H/G * m, n)
        d_scores = d_scores.mul_(k.shape[-1] ** -0.5).to(p.dtype)
        d_q = d_scores @ k  # (G, H/G * m, D)
        d_k = d_scores.transpose(1, 2) @ rows  # (G, n, D)
        d_v = p.transpose(1, 2) @ d_out  # (G, n, D)
        return d_q.view(grad.shape), d_k, d_v, None


class SeenKeys(NamedTuple):
    """Which keys each part of a model.Packed sees, for `packed_attention`: made once a pass."""

    tokens: Tensor  # the numbers of the tokens that each part sees, one part after another
    query_ends: Tensor  # (1 + parts,) int32: 0, and where the queries of each part end
    key_ends: Tensor  # (1 + parts,) int32: the same for `tokens`
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, lengths: list[int], parents: list[int | None], past: int, device: torch.device) -> "SeenKeys":
        """lengths, parents: tokens of each part, and the part that it continues. past: tokens, the first
        ones, that come before every part."""
        own = torch.arange(past, past + sum(lengths)).split(lengths)
        seen: dict[int | None, Tensor] = {None: torch.arange(past)}
        for i, parent in enumerate(parents):
            seen[i] = torch.cat((seen[parent], own[i]))
        parts = [seen[i] for i in range(len(parents))]
        counts = [len(part) for part in parts]
        query_ends = torch.tensor([0, *lengths]).cumsum(0).int()
        key_ends = torch.tensor([0, *counts]).cumsum(0).int()
        tensors = (sent(each, device) for each in (torch.cat(parts), query_ends, key_ends))
        return cls(*tensors, max(lengths), max(counts))


def runs_flash(x: Tensor) -> bool:
    """Whether `packed_attention` takes heads like these (T, heads, D): on GPUs since Ampere, in 16 bits."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    is_new = torch.cuda.get_device_capability(x.device) >= (8, 0)
    return is_new and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def packed_attention(q: Tensor, k: Tensor, v: Tensor, seen: SeenKeys) -> Tensor:
    """Causal grouped-query attention for all parts of a pack: one kernel, whatever their number.

    q (T, H, D), k and v (past + T, G, D), the past before every part -> (T, H, D). Plain form:
    model.Packed.attend_by_parts.
    """
    from torch.nn.attention.varlen import varlen_attn  # here, because it loads torch's compiler
    k = k.index_select(0, seen.tokens)  # (n of all parts, G, D): what each part sees stands side by side
    v = v.index_select(0, seen.tokens)  # (n of all parts, G, D)
    # A window of (-1, 0) is causal: a part's queries are the last of the tokens that it sees.
    return varlen_attn(q, k, v, seen.query_ends, seen.key_ends, seen.most_queries, seen.most_keys,
                       window_size=(-1, 0), **SHARED_HEADS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, returned in the type of x (..., E). Plain form:

        F.rms_norm(upcast(x), weight.shape, weight, eps).to(x.dtype)
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With s = 1 / rms(x), u = x s and h = d y * weight:

        d x = s (h - u mean(h u)),   d weight = sum of d y * u
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if runs_triton(x):
            y, scale = gpu_kernels.rms_norm(x, weight, eps)
        else:
            y = upcast(x)  # (..., E)
            mean_square = torch.linalg.vecdot(y, y)[..., None] / y.shape[-1]  # (..., 1)
            scale = (mean_square + eps).rsqrt()
            y = (y * scale).mul_(weight).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        if runs_triton(x):
            wanted = ctx.needs_input_grad[1]
            return *gpu_kernels.rms_norm_gradient(grad, x, weight, scale, wanted), None
        grad = upcast(grad)
        unit = upcast(x) * scale  # (..., E)
        d_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None  # (E,)
        h = grad * weight
        mean = torch.linalg.vecdot(h, unit)[..., None] / unit.shape[-1]  # (..., 1)
        d_x = h.sub_(unit.mul_(mean)).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (T, F). Plain form:

        F.silu(gate) * up
    """
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """With s the logistic function and silu(z) = z s(z):

        d gate = d y * up * s(gate) (1 + gate (1 - s(gate))),   d up = d y * silu(gate)
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gpu_kernels.swiglu(gate, up) if runs_triton(gate) else F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        if runs_triton(gate):
            return gpu_kernels.swiglu_gradient(grad, gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class Rotation(torch.autograd.Function):
    """model.rotate by a kernel: the gradient is turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return gpu_kernels.rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return gpu_kernels.rotate(grad, *ctx.saved_tensors, -1), None, None


# ------------------------------------------------------------------------- sampling

def decodes_by_kernel(x: Tensor) -> bool:
    """Whether `gpu_kernels.decode_attention` takes heads like these (..., D)."""
    return runs_triton(x) and x.shape[-1] in gpu_kernels.HEAD_SIZES


def least_of_nucleus(probs: Tensor, mass: Tensor) -> Tensor:
    """Of each row, the largest v for which the entries >= v sum to at least `mass`. Plain form:

        likely = probs.sort(descending=True).values
        last = (likely.cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=probs.shape[1] - 1)
        likely.gather(1, last)

    probs (n, V), not negative and at most 1, mass (n, 1) -> (n, 1).
    """
    if runs_triton(probs):
        return gpu_kernels.least_of_nucleus(probs, mass)
    if probs.is_cuda:  # in fp64; a CUDA graph cannot ask
        return _least_of(probs.sort(descending=True).values, mass)
    # It mostly lies within the 256 largest values, so only the rows where it does not are sorted whole.
    likely = probs.topk(min(256, probs.shape[1])).values  # (n, 256), descending
    least = _least_of(likely, mass)  # (n, 1)
    flat = likely.sum(-1) < mass[:, 0]  # (n,)
    if flat.any():
        least[flat] = _least_of(probs[flat].sort(descending=True).values, mass[flat])
    return least


def _least_of(likely: Tensor, mass: Tensor) -> Tensor:
    """`least_of_nucleus` of values that are sorted: likely (n, columns), descending."""
    is_short = likely.cumsum(-1) < mass  # up to here the mass is not reached
    last = is_short.sum(-1, keepdim=True)  # (n, 1)
    last = last.clamp(max=likely.shape[1] - 1)
    return likely.gather(1, last)  # (n, 1)


def invert_cumulative(mass: Tensor, uniform: Tensor) -> Tensor:
    """For each row the column at which the cumulated mass exceeds the share `uniform` in [0, 1) of it all.

    mass (n, V), not negative, uniform (n,) -> (n,) int64. Plain form:

        (mass.cumsum(-1) <= uniform[:, None] * mass.sum(-1, keepdim=True)).sum(-1)

    The column is looked up twice, among the sums of blocks of 128 columns and then within one block: a
    cumulative sum over the whole vocabulary would take longer than the rest of the draw.
    """
    last = mass.shape[1] - 1
    if missing := -mass.shape[1] % 128:
        mass = F.pad(mass, (0, missing))
    blocks = mass.unflatten(1, (-1, 128))  # (n, V/128, 128)
    sums = blocks.sum(-1)  # (n, V/128)
    target = uniform[:, None] * sums.sum(-1, keepdim=True)  # (n, 1)
    block, rest = _invert(sums, target)  # (n, 1) each
    inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1)  # (n, 128)
    column, _ = _invert(inside, rest)  # (n, 1)
    column = (128 * block + column).squeeze(1)  # (n,)
    return column.clamp(max=last)  # nan in the last block lies beyond


def _invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first column whose cumulated mass exceeds the target (n, 1), and what is left of the target there.
    """
    cumulative = mass.cumsum(-1)  # (n, columns)
    # Rounding must not push the target past the last column, nor below 0, onto a column without mass.
    just_below = cumulative[:, -1:].nextafter(target.new_zeros(()))
    target = target.minimum(just_below).clamp(min=0)
    column = torch.searchsorted(cumulative, target, right=True)  # (n, 1)
    column = column.clamp(max=cumulative.shape[1] - 1)  # nan lies beyond
    before = cumulative.gather(1, column) - mass.gather(1, column)  # (n, 1)
    return column, target - before


# ------------------------------------------------------------------------- running

def graphed(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """step() as one CUDA graph, captured at the second call: a call launches the same kernels over the same
    memory again, all at once. On other devices step itself."""
    if device.type != "cuda":
        return step
    stream = capture_stream(device)
    is_set_up, graph, out = False, None, None

    def call() -> Tensor:
        nonlocal is_set_up, graph, out
        if not is_set_up:  # what cannot be captured is set up by the first call
            is_set_up = True
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                out = step()
            torch.cuda.current_stream(device).wait_stream(stream)
            return out
        if graph is None:
            captured = torch.cuda.CUDAGraph()
            # In the default mode a call of another thread (NCCL's, say) would end the capture.
            with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):
                out = step()
            graph = captured
        graph.replay()
        return out

    return call


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: what libraries set up on a stream stays as long as the process."""
    return torch.cuda.Stream(device)


# What CPUs, cuBLAS, and then CUDA, Triton and NCCL say.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED",
                 "out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory has run out. Torch has a class for its own allocator on GPUs alone.
    """
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or any(words in str(error) for words in OUT_OF_MEMORY))


def skip_cudnn_attention() -> None:
    """Have PyTorch choose another attention kernel than cuDNN's, which it tries first on new GPUs and which
    makes a plan for every length that it has not seen: those of texts seldom repeat."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def tune_allocator() -> None:
    """Keep freed memory in the process, on huge pages (Linux with glibc).

    By default the kernel takes the pages of every large tensor back when it is freed and zeroes them again
    for the next one, 4 KB at a time: on a CPU that costs more than the arithmetic of an elementwise
    operation.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # steps seldom repeat their shapes
    libc = ctypes.CDLL(None)
    libc.mallopt(1, 0)  # M_MXFAST: no lists of small blocks to tidy up whenever a large one is freed
    libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too, where they are used again
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never gives anything back
    # Ask for all of the heap's addresses at once, so that it is one range which huge pages can back.
    libc.malloc.restype = ctypes.c_void_p
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    policy = Path("/proc/sys/vm/overcommit_memory")
    if policy.exists() and policy.read_text().strip() == "2":  # here addresses count as memory
        memory = 2**30
    share = memory // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(share))))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE
