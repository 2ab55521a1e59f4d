"""Models from the hub, served by a fake one on 127.0.0.1, and model folders as they are written.

The fake hub answers what huggingface_hub asks a real one: revision, tree, and HEAD and GET of files. What
reads its address from the environment runs in processes of its own.

    python -m pytest tests/test_hub.py
"""

import contextlib
import hashlib
import http.server
import json
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, FakeHub, random_model, run_process
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from folder import find, load, save_file
from folder import save as save_model
from model import Decoder
from run import UserError

SHA = "0123456789" * 4
STRAY = {"README.md": b"# tiny", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx",
         "consolidated.safetensors": b"twice"}


# ------------------------------------------------------------------------- a fake hub

class ModelHub(FakeHub):
    """owner/tiny is whole, owner/gated closed, owner/locked lists its files but keeps them; others are not.
    """

    def answer(self, path: str) -> None:
        files, name = self.server.files, "/".join(path.split("/")[5:])
        if "gated" in path or "/locked/resolve/" in path:
            self.send(403, b"", **{"X-Error-Code": "GatedRepo"})
        elif path in ("/api/models/owner/tiny/revision/main", "/api/models/owner/locked/revision/main"):
            info = dict(id="owner/tiny", sha=SHA, siblings=[dict(rfilename=f) for f in files])
            self.send(200, json.dumps(info).encode())
        elif path in (f"/api/models/owner/tiny/tree/{SHA}", f"/api/models/owner/locked/tree/{SHA}"):
            tree = [dict(type="file", path=f, size=len(b), oid=hashlib.sha1(b).hexdigest())
                    for f, b in files.items()]
            self.send(200, json.dumps(tree).encode())
        elif path.startswith("/owner/tiny/resolve/") and name in files:
            etag = hashlib.sha1(files[name]).hexdigest()
            self.send(200, files[name], **{"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
        else:
            self.send(404, b"", **{"X-Error-Code": "RepoNotFound"})


def content(folder: Path) -> dict[str, bytes]:
    """Name and bytes of every file in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@contextlib.contextmanager
def hub(folder: Path):
    """(address, requests so far) of a hub that serves the folder, and files no model needs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ModelHub)
    server.files = content(folder) | STRAY
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()


HUB_VARIABLES = [name for name in os.environ
                 if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy")]
QUIET = dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1",
             HF_HUB_ETAG_TIMEOUT="20", HF_HUB_DOWNLOAD_TIMEOUT="20")


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """(endpoint, script, arguments) -> the finished process, in an empty folder and with a cache of its own.
    """
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name)
    (tmp_path / "work").mkdir()

    def program(endpoint: str, script: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
        environment = QUIET | dict(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf")) | environment
        return run_process(script, *argv, cwd=tmp_path / "work", **environment)

    return program


def test_a_hub_model_is_fetched_once_and_only_what_it_needs(ask, tiny):
    """Every tensor loads; pickles, cards and other stray files are never asked for; then it works offline."""
    count = sum(p.numel() for p in load_file(tiny / "model.safetensors").values())
    with hub(tiny) as (address, asked):
        online = ask(address, "folder.py", "owner/tiny")
        assert online.returncode == 0, online.stderr
        assert f"{count:,} parameters" in online.stdout and '"hidden_size": 64' in online.stdout
        fetched = [path.rsplit("/", 1)[1] for verb, path in asked if verb == "GET" and "/resolve/" in path]
        assert sorted(fetched) == sorted(p.name for p in tiny.iterdir())
        assert not [path for _, path in asked if any(path.endswith(name) for name in STRAY)]
    offline = ask(address, "folder.py", "owner/tiny", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, online.stdout), offline.stderr


CANNOT_BE_HAD = {"owner/gated": ["licence", "HF_TOKEN"], "owner/locked": ["licence", "HF_TOKEN"],
                 "owner/none": ["folder", "hub"]}
ONE_AFTER_ANOTHER = """
import sys
import run, train

for name in sys.argv[1:]:
    sys.argv = ["train.py", "--data", "demo", "--model", name]
    try:
        run.main(train.program)
    except SystemExit as e:
        print(name, e.code)
"""


def test_a_model_that_cannot_be_had_is_one_line(ask, tiny, tmp_path):
    """Gated as a whole, gated files, no such repository: exit code 2, a line with name and remedy, and
    train.py leaves nothing behind."""
    script = tmp_path / "one_after_another.py"
    script.write_text(ONE_AFTER_ANOTHER)
    with hub(tiny) as (address, asked):
        done = ask(address, str(script), *CANNOT_BE_HAD, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} 2" for name in CANNOT_BE_HAD]
    for line, (name, words) in zip(done.stderr.splitlines(), CANNOT_BE_HAD.items(), strict=True):
        assert all(word in line for word in [name, *words])
        assert any(name in path for _, path in asked)
    assert not list((tmp_path / "work").iterdir())


def test_a_hub_that_cannot_be_reached_is_one_line(ask):
    """Nobody listens: exit code 2, a line that names the model and says that it is the hub."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        done = ask(f"http://127.0.0.1:{deaf.getsockname()[1]}", "folder.py", "owner/tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    assert all(word in done.stderr for word in ["owner/tiny", "folder", "hub", "reach"])


@pytest.mark.parametrize("name", ["my runs/my model", "owner/model.git", "owner/a--b"])
def test_names_that_no_repository_can_have(name):
    """A UserError that names it, as for any folder that is not there."""
    with pytest.raises(UserError, match=name):
        find(name)


# ------------------------------------------------------------------------- saving

def save(start: Decoder, folder: Path, source: Path, *dtype: torch.dtype, shard: str = "5GB") -> None:
    """folder.save with the weights of a whole model."""
    save_model(start.state_dict(), start.config, folder, source, *dtype, max_file_size=shard)


CASES = pytest.mark.parametrize(("dtype", "tied"), [(torch.bfloat16, True), (torch.float32, False)])


@CASES
def test_shards_open_everywhere_with_the_same_bits(dtype, tied, tiny, tmp_path):
    """Numbered files of at most 100 KB and an index that names each tensor's; transformers and load agree."""
    start = random_model(seed=3, tie_word_embeddings=tied)
    save(start, tmp_path / "out", tiny, dtype, shard="100KB")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 2
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {key: file for file in files for key in load_file(tmp_path / "out" / file)}
    assert found == index["weight_map"] and found.keys() == start.state_dict().keys()
    sizes = [sum(p.nbytes for p in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == dtype
    weights, ours = theirs.state_dict(), load(tmp_path / "out").state_dict()
    for key, p in start.state_dict().items():
        assert torch.equal(weights[key], p.to(dtype)) and torch.equal(ours[key], p.to(dtype).float())
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        load(tmp_path / "out")


@CASES
def test_a_small_model_is_a_single_file(dtype, tied, tiny, tmp_path):
    """No index; config.json says the type; the tokenizer's files are the source's."""
    start = random_model(seed=3, tie_word_embeddings=tied)
    save(start, tmp_path / "out", tiny, dtype)
    source, out = content(tiny), content(tmp_path / "out")
    assert out.keys() == source.keys() and json.loads(out["config.json"])["torch_dtype"] == str(dtype)[6:]
    assert all(out[name] == source[name] for name in source.keys() - {"model.safetensors", "config.json"})
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == start.state_dict().keys()
    assert all(torch.equal(weights[key], p.to(dtype)) for key, p in start.state_dict().items())


def test_saving_replaces_a_folder_whole(tiny, tmp_path):
    """Its shards, index and whatever else lay there go; over the source itself the tokenizer stays."""
    out = tmp_path / "out"
    save(random_model(seed=3), out, tiny, shard="100KB")
    (out / "notes.txt").write_text("old")
    save(random_model(seed=4), out, out, torch.float32)
    save(random_model(seed=4), tmp_path / "fresh", tiny, torch.float32)
    assert content(out) == content(tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


def test_an_error_while_saving_leaves_the_old_folder(tiny, tmp_path, monkeypatch):
    """The disk is full at the second shard: not a byte changes, a new folder does not appear."""
    save(random_model(seed=3), tmp_path / "out", tiny)
    before, write, files = content(tmp_path / "out"), save_file, []

    def full(tensors, file, *args, **kwargs):
        files.append(file)
        if len(files) % 2 == 0:
            raise OSError(28, "No space left on device", str(file))
        write(tensors, file, *args, **kwargs)

    monkeypatch.setattr("folder.save_file", full)
    for name in ("out", "new"):
        with pytest.raises(OSError, match="No space"):
            save(random_model(seed=4), tmp_path / name, tiny, shard="100KB")
    assert len(files) == 4 and content(tmp_path / "out") == before and not (tmp_path / "new").exists()
    monkeypatch.setattr("folder.save_file", write)
    save(random_model(seed=4), tmp_path / "out", tiny, shard="100KB")
    assert torch.equal(load(tmp_path / "out").head, random_model(seed=4).head.bfloat16().float())
