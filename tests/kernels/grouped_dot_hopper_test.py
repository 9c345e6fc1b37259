"""The Hopper kernel, interpreted on the CPU, against the reference: the product and both gradients.

Interpretation runs every matrix instruction at once, so it cannot show a race: `benchmark grouped` repeats the
comparison on a GPU.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreter
from tiny_models import distance

from dsv3.kernels.grouped_dot import block_starts, grouped_dot, padded_rows
from dsv3.kernels.grouped_dot_hopper import BLOCK, STEP, grouped_dot_hopper, refusal, tile_width

SIZES = {
    "ragged, one empty": [130, 0, 5, 128],
    "all on the last": [0, 0, 0, 263],
    "nothing": [0, 0, 0, 0],
}


def problem(sizes, n_in, n_out, block=BLOCK):
    rng = np.random.default_rng(0)
    n_rows = padded_rows(263, len(sizes), block)
    rows_JD = np.zeros((n_rows, n_in))
    for start, size in zip(block_starts(jnp.array(sizes), block), sizes, strict=True):
        rows_JD[start:start + size] = rng.standard_normal((size, n_in))
    bfloat16 = partial(jnp.asarray, dtype=jnp.bfloat16)
    return (bfloat16(rows_JD), jnp.array(sizes, jnp.int32), bfloat16(rng.standard_normal((n_rows, n_out))),
            jnp.array(rng.standard_normal((len(sizes), n_in, n_out)), jnp.float32))


def value_and_gradients(function, rows_JD, sizes_E, cotangent_JF, w_EDF, block):
    out, vjp = jax.vjp(lambda rows, w: function(rows, sizes_E, w, block), rows_JD, w_EDF)
    return out, *vjp(cotangent_JF)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("n_in, n_out", [(128, 256), (256, 128)])
def test_agrees_with_the_reference(name, n_in, n_out):
    """Widths of both tile shapes; every output tile must be written, or the comparison would meet garbage."""
    inputs = problem(SIZES[name], n_in, n_out)
    with interpreter():
        actual = jax.block_until_ready(value_and_gradients(grouped_dot_hopper, *inputs, BLOCK))
    expected = value_and_gradients(grouped_dot, *inputs, BLOCK)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for got, wanted in zip(actual, expected, strict=True):
        if np.any(np.asarray(wanted)):
            assert distance(got, wanted) < 1e-3
        else:
            np.testing.assert_array_equal(np.asarray(got, np.float32), 0)
    chex.assert_type(actual[2], jnp.float32)
    empty_E = np.array(SIZES[name]) == 0
    np.testing.assert_array_equal(np.asarray(actual[2])[empty_E], 0)


@pytest.mark.slow
def test_blocks_of_the_caller_may_be_several_of_the_kernel():
    inputs = problem(SIZES["ragged, one empty"], 128, 128, block=2 * BLOCK)
    with interpreter():
        actual = jax.block_until_ready(value_and_gradients(grouped_dot_hopper, *inputs, 2 * BLOCK))
    for got, wanted in zip(actual, value_and_gradients(grouped_dot, *inputs, 2 * BLOCK), strict=True):
        assert distance(got, wanted) < 1e-3


def test_lowers_for_a_gpu():
    """Without a GPU: three Mosaic kernels in the program, at V3's own expert shape."""
    shapes = [((1024, 7168), jnp.bfloat16), ((8,), jnp.int32), ((1024, 4096), jnp.bfloat16),
              ((8, 7168, 4096), jnp.float32)]
    function = lambda *a: value_and_gradients(grouped_dot_hopper, *a, BLOCK)
    traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 3


@pytest.mark.parametrize("n_in, n_out, dtype, block, why", [
    (192, 256, jnp.bfloat16, 128, "192 x 256"), (256, 64, jnp.bfloat16, 128, "256 x 64"),
    (256, 256, jnp.float32, 128, "float32"), (256, 256, jnp.bfloat16, 64, "row blocks of 64"),
])
def test_refuses_what_it_cannot_tile(n_in, n_out, dtype, block, why):
    assert why in refusal(n_in, n_out, dtype, block)


def test_accepts_what_it_can():
    assert refusal(7168, 4096, jnp.bfloat16, 256) is None
    assert tile_width(1280) == 256 and tile_width(384) == 128


@pytest.mark.parametrize("spoiled", ["a row", "the gradient of a row", "a weight"])
def test_a_nan_stays_with_its_row_and_expert(spoiled):
    """In the first row of the second of two experts: the last step of the first one ends before it."""
    sizes, n_in, n_out, row = [BLOCK - STEP // 2, 2], 128, 256, BLOCK
    rows_JD, sizes_E, d_out_JF, w_EDF = (x[:2 * BLOCK] for x in problem(sizes, n_in, n_out))
    if spoiled == "a row":
        rows_JD = rows_JD.at[row, 5].set(jnp.nan)
    elif spoiled == "a weight":
        w_EDF = w_EDF.at[1, 5, 7].set(jnp.nan)
    else:
        d_out_JF = d_out_JF.at[row, 7].set(jnp.nan)
    with interpreter():
        found = jax.block_until_ready(
            value_and_gradients(grouped_dot_hopper, rows_JD, sizes_E, d_out_JF, w_EDF, BLOCK))
    out, d_rows, d_w = (np.isnan(np.asarray(x, np.float32)) for x in found)
    rows, of_second = np.arange(2 * BLOCK)[:, None], np.arange(2)[:, None, None] == 1
    columns, inputs = np.arange(n_out), np.arange(n_in)
    nowhere = lambda like: np.zeros(like.shape, bool)
    expected = {
        "a row": ((rows == row) & (columns >= 0), nowhere(d_rows), of_second & (inputs[:, None] == 5) & (columns >= 0)),
        "the gradient of a row": (
            nowhere(out), (rows == row) & (inputs >= 0), of_second & (inputs[:, None] >= 0) & (columns == 7)),
        "a weight": ((rows >= row) & (columns == 7), (rows >= row) & (inputs == 5), nowhere(d_w)),
    }
    for got, wanted in zip((out, d_rows, d_w), expected[spoiled], strict=True):
        np.testing.assert_array_equal(got, wanted)
