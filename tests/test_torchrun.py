"""Whole programs in two processes of torchrun: they train and evaluate as one does."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (ROOT, assert_json_close, child_environment, metrics_of, model_weights, run_inside,
                      run_processes, same_weights, steps_of, write_data)

import eval as evaluation
import train
from pairs import load_pairs
from run import UserError, read_json, read_jsonl, restarts

FLAGS = ["--max-new-tokens", "6", "--batch", "3", "--lr", "1e-4", "--dtype", "float32", "--eval-every", "2"]


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory) -> list:
    """What all trainings here begin with."""
    data = write_data(tmp_path_factory.mktemp("data") / "own.jsonl", contexts=14, rows_per_prompt=2, train=7,
                      validation=3, test=4)
    return ["--data", data, "--model", tiny, *FLAGS]


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory) -> tuple[Path, Path, str]:
    """The same training by one process and by two; what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    run_inside(train.program, folder, *flags, "--out", folder / "one")
    done = run_processes(2, "train.py", *flags, "--out", "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two", done.stdout


def test_two_processes_train_the_model_of_one(runs):
    """The same pairs, a line of metrics a step, nearly the same weights, the same files and no others."""
    one, two, out = runs
    pairs = load_pairs(one)
    assert len(pairs) > 3
    for a, b in zip(pairs, load_pairs(two), strict=True):
        assert [response.ids for response in a.responses] == [response.ids for response in b.responses]
    lines = metrics_of(two)
    assert lines == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in metrics_of(one)]
    steps = math.ceil(len(pairs) / 3)
    assert [row["step"] for row in steps_of(two)] == [*range(1, steps + 1)]
    files = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in (one, two)]
    assert files[0] == files[1] and sorted(os.listdir(two.parent)) == ["one", "two"]
    a, b = (model_weights(folder) for folder in (one, two))
    assert a.keys() == b.keys()
    apart = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])  # AdamW: noise has a sign too
    assert apart.median() < 1e-8 and (apart > 1e-6).float().mean() < 1e-3
    assert read_json(two / "args.json")["processes"] == 2 and read_json(one / "args.json")["processes"] == 1
    a, b = (read_json(folder / "summary.json") for folder in (one, two))
    assert a.keys() == b.keys()
    assert_json_close(a["chosen"], b["chosen"])
    assert out.count("evaluate it with") == 1  # one process speaks


# train.py, but that process 1 kills itself in the middle of step 3, when there is a checkpoint of step 2, and
# leaves process 0 with the lock of the run folder.
KILLED = """
import os
import signal
import sys

sys.path.insert(0, sys.argv.pop(1))
import run
import train

whole_step = train.MasterAdamW.step

def step(self, number: int, *rest) -> None:
    if number == 2 and run.rank() == 1 and not run.restarts():
        os.kill(os.getpid(), signal.SIGKILL)
    whole_step(self, number, *rest)

train.MasterAdamW.step = step
run.main(train.program)
"""


def test_torchrun_goes_on_by_itself_when_a_process_is_killed(runs, flags, tmp_path):
    """It ends with the bits of a run that nobody disturbed, no step is twice in its metrics, and no file is
    left that should not be."""
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1", tmp_path / "killed.py", ROOT, *flags, "--save-every", "1", "--out",
               "out"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=child_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on after") == done.stdout.count("out: goes on after step 2") == 1
    undisturbed, killed = runs[1], tmp_path / "out"
    assert same_weights(model_weights(killed), model_weights(undisturbed))
    assert metrics_of(killed) == metrics_of(undisturbed)
    assert (killed / "pairs.jsonl").read_bytes() == (undisturbed / "pairs.jsonl").read_bytes()
    files = [sorted(str(file.relative_to(run)) for file in run.rglob("*")) for run in (killed, undisturbed)]
    assert files[0] == files[1]


def test_restarts_on_several_machines_are_refused(monkeypatch):
    """Each counts for itself: one of them would go on, the other begin."""
    for name, value in dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", TORCHELASTIC_MAX_RESTARTS="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--max-restarts is for the processes of one machine"):
        restarts()
    for name, value in dict(LOCAL_WORLD_SIZE="4", TORCHELASTIC_MAX_RESTARTS="0").items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert restarts() == 0


def test_a_wrong_flag_under_two_processes(tmp_path):
    """Not zero, the error line that names the flag, no traceback of ours, no folder."""
    done = run_processes(2, "train.py", "--bath", "3", "--out", "o", cwd=tmp_path)
    assert done.returncode != 0 and os.listdir(tmp_path) == []
    assert "train.py: error: unknown argument --bath (did you mean --batch?)" in done.stderr
    assert "UserError" not in done.stderr


def test_two_processes_evaluate_as_one(runs, tmp_path):
    """The same responses in the same order, the same numbers."""
    flags = ["--model", runs[0], "--max-new-tokens", "5", "--dtype", "float32", "--out"]
    run_inside(evaluation.program, tmp_path, *flags, tmp_path / "one")
    done = run_processes(2, "eval.py", *flags, tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "two")) == ["eval.json", "responses.jsonl"]
    one, two = (read_json(tmp_path / name / "eval.json") for name in ("one", "two"))
    for key in ("parts", "contexts", "settings"):
        assert_json_close(two[key], one[key], abs=1e-4)
    one, two = ([row for _, row in read_jsonl(tmp_path / name / "responses.jsonl")]
                for name in ("one", "two"))
    assert len(one) == 12
    assert_json_close(two, one, abs=1e-4)
