"""Root-mean-square normalisation."""

from functools import partial

import jax
import jax.numpy as jnp


def _scale(x32: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, returned in the dtype of `x`.

    Only `x` is kept for the backward pass, in its own dtype.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _scale(x32, eps) * jnp.expand_dims(gain, range(x.ndim - 1))).astype(x.dtype)


def _rms_norm_forward(x, gain, eps):
    return rms_norm(x, gain, eps), (x, gain)


def _rms_norm_backward(eps, residuals, d_out):
    x, gain = residuals
    x32, d_out = x.astype(jnp.float32), d_out.astype(jnp.float32)
    scale = _scale(x32, eps)
    unit = x32 * scale
    d_unit = d_out * jnp.expand_dims(gain, range(x.ndim - 1))
    d_x = scale * (d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True))
    return d_x.astype(x.dtype), jnp.sum(d_out * unit, axis=range(x.ndim - 1)).astype(gain.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
