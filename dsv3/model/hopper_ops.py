"""The bundle of operations for one Hopper GPU in bfloat16: kernels for attention, grouped products and RMSNorm."""

from functools import partial

from dsv3.kernels.attention import attend
from dsv3.kernels.attention_cudnn import CUDNN
from dsv3.kernels.cross_entropy import cross_entropy
from dsv3.kernels.grouped_dot_hopper import BLOCK, grouped_dot_hopper
from dsv3.kernels.norm_hopper import rms_norm_hopper
from dsv3.model.ops import Ops, attention_linear, linear, mlp, moe, norm_linear


def hopper_ops(
    *, attention=partial(attend, CUDNN), grouped_dot=grouped_dot_hopper, norm=rms_norm_hopper, loss_chunk: int = 16384,
) -> Ops:
    """Expert rows in blocks of 128; the kernels may be replaced by forms that accept more shapes.

    Rows are gathered again in the backward pass: that moves less than keeping them.
    """
    return Ops(
        norm=norm,
        linear=linear,
        norm_linear=partial(norm_linear, norm=norm),
        attention_linear=partial(attention_linear, attention=attention),
        mlp=mlp,
        moe=partial(moe, row_block=BLOCK, grouped_dot=grouped_dot, keep_rows=False),
        loss=partial(cross_entropy, chunk=loss_chunk),
    )
