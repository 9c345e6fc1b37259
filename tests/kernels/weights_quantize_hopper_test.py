"""Quantised weights, interpreted on the CPU, against `dsv3.quant`: equal to the bit, both layouts the same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import interpreted, slow

from dsv3.config import UserError
from dsv3.config.quant import Operand
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.weights_quantize_hopper import quantize_weights
from dsv3.quant.formats import format_of, round_to
from dsv3.quant.tiles import scale_of

SETTINGS = {"one part": Streaming(2, 1, 1, 2), "two parts": Streaming(1, 1, 2, 3)}


def block(fmt, power=False):
    return Operand(format=fmt, tile="block", power_of_two=power)


def reference(w_DF, operand):
    """Codes and scales [D / 128, F / 128]; the maxima come from NumPy, because XLA's lose NaNs on a CPU."""
    fmt = format_of(operand.format)
    w_DF = np.pad(np.asarray(w_DF), [(0, -size % 128) for size in w_DF.shape])
    d, f = w_DF.shape
    amax = np.abs(w_DF.reshape(d // 128, 128, f // 128, 128)).max(axis=(1, 3))
    scales = scale_of(jnp.asarray(amax), fmt, power_of_two=operand.power_of_two)
    spread = jnp.repeat(jnp.repeat(1 / scales, 128, axis=0), 128, axis=1)
    return np.asarray(round_to(w_DF * spread, fmt).astype(fmt.dtype)), np.asarray(scales)


def assert_same(actual, expected):
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), nan)
    as_bits = lambda x: np.where(nan, 0, np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}"))
    np.testing.assert_array_equal(as_bits(actual), as_bits(expected))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("operand", [block("e4m3"), *slow(block("e4m3", True), block("e5m2"))])
@pytest.mark.parametrize("shape", [(200, 384), (2, 128, 256)])
def test_both_layouts_equal_the_reference(settings, operand, shape):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 10, shape)).astype(np.float32)
    w[..., :128, :128] = 0
    w[..., 3, 130], w[..., 5, 140] = (np.inf, 0) if len(shape) == 2 else (0, np.nan)
    forward, gradient = interpreted(lambda w: quantize_weights(w, operand, settings), w)
    stack = w.reshape(-1, *shape[-2:])
    for index, matrix in enumerate(stack):
        values, scales = reference(matrix, operand)
        flat = lambda x: np.asarray(x).reshape(len(stack), *x.shape[-2:])[index]
        assert_same(flat(gradient.values), values)
        assert_same(flat(gradient.scales), scales)
        assert_same(flat(forward.values), values.T)
        assert_same(flat(forward.scales), scales.T)


def test_formats_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="weights in e5m6"):
        quantize_weights(jnp.ones((128, 128)), block("e5m6"))
