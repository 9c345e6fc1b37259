"""Cross-entropy of the output head, a chunk of tokens at a time: no [tokens, vocabulary] array in memory."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLoss(NamedTuple):
    """`total` = sum of weights * nll, the only part with a gradient; `nll_T` in nats and `argmax_T` are for metrics."""

    total: jax.Array
    nll_T: jax.Array
    argmax_T: jax.Array


def _logits(x_TD: jax.Array, w_DV: jax.Array) -> jax.Array:
    return jnp.dot(x_TD, w_DV.astype(x_TD.dtype), preferred_element_type=jnp.float32)


def _argmax(logits_TV: jax.Array) -> jax.Array:
    """The first index of the largest logit: a plain minimum, which XLA vectorises on a CPU (4 times `jnp.argmax`)."""
    vocabulary = jnp.arange(logits_TV.shape[1], dtype=jnp.int32)[None]
    is_best = logits_TV == jnp.max(logits_TV, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_best, vocabulary, logits_TV.shape[1]), axis=1)


def _token_nll(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits_TV, axis=1) - _chosen(logits_TV, targets_T)


def _chosen(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]


def _row_sums(logits_TV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest logit of every row, the sum of exp(logit - largest), and where the largest is: two reads of all."""
    largest_T1 = jnp.max(logits_TV, axis=1, keepdims=True)
    return largest_T1[:, 0], jnp.sum(jnp.exp(logits_TV - largest_T1), axis=1), _argmax(logits_TV)


def cross_entropy_reference(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> TokenLoss:
    """-log softmax(x @ w)[target] with all logits at once, in float32."""
    logits_TV = _logits(x_TD, w_DV)
    nll_T = _token_nll(logits_TV, targets_T)
    return TokenLoss(jnp.sum(weights_T * nll_T), jax.lax.stop_gradient(nll_T), _argmax(logits_TV))


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Split axis 0 into chunks (no longer than it is); the last is filled with zeros, which have weight 0."""
    chunk = max(1, min(chunk, arrays[0].shape[0]))
    n_chunks = -(-arrays[0].shape[0] // chunk)
    missing = n_chunks * chunk - arrays[0].shape[0]
    return tuple(
        jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)).reshape(n_chunks, chunk, *a.shape[1:]) for a in arrays)


def _unchunk(array: jax.Array, length: int) -> jax.Array:
    return array.reshape(-1, *array.shape[2:])[:length]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array, chunk: int,
) -> TokenLoss:
    """`cross_entropy_reference` with at most `chunk` rows of logits alive.

    Under differentiation the gradient is formed in the forward pass, while a chunk's logits exist: three products
    with the vocabulary instead of the four that recomputing them takes. This needs `weights_T` up front, which is
    why it is an argument; `weights_T` itself gets no gradient.
    """
    def body(total, inputs):
        x, targets, weights = inputs
        loss = cross_entropy_reference(x, w_DV, targets, weights)
        return total + loss.total, (loss.nll_T, loss.argmax_T)

    total, (nll, argmax) = jax.lax.scan(body, jnp.float32(0), _chunks(chunk, x_TD, targets_T, weights_T))
    return TokenLoss(total, _unchunk(nll, len(targets_T)), _unchunk(argmax, len(targets_T)))


def _cross_entropy_forward(x_TD, w_DV, targets_T, weights_T, chunk):
    w = w_DV.astype(x_TD.dtype)

    def body(carry, inputs):
        total, d_w_DV = carry
        x, targets, weights = inputs
        logits = _logits(x, w)
        largest, total_exp, argmax = _row_sums(logits)
        nll = jnp.log(total_exp) - (_chosen(logits, targets) - largest)
        softmax = jnp.exp(logits - largest[:, None]) * (weights / total_exp)[:, None]
        chosen = weights[:, None] * jax.nn.one_hot(targets, logits.shape[1], dtype=jnp.float32)
        d_logits = (softmax - chosen).astype(x.dtype)
        d_w_DV += jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weights * nll), d_w_DV), (nll, argmax, jnp.dot(d_logits, w.T))

    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    (total, d_w_DV), (nll, argmax, d_x) = jax.lax.scan(body, start, _chunks(chunk, x_TD, targets_T, weights_T))
    loss = TokenLoss(total, *(_unchunk(a, len(targets_T)) for a in (nll, argmax)))
    return loss, (_unchunk(d_x, len(targets_T)), d_w_DV.astype(w_DV.dtype), targets_T, weights_T)


def _cross_entropy_backward(chunk, residuals, cotangent):
    d_x_TD, d_w_DV, targets_T, weights_T = residuals
    scale = cotangent.total
    return (d_x_TD * scale).astype(d_x_TD.dtype), (d_w_DV * scale).astype(d_w_DV.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
