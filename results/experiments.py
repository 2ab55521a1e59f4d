"""experiments.py - what is behind the tables, a row of TABLES each: what is missing is run, the rest stays.

    python results/experiments.py methods-tiny                      every method on the embedded model
    python results/experiments.py methods-tiny infonce sami         some of its rows
    python results/experiments.py methods-tiny --at-once 2          two programs at a time
    python eval.py --report results/methods-tiny --out results/methods-tiny       the tables and a picture

A run lives in runs/TABLE/ROW/seedS and goes on where it was interrupted. Its small files are copied to
results/TABLE/ROW/seedS, from which the report is made again; a row whose files are there counts as done.
If another row needs its pairs or base responses and runs/ lacks them, first remove that finished row's
folder in results/. Rows with a scripted judge need scripted_judge.py to run beside them, and
OPENAI_API_KEY=none; own-task-smollm2 needs own_task.py's file, persistbench-methods-smollm2 that of
persistbench.py. Runs of no table were made by the commands in LOG.md.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Semaphore

from variants import make_variant  # which puts the project on the path

from run import write_atomic

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable


@dataclass(frozen=True)
class Row:
    """One setting.

    flags: of train.py. pairs_of: the row on whose pairs it trains, seed by seed. variant: what variants.py
    first makes of these pairs; with `other` also of that row's, with `more_seeds` also of those seeds'.
    seeds: where they are not the table's.
    """

    flags: str
    pairs_of: str = ""
    variant: str = ""
    other: str = ""
    more_seeds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    def sources(self, seed: int) -> list[tuple[str, int]]:
        """The runs whose pairs it trains on: a row and a seed each."""
        same = [(of, seed) for of in (self.pairs_of, self.other) if of]
        return same + [(self.pairs_of, more) for more in self.more_seeds]


@dataclass(frozen=True)
class Table:
    """Rows that are trained and evaluated alike: flags of train.py, flags of eval.py.

    base: the row whose evaluation has the base model's responses, which the others take from there.
    divergence: whether it is measured.
    """

    rows: dict[str, Row]
    seeds: tuple[int, ...]
    base: str
    train: str = ""
    test: str = ""
    divergence: bool = True

    @property
    def numbers(self) -> str:
        """The file that eval.py writes."""
        return "eval-validation.json" if "--split validation" in self.test else "eval.json"

    @property
    def files(self) -> tuple[str, ...]:
        """The small files of each run."""
        return ("args.json", "summary.json", self.numbers, *["divergence.json"] * self.divergence)


# The defaults of --model tiny, spelled out: under that name train.py would evaluate every run itself, without
# --reuse. In fp32 on every machine, like the stored runs.
TINY = "--model assets/tiny --lr 2e-4 --dtype float32"
SMOLLM2 = "--model SmolLM2-135M-Instruct"
TINY_PPO = "--critic-lr 1e-3 --rollout-batch 32 --train-batch 16"
SCRIPTED = "--judge scripted --judge-url http://127.0.0.1:8099/v1"
SMALL_PPO = "--rollout-batch 8 --train-batch 8 --critic-lr 1e-4"
GPU_PPO = "--rollout-batch 32 --train-batch 16 --critic-lr 1e-4"
# Methods that train on the pairs of MIPO with random contexts.
ON_ITS_PAIRS = {name: Row(f"--method {name}", "mipo-random")
                for name in ("sft", "sft-revise", "infonce", "sami")}
TABLES = {
    # Every method end to end on a real model: what a prompt costs, not what it gains.
    "methods-smollm2-small": Table(
        seeds=(0,),
        train=f"{SMOLLM2} --data demo --limit 16 --max-new-tokens 48 --lr 1e-5",
        base="mipo-random",
        test="--limit 16",
        divergence=False,
        rows={
            "mipo-random": Row("--neg random"),
            "mipo-missing": Row("--neg missing"),
            "mipo-reshuffle": Row("--neg reshuffle"),
            "mipo-softmax-3": Row("--neg random --n-neg 3 --softmax"),
            "sft": Row("--method sft --neg random"),
            "sft-revise": Row("--method sft-revise --neg random"),
            "infonce": Row("--method infonce --neg random"),
            "infonce-4": Row("--method infonce --neg random --n-neg 3"),
            "sami": Row("--method sami --neg random"),
            "ppo-mi": Row(f"--method ppo-mi {SMALL_PPO}"),
            "rlvr": Row(f"--method rlvr {SMALL_PPO}"),
            "rlaif": Row(f"--method rlaif {SCRIPTED} {SMALL_PPO}"),
            "rlaif-mi": Row(f"--method rlaif-mi {SCRIPTED} {SMALL_PPO}"),
        }),
    # Every method on a real model, on a GPU: 600 pairs, or 600 prompts of PPO.
    "methods-smollm2-gpu": Table(
        seeds=(0, 1, 2),
        train=f"{SMOLLM2} --data demo --lr 1e-5",
        base="mipo-random",
        test="--limit 320",
        rows={
            "mipo-random": Row("--neg random"),
            "mipo-missing": Row("--neg missing"),
            "mipo-reshuffle": Row("--neg reshuffle"),
            "mipo-noise": Row("--neg noise"),
            **ON_ITS_PAIRS,
            "rlvr": Row(f"--method rlvr {GPU_PPO}"),
            "ppo-mi": Row(f"--method ppo-mi {GPU_PPO}"),
            "rlaif": Row(f"--method rlaif {SCRIPTED} {GPU_PPO}"),
            "rlaif-mi": Row(f"--method rlaif-mi {SCRIPTED} {GPU_PPO}"),
            "swapped": Row("", "mipo-random", "swapped"),
            "same": Row("--neg same"),
            "larger-half": Row("", "mipo-random", "larger-half"),
            "smaller-half": Row("", "mipo-random", "smaller-half"),
            "missing-answering-half": Row("", "mipo-missing", "answering-half"),
            "random-3": Row("--neg random --n-neg 3"),
            "random-3-softmax": Row("--softmax", "random-3"),
        }),
    "methods-tiny": Table(
        seeds=(0, 1, 2),
        train=TINY,
        base="mipo-random",
        test="--limit 320",
        rows={
            "mipo-random": Row("--neg random"),
            "mipo-missing": Row("--neg missing"),
            "mipo-reshuffle": Row("--neg reshuffle"),
            "mipo-noise": Row("--neg noise"),
            **ON_ITS_PAIRS,
            "rlvr": Row(f"--method rlvr {TINY_PPO}"),
            "rlvr-shuffled": Row(f"--method rlvr --shuffle-rewards {TINY_PPO}"),
            "rlaif": Row(f"--method rlaif {SCRIPTED} {TINY_PPO}"),
            "rlaif-shuffled": Row(f"--method rlaif {SCRIPTED} --shuffle-rewards {TINY_PPO}"),
            "ppo-mi": Row(f"--method ppo-mi --mi-weight 0.5 {TINY_PPO}"),
            "ppo-mi-shuffled": Row(f"--method ppo-mi --mi-weight 0.5 --shuffle-rewards {TINY_PPO}"),
        }),
    # Table 6: the number of rejected responses, as rows of their own (Eq. 5) or in one softmax (Eq. 8).
    "negatives-tiny": Table(
        seeds=(0, 1, 2),
        train=f"{TINY} --neg random",
        base="random-1",
        test="--limit 320",
        divergence=False,
        rows={
            "random-1": Row("--n-neg 1"),
            "random-3": Row("--n-neg 3"),
            "random-3-softmax": Row("--softmax", "random-3"),
            "random-5": Row("--n-neg 5"),
            "random-5-softmax": Row("--softmax", "random-5"),
            "random-10": Row("--n-neg 10"),
            "random-10-softmax": Row("--softmax", "random-10"),
        }),
    # Learning rates on a real model, on validation prompts.
    "rates-smollm2": Table(
        seeds=(0,),
        train=f"{SMOLLM2} --data demo --neg random --limit 120",
        base="lr-1e-5",
        test="--split validation --limit 96",
        divergence=False,
        rows={
            "lr-1e-5": Row("--lr 1e-5"),
            **{f"lr-{lr}": Row(f"--lr {lr}", "lr-1e-5") for lr in ("1e-6", "3e-6", "3e-5")},
        }),
    # Why missing contexts fail on a small model, and what would mend it, on validation prompts.
    "missing-smollm2": Table(
        seeds=(0,),
        train=f"{SMOLLM2} --data demo --limit 160 --lr 2e-5 --dtype float32",
        base="random",
        test="--split validation --limit 96",
        divergence=False,
        rows={
            "random": Row("--neg random"),
            "missing": Row("--neg missing"),
            "missing-lower-lr": Row("--lr 1e-5", "missing"),
            "missing-temperature-0.5": Row("--neg missing --temperature 0.5"),
            "answering-half": Row("--epochs 2", "missing", "answering-half"),
            "mixed": Row("", "missing", "mixed", "random"),
        }),
    # Real queries with real memories, which no program checks: what every method adds to context gain.
    "persistbench-methods-smollm2": Table(
        seeds=(0, 1, 2),
        train=f"{SMOLLM2} --data runs/persistbench.jsonl --max-new-tokens 128 --lr 2e-5 --epochs 3",
        base="mipo-random",
        divergence=False,
        rows={
            "mipo-random": Row("--neg random"),
            "mipo-missing": Row("--neg missing"),
            **ON_ITS_PAIRS,
        }),
    # Questions with right answers, where a gain or its absence can be seen on a small model.
    "own-task-smollm2": Table(
        seeds=(0, 1, 2),
        train=f"{SMOLLM2} --data runs/own-task.jsonl --max-new-tokens 32 --limit 160 --lr 1e-5",
        base="mipo-random",
        test="--limit 200",
        divergence=False,
        rows={
            "mipo-random": Row("--neg random"),
            "sft": Row("--method sft", "mipo-random"),
            "rlvr": Row(f"--method rlvr {SMALL_PPO}"),
        }),
    # What each setting does, on validation prompts: the others are those of random negatives by default.
    "settings-tiny": Table(
        seeds=(0, 1, 2),
        train=f"{TINY} --neg random",
        base="defaults",
        test="--split validation --limit 320",
        divergence=False,
        rows={
            "defaults": Row("", seeds=(0, 1, 2, 3)),
            **{f"lr-{lr}": Row(f"--lr {lr}", "defaults") for lr in ("2e-5", "5e-5", "1e-4", "5e-4", "1e-3")},
            **{f"beta-{beta}": Row(f"--beta {beta}", "defaults") for beta in ("0.03", "0.3", "1")},
            **{f"pairs-{n}": Row(f"--limit {n}", "defaults") for n in (75, 150, 300)},
            "pairs-1200": Row("", "defaults", "joined", more_seeds=(1,), seeds=(0,)),
            "pairs-2400": Row("", "defaults", "joined", more_seeds=(1, 2, 3), seeds=(0,)),
            "larger-half": Row("", "defaults", "larger-half"),
            "smaller-half": Row("", "defaults", "smaller-half"),
            **{f"temperature-{t}": Row(f"--temperature {t}") for t in ("0.5", "0.8", "1.2")},
            "two-epochs": Row("--epochs 2", "defaults"),
            "two-rounds": Row("--rounds 2"),
            "swapped": Row("", "defaults", "swapped"),
            "same": Row("--neg same"),
        }),
}


def command(log: Path, *parts: str | Path) -> None:
    """Run a program of the project; its output goes to the log of the run."""
    words = list(map(str, parts))
    with open(log, "a", encoding="utf-8") as output:
        output.write(" ".join(words) + "\n")
        output.flush()
        done = subprocess.run([PYTHON, *words], cwd=ROOT, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: see {log}")


def pairs_folder(row: Row, place: Path, folder: Path, seed: int) -> Path:
    """The folder of pairs that a row trains on: another row's, or a variant of them beside the run."""
    sources = [place / of / f"seed{of_seed}" for of, of_seed in row.sources(seed)]
    if not row.variant:
        return sources[0]
    target = folder.with_name(f"seed{seed}-pairs")
    if not (target / "pairs.json").exists():
        make_variant(row.variant, sources, target)
    return target


@dataclass
class Progress:
    """What others wait for: a run's pairs, and its base model's responses."""

    trained: Event = field(default_factory=Event)
    evaluated: Event = field(default_factory=Event)
    has_failed: bool = False  # both are set then

    def wait_for(self, event: Event) -> None:
        """RuntimeError where the run has failed."""
        event.wait()
        if self.has_failed:
            raise RuntimeError("a run that this one builds on has failed")


def run(name: str, row_name: str, seed: int, slots: Semaphore,
        progress: dict[tuple[str, int], Progress]) -> None:
    """Train and evaluate one row with one seed, as far as it has not been done, and copy its small files.

    slots: for programs that run at a time; progress: of every run by row and seed.
    """
    table = TABLES[name]
    row = table.rows[row_name]
    place = ROOT / "runs" / name
    folder = place / row_name / f"seed{seed}"
    kept = ROOT / "results" / name / row_name / f"seed{seed}"
    try:
        if all((kept / file).exists() for file in table.files):
            return
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        if not (folder / "summary.json").exists():
            for source in row.sources(seed):
                progress[source].wait_for(progress[source].trained)
            with slots:
                pairs = ["--pairs", pairs_folder(row, place, folder, seed)] if row.pairs_of else []
                command(log, "train.py", *table.train.split(), *row.flags.split(), *pairs,
                        "--seed", str(seed), "--out", folder, "--resume")
        progress[row_name, seed].trained.set()
        unfinished = folder / table.numbers.replace("eval", "unfinished")
        if unfinished.exists() or not (folder / table.numbers).exists():
            reuse = []
            if row_name != table.base:
                base = progress[table.base, seed]
                base.wait_for(base.evaluated)
                reuse = ["--reuse", place / table.base / f"seed{seed}"]
            with slots:
                command(log, "eval.py", "--model", folder, *table.test.split(), *reuse)
        progress[row_name, seed].evaluated.set()
        if table.divergence and not (folder / "divergence.json").exists():
            with slots:
                command(log, "results/divergence.py", folder)
    except Exception as error:
        progress[row_name, seed].has_failed = True
        print(f"{name} {row_name} seed {seed}: {error}", flush=True)
        raise
    finally:
        progress[row_name, seed].trained.set()
        progress[row_name, seed].evaluated.set()
    kept.mkdir(parents=True, exist_ok=True)
    written = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    of_pairs = ["pairs.json"] * (folder / "pairs.json").exists()  # of a run that sampled its own
    for file in (*table.files, *of_pairs):  # where this machine has its folders is nobody's business
        text = (folder / file).read_text(encoding="utf-8").replace(f"{ROOT}/", "")
        write_atomic(kept / file, text.replace(str(written["base"]), written["arguments"]["model"]))
    print(f"{name} {row_name} seed {seed}: done", flush=True)


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("rows", nargs="*", help="default: all")
    parser.add_argument("--at-once", type=int, default=1, help="programs at a time")
    args = parser.parse_args()
    table = TABLES[args.table]
    names = args.rows or list(table.rows)
    unknown = set(names) - set(table.rows)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))} in {args.table}: {', '.join(table.rows)}")
    chosen = [table.rows[name] for name in names]
    needed = {table.base} | {of for row in chosen for of, _ in row.sources(0)}
    names = [name for name in table.rows if name in needed] + [name for name in names if name not in needed]
    progress = {(name, seed): Progress() for name in names
                for seed in table.rows[name].seeds or table.seeds}
    slots = Semaphore(args.at_once)
    with ThreadPoolExecutor(len(progress)) as pool:  # most of them wait
        jobs = [pool.submit(run, args.table, name, seed, slots, progress) for name, seed in progress]
    for job in jobs:
        job.result()


if __name__ == "__main__":
    program()
