"""Quantisation for products, in plain jnp: it defines the bits that the fast forms must give.

All of it is `dsv3/quant/tiles.py:quantize` in the layouts of `dsv3/kernels/scaled.py`. Any shape works: M' and K' are M
and K in whole tiles.
"""

import jax
import jax.numpy as jnp

from dsv3.config import Operand
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.scaled import TILE, Blocks, Tiles, decode_tiles, pack_tiles, unpack_tiles, whole
from dsv3.quant.formats import decode, format_of
from dsv3.quant.tiles import ALONG_COLUMNS, ALONG_ROWS, BLOCK, TENSOR, Quantized, quantize

ROWS = {"inner": ALONG_ROWS, "block": BLOCK, "tensor": TENSOR}
COLUMNS = ROWS | {"inner": ALONG_COLUMNS}
"""Tiles of a matrix that is read along its rows, or along its columns."""


def _quantized(x: jax.Array, operand: Operand, tiles: dict) -> Quantized:
    """Values in a dtype that computes, float32 scales as `operand.tile` has them."""
    fmt = format_of(operand.format)
    quantized = quantize(x, fmt, tiles[operand.tile], power_of_two=operand.power_of_two)
    if fmt.dtype is not None:
        return quantized
    return quantized._replace(values=decode(quantized.values, fmt, x.shape[-1]).astype(jnp.bfloat16))


def _padded(x: jax.Array, *shape: int, fill: float = 0) -> jax.Array:
    """The last two axes padded to `shape`."""
    widths = [(0, 0)] * (x.ndim - 2) + [(0, size - old) for size, old in zip(shape, x.shape[-2:], strict=True)]
    return jnp.pad(x, widths, constant_values=fill)


def quantize_rows(x_MK: jax.Array, operand: Operand) -> Tiles:
    """[M', K'] with tiles along K: an activation or its gradient, as products over features read it."""
    (m, k), n_tiles = x_MK.shape, -(-x_MK.shape[1] // TILE)
    values, scales = _quantized(x_MK, operand, ROWS)
    if operand.tile == "block":
        scales = jnp.repeat(scales, TILE, axis=0)[:m]
    scales = jnp.broadcast_to(scales, (m, n_tiles))
    return Tiles(_padded(values, whole(m), whole(k)), _padded(scales, whole(m), n_tiles, fill=1).T)


def quantize_columns(x_MK: jax.Array, operand: Operand) -> Tiles:
    """[K', M']: transposed, with tiles along M, as the weight gradient, a product over tokens, reads it."""
    (m, k), n_tiles = x_MK.shape, -(-len(x_MK) // TILE)
    values, scales = _quantized(x_MK, operand, COLUMNS)  # transposing 8 bits is cheaper than transposing x
    if operand.tile == "block":
        scales = jnp.repeat(scales, TILE, axis=1)[:, :k]
    scales = jnp.broadcast_to(scales, (n_tiles, k))
    return Tiles(_padded(values, whole(m), whole(k)).T, _padded(scales, n_tiles, whole(k), fill=1))


def quantize_both(x_MK: jax.Array, rows: Operand, columns: Operand) -> tuple[Tiles, Tiles]:
    """`quantize_rows` and `quantize_columns`, which a fused form makes from one read."""
    return quantize_rows(x_MK, rows), quantize_columns(x_MK, columns)


def requantize_columns(tiles_MK: Tiles, operand: Operand) -> Tiles:
    """[K', M'] from rows in 8 bits: decode, transpose, quantise along tokens (report section 3.5.2)."""
    return quantize_columns(decode_tiles(tiles_MK), operand)


def quantize_and_pack(x_MK: jax.Array, rows: Operand, kept: Operand) -> tuple[Tiles, Tiles]:
    """`quantize_rows` for a product, and as they wait for the backward pass (`pack_tiles`)."""
    return quantize_rows(x_MK, rows), pack_tiles(quantize_rows(x_MK, kept), kept)


def unpack_both(packed: Tiles, kept: Operand, columns: Operand, dtype: jnp.dtype) -> tuple[jax.Array, Tiles]:
    """What `quantize_and_pack` kept, decoded to `dtype` [M', K'], and its `requantize_columns` [K', M']."""
    tiles = unpack_tiles(packed, kept)
    return decode_tiles(tiles).astype(dtype), requantize_columns(tiles, columns)


def quantize_weights(w: jax.Array, operand: Operand) -> tuple[Blocks, Blocks]:
    """w [..., D, F] as [..., F', D'] for the forward pass and [..., D', F'] for dgrad: the same values, transposed.

    Scales by `tensor` are those of each matrix of a stack.
    """
    d, f = whole(w.shape[-2]), whole(w.shape[-1])
    values, scales = _quantized(w, operand, ROWS)
    values = _padded(values, d, f)
    scales = jnp.broadcast_to(scales, (*w.shape[:-2], d // TILE, f // TILE))
    return Blocks(values.swapaxes(-2, -1), scales.swapaxes(-2, -1)), Blocks(values, scales)


def norm_quantize(
    x_MK: jax.Array, gain_K: jax.Array, eps: float, rows: Operand, columns: Operand | None,
) -> tuple[Tiles, Tiles | None]:
    """`rms_norm`, rounded to the dtype of x as it is there, then quantised; the columns only where asked for."""
    normed_MK = rms_norm(x_MK, gain_K, eps)
    return quantize_rows(normed_MK, rows), None if columns is None else quantize_columns(normed_MK, columns)
