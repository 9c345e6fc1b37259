"""Causal attention on Hopper, forward: one persistent Pallas kernel that reads the projections' outputs where they lie.

A multiprocessor works on 128 queries of one head at a time. One warpgroup streams blocks of keys and values into shared
memory, running ahead across tiles; two others hold 64 queries each. A block costs two products, S = q k^T and
o += P v, with an online softmax in base 2 between them. S of the next block is issued before o of this one, so that
the softmax of one block runs beside a product of the block before it, and the two warpgroups take turns in issuing.

Blocks are taken from the diagonal backwards: the masked ones come first, and maxima settle early. A tile of many blocks
is followed on the same multiprocessor by its counterpart of few, so that all multiprocessors have the same to do.
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
    launch,
    multiprocessors,
    operand,
    own_half,
    split_roles,
    visible,
    wait_for,
    whole_tiles,
    with_turns,
    write,
)

REGISTERS = 232, 40
"""Of a thread that multiplies, and of one that copies."""
LOWEST = -1e30
"""Below any score: where the running maximum starts, so that no row ever subtracts infinity from itself."""


class Settings(NamedTuple):
    """What is tuned: keys in a block, blocks in flight, whether the two warpgroups take turns in issuing products."""

    block: int = 128
    stages: int = 2
    turns: bool = True


class Shared(NamedTuple):
    """Shared memory. A slot of `k` or `v` is full once its copies have landed, empty once both warpgroups are done.

    The ids of segments are None where a row of the batch is one document.
    """

    q: Any
    q_rope: Any
    k: Any
    k_rope: Any
    v: Any
    k_ids: Any
    out: Any
    normaliser: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turn: Any


def refusal(nope: int, rope: int, value: int, dtype: jnp.dtype) -> str | None:
    """Why heads of this size cannot run here, or None."""
    if dtype != jnp.bfloat16:
        return f"attention in {jnp.dtype(dtype).name}: it must be bfloat16"
    if (nope, rope, value) == (NOPE, ROPE, VALUE):
        return None
    return f"attention heads of {nope} + {rope} / {value}: they must be {NOPE} + {ROPE} / {VALUE}"


def _scratch(settings: Settings, segments: bool) -> Shared:
    block, stages = settings.block, settings.stages
    slots = dict(num_barriers=stages)
    return Shared(
        q=operand(ROWS, NOPE), q_rope=operand(ROWS, ROPE),
        k=operand(stages, block, NOPE), k_rope=operand(stages, block, ROPE), v=operand(stages, block, VALUE),
        k_ids=plgpu.SMEM((stages, block), jnp.int32) if segments else None,
        out=operand(GROUPS, 2, HALF, CHUNK), normaliser=plgpu.SMEM((GROUPS, HALF), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=2), q_empty=plgpu.Barrier(num_arrivals=GROUPS),
        k_full=plgpu.Barrier(num_arrivals=2 + segments, **slots),
        k_empty=plgpu.Barrier(num_arrivals=GROUPS, **slots),
        v_full=plgpu.Barrier(num_arrivals=1, **slots), v_empty=plgpu.Barrier(num_arrivals=GROUPS, **slots),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=2))


def _produce(shared: Shared, tiles_of: Callable, inputs: tuple, settings: Settings) -> None:
    """Copy the queries of every tile, and its blocks from the diagonal backwards."""
    q, q_rope, kv, k_rope, ids = inputs
    block, stages = settings.block, settings.stages

    def one_tile(tile, carry):
        count, tiles = carry
        rows, batch = pl.ds(tile.row, ROWS), tile.batch
        pl.when(tiles > 0)(lambda: plgpu.barrier_wait(shared.q_empty))
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, shared.q_full)
        copy(q.at[batch, rows, pl.ds(tile.head * KEY, NOPE)], shared.q)
        copy(q_rope.at[batch, rows, pl.ds(tile.head * ROPE, ROPE)], shared.q_rope)

        def load(step, count):
            slot, keys = lax.rem(count, jnp.int32(stages)), pl.ds((tile.last - step) * block, block)
            column = tile.head * (NOPE + VALUE)
            wait_for(shared.k_empty, count, stages)
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, shared.k_full.at[slot])
            copy(kv.at[batch, keys, pl.ds(column, NOPE)], shared.k.at[slot])
            copy(k_rope.at[batch, keys], shared.k_rope.at[slot])
            if ids is not None:
                copy(ids.at[batch, keys], shared.k_ids.at[slot])
            wait_for(shared.v_empty, count, stages)
            plgpu.copy_gmem_to_smem(
                kv.at[batch, keys, pl.ds(column + NOPE, VALUE)], shared.v.at[slot], shared.v_full.at[slot])
            return count + 1

        return lax.fori_loop(jnp.int32(0), tile.last - tile.first + 1, load, count), tiles + 1

    count, tiles = tiles_of(one_tile, (jnp.int32(0), jnp.int32(0)))
    drain(shared.k_empty, count, stages)
    drain(shared.v_empty, count, stages)
    pl.when(tiles > 0)(lambda: plgpu.barrier_wait(shared.q_empty))


def _consume(shared: Shared, tiles_of: Callable, ids, outputs: tuple, scale: float, settings: Settings, group):
    """The online softmax of half a tile's queries."""
    o, normaliser = outputs
    block, stages = settings.block, settings.stages
    to_base_2 = scale * math.log2(math.e)
    shape = HALF, block
    down = lambda vector, width: lax.broadcast_in_dim(vector, (HALF, width), (0,))
    start_of = lambda value: plgpu.layout_cast(jnp.full((HALF,), value, jnp.float32), PER_ROW)

    def scores(slot, s):
        half = own_half(group)
        plgpu.wgmma(s, shared.q.at[half], shared.k.at[slot].transpose((1, 0)))
        plgpu.wgmma(s, shared.q_rope.at[half], shared.k_rope.at[slot].transpose((1, 0)))

    def softmax(s, slot, tile, step, maximum, q_ids, *, diagonal):
        """P, its sums, the new maxima in base 2, and what earlier sums shrink by."""
        both = None if q_ids is None else (q_ids, plgpu.load(shared.k_ids.at[slot], layout=PER_COLUMN))
        mask = visible(tile.row + group * HALF, (tile.last - step) * block, shape, both, diagonal=diagonal)
        plgpu.barrier_arrive(shared.k_empty.at[slot])
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        new = jnp.maximum(maximum, jnp.max(s, axis=1) * to_base_2)
        p = jnp.exp2(s * to_base_2 - down(new, block))
        return p, jnp.sum(p, axis=1), new, jnp.exp2(maximum - new)

    def one_tile(tile, count):
        plgpu.barrier_wait(shared.q_full)
        rows = pl.ds(tile.row + group * HALF, HALF)
        q_ids = None if ids is None else plgpu.load(ids.at[tile.batch, rows], layout=PER_ROW, optimized=False)
        steps = tile.last - tile.first + 1
        slot_of = lambda step: lax.rem(count + step, jnp.int32(stages))

        def one_block(step, carry, *, diagonal):
            """Scores of this block beside o of the block before it, then this block's softmax."""
            total, p, sums, maximum = carry
            slot, before = slot_of(step), slot_of(step - 1)
            plgpu.barrier_wait(shared.k_full.at[slot])

            def issue(s, o):
                o[...] = total
                scores(slot, s)
                plgpu.wgmma(o, p, shared.v.at[before])

            def after(s, o):
                found = softmax(plgpu.wgmma_accumulator_load(s, wait_n=1), slot, tile, step, maximum, q_ids,
                                diagonal=diagonal)
                # Without a barrier to wait for, the assembler puts the wait for o before the softmax. P is in float32
                # until then: if it were rounded into registers that o still reads, all products would be serialised.
                found = lax.optimization_barrier(found)
                plgpu.barrier_wait(shared.v_full.at[slot])
                return found, o[...]

            (p, block_sums, maximum, shrink), total = in_turn(
                shared, group, settings.turns, issue, after, block, VALUE)
            plgpu.barrier_arrive(shared.v_empty.at[before])
            return total * down(shrink, VALUE), p.astype(jnp.bfloat16), sums * shrink + block_sums, maximum

        plgpu.barrier_wait(shared.k_full.at[slot_of(jnp.int32(0))])
        s = in_turn(shared, group, settings.turns, partial(scores, slot_of(jnp.int32(0))), lambda s: s[...], block)
        p, sums, maximum, _ = softmax(
            s, slot_of(jnp.int32(0)), tile, jnp.int32(0), start_of(LOWEST), q_ids, diagonal=True)
        zero = plgpu.layout_cast(jnp.zeros((HALF, VALUE), jnp.float32), MATRIX)
        plgpu.barrier_wait(shared.v_full.at[slot_of(jnp.int32(0))])
        carry = zero, p.astype(jnp.bfloat16), sums, maximum
        masked = lax.min(jnp.int32(pl.cdiv(ROWS, block)), steps)
        if block < ROWS:
            carry = lax.fori_loop(jnp.int32(1), masked, partial(one_block, diagonal=True), carry)
        total, p, sums, maximum = lax.fori_loop(
            masked if block < ROWS else jnp.int32(1), steps, partial(one_block, diagonal=False), carry)
        plgpu.barrier_arrive(shared.q_empty)

        last = slot_of(steps - 1)

        def finish(o):
            o[...] = total
            plgpu.wgmma(o, p, shared.v.at[last])
            return o[...]

        total = pl.run_scoped(finish, plgpu.ACC((HALF, VALUE)))
        plgpu.barrier_arrive(shared.v_empty.at[last])
        write(total * down(1 / sums, VALUE), shared.out.at[group],
              lambda column: o.at[tile.batch, rows, pl.ds(tile.head * VALUE + column, CHUNK)])
        shared.normaliser.at[group][...] = maximum + jnp.log2(sums)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.normaliser.at[group], normaliser.at[tile.batch, tile.head, rows])
        return count + steps

    with_turns(shared, group, settings.turns, lambda: tiles_of(one_tile, jnp.int32(0)))


def forward(
    q_BTHX: jax.Array,
    q_rope_BTHR: jax.Array,
    kv_BTHY: jax.Array,
    k_rope_BTR: jax.Array,
    scale: float,
    segment_ids_BT: jax.Array | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHU and the normaliser of every row, float32 [B, H, T] (report eq. 10).

    Of a head's N + R columns of `q_BTHX` the first N are read, beside its rotated part `q_rope_BTHR`; `kv_BTHY` has key
    and value, `k_rope_BTR` is rotated. All are bfloat16 of the widths that `refusal` accepts. Probabilities are
    2^(scale log2(e) q k - normaliser). A position sees earlier ones of its own segment, whatever the order of ids.
    Raises `UserError` for settings that cannot run.
    """
    require(settings.stages >= 2 and settings.block in (64, 128), f"{settings} cannot run: blocks of 64 or 128, and 2 "
            "stages or more, since a block's successor must have arrived before it is done")
    batch, length, heads = q_BTHX.shape[:3]
    tiles, segments = pl.cdiv(length, ROWS), segment_ids_BT is not None
    ids_BT = whole_tiles(segment_ids_BT, "edge") if segments else None
    documents = (ids_BT, first_blocks(ids_BT, settings.block)) if segments else ()

    def kernel(q, q_rope, kv, k_rope, *rest):
        ids, first, o, normaliser = rest if segments else (None, None, *rest)

        def tiles_of(body, carry):
            def one(row, head, tile, carry):
                start = jnp.int32(0) if first is None else first[row, tile]
                return body(Tile(row, head, tile * ROWS, start, last_block(tile, settings.block, length)), carry)

            return each_tile(batch, heads, tiles, one, carry)

        def run(**scratch):
            shared, group = Shared(**scratch), lax.axis_index("group")
            split_roles(group, REGISTERS, lambda: _produce(shared, tiles_of, (q, q_rope, kv, k_rope, ids), settings),
                        lambda: _consume(shared, tiles_of, ids, (o, normaliser), scale, settings, group))

        pl.run_scoped(run, **_scratch(settings, segments)._asdict(), collective_axes="group")

    padded = flat(q_BTHX).shape[1]
    out_type = [jax.ShapeDtypeStruct((batch, padded, heads * VALUE), jnp.bfloat16),
                jax.ShapeDtypeStruct((batch, heads, tiles * ROWS), jnp.float32)]
    o_BTX, normaliser_BHT = launch(kernel, out_type, multiprocessors(batch, heads, tiles))(
        flat(q_BTHX), flat(q_rope_BTHR), flat(kv_BTHY), flat(k_rope_BTR), *documents)
    return o_BTX[:, :length].reshape(batch, length, heads, VALUE), normaliser_BHT[..., :length]
