"""What the warpgroups of a block-scaled product do: one copies, two multiply, promote and write (docs/kernels.md).

One warpgroup streams operand tiles and their scales into shared memory, running ahead across output tiles, while two
others multiply, each its half of a tile's rows (one, where a tile is half as high). Every 128 elements of the inner
dimension make a fresh accumulator of the tensor core, whose partial sums are scaled and added up in float32 registers
(report section 3.3.2) while other products run: the two warpgroups take turns, and tiles that are small enough keep two
or four accumulators in flight. A tile is written out under the first products of the next.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128
"""Of an output tile: two warpgroups of `HALF`, the height of a Hopper matrix instruction. A tile may have one."""
HALF = ROWS // 2
DEPTH = 128
"""Of one step: elements that share a scale, and 128 bytes, the widest swizzle."""
WARPS = 4
"""Of a warpgroup."""


class Tuning(NamedTuple):
    """How a product is cut.

    `width`: columns of a tile; `stages`: steps in flight; `pair`: the operand that two neighbouring multiprocessors
    load once for both, the rows of `a` ("a"), the columns of `b` ("b") or none; `band`: rows of tiles that are worked
    on together, column by column; `rows`: of a tile, `ROWS` or `HALF`.
    """

    width: int = 128
    stages: int = 6
    pair: str | None = None
    band: int = 8
    rows: int = ROWS

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return self.rows // HALF

    @property
    def flight(self) -> int:
        """Accumulators that the registers hold beside the totals.

        A warpgroup without a neighbour has four if it can: nobody else multiplies while it promotes the last of them.
        """
        if self.width > 128:
            return 1
        return 4 if self.groups == 1 and self.width <= 64 else 2

    @property
    def turns(self) -> bool:
        """Whether two warpgroups start their products in turn."""
        return self.groups == 2 and self.flight > 1

    @property
    def least(self) -> int:
        """Steps that every tile has: those of its first products, which hide how the tile before is written."""
        return self.flight

    @property
    def ahead(self) -> int:
        """Steps whose operands have arrived before a warpgroup starts its products."""
        return max(2, self.flight)


class Tile(NamedTuple):
    """One output tile: its steps, where its operands and scales are at a step, and where a piece of it goes.

    `steps` are no fewer than `Tuning.least`; those beyond `real` are of no account (None: all count).
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

    A slot is `full` once its copies have landed and `empty` once all multiplying warpgroups are done with it. `turn`
    says which of two may start products. `b_scales` is None where b has one scale for 128 x 128.
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


def scratch(tuning: Tuning, column_scales: bool, types: tuple, out_dtype: jnp.dtype) -> Shared:
    width, stages, groups = tuning.width, tuning.stages, tuning.groups
    empty = partial(plgpu.ClusterBarrier, collective_axes=("pair",)) if tuning.pair else plgpu.Barrier
    operand = lambda rows, dtype: plgpu.SMEM((stages, rows, DEPTH), dtype, transforms=_layout(DEPTH, dtype))
    piece = _piece(width, out_dtype)
    return Shared(
        a=operand(tuning.rows, types[0]),
        b=operand(width, types[1]),
        a_scales=plgpu.SMEM((stages, tuning.rows), jnp.float32),
        b_scales=plgpu.SMEM((stages, width), jnp.float32) if column_scales else None,
        out=plgpu.SMEM((groups, 2, HALF, piece), out_dtype, transforms=_layout(piece, out_dtype)),
        full=plgpu.Barrier(num_arrivals=3 + column_scales, num_barriers=stages),
        empty=empty(num_arrivals=groups, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=2))


def _after(slot: jax.Array, steps: int, stages: int) -> jax.Array:
    slot = slot + steps
    return slot - jnp.where(slot >= stages, stages, 0)


def _load(shared: Shared, tile: Tile, step: jax.Array, slot: jax.Array, pair: str | None) -> None:
    """Start the copies of a step's operands and scales into a slot."""
    copy = lambda source, target, **how: plgpu.copy_gmem_to_smem(source, target.at[slot], shared.full.at[slot], **how)
    together = lambda operand: dict(collective_axes=("pair",)) if pair == operand else {}
    copy(tile.a(step), shared.a, **together("a"))
    copy(tile.b(step), shared.b, **together("b"))
    copy(tile.a_scales(step), shared.a_scales)
    if shared.b_scales is not None:
        copy(tile.b_scales(step), shared.b_scales)


def produce(shared: Shared, each_tile: Callable, tile_at: Callable, tuning: Tuning) -> None:
    """Copy the operands of every step of every tile into the slots, in turn.

    A step takes some 70 instructions, out of time in which schedulers serve the multiplying warps. So the slots are
    shared out: each belongs to one of the four warps, and so to one scheduler.
    """
    stages = tuning.stages
    slot_after = lambda slot, steps: _after(slot, steps, stages)

    @plgpu.warp_map
    def _(warp):
        mine = lambda slot: lax.bitwise_and(slot, jnp.int32(WARPS - 1)) == warp

        def wait_until_empty(count, slot):
            pl.when(count >= stages)(partial(plgpu.barrier_wait, shared.empty.at[slot]))

        @each_tile(init_carry=(jnp.int32(0), jnp.int32(0)))
        def state(loop, carry):
            tile = tile_at(loop.index[0])

            def step(number, state):
                count, slot = state

                @pl.when(mine(slot))
                def _():
                    wait_until_empty(count, slot)
                    _load(shared, tile, number, slot, tuning.pair)

                return count + 1, slot_after(slot, 1)

            return lax.fori_loop(0, tile.steps, step, carry)

        count, slot = state
        for ahead in range(tuning.ahead):  # consumers wait for so many steps more than there are
            @pl.when(mine(slot_after(slot, ahead)))
            def _(slot=slot_after(slot, ahead), count=count + ahead):
                wait_until_empty(count, slot)
                for _ in range(3 + (shared.b_scales is not None)):
                    plgpu.barrier_arrive(shared.full.at[slot])
        for last in range(stages - tuning.ahead):  # no barrier is left with an arrival that nobody saw
            one = slot_after(slot, stages - 1 - last)
            pl.when(lax.bitwise_and(count > last, mine(one)))(partial(plgpu.barrier_wait, shared.empty.at[one]))


class Half(NamedTuple):
    """A multiplying warpgroup (`group`), and what it does for its 64 rows of every tile.

    `adds`: the copy engine adds its sums to what the output holds.
    """

    shared: Shared
    tuning: Tuning
    group: jax.Array
    adds: bool

    @property
    def rows(self):
        return pl.ds(self.group * HALF, HALF)

    @property
    def column_scales(self) -> bool:
        return self.shared.b_scales is not None

    @property
    def segment(self) -> int:
        """Columns whose totals are one array: they share a scale of b, or bound how many scales are in registers."""
        return math.gcd(self.tuning.width, 32 if self.column_scales else DEPTH)

    def after(self, slot: jax.Array, steps: int) -> jax.Array:
        return _after(slot, steps, self.tuning.stages)

    def zeros(self) -> list[jax.Array]:
        zero = plgpu.layout_cast(jnp.zeros((HALF, self.segment), jnp.float32), plgpu.Layout.WGMMA)
        return [zero] * (self.tuning.width // self.segment)

    def row_scale(self, slot: jax.Array) -> jax.Array:
        return plgpu.load(self.shared.a_scales.at[slot, self.rows], layout=plgpu.Layout.WGMMA.reduce(1))

    def arrived(self, slot: jax.Array) -> jax.Array:
        """Wait for a slot; the scales of this half's rows, read at once (column scales keep them for later)."""
        plgpu.barrier_wait(self.shared.full.at[slot])
        return slot if self.column_scales else self.row_scale(slot)

    def start(self, slot: jax.Array, accumulator: Any) -> None:
        plgpu.wgmma(accumulator, self.shared.a.at[slot, self.rows], self.shared.b.at[slot].transpose((1, 0)))

    def scales(self, slot: jax.Array, row: jax.Array, factors: tuple) -> list[jax.Array]:
        """Of every segment."""
        down = lambda scale: lax.broadcast_in_dim(scale, (HALF, self.segment), (0,))
        across = lambda scale: lax.broadcast_in_dim(scale, (HALF, self.segment), (1,))
        if not self.column_scales:
            return [down(row * factor) for factor in factors]
        column = lambda i: plgpu.load(self.shared.b_scales.at[slot, pl.ds(i * self.segment, self.segment)],
                                      layout=plgpu.Layout.WGMMA.reduce(0))
        return [down(self.row_scale(slot)) * across(column(i)) for i in range(self.tuning.width // self.segment)]

    def promote(self, slot: jax.Array, row: jax.Array, factors: tuple, part: jax.Array, totals: list) -> list:
        """Add the scaled partial sums to the totals, and hand the slot back as soon as nobody reads it."""
        if not self.column_scales:
            self.hand_back(slot)
        columns = lambda i: part[:, i * self.segment:(i + 1) * self.segment]
        totals = [total + columns(i) * scale
                  for i, (total, scale) in enumerate(zip(totals, self.scales(slot, row, factors), strict=True))]
        if self.column_scales:
            self.hand_back(slot)
        return totals

    def hand_back(self, slot: jax.Array) -> None:
        """Nobody of this warpgroup reads the slot any more."""
        if self.tuning.pair:  # one warp arrives for all four, on both multiprocessors: the others may be behind
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared.empty.at[slot])

    def counted(self, totals: list, before: list, real: jax.Array | None, step: int) -> list:
        """Totals with a step, or as before it if the tile does not have that many."""
        if real is None:
            return totals
        counts = lax.broadcast_in_dim(real > step, (HALF, self.segment), ())
        return [lax.select(counts, total, old) for total, old in zip(totals, before, strict=True)]

    def advance(self, count: int, factors_of: Callable, index: jax.Array, state: tuple, real=None, meanwhile=None):
        """`count` steps, from `count * index` on: while one is promoted, those after it multiply.

        The state is the next slot, the row scales of the slots that have arrived, the factors of the steps, the totals.
        """
        slot, rows, factors, totals = state
        slots = [slot]
        for _ in range(count - 1):
            slots.append(self.after(slots[-1], 1))
        next_factors = [factors_of(count * (index + 1) + i) for i in range(count)]
        take_turns = self.tuning.turns and count > 1
        if take_turns:
            plgpu.barrier_wait(self.shared.turn.at[self.group])
        # A last use for LLVM's register of zero: were it a later accumulator's, moves would clear that (64 at 128).
        unused = plgpu.layout_cast(jnp.zeros(HALF, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        promote = lambda i, part, sums: self.counted(
            self.promote(slots[i], rows[i], factors[i], part, sums), sums, real, i)

        def run(*accumulators):
            for slot, accumulator in zip(slots, accumulators, strict=True):
                self.start(slot, accumulator)
            if take_turns:
                plgpu.barrier_arrive(self.shared.turn.at[1 - self.group])
            if meanwhile:
                meanwhile()
            sums, arrived = totals, []
            for i, accumulator in enumerate(accumulators[:-1]):
                arrived.append(self.arrived(self.after(slots[i], self.tuning.ahead)))
                part = plgpu.wgmma_accumulator_load(accumulator, wait_n=count - 1 - i)
                lax.optimization_barrier(unused)
                sums = promote(i, part, sums)
            arrived.append(self.arrived(self.after(slots[-1], self.tuning.ahead)))
            return arrived, sums, accumulators[-1][...]

        arrived, sums, part = pl.run_scoped(run, *[plgpu.ACC((HALF, self.tuning.width))] * count)
        sums = promote(count - 1, part, sums)
        return self.after(slots[-1], 1), [*rows[count:], *arrived], next_factors, sums

    def multiply(self, tile: Tile, carry: tuple, meanwhile: Callable) -> tuple[tuple, list]:
        """All steps of a tile; `meanwhile()` is called while its first products run.

        The carry is the next slot and the row scales of the slots that have arrived.
        """
        factors_of = lambda index: () if self.column_scales else tuple(
            tile.b_scales(lax.min(jnp.int32(index), jnp.int32(tile.steps - 1))))
        count = self.tuning.flight
        several, single = (partial(self.advance, n, factors_of) for n in (count, 1))
        state = *carry, [factors_of(i) for i in range(count)], self.zeros()
        state = several(jnp.int32(0), state, tile.real, meanwhile)
        slot, rows, factors, totals = lax.fori_loop(1, tile.steps // count, several, state)
        done = tile.steps // count * count
        slot, rows, _, totals = lax.fori_loop(done, tile.steps, single, (slot, rows, factors[:1], totals))
        return (slot, rows), totals

    def write(self, tile: Tile, there: jax.Array, totals: Sequence[jax.Array]) -> None:
        """Through two small buffers, which the copy engine empties while the next is filled; not if not `there`."""
        piece, width = self.shared.out.shape[-1], self.tuning.width
        chunk = min(piece, self.segment)
        for i in range(width // piece):
            staged = self.shared.out.at[self.group, i % 2]
            plgpu.wait_smem_to_gmem(_in_flight(i, width // piece), wait_read_only=True)
            for first in range(i * piece, (i + 1) * piece, chunk):
                inside = first % self.segment
                values = totals[first // self.segment][:, inside:inside + chunk]
                staged.at[:, pl.ds(first - i * piece, chunk)][...] = values
            plgpu.commit_smem()
            pl.when(there)(partial(
                plgpu.copy_smem_to_gmem, staged, tile.out(self.group, i * piece, piece),
                reduction_op="add" if self.adds else None))


def consume(
    shared: Shared, each_tile: Callable, tile_at: Callable, tuning: Tuning, group: jax.Array, adds: bool,
) -> None:
    """Multiply one half of every tile, and write it out while the first products of the next one run."""
    half = Half(shared, tuning, group, adds)
    rounded = lambda totals: [total.astype(shared.out.dtype) for total in totals]
    write = lambda index, totals: half.write(tile_at(lax.max(index, jnp.int32(0))), index >= 0, totals)

    def in_turn(who: int, what: Callable) -> None:
        """Turns alternate strictly: the first comes from nobody, the last goes to nobody."""
        if tuning.turns:
            pl.when(group == who)(partial(what, shared.turn.at[0]))

    in_turn(1, plgpu.barrier_arrive)
    arrived = jnp.int32(0), [half.arrived(jnp.int32(slot)) for slot in range(tuning.ahead)]

    @each_tile(init_carry=(arrived, (jnp.int32(-1), *rounded(half.zeros()))))
    def last(loop, carry):
        arrived, (before, *finished) = carry
        index = loop.index[0]
        arrived, totals = half.multiply(tile_at(index), arrived, lambda: write(before, finished))
        return arrived, (index, *rounded(totals))

    write(last[1][0], last[1][1:])
    in_turn(0, plgpu.barrier_wait)
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)
