"""Variants trained by real processes, one at a time and several: what fails, what diverges, the data between them."""

import fcntl
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
from processes import ROOT, environment, started, wait_until
from small_runs import SMALL, read_lines, write_corpus

from dsv3.config import UserError
from dsv3.config.quant import RECIPES
from dsv3.train.loop import knobs_at
from dsv3.train.schedule import batch_sequences
from experiments import ablate
from experiments.compare import Comparison
from experiments.launch import MISTAKE, load_config, load_module

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
    return override(tiny(), {SMALL | {"train.steps": "12", "train.warmup_steps": "2", "train.ema": "None",
                                      "train.eval_every": "12", "train.checkpoint_every": "12", "model.n_layers": "1",
                                      "model.n_dense_layers": "0", "model.mtp.depth": "0"}})
"""
SMALL_COMPILER = dict(XLA_FLAGS="--xla_backend_optimization_level=0")


@pytest.fixture
def arguments(tmp_path):
    """Of `ablate`, for the experiment above and a small corpus."""
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    return [f"--config={tmp_path / 'experiment.py'}", f"--workdir={tmp_path / 'runs'}", "--seeds=0",
            f"--config.data.sources.0.files={write_corpus(tmp_path / 'text')}"]


def command(*arguments):
    return [sys.executable, "-m", "experiments.ablate", *arguments]


def run(*arguments, timeout=240):
    return subprocess.run(command(*arguments), cwd=ROOT, env=environment(**SMALL_COMPILER), capture_output=True,
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
def test_processes_that_start_at_once_prepare_the_data_once(arguments, tmp_path):
    """None begins while another holds the lock; one that died with it does not stop the others."""
    runs = tmp_path / "runs"
    runs.mkdir()
    with (runs / ".lock").open("w") as lock, ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [stack.enter_context(started(command(*arguments, "--only="), tmp_path / f"output_{i}"))
                     for i in range(4)]
        waiting = lambda pid: sum(str(pid) in line and "->" in line for line in open("/proc/locks")) > 0
        wait_until(lambda: all(waiting(process.pid) for process in processes), 60, "all wait for the lock")
        assert [path.name for path in runs.iterdir()] == [".lock"]
        processes[0].kill()
        fcntl.flock(lock, fcntl.LOCK_UN)
        partial = set()
        while any(process.poll() is None for process in processes):
            partial |= {path.name for path in runs.glob(".data.*.partial")}
        assert [process.returncode for process in processes[1:]] == [0, 0, 0]
        assert len(partial) <= 1 and (runs / "data" / "manifest.json").exists()


@pytest.mark.slow
def test_data_that_cannot_be_prepared_is_one_error(arguments, tmp_path):
    failed = run(*arguments[:-1], f"--config.data.sources.0.files={tmp_path / 'nowhere'}", "--jobs=3")
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and len(errors) == 1
    assert errors[0].startswith("error: data exited with status 2: ") and "does not exist" in errors[0]


CONFIGS = ("ablation", "fp8", "fp8_rates")


def planned(name, workdir, seeds=("0",)):
    path = f"configs/{name}.py"
    comparison = Comparison.of(load_module(path), path)
    return ablate.plan(load_config(path, []), comparison, workdir, seeds)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_is_a_config_with_a_directory_of_its_own(name, tmp_path):
    runs = planned(name, tmp_path, ("0", "1"))
    assert len({run.directory for run in runs}) == len({run.config for run in runs}) == len(runs)
    assert {run.config.data for run in runs} == {runs[0].config.data}
    assert all("," not in run.directory.name and " " not in run.directory.name for run in runs)


def test_all_recipes_are_compared_and_noise_is_another_order_of_the_same(tmp_path):
    runs = {run.variant: run.config for run in planned("fp8", tmp_path)}
    assert {config.quant for config in runs.values()} == set(RECIPES)
    train, other = runs["bf16"].train, runs["bf16, other order"].train
    assert train.micro_batch_size == 32 and other == replace(train, micro_batch_size=16)


def test_fp8_trains_small_moe_with_the_schedules_of_its_run():
    """That of docs/results.md, whose command these overrides are."""
    fp8 = load_config("configs/fp8.py", [])
    small = load_config("configs/small_moe.py", [
        "train.steps=1530", "train.warmup_steps=100", "train.learning_rate.0.until=6e7",
        "train.learning_rate.1.until=1.02e8", "train.bias_update_speed.0.start=0.01",
        "train.bias_update_speed.0.end=0.002", "train.bias_update_speed.0.shape=linear",
        "train.bias_update_speed.0.until=1e8"])
    assert (fp8.model, fp8.data, fp8.mesh, fp8.train.optimizer) == (
        small.model, small.data, small.mesh, small.train.optimizer)
    at = lambda config, step: knobs_at(config, step, step * 32 * 2048)
    assert [at(fp8, step) for step in range(1530)] == [at(small, step) for step in range(1530)]
    assert [batch_sequences(fp8.train, step * 65536) for step in range(1530)] == [32] * 1530
    assert 1e8 < fp8.train.steps * 32 * 2048 < 1.01e8


@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_a_rate_of_the_sweep_scales_the_whole_schedule(factor, tmp_path):
    runs = {run.variant: run.config for run in planned("fp8_rates", tmp_path)}
    plain = load_config("configs/fp8_rates.py", [])
    for quant in ("bf16", "fp8"):
        config = runs[f"{quant}, rate x {factor}"]
        assert config.quant == quant
        for step in (0, 50, 200, 400, 509):
            rates = [float(knobs_at(c, step, step * 65536).learning_rate) for c in (config, plain)]
            assert rates[0] == pytest.approx(factor * rates[1], rel=1e-6)


def test_runs_are_chosen_by_the_names_of_their_directories(tmp_path):
    runs = planned("fp8", tmp_path, ("0", "1"))
    assert ablate.chosen(runs, None) == runs and ablate.chosen(runs, []) == []
    names = [run.directory.name for run in ablate.chosen(runs, ["fp8_direct", "bf16_other_order"])]
    assert names == ["bf16_other_order-0", "fp8_direct-0", "bf16_other_order-1", "fp8_direct-1"]
    with pytest.raises(UserError, match="no variant 'fp8_dirct'; did you mean 'fp8_direct'"):
        ablate.chosen(runs, ["fp8", "fp8_dirct"])


def test_seeds_of_other_starts_are_found(tmp_path):
    comparison = Comparison({"a": {}, "b, c": {}}, {}, None)
    for name in ("a-3", "b_c-10", "a-x", "other-7", "a"):
        (tmp_path / name).mkdir()
    assert ablate.seeds_of(comparison, tmp_path, ["0", "3"]) == ["0", "3", "10"]
