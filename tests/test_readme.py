"""README.md cannot rot: its commands run to their last line, its line counts are true."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from pairs import DATA
from run import parse_all

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in TEXT.splitlines() if re.match(r"    (pip|python|torchrun) ", line)]
SMALL = {  # what makes a command small; those on given pairs are small already
    "train.py": ["--limit", "12", "--max-new-tokens", "8"], "pairs.py": ["--limit", "12"],
    "eval.py": ["--limit", "12"], "sample.py": ["--max-new-tokens", "8"], "judge.py": [],
}  # fmt: skip
ENDS = {"train.py": "summary.json", "pairs.py": "pairs.json", "eval.py": "eval.json"}
OPTIONS = {"train.py": train.Args}  # of the commands that need the hub: test_datasets.py has a fake one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of what the commands need."""
    target = tmp_path_factory.mktemp("readme")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, target)
    shutil.copytree(ROOT / "assets", target / "assets")
    return target


def test_commands_are_found():
    """Every program is shown, and the first command trains without any argument."""
    assert COMMANDS[0] == "pip install -r requirements.txt && torchrun train.py"
    assert all(any(program in command for command in COMMANDS) for program in SMALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_to_its_end(command, folder):
    """In their order, on the embedded model: exit code 0, and the file that is written last is there."""
    command = command.split("&& ")[-1]
    if "pytest" in command:
        assert command == "python -m pytest"
        return
    argv = shlex.split(command.replace("MODEL", "tiny").replace("JUDGE", "tiny"))
    program = next(word for word in argv if word in SMALL)
    if argv[argv.index("--data") + 1 if "--data" in argv else 0] in DATA:
        assert parse_all(OPTIONS[program], argv[argv.index(program) + 1 :])
        return
    if "--pairs" not in argv:
        argv += [word for flag, value in zip(SMALL[program][::2], SMALL[program][1::2], strict=True)
                 if flag not in argv for word in (flag, value)]
    head = ["-m", "torch.distributed.run"] if argv[0] == "torchrun" else []
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    done = subprocess.run([sys.executable, *head, *argv[1:]], cwd=folder, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"), check=False)
    assert done.returncode == 0, done.stderr
    new = {p.name for p in folder.rglob("*") if before.get(p) != p.stat().st_mtime_ns}
    if "--dry-run" in argv:
        assert "estimate" in done.stdout and not any(name.endswith((".json", ".jsonl")) for name in new)
    elif program in ("sample.py", "judge.py"):
        assert done.stdout.strip()
    elif "--report" in argv:
        assert {"report.md", "report.png"} <= new
    else:
        assert ENDS[program] in new


def test_line_counts_are_true():
    """The table of files names all of them, with as many lines as they have."""
    table = dict(re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", TEXT))
    assert table == {file.name: str(len(file.read_text().splitlines())) for file in ROOT.glob("*.py")}
