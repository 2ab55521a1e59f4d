"""Markdown rows of eval.json files: each system, its points over personalised prompting, its quality columns.

    python results/table.py results/demo-smollm2/validation/*.json        one row a run, prompting last
    python results/table.py results/demo-smollm2/eval.json                every part and system of one run
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "tokens": ("tokens", ".0f"), "unfinished": ("unfinished", ".0%"), "base NLL": ("nll_per_token", ".2f"),
    "distinct-2": ("distinct_2", ".2f"), "self-BLEU-4": ("self_bleu_4", ".2f"),
    "elsewhere": ("elsewhere", ".1%"), "prompt gain": ("prompt_gain", ".1f"),
}


def points(v: dict) -> str:
    """A difference of shares with its interval, in points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v[key] for key in ("mean", "low", "high")))


def row(name: str, part: dict, system: str) -> str:
    values, versus = part["systems"][system], part["differences"].get(f"{system} - prompted")
    quality = ["-" if values.get(k) is None else format(values[k], form) for k, form in COLUMNS.values()]
    rate, gain = values["win_rate"], points(versus["win_rate"]) if versus else "-"
    cells = [name, rate["n"], f"{100 * rate['mean']:.1f}", gain, *quality]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(files: list[str]) -> None:
    heads = ["", "n", "win rate %", "over prompting", *COLUMNS]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    runs = {Path(file).stem: json.loads(Path(file).read_text())["parts"] for file in files}
    if len(runs) == 1:
        for part, block in next(iter(runs.values())).items():
            for system in block["systems"]:
                print(row(f"{part}, {system}", block, system))
        return
    for name, parts in runs.items():
        print(row(name, parts["all"], "trained"))
    print(row("prompting", parts["all"], "prompted"))


if __name__ == "__main__":
    main(sys.argv[1:])
