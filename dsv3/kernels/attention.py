"""Causal attention with DeepSeek's split keys: a per-head part and one rotary part that all heads share."""

import jax
import jax.numpy as jnp


def causal_attention(
    q_nope_BTHN: jax.Array,
    q_rope_BTHR: jax.Array,
    k_nope_BTHN: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTHU: jax.Array,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """softmax(scale * (q_nope·k_nope + q_rope·k_rope)) v over earlier positions (report eq. 10).

    The softmax is taken in float32. With `segment_ids_BT`, a position sees only its own segment.
    Materialises the [B, H, T, T] scores: the reference, and what a CPU runs. Returns o_BTHU.
    """
    shared_BTHR = jnp.broadcast_to(k_rope_BTR[:, :, None], q_rope_BTHR.shape)
    q = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1).transpose(0, 2, 1, 3)
    k = jnp.concatenate([k_nope_BTHN, shared_BTHR], axis=-1).transpose(0, 2, 1, 3)
    scores_BHTT = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    length = scores_BHTT.shape[-1]
    visible = jnp.tril(jnp.ones((1, 1, length, length), bool))
    if segment_ids_BT is not None:
        visible &= (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    probabilities = jax.nn.softmax(scores_BHTT * scale + jnp.where(visible, 0.0, -jnp.inf), axis=-1)
    return jnp.matmul(probabilities.astype(v_BTHU.dtype), v_BTHU.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def latent_attention(
    q_latent_BTHC: jax.Array,
    q_rope_BTHR: jax.Array,
    c_kv_BSC: jax.Array,
    k_rope_BSR: jax.Array,
    *,
    scale: float,
    visible_BTS: jax.Array,
) -> jax.Array:
    """Attention of absorbed queries over the latent cache itself: multi-query, key C+R, value C.

    Returns the context in latent space, [B, T, H, C].
    """
    scores_BHTS = jnp.einsum("bthc,bsc->bhts", q_latent_BTHC, c_kv_BSC, preferred_element_type=jnp.float32)
    scores_BHTS += jnp.einsum("bthr,bsr->bhts", q_rope_BTHR, k_rope_BSR, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BHTS * scale, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bsc->bthc", probabilities.astype(c_kv_BSC.dtype), c_kv_BSC)
