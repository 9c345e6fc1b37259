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
from dsv3.kernels.grouped_dot import block_experts, block_starts, of_experts, padded_rows
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
    multiply, every = _float32, 1
    if accumulator == "hopper":
        multiply, every = partial(_tensor_core, interval=interval), max(interval // TILE, 1)
    *others, grouped = (partial(function, multiply=multiply) for function in (
        scaled_dot, scaled_grouped_dot, scaled_weight_gradient, scaled_grouped_weight_gradient))
    return Products(*others, partial(grouped, every=every))


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


def scaled_dot(
    a: Tiles, b: Blocks | Tiles, shape: tuple[int, int], dtype: jnp.dtype, *, multiply: Callable = _float32,
) -> jax.Array:
    """The first m rows and n columns, `shape`, of a [M, K] b [N, K]^T, rounded once to `dtype`."""
    m, n = shape
    return multiply(a, b)[:m, :n].astype(dtype)


def scaled_grouped_dot(
    a: Tiles, b: Blocks, expert_Z: jax.Array, out_dtype: jnp.dtype, *, multiply: Callable = _float32,
) -> jax.Array:
    """Every block of 128 rows of a [J, K] times the matrix of its own expert, b [E, N, K]: [J, N].

    `expert_Z` int32 [J / 128] names the expert of every block; E is none, whose blocks give zeros.
    """
    chosen = jax.tree.map(lambda array: of_experts(array, expert_Z), b)
    out_ZMN = _each(multiply, _row_blocks(a), chosen)
    return out_ZMN.reshape(-1, out_ZMN.shape[2]).astype(out_dtype)


def scaled_weight_gradient(a: Tiles, b: Tiles, *, multiply: Callable = _float32) -> jax.Array:
    """a [D, T] b [F, T]^T over tokens: float32 [D, F]."""
    return multiply(a, b)


def scaled_grouped_weight_gradient(
    a: Tiles, b: Tiles, start_E: jax.Array, steps_E: jax.Array, *, multiply: Callable = _float32, every: int = 1,
) -> jax.Array:
    """`scaled_weight_gradient` over the rows of each expert alone, a [D, J] and b [F, J]: float32 [E, D, F].

    Expert e has `steps_E[e]` blocks of 128 rows from row `start_E[e]` on; zero for an expert without rows. `every`
    blocks of an expert are one product: as many as may be summed before they are promoted.
    """
    n_blocks, n_experts = a.values.shape[1] // TILE, len(start_E)
    n_groups = padded_rows(n_blocks, n_experts, every) // every
    expert_G = block_experts(steps_E, n_groups, every)
    own_Gn = jnp.arange(n_groups * every).reshape(n_groups, every) - block_starts(steps_E, every)[expert_G][:, None]
    block_Gn = jnp.where(own_Gn < steps_E[expert_G][:, None], own_Gn + (start_E // TILE)[expert_G][:, None], n_blocks)
    d_w_GDF = _each(multiply, *(_column_groups(x, block_Gn) for x in (a, b)))
    return jnp.zeros((n_experts, *d_w_GDF.shape[1:]), jnp.float32).at[expert_G].add(d_w_GDF)


def _each(multiply: Callable, a: Tiles, b: Tiles | Blocks) -> jax.Array:
    """One product per entry of the leading axis: all at once, or in turn where a product is itself a long loop."""
    if multiply is _float32:
        return jax.vmap(multiply)(a, b)
    return jax.lax.map(lambda pair: multiply(*pair), (a, b))


def _row_blocks(a: Tiles) -> Tiles:
    """[J, K] as [Z, 128, K]."""
    rows, columns = a.values.shape
    n_blocks = rows // TILE
    return Tiles(a.values.reshape(n_blocks, TILE, columns),
                 a.scales.reshape(len(a.scales), n_blocks, TILE).swapaxes(0, 1))


def _column_groups(a: Tiles, block_Gn: jax.Array) -> Tiles:
    """[R, J] as [G, R, 128 n]: the named blocks of 128 columns side by side; zeros for a block beyond the last."""
    rows, (n_groups, n) = len(a.values), block_Gn.shape
    blocks_Gn = a.values.reshape(rows, -1, TILE).swapaxes(0, 1).at[block_Gn].get(mode="fill", fill_value=0)
    return Tiles(blocks_Gn.swapaxes(1, 2).reshape(n_groups, rows, n * TILE),
                 a.scales.at[block_Gn].get(mode="fill", fill_value=1))
