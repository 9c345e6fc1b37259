"""The bundle of operations for one Hopper GPU in bfloat16: cuDNN attention and grouped products on tensor cores."""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.kernels.attention_cudnn import causal_attention_cudnn
from dsv3.kernels.cross_entropy import cross_entropy
from dsv3.kernels.grouped_dot_hopper import BLOCK, grouped_dot_hopper
from dsv3.kernels.permute import make_plan, permute, unpermute
from dsv3.model.ops import Ops, experts, linear, norm_linear, swiglu_linear


def dispatch(x_TD: jax.Array, topk_TK: jax.Array, n_experts: int):
    """As in `dsv3.model.ops`, with the rows gathered again in the backward pass: that moves less than keeping them."""
    plan, sizes_E = checkpoint_name(make_plan(topk_TK, n_experts, BLOCK), "moe.plan")
    return permute(x_TD, plan), sizes_E, plan


def hopper_ops(*, attention=causal_attention_cudnn, grouped_dot=grouped_dot_hopper, loss_chunk: int = 16384) -> Ops:
    """Expert rows in blocks of 128; `attention` and `grouped_dot` may be replaced by forms that accept more shapes."""
    return Ops(
        linear=linear,
        norm_linear=norm_linear,
        swiglu_linear=swiglu_linear,
        attention=attention,
        dispatch=dispatch,
        experts=partial(experts, row_block=BLOCK, grouped_dot=grouped_dot),
        combine=unpermute,
        loss=partial(cross_entropy, chunk=loss_chunk),
    )
