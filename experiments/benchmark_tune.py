"""The fastest parameters of kernels on this device, into dsv3/kernels/tuning.json:

    python -m experiments.benchmark tune [--kernel=NAME] [--only=4096x]

A kernel takes part through a row of `benchmark_tunables.TUNABLES`. Every candidate is checked against the reference
before it is timed, so that no wrong one can win; one that does not compile is left out by name. While one shape is
measured, threads compile the next.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from dsv3.config import UserError, require
from dsv3.kernels.tuning import TABLE, key
from dsv3.parallel.ops import is_hopper
from experiments.benchmark_clock import compiled, copies_needed, device_seconds
from experiments.benchmark_record import versions
from experiments.benchmark_table import BOUND, distance, poison

FINALISTS = 4
"""Candidates that are timed a second time, side by side."""
THREADS = 16
LOWERING_SECONDS, SHAPE_SECONDS = 0.35, 1.5
"""For the estimate: Python's part of a candidate, which threads do not share, and inputs, reference and traces."""


class Tunable(NamedTuple):
    """A kernel with parameters to choose.

    `candidates(shape)` gives NamedTuples of parameters, the default first; `make(shape, parameters)` a function of what
    `inputs(shape, seed)` draws; `expected(shape, *inputs)` the float32 reference, met within `bound` norm-wise.
    """

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    candidates: Callable[[tuple[int, ...]], Sequence[NamedTuple]]
    make: Callable[[tuple[int, ...], NamedTuple], Callable]
    inputs: Callable[[tuple[int, ...], int], tuple]
    expected: Callable
    bound: float = BOUND


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


def compile_all(tunable: Tunable, shape: tuple[int, ...], pool: ThreadPoolExecutor) -> dict[NamedTuple, Future]:
    """Every candidate on its way to a compiled program."""
    arrays = jax.eval_shape(lambda: tunable.inputs(shape, 0))
    return {parameters: pool.submit(
        compiled, tunable.make(shape, parameters), f"{tunable.kernel} {key(shape)} {index}", arrays)
        for index, parameters in enumerate(tunable.candidates(shape))}


def expected_of(tunable: Tunable, shape: tuple[int, ...], inputs: Sequence):
    """The reference's result. Its products need no tuning of their own, and all its roundings count."""
    options = {"xla_allow_excess_precision": False, "xla_gpu_autotune_level": 0}
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(partial(tunable.expected, shape)).lower(*inputs)
        return jax.block_until_ready(reference.compile(options)(*inputs))


def right_programs(
    tunable: Tunable, shape: tuple[int, ...], sets: Sequence, programs: dict[NamedTuple, Future],
) -> Iterator[tuple[NamedTuple, Callable]]:
    """Candidates that compile and give the expected result, each as a compiled program; the others are printed."""
    expected = expected_of(tunable, shape, sets[0])
    for parameters, future in programs.items():
        try:
            program = future.result()
            poison(expected)
            error = distance(program(*sets[0]), expected)
        except Exception as refused:  # the compiler's own errors have no common class
            print(f"    {spelled(parameters)}: {str(refused).strip().partition('\n')[0][:160]}", flush=True)
            continue
        if error <= tunable.bound:
            yield parameters, program
        else:
            print(f"    {spelled(parameters)}: WRONG, distance {error:.2g} is above {tunable.bound}", flush=True)


def sweep(tunable: Tunable, shape: tuple[int, ...], futures: dict[NamedTuple, Future]) -> list[Timed]:
    """Right candidates, fastest first. The first `FINALISTS` of one pass are ordered by another.

    Raises `UserError` where no candidate is right.
    """
    draw = jax.jit(lambda seed: tunable.inputs(shape, seed))
    sets = [draw(0)]
    sets += [draw(seed) for seed in range(1, copies_needed(sets[0]))]
    programs = dict(enumerate(right_programs(tunable, shape, sets, futures)))
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


def estimate(work: Sequence[tuple[Tunable, tuple[int, ...]]]) -> float:
    """Seconds that a sweep will take, about."""
    n_candidates = sum(len(tunable.candidates(shape)) for tunable, shape in work)
    print(f"{len(work)} shapes, {n_candidates} candidates")
    return LOWERING_SECONDS * n_candidates + SHAPE_SECONDS * len(work)


def tune(tunables: Sequence[Tunable], path: Path, only: str) -> None:
    """Sweep shapes whose `key` has `only` in it; every best is written at once. A kernel with none right is named."""
    kind, start, failed = jax.devices()[0].device_kind, time.perf_counter(), []
    work = [(tunable, shape) for tunable in tunables for shape in tunable.shapes if only in key(shape)]
    require(work, f"--only={only} is in no shape of {', '.join(tunable.kernel for tunable in tunables)}")
    print(f"about {estimate(work):.0f} s", flush=True)
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = compile_all(*work[0], pool)
        for (tunable, shape), after in pairwise([*work, None]):
            futures, ahead = ahead, compile_all(*after, pool) if after else {}
            print(f"{tunable.kernel} {key(shape)}", flush=True)
            try:
                timed = sweep(tunable, shape, futures)
            except UserError as error:
                failed.append(str(error))
                continue
            default = tunable.candidates(shape)[0]
            for row in timed:
                mark = " (default)" if row.parameters == default else ""
                print(f"    {1e6 * row.seconds:9.1f} us  {spelled(row.parameters)}{mark}", flush=True)
            write(path, kind, tunable.kernel, shape, timed[0])
    print(f"took {time.perf_counter() - start:.0f} s")
    require(not failed, "; ".join(failed))


def define_flags() -> None:
    flags.DEFINE_string("kernel", None, "this kernel alone")


def main(overrides: Sequence[str], tunables: Sequence[Tunable]) -> None:
    require(not overrides, "`benchmark tune` takes no --config fields")
    device = jax.devices()[0]
    require(is_hopper(device), f"`benchmark tune` needs a Hopper GPU; the default device is {device.device_kind}")
    known = [tunable.kernel for tunable in tunables]
    chosen = [tunable for tunable in tunables if flags.FLAGS.kernel in (None, tunable.kernel)]
    require(chosen, f"--kernel={flags.FLAGS.kernel}: no such kernel; there are {', '.join(known)}")
    tune(chosen, TABLE, flags.FLAGS.only)
