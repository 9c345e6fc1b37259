"""Rotation and the way back: pairs by hand, transposes and inverses of any table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import distance

from dsv3.kernels.rotate import rotate, rotate_back


def drawn(seed, shape, spread, amplitude=1.0, dtype=jnp.float32):
    """x, y [B, T, ..., R] and a rotation by angles of about `spread` radians, in float32."""
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    angles = spread * rng.standard_normal((*shape[:2], shape[-1] // 2))
    return x, y, jnp.asarray(amplitude * np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


SHAPES = st.sampled_from([(1, 1, 2), (2, 3, 8), (2, 3, 4, 6), (1, 2, 3, 2, 4)])
SPREADS = st.sampled_from([0.0, 0.1, 3.0, 1e4])


def test_pairs_are_interleaved():
    """Rotating a vector whose only entry is 2j fills 2j+1 and nothing else; a half-split layout would fill j + R/2."""
    angles = 0.1 * np.arange(1, 33)
    rotation = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)])[:, None, None], jnp.float32)
    x = jnp.zeros((1, 1, 64)).at[0, 0, 6].set(1.0)
    expected = np.zeros(64)
    expected[6], expected[7] = np.cos(0.4), np.sin(0.4)
    np.testing.assert_allclose(np.asarray(rotate(x, rotation))[0, 0], expected, atol=1e-6)
    expected[7] *= -1
    np.testing.assert_allclose(np.asarray(rotate_back(x, rotation))[0, 0], expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), SHAPES, SPREADS, st.sampled_from([1.0, 0.7]))
def test_there_and_back_is_where_it_began(seed, shape, spread, amplitude):
    """Either way round, and times the square of the tables' amplitude."""
    x, _, rotation = drawn(seed, shape, spread, amplitude)
    for back in (rotate_back(rotate(x, rotation), rotation), rotate(rotate_back(x, rotation), rotation)):
        assert distance(back, amplitude ** 2 * x) < 1e-6
    np.testing.assert_allclose(jnp.linalg.norm(rotate(x, rotation)), amplitude * jnp.linalg.norm(x), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), SHAPES, SPREADS, st.sampled_from([1.0, 0.7]))
def test_back_is_the_transpose(seed, shape, spread, amplitude):
    """rotate(x) . y = x . rotate_back(y)."""
    x, y, rotation = drawn(seed, shape, spread, amplitude)
    in_64 = lambda array: np.asarray(array, np.float64)
    there, back = in_64(rotate(x, rotation)) * in_64(y), in_64(x) * in_64(rotate_back(y, rotation))
    assert abs(there.sum() - back.sum()) < 1e-6 * np.abs(there).sum() + 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_back_is_what_differentiation_gives(dtype):
    """With the same roundings: float32 inside, one rounding to the dtype."""
    x, y, rotation = drawn(0, (2, 5, 3, 8), 3.0, 0.7, dtype)
    d_x, = jax.vjp(lambda x: rotate(x, rotation), x)[1](y)
    back = rotate_back(y, rotation)
    assert back.dtype == d_x.dtype == dtype
    assert distance(back, d_x) < 1e-7
