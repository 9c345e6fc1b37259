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
from jax.experimental.pallas import mosaic_gpu as plgpu
from tiny_models import distance

from dsv3.kernels.grouped_dot import block_starts, grouped_dot, padded_rows
from dsv3.kernels.grouped_dot_hopper import BLOCK, grouped_dot_hopper, refusal, tile_width

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
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
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
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
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
