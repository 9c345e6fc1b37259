"""The bundle of operations of a recipe: every Linear in 8 bits, as the report trains (section 3.3).

What waits for the backward pass is quantised: the input of a product as its rule's `kept` (packed where 12 bits wide),
the input of SwiGLU as `swiglu_kept`, weights as dgrad reads them. Nothing waits that can be made again at the price
of one read: the output of RMSNorm and of SwiGLU, and experts' rows, which are gathered from quantised tokens.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import QuantConfig
from dsv3.kernels.attention import Heads
from dsv3.kernels.fp8_kernels import REFERENCE, Kernels
from dsv3.kernels.quantized_dot import (
    Linear,
    input_gradient,
    quantize_input,
    quantize_weights,
    quantized_dot,
    wgrad_input,
)
from dsv3.kernels.scaled import TILE, Blocks, Tiles, whole
from dsv3.model import fp8_feed_forward
from dsv3.model.ops import ExpertWeights, Ops, bundles_of_layers, reference_ops


class Recipe(NamedTuple):
    """A recipe, the functions that carry it out, and the bundle for places that it leaves alone."""

    quant: QuantConfig
    kernels: Kernels
    base: Ops

    def linear_at(self, site: str) -> Linear | None:
        rule = self.quant.rule_of(site)
        return rule and Linear(site, rule, self.kernels)


def fp8_ops(quant: QuantConfig, kernels: Kernels = REFERENCE, base: Ops | None = None) -> Ops:
    """`quant` carried out by `kernels`. Sites without a rule, norms whose result is not quantised, and the
    loss are those of `base` (reference)."""
    recipe = Recipe(quant, kernels, base or reference_ops())
    functions = {"linear": linear, "norm_linear": norm_linear, "attention_linear": attention_linear, "mlp": mlp,
                 "moe": moe}
    layers = bundles_of_layers(quant, lambda quant: fp8_ops(quant, kernels, recipe.base))
    return Ops(norm=recipe.base.norm, loss=recipe.base.loss, layers=layers,
               **{name: partial(function, recipe) for name, function in functions.items()})


def linear(recipe: Recipe, site: str, x: jax.Array, w: jax.Array) -> jax.Array:
    rule = recipe.quant.rule_of(site)
    if rule is None:
        return recipe.base.linear(site, x, w)
    return checkpoint_name(quantized_dot(x, w, rule, kernels=recipe.kernels, site=site), site)


def norm_linear(
    recipe: Recipe, sites: tuple[str, ...], x: jax.Array, gain: jax.Array, weights: tuple[jax.Array, ...], eps: float,
) -> tuple[jax.Array, ...]:
    """Neighbouring sites of one rule share a quantised input and are one product.

    But not where sums span tiles before they are promoted: side by side, each matrix has its own scales.
    """
    def shared_by(pair):
        rule = recipe.quant.rule_of(pair[0])
        return rule, pair[0] if rule and rule.interval > TILE else None

    outputs = []
    for (rule, _), group in groupby(zip(sites, weights, strict=True), key=shared_by):
        names, matrices = zip(*group, strict=True)
        if rule is None:
            outputs += recipe.base.norm_linear(names, x, gain, matrices, eps)
            continue
        products = _norm_dot(
            x.reshape(-1, x.shape[-1]), gain, matrices, eps, Linear(names[0], rule, recipe.kernels))
        outputs += [checkpoint_name(y_MN.reshape(x.shape[:-1] + y_MN.shape[-1:]), name)
                    for name, y_MN in zip(names, products, strict=True)]
    return tuple(outputs)


def _side_by_side(matrices: Sequence[Blocks] | Sequence[Tiles], axis: int) -> Blocks | Tiles:
    """Whole blocks or tiles of several matrices after each other, along rows (0) or the inner dimension (1)."""
    values, scales = zip(*matrices, strict=True)
    scales_axis = axis if isinstance(matrices[0], Blocks) else 1 - axis
    return type(matrices[0])(jnp.concatenate(values, axis=axis), jnp.concatenate(scales, axis=scales_axis))


def _parts(array: jax.Array, widths: list[int]) -> list[jax.Array]:
    """The columns of each of several matrices that stand side by side in whole tiles."""
    starts = [sum(map(whole, widths[:index])) for index in range(len(widths))]
    return [array[:, start:start + width] for start, width in zip(starts, widths, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm_dot(x_MK, gain_K, weights, eps, place):
    """RMSNorm(x) times each of `weights`. Of the normed x nothing waits: the backward pass makes it from x again."""
    return _norm_dot_forward(x_MK, gain_K, weights, eps, place)[0]


def _norm_dot_forward(x_MK, gain_K, weights, eps, place):
    rows, _ = place.kernels.norm_quantize(x_MK, gain_K, eps, place.rule.fprop_x, None)
    forward_w, dgrad_w = zip(*(quantize_weights(w, place) for w in weights), strict=True)
    matrix = _side_by_side(forward_w, 0)
    y_MN = place.products.dot(rows, matrix, (len(x_MK), len(matrix.values)), x_MK.dtype)
    return tuple(_parts(y_MN, [w.shape[1] for w in weights])), (x_MK, gain_K, _side_by_side(dgrad_w, 1))


def _norm_dot_backward(eps, place, residuals, d_outputs):
    x_MK, gain_K, dgrad_w = residuals
    (m, k), rule, kernels = x_MK.shape, place.rule, place.kernels
    normed_MK, norm_vjp = jax.vjp(lambda x, gain: kernels.norm(x, gain, eps), x_MK, gain_K)
    d_rows, d_columns = zip(*(kernels.quantize_both(d_y, rule.dgrad_dy, rule.wgrad_dy) for d_y in d_outputs),
                            strict=True)
    d_normed_MK = place.products.dot(_side_by_side(d_rows, 1), dgrad_w, (m, k), x_MK.dtype)
    if rule.kept is None:
        columns = kernels.quantize_columns(normed_MK, rule.wgrad_x)
    else:
        rows, _ = kernels.norm_quantize(x_MK, gain_K, eps, rule.kept, None)
        columns = kernels.requantize_columns(rows, rule.wgrad_x)
    d_w = place.products.weight_gradient(columns, _side_by_side(d_columns, 0))[:k]
    return *norm_vjp(d_normed_MK), tuple(_parts(d_w, [d_y.shape[1] for d_y in d_outputs]))


_norm_dot.defvjp(_norm_dot_forward, _norm_dot_backward)


def attention_linear(
    recipe: Recipe, site: str, q_BTHX: jax.Array, kv_BTHY: jax.Array, k_rope_BTR: jax.Array, rotation_2BTP: jax.Array,
    w: jax.Array, *, scale: float, segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """The output of attention waits once, quantised, for its own backward pass and for the product's."""
    place, heads = recipe.linear_at(site), Heads(q_BTHX, kv_BTHY, k_rope_BTR)
    if place is None:
        return recipe.base.attention_linear(
            site, *heads, rotation_2BTP, w, scale=scale, segment_ids_BT=segment_ids_BT)
    return checkpoint_name(_attention_dot(heads, rotation_2BTP, w, segment_ids_BT, scale, place), site)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention_dot(heads, rotation_2BTP, w, segment_ids_BT, scale, place):
    return _attention_dot_forward(heads, rotation_2BTP, w, segment_ids_BT, scale, place)[0]


def _attention_dot_forward(heads, rotation_2BTP, w, segment_ids_BT, scale, place):
    with jax.named_scope("attention"):
        o_BTHU, kept = place.kernels.attention.forward(heads, rotation_2BTP, scale, segment_ids_BT)
    o_MK = o_BTHU.reshape(-1, w.shape[0])
    rows, waiting = quantize_input(o_MK, place)
    # Without a format to keep, attention's own backward pass needs the output itself.
    waiting = (waiting, None if place.rule.kept else checkpoint_name(o_MK, "attn.core"))
    forward_w, dgrad_w = quantize_weights(w, place)
    y_MN = place.products.dot(rows, forward_w, (len(o_MK), w.shape[1]), o_MK.dtype)
    residuals = heads, rotation_2BTP, segment_ids_BT, waiting, checkpoint_name(kept, "attn.core"), dgrad_w
    return y_MN.reshape(*o_BTHU.shape[:2], w.shape[1]), residuals


def _attention_dot_backward(scale, place, residuals, d_y_BTD):
    heads, rotation_2BTP, segment_ids_BT, (waiting, o_MK), kept, dgrad_w = residuals
    d_y_MN = d_y_BTD.reshape(-1, d_y_BTD.shape[-1])
    shape = (*heads.kv_BTHY.shape[:3], heads.n_value)
    n_in = shape[2] * shape[3]
    if o_MK is None:
        o_MK, columns = place.kernels.unpack_both(
            waiting, place.rule.kept, place.rule.wgrad_x, heads.kv_BTHY.dtype)
        o_MK = o_MK[:len(d_y_MN), :n_in]
    else:
        columns = wgrad_input(waiting, place)
    d_o_MK, d_y_columns = input_gradient(d_y_MN, dgrad_w, n_in, place)
    d_w = place.products.weight_gradient(columns, d_y_columns)[:n_in, :d_y_MN.shape[1]]
    with jax.named_scope("attention"):
        d_heads = place.kernels.attention.backward(
            heads, rotation_2BTP, scale, segment_ids_BT, o_MK.reshape(shape), kept, d_o_MK.reshape(shape))
    return d_heads, None, d_w, None


_attention_dot.defvjp(_attention_dot_forward, _attention_dot_backward)


def mlp(recipe: Recipe, sites: tuple[str, str], x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """In 8 bits as a whole: a recipe has a rule for both sites or for none."""
    up_place, down_place = map(recipe.linear_at, sites)
    if up_place is None:
        return recipe.base.mlp(sites, x, gate_up, down)
    network = fp8_feed_forward.FeedForward(up_place, down_place, recipe.quant.swiglu_kept)
    y_MD = fp8_feed_forward.mlp(x.reshape(-1, x.shape[-1]), gate_up, down, network)
    return checkpoint_name(y_MD.reshape(x.shape[:-1] + y_MD.shape[-1:]), sites[1])


def moe(
    recipe: Recipe, h_TD: jax.Array, topk_TK: jax.Array, weights_TK: jax.Array, weights: ExpertWeights,
) -> jax.Array:
    up_place, down_place = map(recipe.linear_at, ("experts.gate_up", "experts.down"))
    if up_place is None:
        return recipe.base.moe(h_TD, topk_TK, weights_TK, weights)
    network = fp8_feed_forward.FeedForward(up_place, down_place, recipe.quant.swiglu_kept)
    return fp8_feed_forward.moe(h_TD, topk_TK, weights_TK, weights, network)
