"""RMSNorm against float64 NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_models import distance

from dsv3.kernels.norm import rms_norm

RNG = np.random.default_rng(0)
X, GAIN = RNG.standard_normal((2, 5, 24)), 1 + 0.3 * RNG.standard_normal(24)


def in_32(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (1, 2, 5, 24)])
def test_agrees_with_float64_at_any_rank(shape):
    x = np.resize(X, shape)
    assert distance(rms_norm(*in_32(x, GAIN), 1e-6), oracle.rms_norm(x, GAIN, 1e-6)) < 1e-6


def test_gradients_are_those_of_the_plain_formula():
    """d x = scale * (g*gain - x_hat * mean(g * gain * x_hat)), d gain = sum of g * x_hat, with x_hat = x * scale."""
    cotangent, eps = RNG.standard_normal(X.shape), 1e-3
    _, vjp = jax.vjp(lambda x, gain: rms_norm(x, gain, eps), *in_32(X, GAIN))
    d_x, d_gain = vjp(*in_32(cotangent))
    scale = 1 / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + eps)
    x_hat, g = X * scale, cotangent * GAIN
    assert distance(d_x, scale * (g - x_hat * np.mean(g * x_hat, axis=-1, keepdims=True))) < 1e-5
    assert distance(d_gain, np.sum(cotangent * x_hat, axis=(0, 1))) < 1e-5


def test_bfloat16_is_normalised_in_float32_and_rounded_once():
    """Only the last rounding separates it from float64: squares and sums of bfloat16 would be off by percents."""
    x = jnp.asarray(np.resize(X, (3, 2048)), jnp.bfloat16)
    y = rms_norm(x, jnp.ones(2048), 1e-6)
    chex.assert_type(y, jnp.bfloat16)
    exact = oracle.rms_norm(np.asarray(x, np.float64), 1.0, 1e-6)
    assert np.max(np.abs(np.asarray(y, np.float64) / exact - 1)) <= 2**-8 + 1e-6


def test_epsilon_decides_for_small_inputs():
    y = rms_norm(jnp.full((1, 4), 1e-3), jnp.ones(4), 1e-6)
    np.testing.assert_allclose(y, 1 / np.sqrt(2), rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(4), 1e-6)))(jnp.zeros((2, 4)))))
