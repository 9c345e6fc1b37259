"""Everything a run needs to continue, through Orbax: state, progress, configuration and tokenizer in one step."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dsv3.config import Config, UserError, from_dict, to_dict
from dsv3.train.step import TrainState


class Progress(NamedTuple):
    """Where the run stands: consumed tokens (an exact Python integer), which also say how many rows were read."""

    tokens: int


class Checkpoint(NamedTuple):
    """What changes from step to step."""

    state: TrainState
    progress: Progress


class Description(NamedTuple):
    """What does not: the configuration, the tokenizer's JSON, and the sha256 of every file of the prepared data."""

    config: Config
    tokenizer: str
    data: dict[str, str]


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`, newest `keep` kept. Use as a context manager.

    Saves are asynchronous; leaving the context waits for them. Each checkpoint holds `params`, `routing`, `opt_state`
    and `step` as items of their own, `progress`, and `description`: enough to continue or to generate from it alone.
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

    def save(self, checkpoint: Checkpoint, description: Description) -> None:
        """Save under the state's own step; a step that is already there is left alone."""
        step = int(checkpoint.state.step)
        if step == self.latest_step():
            return
        state = {name: ocp.args.StandardSave(tree) for name, tree in _items(checkpoint.state).items()}
        self._manager.save(step, args=ocp.args.Composite(
            **state, progress=ocp.args.JsonSave(checkpoint.progress._asdict()),
            description=ocp.args.JsonSave(description._asdict() | {"config": to_dict(description.config)})))

    def restore(self, abstract_state: TrainState) -> Checkpoint:
        """The newest checkpoint, onto the shapes, dtypes and shardings of `abstract_state`."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract_state).items()}
        restored = self._manager.restore(
            self.latest_step(), args=ocp.args.Composite(**items, progress=ocp.args.JsonRestore()))
        empty = {name: tree for name, tree in abstract_state._asdict().items() if name not in items}
        state = TrainState(**{name: restored[name] for name in items} | empty)
        return Checkpoint(state._replace(step=state.step["step"]), Progress(**restored.progress))

    def restore_variables(self, abstract_state: TrainState) -> dict[str, Any]:
        """`params` and `routing` alone, as the model's `apply` takes them; the optimizer's state is not read."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract_state).items()
                 if name in ("params", "routing")}
        restored = self._manager.restore(self.latest_step(), args=ocp.args.Composite(**items))
        return {"routing": {}} | {name: restored[name] for name in items}

    def describe(self) -> Description:
        """The newest checkpoint's configuration, tokenizer and data."""
        restored = self._manager.restore(
            self.latest_step(), args=ocp.args.Composite(description=ocp.args.JsonRestore())).description
        return Description(**restored | {"config": from_dict(Config, restored["config"])})


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that hold arrays, as Orbax wants them: trees, not leaves, and none of them empty."""
    items = state._asdict() | {"step": {"step": state.step}}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


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
