"""Products in 8 bits against the model of the tensor core: python -m experiments.benchmark exact [--soak=1000]

Every product that training takes must agree to the bit, on inputs that break sums: of wide range, cancelling,
subnormal, positive, with tiles of zeros, with NaNs. Scales are powers of two, so that scaling a partial sum is exact
and only the order of sums is left to agree on: 128 elements in the accumulator of 13 fraction bits
(`dsv3/quant/accumulate.py`), partial sums in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.kernels import scaled_products_hopper
from dsv3.kernels.grouped_dot import block_experts, block_starts, of_experts, padded_rows
from dsv3.kernels.scaled import TILE, Blocks, Tiles
from dsv3.quant.accumulate import promoted_dot
from dsv3.quant.formats import E4M3
from experiments import benchmark_table
from experiments.benchmark_gemm import on_this_device
from experiments.benchmark_table import FP8_FLOPS, Case, Contestant

M, N, K = 256, 384, 1152
"""Two tiles of rows, three of columns, and an odd number of steps."""
REPEATS = 9, 9
"""How often an operand's rows are there, and its columns: enough for several tiles on every multiprocessor."""
FEW = 100
"""Rows of a product as in decoding: tiles of 64, the second of them broken."""
BROKEN = 75
"""Columns by which it falls short of whole tiles, and of what the copy engine can write."""
SIZES = (130, 0, 128, 1)
"""Rows of the experts of a grouped product."""
NANS = 3


class Products(NamedTuple):
    """What is checked, as `dsv3/kernels/scaled_products_hopper.py` defines it."""

    dot: Callable
    grouped_dot: Callable
    weight_gradient: Callable
    grouped_weight_gradient: Callable


HOPPER = Products(*(on_this_device(product) for product in (
    scaled_products_hopper.scaled_dot, scaled_products_hopper.scaled_grouped_dot,
    scaled_products_hopper.scaled_weight_gradient, scaled_products_hopper.scaled_grouped_weight_gradient)))


def powers(key: jax.Array, low: int, high: int, shape: Sequence[int]) -> jax.Array:
    """2^i for i from low to high, at random."""
    return jnp.ldexp(jnp.float32(1), jax.random.randint(key, shape, low, high + 1))


def numbers(family: str, seed: int, rows: int, columns: int) -> jax.Array:
    """What becomes an operand's codes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = jax.random.normal(keys[0], (rows, columns))
    half = jnp.concatenate([normal.reshape(rows, -1, TILE)[..., :TILE // 2]] * 2, axis=2).reshape(rows, columns)
    column = jnp.arange(columns)[None]
    wide = normal * powers(keys[1], -9, 7, (rows, columns))
    return {
        "normal": normal, "positive": 448 * jnp.abs(normal) / jnp.max(jnp.abs(normal)),
        "wide": wide,
        # Of two such operands the second half of every tile takes the first away again.
        "cancelling": half * jnp.where((column % TILE >= TILE // 2) & (seed % 2 == 1), -1, 1),
        "subnormal": wide if seed % 2 else jax.random.randint(keys[1], (rows, columns), -7, 8) * jnp.float32(2 ** -9),
        "zero tiles": jnp.where(column // TILE % 2 == 0, 0, normal).at[::5].set(0),
        "NaN": normal.at[jax.random.randint(keys[1], (NANS,), 0, rows),
                         jax.random.randint(keys[2], (NANS,), 0, columns)].set(jnp.nan),
    }[family]


FAMILIES = ("normal", "positive", "wide", "cancelling", "subnormal", "zero tiles", "NaN")


def codes(x: jax.Array) -> jax.Array:
    """E4M3; what is too large becomes the largest number."""
    return jnp.clip(x, -E4M3.largest, E4M3.largest).astype(E4M3.dtype)


def tiles(family: str, seed: int, rows: int, columns: int) -> Tiles:
    """An operand [rows, columns] with scales [columns / 128, rows]."""
    scales = powers(jax.random.key(seed + 1000), -5, 5, (columns // TILE, rows))
    return Tiles(codes(numbers(family, seed, rows, columns)), scales)


def blocks(family: str, seed: int, *shape: int) -> Blocks:
    """A matrix [n, k], or a stack of them."""
    *stack, n, k = shape
    values = codes(numbers(family, seed, math.prod(stack) * n, k)).reshape(shape)
    return Blocks(values, powers(jax.random.key(seed + 1000), -5, 5, (*stack, n // TILE, k // TILE)))


def modelled(a: Tiles, b: Tiles | Blocks) -> jax.Array:
    """a b^T as the tensor core and float32 totals form it, float32 [m, n]."""
    b_scales = b.scales.T if isinstance(b, Tiles) else jnp.repeat(b.scales, TILE, axis=0)
    return promoted_dot(a.values, b.values, a.scales.T, b_scales, TILE, tensor_core=True)


def modelled_groups(a: Tiles, b: Blocks, expert_Z: jax.Array) -> jax.Array:
    """Every block of 128 rows with the matrix of its expert."""
    def one(block):
        values, scales, expert = block
        return modelled(Tiles(values, scales), jax.tree.map(lambda x: of_experts(x, expert), b))

    by_block = a.values.reshape(-1, TILE, a.values.shape[1]), jnp.moveaxis(
        a.scales.reshape(a.scales.shape[0], -1, TILE), 1, 0), expert_Z
    return jax.lax.map(one, by_block).reshape(a.values.shape[0], -1)


def modelled_gradients(a: Tiles, b: Tiles, start_E: jax.Array, steps_E: jax.Array) -> jax.Array:
    """float32 [E, D, F]: the blocks of 128 tokens of other experts count as zeros, which change no sum."""
    def one(expert):
        start, steps = expert
        block = jnp.arange(a.values.shape[1]) // TILE - start // TILE
        mine = lambda x: Tiles(jnp.where((block >= 0) & (block < steps), x.values, 0), x.scales)
        return modelled(mine(a), mine(b))

    return jax.lax.map(one, (start_E, steps_E))


def repeated[T: Tiles | Blocks](operand: T, times: int) -> T:
    """Its rows (of a matrix in blocks: n) several times over."""
    again = lambda x, axis: jnp.concatenate([x] * times, axis)
    if isinstance(operand, Tiles):
        return Tiles(again(operand.values, 0), again(operand.scales, 1))
    return Blocks(again(operand.values, -2), again(operand.scales, -2))


def groups() -> tuple[jax.Array, jax.Array]:
    """Sizes of the experts, and the expert of every block of 128 rows."""
    sizes_E = jnp.asarray(SIZES, jnp.int32)
    return sizes_E, block_experts(sizes_E, padded_rows(sum(SIZES), len(SIZES), TILE) // TILE, TILE)


def case(
    name: str, family: str, inputs: Callable, product: Callable, expected: Callable, *, few: bool = False,
) -> Case:
    """`product` of the repeated operands must be the repeated product that is `expected` of the operands.

    Of `few` rows, it is what there is of it without padding; they are not repeated.
    """
    down, across = (1, REPEATS[1]) if few else REPEATS
    m, n = (FEW, across * N - BROKEN) if few else (down * M, across * N)
    run = lambda a, b, *rest: product(repeated(a, down), repeated(b, across), *rest)
    whole = lambda *inputs: jnp.tile(expected(*inputs), (down, across))
    many = (lambda *inputs: whole(*inputs)[:m, :n]) if few else whole
    return Case(name, family, inputs, {"Hopper": Contestant(run, many, bound=0)}, 2 * m * n * K,
                m * K + n * K + 4 * m * n, FP8_FLOPS)


def family_cases(family: str, products: Products) -> list[Case]:
    """Of all four products, and the first with few rows. 0 as a bound: the same bits, with all NaNs alike."""
    sizes_E, expert_Z = groups()
    e, rows = len(SIZES), TILE * len(expert_Z)
    start_E, steps_E = block_starts(sizes_E, TILE), -(-sizes_E // TILE)
    bfloat16 = lambda function: lambda *inputs: function(*inputs).astype(jnp.bfloat16)
    ab = lambda seed: (2 * seed, 2 * seed + 1)
    return [
        case("rows times blocks", family,
             lambda seed: (tiles(family, ab(seed)[0], M, K), blocks(family, ab(seed)[1], N, K)),
             lambda a, b: products.dot(a, b, (len(a.values), len(b.values)), jnp.bfloat16), bfloat16(modelled)),
        case("rows times experts", family,
             lambda seed: (tiles(family, ab(seed)[0], rows, K), blocks(family, ab(seed)[1], e, N, K), expert_Z),
             lambda a, b, z: products.grouped_dot(a, b, jnp.tile(z, REPEATS[0]), jnp.bfloat16),
             bfloat16(modelled_groups)),
        case("weight gradient", family,
             lambda seed: (tiles(family, ab(seed)[0], M, K), tiles(family, ab(seed)[1], N, K)),
             products.weight_gradient, modelled),
        case("weight gradients of experts", family,
             lambda seed: (tiles(family, ab(seed)[0], M, rows), tiles(family, ab(seed)[1], N, rows), start_E, steps_E),
             products.grouped_weight_gradient, modelled_gradients),
        case("few rows times blocks", family,
             lambda seed: (tiles(family, ab(seed)[0], TILE, K), blocks(family, ab(seed)[1], N, K)),
             lambda a, b: products.dot(a, b, (FEW, len(b.values) - BROKEN), jnp.bfloat16), bfloat16(modelled),
             few=True),
    ]


def cases(products: Products = HOPPER) -> list[Case]:
    return [one for family in FAMILIES for one in family_cases(family, products)]


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("exact", cases(), "tflops", overrides)
