"""Sampling: greedy, temperature and the nucleus, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.inference.sampling import check_sampling, nucleus, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15]]))


@pytest.mark.parametrize("top_p, kept", [(0.4, [0]), (0.5, [0]), (0.6, [0, 2]), (0.9, [0, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    assert np.flatnonzero(np.isfinite(nucleus(LOGITS, jnp.float32(top_p - 1e-6))[0])).tolist() == kept


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_nucleus_never_empties_and_never_drops_a_likelier_token(seed, top_p):
    logits = jnp.asarray(np.random.default_rng(seed).standard_normal((1, 12)) * 3, jnp.float32)
    kept = np.isfinite(np.asarray(nucleus(logits, jnp.float32(top_p))))[0]
    probabilities = np.asarray(jax.nn.softmax(logits))[0]
    assert kept.any()
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()
    assert probabilities[kept].sum() >= top_p - 1e-5


def test_temperature_zero_is_greedy_and_a_high_one_flattens():
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.vmap(lambda key, t: sample(LOGITS, key, t, jnp.float32(1.0))[0], in_axes=(0, None))
    assert set(draw(keys[:20], jnp.float32(0)).tolist()) == {0}
    frequencies = np.bincount(np.asarray(draw(keys, jnp.float32(1.0))), minlength=4) / 2000
    np.testing.assert_allclose(frequencies, [0.5, 0.05, 0.3, 0.15], atol=0.04)
    hot = np.bincount(np.asarray(draw(keys, jnp.float32(100.0))), minlength=4) / 2000
    np.testing.assert_allclose(hot, 0.25, atol=0.04)


@pytest.mark.parametrize("temperature, top_p", [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_impossible_settings_are_refused(temperature, top_p):
    with pytest.raises(UserError):
        check_sampling(temperature, top_p)
