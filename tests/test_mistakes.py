"""A newcomer's mistakes: one line that says what is wrong, exit code 2, and nothing left behind. And the
embedded model, which a newcomer meets first."""

import collections
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import pairs
import sample
import train
from model import load
from run import main
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
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
    program, *argv = command.split()
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *argv])
    with pytest.raises(SystemExit) as left:
        main(PROGRAMS[program])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert MISTAKES[command] in error and error.startswith(f"{program}.py: error: ")
    assert error.count("\n") == 1
    assert "runs" not in {p.name for p in place.iterdir()} and before == sorted(place.rglob("*"))


def test_a_full_disk_is_told_before_the_work(place, monkeypatch, capsys):
    """Less room than a model takes: refused before anything is sampled."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5_000_000))
    monkeypatch.setattr(sys, "argv", ["train.py", "--limit", "4"])
    with pytest.raises(SystemExit) as left:
        main(train.program)
    assert left.value.code == 2 and not (place / "runs").exists()
    assert re.search(r"a trained model takes 6 MB, 5 MB are free\n$", capsys.readouterr().err)


def test_a_disk_that_fills_up_keeps_what_was_sampled(place, monkeypatch, capsys):
    """No space in the middle of sampling: one line, and pairs.jsonl still holds whole rows to go on from."""
    command = ["pairs.py", "--limit", "6", "--max-new-tokens", "24", "--out"]
    monkeypatch.setattr(sys, "argv", [*command, "made"])
    real, calls = pairs.json.dumps, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(pairs.json, "dumps", full)
    with pytest.raises(SystemExit) as left:
        main(pairs.program)
    monkeypatch.setattr(pairs.json, "dumps", real)
    assert left.value.code == 2 and "make room and give the same command again" in capsys.readouterr().err
    for folder in ("made", "at_once"):
        monkeypatch.setattr(sys, "argv", [*command, folder])
        with pytest.raises(SystemExit) as left:
            main(pairs.program)
        assert left.value.code == 0
    texts = [[(p.id, p.chosen_ids, p.rejected_ids) for p in pairs.load_pairs(place / folder)]
             for folder in ("made", "at_once")]
    assert texts[0] == texts[1] and len(texts[0]) > 3


def test_an_interrupt_is_one_line_and_the_command_goes_on(tmp_path):
    """Ctrl-C during sampling: exit code 130; the same command then finishes."""
    command = [sys.executable, ROOT / "pairs.py", "--limit", "200", "--out", tmp_path / "made"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    part = tmp_path / "made" / "pairs.jsonl"
    while running.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    error = running.communicate()[1]
    assert running.returncode == 130 and "interrupted; what was sampled is kept" in error
    assert "Traceback" not in error
    assert 0 < part.read_bytes().count(b"\n") < 200
    subprocess.run(command, capture_output=True, check=True)
    assert json.loads((tmp_path / "made" / "pairs.json").read_text())["statistics"]["examples"] == 200


def test_every_option_stands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Options") : text.index("## Results")]
    for args in (train.Args, evaluation.Args, sample.Args, pairs.Args):
        for field in dataclasses.fields(args):
            flag = "`--" + field.name.replace("_", "-") + "`"
            assert flag in table or field.name == "prompt", flag  # sample.py's one positional argument


def test_the_embedded_model_is_an_ordinary_folder():
    """At most 3M parameters and 6 MB; transformers opens it, to equal logits and equal prompts."""
    oracle = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert sum(p.numel() for p in oracle.parameters()) <= 3_000_000
    assert (TINY / "model.safetensors").stat().st_size <= 6_000_000
    tokenizer, turn = Tokenizer(TINY), "How do I keep bread fresh? I love gardening."
    theirs = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        [dict(role="user", content=turn)], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(tokenizer.chat(turn))
    assert tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == theirs
    model = load(TINY)
    with torch.no_grad():
        logits = model.logits(model(ids, model.pack([(len(ids), [])])))
        torch.testing.assert_close(logits, oracle(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
