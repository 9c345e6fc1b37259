"""Routing: what the bias may and may not do, the group limit, and the balance loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY

from dsv3.model import gate

MOE = FAMILY["v3"].moe  # 8 experts in 4 groups of 2, two groups allowed, top 3
SOFTMAX = FAMILY["v2_groups"].moe


def random_scores(seed, tokens=16, experts=8):
    return jax.nn.sigmoid(jax.random.normal(jax.random.key(seed), (tokens, experts)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_choices_and_weights_agree_with_the_oracle(seed, spread):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((6, 5)), rng.standard_normal((5, 8))
    bias = spread * rng.standard_normal(8) - 1
    for config, chosen_bias in ((MOE, bias), (SOFTMAX, None)):
        scores = gate.scores(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), config)
        routes = gate.route(scores, None if chosen_bias is None else jnp.asarray(chosen_bias, jnp.float32), config)
        topk, weights = oracle.gate(x, w, chosen_bias, config)[:2]
        np.testing.assert_array_equal(routes.topk_TK, topk)
        np.testing.assert_allclose(routes.weights_TK, weights, rtol=2e-5)


def test_bias_moves_the_selection_but_not_the_weights():
    scores = random_scores(0)
    bias = jnp.zeros(8).at[5].set(10.0)
    free, pushed = gate.route(scores, jnp.zeros(8), MOE), gate.route(scores, bias, MOE)
    assert bool(jnp.all(jnp.any(pushed.topk_TK == 5, axis=1)))
    assert not bool(jnp.all(jnp.any(free.topk_TK == 5, axis=1)))
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(pushed.topk_TK), axis=1)
    np.testing.assert_allclose(pushed.weights_TK, 2.5 * chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)


def test_normalised_weights_sum_to_the_route_scale_and_raw_ones_do_not():
    np.testing.assert_allclose(gate.route(random_scores(1), jnp.zeros(8), MOE).weights_TK.sum(axis=1), 2.5, rtol=1e-6)
    raw = gate.route(random_scores(1), jnp.zeros(8), dataclasses.replace(MOE, norm_topk_prob=False))
    assert float(jnp.std(raw.weights_TK.sum(axis=1))) > 0.1


def test_excluded_groups_stay_excluded_when_every_biased_score_is_negative():
    """The first release filled excluded groups with 0, which beats a negative score."""
    scores = random_scores(2)
    routes = gate.route(scores, jnp.full(8, -5.0), MOE)
    np.testing.assert_array_equal(routes.topk_TK, gate.route(scores, jnp.zeros(8), MOE).topk_TK)
    groups = np.asarray(routes.topk_TK) // MOE.experts_per_group
    assert max(len(set(row)) for row in groups.tolist()) <= MOE.n_limited_groups


def test_a_group_scores_by_its_two_best_with_a_bias_and_by_its_best_without():
    scores = jnp.array([[0.9, 0.0, 0.5, 0.5, 0.6, 0.3, 0.1, 0.1]])
    one_group = dict(n_limited_groups=1, n_activated_experts=1)
    with_bias = dataclasses.replace(MOE, **one_group)
    without = dataclasses.replace(SOFTMAX, **one_group)
    assert gate.route(scores, jnp.zeros(8), with_bias).topk_TK.tolist() == [[2]]
    assert gate.route(scores, None, without).topk_TK.tolist() == [[0]]


def test_the_gate_is_float32_in_a_bfloat16_model():
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (64, 8))
    scores = gate.scores(x, w, MOE)
    exact = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(w, np.float64)))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, exact, rtol=1e-5)


def test_gradients_reach_the_scores_through_the_weights_only():
    grads = jax.grad(lambda s, b: jnp.sum(gate.route(s, b, MOE).weights_TK[:, 0]), argnums=(0, 1))(
        random_scores(3), jnp.zeros(8))
    assert float(jnp.abs(grads[0]).sum()) > 0
    assert float(jnp.abs(grads[1]).sum()) == 0


def test_saturated_scores_give_finite_weights():
    routes = gate.route(jnp.zeros((2, 8)), jnp.zeros(8), MOE)
    assert bool(jnp.all(jnp.isfinite(routes.weights_TK)))


@pytest.mark.parametrize("n_valid", [12, 5])
def test_balance_loss_by_hand(n_valid):
    """Against the oracle; an even load with even scores costs exactly 1; padding counts in neither factor."""
    scores = np.asarray(random_scores(4, tokens=12))
    valid = np.arange(12) < n_valid
    actual = gate.balance_loss(jnp.asarray(scores)[None], jnp.asarray(valid)[None], MOE)
    expected = oracle.balance_loss(scores.astype(np.float64), valid.astype(int), MOE.n_activated_experts)
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)


def test_balance_loss_of_an_even_load_is_one():
    config = dataclasses.replace(MOE, n_activated_experts=1, n_expert_groups=1, n_limited_groups=1)
    scores = jnp.eye(8)[None] * 0.5 + 0.25
    assert float(gate.balance_loss(scores, jnp.ones((1, 8), bool), config)) == pytest.approx(1.0)
    collapsed = jnp.tile(scores[:, :1], (1, 8, 1))
    assert float(gate.balance_loss(collapsed, jnp.ones((1, 8), bool), config)) > 1.5
