"""How far Hopper's FP8 sums are from exact ones, for stated distributions, lengths, intervals and metrics.

The report: for "two random matrices with K = 4096", the limited accumulation precision "results in a maximum relative
error of nearly 2%" (section 3.3.2). It names neither the distribution nor what the error is relative to, and both
decide. Operands are rounded to E4M3 first and the exact product is that of the rounded ones, so what is measured is
the accumulation alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import require
from dsv3.quant.accumulate import promoted_dot
from dsv3.quant.formats import E4M3
from dsv3.quant.tiles import TENSOR, quantize

DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(0, 1, shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(3, shape),
    "token outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random((shape[0], 1)) < 0.05, 50, 1),
}
"""draw(rng, [rows, k]): N(0, 1); U[0, 1]; Student's t with 3 degrees; N(0, 1) with one row in twenty times 50."""

COLUMNS = 64
"""Of the product, computed at a time: the model of the tensor core holds [rows, columns, 32]."""

_promoted = jax.jit(promoted_dot, static_argnums=4, static_argnames="tensor_core")


class AccumulationError(NamedTuple):
    """Of c against the exact c*, over all elements.

    `largest` and `median` of |c - c*| / |c*|, which is without bound where c* happens to be near zero;
    `of_rms`: the largest |c - c*| over the root mean square of c*; `norm`: norm of c - c* over norm of c*.
    """

    largest: float
    median: float
    of_rms: float
    norm: float


def error_of(found: np.ndarray, exact: np.ndarray) -> AccumulationError:
    """The metrics of one product. Elements that are exactly zero have no relative error and are left out of it."""
    difference, magnitude = np.abs(found - exact), np.abs(exact)
    relative = difference[magnitude > 0] / magnitude[magnitude > 0]
    rms = np.sqrt(np.mean(exact ** 2))
    return AccumulationError(float(relative.max()), float(np.median(relative)), float(difference.max() / rms),
                             float(np.linalg.norm(difference) / np.linalg.norm(exact)))


def accumulation_error(
    distribution: str, k: int, interval: int, *, size: int = 64, seed: int = 0,
) -> AccumulationError:
    """Of a [size, k] b [size, k]^T in the tensor core's accumulator, promoted to float32 every `interval` elements.

    Both matrices are drawn from `DISTRIBUTIONS`, with one scale each. `interval=k` is no promotion. Raises `UserError`
    for an unknown distribution.
    """
    require(distribution in DISTRIBUTIONS,
            f"unknown distribution {distribution!r}; expected one of {', '.join(DISTRIBUTIONS)}")
    rng, one = np.random.default_rng(seed), jnp.ones((1, 1))
    a, b = (quantize(jnp.asarray(DISTRIBUTIONS[distribution](rng, (size, k)), jnp.float32), E4M3, TENSOR,
                     power_of_two=False).values for _ in "ab")
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    found = [_promoted(a, b[start:start + COLUMNS], one, one, interval, tensor_core=True)
             for start in range(0, size, COLUMNS)]
    return error_of(np.concatenate(found, axis=1, dtype=np.float64), exact)
