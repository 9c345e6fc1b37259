"""Variants trained by real processes, one at a time and several: what fails, what diverges, the data between them."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from processes import ROOT, environment, started, wait_until
from small_runs import ONE_LAYER, SMALL, read_lines, write_corpus, write_metrics

from experiments.launch import MISTAKE

EXPERIMENT = f"""
from configs.tiny import get_config as tiny
from dsv3.config import override
VARIANTS = {{
    "base": {{}},
    "base, other order": {{"train.micro_batch_size": "1"}},
    "wild": {{"train.learning_rate.0.start": "1e6", "train.learning_rate.0.end": "1e6"}},
    "refused": {{"kernels": "require"}},
}}
BASELINES = {{name: "base" for name in VARIANTS if name != "base"}}
NOISE = "base, other order"


def get_config():
    return override(tiny(), {SMALL | ONE_LAYER | {
        "train.steps": "12", "train.warmup_steps": "2", "train.ema": "None", "train.eval_every": "12",
        "train.checkpoint_every": "12"}})
"""


@pytest.fixture
def arguments(tmp_path):
    """Of `ablate`, for the experiment above and a small corpus."""
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    return [f"--config={tmp_path / 'experiment.py'}", f"--workdir={tmp_path / 'runs'}", "--seeds=0",
            f"--config.data.sources.0.files={write_corpus(tmp_path / 'text')}"]


def command(*arguments):
    return [sys.executable, "-m", "experiments.ablate", *arguments]


def run(*arguments, timeout=240):
    return subprocess.run(command(*arguments), cwd=ROOT, env=environment(), capture_output=True,
                          text=True, timeout=timeout)


@pytest.mark.slow
def test_jobs_train_all_but_the_variant_that_fails_and_name_it(arguments, tmp_path):
    """A diverging variant is a result. Then the summary alone, a repeated command, and a continued one."""
    runs = tmp_path / "runs"
    first = run(*arguments, "--jobs=2", "--drop_checkpoints")
    assert first.returncode == 1, first.stderr
    errors = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: refused-0 exited with status 2: ")
    assert "kernels=require" in errors[0] and "Traceback" not in first.stderr
    table = first.stdout.splitlines()
    assert [line.split("  ")[0] for line in table[1:4]] == ["base", "base, other order", "wild"]
    assert "diverged at step 4 (seed 0)" in table[3] and table[4] == "not finished: refused-0 (step 0 of 12)"
    figures = json.loads((runs / "ablation.json").read_text())
    assert figures["base"]["0"]["relative_largest"] is None and figures["wild"]["0"]["diverged"] == 4
    assert 0 <= figures["base, other order"]["0"]["relative_mean"] < 0.01
    assert set(json.loads((runs / "curves.json").read_text())) == {"base-0", "base_other_order-0", "wild-0"}
    assert not (runs / "base-0" / "checkpoints").exists() and (runs / "wild-0" / "checkpoints").exists()
    assert "5 steps in a row up to step 8" in (runs / "wild-0" / "log.txt").read_text()
    data = {(runs / name / "data").resolve() for name in ("base-0", "base_other_order-0", "wild-0")}
    assert data == {(runs / "data").resolve()}

    written = (runs / "base-0" / "metrics.jsonl").stat().st_mtime_ns
    (runs / "ablation.json").unlink()
    summary = run(*arguments, "--summary")
    assert summary.returncode == 0 and summary.stdout == first.stdout, summary.stderr
    assert json.loads((runs / "ablation.json").read_text()) == figures
    again = run(*arguments, "--only=base,wild")
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr
    assert (runs / "base-0" / "metrics.jsonl").stat().st_mtime_ns == written
    assert not (runs / "base-0" / "checkpoints").exists()  # nothing was trained or restored


@pytest.mark.slow
def test_variants_one_after_the_other_go_on_after_one_that_diverges(arguments, tmp_path):
    """The wild one first; then training goes on where a longer run is asked for, and the first is refused."""
    first = run(*arguments, "--only=wild,base", "--seeds=1")
    assert first.returncode == 0, first.stderr
    assert "wild-1: 5 steps in a row up to step 8" in first.stderr
    assert len([line for line in read_lines(tmp_path / "runs" / "base-1" / "metrics.jsonl") if "loss" in line]) == 12
    assert "base " in first.stdout and "diverged at step 4 (seed 1)" in first.stdout
    other = run(*arguments, "--only=base", "--seeds=1", "--config.train.warmup_steps=3")
    assert other.returncode == MISTAKE and other.stderr.startswith("error: variant 'base': ")
    assert "another configuration (train.warmup_steps: 2 != 3)" in other.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="who waits for a lock is read from /proc")
def test_processes_that_start_at_once_prepare_the_data_once(arguments, tmp_path):
    """None begins while another holds the lock; one that died with it does not stop the others."""
    runs = tmp_path / "runs"
    runs.mkdir()
    with (runs / ".lock").open("w") as lock, ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [stack.enter_context(started(command(*arguments, "--only="), tmp_path / f"output_{i}"))
                     for i in range(4)]
        waiters = lambda: {line.split()[5] for line in open("/proc/locks") if "->" in line}
        wait_until(lambda: {str(process.pid) for process in processes} <= waiters(), 60, "all wait for the lock")
        assert [path.name for path in runs.iterdir()] == [".lock"]
        processes[0].kill()
        fcntl.flock(lock, fcntl.LOCK_UN)
        partial = set()
        while any(process.poll() is None for process in processes):
            partial |= {path.name for path in runs.glob(".data.*.partial")}
        assert [process.returncode for process in processes[1:]] == [0, 0, 0]
        assert len(partial) <= 1 and (runs / "data" / "manifest.json").exists()


@pytest.mark.slow
def test_ctrl_c_lets_runs_save_and_the_same_command_continues(arguments, tmp_path):
    run_0 = tmp_path / "runs" / "base-0"
    endless = command(*arguments, "--only=base", "--jobs=1", "--config.train.steps=100000")
    with started(endless, tmp_path / "output") as pool:
        wait_until(lambda: (run_0 / "metrics.jsonl").exists() and (run_0 / "metrics.jsonl").stat().st_size > 0, 90,
                   "the first steps are logged")
        os.kill(pool.pid, signal.SIGINT)
        assert pool.wait(30) == 0
    assert "stopped; the same command continues" in (tmp_path / "output").read_text()
    reached = int(re.search(r"stopped after step (\d+), saved", (run_0 / "log.txt").read_text())[1])
    more = run(*arguments, "--only=base", f"--config.train.steps={reached + 1}")
    assert more.returncode == 0 and more.stdout.splitlines()[1].startswith("base "), more.stderr
    steps = [line["step"] for line in read_lines(run_0 / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, reached + 2))


@pytest.mark.slow
def test_data_that_cannot_be_prepared_is_one_error(arguments, tmp_path):
    failed = run(*arguments[:-1], f"--config.data.sources.0.files={tmp_path / 'nowhere'}", "--jobs=3")
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and len(errors) == 1
    assert errors[0].startswith("error: data exited with status 2: ") and "does not exist" in errors[0]


@pytest.mark.slow
def test_variants_go_on_from_the_end_of_the_start(arguments, tmp_path):
    """First the start alone, in a job of its own; its weights stay for variants that are trained later."""
    file = tmp_path / "experiment.py"
    more = EXPERIMENT.replace('"base": {},', '"base": {}, "begun": {"train.steps": "5"},')
    file.write_text(more + 'START = "begun"\nBASELINES.pop(START)\n')
    early = run(*arguments, "--only=base")
    assert early.returncode == MISTAKE and "base-0 goes on from begun-0, which has not finished" in early.stderr
    first = run(*arguments, "--only=base,begun", "--jobs=2", "--drop_checkpoints")
    assert first.returncode == 0, first.stderr
    runs = tmp_path / "runs"
    assert (runs / "begun-0" / "checkpoints" / "5").exists() and not (runs / "base-0" / "checkpoints").exists()
    elsewhere = tmp_path / "elsewhere"
    runs.rename(elsewhere)  # what has finished there is finished here
    runs.symlink_to(elsewhere)
    arguments[1] = f"--workdir={elsewhere}"
    later = run(*arguments, "--only=base,base_other_order", "--drop_checkpoints")
    assert later.returncode == 0, later.stderr
    assert [line.split("  ")[0] for line in later.stdout.splitlines()[1:4]] == ["base", "begun", "base, other order"]
    steps = {name: [line["step"] for line in read_lines(runs / f"{name}-0" / "metrics.jsonl") if "loss" in line]
             for name in ("begun", "base", "base_other_order")}
    assert steps == {"begun": list(range(1, 6)), "base": list(range(6, 13)), "base_other_order": list(range(6, 13))}
    figures = json.loads((runs / "ablation.json").read_text())
    assert 0 <= figures["base, other order"]["0"]["relative_largest"] < 0.01


@pytest.mark.slow
def test_a_summary_shows_runs_as_far_as_they_have_come(arguments, tmp_path):
    """By the same numbers of steps everywhere, the last line of a file cut off in writing left out."""
    file, runs = tmp_path / "experiment.py", tmp_path / "runs"
    more = EXPERIMENT.replace('"base": {},', '"base": {}, "begun": {"train.steps": "5"},')
    file.write_text(more + 'START = "begun"\nBASELINES.pop(START)\n')
    write_metrics(runs / "begun-0", [4.0] * 5)
    write_metrics(runs / "base-0", [3.0] * 4, first=6, validated=False)
    write_metrics(runs / "base_other_order-0", [3.03] * 3, first=6, validated=False)
    with (runs / "base_other_order-0" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "lo')
    shown = run(*arguments, "--summary")
    assert shown.returncode == 0, shown.stderr
    table = [line.split() for line in shown.stdout.splitlines()[1:4]]
    assert [row[0] for row in table] == ["base", "begun", "base,"] and table[1][1] == "4.000"
    assert "step 9 so far" in shown.stdout and "1.000" in table[2] and "step 8 so far" in shown.stdout
    waiting = shown.stdout.splitlines()[-1]
    assert waiting == ("not finished: base-0 (step 9 of 12), base_other_order-0 (step 8 of 12), wild-0 (step 0 of 12), "
                       "refused-0 (step 0 of 12)")
    figures = json.loads((runs / "ablation.json").read_text())
    assert figures["base, other order"]["0"]["last_step"] == 8 and "last_step" not in figures["begun"]["0"]
    assert set(json.loads((runs / "curves.json").read_text())) == {"begun-0", "base-0", "base_other_order-0"}
