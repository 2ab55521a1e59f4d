"""training_log.py - metrics.jsonl: what a training step has shown, read when the next one is under way.

A GPU works through a queue of operations, thousands a step, while the host prepares more. To read a number
the host must wait until the queue is empty, and then the GPU waits for the host. So a step's numbers are
copied to main memory as they come, and read once the next step is queued; before validations and checkpoints
they are read at once. On a CPU there is no queue, and the numbers are there at once.

    python -m pytest tests/test_training_log.py
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fast import Moment, Reading
from run import UserError, gather, naming, rank


class Metrics:
    """metrics.jsonl: one JSON object a step, appended at once, so that a killed run keeps what it logged.

    Process 0 alone writes. rows: how many existing lines to keep; later ones are of steps that will be
    repeated.
    """

    def __init__(self, path: Path, rows: int = 0):
        self.rows = rows
        self.path = Path(os.devnull) if rank() else path
        if str(self.path) == os.devnull:
            return
        kept = path.read_bytes().splitlines(keepends=True)[:rows] if rows else []
        path.touch()
        os.truncate(path, sum(map(len, kept)))  # which takes no room on a full disk, as writing anew would

    def log(self, **values) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.rows += 1


@dataclass
class State:
    """Training progress: everything in a checkpoint except tensors."""

    candidate: int = 0  # which combination of listed values
    round: int = 0  # which round of self-training
    batch: int = 0  # batches done in this round
    step: int = 0  # steps done by this candidate, in all its rounds
    tokens: int = 0  # trained on in these steps
    seconds: float = 0.0  # spent in these steps
    skipped: int = 0  # how many of these steps were skipped
    skipped_in_a_row: int = 0
    scores: list[float] = field(default_factory=list)  # of this round's validations
    rows: int = 0  # lines of metrics.jsonl
    finished: list[dict] = field(default_factory=list)  # summaries of the candidates before this one
    best: dict | None = None  # the best validation of all, see Selection
    pairs: str = ""  # fingerprint of this round's training rows


def count_step(state, is_finite: bool) -> bool:
    """Count a step in the `skipped` and `skipped_in_a_row` of a State, this one or ppo.py's; a step that is
    not finite was skipped. Returns is_finite."""
    state.skipped += not is_finite
    state.skipped_in_a_row = 0 if is_finite else state.skipped_in_a_row + 1
    return is_finite


def require_finite_steps(state) -> None:
    """UserError where the last five steps were all skipped: the run is lost."""
    if state.skipped_in_a_row >= 5:
        raise UserError("five steps in a row were not finite: lower --lr (and PPO's --critic-lr), or use "
                        "--dtype float32")


@dataclass(frozen=True)
class Step:
    """A step that has been queued."""

    number: int  # from 1, of this candidate's steps
    epoch: int
    lr: float
    ids: list[str]  # of its pairs
    tokens: int
    divisor: int  # of the sum of its pairs' losses
    names: list[str]  # of the metrics; none where this process has no pairs
    count: int  # of this process's pairs
    numbers: Reading  # gradient norm, share of weights changed, then each metric of this process's pairs
    start: Moment


class TrainingLog:
    """A run's metrics.jsonl, progress bar and counts, which are those of the steps that have been read."""

    def __init__(self, metrics: Metrics, state: State, bar: tqdm):
        self.metrics, self.state, self.bar = metrics, state, bar
        self.queued: Step | None = None

    def add(self, step: Step) -> None:
        """Take a step that was just queued, and read the one before it."""
        self.flush()
        self.queued = step

    def flush(self) -> None:
        """Read the step that was queued last. UserError where it is the fifth in a row that was skipped."""
        if self.queued is None:
            return
        step, self.queued = self.queued, None
        norm, weights_changed, *values = step.numbers.read()
        rows = [dict(zip(step.names, values[i :: step.count], strict=True)) for i in range(step.count)]
        rows = gather(rows)  # of all processes
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        means["loss"] *= len(rows) / step.divisor  # SFT's loss is a mean over tokens, all else over pairs

        state, bar = self.state, self.bar
        if not count_step(state, math.isfinite(norm)):
            print(f"step {step.number} skipped: loss {means['loss']}, gradient norm {norm} (pairs "
                  f"{', '.join(step.ids)})")
        seconds = step.numbers.arrival.seconds_since(step.start)
        state.seconds += seconds
        state.tokens += step.tokens
        self.metrics.log(
            candidate=state.candidate,
            round=state.round,
            step=step.number,
            epoch=step.epoch,
            **means,
            grad_norm=norm,
            lr=step.lr,
            pairs=len(rows),
            tokens=step.tokens,
            tokens_per_second=step.tokens / seconds,
            skipped=state.skipped,
            weights_changed=weights_changed,
        )
        margin = f" margin {means['margin']:+.2f}" if "margin" in means else ""
        bar.set_postfix_str(f"loss {means['loss']:.3f}{margin} {state.tokens / state.seconds:.0f} tokens/s")
        bar.update(len(rows))
        require_finite_steps(state)
