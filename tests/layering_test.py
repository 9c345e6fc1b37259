"""Imports go downward only: the ranks of docs/architecture.md, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = {
    "config": 0, "quant": 1, "kernels": 2, "model": 3, "parallel": 4, "data": 5, "train": 6, "inference": 6,
    "posttrain": 7, "interop": 8, "evaluation": 8, "planner": 8,
}


def imported_modules(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a.b import c` counted as a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(names: set[str]) -> set[str]:
    """The dsv3 packages among them."""
    return {name.split(".")[1] for name in names if name.startswith("dsv3.")}


def violations(root: Path) -> list[str]:
    """Every import of an equal or higher rank of another package, and of anything outside `dsv3` from inside it."""
    found = []
    for path in sorted((root / "dsv3").rglob("*.py")):
        relative = path.relative_to(root)
        if len(relative.parts) < 3:
            continue
        own, names = relative.parts[1], imported_modules(path)
        assert own in RANKS, f"{relative}: package {own!r} has no rank"
        found += [f"{relative} imports dsv3.{other}" for other in sorted(packages(names))
                  if other != own and RANKS[other] >= RANKS[own]]
        found += [f"{relative} imports {name}" for name in sorted(names)
                  if name.split(".")[0] in ("experiments", "configs", "tests")]
    for path in sorted((root / "configs").rglob("*.py")):
        found += [f"{path.relative_to(root)} imports dsv3.{other}" for other in sorted(packages(imported_modules(path)))
                  if other != "config"]
    return found


def test_imports_go_downward():
    assert violations(ROOT) == []


def test_an_upward_import_is_found(tmp_path):
    for name, line in {"dsv3/kernels/a.py": "from dsv3.model import ops", "dsv3/train/b.py": "import dsv3.inference.x",
                       "dsv3/model/c.py": "from dsv3.config import Config", "configs/d.py": "import dsv3.model.ops",
                       "dsv3/data/e.py": "from experiments import launch"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line + "\n")
    assert len(violations(tmp_path)) == 4
