"""AdamW with low-precision moments and float32 master weights (report sections 3.3.3 and 4.2)."""

import logging
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dsv3.config import OptimizerConfig


class AdamState(NamedTuple):
    """Both moments in the configured dtype, and the number of updates made."""

    count: jax.Array
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with bias correction, computed in float32; the moments are rounded once, when stored.

    optax's own `scale_by_adam` can lower the first moment only.
    """
    dtype = jnp.dtype(config.moment_dtype)

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        first, second = (1 - jnp.float32(b) ** count for b in (config.b1, config.b2))
        mu = jax.tree.map(lambda m, g: config.b1 * m.astype(jnp.float32) + (1 - config.b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: config.b2 * v.astype(jnp.float32) + (1 - config.b2) * g * g, state.nu, grads)
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + config.eps), mu, nu)
        store = lambda moments: jax.tree.map(lambda m: m.astype(dtype), moments)
        return updates, AdamState(count, store(mu), store(nu))

    return optax.GradientTransformation(init, update)


def decay_mask(params: chex.ArrayTree, decay_norms: bool) -> chex.ArrayTree:
    """True where weight decay applies: every matrix, and norm gains only if asked for."""
    return jax.tree.map_with_path(lambda path, _: decay_norms or not path[-1].key.endswith("norm"), params)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay. Its updates are still to be multiplied by -learning rate.

    A second moment in bfloat16 is unbiased at b2 = 0.95, but stalls where (1 - b2) nears its precision of 2^-8:
    logs a warning above 0.99.
    """
    if config.moment_dtype == "bfloat16" and config.b2 > 0.99:
        logging.warning("optimizer.b2=%g with bfloat16 moments: small updates of the second moment are rounded away; "
                        "use b2 <= 0.99 or moment_dtype=float32", config.b2)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.decay_norms)))
