"""Choosing the next token from logits."""

import math

import jax
import jax.numpy as jnp

from dsv3.config import require


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise `UserError` for a temperature below 0 or a top-p outside (0, 1]."""
    require(0 <= temperature < math.inf, f"temperature is {temperature}; expected 0 (greedy) or more")
    require(0 < top_p <= 1, f"top_p is {top_p}; expected more than 0 and at most 1")


def nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf outside the smallest set of most likely tokens whose probability reaches `top_p`; never empty."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    keep_BV = jnp.take_along_axis(before_BV < top_p, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Token ids [B] from softmax(logits / temperature) restricted to the nucleus; the argmax at temperature 0."""
    scaled_BV = nucleus(logits_BV / jnp.maximum(temperature, 1e-5), top_p)
    drawn_B = jax.random.categorical(key, scaled_BV, axis=-1)
    return jnp.where(temperature == 0, jnp.argmax(logits_BV, axis=-1), drawn_B).astype(jnp.int32)
