"""sampling.py - new tokens a second of sampling at temperature 1, against generate of transformers.

Responses end by themselves or after --max-new tokens; tokens count up to the end token, which is included. 64
responses are sampled together, in every round with another seed: a round with longer responses has more
tokens a second. Model load and a warm-up of 4 tokens are done before the clock starts.

    python bench/sampling.py --model DIR --pairs FILE.jsonl [--rows 64] [--max-new 128] [--rounds 3]
    python bench/sampling.py --model DIR --shots FILE.txt [--samples 8]
    python bench/sampling.py --model DIR --pairs FILE.jsonl --profile

With --shots there is one prompt, the text of a file, and --samples responses to it.
"""

from pathlib import Path

import torch
from side_by_side import clock, measure, parser, profiled, ratios, read_rows, report

from data import user_message
from fast import tune_allocator
from folder import load
from run import default_device
from sample import Sampling, generate
from tokenizer import Tokenizer


def user_turns(args) -> list[str]:
    if args.shots:
        return [Path(args.shots).read_text(encoding="utf-8")] * args.samples
    return [user_message(row["prompt"], row.get("context")) for row in read_rows(args.pairs, args.rows)]


def ours(args) -> None:
    tune_allocator()
    tokenizer, turns = Tokenizer(args.model), user_turns(args)
    model = load(args.model, getattr(torch, args.dtype), default_device())
    keys = [(0, j) if args.shots else (j, 0) for j in range(len(turns))]

    def sample(count: int, most: int) -> int:
        """Sample responses to the first `count` turns, and count their tokens."""
        samples = generate(model, [tokenizer.chat(turn) for turn in turns[:count]], Sampling(1.0, 1.0, most),
                           tokenizer.stop_ids, args.seed, keys[:count], slots=64)
        return sum(len(s.ids) for s in samples)

    sample(2, 4)
    if args.profile:
        report(**profiled(lambda: sample(len(turns), args.max_new)))
        return
    start = clock()
    count = sample(len(turns), args.max_new)
    seconds = clock() - start
    report(responses=len(turns), new_tokens=count, seconds=seconds, tokens_per_s=count / seconds)


def speed(reports: dict[str, list[dict]]) -> dict:
    """Ours over the peer's."""
    return dict(ratio=ratios(*reports.values(), "tokens_per_s", "new_tokens", "peak_rss_mb"))


def program() -> None:
    p = parser(__doc__)
    prompts = p.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--pairs", help=".jsonl file with prompt and context")
    prompts.add_argument("--shots", help="text file with one prompt")
    p.add_argument("--rows", type=int, default=64, help="how many of the pairs' prompts")
    p.add_argument("--samples", type=int, default=8, help="responses to the prompt of --shots")
    p.add_argument("--max-new", type=int, default=128, help="longest response, in tokens")
    p.add_argument("--profile", action="store_true", help="ours alone, once: what the time goes to")
    p.add_argument("--peer-attention", default="sdpa", help="the peer's attention implementation")
    args = p.parse_args()
    if args.child == "transformers":
        import peers
        peers.sample(args, user_turns(args))
    elif args.child:
        ours(args)
    elif args.profile:
        args.rounds = 1
        measure(args, ["ours"], lambda reports: {})
    else:
        measure(args, ["ours", "transformers"], speed)


if __name__ == "__main__":
    program()
