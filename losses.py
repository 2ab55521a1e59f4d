"""losses.py - the objectives, and the response log-probabilities they use.

    dpo      Eqs. 5, 8 and 10: with missing contexts, sampled at temperature 1 and top-p 1, its optimal reward
             is pointwise mutual information (Eqs. 9, 14)
    sft      Eq. 3: token cross-entropy on the chosen responses
    infonce  Eq. 6: which of K contexts a response was sampled with
    sami     Eq. 7: that, and which of K responses was sampled with a context

Each is a pure function of small tensors, one row per pair. The functions below them produce these tensors:
`token_logps`, hidden states -> the log-prob of each target token, and `response_logps`, which scores all
responses to a prompt and computes the prompt once. What differs from the paper: label smoothing and --nll are
ours, and off. The partition term of Eq. 11 cancels in the difference; Eqs. 6 and 7 are written as
cross-entropies, which are larger by the constant log K; and any K >= 2 is accepted, where the authors' code
supports only 2.

Legend: B pairs, N rejected responses of a pair, K = 1 + N responses of a pair and their contexts, T tokens,
        R tokens of one response, E hidden size, V vocabulary. The paper's N in Eq. 8 is this K; its y_i and
        c_j in Eq. 6 are y_j and c_i here.

    python losses.py           DPO at the reference: loss ln 2, margin 0
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fast
from model import Decoder, Packed
from run import main

Group = tuple[list[int], list[list[int]]]  # (ids of a prefix, ids of each response that continues it)
Loss = tuple[Tensor, dict[str, Tensor]]  # a loss of each pair (B,), and metrics by name, (B,) each


# ------------------------------------------------------------------------- objectives

def dpo(logps: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0) -> Loss:
    """Direct preference optimisation of one chosen against N rejected responses (Eq. 5; N > 1: Eq. 8).

    logps, reference (B, 1 + N): log pi(y|x,c) and log pi_ref(y|x,c), summed over the response's tokens with
    the end token, never averaged over length; column 0 is the chosen response. label_smoothing: the share of
    pairs in which one of the rejected responses is taken to be the better one.

    Returns the loss of each pair (B,) and, detached, one value per pair (B,) for each metric. At pi = pi_ref
    the loss is ln(1 + N) and the margin 0.
    """
    # Eq. 11: r = beta log(pi / pi_ref) + beta log Z(x, c), from Eq. 4 (the paper prints - log Z). The last
    # term is the same for all responses of a prompt, and only differences count.
    rewards = beta * (logps - reference)  # (B, 1 + N)

    # The chosen response's share of a softmax over rewards. For N = 1 it is sigmoid(r_chosen - r_rejected),
    # Bradley and Terry's probability (Eq. 1), and its negative log Eq. 5; for N > 1 that is Eq. 8.
    log_share = rewards.log_softmax(-1)  # (B, 1 + N)
    loss = -(1 - label_smoothing) * log_share[:, 0]  # (B,)
    if label_smoothing:
        loss = loss - label_smoothing * log_share[:, 1:].mean(-1)

    chosen, rejected = rewards[:, 0], rewards[:, 1:]  # (B,), (B, N)
    metrics = dict(
        loss=loss,
        margin=chosen - rejected.mean(-1),
        accuracy=chosen > rejected.amax(-1),
        reward_chosen=chosen,
        reward_rejected=rejected.mean(-1),
        accuracy_chosen=chosen > 0,  # the two curves of Fig. 2
        accuracy_rejected=(rejected < 0).float().mean(-1),
        logp_chosen=logps[:, 0],
        logp_rejected=logps[:, 1:].mean(-1),
    )
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def sft(logps: Tensor) -> Loss:
    """Supervised fine-tuning on the chosen response (Eq. 3): its negative log-likelihood, summed over tokens.

    logps (B, 1). Returns (B,), which the trainer divides by all tokens of the batch, and metrics (B,).
    """
    loss = -logps[:, 0]  # (B,)
    detached = loss.detach().float()
    return loss, dict(loss=detached, logp_chosen=-detached)


def over_contexts(scores: Tensor) -> Tensor:
    """Cross-entropy of a response's own context among all K, mean over the K responses: (B, K, K) -> (B,)."""
    log_share = scores.log_softmax(-2)  # of every context i, for a fixed response j
    return -log_share.diagonal(dim1=-2, dim2=-1).mean(-1)  # (B,)


def over_responses(scores: Tensor) -> Tensor:
    """Cross-entropy of a context's own response among all K, mean over the K contexts: (B, K, K) -> (B,)."""
    return over_contexts(scores.mT)


def infonce(logps: Tensor, temperature: float = 100.0) -> Loss:
    """Information noise-contrastive estimation over the contexts of one prompt (Eq. 6, plus log K).

    logps (B, K, K): logps[:, i, j] = log pi(y_j | x, c_i), where y_j was sampled with c_j. There is no
    reference: the temperature plays the part of 1 / beta in DPO. Do not use 1: there the softmax is already
    the true posterior over contexts, so that the expected gradient at the start model is zero. The authors
    divide sums over tokens by 100.

    Returns the loss of each set (B,) and metrics (B,), detached.
    """
    loss = over_contexts(logps / temperature)  # (B,)
    return loss, set_metrics(loss, logps)


def sami(logps: Tensor, temperature: float = 1.0) -> Loss:
    """Self-supervised alignment with mutual information (Eq. 7, plus log K): InfoNCE over contexts and over
    responses, in equal parts. logps and results as in `infonce`.

    At temperature 1 only the term over responses has a gradient at the start model; with log-probs summed
    over tokens, as the authors' are, differences in length dominate it.
    """
    scores = logps / temperature
    loss = (over_contexts(scores) + over_responses(scores)) / 2  # (B,)
    return loss, set_metrics(loss, logps)


def set_metrics(loss: Tensor, logps: Tensor) -> dict[str, Tensor]:
    """Of each set (B,): the loss; by how much a response's own context stands out (margin), and for what
    share of responses it is the likeliest (accuracy); a lower bound on I(c; y | x), with missing contexts
    on what y says of whether c was given; the mean log-prob of responses under their own contexts (chosen),
    and under the others (rejected)."""
    logps = logps.detach().float()
    count = logps.shape[-1]
    own = logps.diagonal(dim1=-2, dim2=-1)  # (B, K)
    others = (logps.sum(-2) - own) / (count - 1)  # (B, K): the mean over a response's other contexts
    is_own = torch.eye(count, dtype=torch.bool, device=logps.device)
    rivals = logps.masked_fill(is_own, -math.inf).amax(-2)  # (B, K): the likeliest of them
    return dict(
        loss=loss.detach().float(),
        margin=(own - others).mean(-1),
        accuracy=(own > rivals).float().mean(-1),
        information=math.log(count) - over_contexts(logps),  # at most log K
        logp_chosen=own.mean(-1),
        logp_rejected=others.mean(-1),
    )


@dataclass(frozen=True)
class Objective:
    """What a method trains on. A new one is a function of log-probs and a row of OBJECTIVES.

    loss(logps, reference, lengths, args) -> the loss of each pair (B,), and metrics, name -> (B,), detached,
    with "loss" among them. logps, reference and lengths (in tokens) are (B, 1 + N), the chosen response
    first, or (B, 1) where rejected responses are not used; with `every_prompt` logps are (B, K, K), as in
    `infonce`. Without `uses_reference` reference is (B, 1) zeros. args: the run's arguments, train.Args.
    """

    loss: Callable[[Tensor, Tensor, Tensor, object], Loss]
    uses_rejected: bool  # whether rejected responses are scored beside the chosen one
    uses_reference: bool  # whether the start model's log-probs are needed
    mean_over: str  # a step's loss is the mean over its "pairs" or over their chosen "tokens"
    every_prompt: bool = False  # whether responses are scored under each other's prompts too
    temperature: float | None = None  # log-probs are divided by --temperature-loss, by default by this


def dpo_loss(logps: Tensor, reference: Tensor, lengths: Tensor, args) -> Loss:
    """dpo, plus --nll times the chosen response's negative log-likelihood per token."""
    loss, metrics = dpo(logps, reference, args.beta, args.label_smoothing)
    if args.nll:
        loss = loss - args.nll * logps[:, 0] / lengths[:, 0]
        metrics["loss"] = loss.detach().float()
    return loss, metrics


def sft_loss(logps: Tensor, reference: Tensor, lengths: Tensor, args) -> Loss:
    """sft, which needs only log-probs."""
    return sft(logps)


def infonce_loss(logps: Tensor, reference: Tensor, lengths: Tensor, args) -> Loss:
    """infonce, on log-probs summed or averaged over tokens as --reduce says."""
    return infonce(reduced(logps, lengths, args.reduce), args.temperature_loss)


def sami_loss(logps: Tensor, reference: Tensor, lengths: Tensor, args) -> Loss:
    """sami, on log-probs summed or averaged over tokens as --reduce says."""
    return sami(reduced(logps, lengths, args.reduce), args.temperature_loss)


def reduced(logps: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    """Sums over tokens as they are, or as means. logps (B, K, K), lengths (B, K) of the K responses."""
    return logps / lengths[:, None, :] if reduce == "mean" else logps


OBJECTIVES = {
    "dpo": Objective(dpo_loss, uses_rejected=True, uses_reference=True, mean_over="pairs"),
    "sft": Objective(sft_loss, uses_rejected=False, uses_reference=False, mean_over="tokens"),
    "sft-revise": Objective(sft_loss, uses_rejected=False, uses_reference=False, mean_over="tokens"),
    # The temperatures are the authors', for log-probs summed over tokens.
    "infonce": Objective(infonce_loss, uses_rejected=True, uses_reference=False, mean_over="pairs",
                         every_prompt=True, temperature=100.0),
    "sami": Objective(sami_loss, uses_rejected=True, uses_reference=False, mean_over="pairs",
                      every_prompt=True, temperature=1.0),
}


def require_one_each(count: int, loss: Tensor, metrics: dict[str, Tensor]) -> None:
    """ValueError where a loss or a metric is not one value for each of `count` pairs, or the metric "loss" is
    missing. Otherwise a mean would pass unseen, only to be divided by the batch size again."""
    shapes = {name: tuple(value.shape) for name, value in {"the loss itself": loss, **metrics}.items()}
    wrong = [f"{name} is {shape}" for name, shape in shapes.items() if shape != (count,)]
    if "loss" not in metrics:
        wrong.append("the metric loss is missing")
    if wrong:
        raise ValueError(f"an objective's loss and metrics are ({count},), a value a pair; here "
                         f"{', '.join(wrong)}")


# ------------------------------------------------------------------------- log-probs

def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target token: log softmax(hidden @ weight.T)[target].

    hidden (T, E) in the compute type, weight (V, E), targets (T,) int64 -> (T,) in fp32 (in fp64 from fp64).
    It equals (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1), but the
    logits never exist all at once: fast.py computes them slice by slice, forward and backward.
    """
    return fast.linear_logps(hidden, weight, targets)


def response_logps(model: Decoder, groups: list[Group]) -> list[list[Tensor]]:
    """Log-probs of the tokens of every response after its group's prefix: one (R,) tensor per response.

    Equal in value and gradient to scoring each prefix + response alone, but each prefix, and whatever all
    prefixes share (a chat template, worked examples), is computed once. Only positions that predict a
    response token reach the output layer.
    """
    responses = [response for _, of_prefix in groups for response in of_prefix]
    targets = fast.sent([token for response in responses for token in response], model.device)
    logps = token_logps(states_before(model, groups), model.head, targets)  # (response tokens,)
    remaining = iter(logps.split([len(response) for response in responses]))  # (R,) each
    return [[next(remaining) for _ in of_prefix] for _, of_prefix in groups]


def states_before(model: Decoder, groups: list[Group]) -> Tensor:
    """The hidden states that predict the tokens of every response, in their order: (response tokens, E).

    A response's last token predicts nothing and is not fed at all. With one group, prefix [5, 6] and
    responses [[7, 8], [9]], what is fed and what is predicted from it are

        fed         5  6  7
        predicted      7  8
                       9
    """
    root = common_prefix_length([prefix for prefix, _ in groups])
    ids = groups[0][0][:root]  # all tokens that are fed
    predicted_from: list[int] = []  # for each response token, the position in `ids` that predicts it
    shapes = []  # for Packed: how many tokens are fed of each prefix, and of each of its responses
    for prefix, responses in groups:
        if not prefix or not all(responses):
            raise ValueError("states_before: an empty prefix or response has no state that predicts it")
        ids += prefix[root:]
        last = len(ids) - 1  # the prefix's last token predicts the first token of every response
        for response in responses:
            predicted_from += [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response[:-1]
        shapes.append((len(prefix) - root, [len(response) - 1 for response in responses]))

    device = model.device
    hidden = model(fast.sent(ids, device), Packed(shapes, root, device=device))  # (T, E)
    return hidden[fast.sent(predicted_from, device)]  # (response tokens, E)


def common_prefix_length(sequences: list[list[int]]) -> int:
    """Length of the longest common prefix that leaves each sequence at least one token; 0 for just one."""
    if len(sequences) == 1:
        return 0
    longest = min(map(len, sequences)) - 1
    least, greatest = min(sequences), max(sequences)  # what these two share, all share
    for position, (a, b) in enumerate(zip(least, greatest, strict=False)):
        if position == longest or a != b:
            return position
    return 0


def token_count(groups: list[Group]) -> int:
    """All tokens of the groups' prefixes and responses."""
    return sum(len(prefix) + sum(map(len, responses)) for prefix, responses in groups)


def split_by_tokens(items: list, groups_of: Callable[[Any], list[Group]], max_tokens: int) -> Iterator[list]:
    """Cut a list into chunks whose groups hold at most `max_tokens` tokens, or into single items with more.

    groups_of: the groups of an item, which stay together. What all prefixes of a chunk share is computed once
    for all of them, and is not counted.
    """
    chunk: list = []
    used, prefixes = 0, []
    for item in items:
        groups = groups_of(item)
        own_prefixes = [prefix for prefix, _ in groups]
        size = token_count(groups)
        root = common_prefix_length(prefixes + own_prefixes)
        shared = root * (len(prefixes) + len(groups))
        if chunk and used + size - shared > max_tokens:
            yield chunk
            chunk, used, prefixes = [], 0, []
        chunk.append(item)
        used += size
        prefixes += own_prefixes
    if chunk:
        yield chunk


@torch.no_grad()
def sequence_logps(model: Decoder, groups: list[Group], max_tokens: int = 4096,
                   bar=None) -> list[list[float]]:
    """log pi(response | prefix) of each response of each group, summed over tokens, without gradient.

    max_tokens: how many tokens one forward pass may hold (see split_by_tokens). Without a gradient no
    activations are kept, so the default suits most machines. bar: a progress bar that counts groups.
    """
    sums: list[list[float]] = []
    for chunk in split_by_tokens(groups, lambda group: [group], max_tokens):
        scored = response_logps(model, chunk)
        each = [logps.sum() for responses in scored for logps in responses]
        remaining = iter(torch.stack(each).tolist())  # one wait for the device
        sums += [[next(remaining) for _ in responses] for responses in scored]
        if bar is not None:
            bar.update(len(chunk))
    return sums


# ------------------------------------------------------------------------- command line

def program() -> None:
    logps = torch.tensor([[-12.0, -15.0], [-30.0, -33.0]])  # (B, 2): two pairs
    loss, metrics = dpo(logps, reference=logps, beta=0.1)
    margins = metrics["margin"].tolist()
    print(f"loss {loss.mean():.6f} = ln 2 = {math.log(2):.6f}; margins {margins}")


if __name__ == "__main__":
    main(program)
