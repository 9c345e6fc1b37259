"""The gated activation of every feed-forward network."""

import jax
import jax.numpy as jnp


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up, where the last axis of `gate_up` holds the gate half and then the up half.

    Computed in float32, returned in the dtype of `gate_up` with half its last axis.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
