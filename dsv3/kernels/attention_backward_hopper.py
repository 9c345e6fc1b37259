"""Causal attention on Hopper, backward: two persistent Pallas kernels, without atomics: equal inputs give equal bits.

One keeps 128 keys and sums d_k and d_v over blocks of later queries, the other sums d_q. The first recomputes
P = 2^(S - normaliser) and dS = P (dP - delta), with S = q k^T in base 2, dP = d_o v^T and delta = sum(o d_o), and keeps
dS for the second (`attention_kept_hopper.py`). Where there is no room for that, or with segments, the second makes dS
again, keeping 128 queries and streaming earlier keys: seven products in place of five.

A block is two rounds of products with dS between them. Two warpgroups of 64 rows take turns, so that the tensor cores
work for one while the other makes its dS; a third streams the blocks.
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
from dsv3.kernels.attention_kept_hopper import Kept, queries_from_kept
from dsv3.kernels.attention_tiles_hopper import (
    CHUNK,
    GROUPS,
    HALF,
    KEY,
    MATRIX,
    NOPE,
    PER_COLUMN,
    PER_ROW,
    ROPE,
    ROWS,
    VALUE,
    Tile,
    drain,
    each_tile,
    first_blocks,
    flat,
    in_turn,
    last_block,
    last_blocks,
    launch,
    multiprocessors,
    operand,
    own_half,
    split_roles,
    visible,
    visible_below,
    wait_for,
    whole_tiles,
    with_turns,
    write,
    zeros,
)

BLOCK = 64
"""Positions of a streamed block: more would not fit the registers beside the sums."""
REGISTERS = 240, 24
"""Of a thread that multiplies, and of one that copies."""
ACROSS = NOPE + VALUE
"""Columns of a head in kv."""


class Settings(NamedTuple):
    """What is tuned: blocks in flight, and whether the two warpgroups take turns, in the kernels of d_q and of d_kv.
    dS is kept where it takes at most so many GiB."""

    d_q_stages: int = 3
    d_q_turns: bool = True
    d_kv_stages: int = 3
    d_kv_turns: bool = False
    kept_gib: int = 12

    MAY_BE_ZERO = ("kept_gib",)


class Shared(NamedTuple):
    """Shared memory of both kernels: what a tile keeps (`kept`), and `stages` slots of what is streamed (`slots`).

    A tile keeps queries and d_o while keys and values stream, or the other way round. `vectors` are what belongs to the
    positions of a slot: the segments' ids, and of queries the normaliser and delta.
    """

    kept: Any
    slots: Any
    vectors: Any
    positions: Any
    out: Any
    kept_full: Any
    kept_empty: Any
    full: Any
    empty: Any
    turn: Any


class Source(NamedTuple):
    """Arguments in device memory. `ids` and `bounds`, the outermost block of a tile, are None without segments."""

    q: Any
    q_rope: Any
    kv: Any
    k_rope: Any
    d_o: Any
    normaliser: Any
    delta: Any
    ids: Any
    bounds: Any

    def queries(self, tile: Tile, rows) -> tuple:
        """Queries and their part of d_o."""
        return (self.q.at[tile.batch, rows, pl.ds(tile.head * KEY, NOPE)],
                self.q_rope.at[tile.batch, rows, pl.ds(tile.head * ROPE, ROPE)],
                self.d_o.at[tile.batch, rows, pl.ds(tile.head * VALUE, VALUE)])

    def keys(self, tile: Tile, rows) -> tuple:
        """Keys and values."""
        return (self.kv.at[tile.batch, rows, pl.ds(tile.head * ACROSS, NOPE)], self.k_rope.at[tile.batch, rows],
                self.kv.at[tile.batch, rows, pl.ds(tile.head * ACROSS + NOPE, VALUE)])

    def sums(self, tile: Tile, rows) -> tuple:
        """The normaliser and delta of queries."""
        return self.normaliser.at[tile.batch, tile.head, rows], self.delta.at[tile.batch, tile.head, rows]

    def segments(self, tile: Tile, rows) -> tuple:
        return () if self.ids is None else (self.ids.at[tile.batch, rows],)


def _parts(*shape: int) -> list:
    """Room for own part, rotary part, and value or d_o."""
    return [operand(*shape, width) for width in (NOPE, ROPE, VALUE)]


def _scratch(stages: int, vectors: list, buffers: int) -> Shared:
    slots = dict(num_barriers=stages)
    return Shared(
        kept=_parts(ROWS), slots=_parts(stages, BLOCK),
        vectors=[plgpu.SMEM((stages, BLOCK), kind) for kind in vectors], positions=plgpu.SMEM((BLOCK,), jnp.int32),
        out=operand(GROUPS, buffers, HALF, 2 * CHUNK // buffers), kept_full=plgpu.Barrier(num_arrivals=3),
        kept_empty=plgpu.Barrier(num_arrivals=GROUPS), full=plgpu.Barrier(num_arrivals=3 + len(vectors), **slots),
        empty=plgpu.Barrier(num_arrivals=GROUPS, **slots), turn=plgpu.Barrier(num_arrivals=1, num_barriers=2))


def _produce(shared: Shared, tiles_of: Callable, kept: Callable, streamed: Callable, stages: int) -> None:
    """Copy what a tile keeps, `kept(tile, rows)`, and its blocks, `streamed(tile, positions)`."""
    def one_tile(tile, carry):
        count, tiles = carry
        pl.when(tiles > 0)(lambda: plgpu.barrier_wait(shared.kept_empty))
        for source, target in zip(kept(tile, pl.ds(tile.row, ROWS)), shared.kept, strict=True):
            plgpu.copy_gmem_to_smem(source, target, shared.kept_full)

        def load(block, count):
            slot = lax.rem(count, jnp.int32(stages))
            wait_for(shared.empty, count, stages)
            room = [*shared.slots, *shared.vectors]
            for source, target in zip(streamed(tile, pl.ds(block * BLOCK, BLOCK)), room, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot], shared.full.at[slot])
            return count + 1

        return lax.fori_loop(tile.first, tile.last + 1, load, count), tiles + 1

    count, tiles = tiles_of(one_tile, (jnp.int32(0), jnp.int32(0)))
    drain(shared.empty, count, stages)
    pl.when(tiles > 0)(lambda: plgpu.barrier_wait(shared.kept_empty))


def _blocks(tile: Tile, one_block: Callable, masked_first: bool, carry: Any) -> Any:
    """All blocks of a tile, `carry = one_block(block, carry, diagonal=...)`; the diagonal's are first or last."""
    on, off = partial(one_block, diagonal=True), partial(one_block, diagonal=False)
    if masked_first:
        middle = lax.min(tile.first + ROWS // BLOCK, tile.last + 1)
        return lax.fori_loop(middle, tile.last + 1, off, lax.fori_loop(tile.first, middle, on, carry))
    middle = lax.max(tile.last + 1 - ROWS // BLOCK, tile.first)
    return lax.fori_loop(middle, tile.last + 1, on, lax.fori_loop(tile.first, middle, off, carry))


def _probabilities(s: jax.Array, mask_of: Callable, normaliser: jax.Array, axis: int, scale: float) -> jax.Array:
    mask = mask_of()  # only here, or it would be in registers while the products run
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    return jnp.exp2(s * (scale * math.log2(math.e)) - lax.broadcast_in_dim(normaliser, s.shape, (axis,)))


def _sum_queries(shared: Shared, tiles_of: Callable, source: Source, d_q, scale: float, settings: Settings, group):
    """d_q = scale dS k, of half a tile's queries."""
    turn = partial(in_turn, shared, group, settings.d_q_turns)

    def one_tile(tile, count):
        start = tile.row + group * HALF
        rows = pl.ds(start, HALF)
        by_row = lambda ref: plgpu.load(ref, layout=PER_ROW, optimized=False)
        normaliser, delta = (by_row(ref) for ref in source.sums(tile, rows))
        own_ids = [by_row(ref) for ref in source.segments(tile, rows)]
        plgpu.barrier_wait(shared.kept_full)

        def one_block(block, carry, *, diagonal):
            slot = lax.rem(count + block - tile.first, jnp.int32(settings.d_q_stages))
            plgpu.barrier_wait(shared.full.at[slot])

            def mask():
                ids = (own_ids[0], plgpu.load(shared.vectors[0].at[slot], layout=PER_COLUMN)) if own_ids else None
                return visible(start, block * BLOCK, (HALF, BLOCK), ids, diagonal=diagonal)

            half, (k, k_rope, v) = own_half(group), (part.at[slot] for part in shared.slots)
            q, q_rope, d_o = (part.at[half] for part in shared.kept)

            def start_scores(s, d_p):
                plgpu.wgmma(s, q, k.transpose((1, 0)))
                plgpu.wgmma(s, q_rope, k_rope.transpose((1, 0)))
                plgpu.wgmma(d_p, d_o, v.transpose((1, 0)))

            def differences(s, d_p):
                p = _probabilities(plgpu.wgmma_accumulator_load(s, wait_n=1), mask, normaliser, 0, scale)
                return p * (d_p[...] - lax.broadcast_in_dim(delta, p.shape, (0,)))

            d_s = turn(start_scores, differences, BLOCK, BLOCK).astype(jnp.bfloat16)

            def start_sums(*refs):
                for ref, total, part in zip(refs, carry, (k, k_rope), strict=True):
                    ref[...] = total
                    plgpu.wgmma(ref, d_s, part)

            totals = turn(start_sums, lambda a, b: (a[...], b[...]), NOPE, ROPE)
            plgpu.barrier_arrive(shared.empty.at[slot])
            return totals

        totals = _blocks(tile, one_block, False, (zeros(NOPE), zeros(ROPE)))
        plgpu.barrier_arrive(shared.kept_empty)
        for total, first in zip(totals, (0, NOPE), strict=True):
            write(total * scale, shared.out.at[group], lambda column, first=first: d_q.at[
                tile.batch, rows, pl.ds(tile.head * KEY + first + column, CHUNK)])
        return count + tile.last - tile.first + 1

    with_turns(shared, group, settings.d_q_turns, lambda: tiles_of(one_tile, jnp.int32(0)))


def _sum_keys(shared, tiles_of: Callable, source: Source, outputs, kept: Kept | None, scale, settings, group):
    """d_v = P^T d_o and d_k = scale dS^T q, of half a tile's keys: P and dS are transposed throughout."""
    d_kv, d_k_rope, *d_s_out = outputs
    turn = partial(in_turn, shared, group, settings.d_kv_turns)
    p = shared.out.at[group, 0]
    # Read again for every block at the diagonal: what is computed from constants would stay in registers meanwhile.
    shared.positions[...] = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=PER_COLUMN)
    plgpu.commit_smem()

    def one_tile(tile, count):
        start = tile.row + group * HALF
        rows = pl.ds(start, HALF)
        own_ids = [plgpu.load(ref, layout=PER_ROW, optimized=False) for ref in source.segments(tile, rows)]
        plgpu.barrier_wait(shared.kept_full)

        slot_of = lambda block: lax.rem(count + block - tile.first, jnp.int32(settings.d_kv_stages))

        def start_scores(block, s):
            half, slot = own_half(group), slot_of(block)
            for kept, part in zip(shared.kept[:2], shared.slots[:2], strict=True):
                plgpu.wgmma(s, kept.at[half], part.at[slot].transpose((1, 0)))

        def one_block(block, carry, *, diagonal):
            """P and dS from the scores in `carry`; the next block's are made beside d_k, the last one's once more."""
            d_v, d_k, d_rope, s = carry
            slot, following = slot_of(block), lax.min(block + 1, tile.last)
            column = lambda i: plgpu.load(shared.vectors[i].at[slot], layout=PER_COLUMN)
            q, q_rope, d_o = (part.at[slot] for part in shared.slots)

            def mask():
                across = plgpu.load(shared.positions, layout=PER_COLUMN) if diagonal else None
                ids = (own_ids[0], column(2)) if own_ids else None
                return visible_below(start - block * BLOCK, across, (HALF, BLOCK), ids)

            if kept:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dS of the block before lies in the same place
            p[...] = _probabilities(s, mask, column(0), 1, scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            less = -lax.broadcast_in_dim(column(1), (HALF, BLOCK), (1,))

            def start_values(d_p, ref):
                d_p[...], ref[...] = less, d_v
                plgpu.wgmma(d_p, shared.kept[2].at[own_half(group)], d_o.transpose((1, 0)))
                plgpu.wgmma(ref, p, d_o)

            def differences(d_p, ref):
                d_s = plgpu.load(p, layout=MATRIX).astype(jnp.float32) * plgpu.wgmma_accumulator_load(d_p, wait_n=1)
                return lax.optimization_barrier(d_s), ref[...]

            d_s, d_v = turn(start_values, differences, BLOCK, VALUE)
            p[...] = d_s.astype(jnp.bfloat16)
            plgpu.commit_smem()
            if kept:
                row = kept.row(tile.batch, tile.head, lax.div(tile.row, jnp.int32(HALF)) + group, block)
                plgpu.copy_smem_to_gmem(p, d_s_out[0].at[pl.ds(row, BLOCK)])
            pl.when(block < tile.last)(lambda: plgpu.barrier_wait(shared.full.at[slot_of(following)]))

            def start_keys(s, *refs):
                start_scores(following, s)
                for ref, total, part in zip(refs, (d_k, d_rope), (q, q_rope), strict=True):
                    ref[...] = total
                    plgpu.wgmma(ref, p, part)

            s, *sums = turn(start_keys, lambda *refs: [ref[...] for ref in refs], BLOCK, NOPE, ROPE)
            plgpu.barrier_arrive(shared.empty.at[slot])
            return d_v, *sums, s

        plgpu.barrier_wait(shared.full.at[slot_of(tile.first)])
        s = turn(partial(start_scores, tile.first), lambda s: s[...], BLOCK)
        d_v, d_k, d_rope, _ = _blocks(tile, one_block, True, (zeros(VALUE), zeros(NOPE), zeros(ROPE), s))
        plgpu.barrier_arrive(shared.kept_empty)
        place = lambda out, first: lambda column: out.at[tile.batch, rows, pl.ds(first + column, 2 * CHUNK)]
        write(d_k * scale, shared.out.at[group], place(d_kv, tile.head * ACROSS))
        write(d_v, shared.out.at[group], place(d_kv, tile.head * ACROSS + NOPE))
        write(d_rope * scale, shared.out.at[group], place(d_k_rope, tile.head * ROPE))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return count + tile.last - tile.first + 1

    with_turns(shared, group, settings.d_kv_turns, lambda: tiles_of(one_tile, jnp.int32(0)))


def _run(consume: Callable, source: Source, out_type: list, stages: int, *, queries_kept: bool, length: int) -> Any:
    """One of the two kernels: what a tile keeps is read by `consume(shared, tiles_of, source, outputs, group)`."""
    present = [name for name in Source._fields if getattr(source, name) is not None]
    batch, heads, width = source.normaliser.shape
    tiles = width // ROWS
    vectors = [] if queries_kept else [jnp.float32, jnp.float32]
    vectors += [] if source.ids is None else [jnp.int32]

    def kernel(*refs):
        at = source._replace(**dict(zip(present, refs[:len(present)], strict=True)))
        outputs = refs[len(present):]

        def tiles_of(body, carry):
            def one(row, head, tile, carry):
                start = tile * ROWS
                if queries_kept:
                    first = jnp.int32(0) if at.bounds is None else at.bounds[row, tile]
                    last = last_block(tile, BLOCK, length)
                else:
                    first = lax.div(start, jnp.int32(BLOCK))
                    last = jnp.int32(pl.cdiv(length, BLOCK) - 1) if at.bounds is None else at.bounds[row, tile]
                return body(Tile(row, head, start, first, last), carry)

            return each_tile(batch, heads, tiles, one, carry)

        def run(**scratch):
            shared, group = Shared(**scratch), lax.axis_index("group")
            kept, streamed = (at.queries, at.keys) if queries_kept else (at.keys, at.queries)
            sums = lambda tile, rows: () if queries_kept else at.sums(tile, rows)
            block = lambda tile, rows: (*streamed(tile, rows), *sums(tile, rows), *at.segments(tile, rows))
            split_roles(group, REGISTERS, lambda: _produce(shared, tiles_of, kept, block, stages),
                        lambda: consume(shared, tiles_of, at, outputs, group=group))

        pl.run_scoped(run, **_scratch(stages, vectors, 2 if queries_kept else 1)._asdict(), collective_axes="group")

    arguments = [getattr(source, name) for name in present]
    return launch(kernel, out_type, multiprocessors(batch, heads, tiles))(*arguments)


def backward(
    q_BTHX: jax.Array,
    q_rope_BTHR: jax.Array,
    kv_BTHY: jax.Array,
    k_rope_BTR: jax.Array,
    scale: float,
    segment_ids_BT: jax.Array | None,
    o_BTHU: jax.Array,
    normaliser_BHT: jax.Array,
    d_o_BTHU: jax.Array,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients d_q_BTHX, d_kv_BTHY and d_k_rope_BTR of `attention_hopper.forward`, whose results it reads.

    In the last R columns of a head of d_q stands the gradient by the rotated part `q_rope_BTHR`; the same holds for
    d_k_rope: turning them back is the caller's. d_k_rope is summed over heads in float32. Raises `UserError` for
    settings that would hang.
    """
    require(min(settings.d_q_stages, settings.d_kv_stages) >= 2, f"{settings} would wait for ever: a block's successor "
            "must have arrived before it is done; use 2 stages or more")
    batch, length, heads = q_BTHX.shape[:3]
    delta_BTH = jnp.sum(o_BTHU.astype(jnp.float32) * d_o_BTHU.astype(jnp.float32), axis=-1)
    zeros_behind = partial(whole_tiles, mode="constant")
    ids_BT = None if segment_ids_BT is None else whole_tiles(segment_ids_BT, mode="edge")
    source = Source(
        *map(flat, (q_BTHX, q_rope_BTHR, kv_BTHY, k_rope_BTR, d_o_BTHU)), zeros_behind(normaliser_BHT),
        zeros_behind(delta_BTH.swapaxes(1, 2)), ids_BT, None if ids_BT is None else first_blocks(ids_BT, BLOCK))
    columns = lambda width: jax.ShapeDtypeStruct((*source.q.shape[:2], heads * width), jnp.bfloat16)
    kept = Kept.within(settings.kept_gib, batch, heads, length) if ids_BT is None else None
    run = partial(_run, length=length)
    by_key = source if ids_BT is None else source._replace(bounds=last_blocks(ids_BT, BLOCK, length))
    d_kv_BTX, d_k_rope_BTX, *d_s = run(
        lambda *a, group: _sum_keys(*a, kept, scale, settings, group), by_key,
        [columns(ACROSS), columns(ROPE), *([kept.shape(batch)] if kept else [])], settings.d_kv_stages,
        queries_kept=False)
    if kept:
        d_q_BTX = queries_from_kept(*d_s, kept, source.kv, source.k_rope, scale)
    else:
        d_q_BTX, = run(
            lambda *a, group: _sum_queries(*a[:3], a[3][0], scale, settings, group), source, [columns(KEY)],
            settings.d_q_stages, queries_kept=True)
    by_head = lambda x_BTX: x_BTX[:, :length].reshape(batch, length, heads, -1)
    d_k_rope_BTR = jnp.sum(by_head(d_k_rope_BTX), axis=2, dtype=jnp.float32).astype(k_rope_BTR.dtype)
    return by_head(d_q_BTX), by_head(d_kv_BTX), d_k_rope_BTR
