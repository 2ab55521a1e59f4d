"""variants.py - pairs made of a folder's pairs, for controls and for what a reader may wonder about.

    python results/variants.py swapped runs/random runs/swapped-pairs
    python train.py --pairs runs/swapped-pairs ...

    swapped       chosen and rejected change sides, half of the time. Whatever a model learns from these is
                  due to the lengths and the language of its own responses, not to which goes with the context
    larger-half   the half of the pairs whose chosen response has the larger context gain
    smaller-half  the other half
"""

import json
import random
import sys
from pathlib import Path


def swapped(rows: list[dict]) -> list[dict]:
    """Every pair, its sides changed with probability 1/2: the prompt they are trained under stays."""
    draw = random.Random(0)
    result = []
    for row in rows:
        if draw.random() >= 0.5:
            # Both are trained under the chosen response's prompt; where they came from goes unsaid.
            right = row["chosen"]["prompt_ids"]
            row = row | dict(chosen=row["rejected"][0] | dict(prompt_ids=right), rejected=[row["chosen"]])
        result.append(row)
    return result


def larger_half(rows: list[dict]) -> list[dict]:
    """The pairs whose chosen response's context gain is at least the median, in their order."""
    least = sorted(row["chosen"]["gain"] for row in rows)[len(rows) // 2]
    return [row for row in rows if row["chosen"]["gain"] >= least]


def smaller_half(rows: list[dict]) -> list[dict]:
    """The pairs that `larger_half` leaves out."""
    larger = larger_half(rows)
    return [row for row in rows if row not in larger]


VARIANTS = {"swapped": swapped, "larger-half": larger_half, "smaller-half": smaller_half}


def make_variant(name: str, source: Path, target: Path) -> None:
    """Write a folder of pairs; its pairs.json, which comes last, is that of the source but for their number.
    """
    target.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").open(encoding="utf-8")]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in VARIANTS[name](rows)]
    (target / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    meta = json.loads((source / "pairs.json").read_text(encoding="utf-8"))
    meta["statistics"]["pairs"] = len(lines)
    (target / "pairs.json").write_text(json.dumps(meta), encoding="utf-8")


if __name__ == "__main__":
    make_variant(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
