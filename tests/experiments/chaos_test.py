"""A run that is killed once of each kind ends with the bits of one that nobody disturbed; and differences are found."""

import json
import random
import shutil
import subprocess
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from processes import ROOT, environment
from small_runs import ONE_LAYER

from experiments.chaos import KINDS, Kill, compare, look, plan, table


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_kill_of_each_kind_changes_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "experiments.chaos", "--kills=4", f"--workdir={tmp_path / 'chaos'}",
         *(f"--config.{name}={value}" for name, value in ONE_LAYER.items())], cwd=ROOT,
        env=environment(), capture_output=True, text=True, timeout=380)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert report["differences"] == [] and "identical, bit for bit" in run.stdout
    assert sorted(kill["aim"] for kill in report["kills"]) == sorted(KINDS[:4])
    hits = {kill["aim"]: kill["hit"] for kill in report["kills"]}
    assert hits["data"] in ("data", "start-up") and hits["compile"] in ("compile", "train", "save")
    assert {hits["save"], hits["saved"]} <= {"save", "saved", "train"} and report["starts"] == 5
    assert report["compared"]["checkpoints"] >= 1 and report["compared"]["arrays"] > 50
    assert report["compared"]["records"] >= 48


def write_run(directory, loss=1.0, weight=1.0, rate=1.0):
    directory.mkdir()
    records = [{"step": step, "loss": loss, "tokens_per_second": rate} for step in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    items = {name: ocp.args.StandardSave({"w": jnp.full((3,), weight)})
             for name in ("params", "routing", "opt_state", "counters", "ema")}
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        manager.save(2, args=ocp.args.Composite(**items, record=ocp.args.JsonSave({"tokens": 8})))
        manager.wait_until_finished()
    return directory


def test_every_difference_between_two_runs_is_found(tmp_path):
    one = write_run(tmp_path / "one")
    assert compare(one, write_run(tmp_path / "same", rate=7.0)) == (
        [], {"checkpoints": 1, "arrays": 5, "records": 2})
    negative_zero = write_run(tmp_path / "zero", weight=0.0), write_run(tmp_path / "minus", weight=-0.0)
    assert len(compare(*negative_zero)[0]) == 5  # equal as numbers, not as bits
    assert "metrics.jsonl record 1: ['loss']" in compare(one, write_run(tmp_path / "loss", loss=1.5))[0]

    other = write_run(tmp_path / "other")
    (other / "checkpoints" / "2" / "record" / "metadata").write_text('{"tokens": 9}')
    shutil.rmtree(other / "checkpoints" / "2" / "routing")
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    text = "\n".join(compare(one, other)[0])
    assert "record differs" in text and "routing is in one checkpoint only" in text and "2 and 3 records" in text
    shutil.rmtree(other / "checkpoints" / "2")
    assert "checkpoints kept: [2] and []" in compare(one, other)[0]


def test_a_plan_holds_every_kind_and_data_comes_first():
    kinds = plan(50, random.Random(0))
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 10)
    assert kinds[:10] == ["data"] * 10 and kinds != plan(50, random.Random(1))


def test_what_is_being_written_is_seen_from_outside(tmp_path):
    assert look(tmp_path / "nothing").saved == frozenset()
    for name in ("checkpoints/4", "checkpoints/8.orbax-checkpoint-tmp", ".data.1.partial"):
        (tmp_path / name).mkdir(parents=True)
    sight = look(tmp_path)
    assert sight.saved == {4} and len(sight.saving) == len(sight.partial) == 1


def test_the_table_counts_lost_steps_and_misses():
    kills = [Kill("save", "save", 2.0, 12, 8), Kill("save", "missed", 4.0, 8, 8), Kill("any", "train", 1.0, 3, 0)]
    lines = {line.split()[0]: line.split()[1:] for line in table(kills).splitlines()}
    assert lines["save"][:3] == ["2", "4", "3.0"] and lines["all"][:2] == ["3", "7"] and lines["data"][0] == "0"
