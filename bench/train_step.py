"""train_step.py - pairs a second of DPO, tokenising and reference included, against TRL's DPOTrainer.

One epoch over ready pairs, 4 of them a step, fp32 master weights, AdamW, no gradient
checkpointing; the model that is trained is loaded before the clock starts. Rows of the file have prompt,
context, chosen and rejected.

    python bench/train_step.py --model DIR --pairs FILE.jsonl [--rows 32] [--rounds 3] [--peer none]
    python bench/train_step.py --model DIR --pairs FILE.jsonl --growth --rounds 1
    python bench/train_step.py --model DIR --pairs FILE.jsonl --profile

--growth runs ours alone on the rows once, 4 and 16 times over: seconds a pair and memory must not grow.
"""

import os
from pathlib import Path

import torch
from side_by_side import clock, measure, parser, profiled, ratios, read_rows, report

from batches import all_logps
from data import user_message
from fast import tune_allocator
from folder import load
from negatives import Pair, Response
from optimizer import MasterAdamW
from run import default_device
from tokenizer import Tokenizer
from train import Args, resolve, train
from training_log import Metrics, State

COPIES = dict(ours=1, ours_4x=4, ours_16x=16)  # child -> how often it takes the rows


def make_pair(row: dict, id: str, tokenizer: Tokenizer) -> Pair:
    """A ready pair of a file as the ids that the model is trained on."""
    prompt = tokenizer.chat(user_message(row["prompt"], row.get("context")))
    chosen, rejected = (Response(row[side], tokenizer.response(row[side]), True, prompt)
                        for side in ("chosen", "rejected"))
    return Pair(id, row["prompt"], row.get("context"), chosen, [rejected])


def ours(args, copies: int) -> None:
    """An epoch as train.py runs it: reference log-probs by a model that is dropped again, then DPO."""
    tune_allocator()
    settings, device = resolve(Args(model=args.model, batch=4, lr=1e-6, dtype=args.dtype)), default_device()
    rows, tokenizer = read_rows(args.pairs, args.rows), Tokenizer(args.model)
    dtype = getattr(torch, args.dtype)
    model = load(args.model, dtype, device)
    start = clock()
    pairs = [make_pair(row, f"{i}-{copy}", tokenizer) for copy in range(copies) for i, row in enumerate(rows)]
    reference = all_logps(load(args.model, dtype, device), pairs, settings)
    referred = clock() - start

    def train_once() -> State:
        optimizer, state = MasterAdamW(model, settings.lr, settings.seed), State()
        train(optimizer, pairs, reference, settings, Metrics(Path(os.devnull)), state)
        return state

    state = train_once()
    seconds = clock() - start
    if args.profile:  # the second time around, when memory is there
        report(**profiled(train_once))
        return
    report(pairs=len(pairs), seconds=seconds, pairs_per_s=len(pairs) / seconds,
           seconds_per_pair=seconds / len(pairs), seconds_reference=referred,
           steps=state.step, skipped=state.skipped, tokens=state.tokens)


def speed(reports: dict[str, list[dict]]) -> dict:
    """Ours over the peer's, where there is one."""
    return {} if len(reports) == 1 else dict(ratio=ratios(*reports.values(), "pairs_per_s", "peak_rss_mb"))


def growth(reports: dict[str, list[dict]]) -> dict:
    """Time of a pair and peak memory over those with the fewest pairs: 1 is ideal."""
    return dict(growth={name: ratios(some, reports["ours"], "seconds_per_pair", "peak_rss_mb")
                        for name, some in reports.items()})


def program() -> None:
    p = parser(__doc__)
    p.add_argument("--pairs", required=True, help=".jsonl file with prompt, context, chosen and rejected")
    p.add_argument("--rows", type=int, default=32, help="how many of them")
    p.add_argument("--peer", choices=("trl", "none"), default="trl")
    p.add_argument("--peer-batch", type=int, default=4, help="the peer's pairs a step")
    p.add_argument("--peer-attention", default="sdpa", help="the peer's attention implementation")
    p.add_argument("--profile", action="store_true", help="ours alone, once: what the time goes to")
    p.add_argument("--growth", action="store_true", help="ours alone, on 1, 4 and 16 times the rows")
    args = p.parse_args()
    if args.child == "trl":
        import peers
        peers.dpo(args)
    elif args.child:
        ours(args, COPIES[args.child])
    elif args.profile:
        args.rounds = 1
        measure(args, ["ours"], lambda reports: {})
    elif args.growth:
        measure(args, list(COPIES), growth)
    else:
        measure(args, ["ours"] if args.peer == "none" else ["ours", args.peer], speed)


if __name__ == "__main__":
    program()
