"""Attention against float64 NumPy; causality and segments by gradient; whole projections; the absorbed form."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_models import distance

from dsv3.kernels.attention import ATTENTION, Heads, attend, causal_attention, latent_attention, rotary_attention
from dsv3.kernels.rotate import rotate

B, T, H, N, R, U, C = 2, 7, 3, 6, 4, 5, 10
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 3], [1, 2, 2, 2, 2, 0, 0]], np.int32)
SHAPES = dict(q_nope=(B, T, H, N), q_rope=(B, T, H, R), k_nope=(B, T, H, N), k_rope=(B, T, R), v=(B, T, H, U))


def draw(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in (shapes or SHAPES).values()]


def to_jax(arrays, dtype=jnp.float32):
    return [jnp.asarray(a, dtype) for a in arrays]


def in_64(q_nope, q_rope, k_nope, k_rope, v, *, scale, segment_ids_BT):
    """Equation 10, one position and one head at a time, over the list of positions that it may see."""
    out = np.zeros((B, T, H, U))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if segment_ids_BT is None or segment_ids_BT[b, s] == segment_ids_BT[b, t]]
        scores = [scale * (q_nope[b, t, h] @ k_nope[b, s, h] + q_rope[b, t, h] @ k_rope[b, s]) for s in seen]
        out[b, t, h] = oracle.softmax(np.array(scores)) @ v[b, seen, h]
    return out


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "segments"])
@pytest.mark.parametrize("scale", [0.3, 1.7])
def test_agrees_with_float64(segments, scale):
    arrays = draw()
    actual = causal_attention(*to_jax(arrays), scale=scale, segment_ids_BT=segments)
    assert distance(actual, in_64(*arrays, scale=scale, segment_ids_BT=segments)) < 1e-6


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "segments"])
def test_gradients_agree_with_central_differences_in_float64(segments):
    """Along one random direction for all five inputs together."""
    arrays, directions = draw(), draw(seed=1)
    cotangent = np.random.default_rng(2).standard_normal((B, T, H, U))
    step = 1e-5
    ends = [np.sum(cotangent * in_64(
        *(a + sign * step * d for a, d in zip(arrays, directions)), scale=0.5, segment_ids_BT=segments))
        for sign in (1, -1)]
    attention = partial(causal_attention, scale=0.5, segment_ids_BT=segments)
    gradients = jax.vjp(attention, *to_jax(arrays))[1](jnp.asarray(cotangent, jnp.float32))
    along = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


def dependence(segments):
    """For each key-side input: the largest |d o[t] / d input[s]| over heads and coordinates, [B, T, T]."""
    arrays = to_jax(draw())
    attention = partial(causal_attention, scale=0.5, segment_ids_BT=segments)
    for index in (2, 3, 4):
        jacobian = jax.jacrev(lambda x: attention(*arrays[:index], x, *arrays[index + 1:]))(arrays[index])
        jacobian = jnp.abs(jacobian.reshape(B, T, H * U, B, T, -1)).max(axis=(2, 5))
        yield np.stack([np.asarray(jacobian)[b, :, b] for b in range(B)])


def test_the_jacobian_above_the_diagonal_is_exactly_zero():
    future = np.triu(np.ones((T, T), bool), 1)
    for jacobian in dependence(None):
        assert np.all(jacobian[:, future] == 0)
    assert np.all(jacobian[:, ~future] > 0)  # of the values: every softmax weight is positive


def test_segments_do_not_see_one_another():
    seen = np.tril(np.ones((T, T), bool))[None] & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])
    for jacobian in dependence(SEGMENTS):
        assert np.all(jacobian[~seen] == 0)
    assert np.all(jacobian[seen] > 0)


def test_the_first_position_returns_its_own_value():
    arrays = to_jax(draw())
    out = causal_attention(*arrays, scale=0.5, segment_ids_BT=None)
    chex.assert_trees_all_equal(out[:, 0], arrays[4][:, 0])


def test_scale_multiplies_the_scores():
    """Scaling the queries is the same; scale 0 is the mean over the past."""
    q_nope, q_rope, *rest = to_jax(draw())
    plain = causal_attention(0.25 * q_nope, 0.25 * q_rope, *rest, scale=1.0, segment_ids_BT=None)
    scaled = causal_attention(q_nope, q_rope, *rest, scale=0.25, segment_ids_BT=None)
    assert distance(scaled, plain) < 1e-6
    mean = np.cumsum(rest[2], axis=1) / np.arange(1, T + 1)[None, :, None, None]
    assert distance(causal_attention(q_nope, q_rope, *rest, scale=0.0, segment_ids_BT=None), mean) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    """Scores of about 1e9: the softmax is a choice of one position, its gradient finite; none beats the mask."""
    q_nope, q_rope, k_nope, k_rope, v = to_jax(draw(), dtype)
    inputs = (1e4 * q_nope, 1e4 * q_rope, 1e5 * k_nope, 1e5 * k_rope, v)
    attention = partial(causal_attention, scale=1.0, segment_ids_BT=SEGMENTS)
    out, vjp = jax.vjp(attention, *inputs)
    chex.assert_type(out, dtype)
    chex.assert_tree_all_finite((out, vjp(jnp.ones_like(out))))
    assert np.max(np.abs(np.asarray(out, np.float32))) <= np.max(np.abs(np.asarray(v, np.float32)))
    chex.assert_trees_all_equal(out[:, 0], v[:, 0])


def test_bfloat16_scores_and_softmax_are_float32():
    """Against float64 of the same rounded inputs, the error is that of one bfloat16 rounding of p and of the output."""
    arrays = to_jax(draw(), jnp.bfloat16)
    actual = causal_attention(*arrays, scale=4.0, segment_ids_BT=None)
    exact = in_64(*(np.asarray(a, np.float64) for a in arrays), scale=4.0, segment_ids_BT=None)
    assert distance(actual, exact) < 2**-8


def whole(seed=0):
    """q, kv and k_rope as projections leave them, angles, a cotangent."""
    return draw(
        seed, q=(B, T, H, N + R), kv=(B, T, H, N + U), k_rope=(B, T, R), angles=(B, T, R // 2), d_o=(B, T, H, U))


def turned_in_64(x, angles):
    """Pairs (x[2j], x[2j+1]) of x [B, T, ..., R] as complex numbers, times e^(i angle)."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles).reshape(B, T, *[1] * (x.ndim - 3), R // 2)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def whole_in_64(q, kv, k_rope, angles, **settings):
    return in_64(q[..., :N], turned_in_64(q[..., N:], angles), kv[..., :N], turned_in_64(k_rope, angles), kv[..., N:],
                 **settings)


def tables(angles):
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


def composed(q, kv, k_rope, rotation, **settings):
    """What `attend` must be: split, rotate, attend."""
    q_rope, k_rope = rotate(q[..., N:], rotation), rotate(k_rope, rotation)
    return causal_attention(q[..., :N], q_rope, kv[..., :N], k_rope, kv[..., N:], **settings)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "segments"])
def test_whole_projections_agree_with_float64(segments):
    """Values, and the gradient along one random direction by central differences."""
    *arrays, angles, d_o = whole()
    *directions, _, _ = whole(seed=1)
    run = lambda *a: attend(ATTENTION, Heads(*a), tables(angles), 0.5, segments)
    o, vjp = jax.vjp(run, *to_jax(arrays))
    expected = lambda step: whole_in_64(
        *(a + step * d for a, d in zip(arrays, directions, strict=True)), angles, scale=0.5, segment_ids_BT=segments)
    assert distance(o, expected(0)) < 1e-6
    along = sum(np.sum(np.asarray(g, np.float64) * d)
                for g, d in zip(vjp(jnp.asarray(d_o, jnp.float32)), directions, strict=True))
    np.testing.assert_allclose(along, np.sum(d_o * (expected(1e-5) - expected(-1e-5))) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "segments"])
def test_the_gradients_of_attend_are_those_of_the_plain_composition(segments, dtype):
    *arrays, angles, d_o = whole()
    heads, rotation, d_o = to_jax(arrays, dtype), tables(angles), jnp.asarray(d_o, dtype)
    o, vjp = jax.vjp(lambda rotation, *a: attend(ATTENTION, Heads(*a), rotation, 0.5, segments), rotation, *heads)
    expected, plain_vjp = jax.vjp(lambda *a: composed(*a, rotation, scale=0.5, segment_ids_BT=segments), *heads)
    chex.assert_trees_all_equal(o, expected)
    d_rotation, *gradients = vjp(d_o)
    for got, wanted, given in zip(gradients, plain_vjp(d_o), heads, strict=True):
        assert got.dtype == given.dtype and got.shape == given.shape and np.any(got)
        assert distance(got, wanted) < 1e-6
    assert not np.any(d_rotation)  # positions are no parameters: nothing is computed for them


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch, length", [(0, T), (B, 0), (0, 0)])
@pytest.mark.parametrize("with_segments", [False, True])
def test_no_tokens_give_empty_outputs_and_gradients(batch, length, with_segments, dtype):
    """Each of the heads' own shape and dtype, of `attend` and of the plain reference; there is nothing to compute."""
    ids_BT = jnp.zeros((batch, length), jnp.int32) if with_segments else None
    heads = Heads(jnp.zeros((batch, length, H, N + R), dtype), jnp.zeros((batch, length, H, N + U), dtype),
                  jnp.zeros((batch, length, R), dtype))
    rotation = jnp.zeros((2, batch, length, R // 2))
    for attention in (partial(attend, ATTENTION), rotary_attention):
        def both_ways(heads, attention=attention):
            o, vjp = jax.vjp(lambda heads: attention(heads, rotation, 0.5, ids_BT), heads)
            return o, *vjp(o)

        o, gradients = jax.eval_shape(both_ways, heads)
        assert o.shape == (batch, length, H, U) and o.dtype == dtype
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, heads)


def test_widths_follow_from_three_arrays():
    """N = X - R and U = Y - N, of heads and of their gradients alike; also where nothing is rotated."""
    for n, r, u in ((6, 4, 5), (128, 64, 128), (8, 0, 3)):
        heads = Heads(jnp.zeros((1, 2, 3, n + r)), jnp.zeros((1, 2, 3, n + u)), jnp.zeros((1, 2, r)))
        assert (heads.n_nope, heads.n_value) == (n, u)
        assert rotary_attention(heads, jnp.zeros((2, 1, 2, r // 2)), 1.0, None).shape == (1, 2, 3, u)


def absorbed_inputs():
    w_uk, w_uv, q_nope, q_rope, c_kv, k_rope = draw(
        w_uk=(C, H, N), w_uv=(C, H, U), q_nope=(B, T, H, N), q_rope=(B, T, H, R), c_kv=(B, T, C), k_rope=(B, T, R))
    k_nope, v = np.einsum("bsc,chn->bshn", c_kv, w_uk), np.einsum("bsc,chu->bshu", c_kv, w_uv)
    q_latent = np.einsum("bthn,chn->bthc", q_nope, w_uk)
    return (q_nope, q_rope, k_nope, k_rope, v), (q_latent, q_rope, c_kv, k_rope), w_uv


def test_latent_attention_equals_causal_attention_with_absorbed_weights():
    """q . (W_UK c) = (W_UK^T q) . c, and W_UV moves behind the sum: no key or value per head is needed."""
    plain, latent, w_uv = absorbed_inputs()
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    context = latent_attention(*to_jax(latent), scale=0.2, visible_BTS=jnp.asarray(visible))
    chex.assert_shape(context, (B, T, H, C))
    out = jnp.einsum("bthc,chu->bthu", context, jnp.asarray(w_uv, jnp.float32))
    expected = causal_attention(*to_jax(plain), scale=0.2, segment_ids_BT=None)
    assert distance(out, expected) < 1e-5
    assert distance(expected, in_64(*plain, scale=0.2, segment_ids_BT=None)) < 1e-6


def test_latent_attention_never_reads_invisible_slots():
    """A cache is longer than what is written: huge values in slots that nobody sees change not a bit."""
    _, latent, _ = absorbed_inputs()
    q_latent, q_rope, c_kv, k_rope = to_jax(latent)
    visible = jnp.arange(T)[None, None] <= jnp.array([[2, 3], [4, 0]])[:, :, None]
    run = lambda c_kv, k_rope: latent_attention(
        q_latent[:, :2], q_rope[:, :2], c_kv, k_rope, scale=0.2, visible_BTS=visible)
    poisoned = run(c_kv.at[0, 4:].set(1e9).at[1, 5:].set(-1e9), k_rope.at[0, 4:].set(-1e9).at[1, 5:].set(1e9))
    chex.assert_trees_all_equal(poisoned, run(c_kv, k_rope))
    broadcast = jnp.broadcast_to(c_kv[1, 0], (H, C))
    assert distance(run(c_kv, k_rope)[1, 1], broadcast) < 1e-6
