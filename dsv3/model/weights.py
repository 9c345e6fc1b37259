"""How parameters are born: float32 masters, normal matrices, unit norm gains."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def matrix(module: nn.Module, name: str, std: float, *shape: int) -> jax.Array:
    """A parameter drawn from N(0, std^2) (report section 4.2: std 0.006 for every learnable parameter)."""
    return module.param(name, nn.initializers.normal(std), shape, jnp.float32)


def gain(module: nn.Module, name: str, size: int) -> jax.Array:
    """The gain of an RMSNorm, [size], born as ones."""
    return module.param(name, nn.initializers.ones_init(), (size,), jnp.float32)
