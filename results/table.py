"""Markdown rows of eval.json files: each system, its points over personalised prompting, its quality columns.

    python results/table.py results/methods-smollm2/*.eval.json           one row a run, prompting last
    python results/table.py results/demo-smollm2/eval.json                every part and system of one run

Seconds are those of the run's summary.json beside the file (NAME.summary.json beside NAME.eval.json).
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "tokens": ("tokens", ".0f"), "unfinished": ("unfinished", ".0%"), "base NLL": ("nll_per_token", ".2f"),
    "distinct-2": ("distinct_2", ".2f"), "self-BLEU-4": ("self_bleu_4", ".2f"),
    "elsewhere": ("elsewhere", ".1%"), "prompt gain": ("prompt_gain", ".1f"),
}


def shown(v: dict | None, form: str, scale: float = 1) -> str:
    """A mean with its interval."""
    if v is None or v["mean"] is None:
        return "-"
    return "{} [{}, {}]".format(*(format(scale * v[key], form) for key in ("mean", "low", "high")))


def row(name: str, part: dict, system: str, seconds: float | None = None) -> str:
    values, versus = part["systems"][system], part["differences"].get(f"{system} - prompted", {})
    quality = ["-" if values.get(k) is None else format(values[k], form) for k, form in COLUMNS.values()]
    cells = [name, values["win_rate"]["n"], shown(values["win_rate"], ".1f", 100),
             shown(versus.get("win_rate"), "+.1f", 100), shown(values["context_gain"], ".1f"), *quality,
             "-" if seconds is None else f"{seconds:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def seconds(file: Path) -> float | None:
    summary = file.with_name(file.name.replace("eval", "summary"))
    return json.loads(summary.read_text())["seconds"] if summary.exists() else None


def main(files: list[str]) -> None:
    heads = ["", "n", "win rate %", "over prompting", "context gain, nats", *COLUMNS, "seconds"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    runs = {Path(file): json.loads(Path(file).read_text())["parts"] for file in files}
    if len(runs) == 1:
        for part, block in next(iter(runs.values())).items():
            for system in block["systems"]:
                print(row(f"{part}, {system}", block, system))
        return
    for file, parts in runs.items():
        print(row(file.name.split(".")[0], parts["all"], "trained", seconds(file)))
    print(row("prompting", parts["all"], "prompted"))


if __name__ == "__main__":
    main(sys.argv[1:])
