"""Measures of this machine: python -m experiments.benchmark COMMAND [flags]

Without a word, step time, compile time and program size of small fixed shapes, against committed ratios (`--update`
rewrites them). `step` measures one training step of a config (`--config=FILE`, `--config.FIELD=VALUE`,
`--profile=DIR`). `slice` measures four layers of V3 at full width with the work of one expert-parallel rank.

A table each: `gemm`, `grouped`, `quantize`, `norm`, `attention` and `loss` check kernels against float32 references
and time them beside XLA's and, with `--peers`, torch's; `exact` compares products in 8 bits with the model of the
tensor core, to the bit. `tune` sweeps kernels' parameters into dsv3/kernels/tuning.json.

`import` generates a checkpoint of `--gigabytes` in `--scratch` and measures the peak memory and the speed of importing
it. `render` makes the tables of docs/benchmarks.md from docs/benchmarks/*.json, which the others write with
`--json=FILE`. `COMMAND --help` says more of each.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

from absl import flags

from dsv3.config import require
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
from experiments.benchmark_record import check_json

DEFAULT = "shapes"
TABLES = {"gemm": benchmark_gemm, "grouped": benchmark_grouped, "quantize": benchmark_rows,
          "attention": benchmark_attention, "loss": benchmark_loss, "norm": benchmark_norm, "exact": benchmark_exact}


class Command(NamedTuple):
    """What its module's `main` measures, or `main`, and the flags that it reads."""

    module: ModuleType
    flags: tuple[str, ...]
    main: Callable[[Sequence[str]], None] | None = None


COMMANDS = {
    "shapes": Command(benchmark_shapes, ("repeats", "update", "json")),
    "step": Command(benchmark_step, ("config", "steps", "profile", "json")),
    "slice": Command(benchmark_slice, ("peers", "steps", "profile", "json")),
    **{name: Command(module, ("only", "peers", "soak", "json")) for name, module in TABLES.items()},
    "import": Command(benchmark_import, ("gigabytes", "scratch")),
    "render": Command(benchmark_render, ()),
    "tune": Command(benchmark_tune, ("kernel", "only"),
                    partial(benchmark_tune.main, tunables=benchmark_tunables.TUNABLES)),
}


def define_flags() -> None:
    """Of all commands, but for those of `shapes`."""
    flags.DEFINE_string("json", None, "also write the figures to this file")
    for module in benchmark_step, benchmark_import, benchmark_table, benchmark_tune:
        module.define_flags()


def readers(flag: str) -> str:
    """The commands that read a flag; the tables, which read the same, by one word."""
    names = ("a table" if name in TABLES else name for name, command in COMMANDS.items() if flag in command.flags)
    return ", ".join(dict.fromkeys(names))


def manual(name: str | None) -> str:
    """What a command, or the whole program, is and reads: a line a flag, with its default."""
    if name is None:
        about, own = __doc__, dict.fromkeys(flag for command in COMMANDS.values() for flag in command.flags)
    else:
        about, own = COMMANDS[name].module.__doc__, COMMANDS[name].flags
    text = about.strip() + "\n"
    for flag in own:
        defined = flags.FLAGS[flag]
        written = f"--{flag}" if defined.boolean else f"--{flag}={flag.upper()}"
        default = "" if defined.default in (None, False, "") else f", {defined.default} by default"
        text += f"\n  {written:22s}{readers(flag) + ': ' if name is None else ''}{defined.help}{default}"
    return text + "\n"


def run(name: str, overrides: Sequence[str]) -> None:
    """A command, after a look at what would only be found out in the end, if at all.

    With `--peers` torch and JAX share the card, so neither may take all of it at once.
    """
    command = COMMANDS[name]
    every = dict.fromkeys(flag for other in COMMANDS.values() for flag in other.flags)
    unread = [f"--{flag}" for flag in every if flags.FLAGS[flag].present and flag not in command.flags]
    require(not unread, f"`benchmark {name}` does not read {', '.join(unread)}; `benchmark {name} --help` says what it "
            "does")
    check_json()
    if flags.FLAGS.peers:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when the first device is asked for
    (command.main or command.module.main)(overrides)


def main(arguments: Sequence[str]) -> None:
    define_flags()
    if {"--help", "-help", "-h"} & set(arguments):
        words = [argument for argument in arguments[:1] if not argument.startswith("-")]
        if not words or words[0] in COMMANDS:
            print(manual(*words or [None]), end="")
            return
    launch.run_command({name: partial(run, name) for name in COMMANDS}, DEFAULT)


if __name__ == "__main__":
    main(sys.argv[1:])
