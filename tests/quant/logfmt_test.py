"""LogFMT against its definition, code by code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.quant.logfmt import RANGE, decode_log, encode_log

there_and_back = jax.jit(lambda x, bits: decode_log(encode_log(x, bits), bits), static_argnums=1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 8, 10]), st.sampled_from([0.1, 1.0, 6.0]))
def test_every_element_gets_the_nearest_of_its_tiles_values(seed, bits, spread):
    rng = np.random.default_rng(seed)
    x = (rng.choice([-1, 1], (2, 256)) * np.exp(rng.standard_normal((2, 256)) * spread)).astype(np.float32)
    x[:, ::17] = 0
    decoded = np.asarray(there_and_back(jnp.asarray(x), bits))
    for row in range(2):
        for start in (0, 128):
            tile, got = x[row, start:start + 128].astype(np.float64), decoded[row, start:start + 128]
            logs = np.log(np.abs(tile[tile != 0]))
            low = max(logs.min(), logs.max() - RANGE)
            values = np.concatenate([[0], np.exp(low + (logs.max() - low) / (2 ** (bits - 1) - 2)
                                                 * np.arange(2 ** (bits - 1) - 1))])
            best = np.abs(np.abs(tile)[:, None] - values).min(axis=1)
            assert (np.abs(got - tile) <= best + 1e-5 * np.abs(tile)).all()
            assert (np.sign(got)[got != 0] == np.sign(tile)[got != 0]).all() and (got[tile == 0] == 0).all()


def test_rounding_in_linear_space_is_unbiased_where_logarithms_are_not():
    """Uniform magnitudes: the mean error is small against that of rounding the logarithm."""
    x = np.random.default_rng(0).uniform(1, 2, (400, 128)).astype(np.float32)
    bits = 4
    ours = np.asarray(there_and_back(jnp.asarray(x), bits))
    low, high = (np.log(reduce(x, axis=1, keepdims=True)) for reduce in (np.min, np.max))
    step = (high - low) / (2 ** (bits - 1) - 2)
    in_logs = np.exp(low + step * np.round((np.log(x) - low) / step))
    assert abs((ours - x).mean()) < 0.2 * abs((in_logs - x).mean())


def test_zeros_one_value_and_bad_numbers():
    x = np.zeros((4, 128), np.float32)
    x[1], x[2, 3], x[3, 7] = -2.5, np.nan, np.inf
    x[2:, 0] = 1.0
    decoded = np.asarray(there_and_back(jnp.asarray(x), 8))
    assert (decoded[0] == 0).all()
    np.testing.assert_allclose(decoded[1], -2.5, rtol=1e-6)
    assert np.isnan(decoded[2]).any() and np.isnan(decoded[3]).any()


@pytest.mark.parametrize("shape, bits", [((4, 100), 8), ((4, 128), 2), ((4, 128), 17)])
def test_sizes_that_it_does_not_have(shape, bits):
    with pytest.raises(UserError, match="LogFMT"):
        encode_log(jnp.ones(shape), bits)
