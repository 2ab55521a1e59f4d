"""run.py - what is about running, not about MIPO: arguments, run folders, atomic files, metrics, progress.

Arguments are one dataclass a script: `option(default, help, group)` declares a field, `parse` turns the class
into a command line whose unknown flags are errors that name the nearest known one. A run folder is
runs/<name>/: the resolved arguments in args.json, one JSON object a step in metrics.jsonl. A file appears
whole or not at all.

    python -m doctest run.py           runs the examples below
"""

import argparse
import ctypes
import dataclasses
import difflib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
import typing
from pathlib import Path

import torch
from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend: `main` prints its one line and leaves with exit code 2."""


# -------------------------------------------------------------------------------- arguments

def option(default, help: str, group: str = "options", choices: tuple | None = None):
    """A dataclass field that is also a command-line flag, with its help line and its `--help` group."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, choices=choices))


def parse(cls: type, argv: list[str] | None = None, usage: str = ""):
    """Command line -> an instance of the dataclass `cls`. A bool field is a switch; `X | None` reads an X.

    >>> @dataclasses.dataclass
    ... class Args:
    ...     lr: float = option(1e-6, "peak learning rate")
    >>> parse(Args, ["--lr", "5e-7"])
    Args(lr=5e-07)
    >>> parse(Args, ["--rl", "5e-7"])
    Traceback (most recent call last):
    run.UserError: unknown argument --rl (did you mean --lr?); --help lists them all
    """
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, exit_on_error=False)
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind = next((t for t in typing.get_args(hints[field.name]) if t is not type(None)), hints[field.name])
        shown = "" if field.default in (None, "", False) else f" (default: {field.default})"
        common = dict(default=field.default, help=(meta["help"] + shown).replace("%", "%%"))
        if field.name == "prompt":  # the only positional argument there is: `python sample.py "..."`
            group.add_argument(field.name, nargs="?", **common)
        elif kind is bool:
            group.add_argument("--" + field.name.replace("_", "-"), action="store_true", **common)
        else:
            group.add_argument("--" + field.name.replace("_", "-"), type=kind, choices=meta["choices"],
                               metavar=None if meta["choices"] else kind.__name__.upper(), **common)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; --help lists all arguments") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [s for action in parser._actions for s in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.65)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown argument {flag}{hint}; --help lists them all")
    return cls(**vars(args))


def main(program) -> typing.NoReturn:
    """Run `program()` as a script: a user's mistake, an interrupt or a full disk ends in one clear line."""
    tune_allocator()
    name = Path(sys.argv[0]).name
    try:
        program()
        sys.exit(0)
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno is None:
            raise
        print(f"{name}: error: {e.strerror}: {e.filename or 'no file named'}", file=sys.stderr)
        sys.exit(2)


def tune_allocator() -> None:
    """Keep freed memory in the process (glibc only).

    By default every tensor above 32 MB is a fresh mmap, and the kernel zeroes its pages at each step again:
    on a CPU that costs more than the arithmetic of an elementwise operation on them.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: hardly ever give back


# -------------------------------------------------------------------------------- files

def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path):
    """The JSON value in a file; a missing or broken file is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of every non-blank line; anything but an object is a UserError with file:line."""
    rows = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # JSON can hold half a surrogate pair, text cannot
        except (json.JSONDecodeError, UnicodeError) as e:
            raise UserError(f"{path}:{number}: not a JSON object: {e}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object but a {type(row).__name__}")
        rows.append((number, row))
    return rows


def fingerprint(*parts) -> str:
    """Twelve hex digits that change with any of the JSON-like parts: names run folders and data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def derive(*parts) -> int:
    """A 63-bit seed from any tuple of numbers and strings: independent streams, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# -------------------------------------------------------------------------------- run folder

def environment() -> dict:
    """Versions, git revision, device and threads: what a reader needs to repeat a number."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                         capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return dict(python=platform.python_version(), torch=torch.__version__, git=git.stdout.strip() or None,
                device=device, threads=torch.get_num_threads(), time=time.strftime("%Y-%m-%d %H:%M:%S"))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), platform.machine())


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Metrics:
    """metrics.jsonl: one JSON object a step, appended and flushed, so that a killed run keeps what it logged.
    """

    def __init__(self, path: Path):
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run

    def log(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def progress(total: int, unit: str, label: str) -> tqdm:
    """A progress bar with rate and ETA on a terminal; a plain line about every tenth of the work elsewhere.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, desc=label, dynamic_ncols=True)
    return Lines(total=total, unit=unit, desc=label)


class Lines(tqdm):
    """tqdm without a terminal: the same figures as whole lines, at most about ten of them."""

    def __init__(self, **options):
        super().__init__(**options, file=io.StringIO(), mininterval=1e9)  # its own bar goes nowhere
        self.shown, self.status = 0.0, ""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self.status = s

    def update(self, n: float = 1) -> None:
        super().update(n)
        share = self.n / max(self.total, 1)
        if share >= self.shown + 0.1 or (self.n >= self.total and self.shown < 1):
            self.shown = share
            elapsed = self.format_dict["elapsed"]
            left = elapsed / max(self.n, 1) * (self.total - self.n)
            print(f"{self.desc}: {self.n}/{self.total} {self.unit}, {elapsed:.0f} s, "
                  f"{left:.0f} s left {self.status}", flush=True)
