"""A product that is watched: its weight's gradient is replaced by statistics of its operands.

Statistics must leave a compiled step from inside scans, recomputation, `shard_map` and custom gradients, with the
layer and the site that they belong to. A weight's gradient already does all of that: it is stacked by layer, summed
over micro-batches and devices, and sits in a tree under its own name. So a program that watches uses it as a mailbox:
no callback, no argument that the model would have to hand through, and no cost in any other program.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dsv3.config import require


def watched(product: Callable, observe: Callable[[Any, jax.Array, jax.Array], chex.ArrayTree]) -> Callable:
    """`product(x, w)` with its value and its gradient of x; the gradient of w is the mail of `observe(x, w, d_y)`.

    x may be a tree (rows and their sizes). `observe` returns float32 sums, which add up where gradients do. The weight
    must be float32 (a master), so that nothing is rounded on the way.
    """
    @jax.custom_vjp
    def run(x, w):
        return product(x, w)

    def forward(x, w):
        return run(x, w), (x, w)

    def backward(residuals, d_y):
        x, w = residuals
        _, pull = jax.vjp(product, x, w)
        return pull(d_y)[0], put(observe(x, w, d_y), w)

    run.defvjp(forward, backward)
    return run


def put(statistics: chex.ArrayTree, w: jax.Array) -> jax.Array:
    """The float32 arrays of a tree one after another in an array like w, zeros behind them.

    Raises `UserError` if w is too small.
    """
    assert w.dtype == jnp.float32, f"mail in {w.dtype} would be rounded"
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(statistics)]
    size = sum(leaf.size for leaf in leaves)
    require(size <= w.size, f"a weight of shape {w.shape} has no room for {size} statistics; watch a larger model, or "
            "leave this site out")
    return jnp.concatenate([*leaves, jnp.zeros(w.size - size)]).reshape(w.shape)


def take(gradient: jax.Array, like: chex.ArrayTree, stacked: int = 0) -> chex.ArrayTree:
    """The inverse of `put`: a tree of the structure and shapes of `like`, each leaf with `stacked` leading axes."""
    leaves, structure = jax.tree.flatten(like)
    layers = gradient.shape[:stacked]
    flat, start, found = gradient.reshape((*layers, -1)), 0, []
    for leaf in leaves:
        found.append(flat[..., start:start + leaf.size].reshape((*layers, *leaf.shape)))
        start += leaf.size
    return jax.tree.unflatten(structure, found)
