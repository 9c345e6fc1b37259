"""The bundle of operations that a model is built from: what varies (formats, kernels, meshes) comes in through here.

FP8, Hopper kernels and expert parallelism are other bundles, not other models. `reference_ops` is plain jnp and runs
anywhere. Build a bundle once and close over it: a bundle rebuilt for every call would retrace.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import QuantConfig
from dsv3.kernels.attention import Heads, rotary_attention
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
    """Seven functions, coarse enough that an implementation can fuse and share inside each.

    A `site` names the place of a product (`attn.q_a`, `mlp.down`, `mtp.eh_proj`), so that a recipe can give every
    place its own format; those of the routed experts are `experts.gate_up` and `experts.down`. Products take float32
    master weights, cast them to the dtype of the activation, and return float32 gradients for them.

    - `norm(x, gain, eps)`: RMSNorm over the last axis, in float32, rounded to the dtype of x.
    - `linear(site, x, w)`: x @ w.
    - `norm_linear(sites, x, gain, weights, eps)`: one RMSNorm of x, then one product per site from the same input.
    - `attention_linear(site, q_BTHX, kv_BTHY, k_rope_BTR, rotation_2BTP, w, scale=, segment_ids_BT=)`: causal core
      attention of whole projections (`Heads` of `dsv3/kernels/attention.py`), which it splits and rotates as it likes,
      then the product with the heads side by side.
    - `mlp(sites, x, gate_up, down)`: swiglu(x @ gate_up) @ down, two sites.
    - `moe(h_TD, topk_TK, weights_TK, weights) -> y_TD`: tokens to their experts, every expert's SwiGLU network on its
      own rows, and back, weighted by the gate.
    - `loss(x_TD, w_DV, targets_T, weights_T) -> TokenLoss`: cross-entropy through the output head.

    `layers`: bundles for the first layers, where they differ; an MTP module follows the layers of the trunk.

    Values that wait for the backward pass are named as `SAVED_BY_REPORT` (`dsv3/model/block.py`) lists them: a site's
    output by the site, what it keeps of its input `<site>.input`.
    """

    norm: Callable
    linear: Callable
    norm_linear: Callable
    attention_linear: Callable
    mlp: Callable
    moe: Callable
    loss: Callable
    layers: tuple["Ops", ...] = ()

    def of_layer(self, index: int) -> "Ops":
        return self.layers[index] if index < len(self.layers) else self

    def alike(self, first: int, length: int) -> list[tuple["Ops", slice]]:
        """Neighbouring layers with one bundle among `length` from `first` on; slices count from `first`."""
        found = [(ops, list(run)) for ops, run in groupby(range(length), lambda index: self.of_layer(first + index))]
        return [(ops, slice(run[0], run[-1] + 1)) for ops, run in found]


def bundles_of_layers(quant: QuantConfig, build: Callable[[QuantConfig], Ops]) -> tuple[Ops, ...]:
    """`build` of every layer's own recipe, up to the last layer that `quant` names; layers alike have one bundle."""
    numbers = range(1 + max((layers.last for layers in quant.layers), default=-1))
    quants = [quant.of_layer(number) for number in numbers]
    bundles = {own: build(own) for own in quants}
    return tuple(bundles[own] for own in quants)


def linear(site: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return checkpoint_name(dot(x, w), site)


def norm_linear(
    sites: tuple[str, ...], x: jax.Array, gain: jax.Array, weights: tuple[jax.Array, ...], eps: float,
    *, norm: Callable,
) -> tuple[jax.Array, ...]:
    normed = norm(x, gain, eps)
    return tuple(linear(site, normed, w) for site, w in zip(sites, weights, strict=True))


def attention(
    heads: Heads, rotation_2BTP: jax.Array, scale: float, segment_ids_BT: jax.Array | None,
) -> jax.Array:
    return checkpoint_name(rotary_attention(heads, rotation_2BTP, scale, segment_ids_BT), "attn.core")


def attention_linear(
    site: str, q_BTHX: jax.Array, kv_BTHY: jax.Array, k_rope_BTR: jax.Array, rotation_2BTP: jax.Array, w: jax.Array, *,
    scale: float, segment_ids_BT: jax.Array | None, attention: Callable,
) -> jax.Array:
    """`attention(heads, rotation_2BTP, scale, segment_ids_BT)` names what it keeps, its output with it."""
    with jax.named_scope("attention"):
        o_BTHU = attention(Heads(q_BTHX, kv_BTHY, k_rope_BTR), rotation_2BTP, scale, segment_ids_BT)
    return linear(site, o_BTHU.reshape(*o_BTHU.shape[:2], w.shape[0]), w)


def mlp(sites: tuple[str, str], x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    hidden = checkpoint_name(dot(x, gate_up), f"{sites[1]}.input")
    return linear(sites[1], swiglu(hidden), down)


def moe(
    h_TD: jax.Array, topk_TK: jax.Array, weights_TK: jax.Array, weights: ExpertWeights, *, row_block: int,
    grouped_dot: Callable, keep_rows: bool,
) -> jax.Array:
    """`row_block` rows belong to one expert. Without `keep_rows` they are gathered again in the backward pass."""
    with jax.named_scope("dispatch"):
        plan, sizes_E = checkpoint_name(make_plan(topk_TK, len(weights.gate_up_EDF), row_block), "moe.plan")
        rows_JD = permute(h_TD, plan)
        rows_JD = checkpoint_name(rows_JD, "experts.rows") if keep_rows else rows_JD
    with jax.named_scope("experts"):
        gate_up_JF = grouped_dot(rows_JD, sizes_E, weights.gate_up_EDF, row_block)
        gate_up_JF = checkpoint_name(gate_up_JF, "experts.down.input")
        rows_JD = checkpoint_name(grouped_dot(swiglu(gate_up_JF), sizes_E, weights.down_EFD, row_block), "experts.down")
    with jax.named_scope("combine"):
        return unpermute(rows_JD, plan, weights_TK)


def reference_ops(*, row_block: int = 64, loss_chunk: int = 1024) -> Ops:
    """Plain jnp. `row_block` rows belong to one expert; the head sees `loss_chunk` tokens at a time."""
    return Ops(
        norm=rms_norm,
        linear=linear,
        norm_linear=partial(norm_linear, norm=rms_norm),
        attention_linear=partial(attention_linear, attention=attention),
        mlp=mlp,
        moe=partial(moe, row_block=row_block, grouped_dot=grouped_dot, keep_rows=True),
        loss=partial(cross_entropy, chunk=loss_chunk),
    )
