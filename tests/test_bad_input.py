"""Bad input of every kind, by name: exit code 2, one line of what, where and what to do, nothing written.

Each case names the program, what it is given, and words of the line that it must end in. Data files and
folders are made on the spot; programs run inside this process, the hub's cases in processes of their own.

    python -m pytest tests/test_bad_input.py
"""

import dataclasses
import http.server
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, FakeHub, leave, run_process
from safetensors.torch import load_file, save_file

import contexts
import eval as evaluation
import folder
import judge
import pairs
import sample
import train
from pairs import Pair, Response, save_pairs

PROGRAMS = dict(contexts=contexts.program, eval=evaluation.program, folder=folder.program,
                judge=judge.program, pairs=pairs.program, sample=sample.program, train=train.program)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder that a case runs in."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def refused(place: Path, monkeypatch, capsys, command: str, words: str) -> str:
    """The command leaves with 2 and one line that holds the words, and no file is new, gone or longer. The
    line."""
    def files() -> list:
        return sorted((path, path.lstat().st_size) for path in place.rglob("*"))

    before, (name, *argv) = files(), command.split()
    assert leave(monkeypatch, PROGRAMS[name], *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: error: ") and error.count("\n") == 1 and len(error) < 1200, error
    assert words in error, error
    assert files() == before
    return error


# ------------------------------------------------------------------------- data

def rows(*values: dict) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


GOOD = dict(prompt="Why?")
DATA = {  # name -> the bytes of own.jsonl, words of the line
    "empty": (b"", "no examples"),
    "blank lines": (b"\n \n\n", "no examples"),
    "torn line": (rows(GOOD) + b'{"prompt": "Wh', "own.jsonl:2: not a JSON object"),
    "Latin-1": ('{"prompt": "Où?"}'.encode("latin-1"), "own.jsonl:1: not a JSON object: 'utf-8' codec"),
    "UTF-16": (rows(GOOD).decode().encode("utf-16"), "not a JSON object"),
    "NUL bytes": (b"\x00" * 64, "own.jsonl:1: not a JSON object"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d"}', "surrogates not allowed"),
    "nested 100,000 deep": (b'{"prompt":' + b"[" * 100_000, "nested too deeply"),
    "5,000 digits": (b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}", "too many digits"),
    "a list": (b'["Why?"]\n["So?"]', "begins as a JSON array and is not one"),
    "a text": (b'"Why?"', "own.jsonl:1: not a JSON object but str"),
    "a number": (b"7", "not a JSON object but int"),
    "an array of texts": (b'["Why?"]', "row 1: not a JSON object but str"),
    "a torn array": (b'[{"prompt": "Why?"}', "begins as a JSON array and is not one"),
    "no prompt": (rows(dict(context="c")), "own.jsonl:1: no 'prompt' (the columns here are context)"),
    "blank prompt": (rows(dict(prompt=" \n")), "own.jsonl:1: no 'prompt'"),
    "null prompt": (rows(dict(prompt=None)), "no 'prompt' (the columns here are none)"),
    "prompt a number": (rows(dict(prompt=7)), "column 'prompt' holds int, not text"),
    "prompt a list of texts": (rows(dict(prompt=["a"])), "column 'prompt' holds list"),
    "context a number": (rows(dict(prompt="x", context=7)), "column 'context' holds int"),
    "context of numbers": (rows(dict(prompt="x", context=["a", 7])), "a list, but not of texts only"),
    "reference a list": (rows(dict(prompt="x", reference=["a"])), "column 'reference' holds list"),
    "system a number": (rows(dict(prompt="x", system=1)), "column 'system' holds int"),
    "misspelt column": (rows(GOOD, dict(promt="x")), "unknown column 'promt' (did you mean 'prompt'?)"),
    "an id twice": (rows(dict(prompt="x", id="a"), dict(prompt="y", id="a")), "already that of line 1"),
    "unknown split": (rows(dict(prompt="x", split="dev")), "split 'dev' is none of train, validation, test"),
    "chosen in some rows": (rows(dict(prompt="x", chosen="y"), GOOD), "some rows have 'chosen' and some"),
    "rejected alone": (rows(dict(prompt="x", rejected="y")), "need 'chosen' too"),
    "unpaired preferences": (rows(dict(prompt="x", completion="y", label=True)), "KTO"),
    "SHP": (rows(dict(history="x", human_ref_A="a", human_ref_B="b")), "SHP"),
    "battles": (rows(dict(conversation_a=[], conversation_b=[])), "battles of the chatbot arena"),
    "ShareGPT without rejected": (rows(dict(conversations=[{"from": "human", "value": "x"}])), "ShareGPT"),
    "turn with a number": (rows(dict(prompt=[dict(role="user", content=7)], chosen="a", rejected="b")),
                           "a turn holds int, not text"),
    "role a list": (rows(dict(prompt=[dict(role=["user"], content="x")], chosen="a", rejected="b")),
                    "no row can be used: a turn of ['user']"),
    "several turns": (rows(dict(prompt=[dict(role="user", content="x")] * 2, chosen="a", rejected="b")),
                      "no row can be used: more than one question"),
    "a picture": (rows(dict(prompt=dict(role="user", content=[dict(type="image")]), chosen="a")),
                  "something else than text in a turn"),
    "escape sequences": (rows({"prompt": "x", "split": "\x1b[2J"}), r"split '\x1b[2J' is none of"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_bad_data_are_refused(name, place, monkeypatch, capsys):
    """A user's own file, by file and line."""
    content, words = DATA[name]
    (place / "own.jsonl").write_bytes(content)
    refused(place, monkeypatch, capsys, "contexts --data own.jsonl", words)


GSM8K, ARC = dict(question="1 + 1?", answer="2"), dict(id="a", question="?", answerKey="A")
OTHER_DATA = {  # name -> files, the arguments of contexts.py, words
    "no file": ({}, "--data own.jsonl", "own.jsonl does not exist"),
    "a folder": ({"own.jsonl/x": b""}, "--data own.jsonl", "own.jsonl is not a file"),
    "a pipe": ({"own.jsonl": os.mkfifo}, "--data own.jsonl", "own.jsonl is not a file"),
    "a table": ({"own.csv": b"a,b"}, "--data own.csv", "neither demo, a .jsonl file nor one of"),
    "no such folder": ({}, "--data gsm8k:none", "there is no such folder"),
    "an empty folder": ({"g/x": b""}, "--data gsm8k:g", "g has no main/train-*.parquet or train.jsonl"),
    "an answer that is a number": ({"g/train.jsonl": rows(GSM8K | dict(answer=2))}, "--data gsm8k:g",
                                   "g is not laid out as openai/gsm8k is"),
    "an answer without a number": ({"g/train.jsonl": rows(GSM8K | dict(answer="two"))}, "--data gsm8k:g",
                                   "no number in 'two'"),
    "no question": ({"g/train.jsonl": rows(dict(answer="2"))}, "--data gsm8k:g", "KeyError 'question'"),
    "a null history": ({"p/survey.jsonl": rows(dict(user_id="u")), "p/conversations.jsonl": rows(
        dict(conversation_id="c", user_id="u", conversation_history=None))}, "--data prism:p",
        "p is not laid out as HannahRoseKirk/prism-alignment is: TypeError"),
    "twelve choices": ({"a/ARC-Easy/train.jsonl": rows(ARC | dict(answerKey="L", choices=dict(
        text=list("abcdefghijkl"), label=list("ABCDEFGHIJKL"))))}, "--data arc-easy:a",
        "a is not laid out as allenai/ai2_arc is: IndexError"),
    "a list of numbers": ({"s/SVAMP.json": b"[1, 2]"}, "--data svamp:s", "not laid out as ChilleD/SVAMP is"),
    "demmo": ({}, "--data demmo", "--data 'demmo' is neither demo"),
}  # fmt: skip


def write_files(place: Path, files: dict[str, bytes | Callable[[Path], None]]) -> None:
    """Files by name; a function makes what is none."""
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(place / name)
        else:
            (place / name).write_bytes(content)


@pytest.mark.parametrize("name", OTHER_DATA)
def test_bad_places_of_data_are_refused(name, place, monkeypatch, capsys):
    """Files that are none, and the paper's data sets in another layout."""
    files, argv, words = OTHER_DATA[name]
    write_files(place, files)
    refused(place, monkeypatch, capsys, f"contexts {argv}", words)


CONTEXTS = {
    "no such file": (None, "contexts.jsonl does not exist"),
    "items a text": (rows(dict(id="1", items="a")), "contexts.jsonl:1: 'items' is 'a', not a list of at"),
    "an item a number": (rows(dict(id="1", items=["a", 7])), "'items' is ['a', 7], not a list"),
    "no id": (rows(dict(items=["a"])), "'id' is missing; it should be a text"),
    "of other rows": (rows(dict(id="other", items=["a"])), "no example of own.jsonl has a context"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_bad_files_of_contexts_are_refused(name, place, monkeypatch, capsys):
    """--contexts FILE, before a model is looked for."""
    content, words = CONTEXTS[name]
    (place / "own.jsonl").write_bytes(rows(dict(prompt="x", split="train", id="1")))
    if content is not None:
        (place / "contexts.jsonl").write_bytes(content)
    command = "train --data own.jsonl --contexts contexts.jsonl --model tiny --out o"
    refused(place, monkeypatch, capsys, command, words)


# ------------------------------------------------------------------------- models

def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Another content of one of the model's files."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model / name).write_bytes(data)


def config(**changes) -> Callable[[Path], None]:
    """Other values in config.json."""
    return text("config.json", json.dumps(CONFIG | changes))


def tokenizer(**changes) -> Callable[[Path], None]:
    """Other values in tokenizer_config.json."""
    def change(model: Path) -> None:
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other tensors."""
    def apply(model: Path) -> None:
        tensors = change(load_file(model / "model.safetensors"))
        save_file(tensors, model / "model.safetensors")

    return apply


def sharded(weight_map) -> Callable[[Path], None]:
    """An index in the place of the single file, which has another name."""
    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model / "a.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))

    return change


def pipe(name: str) -> Callable[[Path], None]:
    """A pipe in a file's place."""
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return change


def without(*names: str) -> Callable[[Path], None]:
    """Fewer files."""
    return lambda model: [(model / name).unlink() for name in names]


NORM = "model.norm.weight"
HEADER = json.dumps({"a": dict(dtype="F32", shape=[2], data_offsets=[0, 999])}).encode()
MODELS = {  # name -> what is done to a good model's folder, words
    "no config": (without("config.json"), "config.json does not exist"),
    "config a list": (text("config.json", "[1]"), "holds list, not a JSON object"),
    "config nested deeply": (text("config.json", '{"a":' + "[" * 100_000), "is not JSON: it is nested"),
    "config a page": (text("config.json", "<!doctype html>"), "config.json is not JSON"),
    "config a pipe": (pipe("config.json"), "config.json is not a file"),
    "config a pointer": (text("config.json", folder.POINTER + b"v1"), "git-lfs pointer"),
    "another model": (config(model_type="gpt2"), "model_type 'gpt2'"),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "layers a text": (config(num_hidden_layers="2"), "'num_hidden_layers' is '2', not a whole number"),
    "a million layers": (config(num_hidden_layers=10**6), "'num_hidden_layers' is 1000000, not a whole"),
    "no layers": (config(num_hidden_layers=0), "'num_hidden_layers' is 0"),
    "a negative vocabulary": (config(vocab_size=-1), "'vocab_size' is -1"),
    "vocabulary of 10^30": (config(vocab_size=10**30), "'vocab_size' is 1000000000000000000"),
    "heads a list": (config(num_attention_heads=[4]), "'num_attention_heads' is [4]"),
    "heads that can't share": (config(num_key_value_heads=3), "4 heads can't share 3 key and value heads"),
    "odd heads": (config(head_dim=15), "heads of 15 channels can't be rotated in pairs"),
    "tied by a text": (config(tie_word_embeddings="false"), "is 'false', not true or false"),
    "theta of zero": (config(rope_theta=0), "'rope_theta' is 0, not a number from 1"),
    "theta not a number": (config(rope_theta=float("nan")), "'rope_theta' is nan"),
    "epsilon infinite": (config(rms_norm_eps=float("inf")), "'rms_norm_eps' is inf"),
    "scaling a text": (config(rope_scaling="llama3"), "'rope_scaling' is 'llama3', not an object"),
    "scaling without a factor": (config(rope_scaling=dict(rope_type="llama3")), "'factor' is missing"),
    "no weights": (without("model.safetensors"), "model.safetensors does not exist"),
    "a pickle": (lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
                 "read from safetensors only); the folder has pytorch_model.bin"),
    "weights a pipe": (pipe("model.safetensors"), "model.safetensors does not exist"),
    "weights a pointer": (text("model.safetensors", folder.POINTER + b"v1"), "git lfs pull"),
    "weights a page": (text("model.safetensors", "<!doctype html>"), "is not a whole safetensors file"),
    "a header of 2^63 bytes": (text("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), "not a whole"),
    "a header beyond the file": (text("model.safetensors", struct.pack("<Q", len(HEADER)) + HEADER),
                                 "is not a whole safetensors file"),
    "a shard outside": (sharded({NORM: "../a.safetensors"}), "'../a.safetensors' is not the name of a file"),
    "a shard at the root": (sharded({NORM: "/etc/passwd"}), "'/etc/passwd' is not the name of a file beside"),
    "a shard that is a folder": (sharded({NORM: ".."}), "'..' is not the name of a file beside it"),
    "a missing shard": (sharded({NORM: "b.safetensors"}), "b.safetensors does not exist"),
    "weight_map a list": (sharded([1]), "has no weight_map from tensors to files"),
    "weight_map of numbers": (sharded({NORM: 1}), "has no weight_map from tensors to files"),
    "weights not finite": (weights(lambda w: w | {NORM: w[NORM] * float("nan")}), "that are not finite"),
    "weights infinite": (weights(lambda w: w | {NORM: w[NORM] / 0}), "that are not finite"),
    "weights of integers": (weights(lambda w: w | {NORM: w[NORM].to(torch.int8)}), "quantised weights"),
    "weights of 8 bits": (weights(lambda w: w | {NORM: w[NORM].to(torch.float8_e4m3fn)}), "quantised"),
    "weights of another shape": (weights(lambda w: w | {NORM: w[NORM][:-1].clone()}), "is (63,), config"),
    "a tensor too few": (weights(lambda w: {k: v for k, v in w.items() if k != NORM}), "lacks 1 of"),
    "a tensor too many": (weights(lambda w: w | {"x": torch.ones(1)}), "1 unknown tensors, for example x"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json"),
    "tokenizer a page": (text("tokenizer.json", "<html>"), "tokenizer.json is not a tokenizer"),
    "tokenizer a list": (text("tokenizer.json", "[]"), "tokenizer.json is not a tokenizer"),
    "class a number": (tokenizer(tokenizer_class=5), "'tokenizer_class' is 5, not a text"),
    "tokens a list": (tokenizer(added_tokens_decoder=[1]), "'added_tokens_decoder' is [1], not an object"),
    "a token a number": (tokenizer(eos_token=5), "5 is not a token"),
    "no template": (tokenizer(chat_template=None), "has no chat template: MIPO needs an instruct model"),
    "template not jinja": (tokenizer(chat_template="{% for %}"), "is not valid jinja"),
    "template not UTF-8": (text("chat_template.jinja", b"\xff\xfe"), "jinja is not text in UTF-8"),
    "template without the answer": (tokenizer(chat_template="hello"), "not write what the assistant says"),
    "an end beyond all ids": (text("generation_config.json", json.dumps(dict(eos_token_id=10**30))),
                              "is not a token's id"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_bad_models_are_refused(name, place, tiny, monkeypatch, capsys):
    """A model's folder in which one thing is wrong."""
    change, words = MODELS[name]
    change(Path(shutil.copytree(tiny, place / "model")))
    refused(place, monkeypatch, capsys, "sample hello --model model --max-new-tokens 2", words)


def test_the_model_that_was_changed_is_good(place, tiny, monkeypatch, capsys):
    """Or the cases above would show nothing."""
    shutil.copytree(tiny, place / "model")
    assert leave(monkeypatch, sample.program, "hello", "--model", "model", "--max-new-tokens", "2") == 0


# ------------------------------------------------------------------------- arguments

ARGUMENTS = {
    "train --lr nan": "--lr nan: not a finite number",
    "train --lr 1e-6,inf": "--lr inf: not a finite number",
    "train --beta=-inf": "--beta -inf: not a finite number",
    "train --temperature nan": "--temperature nan: not a finite number",
    "train --judge-timeout nan": "--judge-timeout nan: not a finite number",
    "train --lr -1": "must be positive",
    "train --lr": "expected one argument",
    "train --batch 0": "must be positive",
    "train --batch two": "invalid int value: 'two'",
    "train --batch 1.5": "invalid int value: '1.5'",
    f"train --limit {10**30}": "larger than 2147483647",
    "train --seed 99999999999": "larger than 2147483647",
    "train --limit -1": "--limit -1 at least 0",
    "train --slots 0": "--slots 0 must be from 1 to 65536",
    "train --slots 1000000": "--slots 1000000 must be from 1 to 65536",
    "train --n-neg -1": "--n-neg -1 must be from 0 to 1000",
    "train --n-neg 1000000": "--n-neg 1000000 must be from 0 to 1000",
    "train --method dop": "invalid choice: 'dop'",
    "train --dtype float16": "invalid choice: 'float16'",
    "train --label-smoothing 0.5": "--label-smoothing must be in [0, 0.5)",
    "train --lora-alpha 64": "--lora-alpha scales adapters: give --lora-rank too",
    "train --judge tiny": "--judge has nothing to judge in training with --method dpo",
    "train --judge-url http://127.0.0.1:1/v1": "name it with --judge",
    "eval --model tiny --rubrics": "--rubrics: a judge writes and uses them, so give --judge too",
    "sample hello --model tiny --samples 0": "--samples 0 must be at least 1",
    "train --template x": "--template x: not of the form key=value",
    "train --modle x": "did you mean --model?",
    "sample hello --model tiny --temperature inf": "--temperature inf: not a finite number",
    "sample hello --model tiny --date today": "date 'today' is not of the form 2024-07-26",
    "sample --model tiny": "usage: python sample.py",
    "pairs --data demo": "usage: python pairs.py",
}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_bad_arguments_are_refused(command, place, monkeypatch, capsys):
    """Before anything is read or made."""
    refused(place, monkeypatch, capsys, command, ARGUMENTS[command])


# ------------------------------------------------------------------------- pairs

def pair(number: int, rejected: int = 1) -> Pair:
    response = Response("So.", [7, 8, 1], True, [5, 6])
    return Pair(f"r{number}", "Why?", "I am old.", response, [response] * rejected)


def line_of(pair: Pair) -> str:
    return json.dumps(dataclasses.asdict(pair)) + "\n"


def pairs_file(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Other lines of pairs.jsonl."""
    def apply(made: Path) -> None:
        lines = (made / "pairs.jsonl").read_text().splitlines(keepends=True)
        (made / "pairs.jsonl").write_text("".join(change(lines)))

    return apply


def meta(**changes) -> Callable[[Path], None]:
    """Other values in pairs.json."""
    return lambda made: (made / "pairs.json").write_text(json.dumps(
        dict(settings={}, statistics=dict(pairs=3)) | changes))


PAIRS = {
    "no pairs.json": (lambda made: (made / "pairs.json").unlink(), "pairs.json does not exist"),
    "no pairs.jsonl": (lambda made: (made / "pairs.jsonl").unlink(), "pairs.jsonl does not exist"),
    "interrupted": (meta(statistics=None), "pairs.jsonl is incomplete"),
    "a list": (lambda made: (made / "pairs.json").write_text("[]"), "pairs.json holds [], not a JSON object"),
    "sampling a list": (meta(settings=dict(sampling=[1])), "'sampling' is [1], not an object"),
    "statistics a list": (meta(statistics=[1]), "'statistics' is [1], not an object"),
    "no lines": (pairs_file(lambda lines: []), "holds 0 pairs"),
    "a line lost": (pairs_file(lambda lines: lines[1:]), "holds 2 pairs, of 2 rows, and pairs.json says 3"),
    "a line twice": (pairs_file(lambda lines: [*lines[:2], lines[0]]), "holds 3 pairs, of 2 rows"),
    "another number of rejected": (pairs_file(lambda lines: [lines[0], line_of(pair(8, 2)), lines[2]]),
                                   "pair 2 has 2 rejected responses, the first one 1"),
    "ids of texts": (pairs_file(lambda lines: [lines[0].replace("[7, 8, 1]", '["7"]'), *lines[1:]]),
                     "pairs.jsonl:1: 'chosen' is"),
    "negative ids": (pairs_file(lambda lines: [lines[0].replace("[7, 8, 1]", "[-7]"), *lines[1:]]),
                     "pairs.jsonl:1: 'chosen' is"),
    "no ids": (pairs_file(lambda lines: [lines[0].replace("[7, 8, 1]", "[]"), *lines[1:]]),
               "pairs.jsonl:1: a response without tokens"),
    "a style of its own": (pairs_file(lambda lines: [lines[0].replace('"plain"', '"grand"'), *lines[1:]]),
                           "'style' is 'grand', not one of plain, short"),
    "an unknown field": (pairs_file(lambda lines: ['{"id": "r"}\n']), "pairs.jsonl:1: not a pair (KeyError"),
    "another file": (pairs_file(lambda lines: ["hello\n"]), "pairs.jsonl:1: not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_bad_pairs_are_refused(name, place, monkeypatch, capsys):
    """--pairs: files that were cut, edited or mixed."""
    save_pairs(place / "made", [pair(i) for i in range(3)], dict(settings={}, statistics=dict(pairs=3)))
    change, words = PAIRS[name]
    change(place / "made")
    refused(place, monkeypatch, capsys, "train --pairs made --model tiny --out o", words)


# ------------------------------------------------------------------------- judges

ASK = "judge --query q --preference p response --judge m"
JUDGES = {
    "--judge-url http://me:hunter2@h/v1": "--judge-url holds a name or a password",
    "--judge-url me:hunter2@h/v1": "--judge-url holds a name or a password",
    "--judge-url https://me:hunter2@h:x/v1": "--judge-url holds a name or a password",
    "--judge-url https://h/v1?key=hunter2": "--judge-url holds a secret, key",
    "--judge-url ftp://h": "does not begin with http",
    "--judge-url http://h:port": "is not an address",
    "--judge-url http://a..b/v1": "is not an address",
    "--judge-url http://h/v1 --judge-key-header x:y": "--judge-key-header 'x:y' is not the name of a header",
    "--judge-url http://h/v1 --judge-options {": "--judge-options '{' is not JSON",
    "--judge-url http://h/v1 --judge-options [1]": "--judge-options '[1]' is not a JSON object",
    '--judge-url http://h/v1 --judge-options {"api_key":"hunter2"}': "holds a secret, api_key",
    "--judge-url http://h/v1 --judge-timeout 1e300": "--judge-timeout positive and at most a day",
    "--judge-url http://h/v1 --judge-at-once 0": "--judge-at-once must be from 1 to 1024",
    "--judge-url http://h/v1 --judge-tokens -1": "--judge-tokens must be at least 0",
    "--judge-options {}": "are an endpoint's: give --judge-url too",
    "": "model 'm' is neither a folder nor a hub id",
}


@pytest.mark.parametrize("argv", JUDGES)
def test_bad_judges_are_refused(argv, place, monkeypatch, capsys):
    """And no password is repeated."""
    refused(place, monkeypatch, capsys, f"{ASK} --judge-cache cache.jsonl {argv}", JUDGES[argv])
    assert "hunter2" not in "".join(capsys.readouterr())


CACHES = {
    "notes": (b"a note of mine", "does not hold JSON objects, one a line"),
    "other rows": (rows(GOOD), "does not hold a judge's replies: name another --judge-cache"),
    "a reply a list": (rows(dict(key="k", reply=[1])), "does not hold a judge's replies"),
    "a key a number": (rows(dict(key=1, reply="4")), "does not hold a judge's replies"),
    "a torn line inside": (b'{"key": "k"\n{"key": "k", "reply": "4"}\n', "cache.jsonl:1: not a JSON object"),
    "a pipe": (os.mkfifo, "cache.jsonl is not a file"),
    "a folder": (Path.mkdir, "cache.jsonl is not a file"),
}


@pytest.mark.parametrize("name", CACHES)
def test_bad_caches_are_refused_and_left_alone(name, place, monkeypatch, capsys):
    """A user's own file, named by mistake, is not shortened."""
    content, words = CACHES[name]
    write_files(place, {"cache.jsonl": content})
    before = content if isinstance(content, bytes) else None
    endpoint = "--judge-url http://127.0.0.1:9/v1 --judge-cache cache.jsonl"
    refused(place, monkeypatch, capsys, f"{ASK} {endpoint}", words)
    assert before is None or (place / "cache.jsonl").read_bytes() == before


@pytest.mark.parametrize("status", [401, 402, 403, 404, 307])
def test_an_endpoint_that_refuses_is_named(status, serve, place, monkeypatch, capsys):
    """Its address, its status and what it said."""
    server = serve(lambda *_: dict(status=status, body=b'{"error": {"message": "no\\u001b[2J"}}'))
    assert leave(monkeypatch, judge.program, *ASK.split()[1:], "--judge-url", server.url) == 2
    error = capsys.readouterr().err
    assert f"refuses, {status}: no" in error and "127.0.0.1" in error
    assert error.count("\n") == 1 and "\x1b" not in error


# ------------------------------------------------------------------------- the hub

class BadHub(FakeHub):
    """owner/none is not there, owner/gated is closed, owner/slow is silent, owner/cut ends in the middle."""

    def answer(self, path: str) -> None:
        if "/none" in path:
            self.send(404, b"", **{"X-Error-Code": "RepoNotFound"})
        elif "/gated" in path:
            self.send(403, b"", **{"X-Error-Code": "GatedRepo"})
        elif "/slow" in path:
            self.server.ended.wait(60)
        elif "/revision/" in path:
            self.send(200, json.dumps(dict(id="owner/cut", sha="0" * 40,
                                           siblings=[dict(rfilename="config.json")])).encode())
        elif "/tree/" in path:
            tree = [dict(type="file", path="config.json", size=9999, oid="0" * 40)]
            self.send(200, json.dumps(tree).encode())
        else:  # of a file less than was promised
            self.send(200, b"{", **{"Content-Length": "9999", "ETag": '"0"', "X-Repo-Commit": "0" * 40})
            self.close_connection = True


@pytest.fixture(scope="module")
def hub():
    """The address of BadHub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadHub)
    server.asked, server.ended, server.daemon_threads = [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.ended.set()
    server.shutdown()


HUB = {
    "none": ({}, "neither a folder nor a repository on the hub"),
    "gated": ({}, "owner/gated is gated: accept its licence on the hub and set HF_TOKEN"),
    "slow": ({}, "the hub cannot be reached"),
    "cut": ({}, "owner/cut"),
    "tiny": (dict(HF_HUB_OFFLINE="1"), "the hub cannot be reached"),
}


@pytest.mark.parametrize("name", HUB)
def test_a_bad_hub_is_one_line(name, hub, tmp_path):
    """Not there, closed, cut off in a download, off line: in a process of its own."""
    environment, words = HUB[name]
    switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY",
                "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")  # the latter two in seconds
    settings = dict.fromkeys(switches, "1") | environment | dict(
        HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf"), NO_PROXY="127.0.0.1")
    (tmp_path / "work").mkdir()
    done = run_process("folder.py", f"owner/{name}", cwd=tmp_path / "work", **settings)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "" and not list((tmp_path / "work").iterdir())


def test_the_table_is_as_long_as_promised():
    """Eighty cases and more, each of its own message or code path."""
    tables = DATA, OTHER_DATA, CONTEXTS, MODELS, ARGUMENTS, PAIRS, JUDGES, CACHES, HUB
    assert sum(map(len, tables)) >= 80
