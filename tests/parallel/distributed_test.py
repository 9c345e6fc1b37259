"""Who takes part, from the environment; and four real processes that add, meet, die and fail together."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import HEARTBEAT, ROOT, environment, job, wait_until

from dsv3.config import UserError
from dsv3.parallel.distributed import Launch, barrier, detect, is_main
from experiments.launch import MISTAKE

EXPLICIT = {"DSV3_COORDINATOR": "node0:1234", "DSV3_NUM_PROCESSES": "4", "DSV3_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8",
         "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPI = {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:99"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize("environ, expected", [
    ({"PATH": "/bin"}, None),
    (EXPLICIT, Launch("deactivate", "node0:1234", 4, 3, ())),
    (EXPLICIT | {"DSV3_COORDINATOR": "[::1]:99"}, Launch("deactivate", "[::1]:99", 4, 3, ())),
    (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Launch("deactivate", "node0:1234", 4, 3, None)),
    (SLURM, Launch("slurm", None, 8, 5, None)),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Launch("slurm", None, 8, 5, ())),  # all GPUs of its node
    (SLURM | {"SLURM_GPUS_PER_TASK": "2"}, Launch("slurm", None, 8, 5, ())),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4),11"}, Launch("slurm", None, 8, 5, None)),
    (SLURM | {"SLURM_NTASKS": "64"}, Launch("slurm", None, 8, 5, None)),  # a step smaller than its allocation
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    (without(SLURM, "SLURM_STEP_NODELIST"), None),  # a batch script, not started by srun
    (without(SLURM, "SLURM_STEP_NUM_TASKS"), Launch("slurm", None, 8, 5, None)),
    (MPI, Launch("ompi", None, 6, 2, None)),
    (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Launch("ompi", None, 6, 2, ())),
    (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    (KUBERNETES, Launch(None, None, None, 3, None)),
    (without(KUBERNETES, "JOB_COMPLETION_INDEX"), None),  # any pod
    (without(KUBERNETES, "KUBERNETES_SERVICE_HOST"), None),
    (MPI | SLURM, Launch("ompi", None, 6, 2, None)),  # mpirun inside an allocation hands Slurm's variables on
    (EXPLICIT | MPI | SLURM | KUBERNETES, Launch("deactivate", "node0:1234", 4, 3, ())),
])
def test_the_innermost_launcher_is_found(environ, expected):
    assert detect(environ) == expected


@pytest.mark.parametrize("environ, words", [
    (without(EXPLICIT, "DSV3_PROCESS_ID"), "not DSV3_PROCESS_ID"),
    (SLURM | {"DSV3_PROCESS_ID": "1"}, "not DSV3_COORDINATOR and DSV3_NUM_PROCESSES"),
    (EXPLICIT | {"DSV3_COORDINATOR": "node0"}, "host:port"),
    (EXPLICIT | {"DSV3_COORDINATOR": ":99"}, "host:port"),
    (EXPLICIT | {"DSV3_COORDINATOR": "node0:70000"}, "host:port"),
    (EXPLICIT | {"DSV3_NUM_PROCESSES": "0"}, "DSV3_NUM_PROCESSES=0"),
    (EXPLICIT | {"DSV3_NUM_PROCESSES": "four"}, "four"),
    (EXPLICIT | {"DSV3_PROCESS_ID": "-1"}, "DSV3_PROCESS_ID=-1"),
    (EXPLICIT | {"DSV3_PROCESS_ID": "4"}, "outside of DSV3_NUM_PROCESSES=4"),
    (SLURM | {"SLURM_PROCID": "8"}, "outside of SLURM_STEP_NUM_TASKS=8"),
    (without(MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK"),
    (KUBERNETES | {"JOB_COMPLETION_INDEX": "first"}, "first"),
])
def test_an_environment_that_contradicts_itself_is_one_line(environ, words):
    with pytest.raises(UserError, match=words) as caught:
        detect(environ)
    assert "\n" not in str(caught.value)


def test_a_single_process_is_main_and_waits_for_nobody():
    assert is_main()
    barrier("alone", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("more, words", [
    ({"DSV3_COORDINATOR": "127.0.0.1:1234"}, "DSV3_NUM_PROCESSES"),
    (EXPLICIT | {"DSV3_HEARTBEAT_SECONDS": "soon"}, "DSV3_HEARTBEAT_SECONDS=soon"),
    (KUBERNETES, "pip install kubernetes"),
])
def test_a_launcher_prints_a_bad_environment_on_one_line(more, words):
    run = subprocess.run(
        [sys.executable, "-m", "experiments.pretrain", "--config=configs/tiny.py", "--workdir=unused"], cwd=ROOT,
        env=environment(**more), capture_output=True, text=True, timeout=60)
    assert run.returncode == MISTAKE and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert words in run.stderr


def trace(directory, rank):
    path = directory / f"trace_{rank}"
    return [int(step) for step in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_four_processes_sum_gather_and_end_together(tmp_path):
    with job(tmp_path, ["tests/ranks.py", str(tmp_path), "10"]) as (ranks, outputs):
        statuses = [rank.wait(60) for rank in ranks]
    assert statuses == [0] * 4, outputs[0].read_text()
    assert [trace(tmp_path, rank) for rank in range(4)] == [list(range(10))] * 4


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_process_fails_the_collective_of_the_others(tmp_path):
    """Within 3 s, without a heartbeat: gloo sees the connection close."""
    with job(tmp_path, ["tests/ranks.py", str(tmp_path), "100000"]) as (ranks, _):
        wait_until(lambda: len(trace(tmp_path, 0)) > 5, 60, "five steps")
        os.kill(ranks[2].pid, signal.SIGKILL)
        wait_until(lambda: None not in [rank.poll() for rank in ranks], 3, "all end")
        assert all(rank.returncode != 0 for rank in ranks)


BUSY = """
import time
from dsv3.parallel.distributed import barrier, initialise
initialise()
barrier("ready", 30)
print("ready", flush=True)
time.sleep(300)  # in no collective: prepares data, saves, compiles
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_busy_ones_within_two_heartbeats(tmp_path, victim):
    """The coordinator's death (rank 0) is seen by the others, another rank's by the coordinator."""
    with job(tmp_path, ["-c", BUSY], size=3) as (ranks, outputs):
        wait_until(lambda: all("ready" in output.read_text() for output in outputs), 60, "the ranks start")
        os.kill(ranks[victim].pid, signal.SIGKILL)
        took = wait_until(lambda: None not in [rank.poll() for rank in ranks], 2 * HEARTBEAT, "all end")
        assert all(rank.returncode != 0 for rank in ranks)
        print(f"all ended {took:.1f} s after rank {victim}, heartbeat {HEARTBEAT} s")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_process_that_raises_does_not_wait_for_those_that_wait_for_it(tmp_path):
    with job(tmp_path, ["tests/ranks.py", str(tmp_path), "100000", "raise"]) as (ranks, outputs):
        wait_until(lambda: len(trace(tmp_path, 0)) > 4, 60, "five steps")
        assert ranks[1].wait(3) == 1
        assert all(rank.wait(2 * HEARTBEAT) != 0 for rank in ranks)
        assert "ValueError: rank 1 fails" in outputs[1].read_text()


LATE = """
import sys, time
import jax
from dsv3.parallel.distributed import barrier, initialise
initialise()
rank = jax.process_index()
if rank == 1:
    time.sleep(3)
start = time.monotonic()
try:
    barrier("late", 1)
except TimeoutError as error:
    print(f"waited {time.monotonic() - start:.1f}:", error, flush=True)
barrier("twice", 20)
barrier("twice", 20)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_barrier_names_what_is_missing_and_can_be_used_again(tmp_path):
    with job(tmp_path, ["-c", LATE], size=2) as (ranks, outputs):
        start = time.monotonic()
        assert [rank.wait(60) for rank in ranks] == [0, 0], outputs[0].read_text() + outputs[1].read_text()
        assert time.monotonic() - start < 40
    assert "1 of 2 processes reached 'late' within 1 s" in outputs[0].read_text()
