"""`rotary_attention` through the two attention kernels for Hopper: rotation before them, and back after.

The kernels read what has no position, and the value, where the projections left it; only rotary parts are written anew.
"""

from functools import partial

import jax

from dsv3.kernels import attention_backward_hopper, attention_hopper
from dsv3.kernels.attention import Attention, Heads
from dsv3.kernels.rotate import rotate, rotate_back
from dsv3.kernels.tuning import tuned

# By themselves: equal layers lower them once.
_forward = jax.jit(attention_hopper.forward, static_argnums=(4, 6))
_backward = jax.jit(attention_backward_hopper.backward, static_argnums=(4, 9))


def refusal(heads: Heads) -> str | None:
    """Why these heads cannot run here, or None."""
    rope, q = heads.k_rope_BTR.shape[-1], heads.q_BTHX
    return attention_hopper.refusal(heads.n_nope, rope, heads.n_value, q.dtype)


def _operands(heads: Heads, rotation_2BTP: jax.Array) -> tuple[jax.Array, ...]:
    """In the kernels' order: whole queries, their rotated part, keys with values, the rotated shared key."""
    q_rope_BTHR = rotate(heads.q_BTHX[..., heads.n_nope:], rotation_2BTP)
    return heads.q_BTHX, q_rope_BTHR, heads.kv_BTHY, rotate(heads.k_rope_BTR, rotation_2BTP)


def forward(
    kind: str, heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHU and the normaliser of every row."""
    how = tuned(kind, "attention_forward", heads.q_BTHX.shape[1:2], attention_hopper.Settings())
    return _forward(*_operands(heads, rotation_2BTP), scale, segment_ids_BT, how)


def backward(
    kind: str, heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None,
    o_BTHU: jax.Array, normaliser_BHT: jax.Array, d_o_BTHU: jax.Array,
) -> Heads:
    how = tuned(kind, "attention_backward", heads.q_BTHX.shape[1:2], attention_backward_hopper.Settings())
    d_q_BTHX, d_kv_BTHY, d_k_rope_BTR = _backward(
        *_operands(heads, rotation_2BTP), scale, segment_ids_BT, o_BTHU, normaliser_BHT, d_o_BTHU, how)
    rotary = d_q_BTHX[..., heads.n_nope:]
    return Heads(d_q_BTHX.at[..., heads.n_nope:].set(rotate_back(rotary, rotation_2BTP)), d_kv_BTHY,
                 rotate_back(d_k_rope_BTR, rotation_2BTP))


def attention(kind: str) -> Attention:
    """As `ATTENTION`, for heads that `refusal` accepts, on a device of this kind (as the tuning table names it)."""
    return Attention(partial(forward, kind), partial(backward, kind))
