"""A row is all that a new number format needs: three that are not there, in products, while waiting, and measured."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import distance

from dsv3.config import Operand, UserError, quant, resolve
from dsv3.config.quant import change_all
from dsv3.kernels.attention import ATTENTION
from dsv3.kernels.fp8_hopper import hopper_kernels
from dsv3.kernels.fp8_kernels import REFERENCE
from dsv3.kernels.quantized_dot import quantized_dot
from dsv3.quant import formats
from dsv3.quant.formats import Format, format_of
from dsv3.quant.monitor import observe, rates
from dsv3.quant.stochastic import BFLOAT16
from dsv3.quant.tiles import BLOCK, dequantize, quantize

ROWS = {
    "e3m4": Format("e3m4", 3, 4, 15.5, True, np.dtype(ml_dtypes.float8_e3m4)),
    "e4m7": Format("e4m7", 4, 7, 240.0, True, np.dtype(ml_dtypes.bfloat16)),  # in a wider dtype, to study it
    "bf16": Format("bf16", 8, 7, 1.0, True, np.dtype(ml_dtypes.bfloat16)),  # scaled to 1
}
M, K = 40, 128
"""One tile along the inner dimension, and one block of weights."""


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS | ROWS)
    monkeypatch.setattr(quant, "FORMATS", (*quant.FORMATS, *ROWS))


def seen(x, name, axis):
    """`x` in tiles along `axis` (None: one for all), rounded in float64."""
    fmt = ROWS[name]
    scale = np.abs(x).max(axis=axis, keepdims=True) * np.float32(1 / fmt.largest)
    scaled = x * (np.float32(1) / scale)
    exponent = np.maximum(np.frexp(scaled)[1] - 1, fmt.smallest_exponent)
    unit = 2.0 ** (exponent - fmt.mantissa_bits)
    rounded = np.round(scaled.astype(np.float64) / unit) * unit
    return np.clip(rounded, -fmt.largest, fmt.largest) * scale.astype(np.float64)


def problem():
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, K), (M, K)))


@pytest.mark.parametrize("name", ROWS)
def test_the_three_products_in_a_new_format(name):
    x, w, d_y = problem()
    rule = change_all(resolve("fp8"), format=name).default
    y, vjp = jax.vjp(lambda x, w: quantized_dot(x, w, rule), x, w)
    s = lambda x, axis: seen(x, name, axis)
    d_w = s(s(x, 1).astype(np.float32), 0).T @ s(d_y, 0)
    for got, wanted in zip((y, *vjp(jnp.asarray(d_y))), (s(x, 1) @ s(w, None), s(d_y, 1) @ s(w, None).T, d_w),
                           strict=True):
        assert distance(got, wanted) < 1e-6


@pytest.mark.parametrize("name, error", [("e3m4", 0.0136), ("e4m7", 0.0016), ("bf16", 0.0016)])
def test_a_new_format_is_measured(name, error):
    """Twice as near for every bit of mantissa: E4M3 is 2.5% off."""
    found = rates(observe(jnp.asarray(problem()[0]), Operand(format=name, tile="inner", power_of_two=False)))
    np.testing.assert_allclose(found["error"], error, rtol=0.1)


def test_what_waits_in_bfloat16_has_lost_nothing():
    """With scales that are powers of two: the weight gradient is that of the input itself, for two bytes an element."""
    x, w, d_y = (jnp.asarray(array, jnp.bfloat16) for array in problem())
    kept = Operand(format="bf16", tile="inner", power_of_two=True)
    gradients, held = [], []
    for rule in (replace(resolve("fp8").default, kept=kept), resolve("fp8_direct").default):
        _, vjp = jax.vjp(lambda x, w, rule=rule: quantized_dot(x, w, rule), x, w.astype(jnp.float32))
        gradients.append(vjp(d_y)[1])
        held.append(sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)))
    np.testing.assert_array_equal(*gradients)
    rows = 128  # M in whole tiles
    assert held[0] - held[1] == rows * K
    assert format_of("bf16").bytes_of(3) == 6


def test_a_format_whose_scales_would_vanish_is_refused():
    with pytest.raises(UserError, match="'bfloat16' reaches 3.39e.38, .* give it a `largest` of 2.126 at most"):
        quantize(jnp.ones((128, 128)), BFLOAT16, BLOCK, power_of_two=False)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_small_numbers_in_a_wide_format(power_of_two):
    """Scales of normal float32 numbers, where amax / largest is none."""
    fmt = Format("e7m23", 7, 23, 2.0 ** 62, False, np.dtype(np.float32))
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (128, 128)) * 2.0 ** -90, jnp.float32)
    quantized = quantize(x, fmt, BLOCK, power_of_two=power_of_two)
    assert quantized.scales == 2.0 ** -126
    np.testing.assert_array_equal(dequantize(quantized, fmt, BLOCK, 128), x)


def test_no_kernel_takes_a_new_format_for_one_that_it_knows():
    """On Hopper the reference rounds and multiplies, and says why."""
    operand, reasons = replace(resolve("fp8").default.fprop_x, format="e3m4"), []
    kernels = hopper_kernels("NVIDIA H100 80GB HBM3", ATTENTION, reasons.append)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((128, 128)), jnp.bfloat16)
    found, wanted = kernels.quantize_rows(x, operand), REFERENCE.quantize_rows(x, operand)
    np.testing.assert_array_equal(np.asarray(found.values, np.float32), np.asarray(wanted.values, np.float32))
    assert reasons == ["the format e3m4: no kernel rounds to it"]
    blocks, _ = kernels.quantize_weights(x.astype(jnp.float32), replace(operand, tile="block"))
    rule = resolve("fp8").default
    kernels.products(rule.interval, rule.accumulator).dot(found, blocks, (128, 128), jnp.float32)
    packed = REFERENCE.quantize_and_pack(x, rule.fprop_x, operand)[1]
    kernels.unpack_both(packed, operand, rule.wgrad_x, jnp.bfloat16)
    assert reasons.pop() == reasons[0]
    assert reasons[1] == reasons[0] and reasons[2] == "operands in float8_e3m4: they must be E4M3 or E5M2"
