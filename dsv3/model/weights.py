"""How parameters are born: float32 masters, normal matrices, unit norm gains, every axis with its logical name."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def matrix(module: nn.Module, name: str, std: float, **axes: int) -> jax.Array:
    """A parameter drawn from N(0, std^2) (report section 4.2: std 0.006 for every learnable parameter).

    `matrix(self, "q_a", std, embed=7168, q_latent=1536)` has shape [7168, 1536]; the rules table of
    `dsv3.parallel.mesh` says where each named axis lives.
    """
    init = nn.with_logical_partitioning(nn.initializers.normal(std), tuple(axes))
    return module.param(name, init, tuple(axes.values()), jnp.float32)


def gain(module: nn.Module, name: str, size: int) -> jax.Array:
    """The gain of an RMSNorm, [size], born as ones."""
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return module.param(name, init, (size,), jnp.float32)
