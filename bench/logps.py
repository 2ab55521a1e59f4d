"""logps.py - what computing every prefix once saves: K responses scored under each of K contexts.

    grouped   a context and its K responses, one pass for each context
    alone     the same K * K log-probs, each response with a context of its own, at most 1024 tokens a pass

Both are losses.response_logps on the same random tokens, forward and backward. share_of_saving: by how much
the time falls, over by how much the tokens do; 1 is all that fewer tokens allow. The head's work, one row a
response token, is the same in both: flops_ratio counts it.

    python bench/logps.py --model DIR [--contexts 8] [--context-tokens 400] [--response-tokens 60]
"""

import random

import torch
from side_by_side import clock, flops, measure, parser, ratios, report

from fast import tune_allocator
from folder import load
from losses import Group, response_logps, split_by_tokens
from model import Decoder
from run import default_device


def random_groups(args, vocabulary: int) -> list[Group]:
    """Every context with all the responses, all of them random tokens."""
    draw = random.Random(0)
    sizes = [args.context_tokens] * args.contexts + [args.response_tokens] * args.contexts
    texts = [draw.choices(range(vocabulary), k=size) for size in sizes]
    return [(context, texts[args.contexts :]) for context in texts[: args.contexts]]


def backward(model: Decoder, groups: list[Group]) -> float:
    """Forward and backward of one pass; the sum of its log-probs."""
    total = torch.stack([lp.sum() for responses in response_logps(model, groups) for lp in responses]).sum()
    total.backward()
    return total.item()


def ours(args) -> None:
    tune_allocator()
    model = load(args.model, getattr(torch, args.dtype), default_device())
    groups = random_groups(args, model.config.vocab_size)
    passes = [[group] for group in groups]
    if args.child == "alone":
        # neighbours have different contexts, so that a pass of several shares nothing
        groups = [(context, [responses[k]]) for k in range(args.contexts) for context, responses in groups]
        passes = list(split_by_tokens(groups, lambda group: [group], 1024))
    backward(model, passes[0])  # sets up memory and gradients
    start = clock()
    logps = sum(backward(model, some) for some in passes)
    seconds = clock() - start
    fed = sum(len(prefix) + sum(len(r) - 1 for r in responses) for prefix, responses in groups)
    report(seconds=seconds, passes=len(passes), tokens=fed, logps=logps,
           flops=sum(flops(model.config, some) for some in passes))


def saving(reports: dict[str, list[dict]]) -> dict:
    """Alone over grouped."""
    ratio = ratios(reports["alone"], reports["grouped"], "seconds", "tokens", "flops")
    time, tokens = ratio["seconds"], ratio["tokens"]["median"]
    return dict(time_ratio=time, token_ratio=tokens, flops_ratio=ratio["flops"]["median"],
                share_of_saving=time["median"] / tokens)


def program() -> None:
    p = parser(__doc__)
    p.add_argument("--contexts", type=int, default=8, help="K: so many contexts, and so many responses")
    p.add_argument("--context-tokens", type=int, default=400)
    p.add_argument("--response-tokens", type=int, default=60)
    args = p.parse_args()
    if args.child:
        ours(args)
    else:
        measure(args, ["grouped", "alone"], saving)


if __name__ == "__main__":
    program()
