"""What the tests of Hopper kernels share: the interpreter, quantisation from `dsv3.quant`, equality of bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreter

from dsv3.config.quant import Operand
from dsv3.kernels.scaled import Tiles
from dsv3.quant.formats import format_of, round_to
from dsv3.quant.tiles import scale_of

E4M3 = Operand(format="e4m3", tile="inner", power_of_two=False)
OPERANDS = [Operand(format=fmt, tile="inner", power_of_two=power) for fmt in ("e4m3", "e5m2", "e5m6")
            for power in (False, True)]


def slow(*values):
    """Parameters of the slow tests."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
            for value in values]


def name_of(operand):
    return f"{operand.format}{', power of two' if operand.power_of_two else ''}"


def reference(x_MK, operand) -> Tiles:
    """As `dsv3.quant.tiles.quantize` has it; the maxima come from NumPy, because XLA's lose NaNs on a CPU."""
    fmt = format_of(operand.format)
    x_MK = np.pad(np.asarray(x_MK, np.float32), [(0, -size % 128) for size in x_MK.shape])
    amax = np.abs(x_MK).reshape(len(x_MK), -1, 128).max(axis=-1)
    scales = scale_of(jnp.asarray(amax), fmt, power_of_two=operand.power_of_two)
    rounded = round_to(x_MK * jnp.repeat(1 / scales, 128, axis=1), fmt)
    return Tiles(rounded.astype(jnp.bfloat16 if fmt.dtype is None else fmt.dtype), scales.T)


def interpreted(function, *arrays):
    with interpreter(detect_races=True):
        return jax.block_until_ready(jax.jit(function)(*arrays))


def assert_same(actual: Tiles, expected: Tiles):
    """Equal to the bit; NaNs are where NaNs should be, whatever their own bits."""
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        got, wanted = np.asarray(got), np.asarray(wanted)
        nan = np.isnan(wanted.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        bits = f"u{got.dtype.itemsize}"
        np.testing.assert_array_equal(np.where(nan, 0, got.view(bits)), np.where(nan, 0, wanted.view(bits)))


def wild(seed, m, k):
    """bfloat16 of all magnitudes, with tiles of zeros, subnormals, infinities and NaNs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * 2.0 ** rng.integers(-140, 120, (m, 1)) * 2.0 ** rng.integers(-20, 3, (m, k))
    x[3], x[5, :128], x[7, 1], x[9, 40], x[11, 2] = 0, 1e-40, np.inf, np.nan, -np.inf
    x[:, 17] = -0.0
    return jnp.asarray(x, jnp.bfloat16)


def numbers_of(tiles: Tiles) -> np.ndarray:
    """float32."""
    with np.errstate(invalid="ignore"):
        return np.asarray(tiles.values, np.float32) * np.repeat(np.asarray(tiles.scales).T, 128, axis=1)


def assert_close(actual: Tiles, expected: Tiles):
    """Equal but for a last bit of float32 before rounding, which now and then moves a code to its neighbour."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    np.testing.assert_allclose(actual.scales, expected.scales, rtol=1e-5)
    codes = [np.asarray(tiles.values).view(np.uint8).astype(int) for tiles in (actual, expected)]
    distance = np.abs(codes[0] - codes[1])
    assert distance.max() <= 1 and np.mean(distance > 0) < 0.005
