"""Causal attention with keys of 192 and values of 128: python -m experiments.benchmark attention [--peers]

Forward, and forward with backward, from the projections' whole outputs: splitting and rotating them is timed, but for
torch, which is given keys and queries rotated and whole. Operations count the causal half of the square: two products
forward and, of the backward pass's five, the four that are no recomputation. Bytes count every input once and every
output; forward with backward keeps nothing in between.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3.kernels import attention_rotary_hopper
from dsv3.kernels.attention import Attention, Heads, attend, rotary_attention
from dsv3.kernels.attention_cudnn import CUDNN
from experiments import benchmark_table, peers_torch
from experiments.benchmark_clock import n_bytes
from experiments.benchmark_table import BF16_FLOPS, Case, Contestant, normal

SHAPES = {"V3, 1 x 4096, 128 heads": (1, 4096, 128), "V3, 4 x 4096, 128 heads": (4, 4096, 128),
          "1 x 8192, 128 heads": (1, 8192, 128), "small_moe, 16 x 2048, 8 heads": (16, 2048, 8)}
"""(rows, tokens, heads)."""
NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
HEADS_AT_ONCE = 4
FORMS: dict[str, Callable[[], Attention]] = {
    "Hopper": lambda: attention_rotary_hopper.attention(jax.devices()[0].device_kind), "cuDNN from JAX": lambda: CUDNN}
"""For the device that is there when they run; the fastest first."""


def inputs_of(seed: int, rows: int, tokens: int, heads: int, segments: bool) -> tuple[jax.Array, ...]:
    """The three arrays of `Heads`, rotation, d_out, segment ids (zeros where there is one document a row)."""
    head = lambda offset, width: normal(10 * seed + offset, rows, tokens, heads, width)
    starts_BT = jax.random.bernoulli(jax.random.key(seed), 8 / tokens, (rows, tokens)) & segments
    angles_BTP = normal(10 * seed + 3, rows, tokens, ROPE // 2, dtype=jnp.float32)
    return (head(0, NOPE + ROPE), head(1, NOPE + VALUE), normal(10 * seed + 2, rows, tokens, ROPE),
            jnp.stack([jnp.cos(angles_BTP), jnp.sin(angles_BTP)]), head(4, VALUE),
            jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) + 1)


def few_heads_at_once(heads: Heads, rotation_2BTP: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The reference in float32, `HEADS_AT_ONCE` heads after the other, so that the scores fit."""
    q_BTHX, kv_BTHY, k_rope_BTR = (x.astype(jnp.float32) for x in heads)
    rows, tokens, n_heads = q_BTHX.shape[:3]
    some = min(HEADS_AT_ONCE, n_heads)
    split = lambda x: jnp.moveaxis(x.reshape(rows, tokens, n_heads // some, some, x.shape[3]), 2, 0)

    @jax.checkpoint
    def one(parts):
        return rotary_attention(Heads(*parts, k_rope_BTR), rotation_2BTP, SCALE, segment_ids_BT)

    out = jax.lax.map(one, (split(q_BTHX), split(kv_BTHY)))
    return jnp.moveaxis(out, 0, 2).reshape(rows, tokens, n_heads, heads.n_value)


def value_and_gradients(function: Callable, inputs: Sequence[jax.Array], d_out: jax.Array):
    out, vjp = jax.vjp(function, *inputs)
    return out, *vjp(d_out.astype(out.dtype))


def contestant(form: Callable[[], Attention], backward: bool, segments: bool) -> Contestant:
    """Its output, or that and all gradients."""
    def of(function, *arrays):
        *heads, rotation_2BTP, d_out, ids_BT = arrays
        masked = lambda *heads: function(Heads(*heads), rotation_2BTP, ids_BT if segments else None)
        return value_and_gradients(masked, heads, d_out) if backward else masked(*heads)

    fast = lambda heads, rotation_2BTP, ids_BT: attend(form(), heads, rotation_2BTP, SCALE, ids_BT)
    return Contestant(lambda *a: of(fast, *a), lambda *a: of(few_heads_at_once, *a))


def joined(q_BTHX, kv_BTHY, k_rope_BTR, rotation_2BTP, d_out, ids_BT) -> tuple[jax.Array, ...]:
    """q, k, v and d_out with whole heads, as torch wants them."""
    del ids_BT
    q_nope, q_rope, k_nope, k_rope, v = Heads(q_BTHX, kv_BTHY, k_rope_BTR).rotated_parts(rotation_2BTP)
    shared = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    return jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, shared], -1), v, d_out


def torch_contestant(backward: bool) -> Contestant:
    def expected(q, k, v, d_out):
        nothing_2BTP = jnp.zeros((2, *q.shape[:2], 0))
        reference = lambda q, k, v: few_heads_at_once(
            Heads(q, jnp.concatenate([k, v], -1), k[:, :, 0, :0]), nothing_2BTP, None)
        return value_and_gradients(reference, (q, k, v), d_out) if backward else reference(q, k, v)

    def run(q, k, v, d_out):
        if backward:
            return peers_torch.attention_gradients(q, k, v, d_out, SCALE)
        return peers_torch.attention(q, k, v, SCALE)

    return Contestant(run, expected, joined, library="torch")


def cases_of(name: str, rows: int, tokens: int, heads: int, segments: bool = False) -> list[Case]:
    """Forward, and forward with backward."""
    product = rows * heads * tokens ** 2 * (NOPE + ROPE + VALUE)
    *arrays, rotation, d_out, ids = jax.eval_shape(lambda: inputs_of(0, rows, tokens, heads, segments))
    read = n_bytes((arrays, rotation, [ids] * segments))
    found = []
    for backward in (False, True):
        moved = read + n_bytes(d_out) + backward * n_bytes((d_out, arrays))  # the output is as large as d_out
        contestants = {form: contestant(make, backward, segments)._replace(repeats=form == "Hopper")
                       for form, make in FORMS.items()}  # cuDNN's gradients do not
        if not segments:
            contestants["cuDNN from torch"] = torch_contestant(backward)
        found.append(Case("forward and backward" if backward else "forward", name,
                          lambda seed: inputs_of(seed, rows, tokens, heads, segments), contestants,
                          product * (3 if backward else 1), moved, BF16_FLOPS))
    return found


def cases() -> list[Case]:
    plain = [case for name, shape in SHAPES.items() for case in cases_of(name, *shape)]
    return plain + cases_of("small_moe, documents", *SHAPES["small_moe, 16 x 2048, 8 heads"], segments=True)


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("attention", cases(), "tflops", overrides)
