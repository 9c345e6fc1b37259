"""The fastest parameters of kernels on this device, into dsv3/kernels/tuning.json:

    python -m experiments.benchmark tune [--kernel=NAME] [--only=4096x]

A kernel takes part through a row of `TUNABLES`. Every candidate is checked against the reference before it is timed, so
that no wrong one can win; one that does not compile is left out by name.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from dsv3.config import require
from dsv3.kernels.tuning import TABLE, key
from experiments.benchmark_clock import compiled, copies_needed, device_seconds
from experiments.benchmark_record import versions
from experiments.benchmark_table import BOUND, distance, poison

FINALISTS = 4
"""Candidates that are timed a second time, side by side."""


class Tunable(NamedTuple):
    """A kernel with parameters to choose.

    `candidates(shape)` gives NamedTuples of parameters, the default first; `make(shape, parameters)` a function of what
    `inputs(shape, seed)` draws; `expected` the float32 reference of the same inputs, met within `bound` norm-wise.
    """

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    candidates: Callable[[tuple[int, ...]], Sequence[NamedTuple]]
    make: Callable[[tuple[int, ...], NamedTuple], Callable]
    inputs: Callable[[tuple[int, ...], int], tuple]
    expected: Callable
    bound: float = BOUND


TUNABLES: tuple[Tunable, ...] = ()
"""Every kernel that `tune` knows."""


def cross(parameters: type[NamedTuple], **values: Sequence) -> list[NamedTuple]:
    """Every combination: `cross(Tile, width=(128, 256), stages=(3, 4))` has four, in this order."""
    found = [{}]
    for name, options in values.items():
        found = [one | {name: option} for one in found for option in options]
    return [parameters(**one) for one in found]


class Timed(NamedTuple):
    """A candidate that is right, and its seconds a call."""

    parameters: NamedTuple
    seconds: float


def spelled(parameters: NamedTuple) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters._asdict().items())


def right_programs(tunable: Tunable, shape: tuple[int, ...], sets: Sequence) -> Iterator[tuple[NamedTuple, Callable]]:
    """Candidates that compile and give the expected result, each as a compiled program; the others are printed."""
    with jax.default_matmul_precision("highest"):
        expected = jax.block_until_ready(jax.jit(tunable.expected)(*sets[0]))
    for index, parameters in enumerate(tunable.candidates(shape)):
        function = tunable.make(shape, parameters)
        try:
            program = compiled(function, f"{tunable.kernel} {key(shape)} {index}", sets[0])
            poison(jax.eval_shape(function, *sets[0]))
            error = distance(program(*sets[0]), expected)
        except Exception as refused:  # the compiler's own errors have no common class
            print(f"    {spelled(parameters)}: {str(refused).strip().partition('\n')[0][:160]}", flush=True)
            continue
        if error <= tunable.bound:
            yield parameters, program
        else:
            print(f"    {spelled(parameters)}: WRONG, distance {error:.2g} is above {tunable.bound}", flush=True)


def sweep(tunable: Tunable, shape: tuple[int, ...]) -> list[Timed]:
    """Right candidates, fastest first. The first `FINALISTS` of one pass are ordered by another.

    Raises `UserError` where no candidate is right.
    """
    first = tunable.inputs(shape, 0)
    sets = [first, *(tunable.inputs(shape, seed) for seed in range(1, copies_needed(first)))]
    programs = dict(enumerate(right_programs(tunable, shape, sets)))
    require(programs, f"no candidate of {tunable.kernel} is right at {key(shape)}")

    def ordered(indices: Sequence[int]) -> list[tuple[float, int]]:
        took = device_seconds({str(index): (programs[index][1], sets) for index in indices})
        return sorted((seconds, int(index)) for index, seconds in took.items())

    once = ordered(list(programs))
    again = ordered([index for _, index in once[:FINALISTS]])
    return [Timed(programs[index][0], seconds) for seconds, index in again + once[FINALISTS:]]


def write(path: Path, kind: str, kernel: str, shape: tuple[int, ...], best: Timed) -> None:
    """Put one entry into the table, whose others stay."""
    table = json.loads(path.read_text())
    entry = {"parameters": best.parameters._asdict(), "us": round(1e6 * best.seconds, 2),
             "jax": versions()["jax"], "date": time.strftime("%Y-%m-%d")}
    table.setdefault(kind, {}).setdefault(kernel, {})[key(shape)] = entry
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def tune(tunables: Sequence[Tunable], path: Path, only: str) -> None:
    """Sweep shapes whose `key` has `only` in it; every best is written at once."""
    kind = jax.devices()[0].device_kind
    for tunable in tunables:
        for shape in (shape for shape in tunable.shapes if only in key(shape)):
            print(f"{tunable.kernel} {key(shape)}", flush=True)
            timed = sweep(tunable, shape)
            default = tunable.candidates(shape)[0]
            for row in timed:
                mark = " (default)" if row.parameters == default else ""
                print(f"    {1e6 * row.seconds:9.1f} us  {spelled(row.parameters)}{mark}", flush=True)
            write(path, kind, tunable.kernel, shape, timed[0])


def define_flags() -> None:
    flags.DEFINE_string("kernel", None, "tune: this kernel alone")


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "`benchmark tune` takes no --config fields")
    known = [tunable.kernel for tunable in TUNABLES]
    chosen = [tunable for tunable in TUNABLES if flags.FLAGS.kernel in (None, tunable.kernel)]
    require(chosen, f"--kernel={flags.FLAGS.kernel}: no such kernel; there are {', '.join(known) or 'none yet'}")
    tune(chosen, TABLE, flags.FLAGS.only)
