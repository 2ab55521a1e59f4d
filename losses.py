"""losses.py - sequence log-probabilities and the objectives built on them.

Everything MIPO trains on is a sum of token log-probs, so two functions carry the file:
    token_logps   hidden states -> log-prob of each target token (Eq. 5's log pi), logits one chunk at a time
    score         groups (prefix, responses) -> those log-probs with every prefix computed once
The objectives are pure functions of small tensors, one entry a pair, the paper's equation beside the line.
What differs from the paper: nothing in the mathematics; Eq. 11's partition term cancels in the difference.

Legend: T packed tokens, N response tokens, E hidden size, V vocabulary, B pairs.

    python losses.py           DPO at the reference: loss ln 2, margin 0
"""

import math
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from run import main

Group = tuple[list[int], list[list[int]]]  # (prefix ids, ids of each response that continues it)

CHUNK = dict(cpu=2**21, cuda=2**27)  # logits held at a time: 8 MB in fp32, of a CPU's cache; a GPU: 256 MB


# -------------------------------------------------------------------------------- log-probs

def plain_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block of the vocabulary: each row's log-sum-exp, and its target's logit where that is in the block
    (0 <= target < columns), else 0.

    logits (N, columns), targets (N,) int64 -> (N,) and (N,), fp32 or, from fp64, fp64.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, columns)
    inside = (targets >= 0) & (targets < x.shape[1])
    picked = x.gather(1, targets.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1)  # (N,)
    return x.logsumexp(-1), picked.where(inside, 0)


def plain_backward(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a block's logits, grad * (onehot(target) - exp(logits - lse)), lse over all blocks.

    logits (N, columns), targets, lse and grad (N,) -> (N, columns) in the type of logits.
    """
    d = (logits - lse[:, None]).exp_().mul_(-grad[:, None])  # (N, columns)
    inside = ((targets >= 0) & (targets < d.shape[1])).nonzero().squeeze(1)
    d[inside, targets[inside]] += grad[inside]
    return d.to(logits.dtype)


if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:  # on a CPU alone Triton need not be there
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(logits, targets, lse, picked, columns, stride, BLOCK: tl.constexpr):
        """One program a row: a running maximum and a running sum, rescaled as the maximum grows."""
        row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31 within a batch
        logits += row * stride
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)  # (BLOCK,)
            higher = tl.maximum(top, tl.max(x, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is no number
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
            top = higher
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < columns)
        value = tl.load(logits + tl.where(inside, target, 0)).to(tl.float32)
        tl.store(picked + row, tl.where(inside, value, 0.0))
        tl.store(lse + row, top + tl.log(total))

    @triton.jit
    def _backward_kernel(logits, targets, lse, grad, out, columns, stride, BLOCK: tl.constexpr):
        """One program a row and BLOCK columns: grad * (onehot(target) - exp(logits - lse))."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < columns, other=float("-inf"))  # (BLOCK,)
        onehot = tl.where(at == tl.load(targets + row), 1.0, 0.0)
        d = tl.load(grad + row) * (onehot - tl.exp(x.to(tl.float32) - tl.load(lse + row)))
        tl.store(out + row * columns + at, d.to(out.dtype.element_ty), mask=at < columns)


def kernel_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """plain_forward by the Triton kernel: bf16, fp16 or fp32 logits with adjacent columns, read once."""
    rows, columns = logits.shape
    lse, picked = torch.empty(2, rows, dtype=torch.float32, device=logits.device)  # (N,) each
    block = min(triton.next_power_of_2(columns), 8192)
    _forward_kernel[(rows,)](logits, targets, lse, picked, columns, logits.stride(0), BLOCK=block,
                             num_warps=8)
    return lse, picked


def kernel_backward(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """plain_backward by the Triton kernel, into a new tensor."""
    rows, columns = logits.shape
    out = torch.empty(rows, columns, dtype=logits.dtype, device=logits.device)  # (N, columns)
    block = min(triton.next_power_of_2(columns), 8192)
    grid = rows, triton.cdiv(columns, block)
    _backward_kernel[grid](logits, targets, lse, grad.contiguous(), out, columns, logits.stride(0),
                           BLOCK=block, num_warps=8)
    return out


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype != torch.float64


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], forward and backward a block of the vocabulary at a time.

    Forward keeps only the log-sum-exp of each row, gathered block by block; backward makes each block's
    logits again. With upstream gradient g:
        d logits = g * (onehot(target) - softmax)    d hidden = d logits @ W    d W = d logits.T @ hidden
    """

    @staticmethod
    def blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of the vocabulary, each with its rows of the weight in hidden's type and all its logits."""
        width = max(1, CHUNK[hidden.device.type] // len(hidden))
        width -= width % 64 if width > 64 else 0
        for start in range(0, len(weight), width):
            part = slice(start, start + width)
            w = weight[part].to(hidden.dtype)  # (columns, E)
            yield part, w, F.linear(hidden, w)  # (N, columns)

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        forward = kernel_forward if _on_gpu(hidden) else plain_forward
        exact = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.full(targets.shape, -math.inf, dtype=exact, device=hidden.device)  # (N,)
        picked = torch.zeros_like(lse)  # (N,)
        for part, _, logits in _TokenLogps.blocks(hidden, weight):
            block_lse, block_picked = forward(logits, targets - part.start)
            lse, picked = torch.logaddexp(lse, block_lse), picked + block_picked
        ctx.save_for_backward(hidden, weight, targets, lse)
        return picked - lse  # (N,)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        backward = kernel_backward if _on_gpu(hidden) else plain_backward
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part, w, logits in _TokenLogps.blocks(hidden, weight):
            d = backward(logits, targets - part.start, lse, grad)  # (N, columns)
            if d_hidden is not None:
                d_hidden += d @ w  # (N, E)
            if d_weight is not None:
                d_weight[part] = d.T @ hidden  # (columns, E)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token under softmax(hidden @ weight.T).

    hidden (N, E) in the compute type, weight (V, E) of any float type, targets (N,) int64 -> (N,) fp32, or
    fp64 from fp64. At most CHUNK logits exist at once, in both directions; the log-softmax runs in fp32.
    """
    return _TokenLogps.apply(hidden, weight, targets)


def common_prefix(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with, while one at least is left of each; 0 for a single one."""
    first, last = min(sequences), max(sequences)  # the two that differ most
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return 0 if len(sequences) == 1 else max(0, min(alike, min(map(len, sequences)) - 1))


def score(model, groups: list[Group]) -> list[list[Tensor]]:
    """Per-token log-probs of every response after its group's prefix: one (R,) tensor a response,
    differentiable.

    Equal, in value and gradient, to scoring each prefix + response alone. What all prefixes begin with (a
    system prompt, worked examples) is computed once. Only positions that predict a response token reach the
    head, and a response's last token, which predicts nothing, is not fed at all.

    With one group, prefix [5, 6] and responses [[7, 8], [9]], what is fed and what is read from it are
        tokens     5  6  7
        predicts      7  8
                      9
    """
    root = common_prefix([prefix for prefix, _ in groups])
    ids, rows, targets, shapes = groups[0][0][:root], [], [], []
    for prefix, responses in groups:
        if not prefix or not all(responses):
            raise ValueError("score: a prefix or response without tokens has no log-probability")
        ids += prefix[root:]
        last = len(ids) - 1  # the prefix token that predicts every response's first token
        for response in responses:
            rows += [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response[:-1]
            targets += response
        shapes.append((len(prefix) - root, [len(r) - 1 for r in responses]))
    ids, rows, targets = (torch.tensor(x, device=model.head.device) for x in (ids, rows, targets))
    layout = model.pack(shapes, root)
    logps = model(ids, layout, lambda hidden, head: token_logps(hidden[rows], head, targets))  # (N,)
    flat = iter(logps.split([len(r) for _, responses in groups for r in responses]))
    return [[next(flat) for _ in responses] for _, responses in groups]


def batches(groups: list[Group], tokens: int) -> Iterator[list[int]]:
    """Indices of the groups in order, as many at a time as hold at most `tokens` tokens, what all prefixes of
    a batch begin with not counted; one group at least."""
    batch, used = [], 0
    for i, (prefix, responses) in enumerate(groups):
        size = len(prefix) + sum(map(len, responses))
        root = common_prefix([groups[j][0] for j in [*batch, i]])
        if batch and used + size - (len(batch) + 1) * root > tokens:
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += size
    if batch:
        yield batch


@torch.no_grad()
def sequence_logps(model, groups: list[Group], tokens: int = 4096, bar=None) -> list[list[float]]:
    """log pi(response | prefix) of each response of each group, summed over tokens, without gradient.

    `tokens`: how many tokens one pass may hold (see batches).
    """
    sums = []
    for batch in batches(groups, tokens):
        sums += [[lp.sum().item() for lp in group] for group in score(model, [groups[i] for i in batch])]
        if bar is not None:
            bar.update(len(batch))
    return sums


# -------------------------------------------------------------------------------- objectives

def dpo(logps: Tensor, reference: Tensor, beta: float,
        label_smoothing: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation of one chosen against N rejected responses; with MIPO's pairs its
    optimum is pointwise MI (Eqs. 9, 14).

    logps, reference (B, 1 + N): log pi(y|x) and log pi_ref(y|x) summed over response tokens, end token
    included, never averaged over length; column 0 is the chosen response. Returns the loss of each pair (B,)
    and, detached, one value a pair (B,) of every metric. At pi = pi_ref the loss is ln(N + 1), the margin 0.
    label_smoothing: the share of pairs taken to have the wrong side chosen.
    """
    rewards = beta * (logps - reference)  # (B, 1 + N): Eq. 11, without the log Z(x) that all share
    log_share = rewards.log_softmax(-1)  # (B, 1 + N): Eq. 8; for N = 1 log sigmoid(+-margin), Eqs. 5 and 10
    loss = -(1 - label_smoothing) * log_share[:, 0]  # (B,)
    if label_smoothing:
        loss = loss - label_smoothing * log_share[:, 1:].mean(-1)
    chosen, rejected = rewards[:, 0], rewards[:, 1:]  # (B,), (B, N)
    metrics = dict(
        loss=loss, margin=chosen - rejected.mean(-1), accuracy=chosen > rejected.amax(-1),
        reward_chosen=chosen, reward_rejected=rejected.mean(-1),
        accuracy_chosen=chosen > 0, accuracy_rejected=(rejected < 0).float().mean(-1),  # Fig. 2's curves
        logp_chosen=logps[:, 0], logp_rejected=logps[:, 1:].mean(-1),
    )  # fmt: skip
    return loss, {key: value.detach().float() for key, value in metrics.items()}


def demo() -> None:
    logps = torch.tensor([[-12.0, -15.0], [-30.0, -33.0]])
    loss, metrics = dpo(logps, logps, beta=0.1)
    print(f"loss {loss.mean():.6f} = ln 2 = {math.log(2):.6f}; margins {metrics['margin'].tolist()}")


if __name__ == "__main__":
    main(demo)
