"""Evaluations that are interrupted, killed and continued; results that no other evaluation replaces.

Oracle: the bytes of an undisturbed evaluation, clock readings apart.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (ROOT, child_environment, record_samples, run_inside, run_processes, stopping_model,
                      write_data, write_model)

import eval as evaluation
from checkpoint import lock
from run import UserError, read_json, read_jsonl, write_json

FLAGS = ["--data", "own.jsonl", "--max-new-tokens", "6", "--slots", "4", "--dtype", "float32"]
DONE = ["args.json", "eval.json", "model", "responses.jsonl"]


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> Path:
    """A folder with a base model, some of whose responses end early, another one, and data."""
    folder = tmp_path_factory.mktemp("models")
    stopping_model(tiny, folder)
    write_model(folder / "trained", seed=1)
    write_data(folder / "own.jsonl", rows_per_prompt=2, train=2, test=8)
    return folder


def with_run(models: Path, folder: Path) -> Path:
    """A copy of them with a run that was trained: what eval.py reads of it."""
    shutil.copytree(models, folder)
    shutil.copytree(folder / "trained", folder / "run" / "model")
    arguments = dict(model="stopping", data="own.jsonl", method="dpo")
    write_json(folder / "run" / "args.json", dict(arguments=arguments))
    return folder


@pytest.fixture
def work(models, tmp_path) -> Path:
    """A folder with a run that has not been evaluated."""
    return with_run(models, tmp_path / "work")


def evaluate(folder: Path, *more) -> Path:
    """eval.py on the run in a folder; returns the run."""
    run_inside(evaluation.program, folder, "--model", "run", *FLAGS, *more)
    return folder / "run"


def results(run: Path) -> tuple[bytes, dict]:
    """responses.jsonl, and eval.json without clock readings."""
    result = read_json(run / "eval.json")
    del result["seconds"], result["environment"]["time"]
    return (run / "responses.jsonl").read_bytes(), result


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> tuple[bytes, dict]:
    """The results of an evaluation that nobody disturbs."""
    return results(evaluate(with_run(models, tmp_path_factory.mktemp("whole") / "work")))


def stop_after(monkeypatch, count: int) -> list[tuple[int, int]]:
    """Ctrl-C as so many responses have ended."""
    def stop(i, sample) -> None:
        if len(keys) == count:
            raise KeyboardInterrupt

    keys = record_samples(monkeypatch, stop, "responses")
    return keys


# ------------------------------------------------------------------------- one at a time

def test_two_evaluations_cannot_share_a_folder(work, whole):
    """Their samples would mix. One that ended in the meantime is seen all the same."""
    with lock(work / "run"), pytest.raises(UserError, match="run: another run is writing here"):
        evaluate(work)
    with lock(work / "elsewhere"), pytest.raises(UserError, match="elsewhere: another run is writing here"):
        evaluate(work, "--out", "elsewhere")
    assert not (work / "elsewhere").exists()
    assert results(evaluate(work)) == whole


def test_what_another_evaluation_writes_in_the_meantime_is_not_replaced(work, whole, monkeypatch):
    """It ends after this one has looked at the folder, and before this one holds the lock."""
    looked = evaluation.resolve

    def resolve(args) -> evaluation.Plan:
        plan = looked(args)
        monkeypatch.setattr(evaluation, "resolve", looked)
        evaluate(work)
        return plan

    monkeypatch.setattr(evaluation, "resolve", resolve)
    with pytest.raises(UserError, match=r"eval\.json is of an evaluation with"):
        evaluate(work, "--temperature", "0.7")
    assert results(work / "run") == whole


def test_a_run_that_is_still_training_is_refused(work):
    """Its model/ may be the best so far of a run with validation, its arguments not yet the chosen ones."""
    (work / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"run is a run that has not finished: go on with train\.py --resume"):
        evaluate(work)


def test_a_run_that_is_named_otherwise_goes_on(work, whole, monkeypatch, capsys):
    """By its whole path: its models are the same."""
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work)
    evaluate(work, "--model", str(work / "run"))
    assert "written again" not in capsys.readouterr().out
    assert results(work / "run")[0] == whole[0]


def test_a_run_without_a_learning_curve_is_evaluated_to_its_end(work, whole):
    """A copy that lacks metrics.jsonl: no picture of the gain, and nothing is left unfinished."""
    write_json(work / "run" / "summary.json", {})
    run = evaluate(work)
    assert results(run) == whole and sorted(os.listdir(run)) == sorted([*DONE, "summary.json"])


@pytest.mark.parametrize("content", ["{}", "[]", '{"arguments": 3}'])
@pytest.mark.parametrize("name", ["eval.json", "unfinished.json"])
def test_a_file_that_is_no_evaluation_is_refused(work, name, content):
    (work / "run" / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}( holds|: 'arguments' is)"):
        evaluate(work)


# ------------------------------------------------------------------------- going on

TOTAL = 4 + 8 + 8  # responses: four prompts without a context, eight rows by each of two models


@pytest.mark.parametrize("cut", [0, 1, 20], ids=["whole-lines", "no-line-end", "half-a-line"])
def test_an_interrupted_evaluation_goes_on(cut, work, whole, monkeypatch):
    """Twice stopped, the last line torn: no response that was kept is sampled again, and the bytes are those
    of an undisturbed one; nothing else is left in the folder."""
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work)
    keys = stop_after(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work)
    assert len(keys) == 9
    kept = work / "run" / "responses.jsonl.trained"
    torn = kept.read_bytes()[: -cut or None]
    kept.write_bytes(torn)
    lines = torn.count(b"}")
    keys = record_samples(monkeypatch, module="responses")
    run = evaluate(work)
    assert lines and len(keys) == 8 - lines
    assert results(run) == whole and sorted(os.listdir(run)) == DONE


def test_an_evaluation_killed_at_random_moments_goes_on(work, whole):
    """Four times by SIGKILL, up to a second after it has begun: the bytes of an undisturbed one."""
    command = [sys.executable, "-u", ROOT / "eval.py", "--model", "run", *FLAGS]
    environment, moments = child_environment(), random.Random(0)
    for _ in range(4):
        with subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE) as process:
            while b"test examples" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(moments.uniform(0, 1))
            process.kill()
    subprocess.run(command, cwd=work, env=environment, check=True)
    assert results(work / "run") == whole and sorted(os.listdir(work / "run")) == DONE


def test_what_ends_between_responses_and_numbers_goes_on(work, whole, monkeypatch):
    """All is sampled and nothing is measured yet: not a response is sampled again."""
    def stop(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work)
    assert sorted(os.listdir(work / "run")) == ["args.json", "model", "responses.jsonl", "unfinished.json"]
    monkeypatch.undo()
    keys = record_samples(monkeypatch, module="responses")
    assert results(evaluate(work)) == whole and not keys


def test_one_process_goes_on_with_what_two_began(work, whole, monkeypatch):
    """The samples of both files are kept, and in the end neither file is there."""
    stop_after(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work)
    kept = work / "run" / "responses.jsonl.prompted"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[::2]))
    (work / "run" / "responses.jsonl.prompted.process-1").write_text("".join(lines[1::2]))
    keys = record_samples(monkeypatch, module="responses")
    assert results(evaluate(work)) == whole and sorted(os.listdir(work / "run")) == DONE
    assert len(keys) == TOTAL - 10


def test_two_processes_leave_one_file(work, whole):
    """Their responses are those of one process."""
    done = run_processes(2, "eval.py", "--model", "run", *FLAGS, cwd=work)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(work / "run")) == DONE
    (work / "one.jsonl").write_bytes(whole[0])
    files = work / "run" / "responses.jsonl", work / "one.jsonl"
    two, one = ([(row["system"], row["id"], row["ids"]) for _, row in read_jsonl(file)] for file in files)
    assert two == one


def test_samples_of_weights_that_are_gone_are_dropped(work, monkeypatch, capsys):
    """A model that was written again: a line says so, and everything is sampled."""
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work)
    os.utime(work / "run" / "model" / "model.safetensors", (1, 1))
    keys = record_samples(monkeypatch, module="responses")
    evaluate(work)
    assert len(keys) == TOTAL and "written again" in capsys.readouterr().out


# ------------------------------------------------------------------------- nothing is replaced

CHANGES = {"limit": ["--limit", "3"], "seed": ["--seed", "1"], "sampling": ["--top-p", "0.5"],
           "date": ["--date", "2020-01-01"], "dtype": ["--dtype", "bfloat16"], "data": ["--data", "demo"],
           "system": ["--system", "Be brief."]}


@pytest.mark.parametrize("begun", [False, True], ids=["finished", "unfinished"])
def test_another_evaluation_does_not_replace_one(begun, work, monkeypatch):
    """Each other setting is refused by its name, the folder stays as it was; --out has room for it."""
    if begun:
        stop_after(monkeypatch, 6)
        with pytest.raises(KeyboardInterrupt):
            evaluate(work)
    else:
        evaluate(work)
    before = {file.name: file.read_bytes() for file in (work / "run").iterdir() if file.is_file()}
    keys = record_samples(monkeypatch, module="responses")
    for name, flags in CHANGES.items():
        with pytest.raises(UserError, match=rf"json is of an evaluation with .*{name} .*--out"):
            evaluate(work, *flags)
    assert before == {file.name: file.read_bytes() for file in (work / "run").iterdir() if file.is_file()}
    assert keys == []
    evaluate(work, "--limit", "3", "--out", "three")
    assert read_json(work / "three" / "eval.json")["arguments"]["limit"] == 3


def test_more_rows_replace_fewer(work, whole, capsys):
    """train.py's own evaluation has some rows of the demo: one of all rows may follow, and a line says so."""
    evaluate(work, "--limit", "3")
    evaluate(work, "--limit", "5")
    with pytest.raises(UserError, match="limit 5, not 4"):
        evaluate(work, "--limit", "4")
    with pytest.raises(UserError, match="seed 0, not 1"):
        evaluate(work, "--seed", "1")
    with pytest.raises(UserError, match="system None, not 'Be brief"):  # more rows, but not only that
        evaluate(work, "--system", "Be brief.")
    assert results(evaluate(work)) == whole
    assert "eval.json is of fewer rows, --limit 5: it is replaced" in capsys.readouterr().out


def test_verdicts_are_not_lost(work):
    """An evaluation without the judge that an earlier one asked is refused."""
    evaluate(work, "--judge", "trained")
    with pytest.raises(UserError, match="holds the verdicts of trained"):
        evaluate(work)
    with pytest.raises(UserError, match="holds the verdicts of trained"):
        evaluate(work, "--reuse", "run")
    evaluate(work, "--judge", "trained", "--out", "elsewhere")
    with pytest.raises(UserError, match="holds the verdicts of trained"):
        evaluate(work, "--reuse", "run", "--judge", "stopping", "--out", "elsewhere")
    evaluate(work, "--judge", "trained")
