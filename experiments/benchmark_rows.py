"""What moves rows and does little else: python -m experiments.benchmark quantize [--only=TEXT]

Quantisation in tiles, alone and with what comes before it, and rows to expert order and back; against the copy
bandwidth measured in the same run, counting inputs once (rows that go to several experts too) and outputs, with indices
and with what pads groups where it is written. Ours are what training runs, with the settings of the tuning table.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.config import Operand
from dsv3.kernels.fp8_hopper import with_settings
from dsv3.kernels.fp8_kernels import REFERENCE
from dsv3.kernels.grouped_dot import padded_rows
from dsv3.kernels.grouped_dot_hopper import BLOCK
from dsv3.kernels.permute import Plan, make_plan, permute, unpermute
from dsv3.kernels.scaled import Tiles, pack_tiles
from experiments import benchmark_table
from experiments.benchmark_clock import n_bytes
from experiments.benchmark_table import BF16_FLOPS, BOUND, Case, Contestant, normal

E4M3 = Operand(format="e4m3", tile="inner", power_of_two=False)
POWER = Operand(format="e4m3", tile="inner", power_of_two=True)
E5M2, E5M6 = (Operand(format=name, tile="inner", power_of_two=True) for name in ("e5m2", "e5m6"))
BLOCKS = Operand(format="e4m3", tile="block", power_of_two=False)
TOKENS = ((4096, 7168), (16_384, 7168))
GATE_UP = (131_072, 4096)
NEAR = 0.004
"""Distance that exponentials and sums in another order may make: a last bit now and then moves a code by one."""
UNROUNDED = 0.02
"""Distance that XLA may make where it leaves out a rounding to bfloat16 (measured: 0.013): many codes move by one."""


class Form(NamedTuple):
    """A function of `Kernels`: its inputs at a shape, and its call on them. `exact`: to the bit.

    `read` is as much of the inputs as has to be read.
    """

    function: str
    inputs: Callable[..., tuple]
    call: Callable
    exact: bool = True
    read: Callable[..., tuple] = lambda *arrays: arrays


def magnitudes(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Rows of many magnitudes."""
    exponents = jax.random.uniform(jax.random.key(seed + 1000), (*shape[:-1], 1), minval=-20, maxval=20)
    return (normal(seed, *shape, dtype=jnp.float32) * jnp.exp2(exponents)).astype(dtype)


def special(seed: int, m: int, k: int) -> jax.Array:
    """With tiles of zeros, hardly normal numbers (a CPU, which makes the reference, flushes smaller ones), infinities
    and NaNs."""
    x = magnitudes(seed, m, k).at[3].set(0).at[5].set(2e-38).at[7, 1].set(jnp.inf).at[9, 40].set(jnp.nan)
    return x.at[:, 17].set(-0.0)


def waiting(seed: int, m: int, k: int, operand: Operand) -> Tiles:
    """A matrix as it waits for the backward pass."""
    return REFERENCE.quantize_rows(normal(seed, m, k), operand)


def backward_inputs(seed: int, m: int, f: int) -> tuple:
    """gate_up as kept, the gradient of h, gate weights."""
    weight_M = jax.random.uniform(jax.random.key(seed + 1), (m,))
    return waiting(seed, m, f, E4M3), normal(seed + 2, m, f // 2), weight_M


def permute_inputs(seed: int, n_tokens: int, width: int, n_experts: int, top_k: int) -> tuple[Tiles, Plan]:
    """Tokens in tiles, and where they go."""
    plan, _ = plan_of(seed, n_tokens, n_experts, top_k)
    return waiting(seed, n_tokens, width, E4M3), plan


def plan_of(seed: int, n_tokens: int, n_experts: int, top_k: int) -> tuple[Plan, int]:
    """Random choices of experts, and the rows they take."""
    topk_TK = jax.random.randint(jax.random.key(seed), (n_tokens, top_k), 0, n_experts)
    return make_plan(topk_TK, n_experts, BLOCK)[0], padded_rows(top_k * n_tokens, n_experts, BLOCK)


def combine_inputs(seed: int, n_tokens: int, width: int, n_experts: int, top_k: int) -> tuple:
    """Rows in expert order, the rows of every token, their weights."""
    plan, n_rows = plan_of(seed, n_tokens, n_experts, top_k)
    weights_TK = jax.random.uniform(jax.random.key(seed + 1), (n_tokens, top_k))
    return normal(seed + 2, n_rows, width), plan.row_TK, weights_TK


def norm_inputs(seed: int, m: int, k: int) -> tuple[jax.Array, jax.Array]:
    return magnitudes(seed, m, k), normal(seed + 1, k, dtype=jnp.float32)


def chosen_rows(rows_JD: jax.Array, row_TK: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """What `combine_rows` reads: as many rows as there are pairs."""
    return rows_JD[:row_TK.size], row_TK, *weights


matrix = lambda seed, *shape: (magnitudes(seed, *shape),)
FORMS = {
    "rows": Form("quantize_rows", matrix, lambda f, x: f(x, E4M3)),
    "columns": Form("quantize_columns", matrix, lambda f, x: f(x, E4M3)),
    "both": Form("quantize_both", matrix, lambda f, x: f(x, E4M3, E4M3)),
    "both, special numbers": Form(
        "quantize_both", lambda *shape: (special(*shape),), lambda f, x: f(x, E5M2, E5M6)),
    "requantise": Form("requantize_columns", lambda *a: (waiting(*a, E4M3),), lambda f, x: f(x, POWER)),
    "requantise E5M6": Form("requantize_columns", lambda *a: (waiting(*a, E5M6),), lambda f, x: f(x, POWER)),
    "pack": Form("quantize_and_pack", matrix, lambda f, x: f(x, E4M3, E5M6)),
    "unpack": Form("unpack_both", lambda *a: (pack_tiles(waiting(*a, E5M6), E5M6),),
                   lambda f, x: f(x, E5M6, E4M3, jnp.bfloat16)),
    "weights": Form("quantize_weights", lambda *a: (magnitudes(*a, dtype=jnp.float32),), lambda f, w: f(w, BLOCKS)),
    "norm alone": Form("norm", norm_inputs, lambda f, x, gain: f(x, gain, 1e-6), exact=False),
    "norm": Form("norm_quantize", norm_inputs, lambda f, x, gain: f(x, gain, 1e-6, E4M3, None), exact=False),
    "norm, both": Form("norm_quantize", norm_inputs, lambda f, x, gain: f(x, gain, 1e-6, E4M3, E4M3), exact=False),
    "swiglu": Form(
        "swiglu_quantize", lambda *a: (normal(*a),), lambda f, x: f(x, E4M3, E4M3), exact=False),
    "swiglu, gate_up as kept": Form(
        "swiglu_quantize", lambda *a: (normal(*a),), lambda f, x: f(x, E4M3, E4M3)[1]),
    "swiglu backward": Form(
        "swiglu_backward_quantize", backward_inputs, lambda f, *a: f(*a, E4M3, E4M3, E4M3), exact=False),
    "permute": Form("permute_tiles", permute_inputs, lambda f, *a: f(*a),
                    read=lambda tiles, plan: (tiles, plan.pair_J)),
    "combine": Form("combine_rows", combine_inputs, lambda f, *a: f(*a), exact=False, read=chosen_rows),
    "combine without weights": Form(
        "combine_rows", lambda *a: combine_inputs(*a)[:2], lambda f, *a: f(*a, None), exact=False,
        read=chosen_rows),
}
"""Everything that training in 8 bits does beside products and attention."""
ROUTED = (16_384, 7168, 8, 8)
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "rows": TOKENS, "columns": TOKENS, "both": (*TOKENS, (16_384, 2112), (16_200, 576)),
    "both, special numbers": ((384, 512),), "requantise": TOKENS, "requantise E5M6": TOKENS,
    "pack": ((16_384, 16_384),), "unpack": ((16_384, 16_384),), "norm alone": TOKENS,
    "weights": ((8, 7168, 4096),), "norm": (*TOKENS, (16_384, 1536), (16_384, 512), (65_536, 1280)),
    "norm, both": TOKENS,
    "swiglu": (GATE_UP,), "swiglu, gate_up as kept": ((16_384, 4096),), "swiglu backward": (GATE_UP,),
    "permute": (ROUTED,), "combine": (ROUTED,), "combine without weights": (ROUTED,),
}
"""Matrices [rows, columns]; weights [stack, in, out]; (tokens, width, experts, choices) of what is routed."""


def case(name: str, shape: tuple[int, ...]) -> Case:
    """Ours, and the reference as XLA compiles it, whose division and roundings on a GPU need not be the reference's."""
    form = FORMS[name]
    inputs = partial(_drawn, form, shape)
    slow = partial(form.call, getattr(REFERENCE, form.function))
    # Looked up when it runs: the tuning table is of the device that is there then.
    ours = lambda *arrays: form.call(with_settings(form.function, jax.devices()[0].device_kind), *arrays)
    arrays = jax.eval_shape(inputs, 0)
    moved = n_bytes((jax.eval_shape(form.read, *arrays), jax.eval_shape(slow, *arrays)))
    contestants = {"Hopper": Contestant(ours, slow, bound=0 if form.exact else NEAR)}
    if "special" not in name:  # a NaN has no distance
        contestants["XLA"] = Contestant(slow, slow, bound=BOUND if form.exact else UNROUNDED)
    return Case(name, " x ".join(map(str, shape)), inputs, contestants, 0, moved, BF16_FLOPS)


def _drawn(form: Form, shape: tuple[int, ...], seed: int) -> tuple:
    return form.inputs(seed, *shape)


def dispatch_cases(name: str, n_tokens: int, width: int, n_experts: int) -> list[Case]:
    """In bfloat16: rows written to expert order (read once a token) and read back with their weights, top 8."""
    def inputs(seed: int) -> tuple[jax.Array, Plan, jax.Array, jax.Array]:
        plan, n_rows = plan_of(seed, n_tokens, n_experts, 8)
        return normal(seed, n_tokens, width), plan, normal(seed + 1, n_rows, width), jnp.full((n_tokens, 8), 0.125)

    def loop(rows_JD, plan, weights_TK):
        chosen = rows_JD.astype(jnp.float32)
        return sum(chosen[plan.row_TK[:, k]] * weights_TK[:, k, None] for k in range(8))

    x, plan, rows, weights = jax.eval_shape(inputs, 0)
    scattered = n_bytes((x, plan.pair_J, rows))  # the result is as large as `rows`
    gathered = n_bytes((jax.eval_shape(chosen_rows, rows, plan.row_TK, weights), x))
    dispatch = Contestant(permute, lambda x, plan: jnp.where(
        (plan.pair_J < 8 * n_tokens)[:, None], x[jnp.minimum(plan.pair_J // 8, n_tokens - 1)], 0),
        lambda x, plan, rows, weights: (x, plan), bound=0)
    combine = Contestant(unpermute, loop, lambda x, plan, rows, weights: (rows, plan, weights))
    return [Case("dispatch, bfloat16", name, inputs, {"XLA": dispatch}, 0, scattered, BF16_FLOPS),
            Case("combine, bfloat16", name, inputs, {"XLA": combine}, 0, gathered, BF16_FLOPS)]


def cases() -> list[Case]:
    return [*(case(name, shape) for name, shapes in SHAPES.items() for shape in shapes),
            *dispatch_cases("V3, 16384 tokens to 8 experts", 16_384, 7168, 8),
            *dispatch_cases("small_moe, 32768 tokens to 64 experts", 32_768, 1280, 64)]


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("quantize", cases(), "gb_per_s", overrides)
