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
import datetime
import difflib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend: `main` prints its one line and leaves with exit code 2."""


# -------------------------------------------------------------------------------- arguments

def option(default, help: str, group: str = "options", choices: tuple | None = None, many: bool = False):
    """A dataclass field that is also a command-line flag, with its help line and its `--help` group.

    many: the flag takes a list, a,b,c, and `parse_all` makes one instance of each.
    """
    return dataclasses.field(default=default,
                             metadata=dict(help=help, group=group, choices=choices, many=many))


def listed(kind: type):
    """The parser of a comma-separated list of `kind`."""
    def values(text: str) -> tuple:
        return tuple(kind(item) for item in text.split(","))

    values.__name__ = kind.__name__  # argparse names it where a value is wrong
    return values


def parse(cls: type, argv: list[str] | None = None, usage: str = ""):
    """Command line -> an instance of the dataclass `cls`, which has no `many` options."""
    return parse_all(cls, argv, usage)[0]


def parse_all(cls: type, argv: list[str] | None = None, usage: str = "") -> list:
    """Command line -> instances of the dataclass `cls`: one for each combination of its `many` options.

    A bool field is a switch; `X | None` reads an X.

    >>> @dataclasses.dataclass
    ... class Args:
    ...     lr: float = option(1e-6, "peak learning rate", many=True)
    >>> parse_all(Args, ["--lr", "5e-7,1e-6"])
    [Args(lr=5e-07), Args(lr=1e-06)]
    >>> parse_all(Args, ["--rl", "5e-7"])
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
        shown = "" if field.default in (None, "", False, ()) else f" (default: {field.default})"
        common = dict(default=field.default, help=(meta["help"] + shown).replace("%", "%%"))
        if field.name == "prompt":  # the only positional argument there is: `python sample.py "..."`
            group.add_argument(field.name, nargs="?", **common)
        elif kind is tuple:
            group.add_argument("--" + field.name.replace("_", "-"), nargs="+", metavar="FOLDER", **common)
        elif kind is bool:
            group.add_argument("--" + field.name.replace("_", "-"), action="store_true", **common)
        else:
            metavar = kind.__name__.upper() + ",..." * meta["many"]
            group.add_argument("--" + field.name.replace("_", "-"),
                               type=listed(kind) if meta["many"] else kind, choices=meta["choices"],
                               metavar=None if meta["choices"] else metavar, **common)
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
    many = [field.name for field in dataclasses.fields(cls) if field.metadata["many"]]
    lists = [v if isinstance(v := getattr(args, name), tuple) else (v,) for name in many]
    return [cls(**vars(args) | dict(zip(many, values, strict=True))) for values in itertools.product(*lists)]


def main(program) -> typing.NoReturn:
    """Run `program()` as a script: a user's mistake, an interrupt or a full disk ends in one clear line."""
    tune_allocator()
    start_processes()
    name = Path(sys.argv[0]).name + (f" (process {rank()})" if rank() else "")
    try:
        program()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(0)
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was sampled is kept", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno is None:
            raise
        told = f"{e.strerror}: {e.filename}" if e.filename else e.strerror
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            told += "; what was written is kept: make room and give the same command again"
        print(f"{name}: error: {told}", file=sys.stderr)
        sys.exit(2)


def tune_allocator() -> None:
    """Keep freed memory in the process, on huge pages (Linux with glibc).

    By default the kernel takes every large tensor's pages back and zeroes them again at each step, 4 KB at a
    time: on a CPU that costs more than the arithmetic of an elementwise operation on them.
    """
    if platform.libc_ver()[0] == "glibc":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # steps seldom repeat their shapes
        libc = ctypes.CDLL(None)
        libc.mallopt(1, 0)  # M_MXFAST: no lists of small blocks to tidy up whenever a large one is freed
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks too from the heap, where they are used again
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back what the heap holds
        libc.malloc.restype = ctypes.c_void_p
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        policy = Path("/proc/sys/vm/overcommit_memory")
        if policy.exists() and policy.read_text().strip() == "2":  # addresses count as memory
            memory = 2**30
        share = memory // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(share))))  # the heap's addresses, all at once
        maps = Path("/proc/self/maps").read_text().splitlines()
        for heap in (line.split()[0].split("-") for line in maps if line.endswith("[heap]")):
            start, end = (int(address, 16) for address in heap)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE


# -------------------------------------------------------------------------------- processes

def start_processes() -> None:
    """Join torchrun's process group, where there are several: NCCL on GPUs, gloo on CPUs. Process 0 speaks.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a process that samples longer than the others keeps them waiting
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(hours=4))
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items: list) -> list:
    """This process's share: the items are dealt out like cards, so that shares are alike."""
    return items[rank() :: world()]


def gather(share: list) -> list:
    """The inverse of `mine`: every process's share in, the whole list in its order out, on every process."""
    if world() == 1:
        return share
    shares: list = [None] * world()
    dist.all_gather_object(shares, share)
    whole: list = [None] * sum(map(len, shares))
    for r, part in enumerate(shares):
        whole[r :: world()] = part
    return whole


# -------------------------------------------------------------------------------- files

def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all: temporary file, fsync, rename. Process 0 alone writes."""
    if rank():
        return
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


def read_grown(path: Path) -> list[dict]:
    """The objects of a file that grows a line at a time; half a last line, if there is one, is cut off it."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return [row for _, row in read_jsonl(path)] if data else []


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


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s that this machine's processes reach together on a large square matrix product, measured here."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best * world()


def peak_memory() -> float:
    """Bytes this process has held at most so far: of GPU memory where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Metrics:
    """metrics.jsonl: one JSON object a step, appended and flushed, so that a killed run keeps what it logged.

    Process 0 alone writes.
    """

    def __init__(self, path: Path):
        self.file = open(os.devnull if rank() else path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def progress(total: int, unit: str, label: str) -> tqdm:
    """A progress bar with rate and ETA on a terminal; a plain line about every tenth of the work elsewhere.
    """
    if sys.stderr.isatty() and not rank():
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
