"""One writer a directory: a second is refused, a dead one's lock is free."""

import os
import subprocess
import sys

import pytest

from dsv3.config import UserError
from dsv3.parallel.lock import locked

HOLD = """
import sys
from pathlib import Path
from dsv3.parallel.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_told_who_holds_it(tmp_path):
    with locked(tmp_path):
        with pytest.raises(UserError, match=f"being written by process {os.getpid()} on"):
            with locked(tmp_path):
                raise AssertionError("two writers")
    with locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {child.pid}"):
            with locked(tmp_path):
                raise AssertionError("two writers")
        child.kill()
        child.wait()
        with locked(tmp_path):
            pass
