"""Auxiliary-loss-free load balancing: pure functions on expert loads (report section 2.1.2)."""

import chex
import jax
import jax.numpy as jnp


def update_bias(bias: jax.Array, load: jax.Array, speed: float | jax.Array) -> jax.Array:
    """b_i + speed * sign(mean(load) - load_i), over the last axis: overloaded experts sink, underloaded ones rise.

    `load` must be the load of the whole global batch: the sign of a sum is not the sum of signs.
    """
    load = load.astype(jnp.float32)
    return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def update_routing(routing: dict, load: dict[str, jax.Array], speed: float | jax.Array) -> dict:
    """Apply `update_bias` to every bias of the `routing` collection; `load` holds one array per stack, in its order.

    A model without selection biases has an empty collection, which is returned as it is.
    """
    biases, tree = jax.tree.flatten(routing)
    if not biases:
        return routing
    loads = jax.tree.leaves(load)
    chex.assert_trees_all_equal_shapes(biases, loads)
    return tree.unflatten([update_bias(bias, counts, speed) for bias, counts in zip(biases, loads, strict=True)])


def max_violation(load: jax.Array) -> jax.Array:
    """MaxVio = (max load - mean load) / mean load over the last axis: 0 is perfect balance, E - 1 total collapse."""
    mean = jnp.mean(load.astype(jnp.float32), axis=-1)
    return (jnp.max(load, axis=-1) - mean) / jnp.maximum(mean, 1e-9)


def stack_loads(load: dict[str, jax.Array]) -> jax.Array:
    """All loads as one table [L, E], the trunk's layers first, then the MTP modules; [0, 1] without any MoE layer."""
    if not load:
        return jnp.zeros((0, 1), jnp.int32)
    return jnp.concatenate([jnp.atleast_2d(counts) for counts in load.values()])
