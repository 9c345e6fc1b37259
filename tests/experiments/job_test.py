"""A job of two real processes with two devices each: one is killed, it restarts, is told to stop, goes on elsewhere."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import alive, launch_local, started, wait_until
from small_runs import ONE_LAYER, read_lines, small_config, small_overrides, write_corpus
from tiny_models import distance

from dsv3.model.ops import reference_ops
from dsv3.train.loop import train

JOB = ONE_LAYER | {
    "mesh.data": "4", "train.micro_batch_size": "1", "train.steps": "100000", "train.checkpoint_every": "5",
    "train.log_every": "1", "train.eval_every": "100000", "train.guard.replica_check_every": "4"}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def saved(run):
    return {int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_restarted_stopped_and_continued_on_one_device(tmp_path):
    """What two processes leave is, but for rounding, what one process with four devices computes."""
    corpus, run, output = write_corpus(tmp_path / "text"), tmp_path / "run", tmp_path / "output"
    settings = [f"--config.{name}={value}" for name, value in small_overrides(corpus, **JOB).items()]
    command = launch_local(
        "--processes=2", "--devices_per_process=2", "--grace_seconds=20", f"--logs={tmp_path / 'logs'}",
        command=[sys.executable, "-m", "experiments.pretrain", "--config=configs/tiny.py", f"--workdir={run}",
                 *settings])
    with started(command, output, DSV3_HEARTBEAT_SECONDS="10") as supervisor:
        wait_until(lambda: saved(run), 240, "a checkpoint")
        ranks = children(supervisor.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        wait_until(lambda: not any(map(alive, ranks)), 30, "the other rank ends")
        first = max(saved(run))
        wait_until(lambda: max(saved(run)) > first, 240, "a checkpoint after the restart")
        os.kill(supervisor.pid, signal.SIGTERM)
        assert supervisor.wait(60) == 0, output.read_text()
    text = output.read_text()
    assert "was killed by SIGKILL" in text and "restart 1 of 3" in text and "saved; the same command continues" in text
    steps = [record["step"] for record in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1)) and max(saved(run)) == steps[-1]

    ops = reference_ops()
    config = small_config(corpus, **JOB | {"train.steps": str(steps[-1])})
    alone = train(config, tmp_path / "alone", ops).state
    job = train(config, run, ops).state  # restores the checkpoint of the two processes; no step is left
    for name in ("params", "routing"):
        ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(getattr(state, name))])
                        for state in (job, alone))
        assert distance(ours, theirs) < 1e-3, name
    one = small_config(corpus, **JOB | {"train.steps": str(steps[-1] + 2), "mesh.data": "1"})
    assert int(train(one, run, ops).state.step) == steps[-1] + 2
