"""Processes that a program starts and answers for: each leads a group of its own, and none outlives the program."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsv3.config import UserError

POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when `parent` dies: nobody else would stop an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)


def start(command: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen:
    """A process whose output is added to `log`. Raises `UserError` for a command that cannot be started."""
    parent = os.getpid()
    with log.open("ab") as output:
        try:
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=lambda: die_with(parent))
        except OSError as error:
            raise UserError(f"cannot start {command[0]!r}: {error.strerror}") from error


def send(number: int, processes: Iterable[subprocess.Popen]) -> None:
    """A signal to every process of their groups."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def describe(status: int) -> str:
    """An exit status in words: 'exited with status 3', 'was killed by SIGKILL'."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


class Stop:
    """SIGTERM and SIGINT, noted instead of obeyed: `number` is the last one, None so far."""

    def __init__(self) -> None:
        self.number: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.number = number

    def sleep(self, seconds: float) -> None:
        """So long, or until a signal."""
        end = time.monotonic() + seconds
        while self.number is None and time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, seconds))
