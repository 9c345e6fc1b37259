"""The chunked head loss against float64 NumPy and the reference, its gradient, and what it never holds in memory."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_models import distance

from dsv3.kernels.cross_entropy import _row_sums, cross_entropy, cross_entropy_reference

T, D, V = 21, 6, 17
CHUNKS = [1, 4, 7, 21, 64]


def problem(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 2, T) * (rng.random(T) < 0.7)
    return (jnp.asarray(rng.standard_normal((T, D)), dtype), jnp.asarray(rng.standard_normal((D, V)), jnp.float32),
            jnp.asarray(rng.integers(0, V, T), jnp.int32), jnp.asarray(weights, jnp.float32))


def in_64(x_TD, w_DV, targets_T, weights_T):
    """Total, nll, argmax, d total / d x and d total / d w."""
    x, w, weights = (np.asarray(a, np.float64) for a in (x_TD, w_DV, weights_T))
    logits, targets = x @ w, np.asarray(targets_T)
    p = oracle.softmax(logits)
    nll = -np.log(p[np.arange(T), targets])
    d_logits = weights[:, None] * (p - np.eye(V)[targets])
    return np.sum(weights * nll), nll, np.argmax(logits, axis=1), d_logits @ w.T, x.T @ d_logits


def gradients(loss, x_TD, w_DV, *rest):
    return jax.grad(lambda x, w: loss(x, w, *rest).total, argnums=(0, 1))(x_TD, w_DV)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_agrees_with_float64(chunk):
    total, nll_T, argmax_T, _, _ = in_64(*problem())
    loss = cross_entropy(*problem(), chunk)
    chex.assert_type(loss, [jnp.float32, jnp.float32, jnp.int32])
    chex.assert_shape(loss, [(), (T,), (T,)])
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    assert distance(loss.nll_T, nll_T) < 1e-6
    np.testing.assert_array_equal(loss.argmax_T, argmax_T)


@pytest.mark.parametrize("chunk", [None, *CHUNKS])
def test_gradients_agree_with_float64(chunk):
    """Of the reference by autodiff (None), and of the chunked form, whose gradient is written by hand."""
    loss = cross_entropy_reference if chunk is None else lambda *arrays: cross_entropy(*arrays, chunk)
    *_, d_x_TD, d_w_DV = in_64(*problem())
    for actual, expected in zip(gradients(loss, *problem()), (d_x_TD, d_w_DV), strict=True):
        assert distance(actual, expected) < 1e-5


def test_the_differentiated_form_returns_the_same_values():
    """`cross_entropy` runs another program under differentiation: its metrics must not change."""
    x, w, *rest = problem()
    plain = cross_entropy(x, w, *rest, 4)
    primal, _ = jax.vjp(lambda x, w: cross_entropy(x, w, *rest, 4), x, w)
    chex.assert_trees_all_close(primal, plain, rtol=1e-6)
    chex.assert_trees_all_equal(primal.argmax_T, plain.argmax_T)


def test_a_cotangent_scales_the_gradient():
    """As a term of a larger loss: MTP's share is lambda / D of the total."""
    x, w, *rest = problem()
    once = gradients(lambda *arrays: cross_entropy(*arrays, 4), x, w, *rest)
    scaled = jax.grad(lambda x, w: 0.3 * cross_entropy(x, w, *rest, 4).total + jnp.sum(x), argnums=(0, 1))(x, w)
    chex.assert_trees_all_close(scaled, (0.3 * once[0] + 1, 0.3 * once[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 64])
def test_only_the_total_has_a_gradient(chunk):
    """Metrics are not differentiated, neither are weights: the same in both forms."""
    x, w, targets, weights = problem()
    for loss in (cross_entropy_reference, lambda *arrays: cross_entropy(*arrays, chunk)):
        d_x, d_w = jax.grad(lambda x, w: jnp.sum(loss(x, w, targets, weights).nll_T), argnums=(0, 1))(x, w)
        assert not np.any(d_x) and not np.any(d_w)
    assert not np.any(jax.grad(lambda weights: cross_entropy(x, w, targets, weights, chunk).total)(weights))


@pytest.mark.parametrize("chunk", [4, 64])
def test_rows_of_weight_zero_contribute_nothing(chunk):
    """Whatever they hold, large logits and other targets included: not a bit changes."""
    x, w, targets, weights = problem()
    dead = np.asarray(weights) == 0
    assert 0 < dead.sum() < T
    other = (jnp.where(dead[:, None], 1e4 * x[::-1], x), w, jnp.where(dead, (targets + 1) % V, targets), weights)
    loss = lambda *arrays: cross_entropy(*arrays, chunk)
    chex.assert_trees_all_equal(loss(*other).total, loss(x, w, targets, weights).total)
    (d_x, d_w), (d_x_other, d_w_other) = gradients(loss, x, w, targets, weights), gradients(loss, *other)
    chex.assert_trees_all_equal(d_w, d_w_other)
    assert not np.any(d_x[dead]) and not np.any(d_x_other[dead])
    chex.assert_trees_all_equal(d_x[~dead], d_x_other[~dead])


def test_all_weights_zero_is_a_loss_of_zero():
    x, w, targets, weights = problem()
    rest = (targets, jnp.zeros_like(weights))
    assert cross_entropy(x, w, *rest, 4).total == 0
    assert not any(np.any(g) for g in gradients(lambda *arrays: cross_entropy(*arrays, 4), x, w, *rest))


def test_no_tokens_are_a_loss_of_zero():
    x_TD, w_DV, targets_T, weights_T = problem()
    nothing = x_TD[:0], w_DV, targets_T[:0], weights_T[:0]
    loss = cross_entropy(*nothing, 8)
    assert loss.total == 0 and loss.nll_T.shape == loss.argmax_T.shape == (0,)
    d_x_TD, d_w_DV = jax.grad(lambda x, w: cross_entropy(x, w, *nothing[2:], 8).total, (0, 1))(*nothing[:2])
    assert d_x_TD.shape == nothing[0].shape and d_w_DV.shape == w_DV.shape and not np.any(d_w_DV)


def test_ties_go_to_the_lowest_index():
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    w = jnp.array([[1.0, 3.0, 3.0, 2.0], [-1.0, -2.0, -1.0, -1.0]])
    for loss in (cross_entropy_reference, lambda *arrays: cross_entropy(*arrays, 2)):
        argmax_T = loss(x, w, jnp.zeros(3, jnp.int32), jnp.ones(3)).argmax_T
        np.testing.assert_array_equal(argmax_T, [1, 0, 0])


def test_a_bad_logit_is_not_lost():
    """A NaN or an infinity anywhere in a row leaves no good loss, and no other row is touched."""
    def losses(logits_TV):
        largest, total, _ = _row_sums(logits_TV)
        return np.asarray(jnp.log(total) - (logits_TV[:, 3] - largest))

    logits = jax.random.normal(jax.random.key(0), (4, 50))
    for column in (0, 3, 49):
        for bad in (jnp.nan, jnp.inf):
            found = losses(logits.at[1, column].set(bad))
            assert not np.isfinite(found[1])
            np.testing.assert_array_equal(np.delete(found, 1), np.delete(losses(logits), 1))


def test_large_logits_stay_finite():
    x, w, targets, weights = problem()
    loss, vjp = jax.vjp(lambda x, w: cross_entropy(x, w, targets, weights, 4).total, 1e4 * x, 1e4 * w)
    chex.assert_tree_all_finite((loss, vjp(jnp.float32(1))))


def test_bfloat16_activations_with_float32_masters():
    """Logits and sums are float32; gradients have the dtype of what they belong to, and the head's is summed in it."""
    x, w, *rest = problem(dtype=jnp.bfloat16)
    rounded = (x, w.astype(jnp.bfloat16), *rest)
    total, nll_T, _, d_x_TD, d_w_DV = in_64(*rounded)
    loss = cross_entropy(x, w, *rest, 4)
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    assert distance(loss.nll_T, nll_T) < 1e-5
    d_x, d_w = gradients(lambda *arrays: cross_entropy(*arrays, 4), x, w, *rest)
    chex.assert_type([d_x, d_w], [jnp.bfloat16, jnp.float32])
    assert distance(d_x, d_x_TD) < 0.01 and distance(d_w, d_w_DV) < 0.01


def largest_arrays(function, *inputs):
    """Elements of the largest array named in the program as written (StableHLO, nothing fused) and as compiled."""
    lowered = jax.jit(function).lower(*inputs)
    as_written = re.findall(r"tensor<((?:\d+x)+)\w+>", lowered.as_text())
    as_compiled = re.findall(r"\w+\[([\d,]+)\]", lowered.compile().as_text())
    assert as_written and as_compiled
    return tuple(
        max(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes) for shapes in (as_written, as_compiled))


@pytest.mark.parametrize("differentiated", [False, True])
def test_no_array_of_tokens_by_vocabulary_exists(differentiated):
    """20 chunks of 8 tokens: what is as large as [T, V] in the reference is as large as [chunk, V] or the head here."""
    tokens, width, vocabulary, chunk = 157, 8, 96, 8
    x_TD, w_DV = jnp.zeros((tokens, width)), jnp.zeros((width, vocabulary))
    inputs = (x_TD, w_DV, jnp.zeros(tokens, jnp.int32), jnp.ones(tokens))

    def program(loss):
        total = lambda *arrays: loss(*arrays).total
        return jax.value_and_grad(total, argnums=(0, 1)) if differentiated else total

    assert min(largest_arrays(program(cross_entropy_reference), *inputs)) == tokens * vocabulary
    allowed = max(tokens + chunk, vocabulary) * width
    assert chunk * vocabulary <= allowed < tokens * vocabulary / 10
    assert max(largest_arrays(program(lambda *arrays: cross_entropy(*arrays, chunk)), *inputs)) <= allowed
