"""Dispatch and combine: every pair has its one row, nothing is dropped, gradients are those of plain gathers."""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.kernels.grouped_dot import padded_rows
from dsv3.kernels.permute import make_plan, permute, unpermute

D = 3
SHAPES = [(6, 2, 5, 4), (9, 3, 4, 1), (1, 2, 8, 4), (7, 1, 3, 8)]  # tokens, choices, experts, block
plan_of = jax.jit(make_plan, static_argnums=(1, 2))


@st.composite
def routings(draw):
    """(topk_TK, experts, block) of one of a few shapes, so that few programs are compiled."""
    tokens, choices, experts, block = draw(st.sampled_from(SHAPES))
    expert = st.integers(0, experts - 1)
    topk = draw(st.lists(st.lists(expert, min_size=choices, max_size=choices), min_size=tokens, max_size=tokens))
    return np.array(topk, np.int32), experts, block


def skewed(kind):
    """The extremes: every token on one expert (all choices too), on the first, on the last; and round robin."""
    tokens, choices, experts, block = SHAPES[0]
    pairs = np.arange(tokens * choices).reshape(tokens, choices)
    topk = {"first": 0 * pairs, "middle": 0 * pairs + 2, "last": 0 * pairs + experts - 1, "even": pairs % experts}
    return topk[kind].astype(np.int32), experts, block


def check_plan(topk_TK, n_experts, block):
    plan, sizes_E = plan_of(topk_TK, n_experts, block)
    row_TK, pair_J, padding_P, sizes_E = map(np.asarray, (*plan, sizes_E))
    n_pairs = topk_TK.size
    assert len(pair_J) == padded_rows(n_pairs, n_experts, block)
    # every pair has exactly one row, and pair_J is the inverse of row_TK
    assert len(set(row_TK.flat)) == n_pairs
    np.testing.assert_array_equal(pair_J[row_TK.reshape(-1)], np.arange(n_pairs))
    np.testing.assert_array_equal(padding_P, np.flatnonzero(pair_J == n_pairs))
    # dropless
    assert sizes_E.sum() == n_pairs
    np.testing.assert_array_equal(sizes_E, np.bincount(topk_TK.reshape(-1), minlength=n_experts))
    # the rows of an expert are contiguous, in the order of pairs, and start at a block; experts follow one another
    start = 0
    for expert, size in enumerate(sizes_E):
        np.testing.assert_array_equal(pair_J[start:start + size], np.flatnonzero(topk_TK.reshape(-1) == expert))
        np.testing.assert_array_equal(pair_J[start + size:start + size + -size % block], n_pairs)
        start += size + -size % block
    assert np.all(pair_J[start:] == n_pairs)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(routings())
def test_plans_of_random_routings(routing):
    check_plan(*routing)


@pytest.mark.parametrize("kind", ["first", "middle", "last", "even"])
def test_plans_of_extreme_routings(kind):
    check_plan(*skewed(kind))


def tensors(topk_TK, n_rows, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(len(topk_TK), D), draw(n_rows, D), draw(*topk_TK.shape)


def naive_permute(x_TD, plan):
    """Row j is the token of its pair; padding names one token too many, which is a row of zeros."""
    return jnp.concatenate([x_TD, jnp.zeros((1, D), x_TD.dtype)])[plan.pair_J // plan.row_TK.shape[1]]


def naive_unpermute(rows_JD, plan, weights_TK):
    return sum(weights_TK[:, k, None] * rows_JD[plan.row_TK[:, k]] for k in range(weights_TK.shape[1]))


@partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(permute, unpermute, x_TD, rows_JD, weights_TK, plan):
    """Both operations, each with its vector-Jacobian product; another input of the right shape is the cotangent."""
    rows, permute_vjp = jax.vjp(lambda x: permute(x, plan), x_TD)
    y, unpermute_vjp = jax.vjp(lambda rows, weights: unpermute(rows, plan, weights), rows_JD, weights_TK)
    return rows, permute_vjp(rows_JD), y, unpermute_vjp(x_TD)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(routings())
def test_values_and_custom_gradients_are_those_of_naive_gathers(routing):
    plan, _ = plan_of(*routing)
    inputs = (*tensors(routing[0], len(plan.pair_J)), plan)
    actual = values_and_gradients(permute, unpermute, *inputs)
    expected = values_and_gradients(naive_permute, naive_unpermute, *inputs)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(actual[0], expected[0])


@pytest.mark.parametrize("kind", ["first", "middle", "last", "even"])
def test_rows_are_copies_and_padding_is_zero(kind):
    topk_TK, *sizes = skewed(kind)
    plan, _ = plan_of(topk_TK, *sizes)
    x_TD, _, _ = tensors(topk_TK, len(plan.pair_J))
    rows_JD = np.asarray(permute(x_TD, plan))
    for t, k in np.ndindex(*topk_TK.shape):
        np.testing.assert_array_equal(rows_JD[plan.row_TK[t, k]], x_TD[t])
    padding = np.asarray(plan.pair_J) == topk_TK.size
    assert not np.any(rows_JD[padding])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("choice", [0, 1])
def test_there_and_back_with_one_hot_weights_is_the_identity(choice, dtype):
    topk_TK, *sizes = skewed("even")
    plan, _ = plan_of(topk_TK, *sizes)
    x_TD = tensors(topk_TK, len(plan.pair_J))[0].astype(dtype)
    weights_TK = jnp.zeros(topk_TK.shape).at[:, choice].set(1)
    back, vjp = jax.vjp(lambda x: unpermute(permute(x, plan), plan, weights_TK), x_TD)
    chex.assert_trees_all_equal(back, x_TD)
    chex.assert_trees_all_equal(vjp(x_TD)[0], x_TD)


def test_combine_weighs_its_own_experts():
    """With experts that multiply by their number, y = x * sum_k w_k e_k: weights meet the rows they belong to."""
    topk_TK, n_experts, block = skewed("even")
    plan, _ = plan_of(topk_TK, n_experts, block)
    x_TD, _, weights_TK = tensors(topk_TK, len(plan.pair_J))
    expert_J = np.append(topk_TK.reshape(-1), 0)[np.asarray(plan.pair_J)]
    y_TD = unpermute(permute(x_TD, plan) * jnp.asarray(expert_J, jnp.float32)[:, None], plan, weights_TK)
    expected = np.asarray(x_TD, np.float64) * np.sum(np.asarray(weights_TK, np.float64) * topk_TK, axis=1)[:, None]
    assert distance(y_TD, expected) < 1e-6


def test_bfloat16_sums_and_gradients_are_taken_in_float32():
    """A sum of 1 + 256 + 1 is 258 in float32 but 256 when rounded after every step, both in y and in d x."""
    topk_TK = np.array([[0, 1, 2]], np.int32)
    plan, _ = plan_of(topk_TK, 3, 1)
    parts = jnp.array([[1.0], [256.0], [1.0]], jnp.bfloat16)[plan.pair_J]
    y_TD, vjp = jax.vjp(lambda rows, weights: unpermute(rows, plan, weights), parts, jnp.ones((1, 3)))
    d_rows_JD, d_weights_TK = vjp(jnp.ones((1, 1), jnp.bfloat16))
    d_x_TD, = jax.vjp(lambda x: permute(x, plan), jnp.ones((1, 1), jnp.bfloat16))[1](parts)
    chex.assert_type([y_TD, d_rows_JD, d_x_TD, d_weights_TK], [jnp.bfloat16] * 3 + [jnp.float32])
    assert float(y_TD[0, 0]) == float(d_x_TD[0, 0]) == 258
