"""Causal attention with DeepSeek's split keys: a per-head part and one rotary part that all heads share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Heads(NamedTuple):
    """What attention reads; also the gradients of that."""

    q_nope_BTHN: jax.Array
    q_rope_BTHR: jax.Array
    k_nope_BTHN: jax.Array
    k_rope_BTR: jax.Array
    v_BTHU: jax.Array


class Attention(NamedTuple):
    """Both directions apart, so that the output may wait for the backward pass in whatever form the caller keeps.

    `forward(heads, scale, segment_ids_BT) -> o_BTHU, residuals` and
    `backward(heads, scale, segment_ids_BT, o_BTHU, residuals, d_o_BTHU) -> Heads` of gradients.
    """

    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., Heads]


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def attend(attention: Attention, heads: Heads, scale: float, segment_ids_BT: jax.Array | None) -> jax.Array:
    """o_BTHU, differentiable; keeps the heads, the output and the residuals."""
    return attention.forward(heads, scale, segment_ids_BT)[0]


def _attend_forward(attention, heads, scale, segment_ids_BT):
    # Named here, inside the rule: a recomputation policy that keeps the output but not the rest would run it twice.
    o_BTHU, residuals = checkpoint_name(attention.forward(heads, scale, segment_ids_BT), "attn.core")
    return o_BTHU, (heads, segment_ids_BT, o_BTHU, residuals)


def _attend_backward(attention, scale, kept, d_o_BTHU):
    heads, segment_ids_BT, o_BTHU, residuals = kept
    return attention.backward(heads, scale, segment_ids_BT, o_BTHU, residuals, d_o_BTHU), None


attend.defvjp(_attend_forward, _attend_backward)


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


def _reference_backward(heads, scale, segment_ids_BT, o_BTHU, residuals, d_o_BTHU):
    del o_BTHU, residuals
    forward = lambda *parts: causal_attention(*parts, scale=scale, segment_ids_BT=segment_ids_BT)
    return Heads(*jax.vjp(forward, *heads)[1](d_o_BTHU))


ATTENTION = Attention(
    lambda heads, scale, segment_ids_BT: (causal_attention(*heads, scale=scale, segment_ids_BT=segment_ids_BT), ()),
    _reference_backward)
"""`causal_attention`, computed once more in the backward pass: nothing waits but what it reads."""


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
