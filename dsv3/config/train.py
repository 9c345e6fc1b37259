"""Hyper-parameters of pre-training (report section 4.2): schedules are tables over consumed tokens."""

import math
from dataclasses import dataclass
from typing import Literal

from dsv3.config.errors import require
from dsv3.config.schema import Node


@dataclass(frozen=True, kw_only=True)
class Phase(Node):
    """One row of a schedule: from the end of the row before, up to (not including) `until` consumed tokens.

    The value moves from `start` to `end` along `shape` (a constant row has equal ends).
    """

    until: float
    start: float
    end: float
    shape: Literal["constant", "linear", "cosine"]

    def validate(self) -> None:
        require(self.until > 0, f"phase.until is {self.until}; expected a positive number of tokens")
        require(math.isfinite(self.start) and math.isfinite(self.end),
                f"a phase goes from {self.start} to {self.end}; expected finite values")
        require(self.shape != "constant" or self.start == self.end,
                f"a constant phase has start {self.start} and end {self.end}; make them equal")
        require(self.shape == "constant" or math.isfinite(self.until),
                f"a {self.shape} phase needs a finite phase.until")


def constant(value: float) -> tuple[Phase, ...]:
    """The schedule that never changes."""
    return (Phase(until=math.inf, start=value, end=value, shape="constant"),)


def _check_schedule(name: str, schedule: tuple[Phase, ...]) -> None:
    require(len(schedule) > 0, f"train.{name} is empty; give at least one phase")
    ends = [phase.until for phase in schedule]
    require(ends == sorted(set(ends)), f"train.{name}: phases end at {ends}; expected strictly increasing tokens")
    lowest = min(min(phase.start, phase.end) for phase in schedule)
    require(lowest >= 0, f"train.{name} falls to {lowest:g}; expected 0 or more")
    require(ends[-1] == math.inf, f"train.{name}: the last phase ends at {ends[-1]}; expected inf")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Node):
    """AdamW. Both moments are stored in `moment_dtype` (report section 3.3.3: bfloat16).

    `stochastic_rounding` rounds them up or down at random so that their means are right (`quant/stochastic.py`), which
    matters for bfloat16 and b2 above 0.99; otherwise to nearest.
    """

    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay_norms: bool
    clip_norm: float
    moment_dtype: Literal["bfloat16", "float32"]
    stochastic_rounding: bool

    def validate(self) -> None:
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} is {getattr(self, name)}; expected 0 <= beta < 1")
        for name in ("eps", "clip_norm"):
            require(getattr(self, name) > 0, f"optimizer.{name} is {getattr(self, name)}; expected a positive value")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; expected 0 or more")
        require(not self.stochastic_rounding or self.moment_dtype == "bfloat16",
                f"optimizer.stochastic_rounding rounds nothing in {self.moment_dtype} moments; "
                "use moment_dtype=bfloat16 or stochastic_rounding=False")


@dataclass(frozen=True, kw_only=True)
class EMAConfig(Node):
    """Exponential moving average of the weights, on the host, corrected for its start (`train/ema.py`).

    It spans about every / (1 - decay) steps. The report keeps one and states neither number (section 3.2.3).
    """

    decay: float
    every: int

    def validate(self) -> None:
        require(0 <= self.decay < 1, f"ema.decay is {self.decay}; expected 0 <= decay < 1")
        require(self.every > 0, f"ema.every is {self.every}; expected a positive number of steps")


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Node):
    """When a run warns and when it stops by itself.

    `max_bad_steps` steps in a row with a non-finite loss or gradient stop it (none of them changes the weights). A loss
    more than `spike_deviations` standard deviations above the mean of the last `spike_window` losses is a spike, which
    is recorded. Replicas of the weights are compared every `replica_check_every` steps.
    """

    max_bad_steps: int
    spike_window: int
    spike_deviations: float
    replica_check_every: int

    def validate(self) -> None:
        for name in ("max_bad_steps", "spike_deviations", "replica_check_every"):
            require(getattr(self, name) > 0, f"guard.{name} is {getattr(self, name)}; expected a positive number")
        require(self.spike_window > 1, f"guard.spike_window is {self.spike_window}; expected at least 2 steps")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Node):
    """The run. `batch_size` counts sequences and is rounded down to whole multiples of `batch_increment`.

    `start_from` is the directory of another run, which this one goes on from: its weights, moments, routing biases,
    step and place in the data, with this run's schedules and formats (None: new weights from `seed`). Every
    `numerics_every` steps (None: never) the operands of all products are measured (`train/numerics.py`).
    """

    steps: int
    seq_len: int
    micro_batch_size: int
    batch_size: tuple[Phase, ...]
    batch_increment: int
    warmup_steps: int
    learning_rate: tuple[Phase, ...]
    bias_update_speed: tuple[Phase, ...]
    mtp_lambda: tuple[Phase, ...]
    balance_alpha: float
    optimizer: OptimizerConfig
    seed: int
    start_from: str | None
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    numerics_every: int | None
    ema: EMAConfig | None
    guard: GuardConfig

    def validate(self) -> None:
        for name in ("steps", "seq_len", "micro_batch_size", "batch_increment", "log_every", "eval_every",
                     "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; expected a positive number")
        require(self.numerics_every is None or self.numerics_every > 0,
                f"train.numerics_every is {self.numerics_every}; expected a positive number of steps, or None")
        require(self.balance_alpha >= 0, f"train.balance_alpha is {self.balance_alpha}; expected 0 or more")
        require(0 <= self.seed < 2**32, f"train.seed is {self.seed}; expected 0 to 2**32 - 1")
        require(self.start_from != "", "train.start_from is empty; expected the directory of a run, or None")
        require(self.warmup_steps >= 0, f"train.warmup_steps is {self.warmup_steps}; expected 0 or more")
        for name in ("batch_size", "learning_rate", "bias_update_speed", "mtp_lambda"):
            _check_schedule(name, getattr(self, name))
        require(self.batch_increment % self.micro_batch_size == 0,
                f"train.batch_increment {self.batch_increment} is not divisible by "
                f"train.micro_batch_size {self.micro_batch_size}")
        smallest = min(min(phase.start, phase.end) for phase in self.batch_size)
        require(smallest >= self.batch_increment,
                f"train.batch_size falls to {smallest:g} sequences, below train.batch_increment {self.batch_increment}")
