"""The Hopper kernels for quantisation, interpreted on the CPU, against `dsv3.quant`: equal to the bit.

Few thread blocks take many tiles, so that every slot of shared memory is used again; the interpreter looks for races.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.quant import Operand
from dsv3.kernels.quantize_hopper import quantize_both, quantize_columns, quantize_rows, requantize_columns
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.tile_hopper import reciprocal, repaired
from dsv3.quant.formats import format_of, round_to
from dsv3.quant.tiles import quantize, scale_of

SMALL = {"one stage": Streaming(1, 1, 1, 2), "two stages": Streaming(2, 1, 2, 2), "one block": Streaming(3, 1, 1, 1)}
E4M3 = Operand(format="e4m3", tile="inner", power_of_two=False)
OPERANDS = [Operand(format=fmt, tile="inner", power_of_two=power) for fmt in ("e4m3", "e5m2", "e5m6")
            for power in (False, True)]


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
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
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


@pytest.mark.parametrize("operand", OPERANDS, ids=name_of)
def test_both_forms_equal_the_reference(operand):
    x_MK = wild(0, 256, 384)
    rows, columns = interpreted(
        lambda x: quantize_both(x, operand, operand, SMALL["one block"]), x_MK)
    assert_same(rows, reference(x_MK, operand))
    assert_same(columns, reference(x_MK.T, operand))


@pytest.mark.parametrize("streaming", SMALL.values(), ids=SMALL)
def test_every_tile_is_written_whatever_the_streaming(streaming):
    x_MK = wild(1, 384, 256)
    assert_same(interpreted(lambda x: quantize_rows(x, E4M3, streaming), x_MK), reference(x_MK, E4M3))
    assert_same(interpreted(lambda x: quantize_columns(x, E4M3, streaming), x_MK), reference(x_MK.T, E4M3))


@pytest.mark.parametrize("kept", [OPERANDS[0], OPERANDS[3], OPERANDS[5]], ids=name_of)
@pytest.mark.parametrize("streaming", ["one stage", "two stages"])
def test_requantising_starts_from_the_kept_numbers(kept, streaming):
    tiles = reference(wild(3, 256, 384), kept)
    with np.errstate(invalid="ignore"):
        numbers = np.asarray(tiles.values, np.float32) * np.repeat(np.asarray(tiles.scales).T, 128, axis=1)
    actual = interpreted(lambda *kept: requantize_columns(Tiles(*kept), OPERANDS[1], SMALL[streaming]), *tiles)
    assert_same(actual, reference(numbers.T, OPERANDS[1]))


def test_ragged_shapes_are_padded_with_zeros_of_scale_one():
    x_MK = wild(2, 200, 72)
    rows, columns = interpreted(lambda x: quantize_both(x, E4M3, E4M3, SMALL["two stages"]), x_MK)
    assert_same(rows, reference(x_MK, E4M3))
    assert_same(columns, reference(x_MK.T, E4M3))
    np.testing.assert_array_equal(rows.scales[:, 200:], 1)


def test_the_reference_here_is_that_of_the_library():
    x_MK = jax.random.normal(jax.random.key(0), (128, 256), jnp.bfloat16)
    values, scales = quantize(x_MK, format_of("e4m3"), (1, 128), power_of_two=True)
    assert_same(Tiles(values, scales.T), reference(x_MK, OPERANDS[1]))


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0 ** -110, 2.0 ** 120, width=32), st.integers(-1, 1))
def test_a_quotient_off_by_one_bit_is_repaired(scale, error):
    exact = np.float32(1) / np.float32(scale)
    quotient = (exact.view(np.int32) + np.int32(error)).view(np.float32)
    assert float(repaired(jnp.float32(quotient), jnp.float32(scale))) == exact


def test_reciprocals_of_infinity_and_nan_stay():
    assert float(reciprocal(jnp.float32(np.inf))) == 0 and np.isnan(reciprocal(jnp.float32(np.nan)))
