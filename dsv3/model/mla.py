"""Multi-head latent attention (report section 2.1.1), in its training form and absorbed over a latent cache."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3.config import ModelConfig
from dsv3.kernels.attention import latent_attention
from dsv3.kernels.rotate import rotate
from dsv3.model.ops import Ops
from dsv3.model.rope import softmax_scale
from dsv3.model.weights import gain, matrix


class LatentCache(NamedTuple):
    """What attention remembers: the normalised latent and the rotated shared key, kv_lora_rank + rope elements a token.

    V3 in bfloat16: (512 + 64) * 2 bytes * 61 layers = 70,272 bytes per token.
    """

    c_kv_BSC: jax.Array
    k_rope_BSR: jax.Array


class Context(NamedTuple):
    """What every layer needs to know about its positions: `rotation` of `dsv3.model.rope`, and who sees whom.

    `positions_BT` matters only with a cache, where it says which slots to write and which to see;
    `segment_ids_BT` only without one, and None means plain causal attention. `valid_BT` is False on padding.
    """

    rotation_2BTP: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    valid_BT: jax.Array


class MLA(nn.Module):
    """x -> attention(RMSNorm(x)), with queries compressed when `q_lora_rank` is set (equations 1 to 11).

    Matrices are [in, out]. `kv_a` holds W_DKV then W_KR; `q_b` and `kv_b` hold, per head, the nope part first and
    then the rotary part (q) or the value (kv).
    """

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LatentCache | None,
    ) -> tuple[jax.Array, LatentCache | None]:
        c = self.config.attention
        init = self.config.init_std
        d = self.config.dim
        q_out = c.n_heads * c.qk_head_dim
        norm = gain(self, "norm", d)
        kv_a = matrix(self, "kv_a", init, embed=d, kv_latent=c.kv_lora_rank + c.qk_rope_head_dim)
        kv_norm = gain(self, "kv_norm", c.kv_lora_rank)
        kv_b = matrix(
            self, "kv_b", init, kv_latent=c.kv_lora_rank, heads=c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        out = matrix(self, "o", init, heads=c.n_heads * c.v_head_dim, embed=d)

        eps, latent_eps = self.config.norm_eps, c.norm_eps
        if c.q_lora_rank is None:
            q = matrix(self, "q", init, embed=d, heads=q_out)
            q_flat, kv_flat = self.ops.norm_linear(("attn.q", "attn.kv_a"), x_BTD, norm, (q, kv_a), eps)
        else:
            q_a = matrix(self, "q_a", init, embed=d, q_latent=c.q_lora_rank)
            q_norm = gain(self, "q_norm", c.q_lora_rank)
            q_b = matrix(self, "q_b", init, q_latent=c.q_lora_rank, heads=q_out)
            q_BTQ, kv_flat = self.ops.norm_linear(("attn.q_a", "attn.kv_a"), x_BTD, norm, (q_a, kv_a), eps)
            q_flat, = self.ops.norm_linear(("attn.q_b",), q_BTQ, q_norm, (q_b,), latent_eps)

        heads = (*x_BTD.shape[:2], c.n_heads)
        q_BTHX = q_flat.reshape(*heads, c.qk_head_dim)
        c_kv_BTC, k_rope_BTR = jnp.split(kv_flat, [c.kv_lora_rank], axis=-1)
        scale, rotation_2BTP = softmax_scale(c), context.rotation_2BTP
        if cache is None:
            kv_heads, = self.ops.norm_linear(("attn.kv_b",), c_kv_BTC, kv_norm, (kv_b,), latent_eps)
            kv_BTHY = kv_heads.reshape(*heads, c.qk_nope_head_dim + c.v_head_dim)
            return self.ops.attention_linear(
                "attn.o", q_BTHX, kv_BTHY, k_rope_BTR, rotation_2BTP, out,
                scale=scale, segment_ids_BT=context.segment_ids_BT), None
        q_nope_BTHN, q_rope_BTHR = jnp.split(q_BTHX, [c.qk_nope_head_dim], axis=-1)
        q_rope_BTHR, k_rope_BTR = (rotate(x, rotation_2BTP) for x in (q_rope_BTHR, k_rope_BTR))
        c_kv_BTC = self.ops.norm(c_kv_BTC, kv_norm, latent_eps)
        cache = _extend(cache, LatentCache(c_kv_BTC, k_rope_BTR), context.positions_BT)
        kv_b_CHY = kv_b.reshape(c.kv_lora_rank, c.n_heads, -1)
        o_BTHU = _absorbed(q_nope_BTHN, q_rope_BTHR, cache, context.positions_BT, kv_b_CHY, scale)
        return self.ops.linear("attn.o", o_BTHU.reshape(*x_BTD.shape[:2], out.shape[0]), out), cache


def _extend(cache: LatentCache, new: LatentCache, positions_BT: jax.Array) -> LatentCache:
    """Write the new latents at their positions."""
    batch_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    return LatentCache(*(
        old.at[batch_B1, positions_BT].set(update.astype(old.dtype)) for old, update in zip(cache, new, strict=True)))


def _absorbed(q_nope_BTHN, q_rope_BTHR, cache, positions_BT, kv_b_CHY, scale):
    """W_UK joins the query and W_UV the output, so attention runs on latents: no key or value per head exists."""
    n_nope = q_nope_BTHN.shape[-1]
    w_uk_CHN, w_uv_CHU = (w.astype(q_nope_BTHN.dtype) for w in jnp.split(kv_b_CHY, [n_nope], axis=-1))
    q_latent_BTHC = jnp.einsum("bthn,chn->bthc", q_nope_BTHN, w_uk_CHN)
    visible_BTS = jnp.arange(cache.c_kv_BSC.shape[1])[None, None] <= positions_BT[:, :, None]
    context_BTHC = latent_attention(
        q_latent_BTHC, q_rope_BTHR, *cache, scale=scale, visible_BTS=visible_BTS)
    return jnp.einsum("bthc,chu->bthu", context_BTHC, w_uv_CHU)
