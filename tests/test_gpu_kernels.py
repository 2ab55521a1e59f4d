"""gpu_kernels.py: every Triton kernel against its plain form in fp64.

They run on a GPU as they are, and elsewhere under Triton's interpreter, which shows that the arithmetic and
the addresses are right, not that a GPU's races and limits are. The interpreter cannot multiply bf16.

    python -m pytest tests/test_gpu_kernels.py            interpreted
    python -m pytest --gpu tests/test_gpu_kernels.py      on a GPU
"""

import math

import pytest
import torch
from torch import Tensor

import fast
import gpu_kernels
from model import rotate
from test_fast import normal, plain_logps, plain_norm, plain_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------- log-softmax-gather

TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def slice_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Logits (rows, columns), targets of which some lie outside the slice, upstream gradients (rows,)."""
    rng = torch.Generator().manual_seed(rows * columns)
    logits = 3 * torch.randn(rows, columns, generator=rng)
    targets = torch.randint(-columns // 2, columns + columns // 2 + 1, (rows,), generator=rng)
    targets[:3] = torch.tensor([columns - 1, -1, columns])[:rows]
    return logits.to(DEVICE, dtype), targets.to(DEVICE), torch.randn(rows, generator=rng).to(DEVICE)


def exact_slice(logits: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, the target's logit or 0, and the gradient of their difference, row by row in fp64."""
    x = logits.double().requires_grad_()
    lse = x.logsumexp(-1)
    nothing = x.new_zeros(())
    picked = [row[t] if 0 <= t < len(row) else nothing for row, t in zip(x, targets.tolist(), strict=True)]
    picked = torch.stack(picked)
    ((picked - lse) * grad).sum().backward()
    return lse.detach(), picked.detach(), x.grad


@pytest.mark.parametrize("columns", [1, 7, 64, 1000, 4099])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kernels_are_the_log_softmax_and_its_gradient(rows, columns, dtype):
    """Of bf16, fp16 and fp32 logits, with targets inside and outside the slice; the logits stay."""
    logits, targets, grad = slice_inputs(rows, columns, dtype)
    lse, picked, d = exact_slice(logits, targets, grad)
    ours = gpu_kernels.pick_logps(logits, targets)
    torch.testing.assert_close(ours[0].double(), lse, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours[1].double(), picked)
    gradient = gpu_kernels.logps_gradient(logits, targets, ours[0], grad)
    assert gradient.dtype == dtype and gradient.data_ptr() != logits.data_ptr()
    torch.testing.assert_close(gradient.double(), d, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.skipif(DEVICE == "cuda", reason="slice_forward runs the kernels themselves there")
def test_kernels_and_pytorch_are_the_same_function():
    """slice_forward and slice_backward give without Triton what the kernels give."""
    logits, targets, grad = slice_inputs(9, 300)
    ours, plain = (f(logits, targets) for f in (gpu_kernels.pick_logps, fast.slice_forward))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    lse = logits.logsumexp(-1) + 0.5  # of other slices too
    torch.testing.assert_close(gpu_kernels.logps_gradient(logits, targets, lse, grad),
                               fast.slice_backward(logits, targets, lse, grad))


def test_the_running_maximum_crosses_blocks():
    """A vocabulary of several kernel blocks that is no power of two; the maximum comes late, then early."""
    logits = torch.linspace(-200, 200, 20_001, device=DEVICE).expand(2, -1).contiguous()
    logits[1] = logits[1].flip(0)
    targets, ones = torch.tensor([20_000, 3], device=DEVICE), torch.ones(2, device=DEVICE)
    lse, picked, d = exact_slice(logits, targets, ones)
    ours = gpu_kernels.pick_logps(logits, targets)
    torch.testing.assert_close(ours[0].double(), lse)
    torch.testing.assert_close(ours[1].double(), picked)
    gradient = gpu_kernels.logps_gradient(logits, targets, ours[0], ones)
    torch.testing.assert_close(gradient.double(), d, rtol=1e-4, atol=1e-5)


def test_kernels_take_extreme_logits():
    """Logits of +-1e4, rows of one value, a first block of minus infinity alone: all finite and right."""
    logits = torch.full((4, 9000), -1e4, device=DEVICE)
    logits[0, 17], logits[1] = 1e4, 0.0
    logits[2, :8192] = -math.inf
    logits[3, 1::2] = -math.inf
    targets = torch.tensor([17, 5, 8500, 0], device=DEVICE)
    lse, _ = gpu_kernels.pick_logps(logits, targets)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1))
    gradient = gpu_kernels.logps_gradient(logits, targets, lse, torch.ones(4, device=DEVICE))
    assert gradient.isfinite().all() and (gradient.double().sum(-1).abs() < 1e-3).all()


def test_kernels_take_offsets_beyond_two_to_the_31():
    """A third row that begins 2^31 numbers after the first: on a GPU a 32-bit offset would read elsewhere
    (the interpreter's integers do not wrap, so there this shows only that such strides are taken)."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)  # mostly never touched
    logits = storage.as_strided((3, 50), (2**30 + 1024, 1))
    logits.copy_(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)))
    targets, grad = torch.tensor([3, 4, 5], device=DEVICE), torch.tensor([1.0, -2.0, 3.0], device=DEVICE)
    lse, picked = gpu_kernels.pick_logps(logits, targets)
    expected_lse, expected, d = exact_slice(logits.contiguous(), targets, grad)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
    assert torch.equal(picked.double(), expected)
    gradient = gpu_kernels.logps_gradient(logits, targets, lse, grad)
    torch.testing.assert_close(gradient.double(), d, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("n", [1, 5])
def test_linear_logps_over_the_kernels(n, monkeypatch):
    """Through the kernels and several slices of the vocabulary: values and both gradients."""
    monkeypatch.setattr(fast, "runs_triton", lambda x: True)
    monkeypatch.setitem(fast.LOGITS_AT_ONCE, DEVICE, 40 * n)
    targets = torch.randint(130, (n,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    upstream = torch.linspace(-1, 2, n, device=DEVICE)
    results = []
    for function, dtype in ((fast.linear_logps, torch.float32), (plain_logps, torch.float64)):
        leaves = [x.to(DEVICE, dtype, copy=True).requires_grad_() for x in normal((n, 8), (130, 8))]
        logps = function(*leaves, targets)
        (logps * upstream).sum().backward()
        results.append([logps.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- layers

LAYERS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative errors


def compare(ours, plain, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values and gradients of two functions of the same tensors, here on the device and in fp64."""
    results = []
    for function, kind in ((ours, dtype), (plain, torch.float64)):
        leaves = [x.to(dtype).to(DEVICE, kind).requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(torch.linspace(-1, 2, out.numel(), device=DEVICE).view(out.shape).to(dtype).to(kind))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert results[0][0].dtype == dtype
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).norm() <= LAYERS[dtype] * expected.norm()


@pytest.fixture
def by_kernel(monkeypatch):
    """What fast.py computes of fp32, bf16 and fp16, it computes by kernels, on a CPU too."""
    monkeypatch.setattr(fast, "runs_triton", lambda x: x.dtype != torch.float64)


@pytest.mark.parametrize("dtype", LAYERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (5, 48), (7, 3, 64), (600, 130)])
def test_norm_and_its_gradient(shape, dtype, by_kernel):
    """Rows of two and three dimensions, more of them than programs, of sizes that are no powers of two."""
    weight = normal(shape[-1:], seed=1)[0]
    compare(lambda x, w: fast.rms_norm(x, w, 1e-5), lambda x, w: plain_norm(x, w, 1e-5),
            [normal(shape)[0] + 0.5, weight], dtype)


@pytest.mark.parametrize("dtype", LAYERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 16), (4, 9, 12)])
def test_rotation_and_its_gradient(shape, dtype, by_kernel):
    """Of heads whose number, or half the size of which, is no power of two."""
    angle = normal((shape[0], 1, shape[2] // 2), seed=1)[0]
    angle = torch.cat((angle, angle), dim=-1).to(DEVICE)

    def turned(x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return rotate(x, angle.cos().to(exact), angle.sin().to(exact))

    compare(turned, turned, normal(shape), dtype)


@pytest.mark.parametrize("dtype", LAYERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (5, 1000)])
def test_gate_and_its_gradient(shape, dtype, by_kernel):
    """Of more numbers than one program takes, and of gates far from 0; of parts of one tensor too."""
    inputs = [5 * x for x in normal(shape, shape)]
    compare(fast.swiglu, plain_swiglu, inputs, dtype)
    gate, up = torch.cat(inputs, dim=1).to(DEVICE, dtype).chunk(2, dim=1)
    assert torch.equal(fast.swiglu(gate, up), fast.swiglu(*(x.to(DEVICE, dtype) for x in inputs)))


# ------------------------------------------------------------------------- sampling

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
ATTENTION_ERROR = {torch.float32: 1e-6, HALF: 4e-3}


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of one token, in fp64: q (H, D), k and v (G, n, D) -> (H, D)."""
    k, v = (x.double().repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))  # (H, n, D)
    weights = (k @ q.double()[:, :, None] * q.shape[1] ** -0.5).softmax(1)  # (H, n, 1)
    return (weights * v).sum(1)


@pytest.mark.parametrize("dtype", ATTENTION_ERROR, ids=str)
@pytest.mark.parametrize("shared", [0, 1, 64, 130])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (2, 2, 16), (12, 2, 128), (20, 1, 32)])
def test_decode_attention_sees_what_a_slot_holds(heads, kv_heads, size, shared, dtype):
    """And the shared tokens, for 3 of 5 slots that hold 0, 65 and all but one of 150 places, and itself,
    which is stored in the next place; what lies beyond is not read, here nan."""
    counts = [0, 65, 149, 7, 9]
    of_slots, of_shared, of_new = (5, kv_heads, 150, size), (kv_heads, shared, size), (3, kv_heads, size)
    q, *rest = (x.to(DEVICE, dtype) for x in normal((3, heads, size), *(of_slots, of_shared, of_new) * 2))
    (k, shared_k, new_k), (v, shared_v, new_v) = rest[:3], rest[3:]
    for slot, count in enumerate(counts):
        k[slot, :, count:] = v[slot, :, count:] = math.nan
    held = torch.tensor(counts, device=DEVICE)
    out = gpu_kernels.decode_attention(q, new_k, new_v, k, v, held, shared_k, shared_v)
    for slot, count in enumerate(counts[:3]):
        for stored, new in ((k, new_k), (v, new_v)):
            assert torch.equal(stored[slot, :, count], new[slot])
            assert stored[slot, :, count + 1 :].isnan().all()
        keys, values = (torch.cat((before, own[slot, :, : count + 1]), dim=1)
                        for before, own in ((shared_k, k), (shared_v, v)))
        expected = attended(q[slot], keys, values)
        assert (out[slot].double() - expected).norm() < ATTENTION_ERROR[dtype] * expected.norm()
    for stored in (k, v):  # slots that did not compute
        assert stored[3, :, 7:].isnan().all() and stored[4, :, 9:].isnan().all()


def test_decode_attention_takes_scores_that_share_a_constant():
    """Keys with a large component in common, as Qwen2's have: scores of 400 are kept in fp32."""
    q, k, v = (x.to(DEVICE, HALF) for x in normal((1, 4, 16), (1, 2, 100, 16), (1, 2, 100, 16)))
    q[..., 0] = k[..., 0] = 40.0
    nothing, last = k.new_zeros(2, 0, 16), torch.tensor([99], device=DEVICE)
    new_k, new_v = k[:, :, -1].clone(), v[:, :, -1].clone()
    out = gpu_kernels.decode_attention(q, new_k, new_v, k, v, last, nothing, nothing)
    expected = attended(q[0], k[0], v[0])
    assert (out[0].double() - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("columns", [1, 2, 300, 9000])
def test_the_nucleus_ends_where_a_sort_says(columns):
    """Flat and peaked rows, one token that has all mass, tokens without mass, ties; shares from 0, which
    leaves the likeliest token, to nearly 1."""
    logits = torch.randn(7, columns, generator=torch.Generator().manual_seed(columns)) * 4
    logits[0] = 0
    logits[1, 1:], logits[2, ::2] = -math.inf, -math.inf
    logits[2, -1] = 0
    logits[3] = logits[3].round()
    probs = logits.softmax(-1).to(DEVICE)
    for share in (0.0, 1e-6, 0.3, 0.9, 0.999):
        mass = share * probs.sum(-1, keepdim=True)
        least = gpu_kernels.least_of_nucleus(probs, mass)
        assert share or torch.equal(least, probs.amax(-1, keepdim=True))
        for row, floor, wanted in zip(probs.double(), least.double(), mass.double(), strict=True):
            inside = row[row >= floor].sum()
            assert inside >= wanted * (1 - 1e-6)  # fp32 sums
            assert not share or row[row > floor].sum() < wanted * (1 + 1e-6)
            assert (row == floor).any()


def test_the_nucleus_is_that_of_the_plain_form():
    """For probabilities that add up exactly in any order, to the number; also for a mass that some of them
    reach exactly."""
    counts = torch.randint(0, 2**8, (5, 700), generator=torch.Generator().manual_seed(0)).float()
    probs = (counts / 2**18).to(DEVICE)
    reached = probs.sort(descending=True).values.cumsum(-1)[:, [0, 99, 400]]  # (5, 3)
    for mass in (0.75 * probs.sum(-1, keepdim=True), *reached.split(1, dim=1)):
        plain = fast.least_of_nucleus(probs.double(), mass.double())  # fp64 never goes through kernels
        assert torch.equal(gpu_kernels.least_of_nucleus(probs, mass).double(), plain)


# ------------------------------------------------------------------------- stochastic rounding

STEP = 2.0**-13  # between two bf16 numbers from 1/64 to 1/32


def rounded(x: Tensor, seed: int, first: int = 0) -> Tensor:
    """x on the device, rounded; back here in fp32."""
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
    gpu_kernels.round_up_or_down(x.to(DEVICE), out, seed, first)
    return out.float().cpu()


def test_rounding_keeps_bf16_numbers_and_goes_to_neighbours_of_others():
    """Negative, tiny, huge, infinite: the bits below are dropped, or carry into the last one kept."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x * 1e-20, x * 1e20, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40])])
    exact = x.bfloat16().float()
    assert torch.equal(rounded(exact, 1).view(torch.int32), exact.view(torch.int32))
    inner = x.view(torch.int32) & -(2**16)
    moved = rounded(x, 2).view(torch.int32) - inner
    is_exact = x.view(torch.int32) == inner
    assert ((moved == 0) | (moved == 2**16)).all() and (moved[is_exact] == 0).all()
    assert 0.45 < (moved[~is_exact] > 0).float().mean() < 0.55


@pytest.mark.parametrize("share", [2**-16, 0.25, 0.9])
def test_rounding_is_right_in_the_mean_and_independent_side_by_side(share):
    """A number `share` of the way up goes up that often, whatever numbers next to it, in the other half of
    the same random word (1,024 on) and in the next word (2,048 on) do: 5 standard deviations."""
    count = 8 * 1024 * 40
    up = (rounded(torch.full((count,), 1 / 64 + share * STEP), 3) > 1 / 64).double()
    variance = share * (1 - share)
    assert abs(up.mean() - share) < 5 * math.sqrt(variance / count)
    for distance in (1, 1024, 2048, 8192):
        product = (up[distance:] - share) * (up[:-distance] - share)
        assert abs(product.mean()) < 5 * variance / math.sqrt(len(product))


@pytest.mark.parametrize("first", [0, 1, 1023, 8192, 20_001])
def test_a_part_is_rounded_as_in_the_whole(first):
    """Seed and place alone decide; another seed decides otherwise."""
    x = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    whole = rounded(x, 5)
    for count in (1, 9000, 30_000 - first):
        part = x[first : first + count]
        assert torch.equal(rounded(part, 5, first), whole[first : first + len(part)])
    assert not torch.equal(rounded(x, 6), whole)
