"""How the project is built: imports run downwards, files are short, plain to read, and named in README.md."""

import ast
import io
import re
import tokenize
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[1]
README, DOCS = ((ROOT / name).read_text() for name in ("README.md", "docs.md"))
ORDER = ("train", "dry_run", "ppo", "rewards", "run_folder", "revise", "selection", "training_log",
         "batches", "eval", "responses", "verdicts", "report", "figures", "measures", "diversity", "pairs",
         "negatives", "contexts", "rows", "data", "formats", "judge", "endpoint", "checks", "sample",
         "tokenizer", "chat_template", "replies", "memory", "losses", "folder", "model", "optimizer", "lora",
         "shard", "config", "checkpoint", "schema", "run", "console", "fast", "gpu_kernels")
METHOD = ("losses", "negatives", "pairs", "batches", "train", "model", "sample")  # from a prompt to a model
FILES = sorted(ROOT.glob("*.py"))
FOLDERS = ("assets", "bench", "results", "tests")
ALL_FILES = FILES + [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
MAX_COLUMNS, MAX_LINES, MAX_NODES = 110, 565, 13
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


def names(paths: list[Path]) -> list[str]:
    """The files as tests are named after them."""
    return [str(path.relative_to(ROOT)) for path in paths]


def imports(file: Path) -> set[str]:
    """The project's own files that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules & set(ORDER)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of all lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """The numbers of all lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def test_every_file_has_its_place():
    """The order in which files stand upon each other names all of them, here and in docs.md."""
    assert {file.stem for file in FILES} == set(ORDER)
    assert f"`{' > '.join(ORDER)}`" in DOCS


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_downwards(name):
    """A file imports only what stands below it, so it can be read with nothing above it in mind."""
    assert imports(ROOT / f"{name}.py") <= set(ORDER[ORDER.index(name) + 1 :])


def test_the_report_needs_no_model():
    """Statistics, tables and figures are made of files that other programs wrote; contexts.py knows how each
    data set is sampled by default."""
    assert imports(ROOT / "report.py") <= {"contexts", "data", "figures", "judge", "measures", "run"}


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_a_file_opens_with_what_it_is(file):
    """Its docstring begins with its name."""
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert docstring and docstring.startswith(f"{file.name} - ")


@pytest.mark.parametrize("file", ALL_FILES, ids=names(ALL_FILES))
def test_no_line_is_too_long(file):
    """Tests, benchmarks and experiments too."""
    lines = file.read_text().splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert long == []


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_no_file_is_too_long(file):
    """Each is read in one sitting."""
    assert len(file.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", METHOD)
def test_code_is_not_dense(name):
    """The path of the method has at most 13 syntax nodes a line of code."""
    source = (ROOT / f"{name}.py").read_text()
    nodes = sum(1 for _ in ast.walk(ast.parse(source)))
    assert nodes / len(code_lines(source)) <= MAX_NODES


def test_readme_names_all_files_and_no_others():
    """Its tree: every program file once, and folders and pages that exist."""
    tree = README.split("## The files, in reading order")[1].split("`train.py --method`")[0]
    entries = re.findall(r"\b\w+\.py\b", tree)
    assert len(entries) == len(set(entries))
    assert set(entries) == {file.name for file in FILES}
    assert [entry for entry in re.findall(r"`(\w+)/`", tree) if not (ROOT / entry).is_dir()] == []


def test_every_mutation_has_its_line():
    """Each line that mutants.py would break stands once in its file."""
    for file, rows in mutants.MUTATIONS.items():
        source = (ROOT / file).read_text()
        assert [old for old, _, _ in rows if source.count(old) != 1] == [], file
