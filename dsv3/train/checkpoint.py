"""Everything a run needs to continue, through Orbax: written in the background, verified when read.

Orbax restores flipped bits without noticing, so every checkpoint carries a fingerprint of each of its arrays, taken
while they were still in the device's memory, and a sha256 of everything else.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsv3.config import Config, UserError, from_dict, require, to_dict
from dsv3.parallel.distributed import barrier
from dsv3.parallel.fingerprint import fingerprints
from dsv3.train import mapped
from dsv3.train.step import TrainState

RECORD = "record"
NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
"""Failures to read that say nothing about the file: too little memory, no right to read, another process that died."""


class Progress(NamedTuple):
    """Where the run stands: tokens consumed, and rows of data taken (both exact Python integers)."""

    tokens: int
    rows: int


class Checkpoint(NamedTuple):
    """What changes from step to step; `ema` is the moving average of the weights on the host, or None."""

    state: TrainState
    ema: chex.ArrayTree | None
    progress: Progress


class Description(NamedTuple):
    """What does not: the configuration, the tokenizer's JSON, and the sha256 of every file of the prepared data.

    Imported weights have read no data: `data` is empty then, and of `config` only the model says anything.
    """

    config: Config
    tokenizer: str
    data: dict[str, str]


class Damaged(Exception):
    """A checkpoint that is not what was saved."""


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`, newest `keep` kept. Use as a context manager.

    Saves are asynchronous and appear by an atomic rename when they are complete; leaving the context waits for them. A
    save that fails (a full disk) is reported and removed, and the checkpoints before it stay. Each checkpoint is
    enough to continue or to generate from it alone.

    In a job of many processes all of them save together, and go on from the same checkpoint. A process that fails waits
    for no other, in here or on its way out: it is the job that ends (`fail_fast`).
    """

    def __init__(self, workdir: Path, *, keep: int | None = None) -> None:
        self._directory, self._keep = (workdir / "checkpoints").resolve(), keep
        self._manager = self._open()
        self._saving: int | None = None
        self._failed: set[int] = set()
        self._newest_is_saved = True

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, cleanup_tmp_directories=self._keep is not None,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier))
        return ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return
        self.wait()
        self._tidy()
        self._manager.close()

    def steps(self) -> list[int]:
        """All finished steps, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> bool:
        """Until the save under way is on disk, or has failed and was reported; whether the newest save is there."""
        if self._saving is not None:
            try:
                self._manager.wait_until_finished()
                self._newest_is_saved = True
            except Exception as error:  # whatever Orbax and TensorStore raise for a disk that fails or is full
                self._report(error)
        self._saving = None
        return self._newest_is_saved

    def _report(self, error: Exception) -> None:
        """Tell of a save that failed and tidy up. In a job of many processes it is raised: all start again together."""
        self._newest_is_saved = False
        if jax.process_count() > 1:
            raise error
        logging.error("the checkpoint of step %s could not be saved (%s); training goes on, the newest good one is %s",
                      self._saving, _line(error), max((s for s in self.steps() if s != self._saving), default="none"))
        try:
            self._manager.close()
        except Exception as again:  # the same failure, told a second time
            logging.debug("closing after a failed save: %s", again)
        self._failed.add(self._saving)
        self._tidy()
        self._manager = self._open()

    def _tidy(self) -> None:
        """Remove what failed saves have left. Again later: other threads of such a save may have gone on writing."""
        for step in self._failed:
            for partial in self._directory.glob(f"{step}.*tmp*"):
                shutil.rmtree(partial, ignore_errors=True)

    def save(self, checkpoint: Checkpoint, description: Description) -> None:
        """Start saving under the state's own step; a step that is already there is left alone.

        Returns when everything is copied out of the device's memory. Waits first for the save before it.
        """
        self.wait()
        self._tidy()
        step = int(checkpoint.state.step)
        if step in self.steps():
            return
        arrays = _arrays(checkpoint.state, checkpoint.ema)
        marks = {name: fingerprints(tree) for name, tree in arrays.items()}
        record = _sealed(checkpoint.progress, description, marks)
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                **{RECORD: ocp.args.JsonSave(record)}))
        except Exception as error:  # as in wait(); a mistake of ours fails the tests, which look for every checkpoint
            self._report(error)
            self._saving = None

    def restore(
        self, abstract_state: TrainState, check: Callable[[Description], None], *, ema: bool, own: bool = True,
    ) -> tuple[Checkpoint, Description] | None:
        """The newest undamaged checkpoint, onto the shapes, dtypes and shardings of `abstract_state`; None if none is.

        `check` sees each checkpoint's description before its arrays are read, and may refuse it with a `UserError`.
        A damaged checkpoint is named in the log and, in one's `own` run, moved to `damaged/` in the workdir. Raises
        `UserError` if all of those are.
        Imported weights come with zeros for everything else, and without a moving average.
        """
        trees = _arrays(abstract_state, _host(abstract_state.params) if ema else None)
        for step in reversed(self.steps()):
            try:
                record = _together(lambda: self._record(step))
                description = _description(record)
                check(description)
                found = _together(lambda: self._read(step, trees, record))
                _together(lambda: self._verify(step, found, record))
            except Damaged as damage:
                if own:
                    self._set_aside(step, damage)
                else:
                    logging.error("checkpoint %s is damaged: %s", self._directory / str(step), damage)
                continue
            state = abstract_state._replace(
                **{name: found[name] for name in found if name in TrainState._fields}, **found["counters"])
            return Checkpoint(state, found.get("ema"), Progress(**record["progress"])), description
        aside = self._directory.parent / "damaged"  # also those that an earlier start has moved
        require(not (aside.exists() and any(aside.iterdir())), f"every checkpoint of {self._directory} is damaged (now "
                f"in {aside}); put a good copy back, choose another workdir, or delete {aside} to begin anew")
        return None

    def restore_variables(self, abstract_state: TrainState, *, ema: bool) -> tuple[dict[str, Any], Description]:
        """`params` and `routing` of the newest undamaged checkpoint, as the model's `apply` takes them.

        With `ema`, the moving average stands in for the weights (`UserError` if the run keeps none). Moves nothing.
        """
        for step in reversed(self.steps()):
            try:
                record = self._record(step)
                require(not ema or "ema" in record["fingerprints"], f"{self._directory.parent} keeps no moving average "
                        "of its weights; train.ema was none")
                trees = _arrays(abstract_state, _host(abstract_state.params))
                wanted = {name: trees[name] for name in ("ema" if ema else "params", "routing") if name in trees}
                found = self._read(step, wanted, record)
                self._verify(step, found, record)
                params = jax.tree.map(jnp.asarray, found["ema"]) if ema else found["params"]
                return {"params": params, "routing": found.get("routing", {})}, _description(record)
            except Damaged as error:
                logging.error("checkpoint %s is damaged: %s", self._directory / str(step), error)
        raise UserError(f"{self._directory} holds no undamaged checkpoint")

    def describe(self) -> Description:
        """The newest readable checkpoint's configuration, tokenizer and data."""
        return _description(self._newest_record())

    def identity(self) -> str:
        """The sha256 of the newest readable record, and so of the fingerprints of its arrays."""
        return hashlib.sha256(json.dumps(self._newest_record()).encode()).hexdigest()

    def _newest_record(self) -> dict[str, Any]:
        for step in reversed(self.steps()):
            try:
                return self._record(step)
            except Damaged as error:
                logging.error("checkpoint %s is damaged: %s", self._directory / str(step), error)
        raise UserError(f"{self._directory} holds no undamaged checkpoint")

    def imported(self) -> tuple[dict[str, Any], Description] | None:
        """The arrays of the newest checkpoint as they are stored, by name, if they are imported weights.

        Raises `UserError` if they are damaged.
        """
        step = max(self.steps(), default=None)
        if step is None or not (self._directory / str(step) / mapped.RECORD_FILE).exists():
            return None
        try:
            record = self._record(step)
            self._verify(step, {}, record)
            with _damage("arrays"):
                return mapped.open_arrays(self._directory / str(step), record["mapped"]), _description(record)
        except Damaged as error:
            raise UserError(f"checkpoint {self._directory / str(step)} is damaged: {error}; import it again") from error

    def _record(self, step: int) -> dict[str, Any]:
        """The sealed record of a step. Raises `Damaged`."""
        with _damage("record"):
            file = self._directory / str(step) / mapped.RECORD_FILE
            if file.exists():
                return _unseal(json.loads(file.read_text()))
            return _unseal(self._restored(step, {RECORD: ocp.args.JsonRestore()})[RECORD])

    def _read(self, step: int, trees: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """The named arrays of a step. Raises `Damaged`."""
        with _damage("arrays"):
            if "mapped" in record:
                wanted = {name: tree for name, tree in trees.items() if name != "ema"}
                return mapped.read(self._directory / str(step), record["mapped"], wanted)
            return self._restored(step, {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()})

    def _verify(self, step: int, found: dict[str, Any], record: dict[str, Any]) -> None:
        """Raise `Damaged` unless the arrays are those of the record. All processes take part: arrays are divided."""
        if "mapped" in record:
            with _damage("arrays"):
                wrong = mapped.damaged(self._directory / str(step), record["mapped"], record["fingerprints"])
        else:
            wrong = [f"{name}/{path}" for name, tree in found.items()
                     for path, value in fingerprints(tree).items() if record["fingerprints"][name].get(path) != value]
        if wrong:
            raise Damaged(f"{len(wrong)} arrays are not what was saved, the first is {wrong[0]}")

    def _restored(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        """Items of a step, read by this process alone: Orbax's manager waits for all of them, also where one fails."""
        rank = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=rank, active_processes={rank})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            restored = reader.restore(self._directory / str(step), args=ocp.args.Composite(**items))
        return {name: restored[name] for name in items}

    def _set_aside(self, step: int, error: Damaged) -> None:
        place = self._directory.parent / "damaged" / str(step)
        logging.error("checkpoint %s is damaged: %s; moved to %s, using the one before",
                      self._directory / str(step), error, place)
        if jax.process_index() == 0:
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            (self._directory / str(step)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()


def _barrier(*, key: str, timeout_ms: int) -> None:
    """What Orbax's threads meet at. One whose save has failed passes by: the others are not coming, but wait for it."""
    if sys.exception() is None:
        barrier(key, timeout_ms / 1000)


@contextmanager
def _damage(part: str) -> Iterator[None]:
    """A flipped bit can make a reader raise anything: all of it is `Damaged`, but for `NOT_DAMAGE`."""
    try:
        yield
    except (Damaged, *NOT_DAMAGE):
        raise
    except Exception as error:
        raise Damaged(f"its {part} cannot be read ({_line(error)})") from error


def _together(stage: Callable[[], Any]) -> Any:
    """`stage()`, if it succeeds on every process of the job; otherwise all of them raise `Damaged`."""
    found, error = None, None
    try:
        found = stage()
    except Damaged as damage:
        error = damage
    if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(error is None)).all():
        error = error or Damaged("another process found the damage")
    if error is not None:
        raise error
    return found


def _arrays(state: TrainState, ema: chex.ArrayTree | None) -> dict[str, Any]:
    """The items of a checkpoint that hold arrays, as Orbax wants them: trees, not leaves, and none of them empty."""
    items = {"params": state.params, "routing": state.routing, "opt_state": state.opt_state,
             "counters": {"step": state.step, "bad_steps": state.bad_steps}, "ema": ema}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _host(params: chex.ArrayTree) -> chex.ArrayTree:
    """Shapes without a sharding: Orbax restores them as NumPy arrays."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), params)


def finish_imported(
    staged: Path, workdir: Path, description: Description, shapes: mapped.Shapes, marks: dict[str, str],
) -> None:
    """Make the arrays in `staged` (`dsv3.train.mapped`), with their fingerprints, step 0 of a run: by a rename."""
    record = _sealed(Progress(tokens=0, rows=0), description, marks, mapped=dict(shapes))
    (staged / mapped.RECORD_FILE).write_text(json.dumps(record))
    (staged / "_CHECKPOINT_METADATA").write_text("{}")  # Orbax lists the step, and warns where this is missing
    (workdir / "checkpoints").mkdir(exist_ok=True)
    staged.rename(workdir / "checkpoints" / "0")


def _sealed(progress: Progress, description: Description, marks: dict[str, Any], **more: Any) -> dict[str, str]:
    """The record of a checkpoint, with the sha256 of it."""
    body = json.dumps({
        "progress": progress._asdict(),
        "description": description._asdict() | {"config": to_dict(description.config)},
        "fingerprints": marks} | more)
    return {"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}


def _unseal(sealed: dict[str, str]) -> dict[str, Any]:
    if hashlib.sha256(sealed["body"].encode()).hexdigest() != sealed["sha256"]:
        raise Damaged("its sha256 does not match")
    return json.loads(sealed["body"])


def _description(record: dict[str, Any]) -> Description:
    fields = record["description"]
    return Description(**fields | {"config": from_dict(Config, fields["config"])})


def _line(error: Exception) -> str:
    """The first line of an error, short enough for a log."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def open_run(workdir: Path) -> Path:
    """`workdir` as an absolute path to a run that has a checkpoint; `UserError` otherwise."""
    if not any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"--workdir={workdir} holds no checkpoint; train one with "
                        f"python -m experiments.pretrain --config=configs/tiny.py --workdir={workdir}")
    return workdir.resolve()
