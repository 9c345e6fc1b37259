"""Checkpoints against damage: flipped bits, missing parts, full disks, other models, other meshes."""

import dataclasses
import logging
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from small_runs import ONE_LAYER, small_config, write_corpus
from tiny_models import mesh_of, model_config, random_variables, recipe_of, train_config, train_state, transformer

from dsv3.config import UserError
from dsv3.model.ops import reference_ops
from dsv3.parallel.mesh import shardings
from dsv3.train.checkpoint import Checkpoint, Checkpoints, Description, Progress
from dsv3.train.ema import initial_average
from dsv3.train.loop import train
from dsv3.train.step import abstract_state, make_recipe

MODEL = model_config(n_layers=1, n_dense_layers=0, mtp=dict(depth=0))
TRAIN = train_config()
ANY = lambda description: None


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    return Description(small_config(tmp_path_factory.mktemp("text")), '{"a tokenizer": 1}', {"tokens.npy": "sha"})


@cache
def checkpoint_at(step, mesh=None):
    """A state whose every array depends on `step`, on a mesh, with a moving average."""
    state = train_state(random_variables(MODEL, seed=step), TRAIN)._replace(step=jnp.int32(step))
    if mesh is not None:
        state = jax.device_put(state, shardings(mesh, make_recipe(transformer(MODEL), TRAIN, False, mesh).specs()))
    return Checkpoint(state, initial_average(state.params), Progress(tokens=24 * step, rows=2 * step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, description):
    """A workdir with checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(checkpoint_at(step), description)
    return workdir


@cache
def abstract(n_devices=1):
    return abstract_state(recipe_of(transformer(MODEL), TRAIN, n_devices))


def restore(workdir, n_devices=1, check=ANY, ema=True):
    with Checkpoints(workdir, keep=3) as checkpoints:
        return checkpoints.restore(abstract(n_devices), check, ema=ema)


def assert_is(restored, step, description):
    checkpoint, found = restored
    chex.assert_trees_all_equal(jax.device_get(checkpoint.state), jax.device_get(checkpoint_at(step).state))
    chex.assert_trees_all_equal(checkpoint.ema, checkpoint_at(step).ema)
    assert checkpoint.progress == Progress(24 * step, 2 * step)
    assert found == description


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_flipped_bits_are_detected_or_harmless(saved, description, tmp_path):
    """Half of them fall on files drawn evenly, half on bytes. Never is anything else restored than what was saved."""
    rng = random.Random(0)
    files = sorted(path for path in (saved / "checkpoints" / "2").rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    detected = 0
    for trial in range(100):
        chosen = rng.choice(files) if trial % 2 else rng.choices(files, sizes)[0]
        run = tmp_path / str(trial)
        shutil.copytree(saved, run)
        flip(run / chosen.relative_to(saved), rng.randrange(8 * chosen.stat().st_size))
        restored = restore(run)
        step = int(restored[0].state.step)
        assert_is(restored, step, description)
        assert (step == 1) == (run / "damaged" / "2").exists() == (not (run / "checkpoints" / "2").exists())
        detected += step == 1
        shutil.rmtree(run)
    assert detected > 30


def test_a_flipped_bit_of_an_array_is_named_and_the_checkpoint_before_is_used(saved, description, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    largest = max((run / "checkpoints" / "2" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(largest, 4 * largest.stat().st_size)
    with caplog.at_level(logging.ERROR):
        assert_is(restore(run), 1, description)
    assert "checkpoints/2 is damaged" in caplog.text and "using the one before" in caplog.text
    with Checkpoints(run, keep=3) as checkpoints:  # the run goes on, and saves that step again
        checkpoints.save(checkpoint_at(2), description)
    assert_is(restore(run), 2, description)


@pytest.mark.parametrize("part", ["record", "params", "opt_state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_missing_part_is_damage_or_does_not_matter(saved, description, tmp_path, part):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    path = run / "checkpoints" / "2" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    restored = restore(run)
    assert_is(restored, 2 if part == "_CHECKPOINT_METADATA" else 1, description)


def test_when_all_are_damaged_the_run_does_not_start_anew(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    for step in "12":
        shutil.rmtree(run / "checkpoints" / step / "record")
    for _ in range(2):  # nor when the same command is given again
        with pytest.raises(UserError, match="every checkpoint .* is damaged"):
            restore(run)


def test_a_refused_description_is_no_damage(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)

    def refuse(description):
        raise UserError("another run")

    with pytest.raises(UserError, match="another run"):
        restore(run, check=refuse)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "2"}


def test_generation_reads_weights_or_average_and_moves_nothing(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    shutil.rmtree(run / "checkpoints" / "2" / "ema")
    with Checkpoints(run) as checkpoints:
        variables, _ = checkpoints.restore_variables(abstract(), ema=False)
        chex.assert_trees_all_equal(variables["params"], checkpoint_at(2).state.params)
        averaged, _ = checkpoints.restore_variables(abstract(), ema=True)
        chex.assert_trees_all_equal(averaged["params"], checkpoint_at(1).state.params)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "2"}


def test_saved_on_eight_devices_restored_on_two_and_on_one(description, tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(checkpoint_at(1, mesh_of(8)), description)
    for n_devices in (8, 2, 1):
        restored = restore(tmp_path, n_devices)
        assert_is(restored, 1, description)
        leaf = jax.tree.leaves(restored[0].state.params)[0]
        assert len(leaf.sharding.device_set) == n_devices


@pytest.mark.slow
def test_a_full_disk_is_reported_and_training_goes_on(tmp_path):
    """The checkpoint of step 3 does not fit; the run ends well, with those of steps 2 and 4, and can be continued."""
    corpus = write_corpus(tmp_path / "text")
    program = f"""
import resource, signal, sys
sys.path[:0] = ["tests", "."]
from pathlib import Path
from small_runs import ONE_LAYER, small_config
from dsv3.model.ops import reference_ops
from dsv3.train import loop

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
config = small_config(Path({str(corpus)!r}), **ONE_LAYER, **{{"train.steps": "4", "train.checkpoint_every": "1"}})
class Run(loop._Run):
    def save(self, state, progress):
        self.checkpoints.wait()
        limit = 20_000 if int(state.step) == 3 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        super().save(state, progress)
        self.checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
loop._Run = Run
result = loop.train(config, Path({str(tmp_path / "run")!r}), reference_ops())
print("finished", int(result.state.step))
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert "finished 4" in process.stdout
    assert "checkpoint of step 3 could not be saved" in process.stderr and "newest good one is 2" in process.stderr
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "4"}


def test_another_model_is_refused_with_the_fields_that_differ(tmp_path):
    config = small_config(write_corpus(tmp_path / "text"), **ONE_LAYER | {"train.steps": "2"})
    train(config, tmp_path / "run", reference_ops())
    wider = dataclasses.replace(config.model, dim=32, n_layers=3)
    with pytest.raises(UserError, match=r"model.dim: 24 != 32; model.n_layers: 1 != 3"):
        train(dataclasses.replace(config, model=wider), tmp_path / "run", reference_ops())
    assert (tmp_path / "run" / "checkpoints" / "2").exists()
    assert not (tmp_path / "run" / "damaged").exists()
