"""`rotary_attention` through cuDNN's fused kernels: the scores never reach memory, forward or backward.

jax.nn.dot_product_attention refuses values narrower than keys; the primitives below it do not. They are private to
jax, so this file is the one place that knows them (jax 0.11.2, cuDNN 9.10 or newer for 192 / 128).
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dsv3.kernels.attention import Attention, Heads
from dsv3.kernels.rotate import rotate_back


def refusal(q_width: int, v_width: int, dtype: jnp.dtype) -> str | None:
    """Why cuDNN cannot run heads of this size, or None. Sizes that nobody here has run count as refused."""
    if dtype != jnp.bfloat16:
        return f"attention in {jnp.dtype(dtype).name}: it must be bfloat16"
    if (q_width, v_width) == (192, 128) or (q_width == v_width and q_width in (64, 128)):
        return None
    return f"attention heads of {q_width} / {v_width}: they must be 192 / 128, 128 / 128 or 64 / 64"


def segment_bias(segment_ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, 1, T, T]: 0 within a segment, a large negative number across; causality is not part of it."""
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jnp.where(same_BTT, jnp.zeros((), dtype), cudnn.get_large_negative_number(dtype))[:, None]


def _operands(heads: Heads, rotation_2BTP: jax.Array, segment_ids_BT: jax.Array | None) -> tuple:
    """In the primitives' order; an empty array stands for one that is not used."""
    q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR, v_BTHU = heads.rotated_parts(rotation_2BTP)
    shared_BTHR = jnp.broadcast_to(k_rope_BTR[:, :, None], q_rope_BTHR.shape)
    q_BTHX = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
    k_BTHX = jnp.concatenate([k_nope_BTHN, shared_BTHR], axis=-1)
    unused = jnp.zeros(0, q_BTHX.dtype)
    bias = unused if segment_ids_BT is None else segment_bias(segment_ids_BT, q_BTHX.dtype)
    return q_BTHX, k_BTHX, v_BTHU, bias, *[unused] * 6


def _settings(scale: float, segment_ids_BT: jax.Array | None) -> dict:
    return dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(segment_ids_BT is not None, False),
        mask_type=cudnn.MaskType.CAUSAL, layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=None)


def forward(
    heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHU and the normaliser of every row."""
    return tuple(cudnn._dot_product_attention_fwd_p_wrapper.bind(
        *_operands(heads, rotation_2BTP, segment_ids_BT), **_settings(scale, segment_ids_BT), is_training=True))


def backward(
    heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None, o_BTHU: jax.Array,
    normaliser: jax.Array, d_o_BTHU: jax.Array,
) -> Heads:
    d_q_BTHX, d_k_BTHX, d_v_BTHU = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *_operands(heads, rotation_2BTP, segment_ids_BT), normaliser, o_BTHU, d_o_BTHU,
        **_settings(scale, segment_ids_BT))
    (d_q_nope_BTHN, d_q_rope_BTHR), (d_k_nope_BTHN, d_shared_BTHR) = (
        jnp.split(d_BTHX, [heads.n_nope], axis=-1) for d_BTHX in (d_q_BTHX, d_k_BTHX))
    d_k_rope_BTR = jnp.sum(d_shared_BTHR.astype(jnp.float32), axis=2).astype(d_k_BTHX.dtype)
    return Heads(
        jnp.concatenate([d_q_nope_BTHN, rotate_back(d_q_rope_BTHR, rotation_2BTP)], axis=-1),
        jnp.concatenate([d_k_nope_BTHN, d_v_BTHU], axis=-1),
        rotate_back(d_k_rope_BTR, rotation_2BTP))


CUDNN = Attention(forward, backward)
"""As `ATTENTION`, in bfloat16 with head sizes that `refusal` accepts.

Segments travel as a [B, 1, T, T] bias, which costs 2 T^2 bytes a row while it is used.
"""
