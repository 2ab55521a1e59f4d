"""methods.py - the runs of one table of experiments.py side by side: a Markdown table and a picture.

    python results/methods.py results/methods-tiny          writes table.md and gain.png there

A row is a setting over its seeds: mean ± standard deviation, of one seed the 95% interval; the best comes
first. `clear` counts the seeds whose interval over prompting lies above 0; KL is divergence.py's; cost is the
processor's seconds per training prompt, loading and sampling included, of runs that sampled their own pairs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from figures import BLACK, BLUE, GREY, pyplot, save_figure
from measures import mean_of
from report import cell, markdown_row
from run import read_json, write_atomic

COLUMNS = (  # heading, key of a system in eval.json, scale, format
    ("win rate, %", "win_rate", 100, ".1f"), ("over prompting", "gain", 100, "+.1f"),
    ("on seen contexts", "gain_seen", 100, "+.1f"), ("on unseen", "gain_unseen", 100, "+.1f"),
    ("KL, nats", "kl", 1, ".1f"), ("context gain, nats", "context_gain", 1, ".1f"),
    ("tokens", "tokens", 1, ".0f"),
    ("base NLL", "nll_per_token", 1, ".2f"), ("distinct-2", "distinct_2", 1, ".2f"),
    ("self-BLEU-4", "self_bleu_4", 1, ".2f"), ("prompt gain", "prompt_gain", 1, ".0f"),
    ("cost, s", "cost", 1, ".1f"),
)


@dataclass(frozen=True)
class Run:
    """One seed of a row: what is measured on the trained model and, beside it, on prompting."""

    trained: dict
    prompted: dict


def read_run(folder: Path) -> Run:
    """The small files of one run."""
    (numbers,) = folder.glob("eval*.json")  # of the test or of the validation part
    parts = read_json(numbers)["parts"]
    baseline = "prompted" if "prompted" in parts["all"]["systems"] else "default"  # of data without contexts
    trained = dict(parts["all"]["systems"]["trained"])
    for part, key in dict(all="gain", seen="gain_seen", unseen="gain_unseen").items():
        if part in parts:
            trained[key] = parts[part]["differences"][f"trained - {baseline}"]["win_rate"]
    divergence = folder / "divergence.json"
    if divergence.exists():
        trained["kl"] = read_json(divergence)["kl"]
    arguments, summary = read_json(folder / "args.json")["arguments"], read_json(folder / "summary.json")
    if "processor_seconds" in summary and arguments["limit"] and not arguments["pairs"]:
        trained["cost"] = summary["processor_seconds"] / arguments["limit"]
    return Run(trained, parts["all"]["systems"][baseline])


def read_rows(table: Path) -> dict[str, list[Run]]:
    """Row -> its runs, a row for each folder; the best row first."""
    rows = {folder.name: [read_run(file.parent) for file in sorted(folder.glob("seed*/eval*.json"))]
            for folder in sorted(table.iterdir()) if folder.is_dir()}
    rows = {name: runs for name, runs in rows.items() if runs}
    return dict(sorted(rows.items(), key=lambda row: -mean_gain(row[1])))


def mean_gain(runs: list[Run]) -> float:
    """Points over prompting, mean over seeds."""
    return float(np.mean([100 * run.trained["gain"]["mean"] for run in runs]))


def markdown(rows: dict[str, list[Run]]) -> str:
    """The table; prompting, of the seeds of the row that has most, comes last."""
    lines = [markdown_row(["", "seeds", "clear", *(heading for heading, *_ in COLUMNS)])]
    lines.append("|" + "---|" * (3 + len(COLUMNS)))
    for name, runs in rows.items():
        clear = sum(run.trained["gain"]["low"] > 0 for run in runs)
        cells = [value([run.trained for run in runs], *column[1:]) for column in COLUMNS]
        lines.append(markdown_row([name, str(len(runs)), f"{clear} of {len(runs)}", *cells]))
    most = max(rows.values(), key=len)
    cells = [value([run.prompted for run in most], *column[1:]) for column in COLUMNS]
    lines.append(markdown_row(["prompting", str(len(most)), "", *cells]))
    return "\n".join(lines) + "\n"


def value(systems: list[dict], key: str, scale: float, form: str) -> str:
    """One cell, without the number of seeds, which has a column of its own."""
    return cell(systems, key, scale, form).partition(" (")[0]


def picture(rows: dict[str, list[Run]], file: Path) -> None:
    """A line a row: a dot a seed for points over prompting, with their mean; beside them their price: KL, or
    where it was not measured how likely the responses are for the start model."""
    plt = pyplot()
    figure, (gains, prices) = plt.subplots(1, 2, figsize=(9, 0.9 + 0.3 * len(rows)), layout="constrained",
                                           sharey=True, width_ratios=(3, 2))
    has_divergence = any("kl" in run.trained for runs in rows.values() for run in runs)
    price, label = (("kl", "KL from the start model, nats per response") if has_divergence else
                    ("nll_per_token", "base NLL, nats per token"))
    for y, runs in enumerate(rows.values()):
        for axis, key, scale in ((gains, "gain", 100), (prices, price, 1)):
            values = [scale * mean_of(run.trained, key) for run in runs if key in run.trained]
            if values:
                axis.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.4, markersize=6)
                axis.plot(np.mean(values), y, "|", color=BLACK, markersize=14, markeredgewidth=2)
    gains.axvline(0, color=GREY, linewidth=1)
    gains.set(xlabel="points over prompting", yticks=range(len(rows)), yticklabels=list(rows),
              ylim=(len(rows) - 0.5, -0.5))
    prices.set(xlabel=label)
    prices.set_xlim(0, 1.05 * prices.get_xlim()[1])
    for axis in (gains, prices):
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, file)


if __name__ == "__main__":
    for table in map(Path, sys.argv[1:]):
        rows = read_rows(table)
        write_atomic(table / "table.md", markdown(rows))
        picture(rows, table / "gain.png")
        print(markdown(rows))
