"""The model of Hopper's accumulator against what an H100 computed, and promotion against exact sums."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3.config import UserError
from dsv3.quant.accumulate import promoted_dot, tensor_core_dot
from dsv3.quant.formats import E4M3
from dsv3.quant.tiles import ALONG_ROWS, BLOCK, quantize

RECORDED = np.load(Path(__file__).parents[1] / "goldens" / "wgmma_e4m3.npz")  # made by record_wgmma.py beside it
FAMILIES = sorted({name.split(".")[0] for name in RECORDED.files})

dot = jax.jit(tensor_core_dot)
promoted = jax.jit(promoted_dot, static_argnums=4, static_argnames="tensor_core")


def values(codes):
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_bit_equal_to_an_h100(family):
    """Random, of wide range, cancelling within a step and later, subnormal, up to 4096 products deep, with a NaN."""
    a, b = values(RECORDED[f"{family}.a"]), values(RECORDED[f"{family}.b"])
    recorded, ours = RECORDED[f"{family}.out"], np.asarray(dot(a, b))
    nan = np.isnan(recorded.view(np.float32))
    assert nan.any() == (family == "nan")
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], recorded[~nan])


def test_the_recorded_sums_are_not_the_exact_ones():
    """The model would be of no use, and the test above empty, if the hardware added exactly."""
    wrong = {}
    for family in FAMILIES:
        a, b = (values(RECORDED[f"{family}.{name}"]).astype(np.float64) for name in "ab")
        wrong[family] = (RECORDED[f"{family}.out"].view(np.float32) != a @ b.T).mean()
    assert wrong["normal128"] > 0.8 and wrong["uniform4096"] == 1 and wrong["two"] > 0.01


@pytest.mark.parametrize("k, interval, error", [(4096, 4096, 0.05), (4096, 128, 0.003), (4096, 32, 0.003)])
def test_promotion_takes_the_error_of_uniform_sums_away(k, interval, error):
    """Uniform positive numbers, worst relative error; the report: 2% at K = 4096, promotion every 128 elements."""
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0, 448, (m, k)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) for m in (8, 16))
    one = jnp.ones((1, 1))
    ours = np.asarray(promoted(a, b, one, one, interval, tensor_core=True), np.float64)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    worst = np.abs(ours / exact - 1).max()
    assert worst < error if interval < k else worst > error


def test_scaled_sums_are_those_of_the_dequantized_arrays():
    """Activations in 1x128 tiles, weights in 128x128 blocks, a scale of both for every partial sum."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((24, 512)) * 2.0 ** rng.integers(-9, 9, (24, 1))).astype(np.float32)
    w = rng.standard_normal((256, 512)).astype(np.float32)
    qx = quantize(x, E4M3, ALONG_ROWS, power_of_two=False)
    qw = quantize(w, E4M3, BLOCK, power_of_two=False)
    w_scales = jnp.repeat(qw.scales, 128, axis=0)
    exact = (np.asarray(qx.values, np.float64) * np.repeat(qx.scales, 128, 1)) @ (
        np.asarray(qw.values, np.float64) * np.repeat(np.asarray(w_scales), 128, 1)).T
    for tensor_core, bound in ((False, 1e-6), (True, 1e-3)):
        ours = promoted(qx.values, qw.values, qx.scales, w_scales, 128, tensor_core=tensor_core)
        assert np.linalg.norm(ours - exact) < bound * np.linalg.norm(exact)


def test_an_interval_over_which_a_scale_changes_is_refused():
    a, scales, one = jnp.ones((4, 512)), jnp.ones((4, 4)), jnp.ones((1, 1))
    with pytest.raises(UserError, match="every 256 elements, but scales change every 128"):
        promoted_dot(a, a, scales, scales, 256, tensor_core=False)
    promoted_dot(a, a, one, one, 256, tensor_core=False)
    with pytest.raises(UserError, match="does not divide k = 512"):
        promoted_dot(a, a, one, one, 96, tensor_core=False)
    with pytest.raises(UserError, match="40 is not a multiple"):
        tensor_core_dot(jnp.ones((2, 40)), jnp.ones((2, 40)))
