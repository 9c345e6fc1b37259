"""One training step of a config on random tokens: time, MFU, memory, and where the time goes."""

import json
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dsv3.config import Config, require
from dsv3.model.batch import Batch
from dsv3.model.flops import train_flops_per_token
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.ops import make_ops
from dsv3.train.profile import breakdown
from dsv3.train.step import Knobs, init_state, make_train_step
from dsv3.train.throughput import peak_flops
from experiments import launch

CONFIG = flags.DEFINE_string("config", None, "step: a file with get_config()")
KERNELS = flags.DEFINE_string("kernels", "auto", "step: auto, reference or require")
STEPS = flags.DEFINE_integer("steps", 8, "step: timed steps; the median is reported")
PROFILE = flags.DEFINE_string("profile", None, "step: write a profiler trace here and print its breakdown by kind")
WARM_UP = 3
TRACED = 2


def write_json(figures) -> None:
    """To `--json`, if that is given."""
    if flags.FLAGS.json:
        Path(flags.FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")


def random_batches(config: Config) -> Batch:
    """The micro-batches of one step of the last batch-size phase: random tokens, all of them counted."""
    c = config.train
    shape = (c.batch_size[-1].end // c.micro_batch_size, c.micro_batch_size, c.seq_len)
    row = np.random.default_rng(0).integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
    return Batch(row[..., :-1], row[..., 1:], np.ones(shape, np.float32), np.ones(shape, np.int32))


def measure(config: Config, ops: Ops, repeats: int, profile: str | None = None) -> dict:
    """Seconds to compile and (median) to run a training step, tokens a second, MFU, GiB, lines of the lowered program.

    With `profile`, the step is compiled once more without CUDA graphs, which hide what a kernel belongs to, and traced.
    """
    model = Transformer(config.model, ops)
    state = jax.jit(lambda: init_state(model, config.train))()
    batches, knobs = jax.device_put(random_batches(config)), Knobs(*map(np.float32, (1e-3, 1e-3, 0.3)))
    lowered = make_train_step(model, config.train, False).lower(state, batches, knobs)
    start = time.perf_counter()
    step = lowered.compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batches, knobs))
        times.append(time.perf_counter() - start)
    seconds, tokens = statistics.median(times[WARM_UP:]), batches.tokens_BT.size
    memory = jax.devices()[0].memory_stats() or {}
    figures = {
        "step_seconds": seconds, "fastest_seconds": min(times[WARM_UP:]), "slowest_seconds": max(times[WARM_UP:]),
        "compile_seconds": compile_seconds, "program_lines": len(lowered.as_text().splitlines()),
        "tokens": tokens, "tokens_per_second": tokens / seconds,
        "mfu": train_flops_per_token(config.model, config.train.seq_len) * tokens / seconds / peak_flops(),
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2 ** 30, "final_loss": float(metrics.loss),
    }
    if profile:
        on_gpu = jax.devices()[0].platform == "gpu"
        plain = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""} if on_gpu else None)
        state, _ = jax.block_until_ready(plain(state, batches, knobs))
        with jax.profiler.trace(profile):
            for _ in range(TRACED):
                state, metrics = plain(state, batches, knobs)
            jax.block_until_ready(metrics)
        figures["breakdown_seconds"] = breakdown(profile, plain.as_text(), TRACED)
    return figures


def main(overrides: Sequence[str]) -> None:
    require(CONFIG.value is not None, "--config=FILE is missing; try --config=configs/small_moe.py")
    config = launch.load_config(CONFIG.value, overrides)
    figures = measure(config, make_ops(KERNELS.value), STEPS.value, PROFILE.value)
    micro = config.train.micro_batch_size
    print(f"{jax.devices()[0].device_kind}, jax {version('jax')}: {CONFIG.value} {' '.join(overrides)}")
    print(f"{figures['tokens'] // config.train.seq_len} rows of {config.train.seq_len} tokens a step, {micro} at once, "
          f"recomputation {config.model.remat}, {config.model.scan_unroll} layers a scan step\n")
    print(f"step {1e3 * figures['step_seconds']:.1f} ms ({1e3 * figures['fastest_seconds']:.1f} to "
          f"{1e3 * figures['slowest_seconds']:.1f} over {STEPS.value}), {figures['tokens_per_second']:,.0f} tokens/s, "
          f"MFU {figures['mfu']:.1%}, peak {figures['peak_gib']:.1f} GiB, "
          f"compiled in {figures['compile_seconds']:.1f} s")
    for kind, seconds in figures.get("breakdown_seconds", {}).items():
        print(f"{1e3 * seconds:10.2f} ms  {kind}")
    write_json(figures)
