"""Causal attention with keys of 192 and values of 128: python -m experiments.benchmark attention [--peers]

Forward, and forward with backward. Operations count the causal half of the square: two products forward and, of the
backward pass's five, the four that are no recomputation. Our kernels get whole heads, as projections leave them; cuDNN
gets the parts that it needs joined, and joins them itself.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3.kernels import attention_backward_hopper, attention_hopper
from dsv3.kernels.attention import causal_attention
from dsv3.kernels.attention_cudnn import causal_attention_cudnn
from experiments import benchmark_table, peers_torch
from experiments.benchmark_table import BF16_FLOPS, Case, Contestant, normal

SHAPES = {"V3, 1 x 4096, 128 heads": (1, 4096, 128), "V3, 4 x 4096, 128 heads": (4, 4096, 128),
          "1 x 8192, 128 heads": (1, 8192, 128), "small_moe, 16 x 2048, 8 heads": (16, 2048, 8)}
"""(rows, tokens, heads)."""
NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
HEADS_AT_ONCE = 4
FORMS: dict[str, Callable] = {"cuDNN from JAX": causal_attention_cudnn}
"""The fastest first."""


def inputs_of(seed: int, rows: int, tokens: int, heads: int, segments: bool) -> tuple[jax.Array, ...]:
    """q_nope, q_rope, k_nope, k_rope, v, d_out, segment ids (zeros where there is one document a row)."""
    head = lambda offset, width: normal(10 * seed + offset, rows, tokens, heads, width)
    starts_BT = jax.random.bernoulli(jax.random.key(seed), 8 / tokens, (rows, tokens)) & segments
    return (head(0, NOPE), head(1, ROPE), head(2, NOPE), normal(10 * seed + 3, rows, tokens, ROPE), head(4, VALUE),
            head(5, VALUE), jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) + 1)


def few_heads_at_once(*arrays: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The reference in float32, `HEADS_AT_ONCE` heads after the other, so that the scores fit."""
    q_nope, q_rope, k_nope, k_rope, v = (a.astype(jnp.float32) for a in arrays)
    rows, tokens, heads = v.shape[:3]
    some = min(HEADS_AT_ONCE, heads)
    split = lambda x: jnp.moveaxis(x.reshape(rows, tokens, heads // some, some, x.shape[3]), 2, 0)

    @jax.checkpoint
    def one(parts):
        a, b, c, d = parts
        return causal_attention(a, b, c, k_rope, d, scale=SCALE, segment_ids_BT=segment_ids_BT)

    out = jax.lax.map(one, tuple(map(split, (q_nope, q_rope, k_nope, v))))
    return jnp.moveaxis(out, 0, 2).reshape(v.shape)


def value_and_gradients(attend: Callable, inputs: Sequence[jax.Array], d_out: jax.Array):
    out, vjp = jax.vjp(attend, *inputs)
    return out, *vjp(d_out.astype(out.dtype))


def contestant(function: Callable, backward: bool, segments: bool) -> Contestant:
    """Of a form with `causal_attention`'s signature: its output, or that and all gradients."""
    def of(attend, *arrays):
        *inputs, d_out, ids_BT = arrays
        masked = lambda *a: attend(*a, segment_ids_BT=ids_BT if segments else None)
        return value_and_gradients(masked, inputs, d_out) if backward else masked(*inputs)

    fast = lambda *a, segment_ids_BT: function(*a, scale=SCALE, segment_ids_BT=segment_ids_BT)
    return Contestant(lambda *a: of(fast, *a), lambda *a: of(few_heads_at_once, *a))


def joined(q_nope, q_rope, k_nope, k_rope, v, d_out, ids_BT) -> tuple[jax.Array, ...]:
    """q, k, v and d_out with whole heads, as torch wants them."""
    del ids_BT
    shared = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    return jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, shared], -1), v, d_out


def whole(q_nope, q_rope, k_nope, k_rope, v, d_out, ids_BT) -> tuple[jax.Array, ...]:
    """q, its turned part (here equal to the part in q, which nobody may read), kv, k_rope, d_out, ids."""
    return (jnp.concatenate([q_nope, q_rope], -1), q_rope, jnp.concatenate([k_nope, v], -1), k_rope, d_out, ids_BT)


def whole_forward(q, q_rope, kv, k_rope, ids_BT, how: attention_hopper.Settings) -> tuple[jax.Array, jax.Array]:
    return attention_hopper.forward(q, q_rope, kv, k_rope, SCALE, ids_BT, how)


def whole_backward(
    q, q_rope, kv, k_rope, d_out, ids_BT, o, normaliser, how: attention_backward_hopper.Settings,
) -> tuple[jax.Array, ...]:
    return attention_backward_hopper.backward(q, q_rope, kv, k_rope, SCALE, ids_BT, o, normaliser, d_out, how)


def whole_expected(q, q_rope, kv, k_rope, d_out, ids_BT) -> tuple[jax.Array, ...]:
    """o, d_q with the turned part's gradient in its place, d_kv, d_k_rope."""
    attend = lambda *parts: few_heads_at_once(*parts, segment_ids_BT=ids_BT)
    parts = q[..., :NOPE], q_rope, kv[..., :NOPE], k_rope, kv[..., NOPE:]
    o, d_q, d_q_rope, d_k, d_k_rope, d_v = value_and_gradients(
        attend, [part.astype(jnp.float32) for part in parts], d_out)
    return o, jnp.concatenate([d_q, d_q_rope], -1), jnp.concatenate([d_k, d_v], -1), d_k_rope


def own_contestant(backward: bool, segments: bool) -> Contestant:
    """Our kernels, on whole heads."""
    def run(*arrays):
        *inputs, d_out, ids_BT = arrays
        ids_BT = ids_BT if segments else None
        o, normaliser = whole_forward(*inputs, ids_BT, attention_hopper.Settings())
        if not backward:
            return o
        how = attention_backward_hopper.Settings()
        return o, *whole_backward(*inputs, d_out, ids_BT, o, normaliser, how)

    def expected(*arrays):
        found = whole_expected(*arrays[:-1], arrays[-1] if segments else None)
        return found if backward else found[0]

    return Contestant(run, expected, whole)


def torch_contestant(backward: bool) -> Contestant:
    def expected(q, k, v, d_out):
        attend = lambda q, k, v: few_heads_at_once(q, q[..., :0], k, k[:, :, 0, :0], v, segment_ids_BT=None)
        return value_and_gradients(attend, (q, k, v), d_out) if backward else attend(q, k, v)

    def run(q, k, v, d_out):
        if backward:
            return peers_torch.attention_gradients(q, k, v, d_out, SCALE)
        return peers_torch.attention(q, k, v, SCALE)

    return Contestant(run, expected, joined, library="torch")


def cases_of(name: str, rows: int, tokens: int, heads: int, segments: bool = False) -> list[Case]:
    """Forward, and forward with backward."""
    product = rows * heads * tokens ** 2 * (NOPE + ROPE + VALUE)
    moved = 2 * rows * tokens * heads * 2 * (NOPE + ROPE + VALUE)
    found = []
    for backward in (False, True):
        contestants = {form: contestant(function, backward, segments) for form, function in FORMS.items()}
        contestants["own kernels"] = own_contestant(backward, segments)
        if not segments:
            contestants["cuDNN from torch"] = torch_contestant(backward)
        found.append(Case("forward and backward" if backward else "forward", name,
                          lambda seed: inputs_of(seed, rows, tokens, heads, segments), contestants,
                          product * (3 if backward else 1), moved * (3 if backward else 1), BF16_FLOPS))
    return found


def cases() -> list[Case]:
    plain = [case for name, shape in SHAPES.items() for case in cases_of(name, *shape)]
    return plain + cases_of("small_moe, documents", *SHAPES["small_moe, 16 x 2048, 8 heads"], segments=True)


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("attention", cases(), "tflops", overrides)
