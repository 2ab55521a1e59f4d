"""A control: the pairs of a folder with chosen and rejected swapped at random, half of the time.

    python results/swap.py runs/random runs/swapped-pairs && python train.py --pairs runs/swapped-pairs ...

Whatever a model learns from these is due to the lengths and the language of its own responses, not to which
of them goes with the context.
"""

import json
import random
import shutil
import sys
from pathlib import Path


def swapped(row: dict, draw: random.Random) -> dict:
    """The pair, its sides changed with probability 1/2: the prompt they are trained under stays."""
    if draw.random() < 0.5:
        return row
    pair = dict(chosen=row["rejected"][0], rejected=[row["chosen"]], chosen_ids=row["rejected_ids"][0],
                rejected_ids=[row["chosen_ids"]], source_ids=[row["prompt_ids"]],
                finished=row["finished"][::-1],
                gain_chosen=row["gain_rejected"][0], gain_rejected=[row["gain_chosen"]])
    return row | pair


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True)
    draw = random.Random(0)
    rows = [swapped(json.loads(line), draw) for line in (source / "pairs.jsonl").open(encoding="utf-8")]
    (target / "pairs.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    shutil.copyfile(source / "pairs.json", target / "pairs.json")
