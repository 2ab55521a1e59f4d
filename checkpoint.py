"""checkpoint.py - the state of a run on disk, whole or absent, from which it goes on bit for bit.

    RUN/checkpoints/step-0-000200/ tensors.safetensors, state.json, and manifest.json: their sizes and sha256
    RUN/checkpoints/latest.json    which of these is the one to go on from

A checkpoint is written beside its final name, reaches the disk, and is then renamed; so a run that is killed
or fills the disk leaves the earlier one as it was. No random state is kept: the order of pairs, learning
rates, rounding and draws all follow from the seed and the number of the step. A program holds a lock on the
folder that it writes to, so that no other one writes there.
What differs from the paper: nothing; it does not say.

    python train.py --resume      goes on with a run that was interrupted
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from run import (Stopped, UserError, barrier, broadcast, gather, naming, rank, read_json, sync,
                 write_json)
from schema import TEXT, checked, integer, record

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
POINTER = dict(checkpoint=TEXT)  # what latest.json holds
FILE = record(dict(bytes=integer(0, 2**63), sha256=TEXT))  # what manifest.json says of each of the two others


class Checkpoints:
    """The checkpoints of one run folder, of which the newest `keep` are kept. Process 0 alone writes."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = folder / "checkpoints", keep
        self.stop = StopSignal()

    def after_step(self, every: int, tensors: Callable[[], dict[str, Tensor]], state,
                   now: bool = False) -> None:
        """Save every `every` steps, where the caller says `now`, and after a signal; that raises Stopped too.

        state: a dataclass with the candidate and the step among its fields. tensors() gives what is to be
        kept, and may bring `state` up to date; all processes call this after every step.
        """
        signal_number = self.stop.came()
        if signal_number or now or (every and state.step % every == 0):
            kept = tensors()
            self.save(kept, dataclasses.asdict(state))
        if signal_number:
            raise Stopped(f"stopped after step {state.step}, which is saved: the same command with --resume "
                          "goes on from there", signal_number)

    def save(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Write a checkpoint; tensors that are not finite are a UserError, and the earlier one stays.

        state: the run's state as a dict, whose candidate and step name the checkpoint.
        """
        step = state["step"]
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken := broadcast(broken):  # of a sharded run process 0 alone has the tensors
            raise UserError(f"step {step}: {broken[0]} is no longer finite, so nothing was saved: start anew "
                            "with a lower --lr, or with --dtype float32")
        if not rank():
            self.write(f"step-{state['candidate']}-{step:06d}", tensors, state)
        barrier()  # nobody goes on before it is there

    def write(self, name: str, tensors: dict[str, Tensor], state: dict) -> None:
        """The files of one checkpoint, then its name, then the pointer to it."""
        temporary = self.folder / ".new.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            temporary.mkdir(parents=True)
            with naming(self.folder / name / TENSORS):
                save_file(on_cpu, temporary / TENSORS)
            write_json(temporary / STATE, state)
            files = {file: dict(bytes=(temporary / file).stat().st_size, sha256=sha256(temporary / file))
                     for file in (TENSORS, STATE)}
            write_json(temporary / MANIFEST, files)
            for path in (*temporary.iterdir(), temporary):
                sync(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk has no room for half a checkpoint
            raise
        while (self.folder / name).exists():  # of the same step, and perhaps the one to go on from
            name += "-again"
        os.replace(temporary, self.folder / name)
        sync(self.folder)
        write_json(self.folder / "latest.json", dict(checkpoint=name))
        sync(self.folder)  # the pointer is there before what it pointed to is gone
        oldest_first = sorted(self.folder.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
        for old in oldest_first[: -self.keep]:
            if old.name != name:
                shutil.rmtree(old)

    def remove(self) -> None:
        """Remove all checkpoints: a run that is whole needs none."""
        if not rank():
            shutil.rmtree(self.folder, ignore_errors=True)

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors and the state of the latest checkpoint, None where there is none.

        UserError where its files are not, byte for byte, what was written.
        """
        pointer = self.folder / "latest.json"
        if not pointer.exists():
            return None
        folder = self.folder / checked(read_json(pointer), POINTER, str(pointer))["checkpoint"]
        manifest = checked(read_json(folder / MANIFEST), {TENSORS: FILE, STATE: FILE}, str(folder / MANIFEST))
        for name in (TENSORS, STATE):
            file, expected = folder / name, manifest[name]
            if not file.exists():
                raise damaged(file, "is missing")
            if file.stat().st_size != expected["bytes"]:
                raise damaged(file, f"has {file.stat().st_size} bytes, not {expected['bytes']}")
            if sha256(file) != expected["sha256"]:
                raise damaged(file, "is not what was written: its sha256 differs")
        try:
            return load_file(folder / TENSORS), read_json(folder / STATE)
        except SafetensorError as e:
            raise damaged(folder / TENSORS, f"can't be read ({e})") from None


def damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} {what}: remove {file.parent} and name an earlier checkpoint in "
                     f"{file.parent.parent / 'latest.json'}, or start the run anew with another --out")


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder's write lock, which also ends with the process that holds it. A folder that does not
    exist is made, and removed again if nothing was written.

    UserError where another process has it, or nobody may write there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} can't be written to: have that allowed, or name another --out")
    descriptor = os.open(folder, os.O_RDONLY)
    refused = False
    try:
        if not rank():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused = True
        if any(gather([refused])):
            raise UserError(f"{folder}: another run is writing here: wait for it, or name another --out")
        yield
    finally:
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


class StopSignal:
    """Whether SIGTERM or SIGINT has come, to this process or to another one, since it was entered.

    Inside `with`, these signals end nothing: the step that is under way is finished first.
    """

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self.previous = {each: signal.signal(each, self.note) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame) -> None:
        self.number = number

    def __exit__(self, *error) -> None:
        for each, handler in self.previous.items():
            signal.signal(each, handler)

    def came(self) -> int:
        """The number of the signal, alike on every process; 0 where none has come."""
        return max(gather([self.number]))


def refuse_changes(before: dict, now: dict, may_differ: bool) -> None:
    """UserError if a run is resumed with other values than it began with.

    before, now: values by name in two groups: "arguments", which must be equal, and "machine", which may
    differ if the user says so.
    """
    for name in before["arguments"] | now["arguments"]:
        was, given = before["arguments"].get(name), now["arguments"].get(name)
        if was != given:
            raise UserError(f"--resume: the run began with {name} {was!r}, now it is {given!r}: give the "
                            "same command, or start another run with --out")
    for name, was in before["machine"].items():
        found = now["machine"].get(name)
        change = f"the run began with {name} {was!r}, now it is {found!r}"
        if was != found and not may_differ:
            raise UserError(f"--resume: {change}, which would not repeat it bit for bit: go on all the same "
                            "with --resume-elsewhere")
        if was != found:
            print(f"warning: {change}: results will differ in their last bits")
