"""The gate of `make bench`: what grew is named, what did not is not, and --update rewrites the committed values."""

import json

import pytest

from experiments import benchmark_shapes, launch
from experiments.benchmark_shapes import RATIOS, SHAPES, TOLERANCE, compare, regressions

FIGURES = {"4 layers, MTP 0": {"step": 100.0, "compile": 4000.0, "program_lines": 3000}}


def changed(**factors):
    return {shape: {name: value * factors.get(name, 1) for name, value in figures.items()}
            for shape, figures in FIGURES.items()}


@pytest.mark.parametrize("name", TOLERANCE)
def test_only_what_exceeds_its_tolerance_is_named(name):
    assert regressions(changed(**{name: 0.99 * TOLERANCE[name]}), FIGURES) == []
    line, = regressions(changed(**{name: 1.01 * TOLERANCE[name]}), FIGURES)
    assert line.startswith(f"4 layers, MTP 0: {name} is ")


def test_update_keeps_other_devices(monkeypatch, tmp_path):
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"a GPU": FIGURES}))
    monkeypatch.setattr(benchmark_shapes, "RATIOS", file)
    assert compare(FIGURES, "cpu", False) == ["no committed ratios of these shapes for 'cpu'; --update writes them"]
    assert compare(changed(step=3), "cpu", True) == []
    assert json.loads(file.read_text()) == {"a GPU": FIGURES, "cpu": changed(step=3)}
    assert compare(changed(step=3), "cpu", False) == []
    assert len(compare(changed(step=3), "a GPU", False)) == 1


def test_the_committed_file_has_every_shape_of_a_cpu():
    committed = json.loads(RATIOS.read_text())["cpu"]
    assert set(committed) == {f"{layers} layers, MTP {mtp}" for layers, mtp in SHAPES}
    assert all(set(figures) == set(TOLERANCE) for figures in committed.values())


def test_an_unknown_command_is_told_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "stpe"])
    with pytest.raises(SystemExit):
        launch.run_command({"step": None, "kernels": None}, "step")
    assert capsys.readouterr().err == "error: unknown command 'stpe'; expected one of step, kernels\n"
