"""Block scales against float64, block by block."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.quant.blocks import BLOCK, LARGEST, SMALLEST_AMAX, block_scales, dequantize_blocks, n_blocks, quantize_blocks

SHAPES = [(1, 1), (128, 128), (576, 130), (127, 300), (257, 128)]


def random_matrix(shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape)).astype(dtype)


def of_blocks(shape):
    return [(i, j, slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            for i in range(n_blocks(shape[0])) for j in range(n_blocks(shape[1]))]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_has_the_scale_of_its_largest_element(shape):
    matrix = random_matrix(shape)
    scales = block_scales(matrix)
    assert scales.shape == (n_blocks(shape[0]), n_blocks(shape[1])) and scales.dtype == np.float32
    for i, j, rows, columns in of_blocks(shape):
        assert scales[i, j] == np.float32(np.abs(matrix[rows, columns]).max()) / np.float32(448)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_nearest_e4m3_to_the_quotient(shape):
    matrix = random_matrix(shape)
    values, scales = quantize_blocks(matrix)
    representable = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    representable = np.unique(representable[np.isfinite(representable)])
    for i, j, rows, columns in of_blocks(shape):
        exact = matrix[rows, columns].astype(np.float64) / scales[i, j]
        best = np.abs(exact[..., None] - representable[None, None]).min(axis=-1)
        # The quotient was rounded to float32 before: near the middle of two values either is right.
        error = np.abs(values[rows, columns].astype(np.float64) - exact)
        assert (error <= best + 1e-6 * np.abs(exact)).all()
        assert np.abs(values[rows, columns].astype(np.float64)).max() == LARGEST


def test_ties_go_to_even():
    """448 fixes the scale at 1; 17 and 19 lie half-way between E4M3's 16, 18 and 20."""
    matrix = np.array([[448, 17, 19, -17, 2.125]], np.float32)
    assert quantize_blocks(matrix).values.astype(np.float32).tolist() == [[448, 16, 20, -16, 2.0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_is_value_times_scale_of_its_block_from_any_corner(shape):
    values, scales = quantize_blocks(random_matrix(shape))
    expected = np.empty(shape, np.float32)
    for i, j, rows, columns in of_blocks(shape):
        expected[rows, columns] = values[rows, columns].astype(np.float32) * scales[i, j]
    assert (dequantize_blocks(values, scales) == expected).all()
    rng = np.random.default_rng(1)
    for _ in range(20):
        first = [int(rng.integers(0, size)) for size in shape]
        stop = [int(rng.integers(f, size)) + 1 for f, size in zip(first, shape, strict=True)]
        part = tuple(slice(f, s) for f, s in zip(first, stop, strict=True))
        assert (dequantize_blocks(values[part], scales, tuple(first)) == expected[part]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES))
def test_quantising_what_was_dequantised_changes_nothing(seed, shape):
    values, scales = quantize_blocks(random_matrix(shape, seed))
    again = quantize_blocks(dequantize_blocks(values, scales))
    np.testing.assert_allclose(again.scales, scales, rtol=1e-6)
    assert again.values.tobytes() == values.tobytes()


def test_zeros_have_a_scale():
    values, scales = quantize_blocks(np.zeros((3, 200), np.float32))
    assert (scales == np.float32(SMALLEST_AMAX) / np.float32(448)).all() and not values.astype(np.float32).any()


def test_bfloat16_matrices_are_quantised_as_their_float32_values():
    matrix = random_matrix((130, 130), dtype=ml_dtypes.bfloat16)
    low, high = quantize_blocks(matrix), quantize_blocks(matrix.astype(np.float32))
    assert low.values.tobytes() == high.values.tobytes() and (low.scales == high.scales).all()
