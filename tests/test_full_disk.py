"""The disk is full at each kind of write, in turn: one line says so, nothing is left in half, and the same
command goes on to the same bits. A disk that can't be written to at all is told before any work.

The disk is a real one, small and in memory: mounting it takes root, and elsewhere these tests are skipped.
"""

import builtins
import errno
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import TRAIN_FLAGS, leave, metrics_of, model_weights, run_inside, same_weights
from safetensors import safe_open

import eval as evaluation
import judge
import train
from run import read_json

SAVERS = ("checkpoint", "folder")  # modules that call safetensors, whose own code opens the file
MODEL = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
PNG_END = b"IEND\xaeB`\x82"


class SmallDisk:
    """A disk on which nothing can be written any more once the file that is named next has been opened."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.ballast, self.victim = folder, folder / "ballast", ""
        really_open = builtins.open

        def open_watched(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax"):
                self.about_to_write(file)
            return really_open(file, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", open_watched)
        for module in SAVERS:
            self.watch_saver(monkeypatch, module)

    def watch_saver(self, monkeypatch, module: str) -> None:
        def save_watched(tensors, file, **kwargs) -> None:
            self.about_to_write(file)
            really_save(tensors, file, **kwargs)

        really_save = __import__(module).save_file
        monkeypatch.setattr(f"{module}.save_file", save_watched)

    def about_to_write(self, file) -> None:
        if self.victim and Path(str(file)).name.removesuffix(".tmp") == self.victim:
            self.victim = ""
            self.fill()

    def fill(self) -> None:
        with self.ballast.open("wb", buffering=0) as file, pytest.raises(OSError) as full:
            while True:
                file.write(bytes(4096))
        assert full.value.errno == errno.ENOSPC

    def clear(self) -> None:
        assert not self.victim  # it was opened, so that the disk was full in time
        self.ballast.unlink()

    def whole_files(self) -> None:
        """Every file is what its name says; none is left half written."""
        for file in self.folder.rglob("*"):
            assert file.suffix != ".tmp", file
            if file.suffix == ".json":
                read_json(file)
            elif file.suffix == ".safetensors":
                safe_open(file, "pt")
            elif file.suffix == ".png":
                assert file.read_bytes().endswith(PNG_END)
            elif file.name == "model":
                assert {path.name for path in file.iterdir()} >= MODEL


@pytest.fixture
def mounted(tmp_path) -> Path:
    """An empty disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here, which takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(mounted, monkeypatch) -> SmallDisk:
    return SmallDisk(mounted, monkeypatch)


def full_at(disk: SmallDisk, name: str, capfd, monkeypatch, program, *argv) -> None:
    """A program whose disk is full as it writes a file of this name: what it does, and what it leaves."""
    disk.victim = name
    capfd.readouterr()
    assert leave(monkeypatch, program, *argv) == 2, name
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"No space left on device: {disk.folder}/" in error, (name, error)
    assert f"{name}; what was written is kept: make room and give the same command again" in error, error
    disk.clear()
    disk.whole_files()


TRAINING = ("args.json", "pairs.json", "pairs.jsonl", "metrics.jsonl", "tensors.safetensors", "state.json",
            "manifest.json", "latest.json", "config.json", "model.safetensors", "tokenizer.json",
            "adapter_model.safetensors", "adapter_config.json", "learning_curve.png", "summary.json")
EVALUATION = ("unfinished.json", "responses.jsonl.trained", "responses.jsonl", "eval.json")


def test_a_run_goes_on_after_each_kind_of_write_that_failed(disk, own_data, tiny, tmp_path, monkeypatch,
                                                            capfd):
    """Training with adapters and evaluation, stopped nineteen times: bits and files of an undisturbed one."""
    flags = ["--data", own_data, "--model", tiny, *TRAIN_FLAGS, "--lora-rank", "4", "--save-every", "1"]
    run_inside(train.program, tmp_path, *flags, "--out", "whole")
    run_inside(evaluation.program, tmp_path, "--model", "whole", "--slots", "4")
    whole, killed = tmp_path / "whole", disk.folder / "run"
    for name in TRAINING:
        full_at(disk, name, capfd, monkeypatch, train.program, *flags, "--out", killed, "--resume")
    run_inside(train.program, tmp_path, *flags, "--out", killed, "--resume")
    for name in EVALUATION:
        full_at(disk, name, capfd, monkeypatch, evaluation.program, "--model", killed, "--slots", "4")
    run_inside(evaluation.program, tmp_path, "--model", killed, "--slots", "4")
    assert same_weights(model_weights(killed), model_weights(whole))
    assert metrics_of(killed) == metrics_of(whole)
    for name in ("pairs.jsonl", "responses.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert read_json(killed / "eval.json")["parts"] == read_json(whole / "eval.json")["parts"]
    files = [sorted(str(file.relative_to(run)) for file in run.rglob("*")) for run in (killed, whole)]
    assert files[0] == files[1]


def test_a_verdict_that_could_not_be_kept_is_asked_for_again(disk, serve, monkeypatch, capfd):
    """The cache holds no half line, and then the whole one."""
    server, cache = serve(lambda *_: dict(content="4")), disk.folder / "cache.jsonl"
    flags = ["--judge", "m", "--judge-url", server.url, "--judge-cache", cache, "--query", "q",
             "--preference", "p", "response"]
    full_at(disk, "cache.jsonl", capfd, monkeypatch, judge.program, *flags)
    assert cache.read_bytes() == b""
    assert leave(monkeypatch, judge.program, *flags) == 0
    assert cache.read_bytes().count(b"\n") == 1 and len(server.asked) == 2


def test_a_disk_that_is_read_only_is_told_before_the_work(mounted, own_data, tiny, tmp_path, monkeypatch,
                                                          capfd):
    """Of a new run and of one that is to go on: one line, nothing is sampled; but a model there is read."""
    flags = ["--data", own_data, "--model", tiny, *TRAIN_FLAGS]
    run_inside(train.program, tmp_path, *flags, "--out", mounted / "run")
    shutil.copytree(mounted / "run", mounted / "whole")
    (mounted / "run" / "summary.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    monkeypatch.setattr("pairs.generate", None)
    capfd.readouterr()
    for name, words in dict(run="run can't be written to: have that allowed, or name another --out",
                            new="Read-only file system: ").items():
        assert leave(monkeypatch, train.program, *flags, "--out", mounted / name, "--resume") == 2
        error = capfd.readouterr().err
        assert words in error and str(mounted / name) in error and error.count("\n") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("responses.generate", None)
        assert leave(patch, evaluation.program, "--model", mounted / "whole") == 2
    assert "whole can't be written to: have that allowed, or name another --out" in capfd.readouterr().err
    run_inside(evaluation.program, tmp_path, "--model", mounted / "whole", "--out", "elsewhere")
    assert (tmp_path / "elsewhere" / "eval.json").exists()
