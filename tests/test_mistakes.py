"""A newcomer's mistakes: one line that says what is wrong, exit code 2, and nothing left behind. And what an
interrupt or a full disk leaves: all that was sampled."""

import collections
import json
import re
import shutil
import signal
import types
from pathlib import Path

import pytest
from conftest import ROOT, leave, record_samples

import eval as evaluation
import pairs
import sample
import train
from pairs import load_pairs
from run import read_json

TINY = ROOT / "assets" / "tiny"
PROGRAMS = dict(train=train.program, eval=evaluation.program, sample=sample.program, pairs=pairs.program)
MISTAKES = {
    "train --dta demo": "did you mean --data?",
    "train demo": "unknown argument demo",
    "train --neg mising": "choose from 'missing', 'random'",
    "train --lr fast": "invalid float value: 'fast'",
    "train --lr 0": "--lr, --beta and --pass-tokens must be positive",
    "train --data demmo": "--data 'demmo' is neither demo, a .jsonl file nor one of prism, community, ",
    "train --data nowhere.jsonl": "nowhere.jsonl does not exist",
    "train --data column.jsonl --model tiny": "column.jsonl:2: unknown column 'promt' (did you mean",
    "train --data broken.jsonl --model tiny": "broken.jsonl:1: not a JSON object",
    "train --data folder --model tiny": "neither demo, a .jsonl file nor one of",
    "train --data gsm8k:folder/none": "gsm8k:folder/none: there is no such folder",
    "train --contexts none.jsonl --model tiny": "none.jsonl does not exist",
    "eval --model tiny --judge none --out o": "model 'none' is neither a folder nor a hub id",
    "eval --report folder": "eval.json does not exist",
    "train --model ~nosuchuser/x": "model '~nosuchuser/x': there is no such user's folder",
    "sample --model tiny --temperature 1e-40 hello": "temperature 1e-40 is too small to divide by",
    "train --model nowhere": "model 'nowhere' is neither a folder nor a hub id",
    "train --model folder": "config.json does not exist",
    "train --model gpt2": "model_type 'gpt2' (llama, qwen2 and qwen3 are) is not supported",
    "train --model torn": "is not a whole safetensors file",
    "eval": "usage: python eval.py --model RUN",
    "eval --model tiny": "is a bare model, not a run",
    "pairs": "usage: python pairs.py",
    "sample --model tiny": "usage: python sample.py",
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the mistakes name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
    (tmp_path / "column.jsonl").write_text('{"prompt": "x"}\n{"promt": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"\n')
    shutil.copytree(TINY, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_ends_in_one_helpful_line(command, place, monkeypatch, capsys):
    """On the error stream, with the program's name; exit code 2; no file or folder is made."""
    name, *argv = command.split()
    before = sorted(place.rglob("*"))
    assert leave(monkeypatch, PROGRAMS[name], *argv) == 2
    error = capsys.readouterr().err
    assert MISTAKES[command] in error and error.startswith(f"{name}.py: error: ")
    assert error.count("\n") == 1
    assert before == sorted(place.rglob("*"))


# ------------------------------------------------------------------------- a full disk

def test_a_full_disk_is_told_before_the_work(place, monkeypatch, capsys):
    """Less room than the saved model takes, in fp32, or two where a better one replaces it: refused before
    anything is sampled."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5_000_000))
    few = ("--limit", "4", "--dtype", "float32")
    assert leave(monkeypatch, train.program, *few) == 2
    assert re.search(r"a trained model takes 11 MB, 5 MB are free\n$", capsys.readouterr().err)
    for better in (("--lr", "1e-5,1e-4"), ("--eval-every", "1")):
        assert leave(monkeypatch, train.program, *few, *better) == 2
        assert not (place / "runs").exists()
        assert re.search(r"a trained model takes 23 MB, 5 MB are free\n$", capsys.readouterr().err)


SAMPLE = ("--limit", "8", "--max-new-tokens", "8", "--slots", "4", "--dtype", "float32", "--out")


def texts_of(folder: Path) -> list[list[str]]:
    """All responses of all pairs."""
    return [[response.text for response in pair.responses] for pair in load_pairs(folder)]


def test_a_disk_that_fills_up_keeps_what_was_sampled(place, monkeypatch, capsys):
    """No space left as the fourth pair is written: one line, three whole rows, and the command goes on."""
    written = []

    def dumps(row: dict, **options) -> str:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(row["id"])
        return json.dumps(row, **options)

    monkeypatch.setattr(pairs, "json", types.SimpleNamespace(dumps=dumps))
    assert leave(monkeypatch, pairs.program, *SAMPLE, "made") == 2
    assert "make room and give the same command again" in capsys.readouterr().err
    assert (place / "made" / "pairs.jsonl").read_bytes().count(b"\n") == 3
    monkeypatch.setattr(pairs, "json", json)
    for folder in ("made", "at_once"):
        assert leave(monkeypatch, pairs.program, *SAMPLE, folder) == 0
    assert texts_of(place / "made") == texts_of(place / "at_once") != []


# ------------------------------------------------------------------------- Ctrl-C

def test_an_interrupt_is_one_line_and_the_command_goes_on(place, monkeypatch, capsys):
    """A signal as the ninth response of sixteen has ended: exit code 130; the same command then finishes."""
    def interrupt(i: int, drawn: sample.Sample) -> None:
        if len(keys) == 9:
            signal.raise_signal(signal.SIGINT)

    keys = record_samples(monkeypatch, interrupt)
    # A process that a shell has put in the background ignores the signal until it is told otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert leave(monkeypatch, pairs.program, *SAMPLE, "made") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert error == "\npairs.py: interrupted; what was sampled is kept\n"
    rows = (place / "made" / "pairs.jsonl").read_bytes().count(b"\n")
    assert 0 < rows < 8
    keys = record_samples(monkeypatch)
    assert leave(monkeypatch, pairs.program, *SAMPLE, "made") == 0
    assert len({row for row, k in keys if k == 0}) == 8 - rows
    assert read_json(place / "made" / "pairs.json")["statistics"]["examples"] == 8
