"""PersistBench's beneficial samples as a .jsonl: the query is the prompt, the memories are the context.

    python results/persistbench.py beneficial_samples.jsonl persistbench.jsonl

60 of its 100 rows are for training and 40 for the test, by seed.
"""

import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    rows = [json.loads(line) for line in source.open(encoding="utf-8")]
    test = set(random.Random(0).sample(range(len(rows)), 40))
    target.write_text("".join(
        json.dumps(dict(id=f"pb{i:03}", prompt=row["query"], context=row["memories"],
                        split="test" if i in test else "train"), ensure_ascii=False) + "\n"
        for i, row in enumerate(rows)))
