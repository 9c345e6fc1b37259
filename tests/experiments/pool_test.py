"""Many commands at a time with real processes: places, failures, signals, and no orphans."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, alive, environment, started, wait_until

from dsv3.config import UserError
from experiments.children import Stop
from experiments.pool import VISIBLE, Task, places, run_pool

DRIVER = """
import json, sys
from pathlib import Path
from experiments.pool import Task, run_pool
directory, code, count, jobs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tasks = [Task(f"task_{i}", [sys.executable, "-c", code, str(i)], directory / f"log_{i}") for i in range(count)]
print(json.dumps(run_pool(tasks, [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(jobs)])))
"""
PID = "import os, sys, time; from pathlib import Path\n" \
    "Path(os.environ['HERE'], f'pid_{sys.argv[1]}').write_text(str(os.getpid()))\n"
OBEYS, IGNORES = "", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def command(directory, code, count, jobs):
    return [sys.executable, "-c", DRIVER, str(directory), code, str(count), str(jobs)]


def finished(directory, code, count, jobs):
    run = subprocess.run(command(directory, code, count, jobs), cwd=ROOT, env=environment(HERE=str(directory)),
                         capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stderr
    return *json.loads(run.stdout), run.stderr


def test_every_place_holds_one_task_at_a_time_and_all_are_run(tmp_path):
    """A place is claimed by creating a file; a second task there at the same time would find it."""
    code = PID + ("place = Path(os.environ['HERE'], 'place_' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
                  "place.touch(exist_ok=False)\n"
                  "time.sleep(0.2); place.unlink(); print('at', place.name)")
    statuses, stopped, said = finished(tmp_path, code, count=7, jobs=3)
    assert statuses == {f"task_{i}": 0 for i in range(7)} and not stopped
    assert {(tmp_path / f"log_{i}").read_text() for i in range(7)} == {f"at place_{n}\n" for n in range(3)}
    assert "task_6 started, output in" in said and ", 7 of 7" in said


def test_a_task_that_fails_does_not_end_the_others(tmp_path):
    code = "import os, sys; i = sys.argv[1]\nif i == '1': sys.exit('no such disk')\nif i == '2': os.abort()\nprint(i)"
    (tmp_path / "log_0").write_text("earlier\n")
    statuses, stopped, _ = finished(tmp_path, code, count=4, jobs=2)
    assert statuses == {"task_0": 0, "task_1": 1, "task_2": -signal.SIGABRT, "task_3": 0} and not stopped
    assert (tmp_path / "log_0").read_text() == "earlier\n0\n" and "no such disk" in (tmp_path / "log_1").read_text()


def pids(directory, count):
    files = [directory / f"pid_{i}" for i in range(count)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), 30, "tasks start")
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_task_and_begins_no_other(tmp_path, number):
    with started(command(tmp_path, PID + "time.sleep(60)", 5, 2), tmp_path / "output", HERE=str(tmp_path)) as pool:
        running = pids(tmp_path, 2)
        os.kill(pool.pid, number)
        assert pool.wait(20) == 0
        assert not any(map(alive, running)) and not (tmp_path / "pid_2").exists()
    statuses, stopped = json.loads((tmp_path / "output").read_text().splitlines()[-1])
    assert statuses == {"task_0": -signal.SIGTERM, "task_1": -signal.SIGTERM} and stopped


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended through Linux's PDEATHSIG")
@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (None, signal.SIGKILL)])
def test_no_task_outlives_a_pool_that_is_killed(tmp_path, first, second):
    """By a second signal, where tasks are still busy with the first, or outright."""
    with started(command(tmp_path, IGNORES + PID + "time.sleep(60)", 2, 2), tmp_path / "output",
                 HERE=str(tmp_path)) as pool:
        running = pids(tmp_path, 2)
        if first:
            os.kill(pool.pid, first)
            wait_until(lambda: "again to kill" in (tmp_path / "output").read_text(), 10, "the first is noted")
            assert all(map(alive, running))
        os.kill(pool.pid, second)
        assert pool.wait(10) != 0
        wait_until(lambda: not any(map(alive, running)), 5, "tasks end")


def test_signals_are_obeyed_again_afterwards(tmp_path):
    Stop()
    assert run_pool([], [{}]) == ({}, False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_that_cannot_be_started_is_an_error(tmp_path):
    with pytest.raises(UserError, match="/no/such/program"):
        run_pool([Task("a", ["/no/such/program"], Path(tmp_path / "log"))], [{}])


def test_gpus_are_given_one_each():
    assert places(3, {}, gpus=4) == [{VISIBLE: "0"}, {VISIBLE: "1"}, {VISIBLE: "2"}]
    assert places(2, {VISIBLE: "GPU-a,GPU-b,5"}, gpus=8) == [{VISIBLE: "GPU-a"}, {VISIBLE: "GPU-b"}]
    assert places(2, {}, gpus=0) == places(2, {}, gpus=2)  # some that could not be counted
    assert places(2, {VISIBLE: ""}, gpus=0) == [{}, {}]
    for environ, gpus in (({}, 1), ({VISIBLE: "3"}, 8), ({VISIBLE: ""}, 8)):
        with pytest.raises(UserError, match="--jobs=2 needs 2 GPUs, one each"):
            places(2, environ, gpus)
