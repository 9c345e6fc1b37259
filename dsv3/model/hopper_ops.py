"""The bundle of operations for one Hopper GPU in bfloat16: kernels for attention, grouped products and RMSNorm."""

from collections.abc import Callable
from functools import partial

import jax

from dsv3.kernels.cross_entropy import TokenLoss, cross_entropy
from dsv3.kernels.grouped_dot_hopper import BLOCK
from dsv3.model.ops import Ops, attention_linear, linear, mlp, moe, norm_linear

LOGITS, LOSS_CHUNK = 2 ** 29, 16_384
"""At once: logits of a chunk, 2 GiB in float32, and tokens of it. V3's vocabulary gets 4,096 tokens at a time."""


def loss(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> TokenLoss:
    """`cross_entropy` in chunks that fill the tensor cores and not the memory."""
    chunk = min(LOSS_CHUNK, LOGITS // w_DV.shape[1] // BLOCK * BLOCK)
    return cross_entropy(x_TD, w_DV, targets_T, weights_T, max(BLOCK, chunk))


def hopper_ops(*, attention: Callable, grouped_dot: Callable, norm: Callable) -> Ops:
    """Expert rows in blocks of 128, and these kernels, or forms of them that accept more shapes.

    Rows are gathered again in the backward pass: that moves less than keeping them.
    """
    return Ops(
        norm=norm,
        linear=linear,
        norm_linear=partial(norm_linear, norm=norm),
        attention_linear=partial(attention_linear, attention=attention),
        mlp=mlp,
        moe=partial(moe, row_block=BLOCK, grouped_dot=grouped_dot, keep_rows=False),
        loss=loss,
    )
