"""LogFMT-nBit: a sign and the logarithm of the magnitude, spread evenly over each tile's own range (ISCA 2025, 3.2)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.config import require

TILE = 128
RANGE = 32 * math.log(2)
"""The smallest logarithm that a tile keeps lies at most this far below its largest (a factor of 2^32)."""


class LogFMT(NamedTuple):
    """`codes` uint16 [..., n]: sign bit on top, then K; `low` and `step` float32 [..., n / 128] of every tile.

    K = 0 is zero; K >= 1 is exp(low + step * (K - 1)).
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array


def encode_log(x: jax.Array, bits: int) -> LogFMT:
    """x [..., n], n a multiple of 128, in tiles of 128 along the last axis.

    Rounds to the nearer code in linear space (in logarithms the mean would be biased upwards). Magnitudes below half of
    the smallest become zero; a tile with a NaN or an infinity becomes NaN. Raises `UserError` for other sizes.
    """
    require(3 <= bits <= 16, f"LogFMT has 3 to 16 bits, not {bits}")
    require(x.shape[-1] % TILE == 0, f"LogFMT needs a last axis of whole tiles of {TILE}, not {x.shape[-1]}")
    tiles = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, TILE)
    magnitude = jnp.abs(tiles)
    logs = jnp.log(magnitude)
    high = jnp.max(logs, axis=-1)  # -inf for zeros
    smallest = jnp.min(jnp.where(magnitude > 0, logs, jnp.inf), axis=-1)
    low = jnp.maximum(smallest, high - RANGE)
    steps = 2 ** (bits - 1) - 2
    step = (high - low) / steps
    empty = jnp.isneginf(high)
    bad = ~jnp.all(jnp.isfinite(tiles), axis=-1)
    low, step = (jnp.where(bad, jnp.nan, jnp.where(empty, 0.0, value)) for value in (low, step))
    position = (logs - low[..., None]) / jnp.where(step > 0, step, 1.0)[..., None]
    below = jnp.clip(jnp.floor(position), 0, steps)
    value = lambda k: jnp.exp(low[..., None] + step[..., None] * k)
    above = jnp.minimum(below + 1, steps)
    nearer = jnp.where(magnitude - value(below) > value(above) - magnitude, above, below)
    k = jnp.where(magnitude < value(0.0) / 2, 0, nearer + 1)
    k = jnp.where(jnp.isfinite(k), k, 1).astype(jnp.uint16)
    sign = (jnp.signbit(tiles) & (k > 0)).astype(jnp.uint16) << (bits - 1)
    return LogFMT((sign | k).reshape(x.shape), low, step)


def decode_log(stored: LogFMT, bits: int) -> jax.Array:
    """float32 [..., n]."""
    codes = stored.codes.reshape(*stored.codes.shape[:-1], -1, TILE)
    k = (codes & (2 ** (bits - 1) - 1)).astype(jnp.float32)
    magnitude = jnp.exp(stored.low[..., None] + stored.step[..., None] * (k - 1))
    value = jnp.where(codes >> (bits - 1) == 1, -magnitude, magnitude)
    value = jnp.where((k == 0) & jnp.isfinite(magnitude), 0.0, value)
    return value.reshape(stored.codes.shape)
