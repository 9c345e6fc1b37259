"""`make` finds a Python that is new enough, or says what to install."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "find-python"


def find(directory: Path) -> subprocess.CompletedProcess:
    """Run the script where `directory` and the system's shell tools are all there is."""
    environment = {"PATH": str(directory), "HOME": str(directory), "PYENV_ROOT": str(directory / "pyenv")}
    return subprocess.run(["/bin/sh", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)


def fake(path: Path, status: int) -> None:
    """A program that answers every question with an exit status."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)


def test_an_old_python_is_passed_over_for_one_of_pyenv(tmp_path):
    fake(tmp_path / "python3", 1)
    fake(tmp_path / "pyenv/versions/3.13.1/bin/python", 0)
    assert find(tmp_path).stdout.strip() == str(tmp_path / "pyenv/versions/3.13.1/bin/python")


def test_the_real_check_accepts_this_python(tmp_path):
    (tmp_path / "python3").symlink_to(sys._base_executable)
    assert find(tmp_path).stdout.strip() == str(tmp_path / "python3")


def test_without_any_it_says_what_to_install(tmp_path):
    fake(tmp_path / "python3", 1)
    process = find(tmp_path)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: no Python 3.12") and process.stderr.count("\n") == 1
