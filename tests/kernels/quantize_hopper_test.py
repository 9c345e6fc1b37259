"""The Hopper kernels for quantisation, interpreted on the CPU, against `dsv3.quant`: equal to the bit.

Few thread blocks take many tiles, so that every slot of shared memory is used again; the interpreter looks for races.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import E4M3, OPERANDS, assert_same, interpreted, name_of, numbers_of, reference, slow, wild
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.kernels.fp8_hopper import FAST
from dsv3.kernels.fp8_kernels import REFERENCE
from dsv3.kernels.quantize_hopper import quantize_both, quantize_columns, quantize_rows, requantize_columns
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.tile_hopper import reciprocal, repaired
from dsv3.quant.formats import format_of
from dsv3.quant.tiles import quantize

SMALL = {"one stage": Streaming(1, 1, 1, 2), "two stages": Streaming(2, 1, 2, 2), "one block": Streaming(3, 1, 1, 1),
         "one behind": Streaming(2, 1, 2, 1, behind=1), "two behind": Streaming(3, 1, 2, 4, behind=2)}


@pytest.mark.parametrize("operand", [E4M3, OPERANDS[5], *slow(*OPERANDS[1:5])], ids=name_of)
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
@pytest.mark.parametrize("streaming", ["two stages", *slow("one stage")])
def test_requantising_starts_from_the_kept_numbers(kept, streaming):
    tiles = reference(wild(3, 256, 384), kept)
    actual = interpreted(lambda *kept: requantize_columns(Tiles(*kept), OPERANDS[1], SMALL[streaming]), *tiles)
    assert_same(actual, reference(numbers_of(tiles).T, OPERANDS[1]))


@pytest.mark.parametrize("m, k", [(200, 192), *slow((199, 72))])
def test_ragged_shapes_are_padded_with_zeros_of_scale_one(m, k):
    x_MK = wild(2, m, k)
    rows, columns = interpreted(lambda x: quantize_both(x, E4M3, E4M3, SMALL["two stages"]), x_MK)
    assert_same(rows, reference(x_MK, E4M3))
    assert_same(columns, reference(x_MK.T, E4M3))
    np.testing.assert_array_equal(rows.scales[:, m:], 1)


def test_streaming_that_would_wait_for_ever_is_refused():
    with pytest.raises(UserError, match="`behind` must be less than `stages`"):
        quantize_rows(jnp.ones((128, 128), jnp.bfloat16), E4M3, Streaming(2, 1, 1, 1, behind=2))


@pytest.mark.parametrize("settings, wanted", [
    (Streaming(33, 1, 1), "barriers for 32"), (Streaming(2, 1, 3), "do not share 128 rows"),
    (Streaming(12, 1, 1), "bytes of shared memory")], ids=str)
def test_settings_that_cannot_be_are_refused(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        quantize_rows(jnp.ones((128, 128), jnp.bfloat16), E4M3, settings)


@pytest.mark.parametrize("split", [3, 8, 16, 64])
@pytest.mark.parametrize("name", [
    "quantize_both", "requantize_columns", "quantize_and_pack", "unpack_both", "quantize_weights", "swiglu_quantize",
    "swiglu_backward_quantize"])
def test_warpgroups_that_cannot_share_a_square_are_refused(name, split):
    """With more of them than pieces, some would write the rows of others."""
    x, settings, kept = jnp.ones((128, 256), jnp.bfloat16), Streaming(1, 1, split), OPERANDS[5]
    both, packed = REFERENCE.quantize_and_pack(x, E4M3, kept)
    arguments = {
        "quantize_both": (x, E4M3, E4M3), "requantize_columns": (both, E4M3), "quantize_and_pack": (x, E4M3, kept),
        "unpack_both": (packed, kept, E4M3, jnp.bfloat16),
        "quantize_weights": (x.astype(jnp.float32), dataclasses.replace(E4M3, tile="block")),
        "swiglu_quantize": (x, E4M3, E4M3), "swiglu_backward_quantize": (x, x[:, :128], None, E4M3, E4M3, E4M3)}
    with pytest.raises(UserError, match=f"split {split}: so many warpgroups do not share 128 rows"):
        FAST[name].function(*arguments[name], settings)


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
