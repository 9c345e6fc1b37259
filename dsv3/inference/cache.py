"""Latent key/value caches: what a served token costs in memory."""

import jax.numpy as jnp

from dsv3.config import ModelConfig
from dsv3.model.mla import LatentCache


def empty_caches(config: ModelConfig, batch: int, length: int) -> dict[str, LatentCache]:
    """One stacked cache per run of layers, [layers, batch, length, ...], in the model's dtype.

    Slots are read only up to the position of the query, so what they hold before they are written never matters.
    """
    c = config.attention
    runs = {"dense_layers": config.n_dense_layers, "moe_layers": config.n_moe_layers}
    return {
        name: LatentCache(*(
            jnp.zeros((layers, batch, length, width), config.dtype)
            for width in (c.kv_lora_rank, c.qk_rope_head_dim)))
        for name, layers in runs.items() if layers > 0
    }
