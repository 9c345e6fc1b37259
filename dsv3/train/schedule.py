"""Schedules over consumed tokens, evaluated on the host in double precision (14.8e12 is too big for float32)."""

import math

from dsv3.config import Phase, TrainConfig


def value(schedule: tuple[Phase, ...], tokens: float) -> float:
    """The value at `tokens` consumed tokens; a phase holds from the end of the one before up to its own `until`.

    Cosine, as in report section 4.2: end + (start - end) (1 + cos(pi x)) / 2 for x from 0 to 1 within the phase.
    """
    begin = 0.0
    for phase in schedule:
        if tokens < phase.until:
            break
        begin = phase.until
    if phase.shape == "constant":
        return phase.start
    x = (tokens - begin) / (phase.until - begin)
    if phase.shape == "cosine":
        x = (1 - math.cos(math.pi * x)) / 2
    return phase.start + (phase.end - phase.start) * x


def learning_rate(train: TrainConfig, step: int, tokens: float) -> float:
    """The scheduled rate, during the first `warmup_steps` steps scaled by (step + 1) / warmup_steps."""
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    return warmup * value(train.learning_rate, tokens)


def batch_sequences(train: TrainConfig, tokens: float) -> int:
    """Sequences in the next global batch: the ramp, rounded down to a multiple of `batch_increment`."""
    return int(value(train.batch_size, tokens)) // train.batch_increment * train.batch_increment
