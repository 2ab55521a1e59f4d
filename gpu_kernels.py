"""gpu_kernels.py - the Triton kernels, which a GPU runs in place of the plain forms.

    pick_logps, logps_gradient   log-softmax-gather of one slice of the vocabulary, for fast.linear_logps
    rms_norm, rms_norm_gradient  RMSNorm
    rotate                       rotary position embedding; with the opposite sign its gradient
    swiglu, swiglu_gradient      SwiGLU
    decode_attention             attention of new tokens over a KV cache, of which only what is in use is read
    least_of_nucleus             where top-p cuts, without a sort
    round_up_or_down             stochastic rounding to bf16

Each function below the kernels launches one. In PyTorch's operations each would be a dozen launches, and a
launch takes the same time however small the tensors are. On a machine without a GPU Triton need not be
installed; TRITON_INTERPRET=1 runs the kernels as numpy.

Legend: N rows, V vocabulary, T tokens, E hidden size, H query heads, G key/value heads, D head size, S slots,
        n of them that compute, L cache length, A tokens that all slots share.

    python -m pytest tests/test_gpu_kernels.py
"""

import os

import torch
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 128, 256)  # that decode_attention takes

if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    import triton
    import triton.language as tl

    @triton.jit
    def _pick_kernel(logits, targets, lse, picked, columns, stride, BLOCK: tl.constexpr):
        """One program a row: a running maximum, and a running sum that is rescaled as the maximum grows."""
        row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 2^31
        logits += row * stride
        maximum = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < columns, other=float("-inf"))  # (BLOCK,)
            x = x.to(tl.float32)
            higher = tl.maximum(maximum, tl.max(x, 0))
            # A row of -inf alone must not compute -inf - -inf, which is nan.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base), 0)
            maximum = higher
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < columns)
        value = tl.load(logits + tl.where(inside, target, 0)).to(tl.float32)
        tl.store(picked + row, tl.where(inside, value, 0.0))
        tl.store(lse + row, maximum + tl.log(total))

    @triton.jit
    def _gradient_kernel(logits, targets, lse, grad, out, columns, stride, BLOCK: tl.constexpr):
        """One program a row and BLOCK columns: grad * (onehot(target) - exp(logits - lse))."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < columns, other=float("-inf"))  # (BLOCK,)
        softmax = tl.exp(x.to(tl.float32) - tl.load(lse + row))
        onehot = tl.where(column == tl.load(targets + row), 1.0, 0.0)
        d = tl.load(grad + row) * (onehot - softmax)
        tl.store(out + row * columns + column, d.to(out.dtype.element_ty), mask=column < columns)

    @triton.jit
    def _norm_kernel(x, weight, y, scale, size, eps, BLOCK: tl.constexpr):
        """One program a row: x * scale * weight, scale = 1 / sqrt(mean(x^2) + eps)."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < size
        place = row * size + column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
        rate = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
        values = values * rate * tl.load(weight + column, mask=inside)
        tl.store(y + place, values.to(y.dtype.element_ty), mask=inside)
        tl.store(scale + row, rate)

    @triton.jit
    def _norm_gradient_kernel(grad, x, weight, scale, d_x, d_weight, rows, size, BLOCK: tl.constexpr):
        """Every program goes through some rows, and keeps their part of d weight: see fast._RMSNorm."""
        program, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < size
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
        part = tl.zeros((BLOCK,), tl.float32)
        for row in range(program, rows, tl.num_programs(0)):
            place = row * size + column
            upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
            rate = tl.load(scale + row)
            unit = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * rate
            part += upstream * unit
            h = upstream * factor
            values = rate * (h - unit * (tl.sum(h * unit, 0) / size))
            tl.store(d_x + place, values.to(d_x.dtype.element_ty), mask=inside)
        tl.store(d_weight + program * size + column, part, mask=inside)

    @triton.jit
    def _rotate_kernel(x, cos, sin, out, heads, sign, ROWS: tl.constexpr, HALF: tl.constexpr,
                       BLOCK: tl.constexpr):
        """One program a token: channels i and i + HALF of each head are turned by the token's angle."""
        token = tl.program_id(0).to(tl.int64)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
        inside = (row < heads) & (column < HALF)
        place = (token * heads + row) * 2 * HALF + column  # (ROWS, BLOCK)
        a = tl.load(x + place, mask=inside).to(tl.float32)
        b = tl.load(x + place + HALF, mask=inside).to(tl.float32)
        c = tl.load(cos + token * 2 * HALF + column, mask=column < HALF)  # (1, BLOCK)
        s = tl.load(sin + token * 2 * HALF + column, mask=column < HALF) * sign
        tl.store(out + place, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate_kernel(gate, up, out, count, BLOCK: tl.constexpr):
        """silu(gate) * up, number by number; silu is rounded in between, as PyTorch's is."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        z = tl.load(gate + place, mask=inside).to(tl.float32)
        silu = (z * tl.sigmoid(z)).to(out.dtype.element_ty).to(tl.float32)
        product = silu * tl.load(up + place, mask=inside).to(tl.float32)
        tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate_gradient_kernel(grad, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):
        """See fast._SwiGLU."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        upstream = tl.load(grad + place, mask=inside).to(tl.float32)
        z = tl.load(gate + place, mask=inside).to(tl.float32)
        s = tl.sigmoid(z)
        d_z = upstream * tl.load(up + place, mask=inside).to(tl.float32) * s * (1 + z * (1 - s))
        tl.store(d_gate + place, d_z.to(d_gate.dtype.element_ty), mask=inside)
        tl.store(d_up + place, (upstream * z * s).to(d_up.dtype.element_ty), mask=inside)

    @triton.jit
    def _attend(q, k, v, count, scale, maximum, total, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        """Let the query heads of one key head, q (ROWS, SIZE), see `count` tokens more: `total` and `out` are
        rescaled as the maximum of the scores grows."""
        channel = tl.arange(0, SIZE)
        for start in range(0, count, BLOCK):
            token = start + tl.arange(0, BLOCK)
            held = token < count
            place = token[:, None] * SIZE + channel[None, :]  # (BLOCK, SIZE)
            keys = tl.load(k + place, mask=held[:, None], other=0.0)  # (BLOCK, SIZE)
            values = tl.load(v + place, mask=held[:, None], other=0.0)  # (BLOCK, SIZE)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale  # (ROWS, BLOCK)
            scores = tl.where(held[None, :], scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1))  # (ROWS,)
            weights = tl.exp(scores - higher[:, None])  # (ROWS, BLOCK)
            before = tl.exp(maximum - higher)  # (ROWS,)
            total = total * before + tl.sum(weights, 1)
            out = out * before[:, None]
            out += tl.dot(weights.to(values.dtype), values, input_precision="ieee")  # (ROWS, SIZE)
            maximum = higher
        return maximum, total, out

    @triton.jit
    def _decode_kernel(q, k, v, slot_k, slot_v, counts, shared_k, shared_v, out, length, shared, scale, group,
                       ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        """One program a slot and key head, for the `group` query heads that use it: ROWS, the rest empty."""
        slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        number = slot * tl.num_programs(1) + head  # of this slot's head
        row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)
        place = (number * group + row) * SIZE + channel[None, :]  # (ROWS, SIZE)
        queries = tl.load(q + place, mask=row < group, other=0.0)  # (ROWS, SIZE)
        key = tl.load(k + number * SIZE + channel)  # (SIZE,)
        value = tl.load(v + number * SIZE + channel)  # (SIZE,)
        first, count = number * length * SIZE, tl.load(counts + slot)
        tl.store(slot_k + first + count * SIZE + channel, key)
        tl.store(slot_v + first + count * SIZE + channel, value)

        # A token sees itself, then the shared ones, then those that the slot held before.
        maximum = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale  # (ROWS,)
        total = tl.full((ROWS,), 1.0, tl.float32)
        seen = tl.zeros((ROWS, SIZE), tl.float32) + value.to(tl.float32)[None, :]
        start = head * shared * SIZE
        maximum, total, seen = _attend(queries, shared_k + start, shared_v + start, shared, scale, maximum,
                                       total, seen, SIZE, BLOCK)
        maximum, total, seen = _attend(queries, slot_k + first, slot_v + first, count, scale, maximum, total,
                                       seen, SIZE, BLOCK)
        seen = seen / total[:, None]
        tl.store(out + place, seen.to(out.dtype.element_ty), mask=row < group)

    @triton.jit
    def _nucleus_kernel(probs, mass, least, columns, stride, BLOCK: tl.constexpr):
        """One program a row. Non-negative floats are in the order of their bits, read as integers, of which
        those up to 1 need 30. The answer's are found three at a time, the highest first: of eight candidates,
        the largest whose mass of what is at least as large still reaches the one wanted."""
        row = tl.program_id(0).to(tl.int64)
        probs += row * stride
        wanted = tl.maximum(tl.load(mass + row), 1e-37)  # of a mass of 0 the largest number is left too
        value = tl.full((), 0, tl.int32)
        for place in range(10):
            candidates = value + (tl.arange(0, 8) << (27 - 3 * place))  # (8,)
            totals = tl.zeros((8,), tl.float32)
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = tl.load(probs + column, mask=column < columns, other=0.0)  # (BLOCK,)
                is_inside = x.to(tl.int32, bitcast=True)[None, :] >= candidates[:, None]  # (8, BLOCK)
                totals += tl.sum(tl.where(is_inside, x[None, :], 0.0), 1)
            value = tl.max(tl.where(totals >= wanted, candidates, value), 0)
        tl.store(least + row, value.to(tl.float32, bitcast=True))

    @triton.jit(do_not_specialize=["seed"])  # else every 16th seed would be compiled anew
    def _rounding_kernel(x, out, seed, first, count, BLOCK: tl.constexpr):
        """One program rounds 8 * BLOCK numbers. x is the part of a tensor that begins at its number `first`.
        To the bits of each number 16 random ones are added, which depend on the seed and on its place in the
        tensor; the upper half of the sum is kept."""
        start = (first // (8 * BLOCK) + tl.program_id(0).to(tl.int64)) * 8 * BLOCK
        lane = tl.arange(0, BLOCK)
        words = tl.randint4x(seed, start // 8 + lane)  # 128 random bits, for 8 numbers
        for part in tl.static_range(8):
            noise = (words[part // 2].to(tl.int32, bitcast=True) >> (16 * (part % 2))) & 0xFFFF  # (BLOCK,)
            place = start + part * BLOCK + lane - first
            inside = (place >= 0) & (place < count)
            bits = tl.load(x + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)  # (BLOCK,)
            tl.store(out + place, ((bits + noise) >> 16).to(tl.int16), mask=inside)


def pick_logps(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row of logits (N, columns), and its logit at a target (N,), 0 where that is no
    column: (N,) each, in fp32. Each logit is read once. Columns must be adjacent in memory."""
    rows, columns = logits.shape
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)  # (N,)
    picked = torch.empty_like(lse)  # (N,)
    block = min(triton.next_power_of_2(columns), 8192)
    _pick_kernel[(rows,)](logits, targets, lse, picked, columns, logits.stride(0), BLOCK=block, num_warps=8)
    return lse, picked


def logps_gradient(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """grad * (onehot(target) - exp(logits - lse)), a new tensor like logits (N, columns); the rest (N,)."""
    rows, columns = logits.shape
    out = torch.empty(rows, columns, dtype=logits.dtype, device=logits.device)  # (N, columns)
    block = min(triton.next_power_of_2(columns), 8192)
    grid = rows, triton.cdiv(columns, block)
    _gradient_kernel[grid](logits, targets, lse, grad.contiguous(), out, columns, logits.stride(0),
                           BLOCK=block, num_warps=8)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (..., E) in the type of x, and its factor of each row in fp32, (..., 1). weight (E,)."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)  # (..., 1)
    _norm_kernel[(scale.numel(),)](x, weight, y, scale, size, eps, BLOCK=triton.next_power_of_2(size))
    return y, scale


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor,
                      trains_weight: bool) -> tuple[Tensor, Tensor | None]:
    """d x like x (..., E), and d weight (E,) in fp32, if it is wanted; scale: what `rms_norm` gave."""
    grad, x = grad.contiguous(), x.contiguous()
    rows, size = scale.numel(), x.shape[-1]
    programs = min(rows, 512)
    d_x = torch.empty_like(x)
    d_weight = torch.empty(programs, size, dtype=torch.float32, device=x.device)  # (programs, E)
    _norm_gradient_kernel[(programs,)](grad, x, weight, scale, d_x, d_weight, rows, size,
                                       BLOCK=triton.next_power_of_2(size))
    return d_x, d_weight.sum(0) if trains_weight else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """model.rotate, by the angles times `sign`: x (T, heads, D), cos and sin (T, 1, D) in fp32."""
    x = x.contiguous()
    tokens, heads, size = x.shape
    out = torch.empty_like(x)
    _rotate_kernel[(tokens,)](x, cos, sin, out, heads, sign, ROWS=triton.next_power_of_2(heads),
                              HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2))
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of tensors of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out, block = torch.empty_like(gate), 2048
    _gate_kernel[(triton.cdiv(out.numel(), block),)](gate, up, out, out.numel(), BLOCK=block)
    return out


def swiglu_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu`'s two arguments."""
    grad, gate, up, block = grad.contiguous(), gate.contiguous(), up.contiguous(), 2048
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _gate_gradient_kernel[(triton.cdiv(grad.numel(), block),)](grad, gate, up, d_gate, d_up, grad.numel(),
                                                               BLOCK=block)
    return d_gate, d_up


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slot_k: Tensor, slot_v: Tensor, counts: Tensor,
                     shared_k: Tensor, shared_v: Tensor) -> Tensor:
    """Grouped-query attention of one new token for each of n slots, over itself, A shared tokens and those
    that its slot holds, `counts` of them: behind those its key and value are stored. Scores and softmax are
    fp32.

    q (n, H, D), k and v (n, G, D), slot_k and slot_v (S, G, L, D), counts (S,) int64, shared_k and shared_v
    (G, A, D) -> (n, H, D). All are contiguous. Plain form: sample.Decode.attend.
    """
    slots, heads, size = q.shape
    kv_heads, length = slot_k.shape[1:3]
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(group))  # a product takes at least 16
    out = torch.empty_like(q)
    _decode_kernel[slots, kv_heads](q, k, v, slot_k, slot_v, counts, shared_k, shared_v, out, length,
                                    shared_k.shape[1], size**-0.5, group, ROWS=rows, SIZE=size,
                                    **decode_blocks(size, q.element_size()))
    return out


def decode_blocks(size: int, itemsize: int) -> dict[str, int]:
    """How many tokens are read at a time, and for how many steps ahead: what fits the smallest cards' 99 KB
    of shared memory."""
    is_wide = size * itemsize > 256
    return dict(BLOCK=32 if is_wide else 64, num_stages=3 if itemsize == 2 and not is_wide else 1)


def least_of_nucleus(probs: Tensor, mass: Tensor) -> Tensor:
    """What fast.least_of_nucleus gives: probs (n, V) fp32, at most 1, mass (n, 1) -> (n, 1). Columns must be
    adjacent in memory."""
    mass = mass.contiguous()
    least = torch.empty_like(mass)
    _nucleus_kernel[(len(probs),)](probs, mass, least, probs.shape[1], probs.stride(0), BLOCK=4096,
                                   num_warps=16)
    return least


def round_up_or_down(x: Tensor, out: Tensor, seed: int, first: int = 0) -> None:
    """x in fp32, rounded to one of the two nearest bf16 numbers, as optimizer.round_stochastically does it.
    x: the part of a tensor that begins at its number `first`; seed and place alone decide how a number is
    rounded. x and out are contiguous, out is bf16."""
    block = 1024
    programs = (first + x.numel() - 1) // (8 * block) - first // (8 * block) + 1
    _rounding_kernel[(programs,)](x, out.view(torch.int16), seed, first, x.numel(), BLOCK=block)
