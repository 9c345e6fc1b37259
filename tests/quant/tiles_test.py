"""Tiles and scales against loops over every tile in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.quant.formats import E4M3, E5M2, E5M6
from dsv3.quant.tiles import ALONG_COLUMNS, ALONG_ROWS, BLOCK, TENSOR, dequantize, quantize, scale_of

TILES = [ALONG_ROWS, ALONG_COLUMNS, BLOCK, TENSOR]


def tiles_of(shape, tile):
    """Slices of all tiles of a matrix, and their place in the grid."""
    t, u = tile or shape
    for i, j in itertools.product(range(-(-shape[0] // t)), range(-(-shape[1] // u))):
        yield (i, j), (slice(i * t, (i + 1) * t), slice(j * u, (j + 1) * u))


def bits(values):
    return np.asarray(values).view(np.uint8)


def random(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, (*shape[:-1], 1))).astype(np.float32)


@pytest.mark.parametrize("shape, fmt, power_of_two", [
    *itertools.product([(130, 200)], [E4M3, E5M2, E5M6], [False, True]),
    *itertools.product([(128, 256), (1, 1), (3, 129)], [E4M3], [False])])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_fills_its_format(shape, tile, fmt, power_of_two):
    """Its scale is amax / largest (or the next power of two), and no element is off by more than half a step."""
    x = random(shape)

    @jax.jit
    def there_and_back(x):
        q = quantize(x, fmt, tile, power_of_two=power_of_two)
        return q, dequantize(q, fmt, tile, shape[1])

    q, back = jax.tree.map(np.asarray, there_and_back(x))
    for place, part in tiles_of(shape, tile):
        amax, scale = np.abs(x[part]).max(), float(q.scales[place])
        exact = amax * np.float32(1 / fmt.largest)
        if power_of_two:
            assert scale == 2.0 ** np.ceil(np.log2(np.float64(exact))) and exact <= scale < 2 * exact
        else:
            assert scale == exact
        unit = np.maximum(np.abs(x[part]) * 2.0 ** -fmt.mantissa_bits, scale * 2.0 ** (
            fmt.smallest_exponent - fmt.mantissa_bits))
        assert (np.abs(back[part] - x[part]) <= 0.5001 * unit).all()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_leading_axes_are_batches(tile):
    x = random((2, 3, 40, 140))
    whole = quantize(jnp.asarray(x), E4M3, tile, power_of_two=False)
    for i, j in itertools.product(range(2), range(3)):
        one = quantize(jnp.asarray(x[i, j]), E4M3, tile, power_of_two=False)
        np.testing.assert_array_equal(whole.scales[i, j], one.scales)
        np.testing.assert_array_equal(bits(whole.values[i, j]), bits(one.values))


def test_blocks_transpose_exactly_and_rows_do_not():
    """One copy of a weight serves both directions; an activation needs another quantisation for its weight gradient."""
    x = jnp.asarray(random((256, 384)))
    block, turned = (quantize(a, E4M3, BLOCK, power_of_two=False) for a in (x, x.T))
    np.testing.assert_array_equal(bits(block.values.T), bits(turned.values))
    np.testing.assert_array_equal(block.scales.T, turned.scales)
    rows, columns = (quantize(x, E4M3, tile, power_of_two=False) for tile in (ALONG_ROWS, ALONG_COLUMNS))
    assert (bits(rows.values) != bits(columns.values)).mean() > 0.1


@settings(deadline=None)
@given(st.integers(-126, 127), st.floats(1, 2, exclude_max=True, width=32))
def test_a_power_of_two_scale_changes_no_mantissa(exponent, mantissa):
    """Scaling by it is exact: what E4M3 holds at one scale it holds at any other."""
    amax = jnp.float32(mantissa * 2.0 ** exponent)
    scale = float(scale_of(amax, E4M3, power_of_two=True))
    assert np.log2(scale) == round(np.log2(scale)) and (float(amax) / scale <= 448 or scale == 2.0 ** -108)


def test_zeros_small_tiles_and_bad_numbers():
    """Zeros have scale 1; a tile with an infinity or a NaN becomes NaN as a whole, its neighbours do not."""
    x = np.zeros((4, 256), np.float32)
    x[1], x[2, 5], x[3, 200] = 1e-37, np.nan, np.inf
    q = quantize(jnp.asarray(x), E4M3, ALONG_ROWS, power_of_two=False)
    back = np.asarray(dequantize(q, E4M3, ALONG_ROWS, 256))
    assert q.scales[0].tolist() == [1, 1] and (back[:2] == 0).all()
    assert np.isnan(back[2, 5]) and np.isnan(back[3, 200])
    assert not np.isnan(back[2, 128:]).any() and not np.isnan(back[3, :128]).any()


@pytest.mark.parametrize("fmt, power_of_two", [*itertools.product([E4M3, E5M2, E5M6], [False, True])])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_one_bad_number_spoils_all_of_its_tile_and_no_other(tile, bad, fmt, power_of_two):
    """Whatever its sign, its neighbours and its place, at the ragged edge too."""
    x = random((130, 200))
    x[3, 5], x[129, 199], x[3, 6] = bad, bad, -np.inf
    q = jax.jit(lambda x: quantize(x, fmt, tile, power_of_two=power_of_two))(x)
    back = np.asarray(dequantize(q, fmt, tile, 200))
    for place, part in tiles_of(x.shape, tile):
        spoilt = not np.isfinite(x[part]).all()
        assert np.isnan(back[part]).all() if spoilt else np.isfinite(back[part]).all()
        assert np.isnan(q.scales[place]) == np.isnan(x[part]).any()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_constants_are_quantised_like_arguments(tile):
    """What the compiler evaluates by itself, transposed arrays among it, has the same bits."""
    x = random((18, 30))
    turned = lambda x: jax.tree.map(jnp.asarray, quantize(jnp.asarray(x).T, E4M3, tile, power_of_two=False))
    for constant, argument in zip(jax.jit(lambda: turned(x))(), jax.jit(turned)(x), strict=True):
        np.testing.assert_array_equal(bits(constant), bits(argument))


def test_a_vector_has_no_tiles():
    with pytest.raises(UserError, match=r"shape \(5,\)"):
        quantize(jnp.zeros(5), E4M3, BLOCK, power_of_two=False)
