"""Processes that a test starts: found by the pids that they leave, awaited with a limit, and always ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.launch_local import free_port

ROOT = Path(__file__).parents[1]
HEARTBEAT = 5
QUICK = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
"""To compile, as `conftest.py` has it."""


def environment(**more):
    """Without a launcher's variables and the tests' many devices, with the project on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DSV3_")}
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


@contextlib.contextmanager
def started(command, output, **environ):
    """A running process, leader of its own group, writing to the file `output`; killed on the way out."""
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**environ), stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def job(directory, code, size=4):
    """Ranks that run `code` (a file's arguments, or a program) without a supervisor, and their output's files."""
    port, outputs = free_port(), [directory / f"output_{rank}" for rank in range(size)]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(
            [sys.executable, *code], outputs[rank], DSV3_COORDINATOR=f"127.0.0.1:{port}",
            DSV3_NUM_PROCESSES=str(size), DSV3_PROCESS_ID=str(rank), DSV3_HEARTBEAT_SECONDS=str(HEARTBEAT),
            JAX_COORDINATOR_BIND_ADDRESS=f"127.0.0.1:{port}")) for rank in range(size)], outputs


def launch_local(*arguments, command):
    return [sys.executable, "-m", "experiments.launch_local", *arguments, "--", *command]


def wait_until(condition, seconds, what):
    """The seconds that it took; AssertionError after `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - start


def alive(pid):
    """Whether that process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(directory, count):
    """Of the ranks that left pid_N there, once all have."""
    def complete():
        return all((directory / f"pid_{rank}").exists() and (directory / f"pid_{rank}").read_text()
                   for rank in range(count))
    wait_until(complete, 40, "the ranks start")
    return [int((directory / f"pid_{rank}").read_text()) for rank in range(count)]
