"""How quantised operands lie in memory: what every scaled product reads and every quantiser writes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 128
"""Elements that share a scale, rows of a block, and what every axis is padded to."""


class Tiles(NamedTuple):
    """A matrix in 8 bits with a scale for every 128 elements of a row: `values` [R, C], float32 `scales` [C / 128, R].

    R and C are multiples of 128; padding has values 0 and scale 1. value * scale is the number.
    """

    values: jax.Array
    scales: jax.Array


class Blocks(NamedTuple):
    """Weights with one scale for every 128 x 128 block: `values` [..., N, K], `scales` [..., N / 128, K / 128]."""

    values: jax.Array
    scales: jax.Array


def decode_tiles(tiles: Tiles) -> jax.Array:
    """float32 [R, C]."""
    return tiles.values.astype(jnp.float32) * jnp.repeat(tiles.scales.T, TILE, axis=1)


def decode_blocks(blocks: Blocks) -> jax.Array:
    """float32 [..., N, K]."""
    scales = jnp.repeat(jnp.repeat(blocks.scales, TILE, axis=-2), TILE, axis=-1)
    return blocks.values.astype(jnp.float32) * scales
