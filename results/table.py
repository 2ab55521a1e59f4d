"""Markdown rows of eval.json files: each system, its points over personalised prompting, its quality columns.

    python results/table.py results/methods-smollm2/*/seed0/eval.json     one row a run, prompting last
    python results/table.py results/demo-smollm2/eval.json                every part and system of one run
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from measures import mean_of, with_interval
from report import markdown_row
from run import read_json

COLUMNS = {  # heading -> key of eval.json, format
    "tokens": ("tokens", ".0f"), "unfinished": ("unfinished", ".0%"), "base NLL": ("nll_per_token", ".2f"),
    "distinct-2": ("distinct_2", ".2f"), "self-BLEU-4": ("self_bleu_4", ".2f"),
    "off target": ("off_target", ".1%"), "prompt gain": ("prompt_gain", ".1f"),
}


def system_row(name: str, part: dict, system: str) -> str:
    """One system's row of one part of an eval.json."""
    row = part["systems"][system]
    over_prompting = next((d["win_rate"] for name, d in part["differences"].items()
                           if name in (f"{system} - prompted", f"{system} - default")), None)
    means = [(mean_of(row, key), form) for key, form in COLUMNS.values()]
    quality = ["-" if mean is None else format(mean, form) for mean, form in means]
    return markdown_row([name, str(row["win_rate"]["n"]), with_interval(row["win_rate"], ".1f", 100),
                         with_interval(over_prompting, "+.1f", 100),
                         with_interval(row["context_gain"], ".1f"), *quality])


def print_table(files: list[Path]) -> None:
    headings = ["", "n", "win rate %", "over prompting", "context gain, nats", *COLUMNS]
    print(markdown_row(headings), "|" + "---|" * len(headings), sep="\n")
    runs = {file: read_json(file)["parts"] for file in files}
    if len(runs) == 1:
        for part, block in runs[files[0]].items():
            for system in block["systems"]:
                print(system_row(f"{part}, {system}", block, system))
        return
    for file, parts in runs.items():
        name = file.stem if file.stem != "eval" else "/".join(file.parts[-3:-1])
        print(system_row(name, parts["all"], "trained"))
    last = runs[files[-1]]["all"]
    if "prompted" in last["systems"]:
        print(system_row("prompting", last, "prompted"))
    else:
        print(system_row("no context", last, "default"))


if __name__ == "__main__":
    print_table([Path(file) for file in sys.argv[1:]])
