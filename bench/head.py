"""head.py - hidden states to token log-probs and back, against what one would write or install instead.

    ours           losses.token_logps: blocks of the vocabulary, on a GPU the Triton kernels over them
    materialised   log_softmax of all logits, gathered
    torch          torch.nn.functional.linear_cross_entropy, reduction "none", with LinearCrossEntropyOptions:
                   else it makes all logits at once (torch 2.13 and later)
    liger, cce     Liger's fused linear cross-entropy, cut-cross-entropy's "none", where they are installed

Every token has an upstream gradient of its own, as in DPO; hidden states and weight both get theirs. The
model's shape by default, random numbers. Seconds are medians of five after one that warms up; memory is the
peak.

    python bench/head.py --model DIR [--tokens 1024]
"""

import importlib.util
import statistics

import torch
import torch.nn.functional as F
from side_by_side import clock, measure, parser, ratios, report

from config import Config
from fast import tune_allocator
from folder import find
from losses import token_logps
from run import default_device, read_json


def materialised(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()  # (N, V)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)  # (N,)


def fused_by_torch(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def cce(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy
    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


HEADS = dict(ours=token_logps, materialised=materialised, torch=fused_by_torch, liger=liger, cce=cce)


def available() -> list[str]:
    """The heads that can run here."""
    there = dict(torch=hasattr(F, "linear_cross_entropy"),
                 liger=torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"),
                 cce=torch.cuda.is_available() and importlib.util.find_spec("cut_cross_entropy"))
    return [name for name in HEADS if there.get(name, True)]


def run_head(head, tokens: int, size: int, vocabulary: int, device: torch.device) -> dict:
    """Seconds forward and backward, and how far the log-probs are from fp64's on 64 tokens."""
    generator = torch.Generator(device).manual_seed(0)
    made = dict(generator=generator, device=device)
    hidden = torch.randn(tokens, size, **made).bfloat16().requires_grad_()  # (N, E)
    weight = torch.randn(vocabulary, size, **made).mul_(size**-0.5).bfloat16().requires_grad_()  # (V, E)
    targets, upstream = torch.randint(vocabulary, (tokens,), **made), torch.rand(tokens, **made)  # (N,)
    with torch.no_grad():
        some = slice(0, 64)
        exact = exact_logps(hidden[some], weight, targets[some])
        error = (head(hidden, weight, targets)[some] - exact).abs().max().item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    forward, backward = [], []
    for _ in range(6):
        hidden.grad = weight.grad = None
        start = clock()
        logps = head(hidden, weight, targets)
        middle = clock()
        logps.backward(upstream.to(logps.dtype))
        forward.append(middle - start)
        backward.append(clock() - middle)
    there, back = statistics.median(forward[1:]), statistics.median(backward[1:])
    return dict(seconds_forward=there, seconds_backward=back, seconds=there + back, error=error)


def exact_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In fp64, a slice of the vocabulary at a time: a whole copy of the weight would show in the peak memory.
    """
    hidden = hidden.double()  # (N, E)
    lse = torch.full_like(hidden[:, 0], -torch.inf)  # (N,)
    for part in weight.split(256):
        lse = torch.logaddexp(lse, (hidden @ part.double().T).logsumexp(-1))
    return (hidden * weight[targets].double()).sum(-1) - lse


def compare(reports: dict[str, list[dict]]) -> dict:
    """Every other head's time and memory over ours."""
    return {name: ratios(some, reports["ours"], "seconds", "peak_rss_mb")
            for name, some in reports.items() if name != "ours"}


def program() -> None:
    p = parser(__doc__)
    p.add_argument("--tokens", type=int, default=1024, help="response tokens")
    args = p.parse_args()
    if not args.child:
        measure(args, available(), compare)
        return
    tune_allocator()
    c = Config.from_dict(read_json(find(args.model) / "config.json"))
    report(**run_head(HEADS[args.child], args.tokens, c.hidden_size, c.vocab_size, default_device()))


if __name__ == "__main__":
    program()
