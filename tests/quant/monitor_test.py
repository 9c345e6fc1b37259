"""Statistics of quantisation against NumPy, tile by tile, and what the figures mean on arrays made for them."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_recipe import Operand, Rule

from dsv3.config import UserError
from dsv3.quant.formats import E4M3, E5M2, E5M6
from dsv3.quant.monitor import (
    BINS,
    LOWEST,
    OPERANDS,
    WIDTH,
    Statistics,
    observe,
    observe_product,
    rates,
    scale_histogram,
    sums,
    zero_statistics,
)

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "e5m6": E5M6}
observed = jax.jit(observe, static_argnums=(1, 2))


def stored(scaled, fmt):
    """Rounding by other means: ml_dtypes for 8 bits, float16 without four bits for E5M6."""
    if fmt.dtype is not None:
        return np.clip(scaled, -fmt.largest, fmt.largest).astype(fmt.dtype).astype(np.float32)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), fmt.smallest_exponent)
    unit = 2.0 ** (exponent - fmt.mantissa_bits)
    return np.clip(np.round(scaled / unit) * unit, -fmt.largest, fmt.largest).astype(np.float32)


def oracle(x, operand, inner):
    """Loop over tiles, float64 where it can be."""
    fmt, (m, n) = FORMATS[operand.format], x.shape
    along = (1, 128) if inner == -1 else (128, 1)
    t, u = {"inner": along, "block": (128, 128), "tensor": (m, n)}[operand.tile]
    counts, bins = dict.fromkeys(Statistics._fields[:-1], 0.0), np.zeros(BINS)
    for i, j in itertools.product(range(0, m, t), range(0, n, u)):
        part = x[i:i + t, j:j + u]
        amax = np.abs(part).max()
        scale = np.float32(1)
        if amax > 0:
            scale = amax * np.float32(1 / fmt.largest)
            if operand.power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            bins[int(np.clip(np.floor((np.log2(np.float64(scale)) - LOWEST) / WIDTH), 0, BINS - 1))] += 1
        values = stored(part * (np.float32(1) / scale), fmt)
        counts["elements"] += part.size
        counts["nonzero"] += (part != 0).sum()
        counts["underflow"] += ((part != 0) & (values == 0)).sum()
        counts["subnormal"] += ((values != 0) & (np.abs(values) < 2.0 ** fmt.smallest_exponent)).sum()
        counts["largest"] += (np.abs(values) == fmt.largest).sum()
        counts["topped"] += (np.abs(values) == fmt.largest).any()
        counts["square"] += (part.astype(np.float64) ** 2).sum()
        counts["error_square"] += ((values.astype(np.float64) * scale - part) ** 2).sum()
    return Statistics(*counts.values(), bins)


def wide(shape, seed=0):
    """Twelve orders of magnitude within every tile, a tenth zeros, one tile of nothing but zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 0, shape) * (rng.random(shape) < 0.9)
    x[:128, :128] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tile", ["inner", "block", "tensor"])
@pytest.mark.parametrize("inner, power_of_two", [(-1, False), (-2, True)])
def test_statistics_are_those_of_a_loop_over_tiles(fmt, tile, inner, power_of_two):
    x, operand = wide((200, 300)), Operand(fmt, tile, power_of_two)
    found, expected = observed(jnp.asarray(x), operand, inner), oracle(x, operand, inner)
    for name, ours, theirs in zip(Statistics._fields, found, expected, strict=True):
        if "square" in name:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert expected.underflow > 0 and expected.subnormal > 0


def test_statistics_of_halves_add_up_to_those_of_the_whole():
    x = jnp.asarray(wide((256, 256)))
    whole = observed(x, Operand(), -1)
    halves = jax.tree.map(jnp.add, observed(x[:128], Operand(), -1), observed(x[128:], Operand(), -1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, halves)
    empty = jax.tree.map(jnp.add, whole, zero_statistics())
    jax.tree.map(np.testing.assert_array_equal, whole, empty)


def test_saturation_counts_what_bunches_at_the_top_and_not_the_one_that_sets_the_scale():
    x = np.full((4, 128), 1e-2, np.float32)
    x[:, 7] = 1.0
    assert rates(observed(jnp.asarray(x), Operand(), -1))["saturation"] == 0
    x[:, 8:40] = -0.99  # within half a step of E4M3 of the largest
    assert rates(observed(jnp.asarray(x), Operand(), -1))["saturation"] == 32 / 128
    assert rates(observed(jnp.asarray(x), Operand(power_of_two=True), -1))["saturation"] == 0
    x[:, 64:] = 0  # of those that are not zero
    assert rates(observed(jnp.asarray(x), Operand(), -1))["saturation"] == 32 / 64


def test_saturation_takes_one_element_off_those_tiles_only_that_reach_the_top():
    """Where scales are powers of two few do: here one tile of forty, with twenty elements."""
    x = np.full((40, 128), 300, np.float32)
    x[0, :20] = 448
    found = observed(jnp.asarray(x), Operand(power_of_two=True), -1)
    assert found.topped == 1 and rates(found)["saturation"] == 19 / x.size


def test_underflow_subnormals_and_error_by_hand():
    """The largest element is 448, so the scale is 1: 2^-9 is the smallest number, 2^-6 the smallest normal."""
    x = np.zeros((1, 128), np.float32)
    x[0, :6] = 448, 2.0 ** -11, -2.0 ** -9, 2.0 ** -7, 1.0625, 2.0 ** -6
    found = rates(observed(jnp.asarray(x), Operand(), -1))
    assert found["underflow"] == 1 / 6 and found["subnormal"] == 2 / 6 and found["saturation"] == 0
    # 1.0625 lies between 1 and 1.125 and goes to the even one; 2^-11 is lost
    np.testing.assert_allclose(found["error"], np.hypot(0.0625, 2.0 ** -11) / 448, rtol=1e-5)
    assert found["scales"][(0 - LOWEST) // WIDTH] == 1 == sum(found["scales"]) and abs(found["log2_scale"]) <= WIDTH


def test_bad_numbers_are_counted_and_spoil_no_sum():
    x = np.ones((3, 256), np.float32)
    x[1, 3], x[1, 200] = np.nan, -np.inf
    found = rates(observed(jnp.asarray(x), Operand(), -1))
    assert found["nonfinite"] == 2 / x.size and sum(found["scales"]) == 4
    x[0] = np.random.default_rng(0).standard_normal(256)
    found = rates(observed(jnp.asarray(x), Operand(), -1))
    good = rates(observed(jnp.asarray(x[::2]), Operand(), -1))  # both tiles of the other row are spoilt
    assert found["nonfinite"] == 2 / x.size and good["error"] > 0.001
    np.testing.assert_allclose(found["error"], good["error"], rtol=1e-5)


def test_an_array_of_zeros_has_rates_of_zero():
    found = rates(observed(jnp.zeros((2, 128)), Operand(), -1))
    assert found.pop("elements") == 256 and not any(np.ravel(list(map(np.sum, found.values()))))


def test_counts_beyond_float32s_whole_numbers():
    """A sum of ones in float32 stops at 2^24."""
    assert float(sums((jnp.ones((2 ** 12, 2 ** 12 + 128), bool),))[0]) == 2 ** 24 + 2 ** 19


def test_bins_hold_their_lower_edge_and_the_outermost_what_lies_beyond():
    logs = np.array([LOWEST - 40, LOWEST, LOWEST + WIDTH, LOWEST + WIDTH * 5 + 1, LOWEST + WIDTH * BINS + 50.0])
    counted = jnp.ones(5, bool)
    found = np.asarray(scale_histogram(jnp.exp2(jnp.asarray(logs, jnp.float32)), counted))
    assert found[0] == 2 and found[1] == 1 and found[5] == 1 and found[-1] == 1 and found.sum() == 5


def test_a_product_measures_every_operand_along_the_axis_it_is_summed_over():
    """Ordinary tokens beside one 10 million times as large: tiles along tokens suffer, tiles along features do not."""
    rng = np.random.default_rng(0)
    x, w, d_y = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 64, 128), (128, 256), (4, 64, 256)))
    for array in (x, d_y):
        array[0, 0] *= 1e7
    products = jax.jit(observe_product, static_argnums=0)
    found = {name: rates(s) for name, s in products(Rule(), x, w, d_y).items()}
    assert set(found) == set(OPERANDS)
    assert found["fprop_x"]["underflow"] == found["dgrad_dy"]["underflow"] == 0
    assert found["wgrad_x"]["underflow"] > 0.2 and found["wgrad_dy"]["underflow"] > 0.2
    assert found["fprop_w"] == found["dgrad_w"] and sum(found["fprop_w"]["scales"]) == 2
    assert found["kept"]["error"] < 0.2 * found["fprop_x"]["error"]
    for kept in (None, Operand()):  # nothing of its own
        assert products(Rule(kept=kept), x, w, d_y)["kept"].elements == 0
    assert sum(found["fprop_x"]["scales"]) == 256 and sum(found["wgrad_x"]["scales"]) == 2 * 128


def test_unknown_formats_and_tiles_are_refused():
    with pytest.raises(UserError, match="unknown number format 'e3m4'"):
        observe(jnp.ones((1, 128)), Operand("e3m4"))
    with pytest.raises(UserError, match="unknown tile 'row'; expected one of inner, block, tensor"):
        observe(jnp.ones((1, 128)), Operand(tile="row"))


def test_the_oracle_rounds_as_ml_dtypes():
    """Its own E5M6 against float16 with four bits less."""
    x = np.random.default_rng(1).uniform(-60000, 60000, 1000).astype(np.float32)
    half = x.astype(np.float16).view(np.uint16)
    near = ((half + 8) & 0xFFF0).view(np.float16).astype(np.float32)
    assert (np.abs(stored(x, E5M6) - near) <= 2.0 ** 9).all() and (stored(x, E5M6) == near).mean() > 0.9
    assert stored(np.float32([500]), E4M3) == np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
