"""A bundle that measures: what a recipe's formats do to every operand of every product of a model.

Products are computed by the functions given; statistics are put where the gradients of their weights would be
(`dsv3.kernels.watched`), and a program of its own takes them out (`dsv3.train.numerics`). Whatever a fused operation of
a recipe does at once is done here one product at a time, and measured on the tensors that it quantises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import QuantConfig
from dsv3.kernels.attention import Heads, rotary_attention
from dsv3.kernels.cross_entropy import cross_entropy
from dsv3.kernels.dot import dot
from dsv3.kernels.grouped_dot import grouped_dot
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.permute import make_plan, permute, unpermute, weight_of_row
from dsv3.kernels.quantized_dot import fp8_grouped_dot, quantized_dot
from dsv3.kernels.swiglu import swiglu
from dsv3.kernels.watched import watched
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


def _observe(rule: Any, *arrays: jax.Array, **for_wgrad: jax.Array) -> dict[str, Statistics]:
    return observe_product(rule, *arrays, **for_wgrad) if rule is not None else {}


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
        return linear(site, o_BTHU.reshape(*o_BTHU.shape[:2], w.shape[0]), w)

    def mlp(sites, x, gate_up, down):
        return linear(sites[1], swiglu(linear(sites[0], x, gate_up)), down)

    def gate_up(h_TD, plan, sizes_E, w):
        rule, product = recipe.rule_of("experts.gate_up"), grouped_product("experts.gate_up")
        run = lambda inputs, w: product(permute(inputs[0], inputs[1]), inputs[2], w)
        observe = lambda inputs, w, d_y_JF: _observe(rule, inputs[0], w, d_y_JF, wgrad_x=permute(*inputs[:2]))
        return watched(run, observe)((h_TD, plan, sizes_E), w)

    def down(h_JF, plan, sizes_E, weights_TK, w):
        """With the way back to tokens, so that the gradient is seen as it comes: without the gate's weights."""
        rule, product = recipe.rule_of("experts.down"), grouped_product("experts.down")
        run = lambda inputs, w: unpermute(product(inputs[0], inputs[2], w), inputs[1], inputs[3])

        def observe(inputs, w, d_y_TD):
            h_JF, plan, _, weights_TK = inputs
            weighted_JF = (h_JF.astype(jnp.float32) * weight_of_row(weights_TK, plan)[:, None]).astype(h_JF.dtype)
            return _observe(rule, h_JF, w, d_y_TD, wgrad_x=weighted_JF, wgrad_dy=permute(d_y_TD, plan))

        return watched(run, observe)((h_JF, plan, sizes_E, weights_TK), w)

    def moe(h_TD, topk_TK, weights_TK, weights):
        plan, sizes_E = checkpoint_name(make_plan(topk_TK, len(weights.gate_up_EDF), ROW_BLOCK), "moe.plan")
        gate_up_JF = checkpoint_name(gate_up(h_TD, plan, sizes_E, weights.gate_up_EDF), "experts.down.input")
        return checkpoint_name(down(swiglu(gate_up_JF), plan, sizes_E, weights_TK, weights.down_EFD), "experts.down")

    layers = bundles_of_layers(recipe, partial(
        watching_ops, quantized=quantized, attention=attention, loss_chunk=loss_chunk))
    return Ops(norm=rms_norm, linear=linear, norm_linear=norm_linear, attention_linear=attention_linear, mlp=mlp,
               moe=moe, loss=partial(cross_entropy, chunk=loss_chunk), layers=layers)
