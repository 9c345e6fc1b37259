"""Block-scaled FP8 products on Hopper's tensor cores: one persistent Pallas kernel, dense or grouped, and its gradient.

On every multiprocessor one warpgroup streams operand tiles and their scales into shared memory, running ahead across
output tiles, while two others multiply, each its half of a tile's rows. Every 128 elements of the inner dimension make
a fresh accumulator of the tensor core, whose partial sums are scaled and added up in float32 registers (report section
3.3.2) while other products run: the two warpgroups take turns, and tiles that are narrow enough keep two accumulators
in flight. docs/kernels.md tells what was tried and measured.
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

from dsv3.config import require
from dsv3.kernels.scaled import Blocks, Tiles

ROWS = 128
"""Of an output tile: two warpgroups of `HALF`, the height of a Hopper matrix instruction."""
HALF = ROWS // 2
DEPTH = 128
"""Of one step: elements that share a scale, and 128 bytes, the widest swizzle."""
AHEAD = 2
"""Steps whose operands have arrived before a warpgroup starts a product."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on any other number the kernel is right, only less evenly spread."""
WARPS = 4
"""Of a warpgroup."""
CONSUMERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 2, 232, 40


class Tuning(NamedTuple):
    """How a product is cut.

    `width`: columns of a tile; `stages`: steps in flight; `pair`: the operand that two neighbouring multiprocessors
    load once for both, the rows of `a` ("a"), the columns of `b` ("b") or none; `band`: rows of tiles that are worked
    on together, column by column.
    """

    width: int = 128
    stages: int = 6
    pair: str | None = None
    band: int = 8

    @property
    def doubled(self) -> bool:
        """Whether the registers hold two accumulators beside the totals."""
        return self.width <= 128


class Tile(NamedTuple):
    """One output tile: its steps, where its operands and scales are at a step, and where a piece of it goes.

    `steps` are no fewer than `_least(tuning)`; those beyond `real` are of no account. None: all count.
    """

    steps: int | jax.Array
    real: jax.Array | None
    a: Callable[[jax.Array], Any]
    a_scales: Callable[[jax.Array], Any]
    b: Callable[[jax.Array], Any]
    b_scales: Callable[[jax.Array], Any]
    out: Callable[[jax.Array, int, int], Any]


class Shared(NamedTuple):
    """Shared memory of a multiprocessor: `stages` slots of operands and scales, pieces of output, barriers.

    A slot is `full` once its copies have landed and `empty` once both warpgroups are done with it. `turn` says which of
    them may start products. `b_scales` is None where b has one scale for 128 x 128.
    """

    a: Any
    b: Any
    a_scales: Any
    b_scales: Any
    out: Any
    full: Any
    empty: Any
    turn: Any


def _layout(width: int, dtype: jnp.dtype) -> tuple:
    """The layout of `width` columns in shared memory that tensor cores and the copy engine agree on."""
    swizzle = plgpu.find_swizzle(width * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _piece(width: int, dtype: jnp.dtype) -> int:
    """Columns of the output that are staged at once: 64 bytes."""
    return math.gcd(width, 64 // jnp.dtype(dtype).itemsize)


def _in_flight(piece: int, pieces: int) -> int:
    """Latest copies that may still be reading when this piece of a tile is staged: none from the same buffer.

    Pieces take the two buffers in turn; after an odd number of them the next tile begins with the buffer used last.
    """
    return 0 if piece == 0 and pieces % 2 else 1


def _scratch(tuning: Tuning, column_scales: bool, types: tuple, out_dtype: jnp.dtype) -> Shared:
    width, stages = tuning.width, tuning.stages
    empty = partial(plgpu.ClusterBarrier, collective_axes=("pair",)) if tuning.pair else plgpu.Barrier
    operand = lambda rows, dtype: plgpu.SMEM((stages, rows, DEPTH), dtype, transforms=_layout(DEPTH, dtype))
    piece = _piece(width, out_dtype)
    return Shared(
        a=operand(ROWS, types[0]),
        b=operand(width, types[1]),
        a_scales=plgpu.SMEM((stages, ROWS), jnp.float32),
        b_scales=plgpu.SMEM((stages, width), jnp.float32) if column_scales else None,
        out=plgpu.SMEM((2, 2, HALF, piece), out_dtype, transforms=_layout(piece, out_dtype)),
        full=plgpu.Barrier(num_arrivals=3 + column_scales, num_barriers=stages),
        empty=empty(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=2))


def _after(slot: jax.Array, steps: int, stages: int) -> jax.Array:
    slot = slot + steps
    return slot - jnp.where(slot >= stages, stages, 0)


def _produce(shared: Shared, each_tile: Callable, tile_at: Callable, tuning: Tuning) -> None:
    """Copy the operands of every step of every tile into the slots, in turn. Every slot belongs to one of four warps.

    A step costs a warp some 70 instructions, in slots of its scheduler that two multiplying warps need: with steps
    shared out, a fourth of that.
    """
    stages = jnp.int32(tuning.stages)
    together = lambda operand: dict(collective_axes=("pair",)) if tuning.pair == operand else {}

    @plgpu.warp_map
    def _(warp):
        def when_mine(slot):
            return pl.when(lax.bitwise_and(slot, jnp.int32(WARPS - 1)) == warp)

        def wait_until_empty(count, slot):
            @pl.when(count >= stages)
            def _():
                plgpu.barrier_wait(shared.empty.at[slot])

        @each_tile(init_carry=(jnp.int32(0), jnp.int32(0)))
        def state(loop, carry):
            tile = tile_at(loop.index[0])

            def load(step, state):
                count, slot = state

                @when_mine(slot)
                def _():
                    wait_until_empty(count, slot)
                    copy = lambda source, target, **how: plgpu.copy_gmem_to_smem(
                        source, target.at[slot], shared.full.at[slot], **how)
                    copy(tile.a(step), shared.a, **together("a"))
                    copy(tile.b(step), shared.b, **together("b"))
                    copy(tile.a_scales(step), shared.a_scales)
                    if shared.b_scales is not None:
                        copy(tile.b_scales(step), shared.b_scales)
                return count + 1, _after(slot, 1, tuning.stages)

            return lax.fori_loop(0, tile.steps, load, carry)

        count, slot = state
        for ahead in range(AHEAD):  # consumers wait for so many steps more than there are
            @when_mine(_after(slot, ahead, tuning.stages))
            def _(slot=_after(slot, ahead, tuning.stages), ahead=ahead):
                wait_until_empty(count + ahead, slot)
                for _ in range(3 + (shared.b_scales is not None)):
                    plgpu.barrier_arrive(shared.full.at[slot])
        for last in range(tuning.stages - AHEAD):  # no barrier is left with an arrival that nobody saw
            slot_of_last = _after(slot, tuning.stages - 1 - last, tuning.stages)

            @pl.when(lax.bitwise_and(count > last, lax.bitwise_and(slot_of_last, jnp.int32(WARPS - 1)) == warp))
            def _(slot=slot_of_last):
                plgpu.barrier_wait(shared.empty.at[slot])


def _least(tuning: Tuning) -> int:
    """Steps that every tile has, so that what the first of them hide can be straight code."""
    return 2 if tuning.doubled else 1


def _consume(shared: Shared, each_tile: Callable, tile_at: Callable, tuning: Tuning, group: jax.Array) -> None:
    """Multiply and promote one half of every tile, and write it out while the first products of the next one run."""
    width, stages = tuning.width, tuning.stages
    half = pl.ds(group * HALF, HALF)
    column_scales = shared.b_scales is not None
    segment = math.gcd(width, 32 if column_scales else DEPTH)
    """Columns whose totals are one array: they share a scale of b, or bound how many column scales are in registers."""
    after = partial(_after, stages=stages)
    down = lambda scale: lax.broadcast_in_dim(scale, (HALF, segment), (0,))
    across = lambda scale: lax.broadcast_in_dim(scale, (HALF, segment), (1,))
    row_scale = lambda slot: plgpu.load(shared.a_scales.at[slot, half], layout=plgpu.Layout.WGMMA.reduce(1))
    zero = plgpu.layout_cast(jnp.zeros((HALF, segment), jnp.float32), plgpu.Layout.WGMMA)

    def arrived(slot):
        """Wait for a slot; the scales of this half's rows, read at once (column scales keep them for later)."""
        plgpu.barrier_wait(shared.full.at[slot])
        return slot if column_scales else row_scale(slot)

    def start(slot, acc):
        plgpu.wgmma(acc, shared.a.at[slot, half], shared.b.at[slot].transpose((1, 0)))

    def scales(slot, row, factors):
        """Of every segment."""
        if not column_scales:
            return [down(row * factor) for factor in factors]
        column = lambda i: plgpu.load(
            shared.b_scales.at[slot, pl.ds(i * segment, segment)], layout=plgpu.Layout.WGMMA.reduce(0))
        return [down(row_scale(slot)) * across(column(i)) for i in range(width // segment)]

    def promote(slot, row, factors, part, totals):
        """Add the scaled partial sums to the totals, and hand the slot back as soon as nobody reads it."""
        if not column_scales:
            plgpu.barrier_arrive(shared.empty.at[slot])
        totals = [total + part[:, i * segment:(i + 1) * segment] * scale
                  for i, (total, scale) in enumerate(zip(totals, scales(slot, row, factors), strict=True))]
        if column_scales:
            if tuning.pair:  # one thread arrives for its warpgroup, on both multiprocessors: the others may still read
                plgpu.commit_smem()
            plgpu.barrier_arrive(shared.empty.at[slot])
        return totals

    def counted(totals, before, real, step):
        """Totals with a step, or as before it if the tile does not have that many."""
        if real is None:
            return totals
        counts = lax.broadcast_in_dim(real > step, (HALF, segment), ())
        return [lax.select(counts, total, old) for total, old in zip(totals, before, strict=True)]

    def write(index, totals):
        """A tile's half through two small buffers, which the copy engine empties while the next is filled.

        The first time there is no tile yet (`index` below 0): then nothing leaves the buffers.
        """
        tile = tile_at(lax.max(index, jnp.int32(0)))
        piece = shared.out.shape[-1]
        chunk = min(piece, segment)
        for i in range(width // piece):
            staged = shared.out.at[group, i % 2]
            plgpu.wait_smem_to_gmem(_in_flight(i, width // piece), wait_read_only=True)
            for first in range(i * piece, (i + 1) * piece, chunk):
                inside = first % segment
                staged.at[:, pl.ds(first - i * piece, chunk)][...] = totals[first // segment][:, inside:inside + chunk]
            plgpu.commit_smem()

            @pl.when(index >= 0)
            def _(i=i, staged=staged):
                plgpu.copy_smem_to_gmem(staged, tile.out(group, i * piece, piece))

    def multiply(tile, carry, meanwhile):
        """All steps of a tile; `meanwhile()` is called when the first products run.

        The carry is the next slot and the row scales of the slots that have arrived.
        """
        factors_of = lambda index: (
            () if column_scales else tuple(tile.b_scales(lax.min(jnp.int32(index), jnp.int32(tile.steps - 1)))))

        def single(index, state, meanwhile=None, real=None):
            slot, row, next_row, factors, *totals = state
            next_factors = factors_of(index + 1)

            def run(acc):
                start(slot, acc)
                if meanwhile:
                    meanwhile()
                return arrived(after(slot, AHEAD)), acc[...]

            last_row, part = pl.run_scoped(run, plgpu.ACC((HALF, width)))
            sums = counted(promote(slot, row, factors, part, totals), totals, real, 0)
            return after(slot, 1), next_row, last_row, next_factors, *sums

        def double(index, state, meanwhile=None, real=None):
            """Two steps: while the second multiplies, the first is promoted."""
            early, early_row, late_row, factors, *totals = state
            late = after(early, 1)
            late_factors, next_factors = factors_of(2 * index + 1), factors_of(2 * index + 2)
            plgpu.barrier_wait(shared.turn.at[group])
            # A last use for LLVM's register of zero: were it the second accumulator's, 64 moves would clear that.
            unused = plgpu.layout_cast(jnp.zeros(HALF, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

            def run(first, second):
                start(early, first)
                start(late, second)
                plgpu.barrier_arrive(shared.turn.at[1 - group])
                if meanwhile:
                    meanwhile()
                row = arrived(after(early, AHEAD))
                part = plgpu.wgmma_accumulator_load(first, wait_n=1)
                lax.optimization_barrier(unused)
                sums = counted(promote(early, early_row, factors, part, totals), totals, real, 0)
                return row, arrived(after(late, AHEAD)), sums, second[...]

            row, last_row, sums, part = pl.run_scoped(run, plgpu.ACC((HALF, width)), plgpu.ACC((HALF, width)))
            sums = counted(promote(late, late_row, late_factors, part, sums), sums, real, 1)
            return after(late, 1), row, last_row, next_factors, *sums

        begin = double if tuning.doubled else single
        state = begin(jnp.int32(0), (*carry, factors_of(0), *[zero] * (width // segment)), meanwhile, tile.real)
        done = 1
        if tuning.doubled:
            state = lax.fori_loop(1, tile.steps // 2, double, state)
            done = tile.steps // 2 * 2
        state = lax.fori_loop(done, tile.steps, single, state)
        return state[:1 + AHEAD], state[2 + AHEAD:]

    if tuning.doubled:
        @pl.when(group == 1)
        def _():
            plgpu.barrier_arrive(shared.turn.at[0])

    nothing = jnp.int32(-1), *[zero.astype(shared.out.dtype)] * (width // segment)

    @each_tile(init_carry=((jnp.int32(0), *(arrived(jnp.int32(slot)) for slot in range(AHEAD))), nothing))
    def last(loop, carry):
        carry, (before, *finished) = carry
        index = loop.index[0]
        carry, totals = multiply(tile_at(index), carry, lambda: write(before, finished))
        return carry, (index, *(total.astype(shared.out.dtype) for total in totals))

    write(last[1][0], last[1][1:])

    if tuning.doubled:
        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(shared.turn.at[0])

    plgpu.wait_smem_to_gmem(0, wait_read_only=False)


def _call(tile_of: Callable, n_tiles: int, column_scales: bool, tuning: Tuning, out: jax.ShapeDtypeStruct, *args):
    """Run `n_tiles` tiles (or pairs); `tile_of(index, *refs)` describes one. The last four of `args` are operands."""
    def kernel(*refs):
        tile_at = lambda index: tile_of(index, *refs)
        each_tile = partial(plgpu.nd_loop, (n_tiles,), collective_axes="multiprocessor")

        def run(**scratch):
            shared, group = Shared(**scratch), lax.axis_index("group")

            @pl.when(group == CONSUMERS)
            def _():
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                _produce(shared, each_tile, tile_at, tuning)

            @pl.when(group < CONSUMERS)
            def _():
                plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
                _consume(shared, each_tile, tile_at, tuning, group)

        scratch = _scratch(tuning, column_scales, (args[-4].dtype, args[-2].dtype), out.dtype)
        pl.run_scoped(run, **scratch._asdict(), collective_axes="group")

    require(tuning.stages > AHEAD, f"{tuning} would wait for ever: operands arrive {AHEAD} steps ahead, which takes at "
            f"least {AHEAD + 1} stages")
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


def _out(ref, row, column, width):
    return lambda group, start, size: ref.at[
        pl.ds(row * ROWS + group * HALF, HALF), pl.ds(column * width + start, size)]


def rows_times_blocks(
    a: Tiles, b: Blocks, expert_Z: jax.Array | None, out: jax.ShapeDtypeStruct, tuning: Tuning,
) -> jax.Array:
    """a [M, K] times b [E, N, K] of the expert of every 128 rows (or b [N, K]): out [m <= M, n <= N]."""
    require(expert_Z is None or tuning.pair != "b", f"{tuning}: neighbouring rows of tiles may belong to two "
            "experts, so they cannot share columns of b; use pair 'a' or None")
    m, n = out.shape
    width = tuning.width
    n_tiles, place = _grid(pl.cdiv(m, ROWS), pl.cdiv(n, width), tuning)
    segment, last_block, last_row = math.gcd(width, DEPTH), b.scales.shape[-2] - 1, a.values.shape[0] // ROWS - 1
    n_steps = a.values.shape[1] // DEPTH
    enough = n_steps >= _least(tuning)
    there = lambda step: step if enough else lax.min(step, jnp.int32(n_steps - 1))

    def tile_of(index, *refs):
        experts, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref) = refs[:-5], refs[-5:]
        row, column = place(index)
        rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * width, width)
        which = (experts[0][lax.min(row, last_row)],) if experts else ()
        block = lambda i: lax.min(lax.div(column * width + i * segment, DEPTH), last_block)
        depth = lambda step: pl.ds(there(step) * DEPTH, DEPTH)
        return Tile(
            max(n_steps, _least(tuning)), None if enough else jnp.int32(n_steps),
            lambda step: a_ref.at[rows, depth(step)],
            lambda step: a_scales_ref.at[there(step), rows],
            lambda step: b_ref.at[*which, columns, depth(step)],
            lambda step: [b_scales_ref[*which, block(i), there(step)] for i in range(width // segment)],
            _out(out_ref, row, column, width))

    arguments = () if expert_Z is None else (expert_Z,)
    return _call(tile_of, n_tiles, False, tuning, out, *arguments, *a, *b)


def weight_gradient(
    a: Tiles, b: Tiles, start_E: jax.Array | None, steps_E: jax.Array | None, tuning: Tuning,
) -> jax.Array:
    """a [D, T] b [F, T]^T over all T (float32 [D, F]), or over every expert's own tokens ([E, D, F], else zero).

    Expert e has the `steps_E[e]` blocks of 128 tokens from `start_E[e]`, a multiple of 128.
    """
    width = tuning.width
    require(width % 32 == 0, f"{tuning}: the copy engine needs the {width} scales of a tile's columns to fill a "
            "multiple of 128 bytes; use a width that is a multiple of 32")
    n_tiles, place = _grid(pl.cdiv(a.values.shape[0], ROWS), pl.cdiv(b.values.shape[0], width), tuning)
    shape, n_blocks = (a.values.shape[0], b.values.shape[0]), a.values.shape[1] // DEPTH

    def tile_of(index, *refs):
        groups, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref) = refs[:-5], refs[-5:]
        expert, within = lax.div(index, n_tiles), lax.rem(index, n_tiles)
        row, column = place(within)
        rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * width, width)
        first, real = (groups[0][expert], groups[1][expert]) if groups else (0, n_blocks)
        counted = groups or n_blocks < _least(tuning)
        block = lambda step: lax.min(first + step, jnp.int32(n_blocks - 1)) if counted else step
        depth = lambda step: pl.ds(block(step) * DEPTH, DEPTH)
        return Tile(
            lax.max(jnp.int32(real), jnp.int32(_least(tuning))) if counted else n_blocks,
            jnp.int32(real) if counted else None,
            lambda step: a_ref.at[rows, depth(step)],
            lambda step: a_scales_ref.at[block(step), rows],
            lambda step: b_ref.at[columns, depth(step)],
            lambda step: b_scales_ref.at[block(step), columns],
            _out(out_ref.at[expert] if groups else out_ref, row, column, width))

    if steps_E is None:
        return _call(tile_of, n_tiles, True, tuning, jax.ShapeDtypeStruct(shape, jnp.float32), *a, *b)
    out = jax.ShapeDtypeStruct((len(steps_E), *shape), jnp.float32)
    return _call(tile_of, n_tiles * len(steps_E), True, tuning, out, start_E // DEPTH, steps_E, *a, *b)
