"""Scaled products against float64 sums of what was quantised, and against Hopper's accumulator where that is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.config import Operand, UserError
from dsv3.kernels.grouped_dot import block_experts, block_starts, padded_rows
from dsv3.kernels.quantize import quantize_columns, quantize_rows, quantize_weights
from dsv3.kernels.scaled import decode_blocks, decode_tiles
from dsv3.kernels.scaled_dot import products, scaled_dot
from dsv3.quant.accumulate import promoted_dot

INNER = Operand(format="e4m3", tile="inner", power_of_two=False)
BLOCK = Operand(format="e4m3", tile="block", power_of_two=False)
TENSOR = Operand(format="e4m3", tile="tensor", power_of_two=False)
FLOAT32 = products(128, "float32")
SIZES = np.array([130, 0, 5, 128, 1, 0])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def in_64(array):
    return np.asarray(array, np.float64)


def groups():
    """Rows of six experts, two of them empty, and the first row, blocks and expert of each."""
    n_rows, sizes = padded_rows(SIZES.sum(), len(SIZES), 128), jnp.asarray(SIZES, jnp.int32)
    starts = block_starts(sizes, 128)
    real = np.zeros(n_rows, bool)
    for start, size in zip(np.asarray(starts), SIZES, strict=True):
        real[start:start + size] = True
    rows = normal(0, n_rows, 200) * real[:, None]
    return rows, starts, -(-sizes // 128), block_experts(sizes, n_rows // 128, 128)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_dot_is_the_product_of_the_decoded_operands(out_dtype):
    a, (b, _) = quantize_rows(normal(0, 70, 300), INNER), quantize_weights(normal(1, 300, 140), BLOCK)
    exact = in_64(decode_tiles(a)) @ in_64(decode_blocks(b)).T
    for shape in ((128, 256), (70, 140)):
        out = scaled_dot(a, b, shape, out_dtype)
        assert out.shape == shape and out.dtype == out_dtype
        assert distance(out, exact[:shape[0], :shape[1]]) < (1e-6 if out_dtype == jnp.float32 else 3e-3)
    b = quantize_rows(normal(2, 140, 300), INNER)
    assert distance(scaled_dot(a, b, (128, 256), jnp.float32), in_64(decode_tiles(a)) @ in_64(decode_tiles(b)).T) < 1e-6


def test_grouped_dot_takes_each_block_to_its_expert():
    rows, _, _, expert_Z = groups()
    a, (b, _) = quantize_rows(rows, INNER), quantize_weights(normal(1, len(SIZES), 200, 136), BLOCK)
    out = in_64(FLOAT32.grouped_dot(a, b, expert_Z, jnp.float32))
    weights = np.pad(in_64(decode_blocks(b)), ((0, 1), (0, 0), (0, 0)))  # the last one of no expert
    assert len(SIZES) in np.asarray(expert_Z)
    for z, expert in enumerate(np.asarray(expert_Z)):
        block = slice(128 * z, 128 * z + 128)
        np.testing.assert_allclose(out[block], in_64(decode_tiles(a))[block] @ weights[expert].T, rtol=1e-5, atol=1e-4)


def test_weight_gradients_sum_over_tokens_and_over_each_experts_rows():
    rows, starts, steps, _ = groups()
    a, b = quantize_columns(rows, INNER), quantize_columns(normal(3, len(rows), 136), INNER)
    left, right = in_64(decode_tiles(a)), in_64(decode_tiles(b))
    assert distance(FLOAT32.weight_gradient(a, b), left @ right.T) < 1e-6
    got = in_64(FLOAT32.grouped_weight_gradient(a, b, starts, steps))
    for expert, (start, n) in enumerate(zip(np.asarray(starts), np.asarray(steps), strict=True)):
        mine = slice(start, start + 128 * n)
        np.testing.assert_allclose(got[expert], left[:, mine] @ right[:, mine].T, rtol=1e-5, atol=1e-3)
    assert (got[SIZES == 0] == 0).all()


def test_hoppers_accumulator_is_the_model_of_it():
    """Promoted every 128 where scales change, and later only where they do not: more error, in the known direction."""
    x, w = jnp.abs(normal(0, 4, 512)), jnp.abs(normal(1, 512, 128))
    a, (b, _) = quantize_rows(x, INNER), quantize_weights(w, BLOCK)
    hopper = products(128, "hopper").dot(a, b, (128, 128), jnp.float32)
    scales = jnp.repeat(b.scales, 128, axis=0)
    np.testing.assert_array_equal(
        hopper, promoted_dot(a.values, b.values, a.scales.T, scales, 128, tensor_core=True))
    exact = in_64(decode_tiles(a)) @ in_64(decode_blocks(b)).T
    assert 1e-6 < distance(hopper[:4], exact[:4]) < 1e-3
    a, (b, _) = quantize_rows(x[:, :384], TENSOR), quantize_weights(w[:384], TENSOR)
    exact, errors = (in_64(decode_tiles(a)) @ in_64(decode_blocks(b)).T)[:4], []
    for interval in (32, 128, 256):  # 256 does not divide 384
        errors.append(distance(products(interval, "hopper").dot(a, b, (4, 128), jnp.float32), exact))
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("interval", [128, 256, 512])
def test_an_experts_rows_are_promoted_as_late_as_the_rule_says(interval):
    """Each expert's weight gradient is the model's sum of its own rows, from its first block on, to the last bit."""
    rows, starts, steps, _ = groups()
    rows = jnp.abs(rows[:, :128])
    a, b = quantize_columns(rows, TENSOR), quantize_columns(jnp.abs(normal(3, len(rows), 128)), TENSOR)
    got = jax.jit(products(interval, "hopper").grouped_weight_gradient)(a, b, starts, steps)
    for e, (start, n) in enumerate(zip(np.asarray(starts), np.asarray(steps), strict=True)):
        mine, missing = slice(start, start + 128 * n), -128 * n % interval
        left, right = (jnp.pad(x.values[:, mine], ((0, 0), (0, missing))) for x in (a, b))
        scales = [jnp.broadcast_to(x.scales[:1].T, (128, left.shape[1] // interval)) for x in (a, b)]
        np.testing.assert_array_equal(
            got[e], promoted_dot(left, right, *scales, interval, tensor_core=True) if n else np.zeros((128, 128)))
    whole = products(interval, "hopper")
    one = whole.grouped_weight_gradient(a, b, jnp.zeros(1, jnp.int32), jnp.full(1, len(rows) // 128))[0]
    np.testing.assert_array_equal(one, whole.weight_gradient(a, b))


@pytest.mark.slow
def test_grouped_products_in_hoppers_accumulator_are_near_the_float32_ones():
    rows, starts, steps, expert_Z = groups()
    a, (b, _) = quantize_rows(rows[:, :128], INNER), quantize_weights(normal(1, len(SIZES), 128, 128), BLOCK)
    columns = quantize_columns(rows[:, :128], INNER)
    hopper = products(128, "hopper")
    for name, inputs in {"grouped_dot": (a, b, expert_Z, jnp.float32),
                         "grouped_weight_gradient": (columns, columns, starts, steps)}.items():
        assert 0 < distance(getattr(hopper, name)(*inputs), getattr(FLOAT32, name)(*inputs)) < 1e-3, name


def test_a_bad_number_spoils_its_row_and_nothing_else_and_never_vanishes():
    x, w = normal(0, 130, 256).at[3, 200].set(jnp.nan).at[7, 0].set(jnp.inf), normal(1, 256, 128)
    a, (b, _) = quantize_rows(x, INNER), quantize_weights(w, BLOCK)
    out = np.asarray(scaled_dot(a, b, (130, 128), jnp.bfloat16), np.float32)
    assert np.isnan(out[[3, 7]]).all()
    assert np.isfinite(np.delete(out, [3, 7], axis=0)).all()
    columns = quantize_columns(x, INNER)
    d_w = np.asarray(FLOAT32.weight_gradient(columns, quantize_columns(normal(2, 130, 128), INNER)))
    assert np.isnan(d_w[[200, 0]]).all() and np.isfinite(np.delete(d_w, [200, 0], axis=0)).all()


def test_an_unknown_accumulator():
    with pytest.raises(UserError, match="'bfloat16'; expected float32 or hopper"):
        products(128, "bfloat16")


def test_products_can_be_compiled_and_batched_by_jit():
    """One trace for all: the bundle of a rule is a bundle of plain functions."""
    a, (b, _) = quantize_rows(normal(0, 128, 128), INNER), quantize_weights(normal(1, 128, 128), BLOCK)
    jitted = jax.jit(lambda a, b: FLOAT32.dot(a, b, (128, 128), jnp.float32))(a, b)
    np.testing.assert_allclose(jitted, FLOAT32.dot(a, b, (128, 128), jnp.float32), rtol=1e-6, atol=1e-4)
