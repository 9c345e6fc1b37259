"""Stochastic rounding: neighbours, exactness, means, and the numbers at the edges of every format."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.quant.formats import E4M3, E5M2, E5M6
from dsv3.quant.stochastic import BFLOAT16, round_stochastically

ALL = [E4M3, E5M2, E5M6, BFLOAT16]
names = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
rounded = jax.jit(round_stochastically, static_argnums=1)


def grid(fmt):
    """All values that are not negative, in float64, from their definition."""
    exponents = np.arange(fmt.smallest_exponent, np.floor(np.log2(fmt.largest)) + 1)
    mantissas = 1 + np.arange(2 ** fmt.mantissa_bits) / 2 ** fmt.mantissa_bits
    subnormal = (mantissas - 1) * 2.0 ** fmt.smallest_exponent
    values = np.concatenate([subnormal, np.outer(2.0 ** exponents, mantissas).ravel()])
    return values[values <= fmt.largest]


def neighbours(x, fmt):
    """The values of the format that |x| lies between, saturated; equal where x is one."""
    values = grid(fmt)
    magnitude = np.minimum(np.abs(x.astype(np.float64)), fmt.largest)
    above = np.searchsorted(values, magnitude)
    below = np.where(values[above] == magnitude, above, above - 1)
    return values[below], values[above]


def bits_of(seed, shape):
    return jax.random.bits(jax.random.key(seed), shape)


@names
@settings(deadline=None)
@given(x=hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False, allow_infinity=False,
                                                       allow_subnormal=False)), seed=st.integers(0, 99))
def test_a_finite_number_goes_to_a_neighbour_and_keeps_its_sign(fmt, x, seed):
    found = np.asarray(rounded(jnp.asarray(x), fmt, bits_of(seed, x.shape)))
    below, above = neighbours(x, fmt)
    assert ((np.abs(found) == below) | (np.abs(found) == above)).all()
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))


@names
@pytest.mark.parametrize("bits", [0, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_values_of_the_format_stay_and_bad_numbers_stay_bad(fmt, bits):
    """Whatever the random bits are; float32's largest number becomes the format's, never an infinity."""
    values = grid(fmt).astype(np.float32)
    values = values[(values == 0) | (values >= 2.0 ** -126)]
    x = np.concatenate([values, -values])
    draw = lambda x: jnp.full(x.shape, bits, jnp.uint32)
    np.testing.assert_array_equal(np.asarray(rounded(jnp.asarray(x), fmt, draw(x))), x)
    edges = np.array([np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38], np.float32)
    found = np.asarray(rounded(jnp.asarray(edges), fmt, draw(edges)))
    if fmt.infinities:
        np.testing.assert_array_equal(found[:2], edges[:2])
    assert np.isnan(found[2]) and (fmt.infinities or np.isnan(found[:2]).all())
    assert found[3] == np.float32(fmt.largest) == -found[4]


@names
def test_the_mean_of_many_roundings_is_the_number(fmt):
    """200,000 roundings of 24 numbers, normal and subnormal: within five standard errors, where nearest is not."""
    rng, n = np.random.default_rng(0), 200_000
    low = max(fmt.smallest_exponent - fmt.mantissa_bits - 2, -120)
    x = (rng.uniform(1, 2, 24) * 2.0 ** np.linspace(low, min(np.log2(fmt.largest) - 1, 100), 24)).astype(np.float32)
    found = np.asarray(rounded(jnp.broadcast_to(x, (n, 24)), fmt, bits_of(1, (n, 24))), np.float64)
    below, above = neighbours(x, fmt)
    up = (x - below) / (above - below)
    error = (found.mean(axis=0) - x) / (above - below)
    assert (np.abs(error) < 5 * np.sqrt(np.maximum(up * (1 - up), 1e-6) / n)).all()
    assert up.min() < 0.3 and up.max() > 0.7  # probabilities of both kinds were asked for


def test_the_probability_is_exact_over_all_bits_of_a_number():
    """1 + 3 / 256 lies 3/2 of bfloat16's steps above 1: of all 65,536 patterns that decide, half go up."""
    bits = jnp.arange(2 ** 16, dtype=jnp.uint32) << 16
    found = np.asarray(rounded(jnp.full(2 ** 16, 1 + 3 / 256, jnp.float32), BFLOAT16, bits))
    assert (found == 1 + 2 / 128).mean() == 0.5 and (found == 1 + 1 / 128).mean() == 0.5
    eighth = np.asarray(rounded(jnp.full(2 ** 16, 1 + 1 / 1024, jnp.float32), BFLOAT16, bits))
    assert (eighth == 1 + 1 / 128).sum() == 2 ** 16 // 8


def test_what_it_returns_is_exact_in_bfloat16():
    x = np.random.default_rng(2).standard_normal(10_000).astype(np.float32)
    found = np.asarray(rounded(jnp.asarray(x), BFLOAT16, bits_of(3, x.shape)))
    np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16).astype(np.float32), found)
    assert (found != x.astype(ml_dtypes.bfloat16).astype(np.float32)).mean() > 0.1
