"""Block-scaled FP8 products on Hopper's tensor cores: one persistent Pallas kernel, dense or grouped, and its gradient.

On every multiprocessor one warpgroup streams operand tiles and activation scales into shared memory, running ahead
across output tiles, while two others multiply, each its half of a tile's rows. Every 128 elements of the inner
dimension make a fresh accumulator of the tensor core; its partial sum is scaled and added up in float32 registers
(report section 3.3.2), while the other warpgroup's products run. Two neighbouring multiprocessors may work on
neighbouring columns of the same rows and load those rows once for both.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.kernels.scaled import Blocks, Tiles

ROWS = 128
"""Of an output tile: two warpgroups of 64, the height of a Hopper matrix instruction."""
DEPTH = 128
"""Of one step: elements that share a scale, and 128 bytes, the widest swizzle."""
AHEAD = 2
"""Steps whose operands have arrived before a warpgroup starts a product."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on any other number the kernel is right, only less evenly spread."""


class Tuning(NamedTuple):
    """How a product is cut.

    `width`: columns of a tile; `stages`: steps in flight; `pair`: which operand two neighbouring multiprocessors load
    once for both, the rows of `a` ("a"), the columns of `b` ("b") or none; `band`: tiles that share a band of rows.
    """

    width: int
    stages: int
    pair: str | None
    band: int
    doubled: bool = False
    ordered: bool = False
    piece: int = 128


class Tile(NamedTuple):
    """One output tile: its steps, where its operands and scales are at a step, and where a piece of it goes."""

    steps: int | jax.Array
    a: Callable[[jax.Array], Any]
    a_scales: Callable[[jax.Array], Any]
    b: Callable[[jax.Array], Any]
    b_scales: Callable[[jax.Array], Any]
    out: Callable[[Any, int, int], Any]


def _transforms(width: int, dtype: jnp.dtype) -> tuple:
    """The layout of `width` columns in shared memory that tensor cores and the copy engine agree on."""
    swizzle = plgpu.find_swizzle(width * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _down(scale: jax.Array, width: int) -> jax.Array:
    """The scales of 64 rows, in every column."""
    return lax.broadcast_in_dim(scale, (len(scale), width), (0,))


def _across(scale: jax.Array, height: int) -> jax.Array:
    """The scales of columns, in every row."""
    return lax.broadcast_in_dim(scale, (height, len(scale)), (1,))


def _kernel(*refs, tile_of: Callable, n_tiles: int, column_scales: bool, tuning: Tuning, out_dtype, types: tuple):
    """`column_scales`: b has a scale for every column, which comes with its tile; otherwise one for 128 x 128."""
    width, stages, pair = tuning[:3]
    half_rows = ROWS // 2
    doubled = tuning.doubled
    piece = math.gcd(width, tuning.piece // jnp.dtype(out_dtype).itemsize)
    segment = 32 if column_scales else math.gcd(width, DEPTH)  # columns of one scale
    barrier = partial(plgpu.ClusterBarrier, collective_axes=("pair",)) if pair else plgpu.Barrier
    scratch = dict(
        a_smem=plgpu.SMEM((stages, ROWS, DEPTH), types[0], transforms=_transforms(DEPTH, types[0])),
        b_smem=plgpu.SMEM((stages, width, DEPTH), types[1], transforms=_transforms(DEPTH, types[1])),
        a_scales_smem=plgpu.SMEM((stages, ROWS), jnp.float32),
        b_scales_smem=plgpu.SMEM((stages, width), jnp.float32) if column_scales else None,
        out_smem=plgpu.SMEM((2, 2, half_rows, piece), out_dtype, transforms=_transforms(piece, out_dtype)),
        full=plgpu.Barrier(num_arrivals=3 + column_scales, num_barriers=stages),
        empty=barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=2))

    @partial(pl.run_scoped, **scratch, collective_axes="group")
    def _(a_smem, b_smem, a_scales_smem, b_scales_smem, out_smem, full, empty, turn):
        group = lax.axis_index("group")
        together = lambda operand: dict(collective_axes=("pair",)) if pair == operand else {}
        each_tile = partial(plgpu.nd_loop, (n_tiles,), collective_axes="multiprocessor")

        @pl.when(group == 2)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            @each_tile(init_carry=jnp.int32(0))
            def count(loop, carry):
                tile = tile_of(loop.index[0], *refs)

                def load(step, count):
                    slot = lax.rem(count, jnp.int32(stages))

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    copy = lambda source, target, operand: plgpu.copy_gmem_to_smem(
                        source, target.at[slot], full.at[slot], **together(operand))
                    copy(tile.a(step), a_smem, "a")
                    copy(tile.b(step), b_smem, "b")
                    copy(tile.a_scales(step), a_scales_smem, "own")
                    if column_scales:
                        copy(tile.b_scales(step), b_scales_smem, "own")
                    return count + 1

                return lax.fori_loop(0, tile.steps, load, carry)

            for ahead in range(AHEAD):  # consumers wait for so many steps more than there are
                slot = lax.rem(count + ahead, jnp.int32(stages))

                @pl.when(count + ahead >= stages)
                def _(slot=slot):
                    plgpu.barrier_wait(empty.at[slot])

                for _ in range(3 + column_scales):
                    plgpu.barrier_arrive(full.at[slot])

            for last in range(stages - AHEAD):  # no barrier is left with an arrival that nobody saw
                @pl.when(count > last)
                def _(last=last):
                    plgpu.barrier_wait(empty.at[lax.rem(count - 1 - last, jnp.int32(stages))])

        @pl.when(group < 2)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            half = pl.ds(group * half_rows, half_rows)

            def my_turn():
                if tuning.ordered:
                    plgpu.barrier_wait(turn.at[group])

            def your_turn():
                if tuning.ordered:
                    plgpu.barrier_arrive(turn.at[1 - group])

            if tuning.ordered:
                @pl.when(group == 1)
                def _():
                    plgpu.barrier_arrive(turn.at[0])

            def after(slot, steps=1):
                slot = slot + steps
                return slot - jnp.where(slot >= stages, stages, 0)

            def ready(*slots):
                for slot in slots:
                    plgpu.barrier_wait(full.at[slot])

            def rows_scale(slot):
                """The scales of this warpgroup's rows; read as soon as they are there."""
                ready(slot)
                if column_scales:
                    return slot
                return plgpu.load(a_scales_smem, (slot, half), layout=plgpu.Layout.WGMMA.reduce(1))

            arrived = tuple(rows_scale(jnp.int32(slot)) for slot in range(AHEAD))

            @each_tile(init_carry=(jnp.int32(0), *arrived))
            def _(loop, carry):
                tile = tile_of(loop.index[0], *refs)

                def start(slot, acc):
                    plgpu.wgmma(acc, a_smem.at[slot, half], b_smem.at[slot].transpose((1, 0)))

                def factors_of(index):
                    return () if column_scales else tuple(tile.b_scales(lax.min(index, tile.steps - 1)))

                def promote(slot, row, factors, part, totals):
                    """Hand the slot back, and add the scaled partial sums to the totals."""
                    if column_scales:
                        row = plgpu.load(a_scales_smem, (slot, half), layout=plgpu.Layout.WGMMA.reduce(1))
                        sums = []
                        for i, total in enumerate(totals):
                            columns = pl.ds(i * segment, segment)
                            column = plgpu.load(b_scales_smem, (slot, columns), layout=plgpu.Layout.WGMMA.reduce(0))
                            scale = _down(row, segment) * _across(column, half_rows)
                            sums.append(total + part[:, i * segment:(i + 1) * segment] * scale)
                        plgpu.barrier_arrive(empty.at[slot])
                        return sums
                    plgpu.barrier_arrive(empty.at[slot])
                    return [total + part[:, i * segment:(i + 1) * segment] * _down(row * factor, segment)
                            for i, (total, factor) in enumerate(zip(totals, factors, strict=True))]

                def single(index, state):
                    slot, row, next_row, factors, *totals = state
                    next_factors = factors_of(index + 1)
                    my_turn()

                    def multiply(acc):
                        start(slot, acc)
                        your_turn()
                        ahead = rows_scale(after(slot, AHEAD))
                        return ahead, acc[...]

                    ahead, part = pl.run_scoped(multiply, plgpu.ACC((half_rows, width)))
                    return after(slot), next_row, ahead, next_factors, *promote(slot, row, factors, part, totals)

                def double(index, state):
                    """Two steps at once: while the second multiplies, the first is added up."""
                    early, early_row, late_row, factors, *totals = state
                    late = after(early)
                    late_factors, next_factors = factors_of(2 * index + 1), factors_of(2 * index + 2)
                    my_turn()

                    def multiply(first, second):
                        start(early, first)
                        start(late, second)
                        your_turn()
                        rows = rows_scale(after(early, AHEAD))
                        part = plgpu.wgmma_accumulator_load(first, wait_n=1)
                        sums = promote(early, early_row, factors, part, totals)
                        rows = rows, rows_scale(after(late, AHEAD))
                        return rows, sums, second[...]

                    rows, sums, part = pl.run_scoped(
                        multiply, plgpu.ACC((half_rows, width)), plgpu.ACC((half_rows, width)))
                    return after(late), *rows, next_factors, *promote(late, late_row, late_factors, part, sums)

                zero = plgpu.layout_cast(jnp.zeros((half_rows, segment), jnp.float32), plgpu.Layout.WGMMA)
                state = *carry, factors_of(0), *[zero] * (width // segment)
                if doubled:
                    state = lax.fori_loop(0, tile.steps // 2, double, state)
                    if not isinstance(tile.steps, int):
                        state = lax.fori_loop(tile.steps // 2 * 2, tile.steps, single, state)
                    elif tile.steps % 2:
                        state = single(tile.steps - 1, state)
                else:
                    state = lax.fori_loop(0, tile.steps, single, state)
                carry, (_, *totals) = state[:1 + AHEAD], state[1 + AHEAD:]
                for i in range(width // piece):
                    staged = out_smem.at[group, i % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    for first in range(i * piece, (i + 1) * piece, min(piece, segment)):
                        within = pl.ds(first - i * piece, min(piece, segment))
                        columns = slice(first % segment, first % segment + min(piece, segment))
                        staged.at[:, within][...] = totals[first // segment][:, columns].astype(out_dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged, tile.out(half, i * piece, piece))
                return carry

            if tuning.ordered:
                @pl.when(group == 0)
                def _():
                    plgpu.barrier_wait(turn.at[0])

            plgpu.wait_smem_to_gmem(0, wait_read_only=False)


def _call(tile_of, n_tiles: int, column_scales: bool, tuning: Tuning, out: jax.ShapeDtypeStruct, types: tuple, *args):
    kernel = partial(_kernel, tile_of=tile_of, n_tiles=n_tiles, column_scales=column_scales, tuning=tuning,
                     out_dtype=out.dtype, types=types)
    pairs = dict(cluster=(2,), cluster_names=("pair",)) if tuning.pair else {}
    return plgpu.kernel(
        kernel, out_type=out, grid=(min(MULTIPROCESSORS // (2 if tuning.pair else 1), n_tiles),),
        grid_names=("multiprocessor",), num_threads=3, thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup), **pairs)(*args)


def _grid(n_rows: int, n_columns: int, tuning: Tuning) -> tuple[int, Callable[[jax.Array], tuple]]:
    """How many tiles (or pairs of them), and from an index to the tile's row and column."""
    tall, wide = (2 if tuning.pair == operand else 1 for operand in ("b", "a"))
    shape = pl.cdiv(n_rows, tall), pl.cdiv(n_columns, wide)

    def place(index):
        row, column = plgpu.planar_snake(index, shape, 0, min(tuning.band, shape[0]))
        member = lax.axis_index("pair") if tuning.pair else 0
        return row * tall + (member if tall == 2 else 0), column * wide + (member if wide == 2 else 0)

    return shape[0] * shape[1], place


def rows_times_blocks(
    a: Tiles, b: Blocks, expert_Z: jax.Array | None, out: jax.ShapeDtypeStruct, tuning: Tuning,
) -> jax.Array:
    """a [M, K] times b [E, N, K] of the expert of every 128 rows (or b [N, K]): out [m <= M, n <= N]."""
    m, n = out.shape
    width = tuning.width
    n_tiles, place = _grid(pl.cdiv(m, ROWS), pl.cdiv(n, width), tuning)
    segment, n_blocks = math.gcd(width, DEPTH), b.scales.shape[-2]
    last_row = a.values.shape[0] // ROWS - 1

    def tile_of(index, *refs):
        experts, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref) = refs[:-5], refs[-5:]
        row, column = place(index)
        rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * width, width)
        which = (experts[0][lax.min(row, last_row)],) if experts else ()
        block = lambda i: lax.min(lax.div(column * width + i * segment, DEPTH), n_blocks - 1)
        return Tile(
            a.values.shape[1] // DEPTH,
            lambda step: a_ref.at[rows, pl.ds(step * DEPTH, DEPTH)],
            lambda step: a_scales_ref.at[step, rows],
            lambda step: b_ref.at[*which, columns, pl.ds(step * DEPTH, DEPTH)],
            lambda step: [b_scales_ref[*which, block(i), step] for i in range(width // segment)],
            lambda half, start, size: out_ref.at[
                pl.ds(row * ROWS + half.start, half.size), pl.ds(column * width + start, size)])

    arguments = () if expert_Z is None else (expert_Z,)
    return _call(tile_of, n_tiles, False, tuning, out, (a.values.dtype, b.values.dtype), *arguments, *a, *b)


def weight_gradient(
    a: Tiles, b: Tiles, start_E: jax.Array | None, steps_E: jax.Array | None, tuning: Tuning,
) -> jax.Array:
    """a [D, T] b [F, T]^T over all T (float32 [D, F]) or over every expert's own 128-blocks ([E, D, F])."""
    n_rows, n_columns = pl.cdiv(a.values.shape[0], ROWS), pl.cdiv(b.values.shape[0], tuning.width)
    n_tiles, place = _grid(n_rows, n_columns, tuning)
    n_experts = 1 if steps_E is None else len(steps_E)

    def tile_of(index, *refs):
        groups, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref) = refs[:-5], refs[-5:]
        expert, within = lax.div(index, n_tiles), lax.rem(index, n_tiles)
        row, column = place(within)
        rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * tuning.width, tuning.width)
        first, steps = (groups[0][expert], groups[1][expert]) if groups else (0, a.values.shape[1] // DEPTH)
        tokens = lambda step: pl.ds((first + step) * DEPTH, DEPTH)
        target = out_ref.at[expert] if groups else out_ref
        return Tile(
            steps,
            lambda step: a_ref.at[rows, tokens(step)],
            lambda step: a_scales_ref.at[first + step, rows],
            lambda step: b_ref.at[columns, tokens(step)],
            lambda step: b_scales_ref.at[first + step, columns],
            lambda half, start, size: target.at[
                pl.ds(row * ROWS + half.start, half.size), pl.ds(column * tuning.width + start, size)])

    shape = (a.values.shape[0], b.values.shape[0])
    out = jax.ShapeDtypeStruct(shape if steps_E is None else (n_experts, *shape), jnp.float32)
    arguments = () if steps_E is None else (start_E // DEPTH, steps_E)
    types = a.values.dtype, b.values.dtype
    return _call(tile_of, n_tiles * n_experts, True, tuning, out, types, *arguments, *a, *b)
