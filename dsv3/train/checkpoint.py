"""Everything a run needs to continue, through Orbax: state, progress, configuration and tokenizer in one step."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dsv3.config import Config, UserError, from_dict, to_dict
from dsv3.train.step import TrainState


class Progress(NamedTuple):
    """Where the run stands: consumed tokens (an exact Python integer) and the state of the data iterator."""

    tokens: int
    loader: dict[str, Any]


class Checkpoint(NamedTuple):
    """What `Checkpoints.restore` returns."""

    state: TrainState
    progress: Progress


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`, newest `keep` kept. Use as a context manager.

    Saves are asynchronous; leaving the context waits for them. Each checkpoint holds parameters, routing, optimizer,
    step, consumed tokens, data iterator, configuration and tokenizer: enough to continue or to generate from it alone.
    """

    def __init__(self, workdir: Path, *, keep: int | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, checkpoint: Checkpoint, config: Config, tokenizer_json: str) -> None:
        """Save under the state's own step; a step that is already there is left alone."""
        step = int(checkpoint.state.step)
        if step == self.latest_step():
            return
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(checkpoint.state),
            progress=ocp.args.JsonSave(checkpoint.progress._asdict()),
            config=ocp.args.JsonSave(to_dict(config)),
            tokenizer=ocp.args.JsonSave({"json": tokenizer_json})))

    def restore(self, abstract_state: TrainState) -> Checkpoint:
        """The newest checkpoint, onto the shapes, dtypes and shardings of `abstract_state`."""
        restored = self._manager.restore(self.latest_step(), args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), progress=ocp.args.JsonRestore()))
        return Checkpoint(TrainState(*restored.state), Progress(**restored.progress))

    def restore_description(self) -> tuple[Config, str]:
        """The newest checkpoint's configuration and tokenizer (its JSON)."""
        restored = self._manager.restore(self.latest_step(), args=ocp.args.Composite(
            config=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore()))
        return from_dict(Config, restored.config), restored.tokenizer["json"]


def placed(abstract_state: TrainState) -> TrainState:
    """`abstract_state` with every array on the default device, as `restore` wants it."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_state)


def open_run(workdir: Path) -> Path:
    """`workdir` as an absolute path to a run that has a checkpoint; `UserError` otherwise."""
    if not any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"--workdir={workdir} holds no checkpoint; train one with "
                        f"python -m experiments.pretrain --config=configs/tiny.py --workdir={workdir}")
    return workdir.resolve()
