"""AdamW with low-precision moments and float32 master weights (report sections 3.3.3 and 4.2)."""

import logging
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dsv3.config import OptimizerConfig
from dsv3.quant.stochastic import BFLOAT16, FLOAT32_MANTISSA, round_stochastically

ROUNDING_SEED = 0
"""Of the bits that round moments: the same in every run, whatever its seed."""


class AdamState(NamedTuple):
    """Both moments in the configured dtype, and the number of updates made."""

    count: jax.Array
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with bias correction, computed in float32; the moments are rounded once, when stored.

    optax's own `scale_by_adam` can lower the first moment only. With `stochastic_rounding` the random bits are a
    function of the number of updates alone: a run that was continued rounds as one that was not, on any mesh.
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
        if config.stochastic_rounding:
            mu, nu = _round_stochastically(mu, nu, count)
        store = lambda moments: jax.tree.map(lambda m: m.astype(dtype), moments)
        return updates, AdamState(count, store(mu), store(nu))

    return optax.GradientTransformation(init, update)


def _round_stochastically(
    mu: chex.ArrayTree, nu: chex.ArrayTree, count: jax.Array,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Both moments as values of bfloat16. One draw of 32 bits serves both: each needs 16."""
    assert FLOAT32_MANTISSA - BFLOAT16.mantissa_bits == 16
    structure = jax.tree.structure(mu)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(ROUNDING_SEED), count), structure.num_leaves)
    bits = jax.tree.map(lambda m, key: jax.random.bits(key, m.shape), mu, jax.tree.unflatten(structure, list(keys)))
    return (jax.tree.map(lambda m, b: round_stochastically(m, BFLOAT16, b), mu, bits),
            jax.tree.map(lambda v, b: round_stochastically(v, BFLOAT16, b << 16), nu, bits))


def decay_mask(params: chex.ArrayTree, decay_norms: bool) -> chex.ArrayTree:
    """True where weight decay applies: every matrix, and norm gains only if asked for."""
    return jax.tree.map_with_path(lambda path, _: decay_norms or not path[-1].key.endswith("norm"), params)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay. Its updates are still to be multiplied by -learning rate.

    A second moment in bfloat16 is unbiased at b2 = 0.95, but stalls where (1 - b2) nears its precision of 2^-8:
    logs a warning above 0.99, unless it is rounded stochastically.
    """
    if config.moment_dtype == "bfloat16" and config.b2 > 0.99 and not config.stochastic_rounding:
        logging.warning("optimizer.b2=%g with bfloat16 moments: small updates of the second moment are rounded away; "
                        "use stochastic_rounding=True, b2 <= 0.99 or moment_dtype=float32", config.b2)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.decay_norms)))
