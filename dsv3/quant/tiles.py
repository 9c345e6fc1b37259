"""Quantisation in tiles: every tile of an array shares one scale (report section 3.3.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import require
from dsv3.quant.formats import FLOAT32_SMALLEST_EXPONENT, Format, decode, encode

ALONG_ROWS, ALONG_COLUMNS, BLOCK, TENSOR = (1, 128), (128, 1), (128, 128), None
"""Tiles of the last two axes: activations in the forward pass, the same for weight gradients, weights, and no tiles."""

SMALLEST_AMAX = 2.0 ** -100
"""Scales stay normal float32 numbers, which no device flushes to zero; a tile this small is all zeros in effect. More
for formats beyond 2^26."""


class Quantized(NamedTuple):
    """`values` in the storage of a format and float32 `scales`, one for each tile: value * scale is the number."""

    values: jax.Array
    scales: jax.Array


def _whole_tiles(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """x [..., m, n] with zeros to whole tiles, as [..., m / t, t, n / u, u]."""
    m, n = x.shape[-2:]
    t, u = tile
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -m % t), (0, -n % u)])
    return x.reshape(*x.shape[:-2], x.shape[-2] // t, t, x.shape[-1] // u, u)


def _spread(scales: jax.Array, shape: tuple[int, ...], tile: tuple[int, int] | None) -> jax.Array:
    """Every element's scale."""
    if tile is None:
        return jnp.broadcast_to(scales, shape)
    for axis, size in zip((-2, -1), tile, strict=True):
        scales = jnp.repeat(scales, size, axis=axis) if size > 1 else scales
    return scales[..., :shape[-2], :shape[-1]]


def tile_amax(x: jax.Array, tile: tuple[int, int] | None) -> jax.Array:
    """The largest magnitude of every tile of x [..., m, n]: [..., ceil(m / t), ceil(n / u)], or [..., 1, 1].

    NaN where there is one, so also beside an infinity.
    """
    # The bits of magnitudes are in order, NaNs last; XLA's maximum of numbers loses NaNs on a CPU.
    magnitude = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    if tile is None:
        largest = jnp.max(magnitude, axis=(-2, -1), keepdims=True)
    else:
        largest = jnp.max(_whole_tiles(magnitude, tile), axis=(-3, -1))
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def scale_of(amax: jax.Array, fmt: Format, *, power_of_two: bool) -> jax.Array:
    """amax / largest, so that a tile fills its format; rounded up to a power of two for UE8M0. 1 for tiles of zeros.

    A tile with an infinity or a NaN has that as its scale, and so comes out as NaN. The quotient is a product with the
    float32 reciprocal of `largest`, here and in `quantize`: XLA turns a division by a broadcast value into one anyway,
    and the fast forms must agree to the bit. Raises `UserError` for a format that reaches so far that this reciprocal
    is no normal float32 number.
    """
    normal = 2.0 ** FLOAT32_SMALLEST_EXPONENT
    require(1 / fmt.largest >= normal, f"format {fmt.name!r} reaches {fmt.largest:.3g}, and scales to that vanish in "
            "float32; give it a `largest` of 2^126 at most")
    scale = jnp.maximum(amax, max(SMALLEST_AMAX, normal * fmt.largest)) * np.float32(1 / fmt.largest)
    if power_of_two:
        mantissa, exponent = jnp.frexp(scale)
        rounded = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
        scale = jnp.where(jnp.isfinite(scale), rounded, scale)
    return jnp.where(amax == 0, 1.0, scale)


def quantize(x: jax.Array, fmt: Format, tile: tuple[int, int] | None, *, power_of_two: bool) -> Quantized:
    """x [..., m, n] in `fmt` with one scale a tile; tiles at the edges are as small as they must be.

    Raises `UserError` for an array without two axes to tile.
    """
    require(x.ndim >= 2, f"an array of shape {x.shape} has no tiles; expected at least two axes")
    x = x.astype(jnp.float32)
    scales = scale_of(tile_amax(x, tile), fmt, power_of_two=power_of_two)
    return Quantized(encode(x * _spread(1 / scales, x.shape, tile), fmt), scales)


def dequantize(quantized: Quantized, fmt: Format, tile: tuple[int, int] | None, columns: int) -> jax.Array:
    """float32 [..., m, columns]."""
    values = decode(quantized.values, fmt, columns)
    return values * _spread(quantized.scales, values.shape, tile)
