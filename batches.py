"""batches.py - from pairs to batches, micro-batches and their log-probabilities.

The one place that says which responses of a pair are scored, and under which prompt. Functions take the run's
arguments, train.Args.
What differs from the paper: nothing.

Legend: B pairs of a micro-batch, N rejected responses of a pair.

    python train.py --dry-run      shows a pair as the model sees it
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from losses import OBJECTIVES, Group, response_logps, split_by_tokens
from model import Decoder
from pairs import Pair
from run import progress, seed_from, shard, world


def training_rows(pairs: list[Pair], args) -> list[Pair]:
    """The pairs as training counts them: one for each rejected response (section 4.2), which share their
    chosen one; with --softmax one that holds all rejected responses (Eq. 8)."""
    if args.softmax or not OBJECTIVES[args.method].uses_rejected:
        return pairs
    return [dataclasses.replace(pair, rejected=[response]) for pair in pairs for response in pair.rejected]


def group_of(pair: Pair, args) -> Group:
    """The responses of a pair, all under the right prompt (x, c), also those sampled under another one: this
    is the heart of the method (section 4.2)."""
    responses = pair.responses if OBJECTIVES[args.method].uses_rejected else [pair.chosen]
    return pair.prompt_ids, [response.ids for response in responses]


def pair_logps(model: Decoder, pairs: list[Pair], args) -> tuple[Tensor, Tensor]:
    """log pi(y|x,c) of the chosen and the rejected responses, summed over tokens, and their token counts.

    (B, 1 + N) each, the chosen response first; (B, 1) where rejected responses are not used.
    """
    groups = [group_of(pair, args) for pair in pairs]
    scored = response_logps(model, groups)
    logps = [torch.stack([tokens.sum() for tokens in responses]) for responses in scored]  # (1 + N,) each
    lengths = [[len(ids) for ids in responses] for _, responses in groups]
    return torch.stack(logps), torch.tensor(lengths, device=model.device)


@torch.no_grad()
def all_logps(model: Decoder, pairs: list[Pair], args, label: str = "reference") -> Tensor:
    """log pi(y|x,c) of every pair's responses, (pairs, 1 + N), without gradient.

    The micro-batches are those of the first epoch, so sums round as they will in training, and the first
    step's margins are exactly 0 in any arithmetic. label: of the progress bar.
    """
    dtype = torch.promote_types(model.compute, torch.float32)
    responses = len(group_of(pairs[0], args)[1])
    table = torch.zeros(len(pairs), responses, dtype=dtype, device=model.device)  # (pairs, 1 + N)
    bar = progress(len(pairs), "pairs", label)
    for batch in epoch_batches(len(pairs), args, epoch=0):
        for indices in micro_batches(pairs, batch, args):
            table[indices], _ = pair_logps(model, [pairs[i] for i in indices], args)
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


def micro_batches(pairs: list[Pair], batch: list[int], args) -> list[list[int]]:
    """This process's share of a batch, cut into passes of --pass-tokens tokens (see split_by_tokens)."""
    mine = shard(batch)
    groups = [group_of(pairs[i], args) for i in mine]
    return [[mine[k] for k in chunk] for chunk in split_by_tokens(groups, args.pass_tokens)]


def token_count(group: Group) -> int:
    """All tokens of a prefix and its responses."""
    prefix, responses = group
    return len(prefix) + sum(map(len, responses))
