"""Every row of docs/paper_map.md names a function and a test that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\|[^|]*\|[^|]*\| `(?P<function>[^`]+)` \| `(?P<test>[^`]+)` \|$")


def definitions(path: Path) -> set[str]:
    """Names of functions and classes at the top of a file; none if it does not exist."""
    if not path.exists():
        return set()
    body = ast.parse(path.read_text()).body
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_row_is_real():
    lines = (ROOT / "docs" / "paper_map.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("| report", "|---"))]
    assert len(rows) > 30
    for line in rows:
        row = ROW.match(line)
        assert row, f"not a row of four cells with code in the last two: {line}"
        function_file, function = row["function"].split(":")
        test_file, test = row["test"].split("::")
        assert function in definitions(ROOT / "dsv3" / function_file), row["function"]
        assert test in definitions(ROOT / "tests" / test_file), row["test"]
