"""Rotation of interleaved pairs by tables of cosines and sines (`dsv3/model/rope.py` makes them), and back."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, rotation_2BTP: jax.Array) -> jax.Array:
    """Rotate the interleaved pairs (x[2j], x[2j+1]) of x [B, T, ..., R]; float32 inside, dtype of `x` outside.

    `rotation_2BTP` holds cos and sin of every pair, R / 2 of them. Half-split layouts (most other code bases) must be
    re-ordered before they meet these weights.
    """
    middle = range(2, x.ndim - 1)
    cos, sin = (jnp.expand_dims(table, middle) for table in rotation_2BTP)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_back(x: jax.Array, rotation_2BTP: jax.Array) -> jax.Array:
    """By the negative angles: the transpose of `rotate`, which gradients need, and its inverse where cos² + sin² = 1.

    Under YaRN with unequal `mscale` the tables carry an amplitude a, and there and back multiplies by a².
    """
    cos, sin = rotation_2BTP
    return rotate(x, jnp.stack([cos, -sin]))
