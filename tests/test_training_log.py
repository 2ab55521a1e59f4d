"""What a step has shown is read when the next one has been given: order, times, counts.

That a whole step reads nothing is in test_cuda.py, what the rows say in test_train.py, of several processes
in test_processes.py.
"""

import pytest
import torch
from conftest import random_pairs, train_in_place

import fast
import train
from batches import all_logps, training_rows
from checkpoint import Checkpoints
from folder import load
from optimizer import MasterAdamW
from run import progress, read_jsonl
from selection import Selection
from train import Args
from training_log import Metrics, State, Step, TrainingLog


@pytest.fixture
def log(tmp_path):
    """A log whose metrics are in metrics.jsonl of tmp_path."""
    return TrainingLog(Metrics(tmp_path / "metrics.jsonl"), State(), progress(8, "pairs", "training"))


def step(number: int, values: list, divisor: int = 2, seconds: float = 1.0) -> Step:
    """A step of two pairs and 30 tokens, whose three metrics are in values, behind norm and share."""
    start, numbers = fast.Moment(torch.device("cpu")), fast.Reading(torch.tensor(values))
    numbers.arrival.time = start.time + seconds
    return Step(number, epoch=0, lr=0.1, ids=["a", "b"], tokens=30, divisor=divisor,
                names=["loss", "margin", "accuracy"], count=2, numbers=numbers, start=start)


def test_a_step_is_read_when_the_next_is_given_and_at_the_end(log, tmp_path):
    """And no step twice; each metric is the mean of its own pairs."""
    file = tmp_path / "metrics.jsonl"
    log.add(step(1, [0.5, 0.0, 1.0, 3.0, -4.0, -2.0, 0.0, 1.0]))
    assert not file.read_text() and log.state.tokens == 0
    log.add(step(2, [0.25, 1.0, 5.0, 7.0, 0.0, 0.0, 1.0, 1.0]))
    log.flush()
    log.flush()
    first, second = (line for _, line in read_jsonl(file))
    assert (first["step"], first["loss"], first["margin"], first["grad_norm"]) == (1, 2.0, -3.0, 0.5)
    assert (first["accuracy"], second["accuracy"]) == (0.5, 1.0)
    assert (second["step"], second["loss"], second["weights_changed"]) == (2, 6.0, 1.0)
    assert (log.state.tokens, log.bar.n) == (60, 4)


def test_the_loss_of_a_mean_over_tokens(log, tmp_path):
    """The sum over pairs, divided by the divisor; all else is a mean over pairs."""
    log.add(step(1, [1.0, 0.0, 20.0, 10.0, 2.0, 4.0, 0.0, 0.0], divisor=10))
    log.flush()
    ((_, line),) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["margin"], line["pairs"]) == (3.0, 3.0, 2)


def test_a_step_takes_the_time_until_its_numbers_are_there(log):
    """However late they are read."""
    for number, seconds in enumerate([4.0, 2.0, 5.0], 1):
        log.add(step(number, [0.5] * 8, seconds=seconds))
    log.flush()
    assert log.state.seconds == pytest.approx(11.0)
    rates = [line["tokens_per_second"] for _, line in read_jsonl(log.metrics.path)]
    assert rates == pytest.approx([30 / 4, 30 / 2, 30 / 5])


def test_what_is_read_is_what_was_sent():
    """A copy: the tensor may be overwritten, on a CPU too."""
    tensor = torch.arange(3.0)
    reading = fast.Reading(tensor)
    tensor += 1
    assert reading.read() == [0.0, 1.0, 2.0]


# ------------------------------------------------------------------------- in a run

@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What train.train does, in order: given, read, validated, saved."""
    happened: list[str] = []

    def noting(event: str, function):
        def call(*args, **kwargs):
            happened.append(event)
            return function(*args, **kwargs)
        return call

    monkeypatch.setattr(MasterAdamW, "step", noting("given", MasterAdamW.step))
    monkeypatch.setattr(fast.Reading, "read", noting("read", fast.Reading.read))
    monkeypatch.setattr(Selection, "measure", noting("validated", lambda self, model: 0.0))
    monkeypatch.setattr(Checkpoints, "save", noting("saved", Checkpoints.save))
    return happened


def test_a_run_is_one_step_behind(events, tiny, tmp_path):
    """Three steps: each is read when the next has been given, the last one at the end."""
    optimizer = MasterAdamW(load(tiny), 1e-4, 0)
    train_in_place(optimizer, random_pairs(6), tmp_path / "metrics.jsonl", batch=2)
    assert events == ["given", "given", "read", "given", "read", "read"]


def test_checkpoints_and_validations_have_all_steps_before_them_read(events, call_train, dpo_run):
    """Checkpoints after every third step, validations after every fifth."""
    call_train("--pairs", dpo_run, "--eval-every", "5", "--save-every", "3")
    waiting = 0
    assert {"validated", "saved"} <= set(events)
    for event in events:
        waiting += dict(given=1, read=-1).get(event, 0)
        # A checkpoint's tensors are asked for, and the state read, before it is written.
        assert 0 <= waiting <= (0 if event in ("validated", "saved") else 2)
    assert waiting == 0


def test_late_numbers_are_those_of_their_step(tiny, tmp_path):
    """Whether they are read at once or after the next step, which changes the weights."""
    args = train.resolve(Args(batch=2))
    pairs = training_rows(random_pairs(6), args)
    rows = []
    for delay in (False, True):
        optimizer, file = MasterAdamW(load(tiny), 1e-3, 0), tmp_path / f"{delay}.jsonl"
        reference = all_logps(optimizer.model, pairs, args)
        with pytest.MonkeyPatch.context() as patch:
            if not delay:  # read at once
                add = TrainingLog.add
                patch.setattr(TrainingLog, "add", lambda log, given, add=add: (add(log, given), log.flush()))
            train.train(optimizer, pairs, reference, args, Metrics(file), State())
        rows.append([line for _, line in read_jsonl(file)])
    for at_once, late in zip(*rows, strict=True):
        assert at_once | dict(tokens_per_second=0) == late | dict(tokens_per_second=0)
