"""The training loop: data in, steps, validation, checkpoints and metrics out; the same call continues a run."""

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dsv3.config import Config, UserError, require, to_dict
from dsv3.data.loader import train_loader
from dsv3.data.prepare import Prepared, prepare
from dsv3.model.batch import Batch
from dsv3.model.flops import train_flops_per_token
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.distributed import barrier, is_main
from dsv3.parallel.fingerprint import check_replicas
from dsv3.parallel.mesh import make_mesh, on_one_device, place_like, place_local
from dsv3.train import schedule
from dsv3.train.beginning import check_imported, check_same_run, other_run
from dsv3.train.checkpoint import Checkpoint, Checkpoints, Description, Progress
from dsv3.train.diagnosis import Diverged, first_nonfinite
from dsv3.train.ema import HostEMA, initial_average
from dsv3.train.metrics import MetricsWriter, read_metrics, step_record
from dsv3.train.numerics import NumericsWriter, numerics
from dsv3.train.plots import plot_expert_load, plot_loss
from dsv3.train.spikes import SpikeDetector
from dsv3.train.step import Knobs, Recipe, TrainState, abstract_state, make_init, make_recipe, make_train_step
from dsv3.train.stopping import Stopped, StopRequest
from dsv3.train.throughput import Timer, peak_flops
from dsv3.train.validation import Validation, make_validation


class Profile(NamedTuple):
    """Which steps of this session to write a trace of, for TensorBoard: after the first compilation has settled."""

    directory: Path
    skip: int = 10
    steps: int = 3

    def of(self, first: int, end: int) -> range:
        """The steps to trace of those from `first` up to `end`: fewer are skipped where there are few."""
        start = min(first + self.skip, max(first, end - self.steps))
        return range(start, min(start + self.steps, end))


class Result(NamedTuple):
    """What `train` returns.

    The final state, its validation and that of the averaged weights (None without `train.ema`), the data that it read,
    and the speed of this session's steps (0 if the run had ended before).
    """

    state: TrainState
    validation: Validation
    ema_validation: Validation | None
    prepared: Prepared
    tokens_per_second: float


def open_workdir(workdir: Path) -> None:
    """Create `workdir`. Raises `UserError` for a path that cannot be a directory to write in."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be a directory to write in: {error.strerror}") from error


def open_data(config: Config, workdir: Path) -> Prepared:
    """The prepared data of a run. Process 0 builds what is missing; the others wait for it."""
    directory = (workdir / "data").resolve()  # may be a link to data that several runs share
    load = lambda: prepare(config.data, config.train.seq_len, directory)
    prepared = load() if is_main() else None
    barrier("data prepared", timeout_s=24 * 3600)
    prepared = prepared or load()
    require(prepared.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {prepared.tokenizer.vocab_size} tokens, more than model.vocab_size "
            f"{config.model.vocab_size}; raise model.vocab_size or lower data.bpe_vocab_size")
    return prepared


def knobs_at(config: Config, step: int, tokens: int) -> Knobs:
    """The scheduled values of step `step`, which starts at `tokens` consumed tokens."""
    train = config.train
    return Knobs(*(np.float32(value) for value in (
        schedule.learning_rate(train, step, tokens),
        schedule.value(train.bias_update_speed, tokens),
        schedule.value(train.mtp_lambda, tokens),
        train.balance_alpha)))


def train(
    config: Config, workdir: Path, ops: Ops, profile: Profile | None = None, watching: Ops | None = None,
) -> Result:
    """Train until `config.train.steps`, from the newest good checkpoint in `workdir`, or `train.start_from`, or step 0.

    Writes `config.json`, `data/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`, `expert_load.png`; with
    `train.numerics_every` also `numerics.jsonl`, measured by the bundle `watching` (`model/watching_ops.py`).
    Every process of a job calls it alike; process 0 writes. Raises `Stopped` after SIGTERM, with everything saved, and
    `UserError` when the run cannot go on: too many bad steps in a row (`Diverged`), or replicas that disagree.
    """
    require(config.train.numerics_every is None or watching is not None, "train.numerics_every is "
            f"{config.train.numerics_every}, but this program has no bundle that measures; set it to None")
    mesh = make_mesh(config.mesh)
    open_workdir(workdir)
    prepared = open_data(config, workdir)
    recipe = make_recipe(Transformer(config.model, ops), config.train, config.data.segment_ids, mesh)
    data = prepared.manifest["files"]
    check = lambda description: (
        check_same_run(workdir, config, data, description) if description.data
        else check_imported(workdir, config, prepared.tokenizer, description))
    with Checkpoints(workdir, keep=config.train.keep_checkpoints) as checkpoints, contextlib.ExitStack() as stack:
        start = _start(config, recipe, checkpoints, check, data)
        step = int(start.state.step)
        ema = start.ema and stack.enter_context(HostEMA(config.train.ema, start.ema))
        writer = stack.enter_context(MetricsWriter(workdir, step)) if is_main() else None
        if writer:
            (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        run = _Run(config, recipe, prepared, checkpoints, ema, writer)
        if config.train.numerics_every:
            run.watching = recipe._replace(model=Transformer(config.model, watching))
            run.numerics_writer = stack.enter_context(NumericsWriter(workdir, step)) if is_main() else None
        run.spikes_so_far(read_metrics(workdir / "metrics.jsonl"))
        with StopRequest(mesh) as stop:
            state = run.steps(start.state, start.progress, stop, profile)
    if is_main():
        records = list(read_metrics(workdir / "metrics.jsonl"))
        plot_loss(records, workdir / "loss.png")
        plot_expert_load(records, workdir / "expert_load.png")
    return Result(state, *(run.scores or run.score(state)), prepared, run.timer.tokens_per_second())


def _start(config: Config, recipe: Recipe, checkpoints: Checkpoints, check, data: dict[str, str]) -> Checkpoint:
    """The newest good checkpoint of this run, or of the one that it goes on from, or step 0."""
    keeps_ema = config.train.ema is not None
    restored = checkpoints.restore(abstract_state(recipe), check, ema=keeps_ema)
    if restored is None and config.train.start_from:
        return other_run(config, abstract_state(recipe), data)
    if restored is not None:
        start = restored[0]
        fresh = keeps_ema and start.ema is None  # imported weights
        return start._replace(ema=initial_average(start.state.params)) if fresh else start
    state = make_init(recipe)(np.uint32(config.train.seed))
    return Checkpoint(state, initial_average(state.params) if keeps_ema else None, Progress(tokens=0, rows=0))


class _Run:
    """The parts of a run that every step touches."""

    def __init__(self, config: Config, recipe: Recipe, prepared: Prepared,
                 checkpoints: Checkpoints, ema: HostEMA | None, writer: MetricsWriter | None) -> None:
        self.config, self.model, self.mesh, self.prepared = config, recipe.model, recipe.mesh, prepared
        self.checkpoints, self.ema, self.writer = checkpoints, ema, writer
        self.validate = make_validation(recipe.model, config, prepared, recipe.mesh)
        self.train_step = make_train_step(recipe)
        self.flops_per_token = train_flops_per_token(config.model, config.train.seq_len)
        self.peak_flops = peak_flops() * recipe.mesh.size
        self.spikes = SpikeDetector(config.train.guard)
        self.timer = Timer()
        self.pending: list[tuple[dict[str, Any], Any]] = []
        self.shapes: set[int] = set()
        self.batches: Batch | None = None
        self.watching: Recipe | None = None
        self.numerics_writer: NumericsWriter | None = None
        self.line, self.bad = "", False
        self.scores: tuple[Validation, Validation | None] | None = None

    def spikes_so_far(self, records: Iterator[dict[str, Any]]) -> None:
        """Show the detector the losses of the run before this session."""
        for record in records:
            if "loss" in record:
                self.spikes.is_spike(record["loss"])

    def loader(self, progress: Progress) -> Iterator[Batch]:
        """This process's share of every micro-batch of the mesh, from where `progress` stands."""
        rows = self.config.train.micro_batch_size * self.config.mesh.data
        return train_loader(self.prepared, self.config.data, rows, consumed=progress.rows,
                            process_index=jax.process_index(), process_count=jax.process_count())

    def steps(self, state: TrainState, progress: Progress, stop: StopRequest, profile: Profile | None) -> TrainState:
        """Run all remaining steps."""
        train, loader = self.config.train, self.loader(progress)
        first = int(state.step)
        tracing = profile.of(first, train.steps) if profile else range(0)
        with tqdm(total=train.steps, initial=first, unit="step", disable=None if is_main() else True,
                  dynamic_ncols=True) as bar:
            for step in range(first, train.steps):
                if tracing and step == tracing.start:
                    self.log(state)
                    with self.timer.paused():
                        jax.profiler.start_trace(profile.directory)
                state, progress = self.one_step(state, loader, step, progress)
                done = step + 1
                if tracing and done == tracing.stop:
                    jax.block_until_ready(state)
                    with self.timer.paused():
                        jax.profiler.stop_trace()
                last, stopping = done == train.steps, stop.reached()
                if done % train.log_every == 0 or last:
                    bar.set_postfix_str(self.log(state))
                if done % train.guard.replica_check_every == 0 or last:
                    check_replicas(self.mesh, {"params": state.params, "routing": state.routing})
                if self.watching and done % train.numerics_every == 0:
                    self.measure(state, done, progress)
                if done % train.eval_every == 0 or last:
                    self.evaluate(state, done, progress)
                if last or stopping or (done % train.checkpoint_every == 0 and self.is_good(state)):
                    self.save(state, progress)
                if last or stopping:
                    saved = self.checkpoints.wait()
                    require(saved, f"step {done} is reached, but its checkpoint could not be saved; see the log")
                bar.update()
                if stopping and not last:
                    raise Stopped(f"stopped after step {done}, saved; the same command continues")
        return state

    def one_step(
        self, state: TrainState, loader: Iterator[Batch], step: int, progress: Progress,
    ) -> tuple[TrainState, Progress]:
        """Read a global batch and take one step; its metrics stay on the device until `log` fetches them."""
        config = self.config.train
        sequences = schedule.batch_sequences(config, progress.tokens)
        n_micro = sequences // (config.micro_batch_size * self.config.mesh.data)
        self.batches = jax.tree.map(lambda *parts: np.stack(parts), *itertools.islice(loader, n_micro))
        knobs = knobs_at(self.config, step, progress.tokens)
        compiles = n_micro not in self.shapes
        self.shapes.add(n_micro)
        if compiles:
            self.timer.pause()
        state, metrics = self.train_step(state, place_local(self.mesh, self.batches), knobs)
        if self.ema:
            self.ema.update(state.params, step + 1)
        progress = Progress(progress.tokens + sequences * config.seq_len, progress.rows + sequences)
        if compiles:
            jax.block_until_ready(metrics)
            self.timer.resume()
        else:
            self.timer.tokens += sequences * config.seq_len
        record = {"step": step + 1, "tokens": progress.tokens} | {
            name: float(value) for name, value in knobs._asdict().items()}
        self.pending.append((record, metrics))
        return state, progress

    def log(self, state: TrainState) -> str:
        """Fetch, judge and write the metrics of the steps since the last call; a line for the progress bar."""
        if not self.pending:
            return self.line
        fetched = jax.device_get([metrics for _, metrics in self.pending])
        self.timer.pause()
        rate = self.timer.take()
        records = [record | step_record(metrics) for (record, _), metrics in zip(self.pending, fetched, strict=True)]
        self.pending.clear()
        for record in records:
            record["loss_spike"] = self.spikes.is_spike(record["loss"])
            if record["loss_spike"]:
                logging.warning("loss spike at step %d: %.4g", record["step"], record["loss"])
        if rate:
            records[-1] |= {"tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak_flops}
        self.write(*records)
        last = records[-1]
        self.bad = last["bad_steps_in_a_row"] > 0
        self.check_bad_steps(state, records)
        self.timer.resume()
        skipped = f", {last['bad_steps']} bad steps" if last["bad_steps"] else ""
        worst = max(last["max_vio"], default=0.0)
        self.line = f"loss {last['loss']:.3f}, MaxVio {worst:.2f}, {rate:,.0f} tokens/s{skipped}"
        return self.line

    def write(self, *records: dict[str, Any]) -> None:
        if self.writer:
            self.writer.write(*records)

    def check_bad_steps(self, state: TrainState, records: list[dict[str, Any]]) -> None:
        """Raise `Diverged`, naming the culprit, after too many bad steps in a row. The weights are still good."""
        record = max(records, key=lambda record: record["bad_steps_in_a_row"])
        if record["bad_steps_in_a_row"] < self.config.train.guard.max_bad_steps:
            return
        params, routing = on_one_device((state.params, state.routing))
        places = (first_nonfinite(self.model, params, routing, jax.tree.map(lambda a: a[micro], self.batches),
                                  self.config.data.segment_ids) for micro in range(len(self.batches.tokens_BT)))
        place = next((name for name in places if name), "nothing that a second look at the batch shows")
        saved = max(self.checkpoints.steps(), default=None)
        raise Diverged(f"{record['bad_steps_in_a_row']} steps in a row up to step {record['step']} had a loss or "
                       f"gradient that is not finite; first: {place}. None of them changed a weight; "
                       + ("there is no checkpoint yet" if saved is None else f"the newest checkpoint is step {saved}"))

    def measure(self, state: TrainState, step: int, progress: Progress) -> None:
        """What formats do to the operands of the last step's first micro-batch, with the weights after it."""
        self.log(state)
        with self.timer.paused():
            batches, knobs = jax.tree.map(lambda a: a[:1], self.batches), knobs_at(self.config, step, progress.tokens)
            records = numerics(self.watching, state.params, state.routing, batches, knobs)
            if self.numerics_writer:
                self.numerics_writer.write(step, records)

    def evaluate(self, state: TrainState, step: int, progress: Progress) -> None:
        self.log(state)
        with self.timer.paused():
            validation, averaged = self.scores = self.score(state)
        record = {
            "step": step, "tokens": progress.tokens, "validation_bits_per_byte": validation.bits_per_byte,
            "validation_mtp_agreement": validation.mtp_agreement,
            "validation_mtp_chance": validation.mtp_chance, "validation_max_vio": validation.max_vio}
        if averaged:
            record["validation_ema_bits_per_byte"] = averaged.bits_per_byte
        self.write(record)

    def score(self, state: TrainState) -> tuple[Validation, Validation | None]:
        """Validation of the weights, and of their moving average (with the same routing biases) if the run keeps it."""
        averaged = self.ema and self.validate(place_like(self.ema.average(), state.params), state.routing)
        return self.validate(state.params, state.routing), averaged

    def is_good(self, state: TrainState) -> bool:
        """Whether the last step was; in a bad streak the older checkpoints must not be pushed out by newer ones."""
        self.log(state)
        return not self.bad

    def save(self, state: TrainState, progress: Progress) -> None:
        """Metrics of all steps so far are on disk before the checkpoint that a continued run starts from."""
        self.log(state)
        description = Description(self.config, self.prepared.tokenizer.to_json(), self.prepared.manifest["files"])
        with self.timer.paused():
            self.checkpoints.save(Checkpoint(state, self.ema and self.ema.average(), progress), description)
