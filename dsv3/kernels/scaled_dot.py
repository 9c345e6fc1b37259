"""Products of quantised operands, in plain jnp: what the kernels on tensor cores are compared with.

With the float32 accumulator they decode both operands and take one product in full float32 precision. With `hopper`
they add up as the tensor core does, bit by bit, promoted to float32 every `interval` products: exact and slow.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.config import require
from dsv3.kernels.scaled import TILE, Blocks, Tiles, decode_blocks, decode_tiles
from dsv3.quant.accumulate import promoted_dot

EXACT = jax.lax.Precision.HIGHEST


class Products(NamedTuple):
    """The four products of a recipe, with their accumulator."""

    dot: Callable
    grouped_dot: Callable
    weight_gradient: Callable
    grouped_weight_gradient: Callable


def products(interval: int, accumulator: str) -> Products:
    """The reference forms. Raises `UserError` for an accumulator that has no model."""
    require(accumulator in ("float32", "hopper"), f"accumulator {accumulator!r}; expected float32 or hopper")
    multiply = _float32 if accumulator == "float32" else partial(_tensor_core, interval=interval)
    return Products(*(partial(function, multiply=multiply) for function in (
        scaled_dot, scaled_grouped_dot, scaled_weight_gradient, scaled_grouped_weight_gradient)))


def _float32(a: Tiles, b: Tiles | Blocks) -> jax.Array:
    decoded = decode_tiles(b) if isinstance(b, Tiles) else decode_blocks(b)
    return jnp.einsum("mk,nk->mn", decode_tiles(a), decoded, precision=EXACT)


def _tensor_core(a: Tiles, b: Tiles | Blocks, *, interval: int) -> jax.Array:
    """Above 128, `interval` may span tiles: the recipe says that their scales are all the same."""
    every, missing = max(interval // TILE, 1), -a.values.shape[1] % interval
    b_scales = b.scales.T if isinstance(b, Tiles) else jnp.repeat(b.scales, TILE, axis=0)
    fill = lambda values: jnp.pad(values, [(0, 0), (0, missing)])
    return promoted_dot(fill(a.values), fill(b.values), a.scales.T[:, ::every], b_scales[:, ::every], interval,
                        tensor_core=True)


def scaled_dot(a: Tiles, b: Blocks | Tiles, out_dtype: jnp.dtype, *, multiply: Callable = _float32) -> jax.Array:
    """a [M, K] b [N, K]^T, rounded once to `out_dtype`: [M, N]."""
    return multiply(a, b).astype(out_dtype)


def scaled_grouped_dot(
    a: Tiles, b: Blocks, expert_Z: jax.Array, out_dtype: jnp.dtype, *, multiply: Callable = _float32,
) -> jax.Array:
    """Every block of 128 rows of a [J, K] times the matrix of its own expert, b [E, N, K]: [J, N].

    `expert_Z` int32 [J / 128] names the expert of every block.
    """
    chosen = jax.tree.map(lambda array: array[expert_Z], b)
    out_ZMN = _each(multiply, _row_blocks(a), chosen)
    return out_ZMN.reshape(-1, out_ZMN.shape[2]).astype(out_dtype)


def scaled_weight_gradient(a: Tiles, b: Tiles, *, multiply: Callable = _float32) -> jax.Array:
    """a [D, T] b [F, T]^T over tokens: float32 [D, F]."""
    return multiply(a, b)


def scaled_grouped_weight_gradient(
    a: Tiles, b: Tiles, start_E: jax.Array, steps_E: jax.Array, *, multiply: Callable = _float32,
) -> jax.Array:
    """`scaled_weight_gradient` over the rows of each expert alone, a [D, J] and b [F, J]: float32 [E, D, F].

    Expert e has `steps_E[e]` blocks of 128 rows from row `start_E[e]` on; zero for an expert without rows.
    """
    n_blocks = a.values.shape[1] // TILE
    block_Z1, first_E = jnp.arange(n_blocks)[:, None], start_E // TILE
    mine_ZE = (block_Z1 >= first_E[None]) & (block_Z1 < (first_E + steps_E)[None])
    expert_Z = jnp.where(jnp.any(mine_ZE, axis=1), jnp.argmax(mine_ZE, axis=1), len(start_E))  # outside: dropped
    d_w_ZDF = _each(multiply, *map(_column_blocks, (a, b)))
    d_w_EDF = jnp.zeros((len(start_E), *d_w_ZDF.shape[1:]), jnp.float32)
    return d_w_EDF.at[expert_Z].add(d_w_ZDF, mode="drop")


def _each(multiply: Callable, a: Tiles, b: Tiles | Blocks) -> jax.Array:
    """One product per entry of the leading axis: all at once, or in turn where a product is itself a long loop."""
    if multiply is _float32:
        return jax.vmap(multiply)(a, b)
    return jax.lax.map(lambda pair: multiply(*pair), (a, b))


def _row_blocks(a: Tiles) -> Tiles:
    """[J, K] as [Z, 128, K]."""
    rows, columns = a.values.shape
    return Tiles(a.values.reshape(-1, TILE, columns), a.scales.reshape(-1, rows // TILE, TILE).swapaxes(0, 1))


def _column_blocks(a: Tiles) -> Tiles:
    """[R, J] as [Z, R, 128]."""
    rows, columns = a.values.shape
    return Tiles(a.values.reshape(rows, -1, TILE).swapaxes(0, 1), a.scales[:, None])
