"""Opening a finished or running experiment by its workdir."""

from pathlib import Path
from typing import NamedTuple

from dsv3.config import Config, MeshConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import make_mesh, on_one_device
from dsv3.train.checkpoint import Checkpoints, open_run
from dsv3.train.step import abstract_state, make_recipe


class Run(NamedTuple):
    """The newest checkpoint of a run: `variables` holds the collections `params` and `routing`."""

    config: Config
    tokenizer: Tokenizer
    variables: dict


def load_run(workdir: Path, *, ema: bool = False) -> Run:
    """Restore the newest undamaged checkpoint below `workdir` onto one device, whatever mesh it was trained on.

    With `ema`, the weights are their moving average. Raises `UserError` where there is none.
    """
    with Checkpoints(open_run(workdir)) as checkpoints:
        config = checkpoints.describe().config
        model = Transformer(config.model, reference_ops())
        recipe = make_recipe(model, config.train, config.data.segment_ids, make_mesh(MeshConfig(data=1)))
        variables, description = checkpoints.restore_variables(abstract_state(recipe), ema=ema)
    text = description.tokenizer  # "": imported weights without one, which is missed when text is wanted
    tokenizer = Tokenizer.from_json(text) if text else Tokenizer("")
    return Run(description.config, tokenizer, on_one_device(variables))
