"""Whole runs: what they leave behind, and that stopping and continuing changes nothing."""

import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest
from small_runs import ONE_LAYER, read_lines, small_config, write_corpus

from dsv3.config import UserError, override
from dsv3.model.ops import reference_ops
from dsv3.train.loop import train
from dsv3.train.metrics import MetricsWriter, read_metrics

OPS = reference_ops()


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "text")


def with_steps(config, steps):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


@pytest.mark.slow
def test_forty_steps_equal_twenty_and_a_stop_and_twenty_more(corpus, tmp_path):
    """Bit for bit: parameters, routing, moments, and every metric of every step."""
    config = small_config(corpus, **{"train.steps": "40", "train.checkpoint_every": "20", "train.eval_every": "40"})
    straight = train(config, tmp_path / "straight", OPS)
    train(with_steps(config, 20), tmp_path / "stopped", OPS)
    continued = train(config, tmp_path / "stopped", OPS)
    chex.assert_trees_all_equal(continued.state, straight.state)
    assert int(continued.state.step) == 40

    def losses(name):
        return [(r["step"], r["tokens"], r["loss"], r["max_vio"], r["gradient_norm"])
                for r in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in r]

    assert losses("stopped") == losses("straight")
    assert [step for step, *_ in losses("straight")] == list(range(1, 41))
    assert continued.validation == straight.validation


@pytest.mark.slow
def test_a_run_that_goes_on_from_another_is_that_run_until_something_differs(corpus, tmp_path):
    """Bit for bit, the average too; then it is a run of its own, and needs the other no more."""
    config = small_config(corpus, **ONE_LAYER, **{"train.steps": "12", "train.eval_every": "12"})
    straight = train(config, tmp_path / "straight", OPS)
    train(with_steps(config, 6), tmp_path / "first", OPS)
    going_on = small_config(corpus, **ONE_LAYER, **{
        "train.steps": "12", "train.eval_every": "12", "train.start_from": str(tmp_path / "first")})
    second = train(going_on, tmp_path / "second", OPS)
    chex.assert_trees_all_equal(second.state, straight.state)
    assert second.ema_validation == straight.ema_validation
    ours, theirs = ([(r["step"], r["tokens"], r["loss"]) for r in read_lines(tmp_path / name / "metrics.jsonl")
                     if "loss" in r] for name in ("second", "straight"))
    assert ours == theirs[6:]

    other = {"train.balance_alpha": "0.5", "train.seed": "3", "quant": "fp8_direct",
             "train.learning_rate.0.end": "0.001", "train.learning_rate.0.start": "0.001"}
    changed = train(override(going_on, other), tmp_path / "third", OPS)
    loss = [r["loss"] for r in read_lines(tmp_path / "third" / "metrics.jsonl") if "loss" in r]
    assert loss[0] == ours[0][2] and loss[1:] != [step[2] for step in ours[1:]]  # reference operations: no formats
    shutil.rmtree(tmp_path / "first")
    more = train(override(going_on, other | {"train.steps": "13"}), tmp_path / "third", OPS)
    assert int(changed.state.step) == 12 and int(more.state.step) == 13


@pytest.mark.slow
def test_what_a_run_cannot_go_on_from(corpus, tmp_path):
    config = small_config(corpus, **ONE_LAYER, **{"train.start_from": str(tmp_path / "first")})
    with pytest.raises(UserError, match="first holds no undamaged checkpoint; train that"):
        train(config, tmp_path / "second", OPS)
    train(override(config, {"train.start_from": "None", "train.steps": "3"}), tmp_path / "first", OPS)
    elsewhere = write_corpus(tmp_path / "elsewhere", files=25)
    for changes, words in (
        ({"model.dim": "32"}, "another kind .model.dim: 24 != 32"),
        ({"train.optimizer.moment_dtype": "float32"}, "another kind .train.optimizer.moment_dtype"),
        ({"data.seed": "1"}, "another kind .data.seed: 0 != 1"),
        ({"data.sources.0.files": str(elsewhere)}, "another kind .data.sources"),
        ({"train.ema": "None"}, "must both keep a moving average"),
        ({"train.steps": "3"}, "is at step 3 already; raise train.steps"),
    ):
        with pytest.raises(UserError, match=words):
            train(override(config, changes), tmp_path / "_".join(changes), OPS)
    kept = shutil.copytree(corpus, tmp_path / "kept")
    shutil.rmtree(corpus)
    shutil.copytree(elsewhere, corpus)
    with pytest.raises(UserError, match="has read other data"):
        train(config, tmp_path / "third", OPS)
    shutil.rmtree(corpus)
    shutil.copytree(kept, corpus)
    newest = tmp_path / "first" / "checkpoints" / "3"
    for file in (newest / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="first holds no undamaged checkpoint"):
        train(config, tmp_path / "fourth", OPS)
    assert newest.exists()  # it is the other run's to move


@pytest.mark.slow
def test_a_run_leaves_metrics_plots_and_checkpoints(corpus, tmp_path):
    config = small_config(corpus)
    result = train(config, tmp_path / "run", OPS)
    run = tmp_path / "run"
    records = read_lines(run / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["tokens"] for record in steps] == [4 * 32 * step for step in range(1, 7)]
    for record in steps:
        pairs = np.asarray(record["load"]).sum(axis=1)
        assert pairs[0] == pairs[1] and 0.8 * 4 * 32 * 2 < pairs[0] <= 4 * 32 * 2  # padding is not counted
        assert {"mtp_loss", "mtp_agreement", "max_vio", "gradient_norm", "learning_rate"} <= record.keys()
    assert any(record.get("tokens_per_second", 0) > 0 and 0 < record["mfu"] < 1 for record in steps)
    validation = [record["validation_bits_per_byte"] for record in records if "validation_bits_per_byte" in record]
    assert len(validation) == 2 and validation[-1] == result.validation.bits_per_byte
    averaged = [record["validation_ema_bits_per_byte"] for record in records if "validation_bits_per_byte" in record]
    assert averaged[-1] == result.ema_validation.bits_per_byte != validation[-1]
    for name in ("loss.png", "expert_load.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 6

    other = dataclasses.replace(config, train=dataclasses.replace(config.train, balance_alpha=0.5))
    with pytest.raises(UserError, match="train.balance_alpha"):
        train(other, run, OPS)
    config_file = run / "config.json"
    config_file.write_text("damaged")  # only a record for people: the checkpoint holds the configuration
    lost = records[-1] | {"step": 99, "loss": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lost) + "\n" + '{"step": 100, "los')
    again = train(with_steps(config, 7), run, OPS)
    assert int(again.state.step) == 7
    assert [r["step"] for r in read_lines(run / "metrics.jsonl") if "loss" in r] == list(range(1, 8))


@pytest.mark.slow
def test_a_corrected_mistake_needs_no_new_workdir_and_other_data_is_refused(corpus, tmp_path):
    """A run that never started leaves nothing in the way; one that did wants the data that it has read."""
    run, config = tmp_path / "run", small_config(corpus, **{"train.steps": "2"})
    for wrong in ({"data.sources.0.files": "/nowhere"}, {"model.vocab_size": "200"}):
        with pytest.raises(UserError):
            train(small_config(corpus, **wrong), run, OPS)
    train(config, run, OPS)
    steps = [record["step"] for record in read_lines(run / "metrics.jsonl")]
    assert steps == sorted(steps)

    shutil.rmtree(run / "data")
    changed = write_corpus(tmp_path / "changed")
    (changed / "module_3.py").write_text("another = 1\n" * 30)
    with pytest.raises(UserError, match="data.sources.0.files"):
        train(small_config(changed, **{"train.steps": "2"}), run, OPS)
    shutil.rmtree(run / "data")
    shutil.rmtree(corpus)
    shutil.copytree(changed, corpus)
    with pytest.raises(UserError, match="read other data"):
        train(with_steps(config, 4), run, OPS)


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsWriter(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_number_that_is_not_finite_is_null_on_disk_and_nan_when_read(tmp_path):
    """Readers of strict JSON must get through; a run that continues sees what it would have seen."""
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "loss": np.inf, "max_vio": [0.5, np.nan], "load": [[1, 2]], "loss_spike": True})
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert strict == {"step": 1, "loss": None, "max_vio": [0.5, None], "load": [[1, 2]], "loss_spike": True}
    with MetricsWriter(tmp_path, 1):  # rewrites what it has read
        [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert np.isnan(record["loss"]) and np.isnan(record["max_vio"][1]) and record["loss_spike"] is True


def test_a_batch_ramp_grows_the_number_of_micro_batches(corpus, tmp_path):
    """2, then 4, then 6 sequences as tokens are consumed, in micro-batches of 2."""
    config = small_config(corpus, **ONE_LAYER, **{
        "train.batch_increment": "2", "train.steps": "5", "train.eval_every": "9"})
    phase = dataclasses.replace(config.train.batch_size[0], until=256.0, start=2.0, end=6.0, shape="linear")
    flat = dataclasses.replace(config.train.batch_size[0], start=6.0, end=6.0)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=(phase, flat)))
    train(config, tmp_path / "run", OPS)
    tokens = [r["tokens"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert np.diff([0, *tokens]).tolist() == [64, 64, 128, 192, 192]


@pytest.mark.parametrize("overrides, message", [
    ({"model.vocab_size": "200"}, "more than model.vocab_size"),
    ({"data.sources.0.files": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"data.sources.0.files": "**/*.nothing"}, "nothing"),
])
def test_data_that_cannot_be_trained_on_is_refused(corpus, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        train(small_config(corpus, **overrides), tmp_path / "run", OPS)
    assert "\n" not in str(caught.value)


def test_an_empty_corpus_and_an_unreadable_file_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.py").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.py").write_bytes(b"\xff\xfe\x00bad")
    for name in ("empty", "broken"):
        with pytest.raises(UserError) as caught:
            train(small_config(tmp_path / name), tmp_path / f"run_{name}", OPS)
        assert "\n" not in str(caught.value)


def test_a_workdir_below_a_file_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(UserError, match="workdir"):
        train(small_config(corpus), tmp_path / "file" / "run", OPS)
    assert (tmp_path / "file").read_text() == "keep me"
