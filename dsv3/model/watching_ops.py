"""A bundle that measures: what a recipe's formats do to every operand of every product of a model.

Products are computed by the functions given; statistics are put where the gradients of their weights would be
(`dsv3.kernels.watched`), and a program of its own takes them out (`dsv3.train.numerics`). Whatever a fused operation of
a recipe does at once is done here one product at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import QuantConfig
from dsv3.kernels.attention import Heads, rotary_attention
from dsv3.kernels.cross_entropy import cross_entropy
from dsv3.kernels.dot import dot
from dsv3.kernels.grouped_dot import grouped_dot
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.quantized_dot import fp8_grouped_dot, quantized_dot
from dsv3.kernels.swiglu import swiglu
from dsv3.kernels.watched import watched
from dsv3.model import ops
from dsv3.model.ops import Ops, bundles_of_layers
from dsv3.quant.monitor import Statistics, observe_product

SITES = {
    **{("attn", name): f"attn.{name}" for name in ("q", "q_a", "q_b", "kv_a", "kv_b", "o")},
    **{("mlp", name): f"mlp.{name}" for name in ("gate_up", "down")},
    **{("moe", f"shared_{name}"): f"shared.{name}" for name in ("gate_up", "down")},
    **{("moe", f"experts_{name}"): f"experts.{name}" for name in ("gate_up", "down")},
    ("mtp", "eh_proj"): "mtp.eh_proj",
}
"""The last two names of a parameter (without a depth) -> its site. Parameters that are not here take part in no product
that a recipe speaks of: embedding, head, gate, norms."""

ROW_BLOCK = 128
"""Rows of one expert, as tiles along tokens need them."""


def site_of(path: tuple[str, ...]) -> str | None:
    """`("moe_layers", "attn", "q_a")` -> `"attn.q_a"`; None for embedding, head, gate and norms."""
    *_, module, name = ("", *path)
    return SITES.get((module.rstrip("0123456789").rstrip("_"), name))


def _observe(rule: Any, x: jax.Array, w: jax.Array, d_y: jax.Array) -> dict[str, Statistics]:
    return observe_product(rule, x, w, d_y) if rule is not None else {}


def watching_ops(
    recipe: QuantConfig, *, quantized: bool, attention: Callable = rotary_attention, loss_chunk: int = 1024,
) -> Ops:
    """Every product of a model, watched for what the formats of `recipe` in its layer do to it; sites without a rule
    are left out.

    `quantized`: products compute by the recipe, so the tensors are those of a run with it; otherwise they compute in
    the model's dtype, and the figures say what the recipe would do to a run without it.
    """
    def product(site):
        rule = recipe.rule_of(site)
        return partial(quantized_dot, rule=rule) if quantized and rule else dot

    def grouped_product(site):
        rule = recipe.rule_of(site)
        if quantized and rule:
            return lambda rows_JD, sizes_E, w: fp8_grouped_dot(rows_JD, sizes_E, w, rule)
        return lambda rows_JD, sizes_E, w: grouped_dot(rows_JD, sizes_E, w, ROW_BLOCK)

    def linear(site, x, w):
        return checkpoint_name(watched(product(site), partial(_observe, recipe.rule_of(site)))(x, w), site)

    def norm_linear(sites, x, gain, weights, eps):
        normed = rms_norm(x, gain, eps)
        return tuple(linear(site, normed, w) for site, w in zip(sites, weights, strict=True))

    def attention_linear(site, q_BTHX, kv_BTHY, k_rope_BTR, rotation_2BTP, w, *, scale, segment_ids_BT):
        o_BTHU = attention(Heads(q_BTHX, kv_BTHY, k_rope_BTR), rotation_2BTP, scale, segment_ids_BT)
        return linear(site, o_BTHU.reshape(*o_BTHU.shape[:2], -1), w)

    def mlp(sites, x, gate_up, down):
        return linear(sites[1], swiglu(linear(sites[0], x, gate_up)), down)

    def grouped(site, rows_JD, sizes_E, w):
        run = lambda rows_sizes, w: grouped_product(site)(*rows_sizes, w)
        observe = lambda rows_sizes, w, d_y: _observe(recipe.rule_of(site), rows_sizes[0], w, d_y)
        return watched(run, observe)((rows_JD, sizes_E), w)

    def moe(h_TD, topk_TK, weights_TK, weights):
        sites = iter(("experts.gate_up", "experts.down"))  # in the order in which they are called
        each = lambda rows_JD, sizes_E, w, block: grouped(next(sites), rows_JD, sizes_E, w)
        return ops.moe(h_TD, topk_TK, weights_TK, weights, row_block=ROW_BLOCK, grouped_dot=each, keep_rows=True)

    layers = bundles_of_layers(recipe, partial(
        watching_ops, quantized=quantized, attention=attention, loss_chunk=loss_chunk))
    return Ops(norm=rms_norm, linear=linear, norm_linear=norm_linear, attention_linear=attention_linear, mlp=mlp,
               moe=moe, loss=partial(cross_entropy, chunk=loss_chunk), layers=layers)
