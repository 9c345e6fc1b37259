"""Sums of FP8 products: as Hopper's tensor cores form them, and promoted to float32 as the report does (section 3.3.2).

The tensor core adds 32 products and its accumulator in one step: all are aligned to the largest exponent, cut after 13
fraction bits (towards zero), summed exactly, and the sum is cut to 13 fraction bits again. The exponent of a product is
the sum of its factors' exponents, also where the product of their significands is 2 or more. This model is bit-equal
to an H100 (`tests/quant/accumulate_test.py`); the report says "about 14 bits", the follow-up "13 fraction bits".
"""

import jax
import jax.numpy as jnp

from dsv3.config import require
from dsv3.quant.formats import E4M3

STEP = 32
FRACTION_BITS = 13
NOTHING = -10_000
"""Stands for the exponent of zero: below all others."""


def _cut(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x in units of 2^(exponent - 13), without what is behind the point. Exact but for that: powers of two scale."""
    return jnp.trunc(jnp.ldexp(x, FRACTION_BITS - exponent))


def _exponent(x: jax.Array) -> jax.Array:
    """Of float32 numbers; `NOTHING` for zeros."""
    return jnp.where(x == 0, NOTHING, jnp.frexp(x)[1] - 1)


def _stored_exponent(x: jax.Array) -> jax.Array:
    """That of E4M3's exponent field: subnormals have the smallest normal's. `NOTHING` for zeros."""
    return jnp.where(x == 0, NOTHING, jnp.maximum(jnp.frexp(x)[1] - 1, E4M3.smallest_exponent))


def tensor_core_step(accumulator: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """One instruction's worth: accumulator [m, n] + a [m, 32] b [n, 32]^T, float32 arrays of E4M3 values."""
    products = a[:, None, :] * b[None, :, :]
    exponents = _stored_exponent(a)[:, None, :] + _stored_exponent(b)[None, :, :]
    largest = jnp.maximum(jnp.max(exponents, axis=-1), _exponent(accumulator))
    largest = jnp.where(largest < -100, 0, largest)  # nothing but zeros
    total = jnp.sum(_cut(products, largest[..., None]), axis=-1) + _cut(accumulator, largest)
    total = jnp.ldexp(total, largest - FRACTION_BITS)
    own = jnp.where(total == 0, 0, _exponent(total))
    return jnp.ldexp(_cut(total, own), own - FRACTION_BITS)


def tensor_core_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [m, k] b [n, k]^T of E4M3 values in one accumulator of the tensor core, float32 [m, n].

    A NaN among the inputs makes its row and column NaN. Raises `UserError` unless k is a multiple of 32.
    """
    (m, k), n = a.shape, b.shape[0]
    require(k % STEP == 0, f"the tensor core adds {STEP} products at a time; {k} is not a multiple of that")
    steps = lambda x: jnp.moveaxis(x.astype(jnp.float32).reshape(len(x), k // STEP, STEP), 1, 0)
    zero = jnp.zeros((m, n), jnp.float32)
    total, _ = jax.lax.scan(lambda acc, ab: (tensor_core_step(acc, *ab), None), zero, (steps(a), steps(b)))
    return total


def promoted_dot(
    a: jax.Array, b: jax.Array, a_scales: jax.Array, b_scales: jax.Array, interval: int, *, tensor_core: bool,
) -> jax.Array:
    """Scaled a [m, k] b [n, k]^T: partial sums of `interval` products, each scaled and added up in float32.

    The scales, [m or 1, k / g] and [n or 1, k / h], stand for g and h elements along k. `tensor_core` chooses Hopper's
    accumulator for the partial sums; otherwise they are float32 sums. Raises `UserError` for an interval that does not
    divide k, or over which a scale changes: rescaling an accumulator would bring back the error that promotion avoids.
    """
    (m, k), n = a.shape, b.shape[0]
    require(k % interval == 0, f"promotion every {interval} elements does not divide k = {k}")
    for scales in (a_scales, b_scales):
        require(k % scales.shape[1] == 0 and (k // scales.shape[1]) % interval == 0,
                f"promotion every {interval} elements, but scales change every {k / scales.shape[1]:g}")
    parts = lambda x: jnp.moveaxis(x.astype(jnp.float32).reshape(len(x), k // interval, interval), 1, 0)
    every = lambda scales: jnp.repeat(scales, k // interval // scales.shape[1], axis=1).T

    def add(total, part):
        a, b, a_scale, b_scale = part
        if tensor_core:
            partial = tensor_core_dot(a, b)
        else:
            partial = jnp.einsum("mk,nk->mn", a, b, precision=jax.lax.Precision.HIGHEST)
        return total + partial * (a_scale[:, None] * b_scale[None, :]), None

    zero = jnp.zeros((m, n), jnp.float32)
    return jax.lax.scan(add, zero, (parts(a), parts(b), every(a_scales), every(b_scales)))[0]
