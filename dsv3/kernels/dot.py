"""The product of activations with a float32 master weight."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def dot(x: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x @ w in the dtype of `x` [..., D], where the gradient of `w_DF` is accumulated and kept in float32.

    Plain differentiation would round every weight gradient to the dtype of the activations first; the report keeps
    them in float32 (section 3.3.1).
    """
    return jnp.dot(x, w_DF.astype(x.dtype))


def _dot_forward(x, w_DF):
    return dot(x, w_DF), (x, w_DF)


def _dot_backward(residuals, d_y):
    x, w_DF = residuals
    d_x = jnp.dot(d_y, w_DF.astype(x.dtype).T)
    rows_TD, d_rows_TF = (array.reshape(-1, array.shape[-1]) for array in (x, d_y))
    d_w_DF = jnp.dot(rows_TD.T, d_rows_TF, preferred_element_type=jnp.float32)
    return d_x, d_w_DF.astype(w_DF.dtype)


dot.defvjp(_dot_forward, _dot_backward)


def _bfloat16_parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 `x` to its last bit.

    `reduce_precision`, because XLA may drop a pair of conversions.
    """
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _exact(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """bfloat16 x times float32 w: three products side by side on tensor cores, which float32 products never see."""
    wide = jnp.dot(x_TD, jnp.concatenate(_bfloat16_parts(w_DE), axis=1), preferred_element_type=jnp.float32)
    return jnp.sum(wide.reshape(x_TD.shape[0], 3, w_DE.shape[1]), axis=1)


@jax.custom_vjp
def dot_float32(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """x @ w in full float32 precision whatever the dtype of `x`; what the router needs, with few columns."""
    if x_TD.dtype == jnp.bfloat16:
        return _exact(x_TD, w_DE)
    return jnp.dot(x_TD, w_DE, precision=jax.lax.Precision.HIGHEST)


def _dot_float32_forward(x_TD, w_DE):
    return dot_float32(x_TD, w_DE), (x_TD, w_DE)


def _dot_float32_backward(residuals, d_y_TE):
    x_TD, w_DE = residuals
    if x_TD.dtype != jnp.bfloat16:
        exact = jax.lax.Precision.HIGHEST
        return jnp.dot(d_y_TE, w_DE.T, precision=exact), jnp.dot(x_TD.T, d_y_TE, precision=exact)
    # d_x is rounded to bfloat16 in the end: the three largest of the nine partial products are plenty.
    (d_1, d_2, _), (w_1, w_2, _) = _bfloat16_parts(d_y_TE), _bfloat16_parts(w_DE)
    d_x_TD = jnp.dot(jnp.concatenate([d_1, d_1, d_2], axis=1), jnp.concatenate([w_1, w_2, w_1], axis=1).T)
    return d_x_TD, _exact(x_TD.T, d_y_TE)


dot_float32.defvjp(_dot_float32_forward, _dot_float32_backward)
