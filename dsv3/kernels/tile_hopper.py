"""Arithmetic of one tile inside a Hopper kernel: scales and codes equal to those of `dsv3.quant` to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.quant import Operand
from dsv3.quant.formats import E5M6, format_of
from dsv3.quant.tiles import SMALLEST_AMAX

TILE = 128
"""Elements that share a scale, and the side of the square that one step of a kernel takes."""
ROWS = 64
"""Rows that a warpgroup holds in registers at once."""
MATRIX, PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""How threads share a matrix, and what belongs to its rows or columns. Each row lies in four neighbouring threads, and
the matrix loads fetch 16-bit elements in this order from rows and from columns alike: transposing costs nothing."""

SHORT = plgpu.Layout.TILED(plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
SHORT_ROWS, SHORT_PER_ROW = 32, SHORT.reduce(1)
"""The same for half as many rows, where one step needs several matrices in registers."""


def dtype_of(operand: Operand):
    """What stores the values: the format's own dtype, or bfloat16, which holds every number of E5M6."""
    return format_of(operand.format).dtype or jnp.bfloat16


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale rounded to nearest, for finite scales whose reciprocal is normal; 0 and NaN for infinity and NaN."""
    return repaired(1 / scale, scale)


def repaired(quotient: jax.Array, scale: jax.Array) -> jax.Array:
    """The number nearest to 1 / scale, given one at most a bit away: what a GPU's approximate division gives.

    Both mantissas are 24-bit integers whose product should be a power of two beyond 32 bits. Modulo 2^32 nothing of
    that power is left, so wrapping arithmetic gives the error of the product exactly.
    """
    mantissa = lambda x: lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF | 0x800000
    divisor = mantissa(scale)
    twice_error = -2 * divisor * mantissa(quotient)
    bits = lax.bitcast_convert_type(quotient, jnp.int32)
    nearest = bits + jnp.where(twice_error > divisor, 1, jnp.where(twice_error < -divisor, -1, 0))
    return jnp.where(scale < np.inf, lax.bitcast_convert_type(nearest, jnp.float32), quotient)


def scale_of(amax: jax.Array, operand: Operand) -> jax.Array:
    """`dsv3.quant.tiles.scale_of`, rounding up to a power of two in the bits of the number."""
    scale = jnp.maximum(amax, np.float32(SMALLEST_AMAX)) * np.float32(1 / format_of(operand.format).largest)
    if operand.power_of_two:
        bits = lax.bitcast_convert_type(scale, jnp.int32) + 0x7FFFFF & 0x7F800000
        scale = jnp.where(scale < np.inf, lax.bitcast_convert_type(bits, jnp.float32), scale)
    return jnp.where(amax == 0, np.float32(1), scale)


def encode(x: jax.Array, operand: Operand) -> jax.Array:
    """float32 in the operand's format: rounded to nearest even, saturated; NaN stays NaN."""
    if operand.format != "e5m6":
        return x.astype(dtype_of(operand))
    return decode_e5m6(encode_e5m6(x)).astype(jnp.bfloat16)


def encode_e5m6(x: jax.Array) -> jax.Array:
    """float32 as codes of 12 bits, int32: `dsv3.quant.formats.encode` before packing. Infinity saturates."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = jnp.minimum(jnp.abs(x), np.float32(E5M6.largest))
    # Round half of the last bit up, less one where that bit is even; a carry runs into the exponent, as it must.
    drop, whole = 23 - E5M6.mantissa_bits, lax.bitcast_convert_type(magnitude, jnp.int32)
    odd = lax.shift_right_logical(whole, jnp.full_like(whole, drop)) & 1
    rounded = lax.shift_right_logical(whole + ((1 << drop - 1) - 1) + odd, jnp.full_like(whole, drop))
    normal = rounded - (126 + E5M6.smallest_exponent << E5M6.mantissa_bits)
    # A sum whose last bit is the smallest subnormal is rounded to that; its bits then count them.
    large = np.float32(2.0 ** (23 + E5M6.smallest_exponent - E5M6.mantissa_bits))
    subnormal = lax.bitcast_convert_type(magnitude + large, jnp.int32) - int(large.view(np.int32))
    code = jnp.where(magnitude < np.float32(2.0 ** E5M6.smallest_exponent), subnormal, normal)
    sign = lax.shift_right_logical(bits, jnp.full_like(bits, 20)) & 0x800
    return jnp.where(x != x, 0x7E0, code | sign)


def decode_e5m6(codes: jax.Array) -> jax.Array:
    """float32 of codes of 12 bits, which are the upper bits of a half."""
    return lax.bitcast_convert_type((codes << 4).astype(jnp.int16), jnp.float16).astype(jnp.float32)


def pack(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`dsv3.quant.formats.pack` of codes [rows, 128]: low bytes [rows, 128] and high halves [rows, 64], uint8."""
    first, second = codes[:, :TILE // 2], codes[:, TILE // 2:]
    return (codes & 0xFF).astype(jnp.uint8), (first >> 8 | second >> 8 << 4).astype(jnp.uint8)


def unpack(low: jax.Array, high: jax.Array) -> jax.Array:
    """The inverse of `pack`, int32."""
    high = high.astype(jnp.int32)
    return low.astype(jnp.int32) | jnp.concatenate([high & 0xF, high >> 4], axis=1) << 8


def along_rows(x_R: jax.Array, like: jax.Array) -> jax.Array:
    """One number for every row of `like`."""
    return lax.broadcast_in_dim(x_R, like.shape, (0,))


def along_columns(x_C: jax.Array, like: jax.Array) -> jax.Array:
    """One number for every column of `like`."""
    return lax.broadcast_in_dim(x_C, like.shape, (1,))


def amax_of(x: jax.Array, axis: int = 1) -> jax.Array:
    """float32 largest magnitudes along an axis; NaN where there is one."""
    if x.dtype != jnp.float32:
        return jnp.max(jnp.abs(x), axis=axis).astype(jnp.float32)
    # The bits of magnitudes are in order, NaNs last: XLA's maximum, which interprets this on a CPU, loses them.
    magnitudes = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(magnitudes, axis=axis), jnp.float32)


def over_scale(x: jax.Array, amax_R: jax.Array, operand: Operand) -> tuple[jax.Array, jax.Array]:
    """x [rows, 128] in float32 over the scale of its row, and the scales, from the largest magnitude of every row."""
    scale_R = scale_of(amax_R, operand)
    return x.astype(jnp.float32) * along_rows(reciprocal(scale_R), x), scale_R


def quantize_piece(x: jax.Array, operand: Operand) -> tuple[jax.Array, jax.Array]:
    """Values and scales of x [rows, 128]: every row is one tile."""
    scaled, scale_R = over_scale(x, amax_of(x), operand)
    return encode(scaled, operand), scale_R
