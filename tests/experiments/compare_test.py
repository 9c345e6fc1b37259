"""Differences between runs against plain NumPy sums, and what a run's metrics say about its end."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_runs import write_metrics
from tiny_models import train_config

from dsv3.config import UserError
from dsv3.train.plots import smoothed
from experiments.compare import Trained, curves, differences, figures, plot_comparison, read_run, relative_difference
from experiments.report import ablation_table

LOSSES = arrays(np.float64, st.integers(1, 40), elements=st.floats(0.5, 20))
TRAIN = train_config(steps=30, guard=dict(max_bad_steps=3))


def ema(losses):
    """EMA 0.9 as a weighted mean over all steps so far, written out."""
    out = []
    for end in range(1, len(losses) + 1):
        weights = 0.9 ** np.arange(end - 1, -1, -1, dtype=np.float64)
        out.append(np.sum(weights * losses[:end]) / np.sum(weights))
    return np.array(out)


@given(LOSSES)
def test_smoothing_is_the_weighted_mean(losses):
    np.testing.assert_allclose(smoothed(losses), ema(losses), rtol=1e-12)


def test_a_loss_that_is_not_finite_leaves_the_average_as_it_was():
    found = smoothed([math.nan, 2.0, math.nan, math.inf, 3.0])
    assert math.isnan(found[0])
    np.testing.assert_allclose(found[1:], ema([2.0, 3.0])[[0, 0, 0, 1]], rtol=1e-12)


@given(LOSSES, LOSSES)
def test_relative_differences_are_those_of_the_averages(ours, theirs):
    both = min(len(ours), len(theirs))
    expected = 100 * (ema(ours)[:both] - ema(theirs)[:both]) / ema(theirs)[:both]
    np.testing.assert_allclose(relative_difference(ours, theirs), expected, rtol=1e-9, atol=1e-10)


@given(LOSSES, st.floats(-0.5, 0.5))
def test_a_loss_that_is_larger_by_a_share_differs_by_that_share(losses, share):
    np.testing.assert_allclose(relative_difference(losses * (1 + share), losses), 100 * share, atol=1e-9)


def write_run(directory, losses, **how):
    write_metrics(directory, losses, **how)
    return read_run(directory, TRAIN)


def losses(seed, steps=30):
    return 3 + np.random.default_rng(seed).uniform(size=steps)


def test_figures_of_a_finished_run(tmp_path):
    """Warm-up is left out of the differences, the MTP module out of MaxVio; the last tenth counts."""
    ours, theirs = losses(0), losses(1)
    ours[:4] = 1000  # within the warm-up; the average forgets it slowly
    run, baseline = write_run(tmp_path / "a", ours), write_run(tmp_path / "b", theirs)
    apart = differences({"a": {"0": run}, "b": {"0": baseline}}, {"a": "b"})
    expected = np.abs(100 * (ema(ours) / ema(theirs) - 1))[20:]
    found = figures(run, apart["a", "0"], warmup=20)
    assert found["relative_largest"] == pytest.approx(expected.max())
    assert found["relative_mean"] == pytest.approx(expected.mean())
    assert found["relative_final"] == pytest.approx(expected[-1])
    assert found["loss"] == pytest.approx(ours[-3:].mean())
    assert found["tokens_per_second"] == 120 and found["tokens"] == 64 * 30 and found["diverged"] is None
    assert (found["max_vio"], found["max_vio_worst_layer"], found["validation_max_vio"]) == (2.0, 3.0, 1.5)
    alone = figures(baseline, None, warmup=20)
    assert alone["relative_largest"] is None and alone["loss"] == pytest.approx(theirs[-3:].mean())


def test_a_warm_up_as_long_as_the_run_leaves_nothing_to_compare(tmp_path):
    run = write_run(tmp_path / "a", losses(0))
    assert figures(run, relative_difference(run.loss(), run.loss()), warmup=30)["relative_largest"] is None


def test_where_a_run_diverged(tmp_path):
    """The first of the streak that ended it; single bad steps before are borne."""
    run = write_run(tmp_path / "a", losses(0, 16), bad=(3, 9, 10, 14, 15, 16), validated=False)
    assert run.diverged == 14 and run.settled and run.validation is None
    baseline = write_run(tmp_path / "b", losses(1))
    apart = differences({"a": {"0": run}, "b": {"0": baseline}}, {"a": "b"})["a", "0"]
    assert len(apart) == 13 and np.isfinite(apart).all()
    found = figures(run, apart, warmup=5)
    assert found["diverged"] == 14 and "loss" not in found and found["relative_largest"] == np.abs(apart[5:]).max()


def test_runs_that_go_on_from_another_are_compared_from_their_first_step(tmp_path):
    """Of a warm-up only what lies after that; where one diverged is a number of its steps."""
    baseline = write_run(tmp_path / "b", losses(1, 20), first=11)
    run = write_run(tmp_path / "a", losses(0, 20), first=11)
    wild = write_run(tmp_path / "c", losses(2, 8), bad=(16, 17, 18), validated=False, first=11)
    runs = {"a": {"0": run}, "b": {"0": baseline}, "c": {"0": wild}}
    apart = differences(runs, {"a": "b", "c": "b"})
    expected = np.abs(100 * (ema(losses(0, 20)) / ema(losses(1, 20)) - 1))
    assert figures(run, apart["a", "0"], warmup=5)["relative_largest"] == pytest.approx(expected.max())
    assert figures(run, apart["a", "0"], warmup=15)["relative_mean"] == pytest.approx(expected[5:].mean())
    assert wild.diverged == 16 and len(apart["c", "0"]) == 5 and np.isfinite(apart["c", "0"]).all()
    plot_comparison(runs, apart, "a", 5, tmp_path / "plot.png")
    early = write_run(tmp_path / "d", losses(1), first=1)
    with pytest.raises(UserError, match="'a' begins at step 11 and 'd', its baseline, at 1"):
        differences({"a": {"0": run}, "d": {"0": early}}, {"a": "d"})


def test_bad_steps_before_any_good_one_are_no_difference(tmp_path):
    run, baseline = (write_run(tmp_path / name, losses(0, 9), bad=bad, validated=False)
                     for name, bad in (("a", (1,)), ("b", (1, 2))))
    apart = differences({"a": {"0": run}, "b": {"0": baseline}}, {"a": "b"})["a", "0"]
    assert np.isnan(apart[0])
    found = figures(run, apart, warmup=0)
    assert np.isfinite([found["relative_largest"], found["relative_mean"], found["relative_final"]]).all()
    assert figures(run, apart[:1], warmup=0)["relative_largest"] is None


@pytest.mark.parametrize("steps, bad, validated", [
    (16, (), False), (16, (15, 16), False), (16, (), True), (0, (), False)])
def test_a_run_that_is_under_way_is_not_settled(tmp_path, steps, bad, validated):
    """Nor is one that was validated at another step than the last, or that has not begun."""
    assert not write_run(tmp_path / "a", losses(0, steps), bad=bad, validated=validated).settled


def test_a_run_is_compared_with_the_same_seed_of_its_baseline_as_far_as_both_have_come(tmp_path):
    done = {seed: write_run(tmp_path / f"done-{seed}", losses(seed)) for seed in (0, 1)}
    half = write_run(tmp_path / "half", losses(2, 16), validated=False)
    wild = write_run(tmp_path / "wild", losses(3, 8), bad=(6, 7, 8), validated=False)
    runs = {"a": {"0": done[0], "1": done[1], "2": done[0], "3": done[1], "4": Trained([], None, None)},
            "b": {"0": done[1], "1": half, "3": wild, "4": done[0]}}
    apart = differences(runs, {"a": "b", "missing": "b"})
    assert set(apart) == {("a", "0"), ("a", "1")}
    np.testing.assert_array_equal(apart["a", "0"], relative_difference(done[0].loss(), done[1].loss()))
    np.testing.assert_array_equal(apart["a", "1"], relative_difference(done[1].loss()[:16], half.loss()))


def test_curves_are_means_over_ten_steps(tmp_path):
    run = write_run(tmp_path / "a", losses(0, 25), bad=(*range(11, 21), 22), validated=False)
    found = curves(run, np.arange(25.0))
    assert found["tokens"] == [640, 1280]
    assert found["loss"] == [pytest.approx(losses(0)[:10].mean(), abs=1e-5), None]
    assert found["relative_difference_percent"] == [4.5, 14.5]
    assert found["max_vio"] == [2.0, 2.0]
    json.dumps(found, allow_nan=False)
    assert "relative_difference_percent" not in curves(run, None)


def test_the_table_and_the_picture_show_what_diverged_and_what_is_under_way(tmp_path):
    runs = {
        "base": {"0": write_run(tmp_path / "base", losses(0)), "1": write_run(tmp_path / "base1", losses(3))},
        "same": {"0": write_run(tmp_path / "same", losses(0) * 1.002)},
        "wild": {"0": write_run(tmp_path / "wild", losses(1, 8), bad=(6, 7, 8), validated=False)},
        "half": {"0": write_run(tmp_path / "half", losses(0, 16) * 1.003, validated=False)},
    }
    apart = differences(runs, {"same": "base", "wild": "base", "half": "base"})
    table = ablation_table({name: {seed: figures(run, apart.get((name, seed)), 2) for seed, run in seeds.items()}
                            for name, seeds in runs.items()})
    base, same, wild, half = table.splitlines()[1:]
    assert " ± " in base and " ± " not in same and same.split()[2:5] == ["1.250", "0.200", "0.200"]
    assert wild.endswith("diverged at step 6 (seed 0)") and wild.split()[1] == "-"
    assert half.endswith("step 16 so far (seed 0)") and half.split()[1:5] == ["-", "-", "0.300", "0.300"]
    plot_comparison(runs, apart, "same", 2, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_has_nothing(tmp_path):
    assert read_run(tmp_path, TRAIN) == Trained([], None, None)
