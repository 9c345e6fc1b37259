"""SwiGLU against float64 NumPy: the gate is the first half."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.kernels.swiglu import swiglu

RNG = np.random.default_rng(0)
GATE_UP = 3 * RNG.standard_normal((2, 5, 16))


def halves(gate_up):
    return gate_up[..., :gate_up.shape[-1] // 2], gate_up[..., gate_up.shape[-1] // 2:]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def in_64(gate_up):
    gate, up = halves(gate_up)
    return gate * sigmoid(gate) * up


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16)])
def test_agrees_with_float64_at_any_rank(shape):
    x = np.resize(GATE_UP, shape)
    y = swiglu(jnp.asarray(x, jnp.float32))
    chex.assert_shape(y, (*shape[:-1], 8))
    assert distance(y, in_64(x)) < 1e-6


def test_the_first_half_is_the_gate():
    """silu(0) is 0 whatever `up` is; a gate of 20 passes `up` through 20 times."""
    np.testing.assert_array_equal(swiglu(jnp.array([0.0, 0.0, 5.0, -7.0])), [0, 0])
    np.testing.assert_allclose(swiglu(jnp.array([20.0, 20.0, 5.0, -7.0])), [100, -140], rtol=1e-6)


def test_gradient_is_that_of_the_formula():
    cotangent = RNG.standard_normal((2, 5, 8))
    _, vjp = jax.vjp(swiglu, jnp.asarray(GATE_UP, jnp.float32))
    d_gate_up, = vjp(jnp.asarray(cotangent, jnp.float32))
    gate, up = halves(GATE_UP)
    s = sigmoid(gate)
    expected = np.concatenate([cotangent * up * s * (1 + gate * (1 - s)), cotangent * gate * s], axis=-1)
    assert distance(d_gate_up, expected) < 1e-6


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x = jnp.asarray(GATE_UP, jnp.bfloat16)
    y = swiglu(x)
    chex.assert_type(y, jnp.bfloat16)
    exact = in_64(np.asarray(x, np.float64))
    assert np.max(np.abs(np.asarray(y, np.float64) / exact - 1)) <= 2**-8 + 1e-6


def test_large_gates_stay_finite():
    x = jnp.array([1e4, -1e4, 1.0, 1.0])
    np.testing.assert_array_equal(swiglu(x), [1e4, 0])
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(swiglu(x)))(x)))
