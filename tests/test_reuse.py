"""eval.py --reuse: an earlier evaluation's responses of the base model, where nothing else decides them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import assert_json_close, run_inside, write_model

import eval as evaluation
import responses
from run import UserError, read_json, read_jsonl

FLAGS = ["--max-new-tokens", "5", "--dtype", "float32"]


@pytest.fixture(scope="module")
def evaluated(dpo_run, tmp_path_factory) -> Path:
    """A run with its evaluation."""
    folder = Path(shutil.copytree(dpo_run, tmp_path_factory.mktemp("evaluated") / "run"))
    run_inside(evaluation.program, folder.parent, "--model", folder, *FLAGS)
    return folder


@pytest.mark.parametrize("is_own", [False, True], ids=["another-folder", "its-own"])
def test_reused_responses_give_the_same_numbers(is_own, evaluated, tmp_path, monkeypatch):
    """And the same lines; only the trained system is sampled again, with the run's own folder nothing."""
    source = evaluated if is_own else shutil.copytree(evaluated, tmp_path / "other")
    counts, generate = [], responses.generate

    def watched(model, prompts, *rest, **options):
        counts.append(len(prompts))
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(responses, "generate", watched)
    again = tmp_path / "again"
    run_inside(evaluation.program, tmp_path, "--model", evaluated, *FLAGS, "--reuse", source, "--out", again)
    assert counts == ([] if is_own else [3])
    for key in ("parts", "contexts", "settings"):
        ours, theirs = (read_json(folder / "eval.json")[key] for folder in (again, evaluated))
        assert_json_close(ours, theirs, abs=1e-4)
    rows = []
    for folder in (again, evaluated):
        lines = [row for _, row in read_jsonl(folder / "responses.jsonl")]
        rows.append(sorted(lines, key=lambda row: (row["system"], row["id"])))
    assert len(rows[0]) == 9
    assert_json_close(*rows, abs=1e-4)


def test_another_runs_evaluation_is_not_replaced(evaluated, tmp_path):
    """Nor is the bare model's: of the same base, rows and settings, in the folder that --out names."""
    other, out = shutil.copytree(evaluated, tmp_path / "other"), tmp_path / "out"
    run_inside(evaluation.program, tmp_path, "--model", evaluated, *FLAGS, "--out", out)
    before = (out / "eval.json").read_bytes()
    with pytest.raises(UserError, match=r"out/eval.json is of another model, .*run: name another folder"):
        run_inside(evaluation.program, tmp_path, "--model", other, *FLAGS, "--out", out)
    assert (out / "eval.json").read_bytes() == before
    run_inside(evaluation.program, tmp_path, "--model", evaluated, *FLAGS, "--out", out)


@pytest.mark.parametrize(("flags", "word"), [
    (["--seed", "1"], "seed"), (["--max-new-tokens", "3"], "sampling"), (["--temperature", "1"], "sampling"),
    (["--dtype", "bfloat16"], "dtype"), (["--date", "2020-01-01"], "date"), (["--limit", "2"], "limit"),
])  # fmt: skip
def test_reuse_of_other_settings_is_refused(flags, word, evaluated, tmp_path):
    """By the name of what differs, and nothing is written."""
    with pytest.raises(UserError, match=f"--reuse.*made with {word}"):
        run_inside(evaluation.program, tmp_path, "--model", evaluated, *FLAGS, *flags, "--reuse", evaluated,
                   "--out", tmp_path / "again")
    assert os.listdir(tmp_path) == []


def test_reuse_of_another_base_model_is_refused(evaluated, own_data, tmp_path):
    """A run that started from another folder has other base responses."""
    other = write_model(tmp_path / "other", seed=5)
    shutil.copytree(evaluated, tmp_path / "run")
    args = read_json(evaluated / "args.json")
    args["arguments"]["model"] = str(other)
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    with pytest.raises(UserError, match=r"--reuse.*made with model"):
        run_inside(evaluation.program, tmp_path, "--model", tmp_path / "run", "--data", own_data, *FLAGS,
                   "--reuse", evaluated, "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_reuse_by_the_bare_model_is_refused(evaluated, tiny, own_data, tmp_path):
    """Nothing would be left to sample: a UserError, no folder."""
    with pytest.raises(UserError, match=r"--reuse.*bare model"):
        run_inside(evaluation.program, tmp_path, "--model", tiny, "--data", own_data, *FLAGS, "--reuse",
                   evaluated, "--out", tmp_path / "o")
    assert os.listdir(tmp_path) == []
