"""What config files ask to compare: every variant is valid, differs as it says, and is found by its name."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dsv3.config import UserError
from dsv3.config.quant import RECIPES
from dsv3.train.loop import knobs_at
from dsv3.train.schedule import batch_sequences
from experiments.launch import load_config, load_module
from experiments.variants import Comparison, chosen, plan, seeds_of

CONFIGS = ("ablation", "fp8", "fp8_from_scratch", "fp8_tiny")


def planned(name, workdir, seeds=("0",)):
    path = f"configs/{name}.py"
    comparison = Comparison.of(load_module(path), path)
    return plan(load_config(path, []), comparison, workdir, seeds)


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
    """That of docs/results.md, whose command these overrides are; after the common start as after new weights."""
    scratch, fp8 = load_config("configs/fp8_from_scratch.py", []), load_config("configs/fp8.py", [])
    small = load_config("configs/small_moe.py", [
        "train.steps=1530", "train.warmup_steps=100", "train.learning_rate.0.until=6e7",
        "train.learning_rate.1.until=1.02e8", "train.bias_update_speed.0.start=0.01",
        "train.bias_update_speed.0.end=0.002", "train.bias_update_speed.0.shape=linear",
        "train.bias_update_speed.0.until=1e8"])
    for config in (scratch, fp8):
        assert (config.model, config.data, config.mesh, config.train.optimizer) == (
            small.model, small.data, small.mesh, small.train.optimizer)
    at = lambda config, step: knobs_at(config, step, step * 32 * 2048)
    assert [at(scratch, step) for step in range(1530)] == [at(small, step) for step in range(1530)]
    assert [batch_sequences(fp8.train, step * 65536) for step in range(fp8.train.steps)] == [32] * (700 + 1530)
    late = range(100, 1530)  # after warm-up
    assert [at(fp8, 700 + step).learning_rate for step in late] == [at(small, step).learning_rate for step in late]
    assert 1e8 < (fp8.train.steps - 700) * 32 * 2048 < 1.01e8


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_rate_of_the_sweep_is_that_of_the_others_times_a_factor(factor, tmp_path):
    runs = {run.variant: run.config for run in planned("fp8", tmp_path)}
    for quant in ("bf16", "fp8"):
        config = runs[f"{quant}, rate x {factor}"]
        assert config.quant == quant and config.train.steps == 700 + 306
        for step in (700, 900, 1005):
            rates = [float(knobs_at(c, step, step * 65536).learning_rate) for c in (config, runs[quant])]
            assert rates[0] == pytest.approx(factor * rates[1], rel=1e-6)


def test_recipes_differ_from_fp8_in_the_recipe_and_where_they_end(tmp_path):
    runs = {run.variant: run.config for run in planned("fp8", tmp_path)}
    for quant in set(RECIPES) - {"bf16", "fp8"}:
        assert replace(runs[quant], quant="fp8", train=replace(runs[quant].train, steps=2230)) == runs["fp8"]
        assert runs[quant].train.steps == 700 + 612


def test_all_variants_go_on_from_the_end_of_the_start_with_their_seed(tmp_path):
    runs = planned("fp8", tmp_path, ("0", "1"))
    assert [run.variant for run in runs[:2]] == ["start", "start"]
    assert all(run.config.train.start_from is None and run.config.train.steps == 700 for run in runs[:2])
    assert {(run.seed, run.config.train.start_from) for run in runs[2:]} == {
        (seed, str(tmp_path / f"start-{seed}")) for seed in "01"}
    assert all(run.config.train.start_from is None for run in planned("fp8_from_scratch", tmp_path))


def test_runs_are_chosen_by_the_names_of_their_directories(tmp_path):
    runs = planned("fp8", tmp_path, ("0", "1"))
    assert chosen(runs, None) == runs and chosen(runs, []) == []
    names = [run.directory.name for run in chosen(runs, ["fp8_direct", "bf16_other_order"])]
    assert names == ["bf16_other_order-0", "fp8_direct-0", "bf16_other_order-1", "fp8_direct-1"]
    with pytest.raises(UserError, match="no variant 'fp8_dirct'; did you mean 'fp8_direct'"):
        chosen(runs, ["fp8", "fp8_dirct"])


def test_seeds_of_other_starts_are_found(tmp_path):
    comparison = Comparison({"a": {}, "b, c": {}}, {}, None)
    for name in ("a-3", "b_c-10", "a-x", "other-7", "a"):
        (tmp_path / name).mkdir()
    assert seeds_of(comparison, tmp_path, ["0", "3"]) == ["0", "3", "10"]


def module(**changes):
    return SimpleNamespace(**dict(VARIANTS={"a": {}, "b": {}}, BASELINES={"b": "a"}, NOISE=None) | changes)


@pytest.mark.parametrize("changes, words", [
    (dict(BASELINES={"c": "a"}), "names c, not among VARIANTS"),
    (dict(BASELINES={"b": "d"}), "names d, not among VARIANTS"),
    (dict(NOISE="a"), "NOISE .* is 'a'"),
    (dict(START="c"), "START .* is 'c', not among VARIANTS"),
    (dict(START="a"), "BASELINES .* names 'a', which the others only go on from"),
])
def test_what_a_comparison_may_not_say(changes, words):
    with pytest.raises(UserError, match=words):
        Comparison.of(module(**changes), "file.py")


def test_a_file_without_variants_is_refused():
    with pytest.raises(UserError, match="no VARIANTS and no BASELINES and no NOISE; see configs/ablation.py"):
        Comparison.of(SimpleNamespace(get_config=None), "file.py")
