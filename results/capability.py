"""capability.py - what training on one thing costs elsewhere: the start model beside a trained one.

    python results/capability.py RUN RUN ...          writes RUN/capability.json

    nll     nats a token of this project's own prose (docs.md), in windows of 256 tokens
    choice  share of own_task.py's questions whose right answer is likelier than three wrong ones

Both are of no concern to training. The differences are trained - start, with 95% intervals over windows and
over questions.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as evaluating
from folder import load
from losses import sequence_logps
from measures import DIFFERENCE, RATE, interval
from model import Decoder
from own_task import questions
from run import default_device, write_json
from tokenizer import Tokenizer

WINDOW = 256  # tokens
QUESTIONS = 200
TEXT = Path(__file__).parents[1] / "docs.md"


def nll(model: Decoder, tokenizer: Tokenizer) -> np.ndarray:
    """Nats a token of each window of our own prose, its first token given: (windows)."""
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    windows = [ids[i:i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    sums = sequence_logps(model, [(window[:1], [window[1:]]) for window in windows])
    return np.array([-logp / (WINDOW - 1) for (logp,) in sums])


def choices(model: Decoder, tokenizer: Tokenizer) -> np.ndarray:
    """Whether the right answer is the likeliest response of four: (questions)."""
    rows = questions("test")[:QUESTIONS]
    groups = [(tokenizer.chat(row["prompt"]),
               [tokenizer.encode(answer) for answer in (row["answer"], *row["wrong"])]) for row in rows]
    logps = np.array(sequence_logps(model, groups))  # (questions, 4)
    return (logps.argmax(1) == 0).astype(float)


def capability(run: Path) -> dict:
    """Both measures of the start model and of the run's, and what has changed."""
    plan = evaluating.resolve(evaluating.Args(model=str(run), out=str(run / "capability")))
    tokenizer = Tokenizer(plan.base, plan.args.date, plan.args.template)
    result: dict = dict(text=hashlib.sha256(TEXT.read_bytes()).hexdigest()[:12])
    models = [load(folder, getattr(torch, plan.args.dtype), default_device())
              for folder in (plan.base, plan.trained)]
    for name, measure, bounds, bounds_of_difference in (("nll", nll, None, None),
                                                        ("choice", choices, RATE, DIFFERENCE)):
        start, trained = (measure(model, tokenizer) for model in models)
        clusters = list(range(len(start)))  # each window, each question is one of its own
        result[name] = dict(start=interval(start, clusters, bounds=bounds),
                            trained=interval(trained, clusters, bounds=bounds),
                            difference=interval(trained - start, clusters, bounds=bounds_of_difference))
    return result


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        measured = capability(folder)
        write_json(folder / "capability.json", measured)
        for name in ("nll", "choice"):
            start, trained = (measured[name][which]["mean"] for which in ("start", "trained"))
            difference = measured[name]["difference"]
            print(f"{folder}: {name} {start:.3f} -> {trained:.3f} "
                  f"[{difference['low']:+.3f}, {difference['high']:+.3f}]")
