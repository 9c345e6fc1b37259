"""Step time, compile time and program size on this machine: python -m experiments.benchmark [--json=FILE]

The model has layers of width 128 (one dense), 8 experts, top 2, a vocabulary of 2,048, and reads 512 tokens a step in
float32, with and without an MTP module; two depths, because compile time should not grow with depth.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dsv3.config import Config, constant, require
from dsv3.model.batch import Batch
from dsv3.model.flops import train_flops_per_token
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import make_mesh
from dsv3.train.step import Knobs, init_state, make_train_step
from dsv3.train.throughput import peak_flops
from experiments import launch

JSON = flags.DEFINE_string("json", None, "also write the figures to this file")
REPEATS = flags.DEFINE_integer("repeats", 20, "timed steps; the median is reported")


def benchmark_config(n_layers: int, mtp_depth: int) -> Config:
    """`configs/tiny.py` at width 128 without recomputation, reading 2 rows of 256 tokens."""
    tiny = launch.load_config("configs/tiny.py", [])
    mtp = dataclasses.replace(tiny.model.mtp, depth=mtp_depth)
    model = dataclasses.replace(tiny.model, dim=128, n_layers=n_layers, mtp=mtp, remat="none")
    train = dataclasses.replace(tiny.train, micro_batch_size=2, batch_size=constant(2), batch_increment=2)
    return dataclasses.replace(tiny, model=model, train=train)


def random_batches(config: Config) -> Batch:
    """One micro-batch of random tokens, all of them counted."""
    shape = (1, config.train.micro_batch_size, config.train.seq_len)
    row = np.random.default_rng(0).integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
    return Batch(row[..., :-1], row[..., 1:], np.ones(shape, np.float32), np.ones(shape, np.int32))


def measure(config: Config, repeats: int) -> dict:
    """Seconds to compile and to run a training step, and the lines of its lowered program."""
    model = Transformer(config.model, reference_ops())
    mesh = make_mesh(config.mesh)
    state = init_state(model, config.train, mesh)
    batches, knobs = random_batches(config), Knobs(*map(np.float32, (1e-3, 1e-3, 0.3)))
    lowered = make_train_step(model, config.train, False, mesh).lower(state, batches, knobs)
    start = time.perf_counter()
    step = lowered.compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batches, knobs))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[3:])
    flops = train_flops_per_token(config.model, config.train.seq_len) * batches.tokens_BT.size
    return {
        "layers": config.model.n_layers, "mtp": config.model.mtp.depth, "step_seconds": seconds,
        "compile_seconds": compile_seconds, "program_lines": len(lowered.as_text().splitlines()),
        "mfu": flops / seconds / peak_flops(), "final_loss": float(metrics.loss),
    }


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "the benchmark has fixed shapes; --config fields cannot be set here")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [measure(benchmark_config(*shape), REPEATS.value) for shape in ((4, 0), (4, 1), (16, 1))]
    print(f"{jax.devices()[0].device_kind}, jax {version('jax')}: 512 tokens a step, width 128, 8 experts\n")
    print("layers   MTP   step (ms)   compile (s)   program lines   MFU")
    for row in rows:
        print(f"{row['layers']:6d} {row['mtp']:5d} {1e3 * row['step_seconds']:11.1f} {row['compile_seconds']:13.1f} "
              f"{row['program_lines']:15d} {row['mfu']:5.0%}")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    launch.run(main)
