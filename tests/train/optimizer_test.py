"""AdamW against optax in float32, and what bfloat16 moments may change."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3.config import OptimizerConfig
from dsv3.train.optimizer import adamw, decay_mask, scale_by_adam

EXACT = OptimizerConfig(
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=True, clip_norm=1.0, moment_dtype="float32")
LOW = dataclasses.replace(EXACT, moment_dtype="bfloat16")


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"w": jax.random.normal(keys[0], (8, 4)), "q_norm": jax.random.normal(keys[1], (8,))}


def test_float32_moments_give_optax_adamw():
    params = random_tree(0)
    ours, theirs = adamw(EXACT), optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1))
    state, other = ours.init(params), theirs.init(params)
    for step in range(5):
        updates, state = ours.update(random_tree(step + 1), state, params)
        expected, other = theirs.update(random_tree(step + 1), other, params)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(-u, e, rtol=1e-5, atol=1e-6), updates, expected)


def test_bfloat16_moments_are_rounded_once_and_after_use():
    """The update comes from the float32 moments of this step; only what is stored is rounded."""
    grads = random_tree(1)
    exact, low = scale_by_adam(EXACT), scale_by_adam(LOW)
    exact_updates, exact_state = exact.update(grads, exact.init(grads))
    low_updates, low_state = low.update(grads, low.init(grads))
    jax.tree.map(np.testing.assert_array_equal, low_updates, exact_updates)
    for moments in ("mu", "nu"):
        expected = jax.tree.map(lambda m: m.astype(jnp.bfloat16), getattr(exact_state, moments))
        jax.tree.map(np.testing.assert_array_equal, getattr(low_state, moments), expected)
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(low_state, moments))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("b2, biased", [(0.95, False), (0.999, True)])
def test_bias_of_a_bfloat16_second_moment(b2, biased):
    """Unbiased at the report's 0.95. At 0.999 small updates are rounded away: 40% off for normal gradients."""
    optimizer = scale_by_adam(dataclasses.replace(LOW, b2=b2))
    grads = jax.random.normal(jax.random.key(0), (4000, 256))
    zeros = jnp.zeros(256)
    state, _ = jax.lax.scan(lambda s, g: (optimizer.update(g, s)[1], None), optimizer.init(zeros), grads)
    bias = abs(float(jnp.mean(state.nu.astype(jnp.float32))) - 1)
    assert bias > 0.1 if biased else bias < 0.03


def test_a_large_b2_with_bfloat16_moments_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        adamw(LOW)
        adamw(dataclasses.replace(EXACT, b2=0.999))
        assert caplog.text == ""
        adamw(dataclasses.replace(LOW, b2=0.995))
    assert "b2" in caplog.text


def test_gains_decay_only_when_asked_for():
    tree = {"attn": random_tree(0), "norm": jnp.ones(3)}
    assert decay_mask(tree, False) == {"attn": {"w": True, "q_norm": False}, "norm": False}
    assert decay_mask(tree, True) == {"attn": {"w": True, "q_norm": True}, "norm": True}


def test_a_huge_gradient_is_clipped_to_the_norm():
    optimizer = adamw(dataclasses.replace(EXACT, b1=0.0, b2=0.0, weight_decay=0.0, eps=1.0))
    grads = {"w": jnp.full((4,), 1e6)}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(updates["w"], 0.5 / (0.5 + 1.0), rtol=1e-5)
