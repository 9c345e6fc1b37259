"""Causal attention with DeepSeek's split keys: a per-head part and one rotary part that all heads share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.kernels.rotate import rotate


class Heads(NamedTuple):
    """What the projections leave, before any rotation; also the gradients of that.

    `q_BTHX` holds, per head, N elements without position and then R to be rotated; `kv_BTHY` the key's N and then the
    value's U; `k_rope_BTR` the rotary key that all heads share. So N = X - R and U = Y - N.
    """

    q_BTHX: jax.Array
    kv_BTHY: jax.Array
    k_rope_BTR: jax.Array

    @property
    def n_nope(self) -> int:
        return self.q_BTHX.shape[-1] - self.k_rope_BTR.shape[-1]

    @property
    def n_value(self) -> int:
        return self.kv_BTHY.shape[-1] - self.n_nope

    def rotated_parts(self, rotation_2BTP: jax.Array) -> tuple[jax.Array, ...]:
        """q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR and v_BTHU, as `causal_attention` reads them."""
        q_nope_BTHN, q_rope_BTHR = jnp.split(self.q_BTHX, [self.n_nope], axis=-1)
        k_nope_BTHN, v_BTHU = jnp.split(self.kv_BTHY, [self.n_nope], axis=-1)
        q_rope_BTHR, k_rope_BTR = (rotate(x, rotation_2BTP) for x in (q_rope_BTHR, self.k_rope_BTR))
        return q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR, v_BTHU


class Attention(NamedTuple):
    """Both directions apart, so that the output may wait for the backward pass in whatever form the caller keeps.

    `forward(heads, rotation_2BTP, scale, segment_ids_BT) -> o_BTHU, residuals` and
    `backward(heads, rotation_2BTP, scale, segment_ids_BT, o_BTHU, residuals, d_o_BTHU) -> Heads` of gradients, by what
    the heads were before they were rotated. `rotation_2BTP` is that of `dsv3.kernels.rotate`.
    """

    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., Heads]


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def attend(
    attention: Attention, heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """o_BTHU, differentiable by the heads alone; keeps the heads, the output and the residuals."""
    return attention.forward(heads, rotation_2BTP, scale, segment_ids_BT)[0]


def _attend_forward(attention, heads, rotation_2BTP, scale, segment_ids_BT):
    # Named here, inside the rule: a recomputation policy that keeps the output but not the rest would run it twice.
    o_BTHU, residuals = checkpoint_name(attention.forward(heads, rotation_2BTP, scale, segment_ids_BT), "attn.core")
    return o_BTHU, (heads, rotation_2BTP, segment_ids_BT, o_BTHU, residuals)


def _attend_backward(attention, scale, kept, d_o_BTHU):
    heads, rotation_2BTP, segment_ids_BT, o_BTHU, residuals = kept
    d_heads = attention.backward(heads, rotation_2BTP, scale, segment_ids_BT, o_BTHU, residuals, d_o_BTHU)
    return d_heads, None, None


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


def rotary_attention(
    heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """`causal_attention` of what the projections leave: rotates both rotary parts first. Returns o_BTHU."""
    return causal_attention(*heads.rotated_parts(rotation_2BTP), scale=scale, segment_ids_BT=segment_ids_BT)


def _reference_backward(heads, rotation_2BTP, scale, segment_ids_BT, o_BTHU, residuals, d_o_BTHU):
    del o_BTHU, residuals
    return jax.vjp(lambda heads: rotary_attention(heads, rotation_2BTP, scale, segment_ids_BT), heads)[1](d_o_BTHU)[0]


ATTENTION = Attention(lambda *inputs: (rotary_attention(*inputs), ()), _reference_backward)
"""`rotary_attention`, computed once more in the backward pass: nothing waits but what it reads."""


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
