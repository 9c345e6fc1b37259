"""Measures of this machine: python -m experiments.benchmark COMMAND [flags]

Without a word, step time, compile time and program size of small fixed shapes, against committed ratios (`--update`
rewrites them). `step` measures one training step of a config (`--config=FILE`, `--config.FIELD=VALUE`,
`--profile=DIR`). `slice` measures four layers of V3 at full width with the work of one expert-parallel rank. `kernels` checks every Hopper kernel against its reference and times it. `import` generates a
checkpoint of `--gigabytes` in `--scratch` and measures the peak memory and the speed of importing it.
"""

from absl import flags

from experiments import (
    benchmark_import,
    benchmark_kernels,
    benchmark_shapes,
    benchmark_slice,
    benchmark_step,
    launch,
)

flags.DEFINE_string("json", None, "also write the figures to this file")

if __name__ == "__main__":
    benchmark_step.define_flags()
    benchmark_import.define_flags()
    launch.run_command({
        "shapes": benchmark_shapes.main, "step": benchmark_step.main, "kernels": benchmark_kernels.main, "slice": benchmark_slice.main,
        "import": benchmark_import.main}, "shapes")
