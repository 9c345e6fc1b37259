"""Matrices in 8 bits with their scales, as the products read them."""

from typing import NamedTuple

import jax


class Tiles(NamedTuple):
    """A matrix in 8 bits, one scale for every 128 elements of a row: what a product reads along its inner dimension.

    values [R, C] (any 8-bit float dtype, or bfloat16 as the carrier of formats without a dtype of their own); scales
    float32 [C / 128, R] (one row of scales a tile column: 512 contiguous bytes for 128 rows). R and C are multiples of
    128; padding has values 0 and scale 1.
    """

    values: jax.Array
    scales: jax.Array


class Blocks(NamedTuple):
    """Weights: values [..., N, K] with the inner dimension last, scales float32 [..., N / 128, K / 128]."""

    values: jax.Array
    scales: jax.Array
