"""Checkpoints and resuming: whole or absent, refused where anything changed, and the same bits in the end.

    python -m pytest tests/test_checkpoint.py
"""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import metrics_of, model_weights
from safetensors import SafetensorError

import checkpoint
import train
from checkpoint import MANIFEST, STATE, TENSORS, Checkpoints, StopSignal, lock
from run import Stopped, UserError, read_json
from selection import Selection

TIMES = {"tokens_per_second"}  # which no two runs share


def results(folder: Path) -> tuple[dict, list[dict]]:
    """What must be equal, bit for bit: the model's weights, and metrics but for times."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in metrics_of(folder)]
    return model_weights(folder), rows


def assert_same_results(a: Path, b: tuple[dict, list[dict]]) -> None:
    weights, rows = results(a)
    assert rows == b[1]
    assert weights.keys() == b[0].keys()
    assert all(torch.equal(weights[name], b[0][name]) for name in weights)


@pytest.fixture
def stop_after(monkeypatch):
    """(n) -> from now on a run gets SIGTERM during its n-th optimizer step, all candidates counted."""
    real = train.MasterAdamW.step

    def arrange(count: int) -> None:
        calls = []

        def step(self, *arguments) -> None:
            calls.append(0)
            real(self, *arguments)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(train.MasterAdamW, "step", step)

    return arrange


RUNS = {
    "dpo": ["--epochs", "2"],
    "sft": ["--method", "sft", "--epochs", "2"],
    "sft-revise": ["--method", "sft-revise", "--epochs", "2"],
    "infonce": ["--method", "infonce", "--neg", "random", "--n-neg", "2", "--epochs", "2"],
    "sami": ["--method", "sami", "--neg", "random", "--epochs", "2"],
    "softmax": ["--neg", "random", "--n-neg", "3", "--softmax", "--epochs", "2"],
    "bf16": ["--dtype", "bfloat16", "--epochs", "2"],
    "sweep": ["--lr", "1e-4,1e-3", "--eval-every", "2", "--val-limit", "2"],
    "rounds": ["--neg", "random", "--rounds", "2"],
    "lora": ["--lora-rank", "4", "--epochs", "2"],
    "ppo-mi": ["--method", "ppo-mi", "--rollout-batch", "2", "--train-batch", "1"],
    "ppo-mi-lora": ["--method", "ppo-mi", "--rollout-batch", "2", "--train-batch", "1", "--lora-rank", "4"],
}


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(name, stop, call_train, stop_after, work, capsys):
    """SIGTERM lets the step end and saves; --resume goes on: weights and metrics are an undisturbed run's."""
    flags = [*RUNS[name], "--save-every", "2"]
    expected = results(call_train(*flags))
    (work / "o").rename(work / "undisturbed")
    stop_after(stop)
    with pytest.raises(Stopped, match="--resume goes on"):
        call_train(*flags)
    assert not (work / "o" / "summary.json").exists()
    with pytest.raises(UserError, match="go on with --resume"):
        call_train(*flags)
    folder = call_train(*flags, "--resume")
    assert "goes on after step" in capsys.readouterr().out
    assert_same_results(folder, expected)
    assert not (folder / "checkpoints").exists()  # a run that is whole needs none


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(call_train, work, monkeypatch):
    """Killed in step 9, before step 8 was read, with a checkpoint at 6: metrics of step 7 are cut and written
    again."""
    flags = ["--epochs", "3", "--save-every", "3"]
    expected = results(call_train(*flags))
    (work / "o").rename(work / "undisturbed")
    real = train.learning_rate

    def die(step, *arguments):
        if step == 8:
            raise MemoryError
        return real(step, *arguments)

    monkeypatch.setattr(train, "learning_rate", die)
    with pytest.raises(MemoryError):
        call_train(*flags)
    monkeypatch.undo()
    assert [row["step"] for row in metrics_of(work / "o")] == list(range(1, 8))
    assert [path.name for path in (work / "o" / "checkpoints").glob("step-*")] == ["step-0-000006"]
    monkeypatch.chdir(work)
    assert_same_results(call_train(*flags, "--resume"), expected)


def test_resume_without_a_checkpoint_begins_anew(call_train, work, capsys):
    """A run that was killed before its first one keeps its pairs; one that was never begun begins."""
    folder = call_train("--resume")
    expected = results(folder)
    (folder / "summary.json").unlink()
    assert_same_results(call_train("--resume"), expected)
    out = capsys.readouterr().out
    assert "no checkpoint yet" in out and "8 pairs from" in out


def test_resume_of_a_run_that_was_evaluated_leaves_its_numbers(call_train, work, capsys):
    """Whatever the evaluation was of: --test would make one of other rows."""
    folder = call_train()
    (folder / "eval.json").write_text("{}")
    call_train("--resume", "--test")
    assert (folder / "eval.json").read_text() == "{}"
    assert "o is evaluated too" in capsys.readouterr().out


def test_resume_of_a_run_that_is_whole_trains_nothing(call_train, capsys):
    """It says so."""
    expected = results(call_train())
    assert_same_results(call_train("--resume"), expected)
    assert "training is done" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lr 0\.0001, now it is 0\.0002"):  # nobody trained at that
        call_train("--resume", "--lr", "2e-4")


@pytest.fixture
def stopped(call_train, stop_after, work) -> Path:
    """A run that was stopped after its second step."""
    stop_after(2)
    with pytest.raises(Stopped):
        call_train()
    return work / "o"


@pytest.mark.parametrize(("flags", "words"), [
    (["--lr", "2e-4"], "lr 0.0001, now it is 0.0002"), (["--batch", "4"], "batch 2, now it is 4"),
    (["--beta", "0.2"], "beta 0.1, now it is 0.2"), (["--seed", "1"], "seed 0, now it is 1"),
    (["--neg", "random"], "neg 'missing', now it is 'random'"), (["--lr", "1e-4,1e-3"], "candidates"),
    (["--method", "sft"], "n_neg 1, now it is 0"), (["--rounding", "nearest"], "rounding"),
])  # fmt: skip
def test_a_changed_argument_is_refused_by_name(flags, words, call_train, stopped):
    """With both values, and the way out."""
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(UserError, match=f"(?s){words}"):
        call_train("--resume", *flags)
    assert sorted(path.name for path in stopped.iterdir()) == before


@pytest.mark.parametrize(("name", "value"), [("torch", "1.0"), ("threads", 64), ("processes", 8)])
def test_another_machine_is_refused_unless_allowed(name, value, call_train, stopped, capsys):
    """Threads, processes and torch change the last bits: --resume-elsewhere says so and goes on."""
    args = read_json(stopped / "args.json")
    args["resuming"]["machine"][name] = value
    (stopped / "args.json").write_text(json.dumps(args))
    with pytest.raises(UserError, match=f"{name} .*--resume-elsewhere"):
        call_train("--resume")
    folder = call_train("--resume-elsewhere")
    assert f"began with {name}" in capsys.readouterr().out and (folder / "summary.json").exists()


def test_other_pairs_are_refused(call_train, stopped):
    """One response of pairs.jsonl was exchanged."""
    file = stopped / "pairs.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[0])
    row["chosen"]["ids"][0] += 1
    file.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(UserError, match="are not those"):
        call_train("--resume")


@pytest.mark.parametrize("name", [TENSORS, STATE])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name(name, harm, call_train, stopped):
    """A flipped byte, a file cut short, a file gone; what to do is said."""
    file = next(stopped.glob(f"checkpoints/step-*/{name}"))
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match=f"{name} .*: remove .* or start the run anew"):
        call_train("--resume")


def flips(data: bytes) -> Iterator[bytes]:
    """The data with one bit the other way, in each of their bytes."""
    for place, byte in enumerate(data):
        yield data[:place] + bytes([byte ^ 1 << place % 8]) + data[place + 1 :]


@pytest.mark.parametrize("name", ["latest.json", f"step-0-000007/{MANIFEST}", f"step-0-000007/{STATE}",
                                  f"step-0-000007/{TENSORS}"])
def test_a_flipped_bit_anywhere_is_refused(name, tmp_path):
    """In each byte of each file of a checkpoint and of the pointer to it: a UserError, never another one."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    file = checkpoints.folder / name
    whole = file.read_bytes()
    for data in flips(whole):
        file.write_bytes(data)
        with pytest.raises(UserError):
            checkpoints.load()
    file.write_bytes(whole)
    assert checkpoints.load()[1]["step"] == 7


@pytest.mark.parametrize("text", ["[]", "{}", '{"resuming": 1}', '{"resuming": {"arguments": {}}}'])
def test_arguments_that_are_none_are_refused(text, call_train, stopped):
    """args.json of another program, or damaged."""
    (stopped / "args.json").write_text(text)
    with pytest.raises(UserError, match=r"args\.json"):
        call_train("--resume")


def save(checkpoints: Checkpoints, step: int, value: float = 0.0) -> None:
    checkpoints.save(dict(x=torch.full((3,), value)), dataclasses.asdict(train.State(step=step)))


def test_only_the_newest_are_kept(tmp_path):
    """--keep 2, and the pointer is to the last one."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        save(checkpoints, step, float(step))
    names = sorted(path.name for path in checkpoints.folder.glob("step-*"))
    assert names == ["step-0-000010", "step-0-000015"]
    tensors, state = checkpoints.load()
    assert tensors["x"].tolist() == [15.0] * 3 and state["step"] == 15


def test_a_clock_that_went_back_costs_nothing(tmp_path):
    """What latest.json names stays, though another checkpoint seems newer."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    os.utime(checkpoints.folder / "step-0-000001", (2**33, 2**33))
    save(checkpoints, 2)
    assert checkpoints.load()[1]["step"] == 2


@pytest.mark.parametrize("process", [0, 1])
def test_all_wait_until_a_checkpoint_is_there(process, tmp_path, monkeypatch):
    """Process 0 writes it; the others go on only then."""
    happened = []
    monkeypatch.setattr(checkpoint, "rank", lambda: process)
    monkeypatch.setattr(checkpoint, "barrier", lambda: happened.append("barrier"))
    monkeypatch.setattr(Checkpoints, "write", lambda *given: happened.append("write"))
    save(Checkpoints(tmp_path), 1)
    assert happened == ["write"] * (process == 0) + ["barrier"]


def test_a_signal_to_another_process_counts(monkeypatch):
    """So all stop at the same step."""
    monkeypatch.setattr(checkpoint, "gather", lambda own: [*own, 15])
    assert StopSignal().came() == 15


def test_a_better_model_is_remembered_at_once(call_train, monkeypatch):
    """model/ holds it already: a run that is killed before its next checkpoint must know which it is."""
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, tensors, state: saved.append(
        (state["step"], state["best"] and state["best"]["step"])) or save(self, tensors, state))
    scores = iter([0.5, 0.4, 0.6, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(Selection, "measure", lambda self, model: next(scores))
    folder = call_train("--eval-every", "1", "--save-every", "0")
    steps = read_json(folder / "summary.json")["steps"]
    assert steps > 3 and saved == [(1, 1), (3, 3)]


def test_of_eleven_candidates_the_last_ones_are_kept(tmp_path):
    """Ten comes after nine, though not in the alphabet."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for candidate in (8, 9, 10):
        state = dataclasses.asdict(train.State(step=5, candidate=candidate))
        checkpoints.save(dict(x=torch.zeros(3)), state)
    names = sorted(path.name for path in checkpoints.folder.glob("step-*"))
    assert names == ["step-10-000005", "step-9-000005"]


@pytest.mark.parametrize(("function", "error"), [
    ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("write_json", OSError(28, "No space left on device")),
    ("sync", OSError(28, "No space left on device")),
], ids=["tensors", "state", "disk"])
def test_a_checkpoint_that_could_not_be_written_leaves_the_last_one(function, error, tmp_path, monkeypatch):
    """The disk is full while the second is written: the first is there, whole, and nothing else."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 1.0)

    def full(*arguments):
        raise error

    monkeypatch.setattr(f"checkpoint.{function}", full)
    with pytest.raises(OSError, match="No space"):
        save(checkpoints, 2, 2.0)
    monkeypatch.undo()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest.json", "step-0-000001"]
    assert checkpoints.load()[0]["x"].tolist() == [1.0] * 3
    save(checkpoints, 2, 2.0)
    assert checkpoints.load()[0]["x"].tolist() == [2.0] * 3


def test_a_step_that_is_saved_twice_has_a_checkpoint_at_every_moment(tmp_path, monkeypatch):
    """A round ends where a checkpoint was due: the first is there until the pointer is to the second."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 4, 1.0)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("checkpoint.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 4, 2.0)
    monkeypatch.undo()
    write = checkpoint.write_json
    monkeypatch.setattr("checkpoint.write_json",
                        lambda file, value: killed() if file.name == "latest.json" else write(file, value))
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 4, 2.0)
    monkeypatch.undo()
    assert checkpoints.load()[0]["x"].tolist() == [1.0] * 3
    save(checkpoints, 4, 3.0)
    assert checkpoints.load()[0]["x"].tolist() == [3.0] * 3
    assert len([*checkpoints.folder.glob("step-*")]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_become_a_checkpoint(value, tmp_path):
    """One number is enough; the earlier one stays."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 1.0)
    with pytest.raises(UserError, match="no longer finite"):
        checkpoints.save(dict(x=torch.tensor([0.0, value])), dataclasses.asdict(train.State(step=2)))
    assert checkpoints.load()[1]["step"] == 1


def test_the_manifest_has_sizes_and_hashes(tmp_path):
    """Of every file beside it."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    folder = checkpoints.folder / "step-0-000007"
    manifest = read_json(folder / MANIFEST)
    assert manifest.keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in manifest.items())


def test_two_runs_cannot_share_a_folder(tmp_path, call_train, work):
    """The second says so; when the first has ended, it may."""
    with lock(work / "o"), pytest.raises(UserError, match="another run is writing here"):
        call_train()
    call_train()


def test_a_run_that_ended_meanwhile_is_not_replaced(call_train, work, monkeypatch):
    """The second of two looks into the folder before the first has made it, and the lock after its end."""
    def first_ends(folder: Path, source: Path) -> None:
        monkeypatch.undo()
        monkeypatch.chdir(work)
        call_train()

    monkeypatch.setattr(train, "check_space", first_ends)
    with pytest.raises(UserError, match="already holds a run"):
        call_train("--seed", "1")
    assert read_json(work / "o" / "args.json")["arguments"]["seed"] == 0


def test_signals_are_noted_only_inside(tmp_path):
    """And whoever handled them before does so afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.came()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
