"""How quantised operands lie in memory: what every scaled product reads and every quantiser writes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.config import Operand
from dsv3.quant.formats import decode, encode, format_of

TILE = 128
"""Elements that share a scale, rows of a block, and what every axis is padded to."""


class Tiles(NamedTuple):
    """A matrix in 8 bits, one scale for every 128 elements of a row: what a product reads along its inner dimension.

    `values` [R, C], of an 8-bit dtype, or bfloat16 as the carrier of a format without a dtype of its own. `scales`
    float32 [C / 128, R], a row of scales for each column of tiles: 512 contiguous bytes for 128 rows. R and C are
    multiples of 128; padding has values 0 and scale 1. value * scale is the number. A coarser granularity repeats.
    """

    values: jax.Array
    scales: jax.Array


class Blocks(NamedTuple):
    """Weights with one scale for every 128 x 128 block: `values` [..., N, K], the inner dimension last.

    `scales` float32 [..., N / 128, K / 128].
    """

    values: jax.Array
    scales: jax.Array


def whole(size: int) -> int:
    """`size` rounded up to whole tiles."""
    return -(-size // TILE) * TILE


def decode_tiles(tiles: Tiles) -> jax.Array:
    """float32 [R, C]."""
    return tiles.values.astype(jnp.float32) * jnp.repeat(tiles.scales.T, TILE, axis=1)


def decode_blocks(blocks: Blocks) -> jax.Array:
    """float32 [..., N, K]."""
    scales = jnp.repeat(jnp.repeat(blocks.scales, TILE, axis=-2), TILE, axis=-1)
    return blocks.values.astype(jnp.float32) * scales


def pack_tiles(tiles: Tiles, operand: Operand) -> Tiles:
    """For the wait until the backward pass: formats of 12 bits as 1.5 bytes an element, uint8 [R, 3 C / 2]."""
    fmt = format_of(operand.format)
    return tiles if fmt.dtype is not None else tiles._replace(values=encode(tiles.values, fmt))


def unpack_tiles(packed: Tiles, operand: Operand) -> Tiles:
    """The inverse of `pack_tiles`."""
    fmt = format_of(operand.format)
    if fmt.dtype is not None:
        return packed
    return packed._replace(values=decode(packed.values, fmt, packed.scales.shape[0] * TILE).astype(jnp.bfloat16))
