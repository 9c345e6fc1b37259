"""The moving average of the weights: the recurrence, off the training thread, safe from donation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import EMAConfig
from dsv3.train.ema import HostEMA, initial_average


def weights(step):
    rng = np.random.default_rng(step)
    return {"a": jnp.asarray(rng.standard_normal((40, 30)), jnp.float32), "b": jnp.asarray(rng.random(3), jnp.float32)}


@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_weighted_mean_over_the_steps_that_are_due(every):
    with HostEMA(EMAConfig(decay=0.9, every=every), initial_average(weights(0))) as ema:
        chex.assert_trees_all_equal(ema.average(), jax.tree.map(np.asarray, weights(0)))
        for step in range(1, 14):
            ema.update(weights(step), step)
        due = range(every, 14, every)
        factors = 0.9 ** (len(due) - 1 - np.arange(len(due)))
        expected = {name: np.average([np.asarray(weights(step)[name], np.float64) for step in due], axis=0,
                                     weights=factors) for name in weights(0)}
        for name, value in ema.average().items():
            assert isinstance(value, np.ndarray) and value.dtype == np.float32
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_step_may_donate_the_weights_at_once():
    """The next step overwrites the buffers while the average is still being computed."""
    double = jax.jit(lambda tree: jax.tree.map(lambda a: 2 * a, tree), donate_argnums=0)
    params = {"a": jnp.ones((512, 512))}
    with HostEMA(EMAConfig(decay=0.5, every=1), {"a": np.zeros((512, 512), np.float32)}) as ema:
        for step in range(1, 6):
            ema.update(params, step)
            params = double(params)
        expected = np.average(2.0 ** np.arange(5), weights=2.0 ** np.arange(5))
        np.testing.assert_allclose(ema.average()["a"], np.full((512, 512), expected), rtol=1e-6)


def test_a_held_average_is_not_changed_by_later_updates():
    """A checkpoint may still be writing it."""
    with HostEMA(EMAConfig(decay=0.5, every=1), {"a": np.ones(4, np.float32)}) as ema:
        held = ema.average()
        ema.update({"a": jnp.full(4, 9.0)}, 1)
        assert ema.average()["a"].tolist() == [9.0] * 4
        assert held["a"].tolist() == [1.0] * 4
