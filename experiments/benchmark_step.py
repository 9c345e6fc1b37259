"""One training step of a config on random tokens: time, MFU, memory, and where the time goes.

    python -m experiments.benchmark step --config=FILE [--config.FIELD=VALUE ...] [--profile=DIR]
"""

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from dsv3.config import Config, require
from dsv3.model.batch import Batch
from dsv3.model.flops import train_flops_per_token
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import BATCH, make_mesh, place_global
from dsv3.parallel.ops import make_ops
from dsv3.train.profile import breakdown
from dsv3.train.step import Knobs, StepMetrics, TrainState, make_init, make_recipe, make_train_step
from dsv3.train.throughput import peak_flops
from experiments import launch
from experiments.benchmark_record import record, write_json

WARM_UP = 3
TRACED = 2


def define_flags() -> None:
    """Not on import: the tests of several launchers run in one process, and other launchers have a --config too."""
    flags.DEFINE_string("config", None, "a file with get_config()")
    flags.DEFINE_integer("steps", 8, "timed steps; the median is reported", lower_bound=1)
    flags.DEFINE_string("profile", None, "write a profiler trace to this directory and print its breakdown by kind")


def random_batches(config: Config) -> Batch:
    """The micro-batches of one step of the last batch-size phase: random tokens, all of them counted."""
    c = config.train
    rows = c.micro_batch_size * config.mesh.data
    shape = (c.batch_size[-1].end // rows, rows, c.seq_len)
    row = np.random.default_rng(0).integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
    return Batch(row[..., :-1], row[..., 1:], np.ones(shape, np.float32), np.ones(shape, np.int32))


class Bench(NamedTuple):
    """A lowered step and what it is called with. The state's buffers are donated: every run gives the next Bench."""

    config: Config
    lowered: jax.stages.Lowered
    state: TrainState
    batches: Batch
    knobs: Knobs

    def run(self, step: Callable) -> tuple["Bench", StepMetrics]:
        state, metrics = jax.block_until_ready(step(self.state, self.batches, self.knobs))
        return self._replace(state=state), metrics


def prepare(config: Config, ops: Ops) -> Bench:
    model = Transformer(config.model, ops)
    mesh = make_mesh(config.mesh)
    recipe = make_recipe(model, config.train, False, mesh)
    state, knobs = make_init(recipe)(np.uint32(config.train.seed)), Knobs(*map(np.float32, (1e-3, 1e-3, 0.3, 1e-4)))
    batches = place_global(mesh, random_batches(config), BATCH)
    lowered = make_train_step(recipe).lower(state, batches, knobs)
    return Bench(config, lowered, state, batches, knobs)


def measure(bench: Bench, repeats: int) -> tuple[dict, Bench]:
    """Seconds to compile and (median) to run a step, tokens a second, MFU, GiB, and lines of the lowered program."""
    start = time.perf_counter()
    step = bench.lowered.compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        bench, metrics = bench.run(step)
        times.append(time.perf_counter() - start)
    times, tokens = sorted(times[WARM_UP:]), bench.batches.tokens_BT.size
    seconds, config = statistics.median(times), bench.config
    flops, peak = train_flops_per_token(config.model, config.train.seq_len), peak_flops() * config.mesh.data
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "step_seconds": seconds, "fastest_seconds": times[0], "slowest_seconds": times[-1],
        "compile_seconds": compile_seconds, "program_lines": len(bench.lowered.as_text().splitlines()),
        "tokens": tokens, "tokens_per_second": tokens / seconds,
        "mfu": flops * tokens / seconds / peak,
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2 ** 30, "final_loss": float(metrics.loss),
    }, bench


def profiled(bench: Bench, directory: str) -> dict[str, float]:
    """Seconds by kind of operation, from a trace of the step compiled once more without CUDA graphs.

    A kernel launched from a graph does not say which operation it belongs to.
    """
    on_gpu = jax.devices()[0].platform == "gpu"
    step = bench.lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""} if on_gpu else None)
    bench, _ = bench.run(step)
    with jax.profiler.trace(directory):
        for _ in range(TRACED):
            bench, _ = bench.run(step)
    return breakdown(directory, step.as_text(), TRACED)


def main(overrides: Sequence[str]) -> None:
    require(flags.FLAGS.config is not None, "--config=FILE is missing; try --config=configs/small_moe.py")
    config = launch.load_config(flags.FLAGS.config, overrides)
    figures, bench = measure(prepare(config, make_ops(config.kernels, config.recipe)), flags.FLAGS.steps)
    micro = config.train.micro_batch_size
    print(f"{jax.devices()[0].device_kind}, jax {version('jax')}: {flags.FLAGS.config} {' '.join(overrides)}")
    print(f"{figures['tokens'] // config.train.seq_len} rows of {config.train.seq_len} tokens a step, {micro} at once, "
          f"recomputation {config.model.remat}, {config.model.scan_unroll} layers a scan step\n")
    print(f"step {1e3 * figures['step_seconds']:.1f} ms ({1e3 * figures['fastest_seconds']:.1f} to "
          f"{1e3 * figures['slowest_seconds']:.1f} over {flags.FLAGS.steps}), "
          f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.1%}, "
          f"peak {figures['peak_gib']:.1f} GiB, compiled in {figures['compile_seconds']:.1f} s", flush=True)
    write_json(record("step", figures))
    if flags.FLAGS.profile:
        figures["breakdown_seconds"] = profiled(bench, flags.FLAGS.profile)
        for kind, seconds in figures["breakdown_seconds"].items():
            print(f"{1e3 * seconds:10.2f} ms  {kind}")
        write_json(record("step", figures))
