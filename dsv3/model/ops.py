"""The bundle of operations that a model is built from: what varies (formats, kernels, meshes) comes in through here.

FP8, Hopper kernels and expert parallelism are other bundles, not other models. `reference_ops` is plain jnp and runs
anywhere. Build a bundle once and close over it: a bundle rebuilt for every call would retrace.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.kernels.attention import causal_attention
from dsv3.kernels.cross_entropy import cross_entropy
from dsv3.kernels.dot import dot
from dsv3.kernels.grouped_dot import grouped_dot
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.permute import make_plan, permute, unpermute
from dsv3.kernels.swiglu import swiglu


class ExpertWeights(NamedTuple):
    """All routed experts of a layer: gate and up side by side ([E, D, 2F], gate first) and down ([E, F, D])."""

    gate_up_EDF: jax.Array
    down_EFD: jax.Array


@dataclass(frozen=True)
class Ops:
    """Eight functions, coarse enough that an implementation can fuse and share inside each.

    A `site` names the place of a product (`attn.q_a`, `mlp.down`, `mtp.eh_proj`), so that a recipe can give every
    place its own format. Products take float32 master weights, cast them to the dtype of the activation, and return
    float32 gradients for them.

    - `linear(site, x, w)`: x @ w.
    - `norm_linear(sites, x, gain, weights, eps)`: one RMSNorm of x, then one product per site from the same input.
    - `swiglu_linear(site, gate_up, w)`: swiglu(gate_up) @ w.
    - `attention(q_nope, q_rope, k_nope, k_rope, v, scale=, segment_ids_BT=)`: causal core attention.
    - `dispatch(x_TD, topk_TK, n_experts) -> rows_JD, sizes_E, plan`: tokens to expert order.
    - `experts(rows_JD, sizes_E, weights) -> rows_JD`: every routed expert's SwiGLU network on its own rows.
    - `combine(rows_JD, plan, weights_TK) -> y_TD`: back to token order, weighted by the gate.
    - `loss(x_TD, w_DV, targets_T, weights_T) -> TokenLoss`: cross-entropy through the output head.
    """

    linear: Callable
    norm_linear: Callable
    swiglu_linear: Callable
    attention: Callable
    dispatch: Callable
    experts: Callable
    combine: Callable
    loss: Callable


def linear(site: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return checkpoint_name(dot(x, w), site)


def norm_linear(
    sites: tuple[str, ...], x: jax.Array, gain: jax.Array, weights: tuple[jax.Array, ...], eps: float,
) -> tuple[jax.Array, ...]:
    normed = rms_norm(x, gain, eps)
    return tuple(linear(site, normed, w) for site, w in zip(sites, weights, strict=True))


def swiglu_linear(site: str, gate_up: jax.Array, w: jax.Array) -> jax.Array:
    return linear(site, swiglu(gate_up), w)


def dispatch(x_TD: jax.Array, topk_TK: jax.Array, n_experts: int, *, row_block: int):
    plan, sizes_E = checkpoint_name(make_plan(topk_TK, n_experts, row_block), "moe.plan")
    return checkpoint_name(permute(x_TD, plan), "experts.rows"), sizes_E, plan


def experts(
    rows_JD: jax.Array, sizes_E: jax.Array, weights: ExpertWeights, *, row_block: int, grouped_dot: Callable,
) -> jax.Array:
    gate_up_JF = checkpoint_name(grouped_dot(rows_JD, sizes_E, weights.gate_up_EDF, row_block), "experts.gate_up")
    return checkpoint_name(grouped_dot(swiglu(gate_up_JF), sizes_E, weights.down_EFD, row_block), "experts.down")


def reference_ops(*, row_block: int = 64, loss_chunk: int = 1024) -> Ops:
    """Plain jnp. `row_block` rows belong to one expert; the head sees `loss_chunk` tokens at a time."""
    return Ops(
        linear=linear,
        norm_linear=norm_linear,
        swiglu_linear=swiglu_linear,
        attention=causal_attention,
        dispatch=partial(dispatch, row_block=row_block),
        experts=partial(experts, row_block=row_block, grouped_dot=grouped_dot),
        combine=unpermute,
        loss=partial(cross_entropy, chunk=loss_chunk),
    )
