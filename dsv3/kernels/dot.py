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
