"""Number formats: every code, and rounding against a search through a table of all values."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.quant.formats import E4M3, E5M2, E5M6, Format, decode, encode, format_of, pack, round_to, unpack
from dsv3.quant.stochastic import BFLOAT16

ALL = [E4M3, E5M2, E5M6]
names = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)


def table(fmt):
    """Every code's value from sign, exponent and mantissa, in float64; the last exponent means what the format says."""
    bits = 1 + fmt.exponent_bits + fmt.mantissa_bits
    codes = np.arange(2 ** bits)
    mantissa = codes % 2 ** fmt.mantissa_bits
    exponent = codes >> fmt.mantissa_bits & 2 ** fmt.exponent_bits - 1
    bias = 2 ** (fmt.exponent_bits - 1) - 1
    magnitude = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias - fmt.mantissa_bits),
                         (1 + mantissa / 2 ** fmt.mantissa_bits) * 2.0 ** (exponent - bias))
    last = exponent == 2 ** fmt.exponent_bits - 1
    if fmt.infinities:
        magnitude = np.where(last, np.where(mantissa == 0, np.inf, np.nan), magnitude)
    else:
        magnitude = np.where(last & (mantissa == 2 ** fmt.mantissa_bits - 1), np.nan, magnitude)
    return np.where(codes >> bits - 1 == 1, -magnitude, magnitude)


def stored(codes, fmt):
    if fmt.dtype is not None:
        return jnp.asarray(codes.astype(np.uint8).view(fmt.dtype))
    return pack(jnp.asarray(codes, jnp.uint16))


def nearest(x, fmt):
    """By search: the nearest value, of two the one with an even code, saturated; in float64."""
    values = table(fmt)
    codes = np.flatnonzero(np.isfinite(values) & ~np.signbit(values))
    order = codes[np.argsort(values[codes])]
    grid = values[order]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    above = np.minimum(np.searchsorted(grid, magnitude), len(grid) - 1)
    below = np.maximum(above - 1, 0)
    down, up = magnitude - grid[below], grid[above] - magnitude
    chosen = np.where((down < up) | ((down == up) & (order[below] % 2 == 0)), below, above)
    return np.copysign(grid[chosen], x)


@names
def test_every_code_has_the_value_of_its_bits_and_comes_back(fmt):
    values = table(fmt)
    decoded = np.asarray(decode(stored(np.arange(len(values)), fmt), fmt, len(values)))
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(np.signbit(decoded[~np.isnan(values)]), np.signbit(values[~np.isnan(values)]))
    finite = np.isfinite(values)
    assert values[finite].max() == fmt.largest and np.isinf(values).any() == fmt.infinities
    again = encode(jnp.asarray(values, jnp.float32), fmt)
    np.testing.assert_array_equal(np.asarray(decode(again, fmt, len(values))), values)
    if fmt.dtype is None:
        codes = np.asarray(unpack(again, len(values)))
        np.testing.assert_array_equal(codes[~np.isnan(values)], np.flatnonzero(~np.isnan(values)))


@names
def test_rounding_is_to_the_nearest_value_and_ties_go_to_the_even_code(fmt):
    """At every value, at every middle between two, one step of float32 to both sides of it, and far outside."""
    values = np.unique(np.abs(table(fmt)[np.isfinite(table(fmt))])).astype(np.float32)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    edges = np.array([fmt.largest * 1.01, 1e30, 3.4e38, 1e-30, 2.0 ** -126], np.float32)
    x = np.concatenate([values, middles, np.nextafter(middles, np.float32(np.inf)),
                        np.nextafter(middles, np.float32(0)), edges])
    x = np.concatenate([x, -x])
    found = np.asarray(round_to(jnp.asarray(x), fmt))
    np.testing.assert_array_equal(found, nearest(x, fmt))
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))


@names
@settings(deadline=None)
@given(x=hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False, allow_infinity=False,
                                                       allow_subnormal=False)))
def test_any_finite_number_rounds_to_the_nearest(fmt, x):
    np.testing.assert_array_equal(np.asarray(round_to(jnp.asarray(x), fmt)), nearest(x, fmt))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_eight_bit_rounding_is_that_of_ml_dtypes(fmt):
    """Another implementation, over a million numbers of all magnitudes within the range."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(1_000_000) * 2.0 ** rng.uniform(-24, 8, 1_000_000)).astype(np.float32)
    x = np.clip(x, -fmt.largest, fmt.largest)
    ours = np.asarray(encode(jnp.asarray(x), fmt)).view(np.uint8)
    np.testing.assert_array_equal(ours, x.astype(fmt.dtype).view(np.uint8))


def test_bfloat16_is_rounded_as_by_ml_dtypes():
    """Its subnormals are float32's, which devices flush; zero stays zero."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(100_000) * 2.0 ** rng.uniform(-100, 120, 100_000)).astype(np.float32)
    x[:4] = 0, -0.0, 2.0 ** -126, np.inf
    np.testing.assert_array_equal(round_to(jnp.asarray(x), BFLOAT16), x.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("row, said", [
    (("e4m7", 4, 7, 240.0, True, None), "'e4m7' has no dtype, and only E5M6 has a packed layout; give it a dtype"),
    (("e6m5", 6, 5, 2.0 ** 26, True, None), "'e6m5' has no dtype"),
    (("e4m7", 4, 7, 240.0, True, np.dtype(ml_dtypes.float8_e4m3fn)), "'e4m7' does not fit into float8_e4m3fn"),
    (("e5m2", 5, 2, 57344.0, True, np.dtype(ml_dtypes.float8_e4m3fn)), "'e5m2' does not fit"),
    (("e4m3", 4, 3, 480.0, True, np.dtype(ml_dtypes.float8_e4m3fn)), "'e4m3' does not fit"),
])
def test_a_format_that_nothing_stores_is_refused(row, said):
    with pytest.raises(UserError, match=said):
        Format(*row)


@names
def test_bad_numbers_stay_bad(fmt):
    decoded = np.asarray(decode(encode(jnp.array([jnp.nan, -jnp.nan, jnp.inf, -jnp.inf]), fmt), fmt, 4))
    assert np.isnan(decoded[:2]).all()
    np.testing.assert_array_equal(decoded[2:], [np.inf, -np.inf] if fmt.infinities else [np.nan, np.nan])


@pytest.mark.parametrize("elements", [0, 1, 2, 7, 126, 127, 128, 129, 256, 333])
def test_packing_takes_a_byte_and_a_half_and_loses_nothing(elements):
    codes = jnp.asarray(np.random.default_rng(elements).integers(0, 4096, (3, elements)), jnp.uint16)
    packed = pack(codes)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, E5M6.bytes_of(elements))
    np.testing.assert_array_equal(unpack(packed, elements), codes)


@pytest.mark.parametrize("elements, pairs", [
    (6, [(0, 3), (1, 4), (2, 5)]), (130, [(0, 64), (63, 127), (128, 129)]), (256, [(0, 64), (128, 192), (191, 255)])])
def test_high_halves_of_a_run_share_bytes_behind_all_low_bytes(elements, pairs):
    codes = np.random.default_rng(elements).integers(0, 4096, elements)
    packed = np.asarray(pack(jnp.asarray(codes, jnp.uint16)))
    np.testing.assert_array_equal(packed[:elements], codes & 0xFF)
    for first, second in pairs:
        byte = elements + first - first // 128 * 64
        assert packed[byte] == (codes[first] >> 8) + 16 * (codes[second] >> 8)


def test_jitted_is_the_same_and_an_unknown_format_is_named():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 33)), jnp.float32)
    for fmt in ALL:
        plain, jitted = encode(x, fmt), jax.jit(encode, static_argnums=1)(x, fmt)
        np.testing.assert_array_equal(np.asarray(plain).view(np.uint8), np.asarray(jitted).view(np.uint8))
    with pytest.raises(UserError, match="e3m4.*e4m3, e5m2, e5m6"):
        format_of("e3m4")
    assert format_of("e4m3").dtype == ml_dtypes.float8_e4m3fn
