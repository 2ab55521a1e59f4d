"""whole.py - the job of README.md's first result, made small, against the same job by transformers and TRL.

Sample pairs of the demo's prompts (right and random contexts), score them with the reference, train one
pass, save, and answer held-out prompts with the start model, with and without context, and the trained one.
Ours are the two commands that a user gives; the peer is the shortest script that does it, with generate and
DPOTrainer. Each side draws its own rows, as many of either. Seconds are those of the whole process, loading
included. Ours also measure what the peer does not: the context gain of the pairs, what the base model makes
of every response, intervals.

    python bench/whole.py --model DIR [--limit 48] [--rounds 1]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import clock, measure, parser, ratios, report

from run import read_json

ROOT = Path(__file__).resolve().parents[1]


def command(*words: str | Path) -> float:
    """Seconds that a program of the project takes."""
    start = clock()
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=sys.stderr, check=True)
    return clock() - start


def ours(args) -> None:
    """The two commands, and what their files say of the parts."""
    with tempfile.TemporaryDirectory() as place:
        run, model = Path(place) / "run", str(Path(args.model).resolve())
        command("train.py", "--model", model, "--data", "demo", "--neg", "random", "--lr", args.lr, "--limit",
                args.limit, "--max-new-tokens", args.max_new, "--dtype", args.dtype, "--out", run)
        tested = command("eval.py", "--model", run, "--limit", args.limit)
        statistics = read_json(run / "pairs.json")["statistics"]
        summary = read_json(run / "summary.json")
        systems = read_json(run / "eval.json")["parts"]["all"]["systems"]
    report(pairs=summary["pairs"],
           seconds_sampling=statistics["seconds_sampling"], seconds_gain=statistics["seconds_gain"],
           seconds_reference=summary["seconds_reference"], seconds_training=summary["seconds_training"],
           seconds_evaluation=tested,
           win_rates={name: system["win_rate"]["mean"] for name, system in systems.items()})


def compared(reports: dict[str, list[dict]]) -> dict:
    """The peer's time and memory over ours, and the share of each part of our time."""
    mine, peers = reports["ours"], reports["trl"]
    parts = ("sampling", "gain", "reference", "training", "evaluation")
    shares = {part: [r[f"seconds_{part}"] / r["process_seconds"] for r in mine] for part in parts}
    return dict(speed=ratios(peers, mine, "process_seconds"), memory=ratios(mine, peers, "peak_rss_mb"),
                shares=shares)


def program() -> None:
    p = parser(__doc__)
    p.add_argument("--limit", type=int, default=48, help="pairs to train on, and rows to evaluate on")
    p.add_argument("--max-new", type=int, default=96, help="tokens of a response at most")
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--peer-batch", type=int, default=4, help="the peer's pairs a step")
    p.add_argument("--peer-attention", default="sdpa", help="the peer's attention implementation")
    args = p.parse_args()
    if args.child == "trl":
        import peers
        peers.whole(args)
    elif args.child:
        ours(args)
    else:
        measure(args, ["ours", "trl"], compared)


if __name__ == "__main__":
    program()
