"""What a run may begin from: its own checkpoints, those of another run, imported weights."""

from pathlib import Path

from dsv3.config import Config, differences, require, to_dict
from dsv3.data.tokenizer import Tokenizer
from dsv3.train.checkpoint import Checkpoint, Checkpoints, Description
from dsv3.train.step import TrainState

MAY_CHANGE = (
    "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.numerics_every", "train.guard", "train.ema.every", "train.ema.decay", "train.micro_batch_size", "mesh",
    "kernels", "model.remat", "model.scan_unroll", "train.start_from",
)
"""Fields that a continued run may set anew: none of them changes what a step computes, but for rounding."""

MUST_STAY = ("model", "data", "train.seq_len", "train.optimizer.moment_dtype")
"""Fields, but for `MAY_CHANGE`, that a run shares with the one it goes on from: shapes, and the order of the data."""


def _changed(theirs: Config, ours: Config, fields: tuple[str, ...] | None = None) -> list[str]:
    """Lines for the fields (None: all) that differ, but for `MAY_CHANGE`."""
    among = lambda line, names: line.startswith(tuple(f"{name}{end}" for name in names for end in (":", ".")))
    return [line for line in differences(to_dict(theirs), to_dict(ours))
            if not among(line, MAY_CHANGE) and (fields is None or among(line, fields))]


def check_same_run(workdir: Path, config: Config, data: dict[str, str], description: Description) -> None:
    """Raise `UserError` unless a checkpoint's configuration (but for `MAY_CHANGE`) and data are these."""
    changed = _changed(description.config, config)
    require(not changed, f"--workdir={workdir} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another workdir or the same configuration")
    require(description.data == data, f"--workdir={workdir} holds a run that read other data than "
            f"{workdir / 'data'} holds now; restore that directory or choose another workdir")


def check_imported(workdir: Path, config: Config, tokenizer: Tokenizer, description: Description) -> None:
    """Raise `UserError` unless imported weights are of this model, and their tokenizer, if they have one, is this."""
    changed = [line for line in _changed(description.config, config, ("model",))
               if not line.startswith(("model.dtype:", "model.init_std:"))]
    require(not changed, f"--workdir={workdir} holds imported weights of another model ({'; '.join(changed)}); "
            "set config.model as they need it")
    theirs = description.tokenizer and Tokenizer.from_json(description.tokenizer)
    require(not theirs or dict(theirs.pieces()) == dict(tokenizer.pieces()), f"--workdir={workdir} holds imported "
            "weights that read tokens of another vocabulary; set data.tokenizer as they need it")


def other_run(config: Config, abstract_state: TrainState, data: dict[str, str]) -> Checkpoint:
    """Where the run in `config.train.start_from` stands, to go on from there with this configuration.

    data: the sha256 of every file of this run's prepared data. Raises `UserError` if there is no such run, if it has
    another model or other data, keeps a moving average where this one keeps none, or has come as far as this one goes.
    """
    name, keeps_ema = f"train.start_from={config.train.start_from}", config.train.ema is not None

    def check(description: Description) -> None:
        require(bool(description.data), f"{name} holds imported weights; train in that directory instead")
        changed = _changed(description.config, config, MUST_STAY)
        require(not changed, f"{name} is a run of another kind ({'; '.join(changed)}); choose another, or the same "
                "model and data")
        require(description.data == data, f"{name} has read other data; link its data/ into this workdir")
        require((description.config.train.ema is not None) == keeps_ema,
                f"{name} and this run must both keep a moving average (train.ema), or neither")

    directory = Path(config.train.start_from)
    nothing = f"{name} holds no undamaged checkpoint; train that run first"
    require((directory / "checkpoints").is_dir(), nothing)
    with Checkpoints(directory) as checkpoints:
        found = checkpoints.restore(abstract_state, check, ema=keeps_ema, own=False)
    require(found is not None, nothing)
    step = int(found[0].state.step)
    require(step < config.train.steps, f"{name} is at step {step} already; raise train.steps ({config.train.steps})")
    return found[0]
