"""README.md and docs.md cannot rot: their commands run to the end, what they name exists."""

import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import DATA
from run import parse_all

ROOT = Path(__file__).parents[1]
README, DOCS = ((ROOT / name).read_text() for name in ("README.md", "docs.md"))
COMMANDS = [line.strip() for text in (README, DOCS) for line in text.splitlines()
            if re.match(r"    (pip|python|torchrun) ", line)]
SMALL = {  # what makes a command small; those on given pairs are small already
    "train.py": {"--limit": "12", "--max-new-tokens": "8"}, "pairs.py": {"--limit": "12"},
    "eval.py": {"--limit": "12"}, "sample.py": {"--max-new-tokens": "8"}, "judge.py": {},
}  # fmt: skip
LAST_FILE = {"train.py": "summary.json", "pairs.py": "pairs.json", "eval.py": "eval.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of what the commands need."""
    target = tmp_path_factory.mktemp("readme")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, target)
    shutil.copytree(ROOT / "assets", target / "assets")
    return target


def arguments_of(program: str) -> type:
    """The dataclass of a program's arguments."""
    return importlib.import_module(program.removesuffix(".py")).Args


def test_every_program_is_shown():
    """The first command of the README trains without any argument."""
    assert COMMANDS[0] == "pip install -r requirements.txt && torchrun train.py"
    assert all(any(program in command for command in COMMANDS) for program in SMALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_to_its_end(command, folder):
    """In their order, on the embedded model: exit code 0, and the file that is written last is there.

    Of commands that need the hub or many GPUs the arguments are parsed: test_datasets.py has a hub of its
    own, test_shard.py several processes.
    """
    command = command.split("&& ")[-1]
    if "pytest" in command:
        on_gpu = " --gpu tests/test_gpu.py tests/test_gpu_kernels.py"
        assert command.removesuffix(on_gpu) == "python -m pytest"
        return
    argv = shlex.split(command.replace("MODEL", "tiny").replace("JUDGE", "tiny"))
    program = next(word for word in argv if word in SMALL)
    needs_hub = "--data" in argv and argv[argv.index("--data") + 1] in DATA
    if needs_hub or "--shard" in argv:
        assert parse_all(arguments_of(program), argv[argv.index(program) + 1 :])
        return
    if "--pairs" not in argv:
        for flag, value in SMALL[program].items():
            argv += [] if flag in argv else [flag, value]
    module = ["-m", "torch.distributed.run"] if argv[0] == "torchrun" else []
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    done = subprocess.run([sys.executable, *module, *argv[1:]], cwd=folder, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"), check=False)
    assert done.returncode == 0, done.stderr
    written = {p.name for p in folder.rglob("*") if before.get(p) != p.stat().st_mtime_ns}
    if "--dry-run" in argv:
        assert "estimate" in done.stdout
        assert not any(name.endswith((".json", ".jsonl")) for name in written)
    elif program in ("sample.py", "judge.py"):
        assert done.stdout.strip()
    elif "--resume" in argv:  # of a run that an earlier command has finished
        assert "training is done" in done.stdout
    elif "--report" in argv:
        assert {"report.md", "report.png"} <= written
    else:
        assert LAST_FILE[program] in written


@pytest.mark.parametrize("text", [README, DOCS], ids=["README.md", "docs.md"])
def test_every_option_that_is_named_exists(text):
    """Outside the commands, which are run: some program has the option."""
    fields = [field.name for program in SMALL for field in dataclasses.fields(arguments_of(program))]
    flags = {"--" + name.replace("_", "-") for name in fields}
    flags |= {"--help", "--nproc_per_node", "--max-restarts", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
              "--shutdown-timeout"}
    flags |= {"--gpu", "--at-once", "--port"}  # of pytest here, and of programs in results/
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z_-]*", text))
    assert named and named <= flags


def test_every_function_of_the_table_exists():
    """Where docs.md says which part of the paper is found where."""
    rows = re.findall(r"^\| .+ \| (.*\w\.py, `.*) \|$", DOCS, re.M)
    assert len(rows) >= 8
    for row in rows:
        for file, names in re.findall(r"(\w+)\.py, (`[^;]*`)", row):
            module = importlib.import_module(file)
            missing = [name for name in re.findall(r"`(\w+)`", names) if not hasattr(module, name)]
            assert not missing, f"{file}.py has no {missing}"


@pytest.mark.parametrize("text", [README, DOCS], ids=["README.md", "docs.md"])
def test_every_link_leads_somewhere(text):
    """To a file of the project, or to a heading of one."""
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, heading = target.partition("#")
        if not target.startswith("https://"):
            assert (ROOT / file).exists(), target
        if heading:
            lines = (ROOT / file).read_text().splitlines() if file else text.splitlines()
            titles = [re.sub(r"[^\w -]", "", line).strip() for line in lines if line[:1] == "#"]
            headings = {title.lower().replace(" ", "-") for title in titles}  # as GitHub makes them
            assert heading in headings, target
