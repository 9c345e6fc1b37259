"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * jnp.expand_dims(gain, range(x.ndim - 1))).astype(x.dtype)
