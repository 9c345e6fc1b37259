"""What moves rows and does little else: python -m experiments.benchmark quantize [--only=TEXT]

Quantisation in tiles, and rows to expert order and back; against the copy bandwidth measured in the same run, counting
the bytes that each must read and write.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3.kernels.grouped_dot import padded_rows
from dsv3.kernels.grouped_dot_hopper import BLOCK
from dsv3.kernels.permute import Plan, make_plan, permute, unpermute
from dsv3.kernels.scaled import TILE, Tiles
from dsv3.quant import tiles as quant
from dsv3.quant.formats import E4M3
from experiments import benchmark_table
from experiments.benchmark_table import BF16_FLOPS, Case, Contestant, normal

ROWS = ((4096, 7168), (16_384, 7168), (32_768, 7168))
SCALES = 4 / TILE
"""Bytes of scales an element."""


def rows_by_xla(x_MK: jax.Array) -> Tiles:
    values, scales = quant.quantize(x_MK, E4M3, quant.ALONG_ROWS, power_of_two=False)
    return Tiles(values, scales.T)


def columns_by_xla(x_MK: jax.Array) -> Tiles:
    values, scales = quant.quantize(x_MK, E4M3, quant.ALONG_COLUMNS, power_of_two=False)
    return Tiles(values.T, scales)


def both_by_xla(x_MK: jax.Array) -> tuple[Tiles, Tiles]:
    return rows_by_xla(x_MK), columns_by_xla(x_MK)


ROW_FORMS: dict[str, Callable] = {"XLA": rows_by_xla}
COLUMN_FORMS: dict[str, Callable] = {"XLA": columns_by_xla}
BOTH_FORMS: dict[str, Callable] = {"XLA": both_by_xla}
"""The fastest first. All of them agree with `dsv3/quant` to the bit."""


def quantize_cases(m: int, k: int) -> list[Case]:
    """1 x 128, 128 x 1 (transposed), and both from one read, of a bfloat16 matrix."""
    def case(name, forms, reference, bytes_per_element):
        rows = {form: Contestant(run, reference, bound=0) for form, run in forms.items()}
        return Case(name, f"{m} x {k}", lambda seed: (normal(seed, m, k),), rows, 0, bytes_per_element * m * k,
                    BF16_FLOPS)

    return [case("1 x 128", ROW_FORMS, rows_by_xla, 3 + SCALES), case("128 x 1", COLUMN_FORMS, columns_by_xla,
            3 + SCALES), case("both", BOTH_FORMS, both_by_xla, 4 + 2 * SCALES)]


def dispatch_cases(name: str, n_tokens: int, width: int, n_experts: int) -> list[Case]:
    """Rows written to expert order (read once a token) and read back with their weights, top 8."""
    def inputs(seed: int) -> tuple[jax.Array, Plan, jax.Array, jax.Array]:
        topk_TK = jax.random.randint(jax.random.key(seed), (n_tokens, 8), 0, n_experts)
        plan, _ = make_plan(topk_TK, n_experts, BLOCK)
        n_rows = padded_rows(8 * n_tokens, n_experts, BLOCK)
        return normal(seed, n_tokens, width), plan, normal(seed + 1, n_rows, width), jnp.full((n_tokens, 8), 0.125)

    def loop(rows_JD, plan, weights_TK):
        chosen = rows_JD.astype(jnp.float32)
        return sum(chosen[plan.row_TK[:, k]] * weights_TK[:, k, None] for k in range(8))

    tokens, pairs = 2 * n_tokens * width, 2 * 8 * n_tokens * width
    dispatch = Contestant(permute, lambda x, plan: jnp.where(
        (plan.pair_J < 8 * n_tokens)[:, None], x[jnp.minimum(plan.pair_J // 8, n_tokens - 1)], 0),
        lambda x, plan, rows, weights: (x, plan), bound=0)
    combine = Contestant(unpermute, loop, lambda x, plan, rows, weights: (rows, plan, weights))
    return [Case("dispatch", name, inputs, {"XLA": dispatch}, 0, tokens + pairs, BF16_FLOPS),
            Case("combine", name, inputs, {"XLA": combine}, 0, tokens + pairs, BF16_FLOPS)]


def cases() -> list[Case]:
    return [*(case for shape in ROWS for case in quantize_cases(*shape)),
            *dispatch_cases("V3, 16384 tokens to 8 experts", 16_384, 7168, 8),
            *dispatch_cases("small_moe, 32768 tokens to 64 experts", 32_768, 1280, 64)]


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("quantize", cases(), "gb_per_s", overrides)
