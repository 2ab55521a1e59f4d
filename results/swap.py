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
    chosen, rejected = row["rejected"][0], row["chosen"]
    # Both are trained under the chosen response's prompt, which stays; where they came from goes unsaid.
    return row | dict(chosen=chosen | dict(prompt_ids=row["chosen"]["prompt_ids"]), rejected=[rejected])


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True)
    draw = random.Random(0)
    rows = [swapped(json.loads(line), draw) for line in (source / "pairs.jsonl").open(encoding="utf-8")]
    (target / "pairs.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    shutil.copyfile(source / "pairs.json", target / "pairs.json")
