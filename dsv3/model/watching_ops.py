"""A bundle that measures: what a recipe's formats would do to every operand of every product of a model.

It computes what `ops` computes, products by the functions given, and puts statistics where the gradients of the weights
would be (`dsv3.kernels.watched`). A program of its own takes them out (`dsv3.train.numerics`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.kernels.dot import dot
from dsv3.kernels.grouped_dot import grouped_dot
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.swiglu import swiglu
from dsv3.kernels.watched import watched
from dsv3.model.ops import Ops
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


def site_of(path: tuple[str, ...]) -> str | None:
    """`("moe_layers", "attn", "q_a")` -> `"attn.q_a"`; None for embedding, head, gate and norms."""
    *_, module, name = ("", *path)
    return SITES.get((module.rstrip("0123456789").rstrip("_"), name))


def _observe(rule: Any, x: jax.Array, w: jax.Array, d_y: jax.Array) -> dict[str, Statistics]:
    return observe_product(rule, x, w, d_y) if rule is not None else {}


def watching_ops(
    ops: Ops, rule_of: Callable[[str], Any], row_block: int, *,
    product: Callable[[str], Callable] = lambda site: dot,
    grouped_product: Callable[[str], Callable] = lambda site: grouped_dot,
) -> Ops:
    """`ops` with every product watched. `rule_of(site)` gives its formats, or None for a site to be left out.

    `product(site)(x, w)` and `grouped_product(site)(rows, sizes, w, row_block)` compute: the reference's unless given,
    so that the tensors measured are those of a run without FP8; a recipe's own, and they are those of a run with it.
    """
    def linear(site, x, w):
        return checkpoint_name(watched(product(site), partial(_observe, rule_of(site)))(x, w), site)

    def norm_linear(sites, x, gain, weights, eps):
        normed = rms_norm(x, gain, eps)
        return tuple(linear(site, normed, w) for site, w in zip(sites, weights, strict=True))

    def swiglu_linear(site, gate_up, w):
        return linear(site, swiglu(gate_up), w)

    def grouped(site, rows_JD, sizes_E, w):
        run = lambda rows_sizes, w: grouped_product(site)(*rows_sizes, w, row_block)
        observe = lambda rows_sizes, w, d_y: _observe(rule_of(site), rows_sizes[0], w, d_y)
        return checkpoint_name(watched(run, observe)((rows_JD, sizes_E), w), site)

    def experts(rows_JD, sizes_E, weights):
        gate_up_JF = grouped("experts.gate_up", rows_JD, sizes_E, weights.gate_up_EDF)
        return grouped("experts.down", swiglu(gate_up_JF), sizes_E, weights.down_EFD)

    return dataclasses.replace(
        ops, linear=linear, norm_linear=norm_linear, swiglu_linear=swiglu_linear, experts=experts)
