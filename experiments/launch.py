"""What every launcher shares: config files with overrides on the command line, and one-line errors."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, logging

from dsv3.config import Config, UserError, override, require

PREFIX = "--config."


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """`get_config()` of the Python file at `path`, with overrides written `train.steps=200`."""
    require(Path(path).is_file(), f"--config={path} is not a file; try --config=configs/tiny.py")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    require(spec is not None, f"--config={path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "get_config"), f"--config={path} defines no get_config()")
    config = module.get_config()
    require(isinstance(config, Config), f"get_config() of --config={path} returned {type(config).__name__}, not Config")
    pairs = [text.partition("=") for text in overrides]
    for name, equals, _ in pairs:
        require(equals == "=", f"{PREFIX}{name} has no value; write {PREFIX}{name}=VALUE")
    return override(config, {name: value for name, _, value in pairs})


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`app.run`, with `--config.FIELD=VALUE` arguments handed to `main` and a `UserError` printed on one line."""
    overrides = [argument.removeprefix(PREFIX) for argument in sys.argv[1:] if argument.startswith(PREFIX)]
    rest = [argument for argument in sys.argv if not argument.startswith(PREFIX)]

    def checked(remaining: Sequence[str]) -> None:
        try:
            require(len(remaining) == 1, f"unexpected argument {remaining[-1]!r}; flags are written --name=value")
            main(overrides)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
    app.run(checked, argv=rest)
