"""texts.py - what prompting and training answer to 20 held-out prompts, drawn by seed and not chosen by hand.

    python results/texts.py runs/demo results/demo-smollm2/texts.md
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from checks import honours
from data import load_demo
from run import read_json, read_jsonl, write_atomic

COUNT = 20


def texts(run: Path) -> str:
    """A section an example: the prompt with its context, and each system's response."""
    seed = read_json(run / "args.json")["arguments"]["seed"]
    examples = {example.id: example for example in load_demo(seed)}
    responses: dict[str, dict[str, str]] = {}
    for _, row in read_jsonl(run / "responses.jsonl"):
        responses.setdefault(row["id"], {})[row["system"]] = row["response"]
    drawn = sorted(random.Random(0).sample(sorted(responses), min(COUNT, len(responses))))
    lines = [f"# {len(drawn)} held-out prompts, drawn by seed", ""]
    for id in drawn:
        example = examples[id]
        lines += [f"**{example.prompt}** {example.context} *({example.group} context)*", ""]
        for system in ("prompted", "trained"):
            text = responses[id][system]
            sign = "honoured" if honours(example.check, text) else "not honoured"
            lines += [f"* {system}, {sign}:", "", *(f"  > {line}" for line in text.splitlines()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    write_atomic(Path(sys.argv[2]), texts(Path(sys.argv[1])))
