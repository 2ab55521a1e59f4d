"""batches.py - from pairs to batches, micro-batches and their log-probabilities.

The one place that says which responses of a pair are scored, and under which prompt. Functions take the run's
arguments, train.Args.
What differs from the paper: InfoNCE and SAMI leave out sets in which a context repeats. N rejected responses
are N rows of their own, as the paper's numbers of steps suggest.

Legend: B pairs of a micro-batch, N rejected responses of a pair, K = 1 + N its responses that are scored (1
        where rejected ones are not used), R tokens of one response. A pass is one call of the model, on at
        most --pass-tokens tokens, and its backward. A micro-batch is the pairs of a pass; one large set of
        InfoNCE or SAMI takes several.

    python train.py --dry-run      shows a pair as the model sees it
"""

import dataclasses
from collections.abc import Callable, Iterable
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fast
from losses import OBJECTIVES, Group, response_logps, split_by_tokens
from model import Decoder
from negatives import Pair
from run import UserError, progress, rank, seed_from, share_of, world
from shard import is_sharded

IDLE: Group = ([0], [[0]])  # the dummy pass of a process with no work left: one token, and one predicted


def training_rows(pairs: list[Pair], args) -> list[Pair]:
    """The pairs as training counts them: one for each rejected response (section 4.2), which share their
    chosen one; with --softmax one that holds all rejected responses (Eq. 8). InfoNCE and SAMI take a pair as
    a set of K responses, each with a context of its own."""
    objective = OBJECTIVES[args.method]
    if objective.every_prompt:
        return distinct_sets(pairs, args)
    if args.softmax or not objective.uses_rejected:
        return pairs
    rows = []
    for pair in pairs:
        rows += [dataclasses.replace(pair, rejected=[response]) for response in pair.rejected]
    return rows


def distinct_sets(pairs: list[Pair], args) -> list[Pair]:
    """The pairs whose K responses come from K different prompts; how many others are left out is printed."""
    size, sets = 1 + args.n_neg, []
    for pair in pairs:
        prompts = [response.prompt_ids for response in pair.responses]
        if pair.context is None or not all(prompts):
            raise UserError(f"--method {args.method} needs responses to one prompt with different contexts, "
                            f"each with the prompt it was sampled from: example {pair.id!r} lacks one")
        if len(set(map(tuple, prompts))) == size:
            sets.append(pair)
    if len(sets) < len(pairs):
        print(f"{len(pairs) - len(sets)} of {len(pairs)} sets repeat a context and are left out")
    if not sets:
        raise UserError(f"--method {args.method}: no set has {size} different contexts: give a smaller "
                        "--n-neg")
    return sets


def groups_of(pair: Pair, args) -> list[Group]:
    """The prompts and responses of a pair that are scored together.

    Every response is scored under the right prompt (x, c), even those sampled under another: this is the
    heart of the method (section 4.2). InfoNCE and SAMI score all of them under each other's prompts too.
    """
    objective = OBJECTIVES[args.method]
    responses = pair.responses if objective.uses_rejected else [pair.chosen]
    prompts = [pair.prompt_ids]  # (x, c)
    if objective.every_prompt:
        prompts = [response.prompt_ids for response in responses]  # (x, c_1), ..., (x, c_K)
    ids = [response.ids for response in responses]
    return [(prompt, ids) for prompt in prompts]


def pair_logps(model: Decoder, pairs: list[Pair], args, pass_count: int = 1) -> tuple[Tensor, Tensor]:
    """log pi(y|x,c) of the chosen and the rejected responses, summed over tokens, and their token counts.

    (B, 1 + N) each, the chosen response first; (B, 1) where rejected responses are not used; log-probs
    (B, K, K) where every response is scored under every prompt: [:, i, j] = log pi(y_j | x, c_i).
    pass_count: how many the busiest process makes (--shard); those that this one lacks are dummies.
    """
    sets = [groups_of(pair, args) for pair in pairs]
    passes = passes_of(sets, args)
    idle = max(0, pass_count - len(passes))
    scored = score_passes(model, passes + [[IDLE]] * idle)

    sums = torch.stack([tokens.sum() for responses in scored for tokens in responses])
    sums = sums[: len(sums) - idle]  # (B * prompts * K,); the gradient of the rest is 0
    counts = [[len(ids) for ids in groups[0][1]] for groups in sets]  # tokens of each response
    lengths = fast.sent(counts, model.device)  # (B, K)
    logps = sums.view(len(pairs), -1, lengths.shape[1])  # (B, prompts, K)
    if not OBJECTIVES[args.method].every_prompt:
        logps = logps[:, 0]  # (B, K)
    return logps, lengths


def passes_of(sets: Iterable[list[Group]], args) -> list[list[Group]]:
    """The groups of some pairs, cut into passes of --pass-tokens tokens."""
    groups = [group for groups in sets for group in groups]
    return list(split_by_tokens(groups, lambda group: [group], args.pass_tokens))


def score_passes(model: Decoder, passes: list[list[Group]]) -> list[list[Tensor]]:
    """For each group of each pass the token log-probs of each response, (R,).

    A set of K prompts may be more than one pass. Its passes are then computed twice: once keeping only the
    log-probs, and again, pass by pass, when their gradients are known.
    """
    if len(passes) == 1:
        return response_logps(model, passes[0])
    scored: list[list[Tensor]] = []
    for groups in passes:
        scored += checkpoint(response_logps, model, groups, use_reentrant=False)
    return scored


def idle_passes(model: Decoder, pass_count: int) -> Tensor:
    """A loss of 0 with a gradient of 0: dummy passes of a process that has no work left."""
    return 0 * sum(tokens.sum() for [tokens] in score_passes(model, [[IDLE]] * pass_count))


@torch.no_grad()
def all_logps(model: Decoder, pairs: list[Pair], args, label: str = "reference") -> Tensor:
    """log pi(y|x,c) of every pair's responses, (pairs, 1 + N), without gradient; for an objective that uses
    no reference nothing is computed, and (pairs, 1) zeros stand in.

    The micro-batches are those of the first epoch, so sums round as they will in training, and the first
    step's margins are exactly 0 in any arithmetic. label: of the progress bar.
    """
    if not OBJECTIVES[args.method].uses_reference:
        return torch.zeros(len(pairs), 1, device=model.device)
    dtype = torch.promote_types(model.compute, torch.float32)
    _, responses = groups_of(pairs[0], args)[0]
    table = torch.zeros(len(pairs), len(responses), dtype=dtype, device=model.device)  # (pairs, 1 + N)
    bar = progress(len(pairs), "pairs", label)
    for batch in epoch_batches(len(pairs), args, epoch=0):
        for indices, pass_count in micro_batches_together(model, pairs, batch, args):
            if not indices:
                idle_passes(model, pass_count)
                continue
            micro_batch = [pairs[i] for i in indices]
            rows = fast.sent(indices, model.device)
            table[rows], _ = pair_logps(model, micro_batch, args, pass_count)
        bar.update(len(batch))
    bar.close()
    if world() > 1:
        dist.all_reduce(table)  # every pair was scored by one process, the others have 0 there
    return table


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the pairs: a permutation that (seed, epoch) alone decides."""
    generator = torch.Generator().manual_seed(seed_from("order", seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def epoch_batches(count: int, args, epoch: int) -> list[list[int]]:
    """An epoch's batches, each the indices of --batch pairs; the last one has what is left."""
    order, size = epoch_order(count, args.seed, epoch), args.batch
    return [order[i : i + size] for i in range(0, count, size)]


def micro_batches(batch: list, groups: Callable, args, process: int | None = None) -> list[list]:
    """A process's share of a batch, by default this one's, cut into micro-batches.

    groups(item) -> the prompts and responses of an item of the batch (see split_by_tokens).
    """
    return list(split_by_tokens(share_of(batch, process), groups, args.pass_tokens))


def micro_batches_together(model: Decoder, pairs: list[Pair], batch: list[int],
                           args) -> list[tuple[list[int], int]]:
    """This process's micro-batches, each with the least number of passes that it must take: 1, if every
    process holds the whole model.

    Sharded weights are gathered for every pass by all processes. So every process runs as many micro-batches,
    of as many passes, as the busiest one: micro-batches that it lacks are empty here, and `pair_logps` and
    `idle_passes` make up its missing passes. Each process computes this for all, without communication.
    """
    def groups(i: int) -> list[Group]:
        return groups_of(pairs[i], args)

    if not is_sharded(model):
        return [(indices, 1) for indices in micro_batches(batch, groups, args)]
    shares = [micro_batches(batch, groups, args, process) for process in range(world())]
    counts = []
    for share in shares:
        counts.append([len(passes_of(map(groups, indices), args)) for indices in share])
    most = [max(column) for column in zip_longest(*counts, fillvalue=0)]
    return list(zip_longest(shares[rank()], most, fillvalue=[]))
