"""bad_inputs.py - what the programs say to bad input: the cases of tests/test_bad_input.py, as a table.

    python results/bad_inputs.py          runs those tests; writes bad-inputs.md
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import test_bad_input  # noqa: E402

from report import markdown_row  # noqa: E402
from run import write_atomic  # noqa: E402

LINES: dict[str, str] = {}  # case -> the line that its program ended in


def recorded(function, line_of):
    """The function, which also puts down what its result says under the test that is running."""
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        case = os.environ["PYTEST_CURRENT_TEST"].partition("::test_")[2].rpartition(" ")[0]
        LINES[case] = line_of(result).strip()
        return result

    return wrapper


def program() -> None:
    test_bad_input.refused = recorded(test_bad_input.refused, lambda line: line)
    test_bad_input.run_process = recorded(test_bad_input.run_process, lambda done: done.stderr)
    code = pytest.main(["-q", "-n", "0", str(ROOT / "tests" / "test_bad_input.py")])
    if code:
        sys.exit("a case is not refused as it should be")
    rows = []
    for case, line in LINES.items():
        group, _, name = case.partition("[")
        line = re.sub(rf"{re.escape(tempfile.gettempdir())}\S*?/(?=[\w.]+[: ])", "", line)
        rows.append([group.replace("_", " "), name.removesuffix("]"), line])
    table = [markdown_row(["test", "case", "the line it ends in, with exit code 2"]), "|---|---|---|"]
    table += [markdown_row([cell.replace("|", "\\|").replace("`", "'") for cell in row]) for row in rows]
    write_atomic(ROOT / "results" / "bad-inputs.md", "\n".join(table) + "\n")
    print(f"{len(rows)} cases")


if __name__ == "__main__":
    program()
