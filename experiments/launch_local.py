"""Run a command as one job of many processes on this machine, and start all of them again when one dies.

Not after a mistake of the user (exit status 2), which would come again.

python -m experiments.launch_local --processes=4 -- python -m experiments.pretrain --config=... --workdir=...

Rank 0 writes to the terminal, every rank to LOGS/ATTEMPT/rank_N.log. SIGTERM and SIGINT go to all ranks.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from dsv3.config import UserError, require
from experiments.children import POLL_SECONDS, Stop, describe, send, start
from experiments.launch import MISTAKE, fail, parse_flags

PROCESSES = flags.DEFINE_integer("processes", None, "how many processes the job has", required=True, lower_bound=1)
MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 3, "starts after a failure, until an attempt lasts --healthy_seconds", lower_bound=0)
HEALTHY_SECONDS = flags.DEFINE_float(
    "healthy_seconds", 600.0, "an attempt that lasted this long made progress: count failures anew", lower_bound=0.0)
BACKOFF_SECONDS = flags.DEFINE_float(
    "backoff_seconds", 1.0, "pause before the first restart; doubles with each, up to a minute", lower_bound=0.0)
GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds", 30.0, "from SIGTERM to SIGKILL, for ranks that are told to stop", lower_bound=0.0)
DEVICES = flags.DEFINE_integer("devices_per_process", None, "CPU devices that each process has", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus_per_process", None, "GPUs that each process sees, its own", lower_bound=1)
LOGS = flags.DEFINE_string("logs", None, "directory where the ranks' output goes; default: a new temporary directory")

LAST_LINES = 12


class Failure(NamedTuple):
    """The rank that failed first, its exit status as `subprocess` gives it, and its output."""

    rank: int
    status: int
    log: Path


def say(text: str) -> None:
    """One line an event."""
    print(f"launch_local: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A port that nobody listens on now. Somebody else may take it first: then the job fails, and gets another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, port: int) -> dict[str, str]:
    """What rank `rank` of the job finds in its environment."""
    coordinator = f"127.0.0.1:{port}"
    environ = os.environ | {
        "DSV3_COORDINATOR": coordinator, "DSV3_NUM_PROCESSES": str(PROCESSES.value), "DSV3_PROCESS_ID": str(rank),
        "JAX_COORDINATOR_BIND_ADDRESS": coordinator, "PYTHONUNBUFFERED": "1"}
    if DEVICES.value is not None:
        others = re.sub(r"--xla_force_host_platform_device_count=\S*", "", environ.get("XLA_FLAGS", ""))
        environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={DEVICES.value}".strip()
    if GPUS.value is not None:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus(rank, GPUS.value, PROCESSES.value, os.environ))
    return environ


def gpus(rank: int, each: int, processes: int, environ) -> list[str]:
    """The GPUs of rank `rank`: its share of CUDA_VISIBLE_DEVICES, or of all if that is not set."""
    needed = each * processes
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(needed)] if visible is None else [n for n in visible.split(",") if n]
    require(len(names) >= needed, f"--gpus_per_process={each} for {processes} processes needs {needed} GPUs, but "
            f"CUDA_VISIBLE_DEVICES={visible} names {len(names)}")
    return names[rank * each:(rank + 1) * each]


class Job:
    """The processes of one attempt, each the leader of a process group. Use as a context manager: none outlives it."""

    def __init__(self, command: Sequence[str], log_dir: Path) -> None:
        log_dir.mkdir(parents=True)
        self.logs = [log_dir / f"rank_{rank}.log" for rank in range(PROCESSES.value)]
        self._ranks: list[subprocess.Popen] = []
        self._shown = 0
        port = free_port()
        for rank, log in enumerate(self.logs):
            try:
                self._ranks.append(start(command, environment(rank, port), log))
            except UserError:
                self.signal(signal.SIGKILL)
                raise

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception: object) -> None:
        self.signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()
        self.show()

    def statuses(self) -> list[int | None]:
        """Exit statuses by rank, None for one that runs."""
        return [rank.poll() for rank in self._ranks]

    def signal(self, number: int) -> None:
        """To every process of every rank."""
        send(number, self._ranks)

    def show(self) -> None:
        """Copy what rank 0 has written since the last call to the terminal."""
        with self.logs[0].open("rb") as file:
            file.seek(self._shown)
            text = file.read()
        self._shown += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    def failure(self) -> Failure | None:
        """Of the ranks that failed so far, the likeliest culprit.

        A rank with a mistake of the user, before one that was killed, before one that fails because its peer is gone,
        before one that JAX aborted for that.
        """
        order = lambda status: (status != MISTAKE, status == -signal.SIGABRT, status > 0)
        failed = [(order(status), rank, status)
                  for rank, status in enumerate(self.statuses()) if status not in (None, 0)]
        if not failed:
            return None
        _, rank, status = min(failed)
        return Failure(rank, status, self.logs[rank])

    def wait(self, seconds: float) -> None:
        """Until all ranks have ended, or so long."""
        end = time.monotonic() + seconds
        while None in self.statuses() and time.monotonic() < end:
            self.show()
            time.sleep(POLL_SECONDS)


def attempt(command: Sequence[str], log_dir: Path, stop: Stop) -> Failure | None:
    """Run the job once, to its end, its first failure, or a signal; None if all ranks ended with status 0."""
    with Job(command, log_dir) as job:
        while job.failure() is None and None in job.statuses() and stop.number is None:
            job.show()
            time.sleep(POLL_SECONDS)
        failure = job.failure()
        if failure is not None:
            say(f"rank {failure.rank} {describe(failure.status)}; stopping the others")
        if None in job.statuses():
            name = signal.Signals(stop.number or signal.SIGTERM).name
            if failure is None:
                say(f"{name}: handed on to all ranks, which have {GRACE_SECONDS.value:g} s to save and end")
            job.signal(stop.number or signal.SIGTERM)
            job.wait(GRACE_SECONDS.value)
            running = [rank for rank, status in enumerate(job.statuses()) if status is None]
            if running:
                say(f"killing rank {', '.join(map(str, running))}, still running {GRACE_SECONDS.value:g} s later")
                job.signal(signal.SIGKILL)
                job.wait(GRACE_SECONDS.value)
        return failure or job.failure()


def supervise(command: Sequence[str], log_dir: Path) -> int:
    """Attempts until one succeeds, `--max_restarts` in a row have failed, or a mistake or a signal ends it.

    Returns the exit status.
    """
    stop, restarts = Stop(), 0
    for number in range(sys.maxsize):
        say(f"starting {PROCESSES.value} processes, output in {log_dir / str(number)}")
        begun = time.monotonic()
        failure = attempt(command, log_dir / str(number), stop)
        if failure is None:
            say("all ranks ended with status 0")
            return 0
        status = 128 - failure.status if failure.status < 0 else failure.status
        if stop.number is not None:
            say(f"not started again after {signal.Signals(stop.number).name}: "
                f"rank {failure.rank} {describe(failure.status)}")
            return status
        if time.monotonic() - begun >= HEALTHY_SECONDS.value:
            restarts = 0
        if failure.status == MISTAKE or restarts == MAX_RESTARTS.value:
            lines = failure.log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
            say("\n    ".join([f"the last lines of rank {failure.rank}:", *lines]))
            reason = "which no restart mends" if failure.status == MISTAKE else f"after {restarts} restarts"
            say(f"rank {failure.rank} {describe(failure.status)}, {reason}; giving up")
            return status
        pause = min(BACKOFF_SECONDS.value * 2**restarts, 60.0)
        restarts += 1
        say(f"restart {restarts} of {MAX_RESTARTS.value} in {pause:g} s")
        stop.sleep(pause)
        if stop.number is not None:
            say(f"not started again after {signal.Signals(stop.number).name}")
            return 128 + stop.number
    raise AssertionError("unreachable")


def main(argv: Sequence[str]) -> None:
    """`argv` as Python gives it: our flags, --, the command."""
    own, command = list(argv), []
    if "--" in own:
        own, command = own[:own.index("--")], own[own.index("--") + 1:]
    try:
        remaining = parse_flags(own)
        require(len(remaining) == 1, f"unexpected argument {remaining[-1]!r}; the command comes after --")
        require(command != [], "there is nothing to run; write: launch_local --processes=N -- python -m ...")
        log_dir = Path(LOGS.value or tempfile.mkdtemp(prefix="launch_local_"))
        log_dir = log_dir / f"{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        status = supervise(command, log_dir)
    except (UserError, OSError) as error:
        fail(error)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv)
