"""Bias updates: the sign of the whole batch's load, never a sum of signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.parallel.balance import max_violation, stack_loads, update_bias, update_routing


def test_overloaded_experts_sink_and_underloaded_rise_by_the_speed():
    bias = update_bias(jnp.array([0.5, 0.0, -0.5, 0.25]), jnp.array([10, 4, 6, 0]), 0.001)
    np.testing.assert_allclose(bias, [0.499, 0.001, -0.501, 0.251], rtol=1e-6)


def test_a_perfectly_even_load_moves_nothing():
    np.testing.assert_array_equal(update_bias(jnp.ones(4), jnp.full(4, 7), 0.1), np.ones(4))


def test_the_sign_of_a_sum_is_not_the_sum_of_signs():
    micro_batches = jnp.array([[9, 0, 0], [0, 4, 2], [0, 4, 2]])
    whole = update_bias(jnp.zeros(3), micro_batches.sum(axis=0), 1.0)
    summed = sum(update_bias(jnp.zeros(3), load, 1.0) for load in micro_batches)
    assert np.sign(whole).tolist() != np.sign(summed).tolist()


def test_every_stack_is_updated_from_its_own_load_and_the_tree_is_kept():
    routing = {"moe_layers": {"moe": {"bias": jnp.zeros((2, 4))}}, "mtp_0": {"block": {"moe": {"bias": jnp.zeros(4)}}}}
    load = {"moe_layers": jnp.array([[4, 0, 2, 2], [0, 4, 2, 2]]), "mtp_0": jnp.array([2, 2, 0, 4])}
    updated = update_routing(routing, load, 0.5)
    assert jax.tree.structure(updated) == jax.tree.structure(routing)
    np.testing.assert_array_equal(updated["moe_layers"]["moe"]["bias"], [[-0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0]])
    np.testing.assert_array_equal(updated["mtp_0"]["block"]["moe"]["bias"], [0, 0, 0.5, -0.5])
    assert update_routing({}, load, 0.5) == {}


def test_loads_of_other_shapes_are_refused():
    with pytest.raises(AssertionError):
        update_routing({"a": jnp.zeros((2, 4))}, {"a": jnp.zeros((2, 3))}, 0.1)


def test_max_violation_of_balance_and_of_collapse():
    np.testing.assert_allclose(max_violation(jnp.array([[5, 5, 5, 5], [20, 0, 0, 0]])), [0, 3])


def test_bias_updates_even_out_a_skewed_router():
    """A router whose scores favour low experts reaches MaxVio below 0.1 by bias alone."""
    rng = np.random.default_rng(0)
    scores = jax.nn.sigmoid(jnp.asarray(rng.standard_normal((2048, 8)) - np.arange(8) * 0.4, jnp.float32))

    def step(bias, _):
        chosen = jax.lax.top_k(scores + bias[None], 2)[1]
        load = jnp.zeros(8, jnp.int32).at[chosen].add(1)
        return update_bias(bias, load, 0.005), max_violation(load)

    _, violations = jax.lax.scan(step, jnp.zeros(8), length=200)
    assert violations[0] > 1.0 and violations[-1] < 0.1


def test_stacked_loads_put_the_trunk_first():
    load = {"moe_layers": jnp.ones((2, 4)), "mtp_0": jnp.zeros(4)}
    assert stack_loads(load).tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert stack_loads({}).shape == (0, 1)
