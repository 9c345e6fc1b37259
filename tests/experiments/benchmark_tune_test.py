"""`benchmark tune` on a toy kernel: the fastest right candidate wins, wrong ones and refused ones never do."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from dsv3.config import UserError
from dsv3.kernels.tuning import tuned
from experiments import benchmark_tune
from experiments.benchmark_tune import Timed, Tunable, compile_all, cross, sweep, tune, write


class Settings(NamedTuple):
    passes: int = 40
    wrong: bool = False
    refused: bool = False


def toy(candidates, shapes=((64, 64),)):
    """Repeated products that cancel out: `passes` costs time and changes nothing."""
    def make(shape, settings):
        def function(x):
            if settings.refused:
                raise NotImplementedError("no such layout")
            turn = jnp.eye(shape[1], dtype=x.dtype)[::-1]
            for _ in range(2 * settings.passes):
                x = jax.lax.optimization_barrier(x @ turn)
            return x.at[0, 0].set(jnp.nan) if settings.wrong else x

        return function

    return Tunable("toy", shapes, lambda shape: candidates, make,
                   lambda shape, seed: (jax.random.normal(jax.random.key(seed), shape),), lambda shape, x: x)


def swept(tunable, shape):
    with ThreadPoolExecutor(2) as pool:
        return sweep(tunable, shape, compile_all(tunable, shape, pool))


def test_the_fastest_right_candidate_wins_and_is_what_the_kernel_then_asks_for(tmp_path, capsys):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"another GPU": {"toy": {"64x64": {"parameters": {"passes": 9}}}}}))
    candidates = [Settings(), Settings(passes=1, wrong=True), Settings(passes=1, refused=True), Settings(passes=2)]
    tune([toy(candidates, ((64, 64), (32, 64)))], path, only="64x")
    table, kind = json.loads(path.read_text()), jax.devices()[0].device_kind
    assert tuned(kind, "toy", (64, 64), Settings(), table) == Settings(passes=2)
    assert tuned(kind, "toy", (32, 64), Settings(), table) == Settings(), "only=64x leaves this shape alone"
    assert tuned("another GPU", "toy", (64, 64), Settings(), table) == Settings(passes=9)
    said = capsys.readouterr().out
    assert "passes 1, wrong True, refused False: WRONG, distance nan" in said
    assert "passes 1, wrong False, refused True: no such layout" in said
    assert "passes 40, wrong False, refused False (default)" in said


def test_a_sweep_needs_the_card_that_it_is_for():
    with pytest.raises(UserError, match="`benchmark tune` needs a Hopper GPU; the default device is cpu"):
        benchmark_tune.main([], [])


def test_a_kernel_without_a_right_candidate_is_an_error():
    with pytest.raises(UserError, match="no candidate of toy is right at 64x64"):
        swept(toy([Settings(wrong=True)]), (64, 64))


def test_finalists_are_ordered_by_their_second_timing(monkeypatch):
    """The first pass of six is lucky for a slow one; the second of four decides."""
    passes = iter([
        {str(index): seconds for index, seconds in enumerate((6, 5, 4, 3, 2, 1))},
        {"5": 2.5, "4": 2.0, "3": 3.0, "2": 4.0}])
    monkeypatch.setattr(benchmark_tune, "device_seconds", lambda programs: {
        index: seconds for index, seconds in next(passes).items() if index in programs})
    timed = swept(toy([Settings(passes=index) for index in range(6)]), (8, 8))
    assert [row.parameters.passes for row in timed] == [4, 5, 3, 2, 1, 0]


def test_cross_has_every_combination_the_last_name_fastest():
    assert cross(Settings, passes=(1, 2), wrong=(False, True)) == [
        Settings(1, False), Settings(1, True), Settings(2, False), Settings(2, True)]


def test_write_keeps_its_evidence(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text("{}")
    write(path, "GPU", "toy", (4, 8), Timed(Settings(3), 1.5e-6))
    entry = json.loads(path.read_text())["GPU"]["toy"]["4x8"]
    assert entry == {"parameters": {"passes": 3, "wrong": False, "refused": False}, "us": 1.5, "jax": jax.__version__,
                     "date": time.strftime("%Y-%m-%d")}


def test_the_next_shape_compiles_while_one_is_measured(tmp_path, monkeypatch):
    """The second shape's candidate is lowered before the first shape's figures are taken, in another thread."""
    path, order, lowered = tmp_path / "tuning.json", [], threading.Event()
    path.write_text("{}")
    plain = toy([Settings(passes=1)], ((64, 64), (32, 64)))

    def make(shape, settings):
        function = plain.make(shape, settings)

        def noted(x):
            if threading.current_thread() is not threading.main_thread():
                order.append(shape)
                if shape == (32, 64):
                    lowered.set()
            return function(x)

        return noted

    def timed(programs):
        assert lowered.wait(20)
        return {name: 1e-6 for name in programs}

    monkeypatch.setattr(benchmark_tune, "device_seconds", timed)
    tune([plain._replace(make=make)], path, "")
    assert set(order) == {(64, 64), (32, 64)}


def test_one_kernel_without_a_right_candidate_leaves_the_others_their_entries(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text("{}")
    bad, good = toy([Settings(wrong=True)]), toy([Settings(passes=1)])._replace(kernel="other")
    with pytest.raises(UserError, match="no candidate of toy is right at 64x64"):
        tune([bad, good], path, "")
    assert list(json.loads(path.read_text())[jax.devices()[0].device_kind]) == ["other"]
    with pytest.raises(UserError, match="--only=7x is in no shape of toy"):
        tune([bad], path, "7x")
