"""What `benchmark tune` sweeps: every Hopper kernel of training in 8 bits, with its shapes and candidates.

A shape is spelled as the tuning table's entry for it, which the kernels' own look-ups define (`scaled_products_hopper`,
`fp8_hopper`); what is measured there is said by the function that draws its inputs.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from dsv3.kernels import attention_backward_hopper, attention_hopper, fp8_hopper, scaled_dot_hopper
from dsv3.kernels.attention import Heads
from dsv3.kernels.fp8_kernels import REFERENCE
from dsv3.kernels.grouped_dot import block_experts, of_experts, padded_rows
from dsv3.kernels.scaled import TILE, Blocks, Tiles, decode_blocks, decode_tiles, whole
from dsv3.kernels.scaled_dot_hopper import MULTIPROCESSORS
from dsv3.kernels.scaled_products_hopper import HALVES, NARROW, WHOLE, cost, default_tuning
from dsv3.kernels.scaled_warpgroups_hopper import DEPTH, HALF, ROWS, Tuning
from dsv3.kernels.stream_hopper import Streaming
from experiments import benchmark_attention
from experiments.benchmark_attention import SCALE
from experiments.benchmark_gemm import SHAPES
from experiments.benchmark_grouped import group_sizes
from experiments.benchmark_rows import FORMS, GATE_UP, ROUTED, TOKENS
from experiments.benchmark_table import normal
from experiments.benchmark_tune import Tunable

SHARED_BYTES = 227 * 1024
"""Of shared memory that a thread block may have on Hopper."""
GRADIENT_TOKENS = 8192
WIDTHS = {96: 7, 112: 7, 128: 6, 144: 6, 160: 5, 176: 5, 192: 5}
"""Columns of a tile, and the most steps in flight that fit for it."""
NEAR = 2
"""Widths that are tried beside the usual two, those whose tiles fill rounds of all multiprocessors best; half as many
for many rows, where all fill them well."""
EXPERTS = ((8, 4096), (8, 16_384), (32, 256), (256, 128))
MATRICES = ((4096, 7168), (7168, 2048))
"""(n, k) of an expert's gate_up and down."""


def shared_bytes(tuning: Tuning, out_bytes: int, *, column_scales: bool) -> int:
    """Shared memory of a product: operands and scales of every step in flight, two pieces of output each, barriers."""
    step = (tuning.rows + tuning.width) * DEPTH + 4 * tuning.rows + 4 * tuning.width * column_scales
    piece = math.gcd(tuning.width, 64 // out_bytes)
    return tuning.stages * (step + 2 * 8) + 2 * tuning.rows * piece * out_bytes + 2 * 8


def product_candidates(m: int, n: int, default: Tuning, out_bytes: int, *, column_scales: bool = False,
                       pairs: str = "ab") -> list[Tuning]:
    """The default first; then widths by their cost, the usual two with other bands and pairs; all that fit.

    For few rows, of a forward product, whole tiles, and those of half their height of which all run at once, or the
    widest.

    `pairs`: operands that neighbours may share, where there are many rows.
    """
    if m <= ROWS:
        at_once = [tuning for tuning in HALVES if -(-m // HALF) * -(-n // tuning.width) <= MULTIPROCESSORS]
        found = [default, *(at_once[:2 * NEAR] or HALVES[-NEAR:]), *WHOLE]
    else:
        usable = sorted((w for w in WIDTHS if w % 32 == 0 or not column_scales), key=partial(cost, m, n))
        near = usable[:NEAR if m <= 4096 else NEAR // 2]
        found = [default, *(Tuning(width, WIDTHS[width], None, 8) for width in dict.fromkeys((*near, 128, 192)))]
        found += [Tuning(128, 6, None, 16), Tuning(192, 5, None, 16)]
        found += [Tuning(width, WIDTHS[width], pair, 8) for width in (128, 192) for pair in pairs]
        found += [Tuning(128, 6, None, 4 if m <= 4096 else 32)]
    fits = lambda tuning: shared_bytes(tuning, out_bytes, column_scales=column_scales) <= SHARED_BYTES
    return [tuning for tuning in dict.fromkeys(found) if fits(tuning)]


def random_tiles(seed: int, rows: int, columns: int) -> Tiles:
    """Codes and scales at random: what a product's speed and rounding see of quantised data."""
    scales = jax.random.uniform(jax.random.key(seed + 100), (columns // TILE, rows), minval=0.5, maxval=1.5)
    return Tiles(normal(seed, rows, columns, dtype=jnp.float8_e4m3fn), scales)


def random_blocks(seed: int, *shape: int) -> Blocks:
    """The same for matrices, of a stack one after the other: bits of all at once would take eight times their room."""
    *stack, n, k = shape
    one = lambda number: normal(seed + 1000 * number, n, k, dtype=jnp.float8_e4m3fn)
    values = jax.lax.map(one, jnp.arange(math.prod(stack))).reshape(shape)
    scales = jax.random.uniform(jax.random.key(seed + 100), (*stack, n // TILE, k // TILE), minval=0.5, maxval=1.5)
    return Blocks(values, scales)


def dense_dot(shape: tuple[int, ...], tuning: Tuning):
    out = jax.ShapeDtypeStruct(shape[:2], jnp.bfloat16)
    return lambda a, b: scaled_dot_hopper.rows_times_blocks(a, b, None, out, tuning)


def grouped_rows(e: int, rows: int) -> int:
    """What dispatch makes of so many rows an expert."""
    return padded_rows(e * rows, e, TILE)


def grouped_dot(shape: tuple[int, ...], tuning: Tuning):
    e, rows, n, _ = shape
    out = jax.ShapeDtypeStruct((grouped_rows(e, rows), n), jnp.bfloat16)
    return lambda a, b, expert_Z: scaled_dot_hopper.rows_times_blocks(a, b, expert_Z, out, tuning)


def grouped_inputs(shape: tuple[int, ...], seed: int) -> tuple[Tiles, Blocks, jax.Array]:
    """Skewed groups, so that neighbouring blocks are of two experts here and there."""
    e, rows, n, k = shape
    m = grouped_rows(e, rows)
    expert_Z = block_experts(jnp.asarray(group_sizes("skewed", e, e * rows)), m // TILE, TILE)
    return random_tiles(2 * seed, m, k), random_blocks(2 * seed + 1, e, n, k), expert_Z


def grouped_expected(a: Tiles, b: Blocks, expert_Z: jax.Array) -> jax.Array:
    """One block of rows after the other, each with the decoded matrix of its expert."""
    numbers_ZMK = decode_tiles(a).reshape(-1, TILE, a.values.shape[1])
    one = lambda block: block[0] @ decode_blocks(jax.tree.map(lambda x: of_experts(x, block[1]), b)).T
    out_ZMN = jax.lax.map(lambda block: one(block).astype(jnp.bfloat16), (numbers_ZMK, expert_Z))
    return out_ZMN.reshape(-1, out_ZMN.shape[2])


def dense_gradient(shape: tuple[int, ...], tuning: Tuning):
    return lambda a, b: scaled_dot_hopper.weight_gradient(a, b, None, None, tuning)


def grouped_gradient(shape: tuple[int, ...], tuning: Tuning):
    return lambda a, b, start_E, steps_E: scaled_dot_hopper.weight_gradient(a, b, start_E, steps_E, tuning)


def gradient_inputs(shape: tuple[int, ...], seed: int) -> tuple[Tiles, Tiles]:
    d, f = shape
    return random_tiles(2 * seed, d, GRADIENT_TOKENS), random_tiles(2 * seed + 1, f, GRADIENT_TOKENS)


def grouped_gradient_inputs(shape: tuple[int, ...], seed: int) -> tuple[Tiles, Tiles, jax.Array, jax.Array]:
    """Even groups of 32,768 rows in all, without padding between them."""
    e, d, f = shape
    rows = 32_768 // e
    return (random_tiles(2 * seed, d, 32_768), random_tiles(2 * seed + 1, f, 32_768),
            rows * jnp.arange(e, dtype=jnp.int32), jnp.full(e, rows // TILE, jnp.int32))


def grouped_gradient_expected(a: Tiles, b: Tiles, start_E: jax.Array, steps_E: jax.Array) -> jax.Array:
    by_expert = lambda x: decode_tiles(x).reshape(x.values.shape[0], len(start_E), -1).swapaxes(0, 1)
    return jax.lax.map(lambda pair: pair[0] @ pair[1].T, (by_expert(a), by_expert(b)))


def gradient_candidates(e: int, d: int, f: int) -> list[Tuning]:
    return product_candidates(e * d, f, NARROW, 4, column_scales=True)


def both_ways(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(n, k) forward and by rows, in whole tiles."""
    return list(dict.fromkeys(pair for n, k in shapes for pair in ((whole(n), whole(k)), (whole(k), whole(n)))))


PRODUCTS = (
    Tunable(
        "scaled_dot", tuple((m, *pair) for m in (4096, 8192, 16_384, 128, 64) for pair in both_ways(SHAPES)),
        lambda shape: product_candidates(shape[0], shape[1], default_tuning(*shape[:2]), 2), dense_dot,
        lambda shape, seed: (
            random_tiles(2 * seed, whole(shape[0]), shape[2]), random_blocks(2 * seed + 1, *shape[1:])),
        lambda shape, a, b: decode_tiles(a)[:shape[0]] @ decode_blocks(b).T),
    Tunable(
        "scaled_grouped_dot", tuple((*experts, *pair) for experts in EXPERTS for pair in both_ways(MATRICES)),
        lambda shape: product_candidates(
            grouped_rows(*shape[:2]), shape[2], default_tuning(grouped_rows(*shape[:2]), shape[2]), 2, pairs="a"),
        grouped_dot, grouped_inputs, lambda shape, *inputs: grouped_expected(*inputs)),
    Tunable(
        "scaled_weight_gradient", tuple((whole(k), whole(n)) for n, k in SHAPES),
        lambda shape: gradient_candidates(1, *shape), dense_gradient, gradient_inputs,
        lambda shape, a, b: decode_tiles(a) @ decode_tiles(b).T),
    Tunable(
        "scaled_grouped_weight_gradient", tuple((e, k, n) for e in (8, 32) for n, k in MATRICES),
        lambda shape: gradient_candidates(*shape), grouped_gradient, grouped_gradient_inputs,
        lambda shape, *inputs: grouped_gradient_expected(*inputs)),
)

ONE_FORM = ((1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (3, 2, 2), (1, 2, 2), (4, 1, 2), (2, 1, 2))
TWO_FORMS = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 2))
SQUARE = ((TILE, TILE),)
STREAMS = {
    "rows": (SQUARE, TOKENS[1], ONE_FORM), "columns": (SQUARE, TOKENS[1], ONE_FORM),
    "both": (SQUARE, TOKENS[1], TWO_FORMS),
    "requantise": (SQUARE, TOKENS[1], (
        (1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 2, 2), (1, 3, 2), (2, 2, 2), (3, 2, 2), (4, 1, 2))),
    "pack": (SQUARE, (16_384, 16_384), ((2, 2, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1), (3, 1, 2), (4, 1, 2))),
    "unpack": (SQUARE, (16_384, 16_384), ((2, 2, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1), (3, 1, 2), (4, 1, 2))),
    "norm alone": (((7168,), (1536,), (512,)), TOKENS[1][:1], ((2, 2, 1), (2, 1, 1), (3, 2, 1), (2, 3, 1))),
    "weights": (SQUARE, (8, 7168, 4096), ((1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2))),
    "norm": (((7168,), (1536,), (1280,), (512,)), TOKENS[1][:1], (
        (2, 1, 4), (2, 2, 1), (2, 2, 2), (1, 4, 1), (2, 3, 2), (3, 4, 2), (2, 2, 4), (2, 4, 4), (3, 4, 1), (2, 8, 1),
        (3, 8, 1), (2, 12, 1), (2, 16, 1), (2, 6, 2))),
    "swiglu": (SQUARE, GATE_UP, ((1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2))),
    "swiglu backward": (SQUARE, GATE_UP, ((2, 1, 4), (1, 1, 4), (2, 1, 2))),
    "permute": (((7168,),), ROUTED, (
        (2, 2, 4), (3, 2, 4), (2, 4, 2), (3, 3, 2), (3, 4, 1), (6, 4, 1), (4, 6, 1), (8, 3, 1), (4, 3, 2), (2, 3, 4))),
    "combine": (((7168,),), ROUTED, (
        (2, 2, 1024), (2, 4, 1024), (3, 4, 1024), (4, 3, 1024), (3, 2, 1024), (2, 2, 2048), (2, 1, 3584),
        (4, 4, 512), (6, 4, 512), (2, 6, 1024))),
}
"""Of `FORMS`: entries of the table, the shape that is measured (of norms its rows), and (stages, blocks, split). Where
several warpgroups work on a tile and there are more than two stages, they may also be one behind."""


def stream(name: str) -> Tunable:
    """A memory-bound kernel."""
    form, (entries, measured, settings) = FORMS[name], STREAMS[name]
    fast = fp8_hopper.FAST[form.function]

    def make(entry: tuple[int, ...], streaming: Streaming):
        return partial(form.call, lambda *arguments: fast.function(*arguments, streaming))

    def inputs(entry: tuple[int, ...], seed: int) -> tuple:
        return form.inputs(seed, *measured, *(entry if name.startswith("norm") else ()))

    found = [fast.default, *(Streaming(*setting) for setting in settings)]
    if entries == SQUARE:  # work of several warpgroups
        found += [streaming._replace(behind=1) for streaming in found if streaming.stages > 2]
    candidates = list(dict.fromkeys(found))
    return Tunable(form.function, entries, lambda entry: candidates, make, inputs,
                   lambda entry, *arrays: form.call(getattr(REFERENCE, form.function), *arrays))


ATTENTION_TOKENS, ATTENTION_HEADS = 16_384, 128
"""What attention is tuned at; an entry is for a length of rows."""
LENGTHS = ((4096,), (2048,), (8192,))
FORWARD_ATTENTION = [attention_hopper.Settings(*how) for how in (
    (128, 2, True), (128, 2, False), (64, 4, True), (64, 3, True), (64, 4, False))]
BACKWARD_ATTENTION = [attention_backward_hopper.Settings(*how) for how in (
    (3, True, 3, False), (3, True, 3, True), (2, True, 2, False), (3, True, 3, False, 0), (3, False, 3, True, 0))]


def attention_inputs(shape: tuple[int, ...], seed: int) -> tuple[jax.Array, ...]:
    """Rows of one document: whole queries, their rotary part, keys with values, the rotary key, and d_o."""
    length, = shape
    q, kv, k_rope, _, d_o, _ = benchmark_attention.inputs_of(
        seed, ATTENTION_TOKENS // length, length, ATTENTION_HEADS, segments=False)
    return q, q[..., benchmark_attention.NOPE:], kv, k_rope, d_o


def gradient_attention_inputs(shape: tuple[int, ...], seed: int) -> tuple[jax.Array, ...]:
    """The same, and what the forward kernel leaves."""
    *inputs, d_o = attention_inputs(shape, seed)
    return *inputs, d_o, *attention_hopper.forward(*inputs, SCALE, None, attention_hopper.Settings())


def attention_expected(q, q_rope, kv, k_rope, d_o, *rest) -> tuple[jax.Array, ...]:
    """o, d_q with the gradient by its rotated part in place, d_kv, d_k_rope; float32."""
    still_2BTP = jnp.zeros((2, *q.shape[:2], q_rope.shape[3] // 2)).at[0].set(1)
    reference = lambda *heads: benchmark_attention.few_heads_at_once(Heads(*heads), still_2BTP, None)
    return benchmark_attention.value_and_gradients(
        reference, [x.astype(jnp.float32) for x in (q, kv, k_rope)], d_o)


def attention_backward(q, q_rope, kv, k_rope, d_o, o, normaliser, how):
    return attention_backward_hopper.backward(q, q_rope, kv, k_rope, SCALE, None, o, normaliser, d_o, how)


ATTENTION = (
    Tunable(
        "attention_forward", LENGTHS, lambda shape: FORWARD_ATTENTION,
        lambda shape, how: lambda *arrays: attention_hopper.forward(*arrays[:4], SCALE, None, how)[0],
        attention_inputs, lambda shape, *arrays: attention_expected(*arrays)[0]),
    Tunable(
        "attention_backward", LENGTHS, lambda shape: BACKWARD_ATTENTION,
        lambda shape, how: lambda *arrays: attention_backward(*arrays, how),
        gradient_attention_inputs, lambda shape, *arrays: attention_expected(*arrays)[1:]),
)

TUNABLES: tuple[Tunable, ...] = (*PRODUCTS, *map(stream, STREAMS), *ATTENTION)
"""Every kernel that `tune` knows."""
