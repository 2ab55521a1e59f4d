"""run.py - what is about running, not about MIPO: arguments, processes, files, progress.

Arguments are one dataclass a script: `option(default, help, group)` declares a field, `parse` turns the class
into a command line whose unknown flags are errors that name the nearest known one. A file appears whole or
not at all, or grows a line at a time (metrics.jsonl).

    python -m doctest run.py           runs the examples below
"""

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import difflib
import errno
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import fast
from console import Output, one_line
from fast import is_out_of_memory


class UserError(Exception):
    """A mistake the user can mend: `main` prints its one line and leaves with exit code 2."""


class Stopped(Exception):
    """A signal has ended the program where it can go on again: its line says how. number: the signal's."""

    def __init__(self, line: str, number: int):
        super().__init__(line)
        self.number = number


# ------------------------------------------------------------------------- arguments

MAX_WHOLE = 2**31 - 1  # of the numbers on a command line


def option(default, help: str, group: str = "options", choices: tuple | None = None, sweep: bool = False,
           positional: bool = False):
    """A dataclass field that is also a command-line flag, with its help line and its `--help` group.

    choices: the values allowed. sweep: the flag takes a list, a,b,c, and `parse_all` makes one instance of
    each. positional: the argument is given without a flag, `python sample.py "..."`, and may be left out.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, choices=choices,
                                                            sweep=sweep, positional=positional))


def parse(cls: type, argv: list[str] | None = None, usage: str = ""):
    """Command line -> an instance of the dataclass `cls`, which has no `sweep` options."""
    return parse_all(cls, argv, usage)[0]


def parse_all(cls: type, argv: list[str] | None = None, usage: str = "") -> list:
    """Command line -> instances of the dataclass `cls`: one for each combination of its `sweep` options.

    A bool field is a switch; a tuple field reads one or more words; `X | None` reads an X. A wrong or unknown
    argument is a UserError. usage: what `--help` prints above the options.

    >>> @dataclasses.dataclass
    ... class Args:
    ...     lr: float = option(1e-6, "peak learning rate", sweep=True)
    >>> parse_all(Args, ["--lr", "5e-7,1e-6"])
    [Args(lr=5e-07), Args(lr=1e-06)]
    >>> parse_all(Args, ["--rl", "5e-7"])
    Traceback (most recent call last):
    run.UserError: unknown argument --rl (did you mean --lr?); --help lists them all
    """
    parser = parser_of(cls, usage)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; --help lists all arguments") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        flags = [flag_of(field) for field in dataclasses.fields(cls)]
        nearest = difflib.get_close_matches(flag, flags, n=1, cutoff=0.65)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise UserError(f"unknown argument {flag}{hint}; --help lists them all")

    values = {}  # field -> its values: several only where a sweep was asked for
    for field in dataclasses.fields(cls):
        value = getattr(args, field.name)
        refuse_wild_numbers(flag_of(field), value if isinstance(value, tuple) else (value,))
        is_list = field.metadata["sweep"] and isinstance(value, tuple)  # a sweep's default is a single value
        values[field.name] = value if is_list else (value,)
    combinations = itertools.product(*values.values())
    return [cls(**dict(zip(values, combination, strict=True))) for combination in combinations]


def refuse_wild_numbers(flag: str, values: tuple) -> None:
    """UserError where a number is nan, infinite, or so large that it can only be a slip."""
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: not a finite number")
        if isinstance(value, int) and abs(value) > MAX_WHOLE:
            raise UserError(f"{flag} {value}: larger than {MAX_WHOLE}, the largest number that is taken")


def parser_of(cls: type, usage: str) -> argparse.ArgumentParser:
    """The command line of a dataclass: what the class itself declares comes before what it inherits."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, exit_on_error=False)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    groups = dict(options=parser)  # argparse has a group of this title for what is given to the parser itself
    names = [name for base in cls.__mro__ for name in inspect.get_annotations(base) if name in fields]
    for name in dict.fromkeys(names):  # once each
        title = fields[name].metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_argument(groups[title], fields[name], hints[name])
    return parser


def flag_of(field: dataclasses.Field) -> str:
    """What a field is called on the command line."""
    return field.name if field.metadata["positional"] else "--" + field.name.replace("_", "-")


def add_argument(group, field: dataclasses.Field, hint) -> None:
    """Add a field to a parser or to a group of its options. hint: the field's type."""
    meta = field.metadata
    default = "" if field.default in (None, "", False, ()) else f" (default: {field.default})"
    text = (meta["help"] + default).replace("%", "%%")  # argparse fills in what follows a %
    kind = next((t for t in typing.get_args(hint) if t is not type(None)), hint)  # X of `X | None`
    if kind is bool:
        settings = dict(action="store_true")
    elif kind is tuple:
        settings = dict(nargs="+", metavar="STR")
    elif meta["choices"]:
        settings = dict(type=kind, choices=meta["choices"])
    elif meta["positional"]:
        settings = dict(type=kind, nargs="?")
    elif meta["sweep"]:
        settings = dict(type=list_of(kind), metavar=kind.__name__.upper() + ",...")
    else:
        settings = dict(type=kind, metavar=kind.__name__.upper())
    group.add_argument(flag_of(field), default=field.default, help=text, **settings)


def list_of(kind: type):
    """The parser of a comma-separated list of `kind`."""
    def parse_list(text: str) -> tuple:
        return tuple(kind(item) for item in text.split(","))

    parse_list.__name__ = kind.__name__  # argparse names it where a value is wrong
    return parse_list


def main(program) -> typing.NoReturn:
    """Run `program()` as a script: a user's mistake, an interrupt, a full disk or too little memory ends in
    one clear line."""
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        code, line = outcome(program)
        if line:
            name = Path(sys.argv[0]).name + (f" (process {rank()})" if rank() else "")
            print(f"{name}: {one_line(line)}", file=sys.stderr)
    sys.exit(code)


def outcome(program) -> tuple[int, str]:
    """Run `program()`: the exit code that it ends with, and the line that it ends in, "" for none."""
    try:
        fast.tune_allocator()
        fast.skip_cudnn_attention()
        start_processes()
        program()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0, ""
    except UserError as e:
        return 2, f"error: {e}"
    except Stopped as e:
        return 128 + e.number, str(e)  # as shells say it
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal has written ^C
        return 130, "interrupted; what was sampled is kept"
    except OSError as e:
        if e.errno is None:
            raise
        file = e.filename2 or e.filename  # of a copy or a new name the second one is written
        message = f"{e.strerror}: {file}" if file else e.strerror
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            message += ("; what was written is kept: make room and give the same command again (train.py: "
                        "with --resume)")
        return 2, f"error: {message}"
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        return 2, ("error: out of memory: lower --slots (sample.py: --samples or --max-new-tokens), or "
                   "--pass-tokens in training, where --checkpoint-activations, --lora-rank 32 and --shard "
                   f"save more ({e})")


# ------------------------------------------------------------------------- processes

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each process, with WORLD_SIZE


def started_by_torchrun() -> bool:
    """Whether this is one of several processes. Some clusters set WORLD_SIZE alone: a line says so, and
    no process is waited for."""
    size = os.environ.get("WORLD_SIZE") or "1"
    missing = [name for name in TORCHRUN if name not in os.environ]
    if size != "1" and missing:
        print(f"WORLD_SIZE={size} is ignored, because {', '.join(missing)} are not set: this is one process; "
              "torchrun starts several", file=sys.stderr)
    return size != "1" and not missing


def start_processes() -> None:
    """Join torchrun's processes, where there are several: NCCL for what GPUs hold, gloo for all else, which
    so never waits for a GPU. Only rank 0 prints."""
    if started_by_torchrun():
        if torch.cuda.is_available():
            gpus, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 0))) > gpus:
                raise UserError(f"more processes than GPUs: torchrun --nproc_per_node {gpus} fills them")
            torch.cuda.set_device(number)
        timeout = datetime.timedelta(hours=4)  # a process that samples longer keeps the others waiting
        store, number, size = next(rendezvous("env://", timeout=timeout))
        # Each start has its own part of torchrun's store: another's holds addresses of dead processes.
        store = dist.PrefixStore(f"start-{restarts()}", store)
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, store=store, rank=number, world_size=size, timeout=timeout)
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def restarts() -> int:
    """How often torchrun --max-restarts has started all processes anew because one had died.

    UserError on several machines, which count each for itself.
    """
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not on_one_machine and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError("torchrun --max-restarts is for the processes of one machine: leave it out, and give "
                        "the same command with --resume when one has died")
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_of(items: list, process: int | None = None) -> list:
    """A process's share, this one's if none is named: the items are dealt out like cards, so that shares are
    alike."""
    return items[rank() if process is None else process :: world()]


def gather(share: list) -> list:
    """The inverse of `share_of`: every process passes its share and gets all items, in their order."""
    if world() == 1:
        return share
    shares: list = [None] * world()
    dist.all_gather_object(shares, share)
    items: list = [None] * sum(map(len, shares))
    for r in range(world()):
        items[r :: world()] = shares[r]
    return items


def broadcast(value):
    """Process 0's value, on every process; what the others pass is ignored."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        dist.barrier()


# ------------------------------------------------------------------------- files

@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of writing inside be OSErrors that name this file, as those of opening one are."""
    try:
        yield
    except SafetensorError as e:
        number = re.search(r"\(os error (\d+)\)", str(e))
        if not number:
            raise UserError(f"{path} could not be written: {e}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    except OSError as e:
        if e.errno is None or e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from None


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all: temporary file, fsync, rename. Process 0 alone writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk has no room for half a file
        raise


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or into a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def parse_json(text: str | bytes):
    """The JSON value in a text. Whatever is wrong with the text is a ValueError that says what."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can hold half a surrogate pair, text cannot
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError:  # Python reads at most 4,300 digits
        raise ValueError("an integer has too many digits") from None


def parse_lines(data: bytes, path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of every non-blank line; anything but an object is a UserError with file:line."""
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as e:
            raise UserError(f"{path}:{number}: not a JSON object: {e}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object but {type(row).__name__}")
        rows.append((number, row))
    return rows


def read_bytes(path: Path) -> bytes:
    """The content of a file; UserError where there is none. Opening a pipe would wait for a writer."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    return path.read_bytes()


def read_json(path: Path):
    """The JSON value in a file; a missing or broken file is a UserError that names it."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of every non-blank line; anything but an object is a UserError with file:line."""
    return parse_lines(read_bytes(path), path)


def read_appended(path: Path) -> list[dict]:
    """The objects of a .jsonl file that grows a line at a time; of a missing file, none.

    A last line that was only partly written is removed from the file, but only from a file that is certainly
    of this kind: its other lines are objects, or its only line begins as an object does. Any other file is a
    UserError and stays as it is.
    """
    data = read_bytes(path) if path.exists() else b""
    end = data.rfind(b"\n") + 1
    rows = [row for _, row in parse_lines(data[:end], path)]
    unfinished = data[end:]
    if not unfinished:
        return rows
    try:
        row = parse_json(unfinished)
    except ValueError:
        row = None
    if isinstance(row, dict):  # only its line end is missing
        with open(path, "ab") as f:
            f.write(b"\n")
        return [*rows, row]
    if not rows and not begins_object(unfinished):
        raise UserError(f"{path} does not hold JSON objects, one a line: name another file")
    os.truncate(path, end)
    return rows


def begins_object(data: bytes) -> bool:
    """Whether the data are the beginning of a JSON object: nothing is wrong with them but that they end."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # without half a character at its end
        parse_json(text)
    except json.JSONDecodeError as e:
        if not text.startswith("{"):
            return False
        if e.msg.startswith("Unterminated string"):
            return True
        rest = text[e.pos :]  # what json could not read
        if e.msg.startswith("Invalid \\uXXXX"):
            return len(rest) < 6
        endings = ("true", "false", "null", "NaN", "-Infinity", ".", "e-", "e+")  # of values and numbers
        return any(ending.startswith(rest) for ending in endings)
    except ValueError:
        return False
    return False


def fingerprint(*parts) -> str:
    """Twelve hex digits that change with any of the JSON-like parts: names run folders and data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def seed_from(*parts) -> int:
    """A 63-bit seed from any tuple of numbers and strings: independent streams, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ------------------------------------------------------------------------- machine and metrics

def environment() -> dict:
    """Versions, git revision, device and threads: what a reader needs to repeat a number."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return dict(python=platform.python_version(), torch=torch.__version__, git=git_revision(),
                device=device, threads=torch.get_num_threads(), time=time.strftime("%Y-%m-%d %H:%M:%S"))


def git_revision() -> str | None:
    """The revision of this code, with -dirty where it was changed; None without git or outside a checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                             capture_output=True, encoding="utf-8", errors="replace", check=False)
    except OSError:  # there is no git, or it can't be started: nothing that should stop a run
        return None
    return git.stdout.strip() or None


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype() -> str:
    """The type that products should run in on this machine: bfloat16 where those are fast, else float32."""
    return "bfloat16" if fast.has_bf16_products(default_device()) else "float32"


def peak_memory() -> float:
    """Bytes this process has held at most so far: of GPU memory where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def progress(total: int, unit: str, label: str) -> tqdm:
    """A progress bar with rate and ETA on a terminal; a line about every tenth of the work elsewhere."""
    if sys.stderr.isatty() and not rank():
        return tqdm(total=total, unit=unit, desc=label, dynamic_ncols=True)
    return Lines(total=total, unit=unit, desc=label)


class Lines(tqdm):
    """tqdm without a terminal: the same figures as whole lines, at most about ten of them."""

    def __init__(self, **options):
        super().__init__(**options, file=io.StringIO(), mininterval=1e9)  # its own bar goes nowhere
        self.printed, self.status = 0.0, ""  # the fraction of the work at the last line; what it ends with

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self.status = s

    def update(self, n: float = 1) -> None:
        super().update(n)
        fraction = self.n / max(self.total, 1)
        if fraction >= self.printed + 0.1 or (self.n >= self.total and self.printed < 1):
            self.printed = fraction
            elapsed = self.format_dict["elapsed"]
            remaining = elapsed / max(self.n, 1) * (self.total - self.n)
            print(f"{self.desc}: {self.n}/{self.total} {self.unit}, {elapsed:.0f} s, "
                  f"{remaining:.0f} s left {self.status}", flush=True)
