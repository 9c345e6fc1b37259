"""How long something takes on a device: batches of calls in turn, and the time of its kernels alone from a trace.

A batch of calls between two waits counts what a user gets, launches included; below 200 us those are a part of it. The
profiler's trace has the kernels themselves: `device_seconds`, which is what figures of kernels are stated in.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import jax

from dsv3.train.profile import busy_seconds, module_name

type Batch = Callable[[int], float]
"""Runs so many calls and returns the seconds they took together."""
ROUNDS, BATCH_SECONDS, MOST_CALLS = 5, 0.02, 200
TRACED_CALLS = 10
CACHE_BYTES = 128 * 2 ** 20
"""More than twice the 50 MB of L2: calls take turns over sets of inputs that are larger than this together."""


def n_bytes(tree) -> int:
    """Of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copies_needed(tree) -> int:
    """Sets of inputs of this size that a cache cannot hold all of; at most 8."""
    return min(8, 1 + CACHE_BYTES // max(1, n_bytes(tree)))


def compiled(function: Callable, name: str, inputs: Sequence) -> jax.stages.Compiled:
    """`function` as a program of its own name, without CUDA graphs: inside one, kernels do not say what they are of."""
    def run(*inputs):
        return function(*inputs)

    run.__name__ = run.__qualname__ = "".join(letter if letter.isalnum() else "_" for letter in name)
    on_gpu = jax.devices()[0].platform == "gpu"
    return jax.jit(run).lower(*inputs).compile(
        compiler_options={"xla_gpu_enable_command_buffer": ""} if on_gpu else None)


def jax_batch(program: Callable, sets: Sequence[Sequence]) -> Batch:
    """Calls one after the other, each with the next set of inputs; outputs die at once."""
    def batch(calls: int) -> float:
        start = time.perf_counter()
        for call in range(calls):
            result = program(*sets[call % len(sets)])
        jax.block_until_ready(result)
        return time.perf_counter() - start

    return batch


def calls_of(batch: Batch) -> int:
    """Calls that fill `BATCH_SECONDS`, after a warm-up."""
    batch(2)
    return max(2, min(MOST_CALLS, round(BATCH_SECONDS / max(batch(3) / 3, 1e-9))))


def seconds(batches: dict[str, Batch]) -> dict[str, float]:
    """Median seconds a call of each, over rounds in which they take turns: what slows one round slows all."""
    calls = {name: calls_of(batch) for name, batch in batches.items()}
    rounds = [{name: batch(calls[name]) / calls[name] for name, batch in batches.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(row[name] for row in rounds) for name in batches}


def device_seconds(programs: dict[str, tuple[jax.stages.Compiled, Sequence]]) -> dict[str, float]:
    """Seconds a call in which kernels ran, of compiled programs with their inputs, from one trace of them all."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # other threads may be compiling, and every call of theirs would be an event
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            for program, sets in programs.values():
                jax_batch(program, sets)(TRACED_CALLS)
        modules = [module_name(program.as_text()) for program, _ in programs.values()]
        busy = busy_seconds(directory, modules)
    return {name: took / TRACED_CALLS for name, took in zip(programs, busy, strict=True)}
