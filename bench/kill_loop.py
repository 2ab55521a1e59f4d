"""kill_loop.py - a run that is killed at random moments ends with the bits of one that nobody disturbed.

Sampling, training, saving and evaluation of the embedded model are killed by SIGKILL after a random time and
started anew with --resume, until the run is whole; then the next run begins. At the end of each its weights,
metrics and evaluation are compared with an undisturbed run's.

    python bench/kill_loop.py [--kills 200] [--out results/kill-loop.json]

Processes are forked from one that has imported everything, so that kills fall on the work, not on the start.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluating  # noqa: E402
import train  # noqa: E402
from run import environment, read_json, read_jsonl, write_json  # noqa: E402

METHODS = {
    "dpo": ["--neg", "random", "--epochs", "2"],
    "infonce": ["--method", "infonce", "--neg", "random", "--n-neg", "2"],
    "sft-revise": ["--method", "sft-revise"],
    "sweep": ["--neg", "random", "--lr", "1e-4,1e-3", "--eval-every", "2", "--val-limit", "4"],
    "rounds": ["--neg", "random", "--rounds", "2"],
}
SMALL = ["--data", "demo", "--limit", "12", "--max-new-tokens", "8", "--batch", "2", "--slots", "4",
         "--save-every", "1", "--dtype", "float32", "--save-dtype", "float32"]
CLOCKS = {"tokens_per_second", "seconds"}  # readings that no two runs share


def start(folder: Path, model: str, flags: list[str], log: Path) -> int:
    """Fork a process that trains and evaluates in `folder`, resuming what is there; returns its id."""
    child = os.fork()
    if child:
        return child
    with open(log, "a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    code = 1
    try:
        if not (folder / "summary.json").exists():
            sys.argv = ["train.py", *SMALL, *flags, "--model", model, "--out", str(folder), "--resume"]
            train.program()
        sys.argv = ["eval.py", "--model", str(folder), "--limit", "6"]
        evaluating.program()
        code = 0
    except BaseException:  # this process must not go on as its parent would
        traceback.print_exc()
    finally:
        os._exit(code)


def undisturbed(folder: Path, model: str, flags: list[str], log: Path) -> float:
    """A run that nobody kills: its seconds."""
    began = time.perf_counter()
    _, status = os.waitpid(start(folder, model, flags, log), 0)
    if status:
        raise SystemExit(f"the undisturbed run failed:\n{log.read_text()}")
    return time.perf_counter() - began


def place(folder: Path) -> str:
    """What a run was doing, by what it has left on the disk; a file that is being written is called *.tmp."""
    if any(folder.rglob("*.tmp")):
        return "saving"
    if (folder / "summary.json").exists():
        return "evaluation"
    pairs = folder / "pairs.json"
    if pairs.exists() and read_json(pairs)["statistics"]:
        return "training"
    return "sampling"


def results(folder: Path) -> dict:
    """What must be equal: hashes of the weights, metrics and the evaluation without clock readings."""
    weights = (folder / "model" / "model.safetensors").read_bytes()
    rows = [{key: value for key, value in row.items() if key not in CLOCKS}
            for _, row in read_jsonl(folder / "metrics.jsonl")]
    parts = read_json(folder / "eval.json")["parts"]
    return dict(weights=hashlib.sha256(weights).hexdigest(), metrics=rows, evaluation=parts)


def kill_until_whole(folder: Path, model: str, flags: list[str], log: Path, longest: float,
                     rng: random.Random) -> Counter:
    """Kill a run again and again until it is whole: how often, by what it was doing."""
    kills: Counter = Counter()
    while True:
        child = start(folder, model, flags, log)
        # Half of the kills come early, for sampling is short.
        deadline = time.perf_counter() + rng.uniform(0, longest if rng.random() < 0.5 else 0.1 * longest)
        while time.perf_counter() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if status:
                    raise SystemExit(f"a resumed run failed after {kills}:\n{log.read_text()[-3000:]}")
                return kills
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills[place(folder)] += 1


def kill_loop(count: int, seed: int = 0) -> dict:
    """At least `count` kills over all methods in turn: counts, and how many runs ended bit for bit equal."""
    rng = random.Random(seed)
    report: dict = dict(kills=0, runs=0, equal=0, by_place=Counter(), by_method={})
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        model = str(shutil.copytree(ROOT / "assets" / "tiny", base / "model"))  # under a name of its own
        expected = {}
        while report["kills"] < count:
            for name, flags in METHODS.items():
                log = base / f"{name}.log"
                if name not in expected:
                    seconds = undisturbed(base / f"{name}-whole", model, flags, log)
                    expected[name] = results(base / f"{name}-whole"), seconds
                wanted, seconds = expected[name]
                killed = base / f"{name}-killed"
                kills = kill_until_whole(killed, model, flags, log, 0.7 * seconds, rng)
                is_equal = results(killed) == wanted
                shutil.rmtree(killed)
                report["kills"] += sum(kills.values())
                report["runs"] += 1
                report["equal"] += is_equal
                report["by_place"].update(kills)
                counts = report["by_method"].setdefault(name, dict(kills=0, runs=0, equal=0))
                for key, value in dict(kills=sum(kills.values()), runs=1, equal=is_equal).items():
                    counts[key] += value
                print(f"{name}: killed {sum(kills.values())} times ({dict(kills)}), "
                      + ("equal" if is_equal else "NOT EQUAL"), flush=True)
                if report["kills"] >= count:
                    break
    return report


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "results" / "kill-loop.json"))
    args = parser.parse_args()
    began = time.perf_counter()
    report = kill_loop(args.kills, args.seed)
    command = f"python bench/kill_loop.py --kills {args.kills} --seed {args.seed}"
    write_json(Path(args.out), dict(command=command, **report, seconds=time.perf_counter() - began,
                                    environment=environment()))
    print(json.dumps({key: report[key] for key in ("kills", "runs", "equal", "by_place")}))
    sys.exit(report["equal"] < report["runs"])


if __name__ == "__main__":
    program()
