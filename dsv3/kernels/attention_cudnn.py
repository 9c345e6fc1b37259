"""`causal_attention` through cuDNN's fused kernels: the scores never reach memory, forward or backward.

jax.nn.dot_product_attention refuses values narrower than keys; the primitives below it do not. They are private to
jax, so this file is the one place that knows them (jax 0.11.2, cuDNN 9.10 or newer for 192 / 128).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name


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


def _arguments(q, k, v, bias):
    """Operands in the primitives' order; an empty array stands for one that is not used."""
    unused = jnp.zeros(0, q.dtype)
    return q, k, v, unused if bias is None else bias, *[unused] * 6


def _settings(scale, bias):
    return dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(bias is not None, False),
        mask_type=cudnn.MaskType.CAUSAL, layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=None)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, bias, scale):
    return _attend_forward(q, k, v, bias, scale)[0]


def _attend_forward(q, k, v, bias, scale):
    out, normaliser = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        *_arguments(q, k, v, bias), **_settings(scale, bias), is_training=True)
    # Named here, inside the rule: a recomputation policy that keeps the output but not this would run it twice.
    out, normaliser = checkpoint_name((out, normaliser), "attn.core")
    return out, (q, k, v, bias, normaliser, out)


def _attend_backward(scale, residuals, d_out):
    q, k, v, bias, normaliser, out = residuals
    d_q, d_k, d_v = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *_arguments(q, k, v, bias), normaliser, out, d_out, **_settings(scale, bias))
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def causal_attention_cudnn(
    q_nope_BTHN: jax.Array,
    q_rope_BTHR: jax.Array,
    k_nope_BTHN: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTHU: jax.Array,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """As `causal_attention`, in bfloat16 with head sizes that `refusal` accepts.

    Segments travel as a [B, 1, T, T] bias, which costs 2 T^2 bytes a row.
    """
    shared_BTHR = jnp.broadcast_to(k_rope_BTR[:, :, None], q_rope_BTHR.shape)
    q_BTHX = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
    k_BTHX = jnp.concatenate([k_nope_BTHN, shared_BTHR], axis=-1)
    bias = None if segment_ids_BT is None else segment_bias(segment_ids_BT, q_BTHX.dtype)
    return _attend(q_BTHX, k_BTHX, v_BTHU, bias, scale)
