"""SIGTERM, as a scheduler sends it to a real process: saved, status 0, and continued to the same end."""

import signal
import subprocess
import sys
import time

import chex
import pytest
from small_runs import ONE_LAYER, read_lines, small_config, small_overrides, write_corpus

from dsv3.model.ops import reference_ops
from dsv3.train.loop import train


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_well(number, tmp_path):
    corpus = write_corpus(tmp_path / "text")
    overrides = ONE_LAYER | {"train.steps": "100000", "train.checkpoint_every": "100000", "train.log_every": "1"}
    command = [sys.executable, "-m", "experiments.pretrain", "--config=configs/tiny.py",
               f"--workdir={tmp_path / 'run'}",
               *(f"--config.{name}={value}" for name, value in small_overrides(corpus, **overrides).items())]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert "saved; the same command continues" in text and "Traceback" not in text
    stopped_at = read_lines(metrics)[-1]["step"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(stopped_at)]

    ops = reference_ops()
    last = str(stopped_at + 3)
    config = small_config(corpus, **overrides | {"train.steps": last})
    straight, continued = (train(config, tmp_path / name, ops) for name in ("straight", "run"))
    chex.assert_trees_all_equal(continued.state, straight.state)
