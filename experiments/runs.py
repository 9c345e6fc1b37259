"""Opening a finished or running experiment by its workdir."""

from pathlib import Path
from typing import NamedTuple

import jax

from dsv3.config import Config
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.train.checkpoint import Checkpoints, open_run, placed
from dsv3.train.step import init_state


class Run(NamedTuple):
    """The newest checkpoint of a run: `variables` holds the collections `params` and `routing`."""

    config: Config
    tokenizer: Tokenizer
    variables: dict


def load_run(workdir: Path) -> Run:
    """Restore the newest checkpoint below `workdir`. Raises `UserError` where there is none."""
    with Checkpoints(open_run(workdir)) as checkpoints:
        config, tokenizer_json, _ = checkpoints.describe()
        model = Transformer(config.model, reference_ops())
        abstract = jax.eval_shape(lambda: init_state(model, config.train))
        variables = checkpoints.restore_variables(placed(abstract))
    return Run(config, Tokenizer.from_json(tokenizer_json), variables)
