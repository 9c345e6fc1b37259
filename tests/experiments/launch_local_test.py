"""The supervisor with real processes: restarts, signals, failures that repeat, and no orphans."""

import os
import signal
import subprocess
import sys

import pytest
from processes import HEARTBEAT, ROOT, alive, environment, launch_local, pids, started, wait_until

from dsv3.config import UserError
from experiments.launch import MISTAKE
from experiments.launch_local import gpus

PID = "import os, pathlib; pathlib.Path(f'pid_{os.environ[\"DSV3_PROCESS_ID\"]}').write_text(str(os.getpid()));"


def finished(directory, *arguments, code, timeout=60, **environ):
    """A supervised `python -c code` in `directory`, after its end."""
    return subprocess.run(
        launch_local(f"--logs={directory / 'logs'}", *arguments, command=[sys.executable, "-c", code]),
        cwd=directory, env=environment(**environ), capture_output=True, text=True, timeout=timeout)


def supervised_ranks(directory, steps, *arguments):
    command = launch_local(f"--logs={directory / 'logs'}", "--processes=4", "--devices_per_process=1", *arguments,
                           command=[sys.executable, "tests/ranks.py", str(directory), str(steps)])
    return started(command, directory / "output", DSV3_HEARTBEAT_SECONDS=str(HEARTBEAT))


def steps_of(directory, rank):
    path = directory / f"trace_{rank}"
    return [int(step) for step in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_killed_rank_is_followed_by_a_restart_that_continues_and_finishes(tmp_path):
    with supervised_ranks(tmp_path, 100, "--grace_seconds=1") as supervisor:
        first = pids(tmp_path, 4)
        wait_until(lambda: len(steps_of(tmp_path, 3)) > 8, 40, "eight steps")
        os.kill(first[2], signal.SIGKILL)
        wait_until(lambda: not any(map(alive, first)), 5, "the other ranks end")
        assert supervisor.wait(90) == 0, (tmp_path / "output").read_text()
    output = (tmp_path / "output").read_text()
    assert "rank 2 was killed by SIGKILL; stopping the others" in output and "restart 1 of 3" in output
    assert output.count("starting 4 processes") == 2 and "done 0" in output and "done 1" not in output
    assert (tmp_path / "count").read_text() == "100"
    steps = steps_of(tmp_path, 0)
    assert set(steps) == set(range(100)) and len(steps) <= 101  # at most the step that was cut off is done twice


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_signal_to_the_supervisor_reaches_every_rank(tmp_path):
    with supervised_ranks(tmp_path, 100_000) as supervisor:
        ranks = pids(tmp_path, 4)
        wait_until(lambda: len(steps_of(tmp_path, 3)) > 3, 40, "three steps")
        os.kill(supervisor.pid, signal.SIGTERM)
        assert supervisor.wait(25) == 0, (tmp_path / "output").read_text()
    saved = {(tmp_path / f"saved_{rank}").read_text() for rank in range(4)}
    assert len(saved) == 1  # all of them, at the same step
    assert not any(map(alive, ranks))
    assert "SIGTERM: handed on to all ranks" in (tmp_path / "output").read_text()


@pytest.mark.timeout(60)
def test_a_program_that_always_fails_ends_with_its_last_words(tmp_path):
    """The rank that fails waits until all have printed: the others are ended at once."""
    code = ("import os, sys, time; print('port', os.environ['DSV3_COORDINATOR'], flush=True)\n"
            "open('printed', 'a').write('.')\n"
            "while os.environ['DSV3_PROCESS_ID'] != '1' or len(open('printed').read()) % 3: time.sleep(0.01)\n"
            "sys.exit('no such disk')")
    run = finished(tmp_path, "--processes=3", "--max_restarts=2", "--backoff_seconds=0.1", code=code)
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert [line for line in lines if "restart" in line][:2] == [
        "launch_local: restart 1 of 2 in 0.1 s", "launch_local: restart 2 of 2 in 0.2 s"]
    assert "no such disk" in "\n".join(lines[-4:])
    assert lines[-1] == "launch_local: rank 1 exited with status 1, after 2 restarts; giving up"
    ports = run.stdout.splitlines()
    assert len(ports) == 3 and len(set(ports)) == 3, run.stdout


@pytest.mark.timeout(60)
def test_a_mistake_of_the_user_is_not_tried_again(tmp_path):
    """The rank that made it is named, although the others die of it at once."""
    code = ("import os, pathlib, time; rank = os.environ['DSV3_PROCESS_ID']; open('starts', 'a').write(rank)\n"
            "if rank == '1':\n"
            "    while len(open('starts').read()) < 3: time.sleep(0.01)\n"
            "    print('error: no such flag', flush=True); open('made', 'w').close()\n"
            f"    os._exit({MISTAKE})\n"
            "while not pathlib.Path('made').exists(): time.sleep(0.01)\n"
            "os.abort() if rank == '2' else os._exit(1)")
    run = finished(tmp_path, "--processes=3", "--backoff_seconds=0.1", code=code)
    lines = run.stderr.splitlines()
    assert run.returncode == MISTAKE and len((tmp_path / "starts").read_text()) == 3
    assert lines[-1] == f"launch_local: rank 1 exited with status {MISTAKE}, which no restart mends; giving up"
    assert "error: no such flag" in lines[-2]


@pytest.mark.timeout(60)
def test_an_attempt_that_made_progress_starts_the_count_of_failures_anew(tmp_path):
    code = ("import pathlib, sys; p = pathlib.Path('n'); n = int(p.read_text()) if p.exists() else 0\n"
            "p.write_text(str(n + 1)); sys.exit(n < 4)")
    flags = ["--processes=1", "--max_restarts=1", "--backoff_seconds=0"]
    assert finished(tmp_path, *flags, "--healthy_seconds=0", code=code).returncode == 0
    assert (tmp_path / "n").read_text() == "5"
    (tmp_path / "n").unlink()
    assert finished(tmp_path, *flags, code=code).returncode == 1
    assert (tmp_path / "n").read_text() == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended through Linux's PDEATHSIG")
@pytest.mark.timeout(60)
def test_a_supervisor_killed_outright_leaves_no_orphans(tmp_path):
    code = PID.replace("Path(f'", f"Path(f'{tmp_path}/") + "import time; time.sleep(120)"
    command = launch_local(f"--logs={tmp_path / 'logs'}", "--processes=3", command=[sys.executable, "-c", code])
    with started(command, tmp_path / "output") as supervisor:
        ranks = pids(tmp_path, 3)
        assert all(map(alive, ranks))
        os.kill(supervisor.pid, signal.SIGKILL)
        try:
            wait_until(lambda: not any(map(alive, ranks)), 2, "orphans end")
        finally:
            for rank in filter(alive, ranks):
                os.kill(rank, signal.SIGKILL)


@pytest.mark.timeout(60)
def test_ranks_that_ignore_a_signal_are_killed_after_the_grace(tmp_path):
    code = ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            + PID.replace("Path(f'", f"Path(f'{tmp_path}/") + "import time; time.sleep(120)")
    command = launch_local(f"--logs={tmp_path / 'logs'}", "--processes=2", "--grace_seconds=1",
                           command=[sys.executable, "-c", code])
    with started(command, tmp_path / "output") as supervisor:
        ranks = pids(tmp_path, 2)
        os.kill(supervisor.pid, signal.SIGTERM)
        assert supervisor.wait(10) == 128 + signal.SIGKILL
    assert not any(map(alive, ranks))
    assert "killing rank 0, 1" in (tmp_path / "output").read_text()


@pytest.mark.timeout(60)
def test_a_signal_between_two_attempts_ends_the_supervisor(tmp_path):
    command = launch_local(f"--logs={tmp_path / 'logs'}", "--processes=1", "--backoff_seconds=60",
                           command=[sys.executable, "-c", "raise SystemExit(3)"])
    with started(command, tmp_path / "output") as supervisor:
        wait_until(lambda: "restart 1" in (tmp_path / "output").read_text(), 20, "the first failure")
        os.kill(supervisor.pid, signal.SIGINT)
        assert supervisor.wait(5) == 128 + signal.SIGINT


@pytest.mark.timeout(60)
def test_every_rank_finds_its_place_and_its_devices(tmp_path):
    code = ("import os; e = os.environ; open(e['DSV3_PROCESS_ID'], 'w').write('; '.join([e['DSV3_NUM_PROCESSES'],"
            "e['XLA_FLAGS'], e['CUDA_VISIBLE_DEVICES']]))")
    run = finished(tmp_path, "--processes=2", "--devices_per_process=3", "--gpus_per_process=2", code=code,
                   XLA_FLAGS="--xla_a=b --xla_force_host_platform_device_count=8", CUDA_VISIBLE_DEVICES="4,5,6,7,8")
    assert run.returncode == 0, run.stderr
    flags = "--xla_a=b  --xla_force_host_platform_device_count=3"
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [f"2; {flags}; 4,5", f"2; {flags}; 6,7"]


def test_gpus_are_shared_out_without_overlap():
    assert [gpus(rank, 2, 3, {}) for rank in range(3)] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert gpus(1, 1, 2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}) == ["GPU-b"]
    for visible in ("", "0"):
        with pytest.raises(UserError, match="needs 2 GPUs"):
            gpus(0, 1, 2, {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize("arguments, words", [
    (["--processes=2"], "nothing to run"),
    (["--processes=2", "python"], "after --"),
    (["--processes=0", "--", "python"], "processes"),
    (["--", "python"], "processes"),
    (["--processes=2", "--", "/no/such/program"], "/no/such/program"),
])
def test_a_mistake_is_one_line(arguments, words, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "experiments.launch_local", *arguments], cwd=ROOT,
        env=environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=30)
    errors = [line for line in run.stderr.splitlines() if not line.startswith("launch_local: starting")]
    assert run.returncode == MISTAKE
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors
