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
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from run import main

Group = tuple[list[int], list[list[int]]]  # (prefix ids, ids of each response that continues it)

CHUNK = dict(cpu=2**25, cuda=2**29)  # logits held at a time: 128 MB in fp32 on a CPU, 2 GB on a GPU


# -------------------------------------------------------------------------------- log-probs

class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], forward and backward a chunk of rows at a time.

    Forward keeps only the log-sum-exp of each row; backward makes the chunk's logits again. With upstream
    gradient g:
        d logits = g * (onehot(target) - softmax)    d hidden = d logits @ W    d W = d logits.T @ hidden
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        w = weight.to(hidden.dtype)  # (V, E)
        rows = max(1, CHUNK[hidden.device.type] // w.shape[0])
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logps, lses = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = F.linear(h, w).to(exact)  # (rows, V)
            lses.append(logits.logsumexp(-1))  # (rows,)
            logps.append(logits.gather(1, t[:, None]).squeeze(1) - lses[-1])  # (rows,)
            del logits  # before the next chunk's are made
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, targets, torch.cat(lses))
        return torch.cat(logps)  # (N,)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            h, t, g = hidden[part], targets[part, None], grad[part, None]
            d = F.linear(h, w).to(lse.dtype)  # (rows, V) logits, overwritten below: they are ours alone
            d.sub_(lse[part, None]).exp_().mul_(-g)
            d = d.scatter_add_(1, t, g.to(d.dtype)).to(h.dtype)
            if d_hidden is not None:
                d_hidden[part] = d @ w  # (rows, E)
            if ctx.needs_input_grad[1]:
                part_weight = d.T @ h  # (V, E)
                d_weight = part_weight.to(weight.dtype) if d_weight is None else d_weight.add_(part_weight)
            del d
        return d_hidden, d_weight, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token under softmax(hidden @ weight.T).

    hidden (N, E) in the compute type, weight (V, E) of any float type, targets (N,) int64 -> (N,) fp32, or
    fp64 from fp64. At most CHUNK logits exist at once, in both directions; the log-softmax runs in fp32.
    """
    return _TokenLogps.apply(hidden, weight, targets)


def score(model, groups: list[Group]) -> list[list[Tensor]]:
    """Per-token log-probs of every response after its group's prefix: one (R,) tensor a response,
    differentiable.

    Equal, in value and gradient, to scoring each prefix + response alone. Only positions that predict a
    response token reach the head, and a response's last token, which predicts nothing, is not fed at all.

    With one group, prefix [5, 6] and responses [[7, 8], [9]], what is fed and what is read from it are
        tokens     5  6  7
        predicts      7  8
                      9
    """
    ids, rows, targets, shapes = [], [], [], []
    for prefix, responses in groups:
        if not prefix or not all(responses):
            raise ValueError("score: a prefix or response without tokens has no log-probability")
        last = len(ids) + len(prefix) - 1  # the prefix token that predicts every response's first token
        ids += prefix
        for response in responses:
            rows += [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response[:-1]
            targets += response
        shapes.append((len(prefix), [len(r) - 1 for r in responses]))
    ids, rows, targets = (torch.tensor(x, device=model.head.device) for x in (ids, rows, targets))
    hidden = model(ids, model.pack(shapes))[rows]  # (N, E) of (T, E)
    logps = token_logps(hidden, model.head, targets)  # (N,)
    flat = iter(logps.split([len(r) for _, responses in groups for r in responses]))
    return [[next(flat) for _ in responses] for _, responses in groups]


def batches(groups: list[Group], tokens: int) -> Iterator[list[int]]:
    """Indices of the groups in order, as many at a time as hold at most `tokens` tokens (one group at least).
    """
    batch, used = [], 0
    for i, (prefix, responses) in enumerate(groups):
        size = len(prefix) + sum(map(len, responses))
        if batch and used + size > tokens:
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += size
    if batch:
        yield batch


@torch.no_grad()
def sequence_logps(model, groups: list[Group], tokens: int = 4096, bar=None) -> list[list[float]]:
    """log pi(response | prefix) of each response of each group, summed over tokens, without gradient.

    `tokens`: how many tokens one pass may hold; a pass has at least one group.
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
