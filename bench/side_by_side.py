"""side_by_side.py - what the benchmarks share: children in processes of their own, in turns, and the result.

A benchmark starts itself again as a child for every measurement: ours, peer, ours, peer, ... Whatever slows
the machine for a while then hits both, and neither inherits the other's memory. A child's last line of output
is one JSON object. The parent stays small: on Linux a child's peak memory is never below its parent's.

    python bench/side_by_side.py       the machine: matrix products, copying, versions
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from fast import tune_allocator
from losses import Group, common_prefix_length
from run import default_device, default_dtype, environment, read_jsonl, write_json


def clock() -> float:
    """Seconds, once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def read_rows(path: str, count: int) -> list[dict]:
    """The first `count` rows of a .jsonl file."""
    return [row for _, row in read_jsonl(Path(path))][:count]


def report(**values) -> None:
    """A child's last words: its measurements, and the peak memory of the largest of it and its children."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    values["peak_rss_mb"] = max(used) / unit
    if torch.cuda.is_available():
        values["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(values), flush=True)


def copy_speed(count: int = 2**26) -> float:
    """Bytes a second that a copy of `count` numbers reads and writes."""
    a = torch.ones(count, device=default_device())
    b, best = torch.empty_like(a), float("inf")
    for _ in range(6):
        start = clock()
        b.copy_(a)
        best = min(best, clock() - start)
    return 2 * a.nbytes / best


def fresh_memory(count: int = 2**28) -> float:
    """Seconds that a byte costs when a process writes it for the first time, above those of writing it."""
    seconds, a = [], torch.empty(count)
    for _ in range(2):
        start = time.perf_counter()
        a.fill_(1)
        seconds.append(time.perf_counter() - start)
    return (seconds[0] - seconds[1]) / a.nbytes


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s that this machine reaches on a large square matrix product, measured here."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = clock()
        a @ a
        best = min(best, clock() - start)
    return 2 * n**3 / best


def flops(c: Config, groups: list[Group]) -> float:
    """Floating-point operations of one forward and backward pass over groups, matrix products alone: 6 for
    every weight and token, and 6 for every channel and pair of tokens that see each other, twice."""
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    weights = c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
    root = common_prefix_length([prefix for prefix, _ in groups])
    fed, seen, predicted = root, root * root / 2, 0  # tokens, pairs of them, response tokens
    for prefix, responses in groups:
        for start, n in [(root, len(prefix) - root), *((len(prefix), len(r) - 1) for r in responses)]:
            fed, seen = fed + n, seen + n * start + n * n / 2
        predicted += sum(map(len, responses))
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return 6 * (weights * fed + c.vocab_size * c.hidden_size * predicted + attention)


def machine() -> None:
    """Report what the machine reaches now: FLOP/s in bf16, bytes a copy reads and writes a second, seconds a
    GB of fresh memory costs a process (on huge pages, as training takes it)."""
    tune_allocator()
    fresh = fresh_memory()
    dtype = getattr(torch, default_dtype())
    report(**environment(), dtype=default_dtype(),
           matmul_gflops=matmul_ceiling(dtype, default_device()) / 1e9,
           copy_gb_per_s=copy_speed() / 1e9, fresh_seconds_per_gb=1e9 * fresh)


def profiled(work: Callable[[], None]) -> dict:
    """Host seconds of all torch operations in a piece of work, and the share that each takes itself."""
    with profile(activities=[ProfilerActivity.CPU]) as p:
        work()
    spent = {event.key: event.self_cpu_time_total for event in p.key_averages()}
    total = sum(spent.values())
    shares = {key: value / total for key, value in sorted(spent.items(), key=lambda item: -item[1])}
    return dict(seconds=total / 1e6, shares={key: value for key, value in shares.items() if value > 0.005})


def parser(doc: str) -> argparse.ArgumentParser:
    """A benchmark's command line with the options that all have."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    p.add_argument("--dtype", default=default_dtype(), choices=("bfloat16", "float32"), help="arithmetic")
    p.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    p.add_argument("--name", help="of the file in bench/results (default: made of the arguments)")
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # the number of the round
    return p


def plain(text: str) -> str:
    """Paths in a text by their base names alone."""
    return re.sub(r"[^\s=]*/(?=[^\s/])|/(?=\s|$)", "", text)


def child(*command: str) -> dict:
    """The JSON object that a Python child prints last, and the seconds of its whole life; where the child
    fails, so does the benchmark."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{' '.join(command)} failed with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) | dict(process_seconds=time.perf_counter() - start)


def ratios(top: list[dict], bottom: list[dict], *keys: str) -> dict[str, dict]:
    """top / bottom of some measurements, round by round: median, extremes and all of them."""
    table = {key: [a[key] / b[key] for a, b in zip(top, bottom, strict=True)] for key in keys}
    return {key: dict(median=statistics.median(values), min=min(values), max=max(values), rounds=values)
            for key, values in table.items()}


def medians(reports: list[dict]) -> dict:
    """The median of every number in the reports; of anything else the first."""
    return {key: statistics.median(r[key] for r in reports) if isinstance(value, int | float) else value
            for key, value in reports[0].items()}


def measure(args: argparse.Namespace, names: list[str], summarise) -> None:
    """Measure the children in turns, between two looks at the machine; write bench/results/NAME.json and
    print it as one line. `summarise` makes the benchmark's own figures of each child's reports, one a round.
    """
    given = {key: plain(value) if isinstance(value, str) else value for key, value in vars(args).items()
             if value is not None}
    before, reports = child(__file__), {name: [] for name in names}
    for k in range(args.rounds):
        for name in names:
            reports[name].append(child(*sys.argv, "--child", name, "--seed", str(k)))
            print(f"round {k + 1} of {args.rounds}, {name}: {reports[name][-1]}", file=sys.stderr, flush=True)
    result = dict(command="python bench/" + plain(" ".join(sys.argv)), settings=given, machine_before=before,
                  machine_after=child(__file__), **summarise(reports),
                  medians={name: medians(rounds) for name, rounds in reports.items()}, reports=reports)
    files = [Path(given[key]).stem for key in ("model", "pairs", "shots") if key in given]
    modes = [key for key in ("growth", "profile") if given.get(key)]
    name = args.name or "-".join([Path(sys.argv[0]).stem, *files, *modes])
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    machine()
