"""The training loop: data in, steps, validation, checkpoints and metrics out; the same call continues a run."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dsv3.config import Config, UserError, differences, require, to_dict
from dsv3.data.loader import train_loader
from dsv3.data.prepare import Prepared, prepare
from dsv3.model.batch import Batch
from dsv3.model.flops import train_flops_per_token
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer
from dsv3.train import schedule
from dsv3.train.checkpoint import Checkpoint, Checkpoints, Description, Progress, placed
from dsv3.train.metrics import MetricsWriter, read_metrics, step_record
from dsv3.train.plots import plot_expert_load, plot_loss
from dsv3.train.step import Knobs, TrainState, init_state, make_train_step
from dsv3.train.throughput import peak_flops
from dsv3.train.validation import Validation, make_validation

MAY_CHANGE = ("train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints")
"""Fields that a continued run may set anew: none of them changes what a given step computes."""


class Result(NamedTuple):
    """What `train` returns: the final state, its validation, the data that it read, and the speed of its steps."""

    state: TrainState
    validation: Validation
    prepared: Prepared
    tokens_per_second: float


def open_workdir(workdir: Path) -> None:
    """Create `workdir`. Raises `UserError` for a path that cannot be a directory to write in."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be a directory to write in: {error.strerror}") from error


def check_same_run(workdir: Path, config: Config, data: dict[str, str], description: Description) -> None:
    """Raise `UserError` unless a checkpoint's configuration (but for `MAY_CHANGE`) and data are these."""
    changed = [line for line in differences(to_dict(description.config), to_dict(config))
               if not line.startswith(tuple(f"{name}:" for name in MAY_CHANGE))]
    require(not changed, f"--workdir={workdir} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another workdir or the same configuration")
    require(description.data == data, f"--workdir={workdir} holds a run that read other data than "
            f"{workdir / 'data'} holds now; restore that directory or choose another workdir")


def check_vocabulary(config: Config, prepared: Prepared) -> None:
    """Raise `UserError` unless the model has an embedding for every token of the tokenizer."""
    require(prepared.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {prepared.tokenizer.vocab_size} tokens, more than model.vocab_size "
            f"{config.model.vocab_size}; raise model.vocab_size or lower data.bpe_vocab_size")


def next_batches(loader: Iterator[Batch], n_micro: int) -> Batch:
    """`n_micro` micro-batches stacked on a new axis 0."""
    return jax.tree.map(lambda *parts: np.stack(parts), *(next(loader) for _ in range(n_micro)))


def knobs_at(config: Config, step: int, tokens: int) -> Knobs:
    """The scheduled values of step `step`, which starts at `tokens` consumed tokens."""
    train = config.train
    return Knobs(*(np.float32(value) for value in (
        schedule.learning_rate(train, step, tokens),
        schedule.value(train.bias_update_speed, tokens),
        schedule.value(train.mtp_lambda, tokens))))


class Timer:
    """Seconds and tokens of training steps alone: compilation, validation and saving are paused."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self._since = 0.0, 0, None
        self._taken_seconds, self._taken_tokens = 0.0, 0

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    def take(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self._taken_seconds += self.seconds
        self._taken_tokens += self.tokens
        self.seconds, self.tokens = 0.0, 0
        return rate

    def tokens_per_second(self) -> float:
        """Of everything taken so far, 0 before the first step."""
        return self._taken_tokens / self._taken_seconds if self._taken_seconds else 0.0


def train(config: Config, workdir: Path, ops: Ops) -> Result:
    """Train until `config.train.steps`, from the newest checkpoint in `workdir` if it has one.

    Writes `config.json`, `data/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`, `expert_load.png`.
    """
    open_workdir(workdir)
    prepared = prepare(config.data, config.train.seq_len, workdir / "data")
    check_vocabulary(config, prepared)
    model = Transformer(config.model, ops)
    validate = make_validation(model, config, prepared)
    with Checkpoints(workdir, keep=config.train.keep_checkpoints) as checkpoints:
        if checkpoints.latest_step() is not None:
            check_same_run(workdir, config, prepared.manifest["files"], checkpoints.describe())
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        state, tokens = _start(config, model, checkpoints)
        loader = train_loader(prepared, config.data, config.train.micro_batch_size,
                              consumed=tokens // config.train.seq_len)
        with MetricsWriter(workdir, int(state.step)) as writer:
            run = _Run(config, model, prepared, loader, checkpoints, writer, validate)
            state = run.steps(state, tokens)
    records = list(read_metrics(workdir / "metrics.jsonl"))
    plot_loss(records, workdir / "loss.png")
    plot_expert_load(records, workdir / "expert_load.png")
    validation = run.validation or validate(state.params, state.routing)
    return Result(state, validation, prepared, run.timer.tokens_per_second())


def _start(config, model, checkpoints) -> tuple[TrainState, int]:
    """The state and consumed tokens to start from."""
    initialise = lambda: init_state(model, config.train)
    if checkpoints.latest_step() is None:
        return jax.jit(initialise)(), 0
    state, progress = checkpoints.restore(placed(jax.eval_shape(initialise)))
    return state, progress.tokens


class _Run:
    """The parts of a run that every step touches."""

    def __init__(self, config, model, prepared, loader, checkpoints, writer, validate) -> None:
        self.config, self.prepared, self.loader = config, prepared, loader
        self.checkpoints, self.writer, self.validate = checkpoints, writer, validate
        self.train_step = make_train_step(model, config.train, config.data.segment_ids)
        self.flops_per_token = train_flops_per_token(config.model, config.train.seq_len)
        self.peak_flops = peak_flops()
        self.timer = Timer()
        self.pending: list[tuple[dict[str, Any], Any]] = []
        self.shapes: set[int] = set()
        self.line = ""
        self.validation: Validation | None = None

    def steps(self, state: TrainState, tokens: int) -> TrainState:
        """Run all remaining steps."""
        train = self.config.train
        first = int(state.step)
        with tqdm(total=train.steps, initial=first, unit="step", disable=None, dynamic_ncols=True) as bar:
            for step in range(first, train.steps):
                state, tokens = self.one_step(state, step, tokens)
                done = step + 1
                last = done == train.steps
                if done % train.log_every == 0 or last:
                    bar.set_postfix_str(self.log())
                if done % train.eval_every == 0 or last:
                    self.evaluate(state, done, tokens)
                if done % train.checkpoint_every == 0 or last:
                    self.save(state, tokens)
                bar.update()
        return state

    def one_step(self, state: TrainState, step: int, tokens: int) -> tuple[TrainState, int]:
        """Read a global batch and take one step; its metrics stay on the device until `log` fetches them."""
        sequences = schedule.batch_sequences(self.config.train, tokens)
        batches = next_batches(self.loader, sequences // self.config.train.micro_batch_size)
        knobs = knobs_at(self.config, step, tokens)
        compiles = len(batches.tokens_BT) not in self.shapes
        self.shapes.add(len(batches.tokens_BT))
        if compiles:
            self.timer.pause()
        state, metrics = self.train_step(state, batches, knobs)
        consumed = sequences * self.config.train.seq_len
        if compiles:
            jax.block_until_ready(metrics)
            self.timer.resume()
        else:
            self.timer.tokens += consumed
        record = {"step": step + 1, "tokens": tokens + consumed, "learning_rate": float(knobs.learning_rate),
                  "bias_update_speed": float(knobs.bias_update_speed), "mtp_lambda": float(knobs.mtp_lambda)}
        self.pending.append((record, metrics))
        return state, tokens + consumed

    def log(self) -> str:
        """Fetch and write the metrics of the steps since the last call; returns a line for the progress bar."""
        if not self.pending:
            return self.line
        fetched = jax.device_get([metrics for _, metrics in self.pending])
        self.timer.pause()
        rate = self.timer.take()
        records = [record | step_record(metrics)
                   for (record, _), metrics in zip(self.pending, fetched, strict=True)]
        if rate:
            records[-1] |= {"tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak_flops}
        for record in records:
            self.writer.write(record)
        self.pending.clear()
        self.writer.flush()
        self.timer.resume()
        last = records[-1]
        worst = max(last["max_vio"], default=0.0)
        self.line = f"loss {last['loss']:.3f}, MaxVio {worst:.2f}, {rate:,.0f} tokens/s"
        return self.line

    def evaluate(self, state: TrainState, step: int, tokens: int) -> None:
        self.log()
        self.timer.pause()
        self.validation = self.validate(state.params, state.routing)
        self.writer.write({
            "step": step, "tokens": tokens, "validation_bits_per_byte": self.validation.bits_per_byte,
            "validation_mtp_agreement": self.validation.mtp_agreement,
            "validation_mtp_chance": self.validation.mtp_chance, "validation_max_vio": self.validation.max_vio})
        self.writer.flush()
        self.timer.resume()

    def save(self, state: TrainState, tokens: int) -> None:
        """Metrics of all steps so far are on disk before the checkpoint that a continued run starts from."""
        self.log()
        self.timer.pause()
        checkpoint = Checkpoint(state, Progress(tokens))
        tokenizer, data = self.prepared.tokenizer.to_json(), self.prepared.manifest["files"]
        self.checkpoints.save(checkpoint, Description(self.config, tokenizer, data))
        self.timer.resume()
