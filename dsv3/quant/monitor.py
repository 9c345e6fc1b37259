"""What a format does to an array: how much becomes zero, subnormal or the largest code, and how far off the rest is.

`observe` counts and sums, so statistics of parts (micro-batches, devices) add up to those of the whole; `rates` turns
them into figures. Everything is measured on what `quantize` stores, to the bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import require
from dsv3.quant.formats import decode, format_of
from dsv3.quant.tiles import ALONG_COLUMNS, ALONG_ROWS, BLOCK, TENSOR, dequantize, quantize, tile_amax

BINS, LOWEST, WIDTH = 32, -56, 2
"""The histogram of scales: bin i holds log2(scale) in [LOWEST + WIDTH i, LOWEST + WIDTH (i + 1)), the outermost also
what lies beyond them."""

OPERANDS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_x", "wgrad_dy", "kept")
"""Both operands of the three products of a Linear (report section 3.3.1), as a recipe's rule names them, and what its
input waits in for the backward pass."""


class Statistics(NamedTuple):
    """Counts and sums over one array, float32; statistics of parts add up.

    Of elements: how many there are, are not zero, became zero, were stored as subnormals, as the largest code, or were
    not finite; sums of squares of x and of x' - x, over those that are finite before and after. Of tiles: how many have
    an element at the largest code (`topped`), and, of those that hold anything, `scales_S`: how many have their scale's
    logarithm in each bin.
    """

    elements: jax.Array
    nonzero: jax.Array
    underflow: jax.Array
    subnormal: jax.Array
    largest: jax.Array
    topped: jax.Array
    nonfinite: jax.Array
    square: jax.Array
    error_square: jax.Array
    scales_S: jax.Array


def zero_statistics() -> Statistics:
    """Of nothing."""
    return Statistics(*[jnp.zeros(())] * (len(Statistics._fields) - 1), jnp.zeros((BINS,)))


def sums(parts: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The sum of every array, all of one shape, as float32: in one pass, so that what they share is computed once.

    Masks are counted in integers: a sum of ones in float32 would stop at 2^24.
    """
    parts = tuple(part.astype(jnp.int32) if part.dtype == bool else part for part in parts)
    zeros = tuple(np.zeros((), part.dtype) for part in parts)
    add = lambda left, right: tuple(map(jnp.add, left, right))
    return [total.astype(jnp.float32) for total in jax.lax.reduce(parts, zeros, add, range(parts[0].ndim))]


def scale_histogram(scales: jax.Array, counted: jax.Array) -> jax.Array:
    """How many of the `counted` scales lie in each bin, [BINS]."""
    log2 = jnp.log2(jnp.where(counted, scales, 1.0)).ravel()
    place = jnp.clip(jnp.floor((log2 - LOWEST) / WIDTH), 0, BINS - 1)
    held = (place[:, None] == jnp.arange(BINS)[None]) & counted.ravel()[:, None]
    return jnp.sum(held, axis=0, dtype=jnp.int32).astype(jnp.float32)


def observe(x: jax.Array, operand: Any, inner: int = -1) -> Statistics:
    """Statistics of x [..., m, n] as an operand of a product that sums over its axis `inner` (-1 or -2).

    `operand` says the `format` (by name), the `tile` ("inner": 128 elements along the inner axis; "block": 128 x 128;
    "tensor": one scale) and whether scales are a `power_of_two`, like `dsv3.config`'s `Operand`. Raises `UserError` for
    an unknown format or tile.
    """
    fmt, tile = format_of(operand.format), tile_of(operand.tile, inner)
    x = x.astype(jnp.float32)
    q = quantize(x, fmt, tile, power_of_two=operand.power_of_two)
    stored = jnp.abs(decode(q.values, fmt, x.shape[-1]))
    seen, amax = dequantize(q, fmt, tile, x.shape[-1]), tile_amax(x, tile)
    both = jnp.isfinite(x) & jnp.isfinite(seen)  # one bad number spoils its tile
    elements, nonzero, underflow, subnormal, largest, nonfinite, square, error_square = sums((
        jnp.ones(x.shape, bool),
        x != 0,
        (x != 0) & (stored == 0),
        (stored > 0) & (stored < 2.0 ** fmt.smallest_exponent),
        stored == fmt.largest,
        ~jnp.isfinite(x),
        jnp.where(both, x, 0.0) ** 2,
        jnp.where(both, seen - x, 0.0) ** 2))
    topped, = sums((tile_amax(stored, tile) == fmt.largest,))
    return Statistics(elements, nonzero, underflow, subnormal, largest, topped, nonfinite, square, error_square,
                      scale_histogram(q.scales, (amax > 0) & jnp.isfinite(amax)))


def tile_of(name: str, inner: int) -> tuple[int, int] | None:
    """A tile of `dsv3.quant.tiles` for an array whose product sums over axis `inner`, -1 or -2."""
    tiles = {"inner": {-1: ALONG_ROWS, -2: ALONG_COLUMNS}[inner], "block": BLOCK, "tensor": TENSOR}
    require(name in tiles, f"unknown tile {name!r}; expected one of {', '.join(tiles)}")
    return tiles[name]


def observe_product(
    rule: Any, x: jax.Array, w: jax.Array, d_y: jax.Array, wgrad_x: jax.Array | None = None,
    wgrad_dy: jax.Array | None = None,
) -> dict[str, Statistics]:
    """Statistics of all `OPERANDS` of y = x w and of its gradients, for x [..., D], w [.., D, F] and d_y [..., F].

    `wgrad_x` and `wgrad_dy` are what the weight gradient reads, where that is not x and d_y (experts' rows of tokens).
    `rule` has an operand of every name; `kept` may be None, or what `fprop_x` is: then there is nothing to measure.
    Fprop sums over D, Dgrad over F, Wgrad over tokens (all but the last axis of x), so the same array is measured
    twice, with tiles along each. Every operand is measured against the array itself, also where it is made from `kept`.
    """
    flat = lambda array: array.reshape(-1, array.shape[-1])
    x_TD, d_y_TF = flat(x), flat(d_y)
    arrays = {"fprop_x": (x_TD, -1), "fprop_w": (w, -2), "dgrad_dy": (d_y_TF, -1), "dgrad_w": (w, -1),
              "wgrad_x": (x_TD if wgrad_x is None else flat(wgrad_x), -2),
              "wgrad_dy": (d_y_TF if wgrad_dy is None else flat(wgrad_dy), -2)}
    found = {name: observe(array, getattr(rule, name), inner) for name, (array, inner) in arrays.items()}
    own = rule.kept is not None and rule.kept != rule.fprop_x
    return found | {"kept": observe(x_TD, rule.kept) if own else zero_statistics()}


def rates(statistics: Statistics) -> dict[str, Any]:
    """Figures of one array, as JSON values; 0 where there is nothing to divide by.

    - `underflow`: of the elements that are not zero, the share stored as zero.
    - `subnormal`: of the same, the share stored with fewer significant bits than the format has.
    - `saturation`: of the same, the share at the largest code, but for one in every tile that has any: the element that
      set the scale. It rises where values bunch at the top of their tiles.
    - `nonfinite`: the share of elements that are NaN or infinite.
    - `error`: norm of x' - x over norm of x, of all that is finite.
    - `scales`: tiles by the logarithm of their scale; `log2_scale` is its median, to the width of a bin.
    """
    s = Statistics(*(np.asarray(value, np.float64) for value in statistics))
    share = lambda part, whole: float(part / whole) if whole > 0 else 0.0
    tiles = s.scales_S.sum()
    middle = int(np.searchsorted(np.cumsum(s.scales_S), tiles / 2))
    return {
        "elements": int(s.elements),
        "underflow": share(s.underflow, s.nonzero),
        "subnormal": share(s.subnormal, s.nonzero),
        "saturation": share(s.largest - s.topped, s.nonzero),
        "nonfinite": share(s.nonfinite, s.elements),
        "error": share(np.sqrt(s.error_square), np.sqrt(s.square)),
        "log2_scale": float(LOWEST + WIDTH * (middle + 0.5)) if tiles else 0.0,
        "scales": s.scales_S.astype(int).tolist(),
    }
