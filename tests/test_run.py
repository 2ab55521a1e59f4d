"""run.py against its contract: command lines, one-line errors, processes, whole files, seeds, wrong calls.

Run as a script under torchrun this file is also the worker of the test with two processes.
"""

import dataclasses
import importlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import run
from run import (UserError, fingerprint, option, parse, parse_all, read_appended, read_json,
                 read_jsonl, seed_from, write_atomic)
from training_log import Metrics

ROOT = Path(__file__).parents[1]
PROGRAMS = ("sample", "judge", "pairs", "train", "eval")


@dataclasses.dataclass
class Args:
    count: int = option(3, "how many", "numbers")
    ratio: float | None = option(None, "which part")
    kind: str = option("first", "one of two", choices=("first", "second"))
    dry_run: bool = option(False, "only pretend")


@dataclasses.dataclass
class Study(Args):
    question: str = option("", "what is asked", positional=True)
    places: tuple = option((), "where it is asked")
    size: int = option(1, "how large", sweep=True)
    hours: float = option(2.5, "how long", sweep=True)


# ------------------------------------------------------------------------------------------- arguments

@pytest.mark.parametrize(("argv", "expected"), [
    ([], Args(3, None, "first", False)),
    (["--count", "7"], Args(count=7)),
    (["--count=-7"], Args(count=-7)),
    (["--ratio", "5e-7"], Args(ratio=5e-7)),
    (["--kind", "second"], Args(kind="second")),
    (["--dry-run"], Args(dry_run=True)),
    (["--dry-run", "--ratio", "2", "--count", "0"], Args(0, 2.0, "first", True)),
])  # fmt: skip
def test_flags_become_fields(argv, expected):
    """An int is read as int, `X | None` as X; a bool field is a switch; underscores are written as dashes."""
    args = parse(Args, argv)
    assert args == expected
    assert [type(v) for v in vars(args).values()] == [type(v) for v in vars(expected).values()]


@pytest.mark.parametrize(("argv", "flag"), [
    (["--count", "many"], "--count"),
    (["--count", "1.5"], "--count"),
    (["--count"], "--count"),
    (["--ratio", "1,5"], "--ratio"),
    (["--dry-run", "--ratio", "half"], "--ratio"),
    (["--kind", "third"], "--kind"),
    (["--kind", "First"], "--kind"),
    (["--dry-run=yes"], "--dry-run"),
])  # fmt: skip
def test_a_wrong_value_names_its_flag(argv, flag):
    """Wrong type, missing value, value outside the choices, value for a switch: always a UserError."""
    with pytest.raises(UserError, match=flag):
        parse(Args, argv)


@pytest.mark.parametrize(("argv", "wrong", "near"), [
    (["--cuont", "7"], "--cuont", "--count"),
    (["--cuont=7"], "--cuont", "--count"),
    (["--count", "7", "--rati", "1"], "--rati", "--ratio"),  # no abbreviations
    (["--dry_run"], "--dry_run", "--dry-run"),
    (["--kinds", "first"], "--kinds", "--kind"),
])  # fmt: skip
def test_an_unknown_flag_names_the_nearest_known_one(argv, wrong, near):
    """Both stand in the message, and the wrong flag's value does not."""
    with pytest.raises(UserError) as e:
        parse(Args, argv)
    assert wrong in str(e.value).split() and near in str(e.value)
    assert "=7" not in str(e.value)


@pytest.mark.parametrize("argv", [["--zzz"], ["stray"], ["--count", "1", "2"]])
def test_what_resembles_no_flag_is_still_an_error(argv):
    """It is named, and no flag is guessed."""
    with pytest.raises(UserError, match=argv[-1]) as e:
        parse(Args, argv)
    assert "--count" not in str(e.value) and "--kind" not in str(e.value)


@pytest.mark.parametrize(("argv", "expected"), [
    ([], Study()),
    (["why?"], Study(question="why?")),
    (["--size", "3", "why?", "--count", "7"], Study(7, question="why?", size=3)),
    (["why?", "--places", "here", "there"], Study(question="why?", places=["here", "there"])),
])  # fmt: skip
def test_a_positional_field_has_no_flag_and_a_tuple_field_takes_several_words(argv, expected):
    """Whatever the fields are called, and wherever on the command line they stand."""
    assert parse(Study, argv) == expected


def test_a_sweep_gives_one_instance_for_each_combination():
    """The last option changes fastest; an option without a list has its one value in all of them."""
    sweep = parse_all(Study, ["--size", "1,2", "--hours", "0.5,4", "--count", "9"])
    assert [(s.size, s.hours, s.count) for s in sweep] == [(1, 0.5, 9), (1, 4.0, 9), (2, 0.5, 9), (2, 4.0, 9)]
    with pytest.raises(UserError, match="--hours"):
        parse_all(Study, ["--hours", "0.5,long"])


def test_help_shows_a_program_s_own_options_before_the_inherited_ones(capsys):
    """In the order in which each class declares them."""
    with pytest.raises(SystemExit):
        parse(Study, ["--help"])
    positional, options = capsys.readouterr().out.split("options:")
    assert "  question" in positional
    order = ["--help", "--places", "--size", "--hours", "--ratio", "--kind", "--dry-run", "numbers:"]
    at = [options.index(name) for name in order]
    assert at == sorted(at)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_field_has_a_help_line(name):
    """Of every program's Args, inherited fields too."""
    fields = dataclasses.fields(importlib.import_module(name).Args)
    assert all(len(f.metadata["help"].strip()) > 3 for f in fields)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_names_every_option(name, monkeypatch, capsys):
    """--help leaves with 0 and shows each flag, followed by its help line."""
    program = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as e:
        run.main(program.program)
    assert e.value.code == 0
    options = capsys.readouterr().out.split("usage:")[1].split()
    for field in dataclasses.fields(program.Args):
        flag = field.name if field.metadata["positional"] else "--" + field.name.replace("_", "-")
        words = field.metadata["help"].split()
        at = [i for i, word in enumerate(options) if word == flag]
        assert any(options[i + j : i + j + len(words)] == words for i in at for j in (1, 2, 4))


# ------------------------------------------------------------------------------------------- main

def leave(program, monkeypatch) -> int:
    """The exit code of main(program), called as tool.py."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/tool.py"])
    with pytest.raises(SystemExit) as e:
        run.main(program)
    return e.value.code


@pytest.mark.parametrize(("error", "code", "words"), [
    (None, 0, []),
    (UserError("--lr is odd"), 2, ["tool.py", "--lr is odd"]),
    (OSError(28, "No space left on device", "big.bin"), 2, ["tool.py", "No space left", "big.bin"]),
])  # fmt: skip
def test_main_ends_in_one_line(error, code, words, monkeypatch, capsys):
    """Nothing on success; a user's error or a full disk is one line on stderr and exit code 2."""
    def program():
        if error:
            raise error

    assert leave(program, monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == len(words[:1])
    assert all(word in captured.err for word in words)


def test_an_interrupt_is_not_a_traceback(monkeypatch, capsys):
    """Ctrl-C: exit code 130, the shell's."""
    def program():
        raise KeyboardInterrupt

    assert leave(program, monkeypatch) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    """main hides mistakes of the user, not those of the program."""
    def program():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.main(program)


WRONG_CALLS = {  # command line -> what stderr has to name
    "train.py --modle x": ["--modle", "--model"],
    "eval.py --model /nowhere --out d": ["/nowhere"],
    "pairs.py --data nothing.jsonl --neg missing --model TINY --out o": ["nothing.jsonl"],
    "sample.py": ["--model"],
}


@pytest.fixture(scope="module")
def wrong_calls(tiny, tmp_path_factory) -> dict:
    """Each of WRONG_CALLS as a process in an empty folder: (exit code, stdout, stderr, files left)."""
    started, ended = {}, {}
    for call in WRONG_CALLS:
        script, *argv = call.replace("TINY", str(tiny)).split()
        folder = tmp_path_factory.mktemp("empty")
        started[call] = folder, subprocess.Popen(
            [sys.executable, ROOT / script, *argv], cwd=folder, stdout=-1, stderr=-1, text=True)
    for call, (folder, process) in started.items():
        out, err = process.communicate()
        ended[call] = process.returncode, out, err, sorted(os.listdir(folder))
    return ended


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_call_ends_in_one_line_and_leaves_nothing(call, wrong_calls):
    """Exit code 2, one line on stderr that names the mistake, no traceback, no runs/ or other folder."""
    code, out, err, left = wrong_calls[call]
    assert code == 2 and left == [] and "Traceback" not in out + err
    assert err.count("\n") == 1 and err.startswith(call.split()[0])
    assert all(word in err for word in WRONG_CALLS[call])


# ------------------------------------------------------------------------------------------- processes

def test_one_process_is_alone():
    """Rank 0 of 1: its share is everything, a broadcast gives the value back, nothing is waited for."""
    items = [1, 2, 3]
    assert (run.rank(), run.world(), run.share_of(items), run.gather(items)) == (0, 1, items, items)
    value = {"a": [None]}
    assert run.broadcast(value) is value
    run.barrier()


def work() -> None:
    """The worker: process 0 comes late to the barrier and leaves a file just before it."""
    folder = Path(sys.argv[1])
    if not run.rank():
        time.sleep(1)
        (folder / "early").touch()
    run.barrier()
    seen = (folder / "early").exists()
    value = run.broadcast({"a": [1, None, "é"]} if not run.rank() else "ignored")
    (folder / f"{run.rank()}.json").write_text(json.dumps([seen, value]))


def test_two_processes_share_what_process_0_has_and_wait_for_each_other(tmp_path):
    """Both get the value that process 0 passed, and neither passes the barrier before the other comes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               f"--master_port={free_port()}", __file__, tmp_path]
    subprocess.run(command, check=True, capture_output=True,
                   env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    for process in range(2):
        assert read_json(tmp_path / f"{process}.json") == [True, {"a": [1, None, "é"]}]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------------- environment

def test_without_git_there_is_no_revision(tmp_path, monkeypatch):
    """No git on PATH, or one that can't be started, is `git: None` and stops nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.environment()["git"] is None
    (tmp_path / "git").write_text("not a program")
    (tmp_path / "git").chmod(0o755)
    assert run.environment()["git"] is None


@pytest.mark.parametrize("text", [b"model name\n", b"model name\t: \xff\xfe\n", b"", None])
def test_an_odd_cpuinfo_does_no_harm(text, tmp_path, monkeypatch):
    """A line without a colon, bytes that are no text, an empty file, no file at all: a name all the same."""
    class Elsewhere(type(Path())):
        def __new__(cls, *parts):
            return Path(tmp_path / "cpuinfo") if parts == ("/proc/cpuinfo",) else Path(*parts)

    if text is not None:
        (tmp_path / "cpuinfo").write_bytes(text)
    monkeypatch.setattr(run, "Path", Elsewhere)
    assert isinstance(run.cpu_name(), str)
    if not text:
        assert run.cpu_name() == platform.machine()


# ------------------------------------------------------------------------------------------- files

def test_write_atomic_writes_utf8_and_leaves_nothing_beside_it(tmp_path):
    """The text as it is, old content replaced, no temporary file."""
    for text in ("old", "naïve 😊\n\n", ""):
        write_atomic(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(broken, tmp_path, monkeypatch):
    """Whole or not at all: before the rename nothing of the new text can be seen."""
    def fail(*_):
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, broken, fail)
    for name in ("a.txt", "b.txt"):
        with pytest.raises(OSError, match="No space"):
            write_atomic(tmp_path / name, "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert not (tmp_path / "b.txt").exists()


def test_rows_that_fail_half_way_leave_the_old_file(tmp_path):
    """write_jsonl of a generator that raises after its first row."""
    def rows():
        yield {"a": 1}
        raise ValueError("half way")

    run.write_jsonl(tmp_path / "a.jsonl", [{"old": "é"}])
    with pytest.raises(ValueError, match="half way"):
        run.write_jsonl(tmp_path / "a.jsonl", rows())
    assert read_jsonl(tmp_path / "a.jsonl") == [(1, {"old": "é"})]


def test_read_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    """Line numbers are the file's; CRLF ends a line, U+2028 inside a text does not."""
    (tmp_path / "a.jsonl").write_bytes('\n{"a": 1}\r\n \t\n{"a": "x\u2028y"}\n\n{"a": 3}'.encode())
    assert read_jsonl(tmp_path / "a.jsonl") == [(2, {"a": 1}), (4, {"a": "x\u2028y"}), (6, {"a": 3})]


@pytest.mark.parametrize("line", [
    b"{oops", b'{"a": 1} {"a": 2}', b"[1]", b'"text"', b"null", b'{"a": "\xff"}',
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a": ' + b"9" * 5000 + b"}", rb'{"a": "\ud800"}',
], ids=["broken", "two", "list", "string", "null", "no text", "deep", "long integer", "half a character"])
def test_read_jsonl_errors_carry_file_and_line(line, tmp_path):
    """Broken JSON, two values on a line, anything but an object, bytes that are not UTF-8; nesting without
    end, an integer longer than Python reads, half a surrogate pair."""
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3\b"):
        read_jsonl(tmp_path / "a.jsonl")


@pytest.mark.parametrize("reader", [read_json, read_jsonl])
def test_a_missing_file_is_named(reader, tmp_path):
    """A UserError, not a FileNotFoundError."""
    with pytest.raises(UserError, match=r"none\.json"):
        reader(tmp_path / "none.json")


def test_read_json_names_a_broken_file(tmp_path):
    """Half a JSON file is a UserError."""
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(("text", "words"), [
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"), ("9" * 5000, "too many digits"),
], ids=["deep", "long integer"])  # fmt: skip
def test_json_that_python_cannot_read_is_one_clear_line(text, words, tmp_path):
    """Nesting without end, an integer of more than 4,300 digits: the message says so in plain words."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words) as e:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


ROWS = [{"key": "é\n\"\\", "deep": {"a": [1, -2.5e-7, True, False, None, {}]}},
        {"text": "\u2028😀\x01", "n": 1.5}]


@pytest.mark.parametrize("ascii", [True, False])
def test_an_interrupted_line_is_removed_wherever_it_was_cut(ascii, tmp_path):
    """Every prefix of a file of two rows: the whole rows are read, and a row appended then is read too."""
    text = "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in ROWS).encode()
    first = text.index(b"\n")
    for end in range(len(text) + 1):
        (tmp_path / "a.jsonl").write_bytes(text[:end])
        whole = (end >= first) + (end >= len(text) - 1)  # all but its line end is a whole row
        assert read_appended(tmp_path / "a.jsonl") == ROWS[:whole]
        Metrics(tmp_path / "a.jsonl", whole).log(end=end)
        assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == [*ROWS[:whole], dict(end=end)]


@pytest.mark.parametrize("data", [
    b"hello", b"a note of two words", b"[1, 2", b'"text', b"12", b"{oops", b"{'a': 1", b'{"a" 1',
    b'{"a": yes', b'{"a": 1} and more', b'{"a": "\xff"', b"\x00\x00\x00", b'{"a": \x00',
    b"first\nsecond", b"first\n", b"[1]\n[2", b'{"a": 1}\nsecond\n{"a"', b'{"a": 1}\n\xff\xfe\n{"a": 2',
    b"[" * 100_000, b'{"a":' * 100_000,
], ids=range(20))  # fmt: skip
def test_a_file_of_another_kind_is_refused_untouched(data, tmp_path):
    """Whether its last line ends or not; a user's own notes named by mistake are not shortened."""
    (tmp_path / "notes.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"notes\.txt"):
        read_appended(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_bytes() == data


def test_a_missing_file_has_no_rows(tmp_path):
    """It is about to grow; an empty one too."""
    assert read_appended(tmp_path / "a.jsonl") == []
    (tmp_path / "a.jsonl").touch()
    assert read_appended(tmp_path / "a.jsonl") == []


# ------------------------------------------------------------------------------------------- seeds

def test_seeds_and_fingerprints_never_change():
    """Recorded values: another process, machine or version that differs would move every split and draw."""
    assert seed_from("split", 0, "What is inflation?") == 8295766656888357653
    assert seed_from(0, 1, 2) == 8462395873746552714
    assert fingerprint({"b": 1, "a": [2.5, None]}, "x") == "ba5b6efc7839"


def test_seeds_are_spread_over_63_bits():
    """Neighbouring parts give distinct values with the mean, the bits and the last digits of uniform ones."""
    values = np.array([seed_from(seed, row, s) for seed in range(5) for row in range(1000) for s in range(2)])
    assert len(set(values.tolist())) == 10_000
    assert values.min() >= 0 and values.max() < 2**63
    assert abs(values.mean() / 2**63 - 0.5) < 4 / np.sqrt(12 * 10_000)
    ones = [((values >> bit) & 1).mean() for bit in range(63)]
    assert np.abs(np.array(ones) - 0.5).max() < 0.025  # 5 standard deviations
    digits = np.bincount(values % 10, minlength=10)
    assert ((digits - 1000) ** 2 / 1000).sum() < 33.7  # chi-square of 9 degrees, p = 1e-4


@pytest.mark.parametrize(("a", "b"), [
    ((1, 23), (12, 3)), ((1,), ("1",)), ((1, 2), (2, 1)), (("a",), ("a", "")),
])  # fmt: skip
def test_seeds_and_fingerprints_tell_parts_apart(a, b):
    """The parts are a tuple, not a text run together."""
    assert seed_from(*a) != seed_from(*b)
    assert fingerprint(*a) != fingerprint(*b)


def test_fingerprint_is_twelve_hex_digits_of_the_values():
    """The order in which a dict was filled does not matter, every value in it does."""
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    prints = {fingerprint({"a": i, "b": j}) for i in range(30) for j in range(30)}
    assert len(prints) == 900
    assert all(len(p) == 12 and set(p) <= set("0123456789abcdef") for p in prints)


# ------------------------------------------------------------------------------------------- metrics

def test_metrics_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    """One JSON object a line, readable while the file is open; a second one keeps the rows it is told."""
    first = Metrics(tmp_path / "m.jsonl")
    for step in range(3):
        first.log(step=step, loss=step / 2)
        lines = (tmp_path / "m.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [dict(step=i, loss=i / 2) for i in range(step + 1)]
    Metrics(tmp_path / "m.jsonl", rows=2).log(step=9)
    assert [row["step"] for _, row in read_jsonl(tmp_path / "m.jsonl")] == [0, 1, 9]


def test_progress_without_a_terminal_is_about_ten_lines(capsys):
    """A log file gets a line a tenth of the work, the last one at its end."""
    bar = run.progress(1000, "pairs", "training")
    for _ in range(1000):
        bar.update(1)
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert 9 <= len(lines) <= 11
    assert "1000/1000 pairs" in lines[-1] and all("training" in line for line in lines)


if __name__ == "__main__":
    run.main(work)
