"""A user's own data and run folders through eval.py: answers, pairs, long rows, folders that were moved; and
promises about the environment: WORLD_SIZE, Python versions."""

import dataclasses
import importlib.metadata
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, oracle_logp, run_process, write_model
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import AutoModelForCausalLM

import eval as evaluation
from report import table
from run import UserError, read_json, started_by_torchrun, write_json
from tokenizer import Tokenizer
from train import Args as TrainArgs


@pytest.fixture
def run_folder(tmp_path, monkeypatch) -> Path:
    """A run folder in a folder of its own, trained from models/base by its relative path."""
    there = tmp_path / "there"
    write_model(there / "models" / "base")
    write_model(there / "run" / "model", seed=1)
    arguments = dataclasses.asdict(TrainArgs(data="mine.jsonl", model="models/base", neg="random",
                                             max_new_tokens=4, dtype="float32"))
    base = str((there / "models" / "base").absolute())
    (there / "run" / "args.json").write_text(json.dumps(dict(arguments=arguments, base=base)))
    monkeypatch.chdir(there)
    return there / "run"


def write_rows(file: Path, *rows: dict) -> Path:
    """Rows of the test part."""
    file.write_text("".join(json.dumps(dict(split="test") | row) + "\n" for row in rows))
    return file


def evaluate(run: Path, data: Path, **more) -> dict:
    """What eval.py measures of a run on a file."""
    plan = evaluation.resolve(evaluation.Args(model=str(run), data=str(data), **more))
    return evaluation.measure(plan)[1]


# ------------------------------------------------------------------------- answers and pairs

def test_own_answers_are_scored(run_folder):
    """The win rate is there, and every number that is not has its reason in the table."""
    rows = [dict(prompt=f"What is {i} + {i}?", answer=str(2 * i)) for i in range(4)]
    result = evaluate(run_folder, write_rows(run_folder.parent / "mine.jsonl", *rows))
    for row in result["parts"]["all"]["systems"].values():
        assert row["win_rate"]["n"] == 4
    text = table(result)
    assert "no context gain of default, trained" in text and "no win rate" not in text


def test_data_with_nothing_to_win_by_say_so(run_folder):
    """Neither a check nor an answer nor a judge."""
    data = write_rows(run_folder.parent / "mine.jsonl", dict(prompt="Why?"), dict(prompt="How?"))
    text = table(evaluate(run_folder, data))
    assert "no win rate of default, trained, trained - default: no row has a check, a short `answer`" in text


def test_the_datas_own_pairs_have_their_margins_counted(run_folder):
    """The share whose chosen response is likelier after training, against the rejected one: by transformers.
    """
    rows = [dict(prompt=f"Question {i}?", chosen=f"Good {i}.", rejected=f"No {7 * i}!") for i in range(5)]
    result = evaluate(run_folder, write_rows(run_folder.parent / "mine.jsonl", *rows))
    tokenizer, margins = Tokenizer("models/base"), [0.0] * 5
    for sign, folder in ((-1, "models/base"), (1, "run/model")):
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        for i, row in enumerate(rows):
            prompt = tokenizer.chat(row["prompt"])
            chosen, rejected = (oracle_logp(oracle, prompt, tokenizer.response(row[key]))
                                for key in ("chosen", "rejected"))
            margins[i] += sign * (chosen - rejected)
    assert result["pairs"]["mean"] == sum(margin > 0 for margin in margins) / 5
    assert 0 < result["pairs"]["mean"] < 1 and result["pairs"]["n"] == 5
    assert "pairs of the data: in " in table(result)


def test_pairs_that_can_teach_nothing_are_not_counted(run_folder):
    """Twice the same response, and an empty one: training drops such rows too."""
    rows = [dict(prompt="Why?", chosen="Because.", rejected=text) for text in ("No!", "Because.", " ")]
    result = evaluate(run_folder, write_rows(run_folder.parent / "mine.jsonl", *rows))
    assert result["pairs"]["n"] == 1


def test_pairs_that_do_not_fit_cost_no_evaluation(run_folder, capsys):
    """All else is measured; the row is named once."""
    data = write_rows(run_folder.parent / "mine.jsonl",
                      dict(prompt="Why?", chosen="long " * 2100, rejected="No."))
    assert evaluate(run_folder, data)["pairs"] is None
    assert capsys.readouterr().out.count("prompt and response take more than") == 1


def test_a_test_row_that_is_too_long_is_dropped_and_named(run_folder, capsys):
    """Before anything is sampled."""
    data = write_rows(run_folder.parent / "mine.jsonl", dict(prompt="Why?"), dict(prompt="long " * 2000))
    plan = evaluation.resolve(evaluation.Args(model=str(run_folder), data=str(data)))
    assert [e.prompt for e in plan.examples] == ["Why?"]
    out = capsys.readouterr().out
    assert "1 of 2 rows dropped: prompt and 4 new tokens take more than the model's 2048 positions" in out
    assert f"(first: {data}:2)" in out


# ------------------------------------------------------------------------- folders that were moved

def resolved(run: Path, tmp_path: Path, **more) -> evaluation.Plan:
    """The plan of evaluating a run on data at hand."""
    data = write_rows(tmp_path / "here.jsonl", dict(prompt="Why?"))
    return evaluation.resolve(evaluation.Args(model=str(run), **dict(data=str(data)) | more))


def test_contexts_are_inferred_for_a_test_as_they_were_for_training(run_folder, monkeypatch):
    """By the run's judge with all that it was told, whoever judges here; on other data by this judge."""
    told = dict(judge="thinker", judge_url="http://127.0.0.1:1/v1", judge_cache="own.jsonl",
                judge_tokens=2000, judge_timeout=600.0, judge_key_header="x-key",
                judge_options='{"reasoning_effort": "low"}')
    written = read_json(run_folder / "args.json")
    write_json(run_folder / "args.json", written | dict(arguments=written["arguments"] | told
                                                        | dict(data="community")))
    asked = []

    def examples_for(args, split) -> None:
        asked.append({name: getattr(args, name) for name in told})
        raise UserError("enough")

    monkeypatch.setattr(evaluation, "examples_for", examples_for)
    for data in ("community", "prism"):
        with pytest.raises(UserError, match="enough"):
            evaluation.resolve(evaluation.Args(model=str(run_folder), data=data, judge="tiny"))
    assert asked[0] == told and asked[1]["judge"] == "tiny" and asked[1]["judge_tokens"] == 0


def test_a_run_folder_that_was_moved_is_evaluated(run_folder, tmp_path, monkeypatch):
    """Its base model by the absolute path; the settings' name of it stays."""
    elsewhere = shutil.move(run_folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    plan = resolved(elsewhere, tmp_path)
    assert Path(plan.base) == tmp_path / "there" / "models" / "base"
    assert plan.settings["model"] == "models/base"


def test_a_base_model_that_was_moved_is_named_anew(run_folder, tmp_path, monkeypatch):
    """Without --base one line says where it was; it is never asked of the hub."""
    monkeypatch.setattr("folder.download", None)
    moved = shutil.move(run_folder.parent / "models", tmp_path / "moved")
    with pytest.raises(UserError, match=r"trained from the folder .*there/models/base.*--base"):
        resolved(run_folder, tmp_path)
    assert resolved(run_folder, tmp_path, base=str(moved / "base")).base == str(moved / "base")
    with pytest.raises(UserError, match=r"--base names it"):
        resolved(run_folder, tmp_path, base=str(moved / "nothing" / "here"))


def test_a_run_of_an_earlier_version_goes_by_the_models_name(run_folder, tmp_path):
    """Its args.json has no absolute path."""
    saved = read_json(run_folder / "args.json")
    (run_folder / "args.json").write_text(json.dumps(dict(arguments=saved["arguments"])))
    assert resolved(run_folder, tmp_path).base == "models/base"


def test_data_that_were_moved_are_asked_for(run_folder, tmp_path):
    """The run's own file is not there."""
    with pytest.raises(UserError, match=r"trained on mine\.jsonl, which is not here: .*--data"):
        resolved(run_folder, tmp_path, data=None)


# ------------------------------------------------------------------------- the environment

ALL = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")


@pytest.mark.parametrize(("size", "others", "several", "told"), [
    (None, {}, False, False), ("1", {}, False, False), ("", {}, False, False), ("1", ALL, False, False),
    ("2", ALL, True, False), ("2", {}, False, True), ("8", dict(RANK="3"), False, True),
    ("2", dict(MASTER_ADDR="node", MASTER_PORT="1"), False, True), ("many", {}, False, True),
])  # fmt: skip
def test_a_world_size_without_torchrun_is_told_and_ignored(size, others, several, told, monkeypatch, capsys):
    """Clusters leave it in the environment; only torchrun sets all of its variables."""
    for name in ("WORLD_SIZE", *ALL):
        monkeypatch.delenv(name, raising=False)
    for name, value in (others if size is None else others | dict(WORLD_SIZE=size)).items():
        monkeypatch.setenv(name, value)
    assert started_by_torchrun() == several
    assert ("torchrun starts several" in capsys.readouterr().err) == told


def test_a_program_runs_with_a_world_size_left_over(tiny, tmp_path):
    """One process, which ends."""
    argv = "--model", tiny, "--max-new-tokens", 2, "Hi"
    result = run_process("sample.py", *argv, cwd=tmp_path, WORLD_SIZE="2")
    assert result.returncode == 0 and "WORLD_SIZE=2 is ignored" in result.stderr


def test_the_pins_have_the_python_that_is_promised():
    """README.md, pyproject.toml and ruff name one oldest version, and every pinned package installs on it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (oldest,) = re.findall(r"needs Python (3\.\d+) or newer", (ROOT / "README.md").read_text())
    assert project["project"]["requires-python"] == f">={oldest}"
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    pins = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    installed = {pin.name: importlib.metadata.metadata(pin.name) for pin in pins
                 if pin.marker is None or pin.marker.evaluate()}
    pinned = [pin.name for pin in pins
              if pin.name in installed and installed[pin.name]["Version"] in pin.specifier]
    assert len(pinned) > 5  # a package of another version says nothing of the pin
    for name in pinned:
        assert oldest in SpecifierSet(installed[name]["Requires-Python"] or ""), name
