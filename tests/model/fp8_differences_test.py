"""Gradients in 8 bits against central differences in float64 of the functions that they are the gradients of.

The quantised function is piecewise constant, so it has no gradient to compare with. What the backward passes stand for
is the function of decoded operands with rounding as a constant offset, x + (decode(q(x0)) - x0): "straight through". At
x0 it reads what the products read, and it is smooth. Its gradient is theirs as soon as nothing else is rounded: the
gradients' own formats, and the second quantisation of inputs along tokens, are those of a recipe. So here they have a
format with all the bits of float32, and everything that waits or is read forward stays as the report has it.

The input of SwiGLU waits in E4M3 and its output is made from that: the function is the one of the cached numbers.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipe import seen

from dsv3.config import Operand, resolve
from dsv3.config.quant import change_rules
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.quantized_dot import quantized_dot
from dsv3.model.fp8_ops import fp8_ops
from dsv3.model.ops import ExpertWeights
from dsv3.quant.formats import FORMATS, Format

STEP, TOLERANCE = 1e-5, 3e-6


@dataclass(frozen=True, kw_only=True)
class Whole(Operand):
    """An operand that loses nothing. No config may name its format."""

    def __post_init__(self) -> None:
        pass


WHOLE = Whole(format="whole", tile="inner", power_of_two=True)
RECIPE = change_rules(resolve("fp8"), lambda rule: replace(rule, wgrad_x=WHOLE, dgrad_dy=WHOLE, wgrad_dy=WHOLE))
D, F, T = 136, 132, 24  # two tiles along every axis of a weight


@pytest.fixture(autouse=True)
def whole_format(monkeypatch):
    monkeypatch.setitem(FORMATS, "whole", Format("whole", 7, 23, 2.0 ** 62, False, np.dtype(np.float32)))


def numbers(*shapes, seed=0):
    """Normal numbers that float32 holds; of a matrix, every row in its own size."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) * 2.0 ** rng.integers(-2, 3, (*shape[:-1], 1))).astype(np.float32).astype(
        np.float64) for shape in shapes]


def rounded(x, operand):
    """x -> x + what rounding does to this x."""
    offset = seen(x, operand) - x
    return lambda x: x + offset


def swiglu(gate_up):
    gate, up = np.split(gate_up, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def check(product, function, point, d_y):
    """The gradient of sum(d_y * product(*point)) by every argument, along five directions, and the differences of
    `function`."""
    cast = lambda tree: jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), tree)
    gradients = jax.jit(lambda point, d_y: jax.vjp(product, *point)[1](d_y))(cast(point), cast(d_y))
    rng = np.random.default_rng(9)
    total = lambda *point: sum(
        np.sum(d * y) for d, y in zip(jax.tree.leaves(d_y), jax.tree.leaves(function(*point)), strict=True))
    for index, (x, gradient) in enumerate(zip(point, gradients, strict=True)):
        gradient = np.asarray(gradient, np.float64)
        for _ in range(5):
            v = rng.standard_normal(x.shape)
            ahead, back = (total(*point[:index], x + step * v, *point[index + 1:]) for step in (STEP, -STEP))
            found = np.sum(gradient * v)
            assert abs(found - (ahead - back) / (2 * STEP)) < TOLERANCE * np.linalg.norm(gradient), index


def as_cached(x, w, sites):
    """gate_up as its product gives it and as it waits, less the exact product: what SwiGLU's backward pass adds."""
    rule = RECIPE.rule_of(sites[0])
    gate_up = quantized_dot(*(jnp.asarray(array, jnp.float32) for array in (x, w)), rule)
    return seen(gate_up, RECIPE.swiglu_kept) - seen(x, rule.fprop_x) @ seen(w, rule.fprop_w)


def test_a_linear():
    x, w, d_y = numbers((T, D), (D, F), (T, F))
    rule = RECIPE.default
    decoded_x, decoded_w = rounded(x, rule.fprop_x), rounded(w, rule.fprop_w)
    check(lambda x, w: fp8_ops(RECIPE).linear("mlp.down", x, w), lambda x, w: decoded_x(x) @ decoded_w(w), (x, w), d_y)


@pytest.mark.parametrize("sites", [("mlp.gate_up", "mlp.down"), ("experts.gate_up", "experts.down")])
def test_a_feed_forward_network(sites):
    """By the rules of dense networks, and of experts', whose scales are powers of two."""
    x, up, down, d_y = numbers((T, D), (D, 2 * F), (F, D), (T, D))
    up, down = up / 16, down / 16
    first, second = map(RECIPE.rule_of, sites)
    decoded_x, decoded_up, decoded_down = (
        rounded(x, first.fprop_x), rounded(up, first.fprop_w), rounded(down, second.fprop_w))
    cached = as_cached(x, up, sites)
    function = lambda x, up, down: swiglu(decoded_x(x) @ decoded_up(up) + cached) @ decoded_down(down)
    check(lambda x, up, down: fp8_ops(RECIPE).mlp(sites, x, up, down), function, (x, up, down), d_y)


@pytest.mark.slow
def test_experts():
    """The gate's weights are arguments too. Of four experts nobody visits the last, and one alone visits the third."""
    h, up, down, d_y = numbers((T, D), (4, D, 2 * F), (4, F, D), (T, D))
    up, down, gate = up / 16, down / 16, np.abs(*numbers((T, 2), seed=1))
    topk = np.tile(np.int32([[0, 1]]), (T, 1))
    topk[5] = 2, 0
    sites = ("experts.gate_up", "experts.down")
    first, second = map(RECIPE.rule_of, sites)
    decoded_h, decoded_up, decoded_down = (
        rounded(h, first.fprop_x), rounded(up, first.fprop_w), rounded(down, second.fprop_w))
    visits = [np.nonzero(topk == expert) for expert in range(4)]
    cached = [as_cached(h[t], w, sites) for (t, _), w in zip(visits[:3], up)]

    def function(h, gate, up, down):
        y, rows, up, down = np.zeros_like(h), decoded_h(h), decoded_up(up), decoded_down(down)
        for expert, offset in enumerate(cached):
            t, k = visits[expert]
            y[t] += gate[t, k][:, None] * (swiglu(rows[t] @ up[expert] + offset) @ down[expert])
        return y

    product = lambda h, gate, up, down: fp8_ops(RECIPE).moe(h, jnp.asarray(topk), gate, ExpertWeights(up, down))
    check(product, function, (h, gate, up, down), d_y)


def test_a_norm_and_its_linears():
    """Two matrices side by side; and the gain."""
    x, gain, d_one, d_two = numbers((T, D), (1, D), (T, F), (T, 40))
    matrices, gain, eps = numbers((D, F), (D, 40), seed=1), gain[0], 1e-6
    rule = RECIPE.default
    normed = rms_norm(*(jnp.asarray(array, jnp.float32) for array in (x, gain)), eps)
    offset = seen(normed, rule.fprop_x) - np.asarray(normed, np.float64)
    decoded_w = [rounded(w, rule.fprop_w) for w in matrices]

    def function(x, gain, *weights):
        normed = x / np.sqrt(np.mean(x ** 2, axis=1, keepdims=True) + eps) * gain + offset
        return tuple(normed @ decoded(w) for decoded, w in zip(decoded_w, weights, strict=True))

    product = lambda x, gain, *weights: fp8_ops(RECIPE).norm_linear(("attn.q_a", "attn.kv_a"), x, gain, weights, eps)
    check(product, function, (x, gain, *matrices), (d_one, d_two))
