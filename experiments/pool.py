"""Many commands on the GPUs of one machine: one at a time on each, the next on whichever is free first."""

import glob
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dsv3.config import require
from experiments.children import POLL_SECONDS, Stop, describe, send, start

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Task(NamedTuple):
    """A command; its output is added to the file `log`."""

    name: str
    command: Sequence[str]
    log: Path


def places(count: int, environ: Mapping[str, str], gpus: int) -> list[dict[str, str]]:
    """What the environments of `count` tasks at a time differ in: each sees one of this machine's `gpus` GPUs.

    One of those that CUDA_VISIBLE_DEVICES names, where it is set. Without GPUs, where the variable means nothing, they
    share the CPU. Raises `UserError` for fewer GPUs than tasks.
    """
    visible = environ.get(VISIBLE)
    names = [str(index) for index in range(gpus or count)] if visible is None else [n for n in visible.split(",") if n]
    if not gpus and len(names) < count:
        return [{}] * count
    require(len(names) >= count, f"--jobs={count} needs {count} GPUs, one each, but {len(names)} are "
            f"visible; lower it, or set {VISIBLE}")
    return [{VISIBLE: name} for name in names[:count]]


def gpus_here() -> int:
    """How many NVIDIA GPUs this machine or container has, without starting CUDA, which would take memory of one."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def run_pool(tasks: Sequence[Task], differences: Sequence[Mapping[str, str]]) -> tuple[dict[str, int], bool]:
    """Run all tasks, `len(differences)` at a time: their exit statuses by name, and whether a signal cut this short.

    A task that fails does not end the others. SIGTERM and Ctrl-C begin no more tasks and are handed to those that run,
    as SIGTERM, which they may take their time to obey; a second signal kills them.
    """
    waiting, running, statuses, stop = deque(tasks), {}, {}, Stop()
    told = False
    try:
        with tqdm(total=len(tasks), unit="run", disable=None, dynamic_ncols=True) as bar:
            while running or (waiting and not told):
                for place, difference in enumerate(differences):
                    if place not in running and waiting and not told:
                        task = waiting.popleft()
                        running[place] = task, start(task.command, os.environ | difference, task.log)
                        _say(f"{task.name} started, output in {task.log}")
                for place, (task, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[place]
                        statuses[task.name] = process.returncode
                        bar.update()
                        _say(f"{task.name} {describe(process.returncode)}, {len(statuses)} of {len(tasks)}")
                bar.set_postfix_str(", ".join(task.name for task, _ in running.values()))
                if stop.number and not told:
                    told = True
                    _obey()
                    _say(f"{signal.Signals(stop.number).name}: asked {len(running)} tasks to stop; again to kill them")
                    send(signal.SIGTERM, (process for _, process in running.values()))
                time.sleep(POLL_SECONDS)
    finally:
        _obey()
        send(signal.SIGKILL, (process for _, process in running.values()))
        for _, process in running.values():
            process.wait()
    return statuses, told


def _obey() -> None:
    """Signals end this process again; after a SIGTERM it is Linux that kills its tasks (`die_with`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
