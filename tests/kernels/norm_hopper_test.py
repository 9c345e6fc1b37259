"""RMSNorm on Hopper, interpreted on the CPU, against `rms_norm` and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper_kernels import interpreted, slow
from tiny_models import distance

from dsv3.config import UserError
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.norm_hopper import refusal, rms_norm_hopper, rows_of
from dsv3.kernels.stream_hopper import Streaming

EPS = 1e-5
ONE_BLOCK, MANY_BLOCKS, DEEP = Streaming(2, 1, 1, 1), Streaming(2, 1, 1, 3), Streaming(4, 2, 1, 2)
LAST_BIT = 2.0 ** -7
"""Of bfloat16: sums in another order may round a result to its neighbour."""


def problem(*shape, seed=0):
    """x of many magnitudes by row, gain, and the gradient of the result, also of many magnitudes."""
    rng = np.random.default_rng(seed)
    rows = lambda: rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, (*shape[:-1], 1))
    gain = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)
    return jnp.asarray(rows(), jnp.bfloat16), gain, jnp.asarray(rows(), jnp.bfloat16)


def with_gradients(norm):
    def run(x, gain, d_y):
        y, vjp = jax.vjp(lambda x, gain: norm(x, gain, EPS), x, gain)
        return y, *vjp(d_y)

    return run


def fast(settings):
    return lambda x, gain, eps: rms_norm_hopper(x, gain, eps, settings, settings)


def assert_equivalent(settings, *arguments):
    """All three results; gradients of x by rows, which differ in size by 2^24."""
    got = interpreted(with_gradients(fast(settings)), *arguments)
    wanted = jax.jit(with_gradients(rms_norm))(*arguments)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    (y, d_x, d_gain), (ref_y, ref_d_x, ref_d_gain) = (jax.tree.map(np.float64, r) for r in (got, wanted))
    np.testing.assert_allclose(y, ref_y, rtol=LAST_BIT)
    row_size = np.abs(ref_d_x).max(axis=-1, keepdims=True)
    np.testing.assert_array_less(np.abs(d_x - ref_d_x), LAST_BIT * np.abs(ref_d_x) + 1e-5 * row_size + 1e-30)
    assert np.mean(d_x != ref_d_x) < 0.01
    assert distance(d_gain, ref_d_gain) < 1e-5
    return got


@pytest.mark.parametrize("m, k", [
    (24, 256), (9, 512), (5, 1536), (7, 2048), (5, 2176), (3, 4096), (3, 7168),
    *slow((70, 128), (40, 1024), (21, 1280), (11, 2304), (6, 7168), (4, 8192))])
def test_value_and_gradients(m, k):
    """Widths of one warp and of four; rows that fill the last step and rows that do not."""
    assert_equivalent(MANY_BLOCKS, *problem(m, k))


@pytest.mark.parametrize("settings", [ONE_BLOCK, DEEP], ids=["one block", "more blocks and stages than steps"])
@pytest.mark.parametrize("shape", [(24, 1536), (2, 3, 2560)])
def test_any_spread_over_blocks_and_any_rank(settings, shape):
    assert_equivalent(settings, *problem(*shape))


def test_gradients_against_float64():
    """Bounds that no bfloat16 sum would meet: each of 40 rows adds to the gain's gradient."""
    x, gain, d_y = problem(40, 2176)
    d_x, d_gain = interpreted(with_gradients(fast(MANY_BLOCKS)), x, gain, d_y)[1:]
    x, d_y, gain = (np.asarray(a, np.float64) for a in (x, d_y, gain))
    scale = 1 / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPS)
    unit, d_unit = x * scale, d_y * gain
    exact = scale * (d_unit - unit * np.mean(d_unit * unit, axis=1, keepdims=True))
    assert distance(d_x, exact) < LAST_BIT / 2
    assert distance(d_gain, np.sum(d_y * unit, axis=0)) < 1e-6


def test_rounded_once():
    x, gain, _ = problem(4, 4096)
    y = interpreted(lambda x, gain: fast(MANY_BLOCKS)(x, gain, EPS), x, gain)
    exact = oracle.rms_norm(np.asarray(x, np.float64), np.asarray(gain, np.float64), EPS)
    assert np.max(np.abs(np.asarray(y, np.float64) / exact - 1)) <= LAST_BIT / 2 + 1e-6


@pytest.mark.parametrize("k", [512, 2560])
def test_rows_do_not_touch_each_other(k):
    """A NaN spoils its own row, forward and backward, and through it only the gain's gradient."""
    x, gain, d_y = problem(9, k)
    y, d_x, d_gain = interpreted(with_gradients(fast(MANY_BLOCKS)), x.at[4, 3].set(jnp.nan), gain, d_y)
    for rows in (y, d_x):
        np.testing.assert_array_equal(np.isnan(np.asarray(rows, np.float32)).all(axis=1), np.arange(9) == 4)
        assert np.isfinite(np.asarray(rows, np.float32)[np.arange(9) != 4]).all()
    assert np.isnan(d_gain).all()


@pytest.mark.parametrize("k", [256, 2560])
def test_rows_that_fill_a_step_up_add_nothing(k):
    """Also without eps, where a row of zeros would be a NaN; and a result without rows is empty."""
    x, gain, d_y = problem(3, k)
    run = lambda x, gain, d_y: jax.vjp(
        lambda x, gain: rms_norm_hopper(x, gain, 0.0, ONE_BLOCK, ONE_BLOCK), x, gain)[1](d_y)
    d_x, d_gain = interpreted(run, x, gain, d_y)
    assert np.isfinite(np.asarray(d_x, np.float32)).all() and np.isfinite(d_gain).all()
    d_x, d_gain = interpreted(run, x[:0], gain, d_y[:0])
    assert d_x.shape == (0, k) and np.all(np.asarray(d_gain) == 0)


def test_only_the_input_and_the_gain_wait():
    x, gain, _ = problem(8, 512)
    kept = jax.eval_shape(lambda x, gain: jax.vjp(lambda x, gain: rms_norm_hopper(x, gain, EPS), x, gain)[1], x, gain)
    assert sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(kept)) == [
        ((8, 512), "bfloat16"), ((512,), "float32")]


def test_the_gain_keeps_its_dtype():
    x, gain, d_y = problem(8, 512)
    d_gain = interpreted(with_gradients(fast(ONE_BLOCK)), x, gain.astype(jnp.bfloat16), d_y)[2]
    assert d_gain.dtype == jnp.bfloat16


@pytest.mark.parametrize("k", range(128, 8193, 128))
def test_a_row_is_whole_parts_of_whole_vectors(k):
    """Every width that is accepted; nothing of a group is in two threads, or in none."""
    assert refusal(k, jnp.bfloat16) is None
    rows = rows_of(k)
    assert rows.part * rows.warps == k and rows.part % 32 == 0 and rows.part <= 2048
    assert rows.at_once * k == rows.groups * 4 * rows.part <= 8192


@pytest.mark.parametrize("x, message", [
    (jnp.ones((2, 192), jnp.bfloat16), "192 elements: it must be a multiple of 128 up to 8192"),
    (jnp.ones((2, 8320), jnp.bfloat16), "8320 elements"), (jnp.ones((2, 0), jnp.bfloat16), "0 elements"),
    (jnp.ones((2, 256)), "float32: it must be bfloat16")])
def test_refusals(x, message):
    with pytest.raises(UserError, match=message):
        rms_norm_hopper(x, jnp.ones(x.shape[-1]), EPS)
