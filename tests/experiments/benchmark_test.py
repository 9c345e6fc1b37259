"""The command line, and the gate of `make bench`: what grew is named, and --update rewrites what is committed."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsv3.model.ops import reference_ops
from experiments import benchmark_record, benchmark_shapes, launch
from experiments.benchmark_render import PAGE
from experiments.benchmark_shapes import RATIOS, SHAPES, TOLERANCE, benchmark_config, compare, regressions
from experiments.benchmark_step import prepare

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


def test_the_page_and_the_committed_file_count_the_same_lines():
    """`python -m experiments.benchmark --update --json=docs/benchmarks/shapes_cpu.json` writes both; then `render`."""
    page = json.loads((PAGE.with_suffix("") / "shapes_cpu.json").read_text())
    committed = json.loads(RATIOS.read_text())["cpu"]
    assert {f"{row['layers']} layers, MTP {row['mtp']}": row["program_lines"] for row in page["rows"]} == {
        shape: figures["program_lines"] for shape, figures in committed.items()}


@pytest.mark.slow
def test_the_committed_lines_are_those_of_the_tree():
    """Far within the tolerance, or the next small change is named for what others added. Where this fails, see whether
    the lines are needed, and write that run's."""
    lowered = prepare(benchmark_config(4, 0), reference_ops()).lowered
    committed = json.loads(RATIOS.read_text())["cpu"]["4 layers, MTP 0"]["program_lines"]
    assert len(lowered.as_text().splitlines()) == pytest.approx(committed, rel=0.03)


def test_an_unknown_command_is_told_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "stpe"])
    with pytest.raises(SystemExit):
        launch.run_command({"step": None, "kernels": None}, "step")
    assert capsys.readouterr().err == "error: unknown command 'stpe'; expected one of step, kernels\n"


def python(*arguments):
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def described(manual):
    """Flags of a manual with what is said of them: one line each."""
    lines = [line.split(maxsplit=1) for line in manual.splitlines() if line.startswith("  --")]
    return {flag.removeprefix("--").partition("=")[0]: words for flag, words in lines}


def test_help_has_a_line_for_every_flag_of_a_command():
    script = """if True:
        from experiments import benchmark
        from absl import flags
        before = set(flags.FLAGS)
        benchmark.define_flags()
        print(*set(flags.FLAGS) - before, "repeats", "update")
        for name, command in benchmark.COMMANDS.items():
            print("COMMAND", name, *command.flags)
            print(benchmark.manual(name))
    """
    defined, *manuals = python("-c", script).split("COMMAND ")
    whole = described(python("-m", "experiments.benchmark", "--help"))
    assert set(whole) == set(defined.split()) and len(whole) >= 12
    assert whole["soak"].startswith("a table: ") and whole["steps"].startswith("step, slice: ")
    assert len(manuals) == 13
    for text in manuals:
        title, _, manual = text.partition("\n")
        name, *own = title.split()
        assert set(described(manual)) == set(own) and all(len(words) > 10 for words in described(manual).values())
        assert f"python -m experiments.benchmark{'' if name == 'shapes' else f' {name}'}" in manual
    gemm = python("-m", "experiments.benchmark", "gemm", "--help")
    assert gemm.startswith("Dense products of V3") and described(gemm)["soak"].endswith("20 by default")
    assert set(described(gemm)) == {"only", "peers", "soak", "json"}


@pytest.mark.parametrize("flag, memory", [
    ("--peers", "false"), ("--peers=true", "false"), ("--nopeers", "None"), ("--peers=false", "None")])
def test_with_peers_jax_leaves_memory_to_torch_however_it_is_said(flag, memory):
    """And in time: before the first device is asked for."""
    script = f"""if True:
        import os, sys
        from jax._src import xla_bridge
        from experiments import benchmark
        show = lambda _: print(os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"), xla_bridge.backends_are_initialized())
        benchmark.COMMANDS["gemm"] = benchmark.COMMANDS["gemm"]._replace(main=show)
        sys.argv = ["benchmark", "gemm", {flag!r}]
        benchmark.main(sys.argv[1:])
    """
    assert python("-c", script) == f"{memory} False\n"


@pytest.mark.parametrize("arguments, wanted", [
    (["render", "--json=x.json"], "`benchmark render` does not read --json; `benchmark render --help` says what it"),
    (["exact", "--profile=x", "--steps=3"], "`benchmark exact` does not read --steps, --profile"),
    (["slice", "--steps=0"], "flag --steps=0: "), (["gemm", "--soak=0"], "flag --soak=0: "),
    (["--repeats=0"], "flag --repeats=0: "), (["--json={tmp}"], "--json={tmp} cannot be written: it is a directory"),
    (["--json=/proc/x/y.json"], "--json=/proc/x/y.json cannot be written: ")], ids=str)
def test_a_mistake_is_told_before_anything_is_measured(arguments, wanted, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *(text.format(tmp=tmp_path) for text in arguments)],
        capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and not process.stdout
    line, = process.stderr.splitlines()
    assert line.startswith("error: " + wanted.format(tmp=tmp_path))


def test_a_file_that_can_be_written_is_not_there_before_there_is_something_to_write(tmp_path, monkeypatch):
    path, old = tmp_path / "new" / "figures.json", tmp_path / "old.json"
    old.write_text("{}")
    for file in path, old:
        monkeypatch.setattr(benchmark_record, "flags", SimpleNamespace(FLAGS=SimpleNamespace(json=str(file))))
        benchmark_record.check_json()
    assert path.parent.is_dir() and not path.exists() and old.read_text() == "{}"
