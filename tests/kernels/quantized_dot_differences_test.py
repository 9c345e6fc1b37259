"""Gradients of the quantised products against their own differences, where the quantised function has any.

Rounding makes the function piecewise constant: its derivative is 0 or undefined, and no gradient equals it. Yet the
numbers that a format holds are a grid, on which rounding is the identity and the function is the exact, bilinear one.
From one point of the grid to the next its difference quotient is the derivative, whatever the size of the step. So the
forward pass as it runs says what its backward pass has to return: to the last bit, as no sum here has more than 24.

Off the grid, what the backward pass may differ by is bounded by the rounding of what it reads.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipe import LAYOUT, seen

from dsv3.config import resolve
from dsv3.kernels.grouped_dot import block_starts, padded_rows
from dsv3.kernels.quantized_dot import fp8_grouped_dot, quantized_dot
from dsv3.quant.tiles import tile_amax

RECIPES = {"fp8": resolve("fp8").default, "e5m6 kept": resolve("fp8").rule_of("attn.o"),
           "powers of two": resolve("fp8_power_of_two").default, "direct": resolve("fp8_direct").default,
           "e5m2 gradients": resolve("fp8_e5m2_gradients").default, "per tensor": resolve("fp8_per_tensor").default}
K, N = 136, 130  # two tiles along each axis
CHANGED = np.r_[0:K:4, 1, 127, 129]


class Grid(NamedTuple):
    """Numbers of a grid, and the next ones towards zero."""

    value: np.ndarray
    less: np.ndarray


def on_the_grid(rng, *shape):
    """Integers of three bits times powers of two that change by row, by column and by tile: float64 `shape`.

    The first two rows and columns of every tile hold 7 times the largest powers of it. So any tile of 128 along rows or
    columns, any block and the whole have amax 7 * 2^e = 448 * 2^(e - 6), also with one of them less: every scale is a
    power of two, and E4M3, E5M2 and E5M6 hold all of the numbers.
    """
    rows, columns = (np.arange(size) for size in shape[-2:])
    first = [place % 128 < 2 for place in (rows, columns)]
    row_power, column_power = (np.where(top, 1, rng.integers(0, 2, len(top))) for top in first)
    unit = 2.0 ** (row_power[:, None] + (column_power + columns // 128 % 2)[None])
    magnitude = np.where(first[0][:, None] | first[1][None], 7, rng.integers(1, 8, shape))
    sign = rng.choice([-1.0, 1.0], shape)
    return Grid(sign * magnitude * unit, sign * (magnitude - 1) * unit)


def differences(product, x, w, d_y, rows_of):
    """Gradients of sum(d_y * product(x, w)) by the `CHANGED` columns of x [M, K] and rows of w [E, K, N], as quotients
    of float64 differences.

    A step changes one column of x, or one row of every matrix: tokens and outputs are apart, so one step gives the
    derivative by that element of every token, or by that of every output of every expert.
    """
    @jax.jit
    def run(x, w):
        y, here = product(x.value, w.value), lambda k: (jnp.arange(K) == k)[None]
        by_x = lambda k: y - product(jnp.where(here(k), x.less, x.value), w.value)
        by_w = lambda k: y - product(x.value, jnp.where(here(k)[..., None], w.less, w.value))
        return jax.lax.map(by_x, CHANGED), jax.lax.map(by_w, CHANGED)

    moved = run(*jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), (x, w)))
    by_x, by_w = (np.asarray(array, np.float64) for array in moved)
    d_x = np.einsum("kmn,mn->mk", by_x, d_y)
    d_w = np.stack([np.einsum("kmn,mn->kn", by_w[:, rows], d_y[rows]) for rows in rows_of])
    return d_x / (x.value - x.less)[:, CHANGED], d_w / (w.value - w.less)[:, CHANGED]


def gradients(product, x, w, d_y):
    x, w, d_y = (jnp.asarray(array, jnp.float32) for array in (x, w, d_y))
    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(d_y)


@pytest.mark.parametrize("rule", RECIPES.values(), ids=RECIPES)
def test_a_linear_on_the_grid(rule):
    rng = np.random.default_rng(0)
    x, w, (d_y, _) = on_the_grid(rng, 70, K), on_the_grid(rng, 1, K, N), on_the_grid(rng, 70, N)
    product = lambda x, w: quantized_dot(x, w[0], rule)
    y, d_x, d_w = gradients(product, x.value, w.value, d_y)
    np.testing.assert_array_equal(y, x.value @ w.value[0])
    wanted = differences(product, x, w, d_y, [slice(None)])
    np.testing.assert_array_equal(d_x[:, CHANGED], wanted[0])
    np.testing.assert_array_equal(d_w[:, CHANGED], wanted[1])


@pytest.mark.parametrize("rule", [RECIPES["fp8"], RECIPES["direct"]], ids=["fp8", "direct"])
def test_experts_on_the_grid(rule):
    """Of unequal sizes, one of none: its gradient is that of a function that does not read it."""
    rng, sizes = np.random.default_rng(0), np.array([130, 0, 5, 3])
    n_rows, sizes_E = padded_rows(int(sizes.sum()), len(sizes), 128), jnp.asarray(sizes, jnp.int32)
    starts = np.asarray(block_starts(sizes_E, 128))
    rows_of = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    padding = np.ones((n_rows, 1), bool)
    for rows in rows_of:
        padding[rows] = False
    x, w, (d_y, _) = on_the_grid(rng, n_rows, K), on_the_grid(rng, len(sizes), K, N), on_the_grid(rng, n_rows, N)
    d_y, x = np.where(padding, 0, d_y), Grid(np.where(padding, 0, x.value), np.where(padding, 1, x.less))
    product = lambda rows, w: fp8_grouped_dot(rows, sizes_E, w, rule)
    _, d_rows, d_w = gradients(product, x.value, w.value, d_y)
    wanted = differences(product, x, w, d_y, rows_of)
    np.testing.assert_array_equal(d_rows[:, CHANGED], wanted[0])
    np.testing.assert_array_equal(d_w[:, CHANGED], wanted[1])
    assert np.any(d_w[0]) and not np.any(d_w[1])


def rounding(x, operand):
    """The most by which E4M3 moves numbers in tiles along the last axis: half a step of normal or subnormal ones."""
    amax = np.asarray(tile_amax(jnp.asarray(x, jnp.float32), LAYOUT[operand.tile]), np.float64)
    scale = np.repeat(amax, 128, axis=-1)[:, :x.shape[-1]] / 448 * (2 if operand.power_of_two else 1)
    return np.maximum(np.abs(x) / 16, scale * 2.0 ** -10) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["fp8", "powers of two"])
def test_a_linear_off_the_grid(name):
    """Any numbers, tokens of any size: every element of both gradients is within what rounding d_y, and the input once
    more along tokens, can do to the derivative of the product of decoded operands, which float64 knows in closed form.
    """
    rng, rule = np.random.default_rng(0), RECIPES[name]
    loud = 2.0 ** rng.integers(-4, 5, (200, 1))
    x, w, d_y = (rng.standard_normal(shape) for shape in ((200, K), (K, N), (200, N)))
    x, d_y = x * loud, d_y * loud[::-1]
    _, d_x, d_w = gradients(lambda x, w: quantized_dot(x, w, rule), x, w, d_y)
    decoded_x, decoded_w = seen(x, rule.fprop_x), seen(w, rule.fprop_w)
    assert np.all(np.abs(d_x - d_y @ decoded_w.T) <= rounding(d_y, rule.dgrad_dy) @ np.abs(decoded_w).T)
    x_moves, d_y_moves = rounding(decoded_x.T, rule.wgrad_x), rounding(d_y.T, rule.wgrad_dy)
    most = (np.abs(decoded_x).T + x_moves) @ (np.abs(d_y) + d_y_moves.T) - np.abs(decoded_x).T @ np.abs(d_y)
    assert np.all(np.abs(d_w - decoded_x.T @ d_y) <= most)
