"""Sampling of pairs that is interrupted, continued and shared by processes.

Oracle: the bytes of an uninterrupted run.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import record_samples, run_inside, run_processes, stopping_model

import pairs
import train
from pairs import load_pairs
from run import UserError, read_json, write_json, write_jsonl

ROWS = 10


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A tiny model, some of whose responses end early."""
    return stopping_model(tiny, tmp_path_factory.mktemp("stopping"))


@pytest.fixture
def flags(folder, tmp_path) -> list:
    """What all commands here begin with: ten rows, and the tiny model."""
    rows = [dict(prompt=f"naïve {i} 😊", context=f"c{i % 3}", split="train") for i in range(ROWS)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    return ["--data", "a.jsonl", "--model", folder, "--max-new-tokens", "6", "--slots", "4",
            "--dtype", "float32"]


@pytest.fixture
def call(flags, tmp_path):
    """(flags) -> the folder of pairs.py's pairs (or another program's)."""
    def get(*more: str, out: str = "o", program=pairs.program) -> Path:
        run_inside(program, tmp_path, *flags, "--out", out, *more)
        return tmp_path / out

    return get


def interrupt_after(monkeypatch, count: int) -> list[tuple[int, int]]:
    """Ctrl-C as so many responses have ended."""
    def stop(i, sample) -> None:
        if len(keys) == count:
            raise KeyboardInterrupt

    keys = record_samples(monkeypatch, stop)
    return keys


def statistics_of(folder: Path) -> dict:
    """pairs.json's statistics without clock readings, and how many pairs these leave out."""
    statistics = read_json(folder / "pairs.json")["statistics"]
    return {key: value for key, value in statistics.items()
            if not key.startswith("seconds") and key != "sampled_before"}


def assert_same_files(folder: Path, other: Path, unknown: tuple[str, ...] = ()) -> None:
    """The same pairs to the last byte, the same statistics but for `unknown` ones, and no other file."""
    assert (folder / "pairs.jsonl").read_bytes() == (other / "pairs.jsonl").read_bytes()
    ours, theirs = statistics_of(folder), statistics_of(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == theirs[key] for key in ours if key not in unknown)
    assert sorted(file.name for file in folder.iterdir()) == ["pairs.json", "pairs.jsonl"]


# ------------------------------------------------------------------------- one process

@pytest.mark.parametrize("program", [pairs.program, train.program], ids=["pairs", "train"])
@pytest.mark.parametrize(("row", "flag", "named"), [
    ({"prompt": "p"}, ["--neg", "missing"], "--neg missing"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, ["--n-neg", "2"], "--n-neg"),
    ({"prompt": "p", "context": "c"}, ["--n-neg", "-1"], "--n-neg"),
])  # fmt: skip
def test_what_cannot_be_leaves_no_folder(row, flag, named, program, call, tmp_path):
    """missing without contexts, several negatives of ready pairs, fewer than none: UserErrors by name."""
    rows = [row | dict(prompt=f"p{i}", split="train") for i in range(4)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=named):
        call(*flag, program=program)
    assert not (tmp_path / "o").exists()


def test_pairs_jsonl_grows_by_whole_rows(call, tmp_path, monkeypatch):
    """At every moment it holds exactly the rows all of whose responses have ended, one whole line each."""
    counts = []

    def look(i, sample) -> None:
        text = (tmp_path / "o" / "pairs.jsonl").read_text(encoding="utf-8")
        assert text == "" or text.endswith("\n")
        written = {json.loads(line)["id"] for line in text.splitlines()}
        responses = Counter(row for row, _ in keys)
        assert written == {str(row + 1) for row, count in responses.items() if count >= 3}
        counts.append(len(written))

    keys = record_samples(monkeypatch, look)
    call("--n-neg", "2")
    assert counts[0] == 0 and counts[-1] == ROWS and len(set(counts)) > 4


NEGATIVES = [["--n-neg", "2"], ["--neg", "random"], ["--neg", "reshuffle", "--n-neg", "2"],
             ["--neg", "noise"]]


def chosen_rows(keys: list[tuple[int, int]]) -> set[int]:
    """The rows whose chosen response was sampled: rejected ones of whole rows may be drawn again."""
    return {row for row, k in keys if k == 0}


def rows_in(file: Path) -> set[int]:
    """The rows of whole objects in a file, whether the last one has a line end or not."""
    rows = set()
    for line in file.read_bytes().split(b"\n"):
        if line.endswith(b"}"):
            rows.add(int(json.loads(line)["id"]) - 1)
    return rows


@pytest.mark.parametrize(("flags_of_negatives", "cut"), list(zip(NEGATIVES, [60, 0, 400, 1], strict=True)))
def test_interrupted_sampling_continues(flags_of_negatives, cut, call, tmp_path, monkeypatch):
    """Twice stopped, its last line torn by `cut` bytes (1: just the line end): whole rows are not sampled
    again, and the files are those of an uninterrupted run."""
    keys = record_samples(monkeypatch)
    whole = call(*flags_of_negatives, out="whole")
    file, total = tmp_path / "o" / "pairs.jsonl", len(keys)
    for count in (total * 8 // 10, 1):
        interrupt_after(monkeypatch, count)
        with pytest.raises(KeyboardInterrupt):
            call(*flags_of_negatives)
        with pytest.raises(UserError, match="is incomplete"):
            load_pairs(tmp_path / "o")
        text = file.read_bytes()
        file.write_bytes(text[: max(0, len(text) - cut)])
        done = rows_in(file)
    assert len(done) < ROWS and (done or cut)
    keys = record_samples(monkeypatch)
    call(*flags_of_negatives)
    assert chosen_rows(keys) == set(range(ROWS)) - done and len(set(keys)) == len(keys)
    assert_same_files(tmp_path / "o", whole)


@pytest.mark.parametrize("flags_of_negatives", NEGATIVES, ids=lambda flags: flags[1])
def test_a_run_that_ends_between_its_two_files_continues(flags_of_negatives, call, tmp_path, monkeypatch):
    """pairs.jsonl is complete and pairs.json not yet: the same command gives the same files and figures."""
    whole = call(*flags_of_negatives, out="whole")

    def stop(path, value) -> None:
        if value["statistics"] is not None:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(pairs, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        call(*flags_of_negatives)
    monkeypatch.setattr(pairs, "write_json", write_json)
    call(*flags_of_negatives)
    assert_same_files(tmp_path / "o", whole, unknown=("redrawn",))  # pairs.jsonl holds the good draws only


def test_half_sampled_pairs_refuse_other_arguments(call, tmp_path, monkeypatch):
    """Each by its name, nothing sampled, the folder as it was; slots may change."""
    interrupt_after(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        call("--n-neg", "2")
    before = {file.name: file.read_bytes() for file in (tmp_path / "o").iterdir()}
    keys = record_samples(monkeypatch)
    changes = [(["--seed", "1"], "seed"), (["--neg", "random"], "neg"), (["--n-neg", "1"], "n_neg"),
               (["--top-p", "0.5"], "sampling"), (["--limit", "9"], "examples|fingerprint")]
    for changed, name in changes:
        with pytest.raises(UserError, match=rf"made with \w*({name})\b"):
            call("--n-neg", "2", *changed)
    assert {file.name: file.read_bytes() for file in (tmp_path / "o").iterdir()} == before and not keys
    call("--n-neg", "2", "--slots", "3")
    assert len(load_pairs(tmp_path / "o")) > 5


def test_one_process_continues_what_two_began(call, tmp_path, monkeypatch):
    """Rows of both files are kept, half a last line is not; in the end there is pairs.jsonl alone."""
    whole, out = call("--n-neg", "2", out="whole"), tmp_path / "o"
    text = (whole / "pairs.jsonl").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    out.mkdir()
    settings = read_json(whole / "pairs.json")["settings"]
    write_json(out / "pairs.json", dict(settings=settings, statistics=None))
    (out / "pairs.jsonl").write_text(lines[0] + lines[4] + lines[2][:-9], encoding="utf-8")
    (out / "pairs.jsonl.process-1").write_text(lines[1] + lines[3] + lines[5][:50], encoding="utf-8")
    keys = record_samples(monkeypatch)
    call("--n-neg", "2")
    kept = {int(json.loads(lines[i])["id"]) - 1 for i in (0, 1, 3, 4)}
    assert chosen_rows(keys) == set(range(ROWS)) - kept
    assert_same_files(out, whole)


def test_the_same_seed_gives_the_same_bytes(call):
    """Two runs; those of another seed are other pairs."""
    files = [(call(*more, out=out) / "pairs.jsonl").read_bytes()
             for out, *more in (["a"], ["b"], ["c", "--seed", "1"])]
    assert files[0] == files[1] != files[2]


# ------------------------------------------------------------------------- several processes

def test_four_processes_write_the_pairs_of_one(call, flags, tmp_path):
    """The same rows in fp32, gains up to rounding, no files but pairs.jsonl and pairs.json."""
    negatives = ["--neg", "random", "--n-neg", "2"]
    alone = load_pairs(call(*negatives))
    done = run_processes(4, "pairs.py", *flags, "--out", "four", *negatives, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    together = load_pairs(tmp_path / "four")
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.responses, other.responses, strict=True):
            assert b.gain == pytest.approx(a.gain, abs=1e-4)
            b.gain = a.gain
        assert one == other
    assert sorted(file.name for file in (tmp_path / "four").iterdir()) == ["pairs.json", "pairs.jsonl"]
