"""Cross-entropy over V3's vocabulary, forward and backward: python -m experiments.benchmark loss [--peers]

Operations count the three useful products (logits, d_x, d_w); the share is of the bfloat16 peak. `temporary_bytes` in
the JSON file is the memory beside inputs and outputs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3.kernels.cross_entropy import TokenLoss, cross_entropy, cross_entropy_reference
from experiments import benchmark_table, peers_torch
from experiments.benchmark_clock import n_bytes
from experiments.benchmark_table import BF16_FLOPS, Case, Contestant, normal

WIDTH, VOCABULARY = 7168, 129_280
TOKENS, CHUNKS = (4096, 8192, 16_384), (4096, 8192, 2048)
REFERENCE_CHUNK = 1024


def gradients(loss: Callable, x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array) -> tuple[jax.Array, ...]:
    """Every token's loss with the gradients by x and w of their sum, and whether an argmax is out of range.

    The last, so that the argmax has to be found, as in training; where two logits nearly tie, it may well differ.
    """
    def total(x, w):
        found = loss(x, w, targets_T, jnp.ones(targets_T.shape, jnp.float32))
        return found.total, found

    grads, found = jax.grad(total, argnums=(0, 1), has_aux=True)(x_TD, w_DV)
    return found.nll_T, (found.argmax_T >= w_DV.shape[1]).astype(jnp.int32), *grads


def reference(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> TokenLoss:
    """All in float32 by differentiation, `REFERENCE_CHUNK` tokens after the other."""
    chunk = min(REFERENCE_CHUNK, len(x_TD))
    parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in (x_TD.astype(jnp.float32), targets_T, weights_T)]
    one = jax.checkpoint(lambda part: cross_entropy_reference(part[0], w_DV, *part[1:]))
    found = jax.lax.map(one, tuple(parts))
    return TokenLoss(jnp.sum(found.total), found.nll_T.reshape(-1), found.argmax_T.reshape(-1))


def case(n_tokens: int, width: int, vocabulary: int, chunks: Sequence[int]) -> Case:
    """The head is rounded to bfloat16 numbers, so that a rounded product and the reference see the same."""
    def inputs(seed: int) -> tuple[jax.Array, ...]:
        w_DV = (0.02 * normal(2 * seed + 1, width, vocabulary)).astype(jnp.float32)
        return normal(2 * seed, n_tokens, width), w_DV, jax.random.randint(
            jax.random.key(seed), (n_tokens,), 0, vocabulary)

    expected = lambda *arrays: gradients(reference, *arrays)
    ours = {f"chunks of {chunk}": Contestant(
        lambda *arrays, chunk=chunk: gradients(lambda *a: cross_entropy(*a, chunk), *arrays), expected)
        for chunk in chunks if chunk <= n_tokens}
    peer = Contestant(peers_torch.loss_gradients, expected, lambda x, w, targets: (x, w.astype(x.dtype), targets),
                      library="torch")
    arrays = jax.eval_shape(inputs, 0)
    moved = n_bytes((arrays, jax.eval_shape(expected, *arrays)))
    ours["torch, all logits"] = peer
    return Case("forward and backward", f"{n_tokens} x {width} x {vocabulary}", inputs, ours,
                6 * n_tokens * width * vocabulary, moved, BF16_FLOPS)


def cases() -> list[Case]:
    return [case(n_tokens, WIDTH, VOCABULARY, CHUNKS) for n_tokens in TOKENS]


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("loss", cases(), "tflops", overrides)
