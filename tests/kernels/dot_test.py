"""Products with float32 masters: the forward in the activation's dtype, weight gradients in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.kernels.dot import dot, dot_float32
from dsv3.kernels.grouped_dot import grouped_dot, grouped_dot_loop

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def test_float32_values_and_gradients_are_those_of_a_plain_product():
    x, w, d_y = normal(2, 5, 6), normal(6, 4), normal(2, 5, 4)
    y, vjp = jax.vjp(dot, x, w)
    expected, plain = jax.vjp(lambda x, w: x @ w, x, w)
    assert distance(y, expected) < 1e-6
    for actual, wanted in zip(vjp(d_y), plain(d_y), strict=True):
        assert distance(actual, wanted) < 1e-6


def test_the_forward_runs_in_the_dtype_of_the_activation():
    x, w = normal(3, 8, dtype=jnp.bfloat16), normal(8, 2)
    assert dot(x, w).dtype == jnp.bfloat16
    np.testing.assert_array_equal(dot(x, w), x @ w.astype(jnp.bfloat16))


@pytest.mark.parametrize("n_rows", [64, 4096])
def test_a_bfloat16_weight_gradient_is_exact_to_float32(n_rows):
    """Also over many tokens: nothing is rounded to bfloat16 on the way."""
    x, w, d_y = normal(n_rows, 8, dtype=jnp.bfloat16), normal(8, 4), normal(n_rows, 4, dtype=jnp.bfloat16)
    d_w = jax.vjp(dot, x, w)[1](d_y)[1]
    assert d_w.dtype == jnp.float32
    assert distance(d_w, np.asarray(x, np.float64).T @ np.asarray(d_y, np.float64)) < 1e-6


@pytest.mark.parametrize("n_blocks", [1, 64, 256])
def test_an_expert_of_many_bfloat16_blocks_loses_nothing(n_blocks):
    """Summing blocks in bfloat16 was 1.4% off at 256 blocks; the float32 sum does not depend on their number."""
    block = 4
    rows = normal(n_blocks * block, 8, dtype=jnp.bfloat16)
    d_out = normal(n_blocks * block, 6, dtype=jnp.bfloat16)
    sizes, w = jnp.array([0, n_blocks * block, 0]), normal(3, 8, 6)
    d_rows, _, d_w = jax.vjp(lambda r, s, w: grouped_dot(r, s, w, block), rows, sizes, w)[1](d_out)
    assert d_w.dtype == jnp.float32 and d_rows.dtype == jnp.bfloat16
    assert distance(d_w[1], np.asarray(rows, np.float64).T @ np.asarray(d_out, np.float64)) < 1e-6
    loop = grouped_dot_loop(rows.astype(jnp.float32), sizes, w, block)
    assert distance(grouped_dot(rows, sizes, w, block), loop) < 0.01


@pytest.mark.parametrize("dtype, by_rows", [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
def test_the_routers_product_is_float32_for_any_activation(dtype, by_rows):
    """A plain bfloat16 product would be 2e-3 off; only the gradient by rows is rounded, to the rows' own dtype."""
    rng = np.random.default_rng(0)
    x_TD, w_DE, d_TE = (rng.standard_normal(shape) for shape in ((50, 96), (96, 24), (50, 24)))
    x_TD = np.asarray(jnp.asarray(x_TD, dtype), np.float64)
    y_TE, vjp = jax.vjp(jax.jit(dot_float32), jnp.asarray(x_TD, dtype), jnp.asarray(w_DE, jnp.float32))
    d_x_TD, d_w_DE = vjp(jnp.asarray(d_TE, jnp.float32))
    assert y_TE.dtype == d_w_DE.dtype == jnp.float32 and d_x_TD.dtype == dtype
    assert distance(y_TE, x_TD @ w_DE) < 1e-6
    assert distance(d_w_DE, x_TD.T @ d_TE) < 1e-6
    assert distance(d_x_TD, d_TE @ w_DE.T) < by_rows
