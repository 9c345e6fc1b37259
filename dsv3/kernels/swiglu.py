"""The gated activation of every feed-forward network."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up, where the last axis of `gate_up` holds the gate half and then the up half.

    Computed in float32, returned in the dtype of `gate_up` with half its last axis. Only `gate_up` itself is kept for
    the backward pass; plain differentiation would keep several float32 arrays of its size.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _swiglu_forward(gate_up):
    return swiglu(gate_up), gate_up


def _swiglu_backward(gate_up, d_out):
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    d_out = d_out.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    return jnp.concatenate([d_gate, d_out * gate * sigmoid], axis=-1).astype(gate_up.dtype),


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
