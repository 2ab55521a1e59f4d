"""context_gain.py - does the context gain of the pairs say which contexts training will teach?

    python results/context_gain.py runs/seed0 runs/seed1 --out results/context-gain-tiny.json

For every context that training has seen: the mean context gain (nats a chosen response, pairs.jsonl, before
training), how often prompting honours it, and how many points training adds on test prompts (eval.json); all
means over the runs. Spearman's rank correlations of each with the points, with 95% intervals by a bootstrap
over contexts; and a picture, FILE.png.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from figures import BLUE, GREY, pyplot, save_figure
from measures import with_interval
from run import read_json, read_jsonl, write_json

DRAWS = 2000  # of the bootstrap
KEYS = ("gain", "honoured", "points")  # what is known of a context


def read_contexts(folder: Path) -> dict[str, dict]:
    """Context -> {gain: nats, honoured: share of prompting's responses, points: over it} of one run."""
    gains: dict[str, list[float]] = {}
    for _, row in read_jsonl(folder / "pairs.jsonl"):
        gains.setdefault(row["id"].rpartition("-")[2], []).append(row["chosen"]["gain"])
    rows = read_json(folder / "eval.json")["contexts"]
    return {
        row["context_id"]: dict(gain=float(np.mean(gains[row["context_id"]])), honoured=row["prompted"],
                                points=100 * (row["trained"] - row["prompted"]))
        for row in rows if row["group"] == "seen" and row["context_id"] in gains
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs. (n) -> (n)"""
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return below + (equal - 1) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of the ranks of x and y, both (n)."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def with_bootstrap(x: np.ndarray, y: np.ndarray) -> dict:
    """Spearman's correlation of x and y, both (n), with an interval: contexts are drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(x), size=(DRAWS, len(x)))
    low, high = np.nanpercentile([spearman(x[draw], y[draw]) for draw in draws], [2.5, 97.5])
    return dict(mean=spearman(x, y), low=float(low), high=float(high), n=len(x))


def picture(result: dict, file: Path) -> None:
    """A dot a context: points over prompting against context gain, and against how often it was honoured,
    with the most that is then left to gain.

    result: what the .json file holds.
    """
    contexts, correlations = result["contexts"], result["spearman_with_points"]
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axis, key, label in ((axes[0], "gain", "context gain of chosen responses, nats"),
                             (axes[1], "honoured", "honoured by prompting, share")):
        axis.plot([row[key] for row in contexts.values()], [row["points"] for row in contexts.values()], "o",
                  color=BLUE, alpha=0.6)
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set(xlabel=label)
        rho = with_interval(correlations[key], "+.2f")
        axis.set_title(f"rank correlation {rho}, {len(contexts)} contexts", fontsize="small", loc="left")
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].plot([0, 1], [100, 0], color=GREY, linewidth=1, linestyle=":", label="all of them honoured")
    axes[1].legend(frameon=False, fontsize="small")
    settings = result["settings"]
    runs = f", mean of {settings['runs']} seeds" if settings["runs"] > 1 else ""
    figure.suptitle(f"{Path(settings['model']).name}, {settings['neg']} contexts{runs}", fontsize="small")
    axes[0].set(ylabel="points over prompting")
    save_figure(figure, file)


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = [read_contexts(folder) for folder in args.runs]
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    contexts = {name: {key: float(np.mean([run[name][key] for run in runs])) for key in KEYS}
                for name in shared}
    columns = {key: np.array([row[key] for row in contexts.values()]) for key in KEYS}
    correlations = {key: with_bootstrap(columns[key], columns["points"]) for key in ("gain", "honoured")}
    arguments = read_json(args.runs[0] / "args.json")["arguments"]
    settings = dict(model=arguments["model"], neg=arguments["neg"], runs=len(runs))
    result = dict(settings=settings, spearman_with_points=correlations, contexts=contexts)
    write_json(args.out, result)
    picture(result, args.out.with_suffix(".png"))
    for key, value in correlations.items():
        print(f"rank correlation of {key} with points over prompting: {value['mean']:+.2f} "
              f"[{value['low']:+.2f}, {value['high']:+.2f}], {value['n']} contexts")


if __name__ == "__main__":
    program()
