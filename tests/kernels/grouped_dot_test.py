"""Grouped products against float64 NumPy and the obvious loop, whatever the sizes of the groups."""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.kernels.grouped_dot import block_experts, block_starts, grouped_dot, grouped_dot_loop, padded_rows

E, D, F, BLOCK, ROWS = 5, 6, 7, 4, 21
J = padded_rows(ROWS, E, BLOCK)
W_EDF = np.random.default_rng(0).standard_normal((E, D, F))

NAMED = {
    "ragged": [3, 7, 1, 6, 4],
    "empty_experts": [0, 9, 0, 12, 0],
    "all_on_the_first": [21, 0, 0, 0, 0],
    "all_on_one": [0, 0, 21, 0, 0],
    "all_on_the_last": [0, 0, 0, 0, 21],
    "whole_blocks": [4, 8, 0, 4, 4],
    "one_row_each": [1, 1, 1, 1, 1],
    "nothing": [0, 0, 0, 0, 0],
}

sizes = st.lists(st.integers(0, ROWS), min_size=E - 1, max_size=E - 1).map(
    lambda cuts: np.diff([0, *sorted(cuts), ROWS]).tolist())


def expert_of_rows(sizes):
    """The expert of each of the J rows, or -1 on padding: groups one after the other, each filled up to blocks."""
    of_row = [e for e, size in enumerate(sizes) for e in [e] * size + [-1] * (-size % BLOCK)]
    return np.array(of_row + [-1] * (J - len(of_row)))


def problem(sizes, seed=1):
    """Rows (zero on padding), a cotangent, and the expert of every row."""
    rng, expert_J = np.random.default_rng(seed), expert_of_rows(sizes)
    rows_JD = rng.standard_normal((J, D)) * (expert_J >= 0)[:, None]
    return rows_JD, rng.standard_normal((J, F)), expert_J


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, rows_JD, sizes_E, w_EDF, cotangent_JF):
    out, vjp = jax.vjp(lambda rows, w: function(rows, sizes_E, w, BLOCK), rows_JD, w_EDF)
    return out, *vjp(cotangent_JF)


def run(function, sizes, dtype=jnp.float32):
    rows, cotangent, _ = problem(sizes)
    cast = partial(jnp.asarray, dtype=dtype)
    return value_and_gradients(function, cast(rows), jnp.array(sizes, jnp.int32), cast(W_EDF), cast(cotangent))


def in_64(sizes):
    """Row by row: y = x W_e, dx = g W_e^T, dW_e += x^T g; nothing on padding."""
    rows, cotangent, expert_J = problem(sizes)
    out, d_rows, d_w = np.zeros((J, F)), np.zeros((J, D)), np.zeros((E, D, F))
    for j, e in enumerate(expert_J):
        if e >= 0:
            out[j], d_rows[j] = rows[j] @ W_EDF[e], W_EDF[e] @ cotangent[j]
            d_w[e] += np.outer(rows[j], cotangent[j])
    return out, d_rows, d_w


def check(function, sizes):
    expected = in_64(sizes)
    real = (expert_of_rows(sizes) >= 0)[:, None]
    out, d_rows, d_w = run(function, sizes)
    chex.assert_shape(out, (J, F))
    np.testing.assert_array_equal(np.where(real, 0, out), 0)
    for actual, wanted in zip((out, d_rows * real, d_w), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [grouped_dot, grouped_dot_loop])
@pytest.mark.parametrize("name", NAMED)
def test_value_and_gradients_agree_with_float64(function, name):
    check(function, NAMED[name])


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(sizes)
def test_any_sizes(sizes):
    check(grouped_dot, sizes)


@pytest.mark.parametrize("name", NAMED)
def test_agrees_with_the_loop_on_padding_too(name):
    """The gradient with respect to a padding row is the same in both forms, since both give it an expert."""
    chex.assert_trees_all_close(run(grouped_dot, NAMED[name]), run(grouped_dot_loop, NAMED[name]), atol=1e-5)


def test_experts_without_rows_get_no_gradient():
    _, _, d_w_EDF = run(grouped_dot, NAMED["empty_experts"])
    assert [bool(np.any(d_w)) for d_w in d_w_EDF] == [False, True, False, True, False]


def test_bfloat16_comes_out_as_bfloat16():
    out, _, d_w_EDF = run(grouped_dot, NAMED["ragged"], jnp.bfloat16)
    chex.assert_type([out, d_w_EDF], jnp.bfloat16)
    assert distance(out, in_64(NAMED["ragged"])[0]) < 0.01


@pytest.mark.parametrize("name", NAMED)
def test_blocks_know_their_expert(name):
    sizes_E, expert_J = jnp.array(NAMED[name], jnp.int32), expert_of_rows(NAMED[name])
    experts = block_experts(sizes_E, J // BLOCK, BLOCK)
    chex.assert_type(experts, jnp.int32)
    for block, expert in zip(expert_J.reshape(-1, BLOCK), np.asarray(experts), strict=True):
        assert set(block) == {-1} if expert == E else 0 <= expert < E and {expert} <= set(block) <= {expert, -1}


def test_starts_are_running_sums_of_whole_blocks():
    np.testing.assert_array_equal(block_starts(jnp.array([3, 0, 5, 4]), 4), [0, 4, 4, 12])


@hypothesis.given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_padded_rows_hold_any_sizes(sizes, block):
    needed = sum(-(-size // block) * block for size in sizes)
    available = padded_rows(sum(sizes), len(sizes), block)
    assert needed <= available and available % block == 0


@pytest.mark.parametrize("block", [1, 4, 64])
def test_padded_rows_are_no_more_than_the_worst_case(block):
    """Reached when every expert has one row more than whole blocks."""
    sizes = [block + 1] * 8
    assert padded_rows(sum(sizes), 8, block) == sum(-(-size // block) * block for size in sizes)
