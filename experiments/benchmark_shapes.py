"""Step time, compile time and program size of fixed shapes, and whether they grew: python -m experiments.benchmark

The model has layers of width 128 (one dense), 8 experts, top 2, a vocabulary of 2,048, and reads 512 tokens a step in
float32, with and without an MTP module; two depths, because compile time should not grow with depth. Times are
compared as multiples of a float32 matrix product measured in the same run, so that a slower machine is no regression.
"""

import dataclasses
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
from absl import flags

from dsv3.config import Config, constant, require
from dsv3.model.ops import reference_ops
from dsv3.train.throughput import measured_matmul_flops
from experiments import launch
from experiments.benchmark_record import record, write_json
from experiments.benchmark_step import measure, prepare

REPEATS = flags.DEFINE_integer("repeats", 20, "timed steps; the median is reported", lower_bound=1)
UPDATE = flags.DEFINE_bool("update", False, "rewrite the committed ratios with this run's")
RATIOS = Path(__file__).with_name("benchmark_ratios.json")
SHAPES = ((4, 0), (4, 1), (16, 1))
MATMUL_SIZE = 1024
TOLERANCE = {"step": 1.5, "compile": 1.75, "program_lines": 1.1}
"""How many times its committed value a figure may be before it is named: wide for times on shared processors."""


def benchmark_config(n_layers: int, mtp_depth: int) -> Config:
    """`configs/tiny.py` at width 128 without recomputation, reading 2 rows of 256 tokens."""
    tiny = launch.load_config("configs/tiny.py", [])
    mtp = dataclasses.replace(tiny.model.mtp, depth=mtp_depth)
    model = dataclasses.replace(tiny.model, dim=128, n_layers=n_layers, mtp=mtp, remat="none")
    train = dataclasses.replace(tiny.train, micro_batch_size=2, batch_size=constant(2), batch_increment=2)
    return dataclasses.replace(tiny, model=model, train=train)


def ratios(row: dict, matmul_seconds: float) -> dict[str, float]:
    """The three figures of a shape that are compared: times in matrix products, and lines."""
    return {
        "step": row["step_seconds"] / matmul_seconds, "compile": row["compile_seconds"] / matmul_seconds,
        "program_lines": row["program_lines"],
    }


def regressions(measured: dict[str, dict[str, float]], committed: dict[str, dict[str, float]]) -> list[str]:
    """One line for every figure above its committed value by more than `TOLERANCE`."""
    return [
        f"{shape}: {name} is {value:.4g}, committed {committed[shape][name]:.4g} (tolerance {TOLERANCE[name]:g} times)"
        for shape, figures in measured.items() for name, value in figures.items()
        if value > TOLERANCE[name] * committed[shape][name]
    ]


def compare(measured: dict[str, dict[str, float]], kind: str, update: bool) -> list[str]:
    """Warnings against the committed ratios of a device kind; with `update`, rewrite them instead."""
    known = json.loads(RATIOS.read_text())
    if update:
        RATIOS.write_text(json.dumps(known | {kind: measured}, indent=2) + "\n")
        return []
    if kind not in known or known[kind].keys() != measured.keys():
        return [f"no committed ratios of these shapes for {kind!r}; --update writes them"]
    return regressions(measured, known[kind])


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "the default benchmark has fixed shapes; --config fields belong to `benchmark step`")
    jax.config.update("jax_enable_compilation_cache", False)
    kind = jax.devices()[0].device_kind
    rows, measured = [], {}
    for n_layers, mtp_depth in SHAPES:
        config = benchmark_config(n_layers, mtp_depth)
        matmul_seconds = 2 * MATMUL_SIZE ** 3 / measured_matmul_flops(MATMUL_SIZE)
        row, _ = measure(prepare(config, reference_ops()), REPEATS.value)
        measured[f"{n_layers} layers, MTP {mtp_depth}"] = ratios(row, matmul_seconds)
        rows.append({"layers": n_layers, "mtp": mtp_depth, **row})
    print(f"{kind}, jax {version('jax')}: 512 tokens a step, width 128, 8 experts\n")
    print("layers   MTP   step (ms)   compile (s)   program lines   MFU")
    for row in rows:
        print(f"{row['layers']:6d} {row['mtp']:5d} {1e3 * row['step_seconds']:11.1f} {row['compile_seconds']:13.1f} "
              f"{row['program_lines']:15d} {row['mfu']:5.0%}")
    for line in compare(measured, kind, UPDATE.value):
        print(f"warning: {line}")
    write_json(record("shapes", {"rows": rows}))
