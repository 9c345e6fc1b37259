"""The frame of the attention kernels on Hopper: tiles of 128 positions, shared out evenly and multiplied in turns.

A multiprocessor keeps 128 positions of one head in shared memory and streams blocks of others past them. One warpgroup
copies, running ahead across tiles; two multiply, 64 rows of the tile each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NOPE, ROPE, VALUE = 128, 64, 128
"""Widths of a head: the key's own part, its rotary part, the value (report section 4.2)."""
KEY = NOPE + ROPE
GROUPS, HALF = 2, 64
"""Warpgroups that multiply, and the rows of each: the height of a Hopper matrix instruction."""
ROWS = GROUPS * HALF
"""Of a tile."""
CHUNK = 32
"""Columns of the output that are staged at once."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on any other number the kernels are right, only less evenly spread."""
START_REGISTERS = 168
"""Of a thread of three warpgroups. What the one that copies gives back must be enough for what the others ask for, or
they wait for ever."""
MATRIX, PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Tile(NamedTuple):
    """`ROWS` positions from `row` on, of one head of one row of the batch, and the blocks that they meet."""

    batch: jax.Array
    head: jax.Array
    row: jax.Array
    first: jax.Array
    last: jax.Array


def operand(*shape: int) -> plgpu.SMEM:
    """Shared memory for a matrix (or several) in the layout that tensor cores and the copy engine agree on."""
    swizzle = min(128, 2 * shape[-1])
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def flat(x_BTHX: jax.Array) -> jax.Array:
    """[B, T, H * X], of which a head is a run of columns. Rows come in eights: zeros are added to other lengths."""
    x_BTX = x_BTHX.reshape(*x_BTHX.shape[:2], -1)
    return jnp.pad(x_BTX, ((0, 0), (0, -x_BTX.shape[1] % 8), (0, 0))) if x_BTX.shape[1] % 8 else x_BTX


def whole_tiles(x: jax.Array, mode: str) -> jax.Array:
    """The last axis in whole tiles, padded as jnp.pad does."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % ROWS)], mode=mode)


def overlapping(segment_ids_BT: jax.Array, rows: int, columns: int) -> jax.Array:
    """[B, T / rows, T / columns]: whether a block of `columns` may share a segment with a block of `rows`.

    Ids in any order: what is told apart are the ranges of both, so a block may be kept for nothing, never lost.
    """
    blocks = lambda size: segment_ids_BT.reshape(segment_ids_BT.shape[0], -1, size)
    bounds = lambda size: (jnp.min(blocks(size), axis=2), jnp.max(blocks(size), axis=2))
    (low_BI, high_BI), (low_BJ, high_BJ) = bounds(rows), bounds(columns)
    return (low_BI[:, :, None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BI[:, :, None])


def first_blocks(segment_ids_BT: jax.Array, block: int) -> jax.Array:
    """[B, T / ROWS]: the first block of keys that any query of a tile may see."""
    return jnp.argmax(overlapping(segment_ids_BT, ROWS, block), axis=2).astype(jnp.int32)


def last_blocks(segment_ids_BT: jax.Array, block: int, length: int) -> jax.Array:
    """[B, T / ROWS]: the last block of queries that may see any key of a tile."""
    seen_BIJ = overlapping(segment_ids_BT, ROWS, block)[:, :, :pl.cdiv(length, block)]
    return seen_BIJ.shape[2] - 1 - jnp.argmax(seen_BIJ[:, :, ::-1], axis=2).astype(jnp.int32)


def each_tile(batch: int, heads: int, tiles: int, body: Callable, carry: Any) -> Any:
    """`carry = body(batch, head, tile, carry)` for this multiprocessor's share of all tiles.

    Its share are pairs of a long tile and a short one; neighbouring multiprocessors have the same head, for the cache.
    """
    pairs = pl.cdiv(tiles, 2)

    def one_pair(loop, carry):
        index, pair = lax.div(loop.index[0], jnp.int32(pairs)), lax.rem(loop.index[0], jnp.int32(pairs))
        row, head = lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads))
        alone = 2 * pair + 1 == tiles
        one = lambda second, carry: body(row, head, jnp.where(second == 0, tiles - 1 - pair, pair), carry)
        return lax.fori_loop(jnp.int32(0), jnp.where(alone, jnp.int32(1), jnp.int32(2)), one, carry)

    return plgpu.nd_loop((batch * heads * pairs,), collective_axes="multiprocessor", init_carry=carry)(one_pair)


def multiprocessors(batch: int, heads: int, tiles: int) -> int:
    return min(MULTIPROCESSORS, batch * heads * pl.cdiv(tiles, 2))


def wait_for(barriers, count: jax.Array, stages: int) -> None:
    """Before the slot of the `count`-th use is filled: until its use before that is over."""
    @pl.when(count >= stages)
    def _():
        plgpu.barrier_wait(barriers.at[lax.rem(count, jnp.int32(stages))])


def drain(barriers, count: jax.Array, stages: int) -> None:
    """At the end no barrier is left with an arrival that nobody saw."""
    for last in range(stages):
        wait_for(barriers, jnp.where(count > last, count - 1 - last + stages, 0), stages)


def own_half(group: jax.Array):
    """This warpgroup's rows of a tile. Opaque, or all their addresses would stay in registers through a loop."""
    return pl.ds(lax.optimization_barrier(group) * HALF, HALF)


def visible(row, column, shape: tuple[int, int], ids: tuple | None, *, diagonal: bool) -> jax.Array | None:
    """Which scores of queries from `row` on and keys from `column` on count, or None where all do.

    Those of earlier positions (asked for with `diagonal`) of the same segment (`ids` of rows and of columns).
    """
    mask = None
    if diagonal:
        position = lambda start, axis: start + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)
        mask = position(row, 0) >= position(column, 1)
    return _and_same_segment(mask, shape, ids)


def visible_below(row, positions: jax.Array | None, shape: tuple[int, int], ids: tuple | None) -> jax.Array | None:
    """The same of transposed scores: keys from `row` on, and queries at `positions` where the diagonal is near."""
    mask = None
    if positions is not None:
        keys = row + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        mask = keys <= lax.broadcast_in_dim(positions, shape, (1,))
    return _and_same_segment(mask, shape, ids)


def _and_same_segment(mask: jax.Array | None, shape: tuple[int, int], ids: tuple | None) -> jax.Array | None:
    if ids is None:
        return mask
    same = lax.broadcast_in_dim(ids[0], shape, (0,)) == lax.broadcast_in_dim(ids[1], shape, (1,))
    return same if mask is None else mask & same


def zeros(width: int) -> jax.Array:
    """Sums of this warpgroup's rows, to begin with."""
    return plgpu.layout_cast(jnp.zeros((HALF, width), jnp.float32), MATRIX)


def in_turn(shared, group: jax.Array, turns: bool, issue: Callable, after: Callable, *accumulators: int) -> Any:
    """`after(*refs)`, once `issue(*refs)` has issued products into accumulators of so many columns in its turn.

    The turn is awaited before there are accumulators: only without a branch in between does the assembler make zeros of
    a fresh one by the product itself.
    """
    if turns:
        plgpu.barrier_wait(shared.turn.at[group])

    def run(*refs):
        issue(*refs)
        if turns:
            plgpu.barrier_arrive(shared.turn.at[1 - group])
        return after(*refs)

    return pl.run_scoped(run, *(plgpu.ACC((HALF, width)) for width in accumulators))


def with_turns(shared, group: jax.Array, turns: bool, run: Callable) -> None:
    """The first warpgroup begins; both take the same number of turns, so one is left over at the end."""
    if turns:
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))
    run()
    if turns:
        pl.when(group == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))


def write(values: jax.Array, staging, target: Callable) -> None:
    """This warpgroup's rows, rounded, to `target(first column)`, through the buffers of `staging` in turn.

    The copy engine empties one while the other is filled. Calls must leave the first buffer as the next in turn.
    """
    buffers, _, width = staging.shape
    for i in range(values.shape[1] // width):
        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        staging.at[i % buffers][...] = values[:, i * width:(i + 1) * width].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[i % buffers], target(i * width))


def last_block(tile: jax.Array, block: int, length: int) -> jax.Array:
    """Where the last of a tile's queries is."""
    return lax.div(lax.min(tile * ROWS + ROWS, jnp.int32(length)) - 1, jnp.int32(block))


def split_roles(group: jax.Array, registers: tuple[int, int], produce: Callable, consume: Callable) -> None:
    """The others multiply, the last warpgroup copies, with so many registers a thread."""
    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        produce()

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        consume()
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)  # shared memory must outlive what is copied out of it


def launch(kernel: Callable, out_type: list, n_blocks: int) -> Callable:
    """Persistent thread blocks of two warpgroups that multiply and one that copies."""
    return plgpu.kernel(
        kernel, out_type=out_type, grid=(n_blocks,), grid_names=("multiprocessor",), num_threads=GROUPS + 1,
        thread_name="group", compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True, reduction_scratch_bytes=0))
