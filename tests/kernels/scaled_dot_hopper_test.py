"""Block-scaled products for Hopper, interpreted on the CPU, against float64 products of the decoded operands.

Interpretation runs every matrix instruction at once, so it cannot show a race, nor an accumulator that is read before
its product is done; its own detector of races stays off:
it takes reads of scales for racing with the copies that follow, which a barrier orders on a GPU. `benchmark exact`,
`gemm` and `grouped` repeat the comparison there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config import UserError
from dsv3.kernels import scaled_dot_hopper
from dsv3.kernels.scaled import Blocks, Tiles, decode_blocks, decode_tiles, whole
from dsv3.kernels.scaled_dot_hopper import rows_times_blocks, weight_gradient
from dsv3.kernels.scaled_products_hopper import default_tuning, scaled_dot
from dsv3.kernels.scaled_warpgroups_hopper import Tuning, _in_flight
from dsv3.quant.formats import E4M3
from dsv3.quant.tiles import ALONG_ROWS, BLOCK, dequantize, quantize

BOUND = 1e-6
"""Norm-wise distance of float32 sums to float64; partial sums are exact here, unlike on a tensor core."""


def tiles(rng, rows, columns):
    """Rows of many magnitudes, one of zeros; the operand and its numbers in float64."""
    x = rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-20, 20, (rows, 1))
    x[3] = 0
    quantized = quantize(jnp.asarray(x, jnp.float32), E4M3, ALONG_ROWS, power_of_two=False)
    numbers = dequantize(quantized, E4M3, ALONG_ROWS, columns)
    return Tiles(quantized.values, quantized.scales.T), np.asarray(numbers, np.float64)


def blocks(rng, *shape):
    quantized = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), E4M3, BLOCK, power_of_two=False)
    return Blocks(*quantized), np.asarray(dequantize(quantized, E4M3, BLOCK, shape[-1]), np.float64)


def run(function, *arguments):
    with interpreter():
        return np.asarray(jax.block_until_ready(function(*arguments)), np.float64)


def assert_close(actual, expected, bound=BOUND):
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    scale = np.linalg.norm(expected, axis=-1, keepdims=True)  # every row by itself: their magnitudes differ by 2^40
    np.testing.assert_array_less(np.linalg.norm(actual - expected, axis=-1, keepdims=True), bound * scale + 1e-30)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tuning", [
    Tuning(128, 4, None, 8), Tuning(128, 4, "a", 8), Tuning(128, 5, "b", 1), Tuning(192, 3, None, 8),
    Tuning(192, 3, "a", 2)], ids=str)
def test_a_dense_product(tuning, steps):
    rng = np.random.default_rng(0)
    n = 384
    (a, a_numbers), (b, b_numbers) = tiles(rng, 256, 128 * steps), blocks(rng, n, 128 * steps)
    out = jax.ShapeDtypeStruct((256, n), jnp.float32)
    assert_close(run(rows_times_blocks, a, b, None, out, tuning), a_numbers @ b_numbers.T)


@pytest.mark.parametrize("width", [16, 32])
def test_a_few_rows_as_in_decoding(width):
    """64 rows, and columns that are no whole number of tiles."""
    rng = np.random.default_rng(7)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 384), blocks(rng, 256, 384)
    out = jax.ShapeDtypeStruct((64, 200), jnp.float32)
    actual = run(rows_times_blocks, a, b, None, out, Tuning(width, 3, None, 8))
    assert_close(actual, (a_numbers @ b_numbers.T)[:64, :200])


def test_rows_that_a_whole_tile_does_not_have():
    """All of its second half lies beyond the result."""
    rng = np.random.default_rng(16)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 384), blocks(rng, 128, 384)
    out = jax.ShapeDtypeStruct((64, 40), jnp.bfloat16)
    actual = run(rows_times_blocks, a, b, None, out, Tuning(64, 5, None, 8))
    assert_close(actual, (a_numbers @ b_numbers.T)[:64, :40], 2 ** -8)


def whole_numbers(rng, rows, columns):
    """Codes whose sums over 128 are exact, and scales that are powers of two: only the order of sums rounds."""
    codes = jnp.asarray(rng.integers(-8, 9, (rows, columns)), jnp.float8_e4m3fn)
    return codes, lambda *shape: jnp.asarray(2.0 ** rng.integers(-20, 20, shape), jnp.float32)


@pytest.mark.parametrize("steps", [1, 3, 4, 9])
@pytest.mark.parametrize("tuning", [
    Tuning(16, 5, rows=64), Tuning(48, 6, rows=64), Tuning(80, 4, "a", rows=64)], ids=str)
def test_tiles_of_half_the_height_have_the_bits_of_whole_ones(tuning, steps):
    """One warpgroup, four accumulators in flight or two, fewer steps than those and some over: no sum is another."""
    rng = np.random.default_rng(12)
    (a, scales), (b, _) = (whole_numbers(rng, 128, 128 * steps) for _ in range(2))
    a, b = Tiles(a, scales(steps, 128)), Blocks(b, scales(1, steps))
    out = jax.ShapeDtypeStruct((128, 90), jnp.float32)
    actual, whole = (run(rows_times_blocks, a, b, None, out, how) for how in (tuning, Tuning(128, 3)))
    np.testing.assert_array_equal(actual, whole)
    numbers = [np.asarray(x, np.float64) for x in (decode_tiles(a), decode_blocks(b))]
    assert_close(actual, (numbers[0] @ numbers[1].T)[:, :90], 1e-5)


def test_few_multiprocessors_take_half_rows_of_experts_and_of_none(monkeypatch):
    """Tiles with and without sums follow each other."""
    monkeypatch.setattr(scaled_dot_hopper, "MULTIPROCESSORS", 2)
    rng = np.random.default_rng(13)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 512, 640), blocks(rng, 2, 128, 640)
    expert_Z = np.array([2, 1, 2, 0], np.int32)
    spoiled = a._replace(scales=a.scales.at[:, 256:384].set(jnp.nan))
    out, tuning = jax.ShapeDtypeStruct((512, 128), jnp.float32), Tuning(64, 6, None, 1, rows=64)
    actual = run(rows_times_blocks, spoiled, b, jnp.asarray(expert_Z), out, tuning)
    matrices = np.concatenate([b_numbers, 0 * b_numbers[:1]])[np.repeat(expert_Z, 128)]
    assert_close(actual, np.einsum("mk,mnk->mn", a_numbers, matrices))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning(64, 5, rows=64), Tuning(96, 4, "b", rows=64)], ids=str)
def test_gradients_of_experts_in_half_rows_of_tiles(tuning):
    """No steps, fewer than accumulators, and more."""
    rng = np.random.default_rng(14)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 1280), tiles(rng, 128, 1280)
    steps_E = np.array([1, 0, 7, 2], np.int32)
    start_E = np.cumsum([0, *steps_E[:-1]], dtype=np.int32) * 128
    actual = run(weight_gradient, a, b, jnp.asarray(start_E), jnp.asarray(steps_E), tuning)
    for e, (start, steps) in enumerate(zip(start_E, steps_E, strict=True)):
        of_e = slice(start, start + 128 * steps)
        assert_close(actual[e], a_numbers[:, of_e] @ b_numbers[:, of_e].T)


@pytest.mark.parametrize("m, n, rows, width", [
    (1, 2112, 64, 16), (64, 2176, 64, 32), (128, 2112, 64, 32), (128, 2176, 64, 48), (128, 1536, 64, 32),
    (65, 7168, 64, 128), (128, 8576, 128, 128), (64, 16_384, 64, 128), (128, 16_384, 128, 128), (64, 24_576, 128, 192)])
def test_the_tiles_of_a_few_rows_run_all_at_once(m, n, rows, width):
    """As narrow as that, or the widest of all."""
    found = default_tuning(m, n)
    assert (found.rows, found.width) == (rows, width)


@pytest.mark.slow
@pytest.mark.parametrize("m, n", [(5, 12), (70, 200), (64, 33)])
def test_a_product_of_any_size_has_no_padding(m, n):
    """Rows and columns that the operands are padded by reach no result, whatever the copy engine counts in."""
    rng = np.random.default_rng(15)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 256), blocks(rng, 256, 256)
    actual = run(lambda a, b: scaled_dot(a, b, (m, n), jnp.float32, kind="NVIDIA H100 80GB HBM3"), a, b)
    assert_close(actual, (a_numbers @ b_numbers.T)[:m, :n])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("m, n", [(1, 1), (9, 576), (70, 200), (64, 33), (100, 3381), (128, 5000), (4095, 2120)])
def test_a_product_of_any_size_is_a_program_for_a_gpu(m, n, dtype):
    """The copy engine, which the interpreter has none of, takes whole pieces of a result only."""
    shape, k = jax.ShapeDtypeStruct, 256
    rows, columns = whole(m), whole(n)
    a = Tiles(shape((rows, k), jnp.float8_e4m3fn), shape((k // 128, rows), jnp.float32))
    b = Blocks(shape((columns, k), jnp.float8_e4m3fn), shape((columns // 128, k // 128), jnp.float32))
    product = jax.jit(lambda a, b: scaled_dot(a, b, (m, n), dtype, kind="none")).trace(a, b)
    assert product.out_info.shape == (m, n)
    assert product.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning(128, 4, None, 8), Tuning(128, 4, "a", 2)], ids=str)
def test_a_grouped_product(tuning):
    """Experts in any order, one without rows; and rows of none, which give zeros whatever they hold."""
    rng = np.random.default_rng(1)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 512, 384), blocks(rng, 3, 256, 384)
    expert_Z = np.array([2, 0, 2, 3], np.int32)
    out = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    spoiled = a._replace(scales=a.scales.at[:, 384:].set(jnp.nan))
    actual = run(rows_times_blocks, spoiled, b, jnp.asarray(expert_Z), out, tuning)
    assert_close(actual[:384], np.einsum("mk,mnk->mn", a_numbers[:384], b_numbers[np.repeat(expert_Z[:3], 128)]))
    np.testing.assert_array_equal(actual[384:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning(128, 4, None, 8), Tuning(128, 4, "b", 1)], ids=str)
def test_a_weight_gradient(tuning):
    rng = np.random.default_rng(2)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 256, 384), tiles(rng, 128, 384)
    assert_close(run(weight_gradient, a, b, None, None, tuning), a_numbers @ b_numbers.T)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning(128, 4, None, 8), Tuning(128, 4, "a", 1)], ids=str)
def test_a_grouped_weight_gradient(tuning):
    """An expert without tokens gets zeros; odd and even numbers of steps."""
    rng = np.random.default_rng(3)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 640), tiles(rng, 128, 640)
    steps_E = np.array([2, 0, 3], np.int32)
    start_E = np.array([0, 256, 256], np.int32)
    actual = run(weight_gradient, a, b, jnp.asarray(start_E), jnp.asarray(steps_E), tuning)
    for e, (start, steps) in enumerate(zip(start_E, steps_E, strict=True)):
        of_e = slice(start, start + 128 * steps)
        assert_close(actual[e], a_numbers[:, of_e] @ b_numbers[:, of_e].T)


@pytest.fixture
def copies_that_add(monkeypatch):
    """What the interpreter lacks: the copy engine's addition, done by the warpgroup at once."""
    copy = plgpu.copy_smem_to_gmem

    def copy_or_add(source, target, *, reduction_op):
        if reduction_op is None:
            copy(source, target)
        else:
            assert reduction_op == "add"
            target[...] = target[...] + source[...]

    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", copy_or_add)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [
    Tuning(128, 3, None, 8), Tuning(192, 3, "a", 8), Tuning(128, 4, "b", 1)], ids=str)
def test_a_weight_gradient_is_added_to_what_there_is(tuning, copies_that_add):
    """Twice, as of two micro-batches; an array that is needed again stays as it is."""
    rng = np.random.default_rng(10)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 256, 256), tiles(rng, 384, 256)
    there = jnp.asarray(rng.standard_normal((256, 384)), jnp.float32)

    def add(there, a, b):
        once = weight_gradient(a, b, None, None, tuning, there)
        return there, once, weight_gradient(a, b, None, None, tuning, once)

    product = a_numbers @ b_numbers.T
    before, *sums = run(lambda *arrays: np.stack(jax.jit(add)(*arrays)), there, a, b)
    np.testing.assert_array_equal(before, there)
    for times, actual in enumerate(sums, start=1):
        assert_close(actual, np.asarray(there, np.float64) + times * product)


def test_gradients_of_experts_are_added_to_what_there_is(copies_that_add):
    """An expert without tokens keeps what it had."""
    rng = np.random.default_rng(11)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 640), tiles(rng, 128, 640)
    there = jnp.asarray(rng.standard_normal((3, 128, 128)), jnp.float32)
    start_E, steps_E = np.array([0, 256, 256], np.int32), np.array([2, 0, 3], np.int32)
    actual = run(weight_gradient, a, b, jnp.asarray(start_E), jnp.asarray(steps_E), Tuning(128, 3, None, 8), there)
    np.testing.assert_array_equal(actual[1], there[1])
    for e, (start, steps) in enumerate(zip(start_E, steps_E, strict=True)):
        of_e = slice(start, start + 128 * steps)
        assert_close(actual[e], there[e] + a_numbers[:, of_e] @ b_numbers[:, of_e].T)


def test_what_a_gradient_is_added_to_is_reused_and_added_by_the_copy_engine():
    """In the program for a GPU: an output in the place of an operand. Without `into` there is none."""
    shape = jax.ShapeDtypeStruct
    operands = [Tiles(shape((n, 256), jnp.float8_e4m3fn), shape((2, n), jnp.float32)) for n in (256, 128)]
    product = jax.jit(lambda a, b, *into: weight_gradient(a, b, None, None, Tuning(), *into))
    for into, wanted in ([], 0), ([shape((256, 128), jnp.float32)], 1):
        text = product.trace(*operands, *into).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == 1
        assert text.count("output_operand_alias<") == wanted


@pytest.mark.parametrize("like", [((256, 64), jnp.float32), ((256, 128), jnp.bfloat16), ((1, 256, 128), jnp.float32)])
def test_a_gradient_is_added_to_its_like_only(like):
    (a, _), (b, _) = tiles(np.random.default_rng(0), 256, 128), tiles(np.random.default_rng(0), 128, 128)
    with pytest.raises(UserError, match=r"`into` is .*expected what the product is, float32 \(256, 128\)"):
        weight_gradient(a, b, None, None, Tuning(), jnp.zeros(*like))


def test_no_tokens_add_nothing():
    nothing = Tiles(jnp.zeros((128, 0), jnp.float8_e4m3fn), jnp.zeros((0, 128)))
    there = jnp.full((128, 128), 3.0)
    np.testing.assert_array_equal(weight_gradient(nothing, nothing, None, None, Tuning(), there), there)


@pytest.mark.slow
@pytest.mark.parametrize("steps_E", [(0, 0, 0), (1, 0, 5)], ids=str)
@pytest.mark.parametrize("pair", [None, "a", "b"])
def test_the_fewest_stages_and_any_number_of_steps_come_to_an_end(pair, steps_E):
    """No steps at all, one, and an odd number with more steps than slots; columns that are no whole pair of tiles."""
    rng = np.random.default_rng(5)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 768), tiles(rng, 128, 768)
    start_E = np.cumsum((0, *steps_E[:-1])) * 128
    actual = run(weight_gradient, a, b, jnp.asarray(start_E, jnp.int32), jnp.asarray(steps_E, jnp.int32),
                 Tuning(128, 3, pair, 8))
    for e, (start, steps) in enumerate(zip(start_E, steps_E, strict=True)):
        of_e = slice(start, start + 128 * steps)
        assert_close(actual[e], a_numbers[:, of_e] @ b_numbers[:, of_e].T)


@pytest.mark.slow
@pytest.mark.parametrize("tuning, dtype", [
    (Tuning(128, 4, None, 8), jnp.float32), (Tuning(144, 5, None, 2), jnp.bfloat16),
    (Tuning(192, 3, "b", 1), jnp.bfloat16)], ids=str)
def test_one_multiprocessor_writes_every_tile(tuning, dtype, monkeypatch):
    """Each under the first products of the next; nine pieces end with the buffer that the next tile begins with."""
    monkeypatch.setattr(scaled_dot_hopper, "MULTIPROCESSORS", 2 if tuning.pair else 1)
    rng = np.random.default_rng(8)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 384, 384), blocks(rng, 384, 384)
    actual = run(rows_times_blocks, a, b, None, jax.ShapeDtypeStruct((384, 384), dtype), tuning)
    assert_close(actual, a_numbers @ b_numbers.T, BOUND if dtype == jnp.float32 else 2 ** -8)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning(128, 4, None, 8), Tuning(192, 3, "a", 1)], ids=str)
def test_one_multiprocessor_goes_from_rows_of_experts_to_rows_of_none_and_back(tuning, monkeypatch):
    """Tiles of three steps and of no more than they must have follow each other."""
    monkeypatch.setattr(scaled_dot_hopper, "MULTIPROCESSORS", 2 if tuning.pair else 1)
    rng = np.random.default_rng(10)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 512, 384), blocks(rng, 2, 384, 384)
    expert_Z = np.array([2, 1, 2, 0], np.int32)
    actual = run(rows_times_blocks, a, b, jnp.asarray(expert_Z), jax.ShapeDtypeStruct((512, 384), jnp.float32), tuning)
    matrices = np.concatenate([b_numbers, 0 * b_numbers[:1]])[np.repeat(expert_Z, 128)]
    assert_close(actual, np.einsum("mk,mnk->mn", a_numbers, matrices))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [None, "a"])
def test_one_multiprocessor_writes_the_gradient_of_every_expert(pair, monkeypatch):
    """Tiles without a step, with one and with several follow each other."""
    monkeypatch.setattr(scaled_dot_hopper, "MULTIPROCESSORS", 2 if pair else 1)
    rng = np.random.default_rng(9)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 768), tiles(rng, 256, 768)
    steps_E = np.array([0, 3, 1, 0, 2], np.int32)
    start_E = np.cumsum([0, *steps_E[:-1]], dtype=np.int32) * 128
    actual = run(weight_gradient, a, b, jnp.asarray(start_E), jnp.asarray(steps_E), Tuning(128, 4, pair, 8))
    for e, (start, steps) in enumerate(zip(start_E, steps_E, strict=True)):
        of_e = slice(start, start + 128 * steps)
        assert_close(actual[e], a_numbers[:, of_e] @ b_numbers[:, of_e].T)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning(128, 3, None, 8), Tuning(192, 3, None, 8)], ids=str)
def test_steps_that_a_tile_does_not_have_leave_nothing_in_it(tuning):
    """Tiles with fewer steps than their first products take those of the next expert's tokens, here NaN."""
    rng = np.random.default_rng(6)
    (a, a_numbers), (b, b_numbers) = tiles(rng, 128, 384), tiles(rng, 128, 384)
    a = a._replace(values=a.values.at[:, 128:].set(jnp.nan))
    start_E, steps_E = jnp.asarray([0, 128, 128], jnp.int32), jnp.asarray([1, 0, 2], jnp.int32)
    actual = run(weight_gradient, a, b, start_E, steps_E, tuning)
    assert_close(actual[0], a_numbers[:, :128] @ b_numbers[:, :128].T)
    np.testing.assert_array_equal(actual[1], 0)
    assert np.isnan(actual[2]).all()


@pytest.mark.parametrize("pieces", range(1, 12))
def test_no_buffer_is_filled_while_it_may_still_be_read(pieces):
    """Also by the first piece of the next tile, which follows at once where that tile has no steps."""
    copied = []
    for piece in [*range(pieces)] * 3:
        allowed = _in_flight(piece, pieces)
        assert piece % 2 not in copied[len(copied) - allowed:]
        copied.append(piece % 2)


@pytest.mark.parametrize("tuning, said", [
    (Tuning(128, 2, None, 8), "stages=2, .* would wait for ever"),
    (Tuning(64, 4, None, 8, 64), "stages=4, .* would wait for ever: operands arrive 4 steps ahead"),
    (Tuning(64, 6, None, 8, 32), "rows=32.*: tiles have 128 rows or 64"),
    (Tuning(100, 4), "width=100.*: tiles have a multiple of 16 columns"),
    (Tuning(512, 3), "width=512.*: tiles have a multiple of 16 columns, 256 at most"),
    (Tuning(128, 4, "c"), "pair='c'.*: `pair` is 'a', 'b' or None"),
    (Tuning(128, 4, "b", 8), "neighbouring rows of tiles may belong to two experts")])
def test_a_tuning_that_cannot_work_is_refused(tuning, said):
    rng = np.random.default_rng(6)
    (a, _), (b, _) = tiles(rng, 256, 128), blocks(rng, 2, 128, 128)
    with pytest.raises(UserError, match=said):
        rows_times_blocks(a, b, jnp.arange(2), jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), tuning)


def test_scales_of_columns_that_are_not_aligned_are_refused():
    """What a CPU forgives is a misaligned address on the card."""
    (a, _), (b, _) = (tiles(np.random.default_rng(8), 256, 128) for _ in range(2))
    with pytest.raises(UserError, match="width=176, .* multiple of 32"):
        weight_gradient(a, b, None, None, Tuning(176, 4, None, 8))


@pytest.mark.slow
def test_a_nan_reaches_its_row_alone():
    rng = np.random.default_rng(4)
    (a, _), (b, _) = tiles(rng, 128, 256), blocks(rng, 128, 256)
    values = a.values.at[5, 130].set(jnp.nan)
    actual = run(rows_times_blocks, Tiles(values, a.scales), b, None, jax.ShapeDtypeStruct((128, 128), jnp.float32),
                 Tuning(128, 4, None, 8))
    assert np.isnan(actual[5]).all()
    assert np.isfinite(np.delete(actual, 5, axis=0)).all()
