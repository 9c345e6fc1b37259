"""What every launcher shares: config files with overrides on the command line, and one-line errors."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from absl import app, flags, logging

from dsv3.config import Config, UserError, override, require

PREFIX = "--config."
MISTAKE = 2
"""Exit status of what a restart by itself cannot mend: a bad flag, another configuration, damage, bad numbers."""


def load_module(path: str) -> ModuleType:
    """The Python file of an experiment."""
    require(Path(path).is_file(), f"--config={path} is not a file; try --config=configs/tiny.py")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    require(spec is not None, f"--config={path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"--config={path} cannot be loaded: {error}") from error
    return module


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """`get_config()` of the Python file at `path`, with overrides written `train.steps=200`."""
    module = load_module(path)
    require(hasattr(module, "get_config"), f"--config={path} defines no get_config()")
    config = module.get_config()
    require(isinstance(config, Config), f"get_config() of --config={path} returned {type(config).__name__}, not Config")
    values: dict[str, str] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        require(equals == "=", f"{PREFIX}{name} has no value; write {PREFIX}{name}=VALUE")
        require(name not in values, f"{PREFIX}{name} is given twice; keep one")
        values[name] = value
    return override(config, values)


def fail(error: Exception) -> None:
    """Print an error on one line and exit: `MISTAKE`, or 1 for an `OSError` (a full disk, a host that is away)."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1 if isinstance(error, OSError) else MISTAKE)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with its errors on one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)


def gpu_settings() -> None:
    """What every GPU run wants from XLA, unless the environment says otherwise; docs/benchmarks.md has the reasons."""
    flags_now = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags_now:
        os.environ["XLA_FLAGS"] = f"{flags_now} --xla_gpu_enable_triton_gemm=false".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`app.run`, with `--config.FIELD=VALUE` arguments handed to `main` and a `UserError` printed on one line (`fail`).

    Joins the other processes of a job first (`dsv3/parallel/distributed.py`).
    """
    # Here, because the supervisor of many processes needs no JAX.
    from dsv3.parallel.distributed import fail_fast, initialise
    from dsv3.train.stopping import Stopped

    gpu_settings()
    overrides = [argument.removeprefix(PREFIX) for argument in sys.argv[1:] if argument.startswith(PREFIX)]
    rest = [argument for argument in sys.argv if not argument.startswith(PREFIX)]

    def checked(remaining: Sequence[str]) -> None:
        try:
            require(len(remaining) == 1, f"unexpected argument {remaining[-1]!r}; flags are written --name=value")
            initialise()
            main(overrides)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
        except (UserError, OSError) as error:
            fail(error)

    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
    with fail_fast():
        app.run(checked, argv=rest, flags_parser=parse_flags)


def run_command(mains: dict[str, Callable[[Sequence[str]], None]], default: str) -> None:
    """`run` of the function that the first argument names, or of `default` where that is a flag or missing."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else default
    if name not in mains:
        fail(UserError(f"unknown command {name!r}; expected one of {', '.join(mains)}"))
    run(mains[name])
