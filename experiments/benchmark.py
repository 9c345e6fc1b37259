"""Measures of this machine: python -m experiments.benchmark COMMAND [flags]

Without a word, step time, compile time and program size of small fixed shapes, against committed ratios (`--update`
rewrites them). `step` measures one training step of a config (`--config=FILE`, `--config.FIELD=VALUE`,
`--profile=DIR`). `slice` measures four layers of V3 at full width with the work of one expert-parallel rank.

`gemm`, `grouped`, `quantize`, `norm`, `attention` and `loss` check kernels against float32 references and time them
beside XLA's and, with `--peers`, torch's. `exact` compares products in 8 bits with the model of the tensor core, to
the bit. `tune` sweeps kernels' parameters into dsv3/kernels/tuning.json.

`import` generates a checkpoint of `--gigabytes` in `--scratch` and measures the peak memory and the speed of importing
it. `render` makes the tables of docs/benchmarks.md from docs/benchmarks/*.json, which the others write with
`--json=FILE`.
"""

import os
import sys
from functools import partial

from absl import flags

from experiments import (
    benchmark_attention,
    benchmark_exact,
    benchmark_gemm,
    benchmark_grouped,
    benchmark_import,
    benchmark_loss,
    benchmark_norm,
    benchmark_render,
    benchmark_rows,
    benchmark_shapes,
    benchmark_slice,
    benchmark_step,
    benchmark_table,
    benchmark_tunables,
    benchmark_tune,
    launch,
)

flags.DEFINE_string("json", None, "also write the figures to this file")

if __name__ == "__main__":
    if "--peers" in sys.argv:  # torch and JAX share the card, so neither may take all of it at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    benchmark_step.define_flags()
    benchmark_import.define_flags()
    benchmark_table.define_flags()
    benchmark_tune.define_flags()
    launch.run_command({
        "shapes": benchmark_shapes.main, "step": benchmark_step.main, "slice": benchmark_slice.main,
        "gemm": benchmark_gemm.main, "grouped": benchmark_grouped.main, "quantize": benchmark_rows.main,
        "attention": benchmark_attention.main, "loss": benchmark_loss.main, "norm": benchmark_norm.main,
        "exact": benchmark_exact.main, "import": benchmark_import.main, "render": benchmark_render.main,
        "tune": partial(benchmark_tune.main, tunables=benchmark_tunables.TUNABLES)}, "shapes")
