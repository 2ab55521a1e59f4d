"""pieces.py - what each piece of fast.py saves in a whole run: an epoch of DPO and a batch of samples, with
all pieces and with one at a time replaced by its plain form.

    python bench/pieces.py --model DIR --pairs FILE.jsonl [--rows 8] [--rounds 3]
"""

import os
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from side_by_side import clock, measure, parser, ratios, read_rows, report
from train_step import make_pair

import fast
from batches import all_logps
from fast import upcast
from folder import load
from optimizer import MasterAdamW
from run import default_device
from sample import Sampling, generate
from tokenizer import Tokenizer
from train import Args, resolve, train
from training_log import Metrics, State

PLAIN = dict(
    linear_logps=lambda hidden, weight, targets:
        upcast(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1),
    rms_norm=lambda x, weight, eps: F.rms_norm(upcast(x), weight.shape, weight, eps).to(x.dtype),
    swiglu=lambda gate, up: F.silu(gate) * up,
    attention=lambda q, k, v, mask: F.scaled_dot_product_attention(
        q[None], k[None], v[None], mask.to(q.dtype), enable_gqa=True)[0],
    invert_cumulative=lambda mass, uniform:
        (mass.cumsum(-1) <= uniform[:, None] * mass.sum(-1, keepdim=True)).sum(-1),
    tune_allocator=lambda: None,
)


def ours(args) -> None:
    """Train on the rows and sample answers to them, with the piece that --child names in its plain form."""
    plain = PLAIN.get(args.child)
    with mock.patch.object(fast, args.child, plain) if plain else nullcontext():
        fast.tune_allocator()
        settings, device = resolve(Args(model=args.model, dtype=args.dtype)), default_device()
        tokenizer, model = Tokenizer(args.model), load(args.model, getattr(torch, args.dtype), device)
        rows = read_rows(args.pairs, args.rows)
        pairs = [make_pair(row, str(i), tokenizer) for i, row in enumerate(rows)]
        start = clock()
        prompts = [pair.prompt_ids for pair in pairs]
        samples = generate(model, prompts, Sampling(1.0, 0.9, 48), tokenizer.stop_ids, args.seed)
        sampled = clock()
        reference = all_logps(model, pairs, settings)
        optimizer = MasterAdamW(model, settings.lr, settings.seed)
        train(optimizer, pairs, reference, settings, Metrics(Path(os.devnull)), State())
        report(seconds_sampling=sampled - start, seconds_training=clock() - sampled,
               new_tokens=sum(len(sample.ids) for sample in samples))


def cost(reports: dict[str, list[dict]]) -> dict:
    """What a run costs with a piece's plain form, over what it costs as it is."""
    keys = "seconds_sampling", "seconds_training", "peak_rss_mb"
    return dict(plain_over_fast={name: ratios(rounds, reports["as_it_is"], *keys)
                                 for name, rounds in reports.items() if name != "as_it_is"})


def program() -> None:
    p = parser(__doc__)
    p.add_argument("--pairs", required=True, help=".jsonl file with prompt, context, chosen and rejected")
    p.add_argument("--rows", type=int, default=8, help="how many of them")
    args = p.parse_args()
    if args.child:
        ours(args)
    else:
        names = [name for name in PLAIN if name != "attention" or args.dtype == "bfloat16"]
        measure(args, ["as_it_is", *names], cost)


if __name__ == "__main__":
    program()
