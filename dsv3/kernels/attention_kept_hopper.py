"""d_q of causal attention on Hopper from dS that the kernel of keys has kept: one product in place of three.

dS, transposed and in bfloat16, lies in device memory as squares of 64 keys x 64 queries, the lower triangle alone: for
every half tile of keys the squares of all queries from its tile on, one after the other. It is written once and read
once, 2 bytes a pair of positions and head, which takes less time than making S and dP a second time.

A tile is 256 queries of one head, 128 for each of two warpgroups; a third copies dS and keys for 64 keys at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.kernels.attention_tiles_hopper import (
    CHUNK,
    GROUPS,
    HALF,
    KEY,
    NOPE,
    ROPE,
    ROWS,
    VALUE,
    drain,
    each_tile,
    in_turn,
    launch,
    multiprocessors,
    operand,
    split_roles,
    wait_for,
    write,
    zeros,
)

BLOCK = HALF
"""Positions on either side of a square."""
QUERIES = GROUPS * ROWS
"""Of a tile."""
PARTS = QUERIES // BLOCK
STAGES = 3
REGISTERS = 240, 24
"""Of a thread that multiplies, and of one that copies."""


class Kept(NamedTuple):
    """Where squares lie: `blocks` of queries in a row of the batch, `heads` of them."""

    heads: int
    blocks: int

    @classmethod
    def within(cls, gib: float, batch: int, heads: int, length: int) -> "Kept | None":
        """None where it would take more than so many GiB."""
        kept = cls(heads, pl.cdiv(length, BLOCK))
        return kept if batch * heads * kept.squares() * BLOCK * BLOCK * 2 <= gib * 2**30 else None

    def squares(self) -> int:
        """Of one head."""
        tiles = pl.cdiv(self.blocks, GROUPS)
        return GROUPS * tiles * (self.blocks - tiles + 1)

    def shape(self, batch: int) -> jax.ShapeDtypeStruct:
        """One below the other, and room for a tile's queries that reach beyond the last."""
        return jax.ShapeDtypeStruct((batch * self.heads * self.squares() * BLOCK + QUERIES, BLOCK), jnp.bfloat16)

    def row(self, batch: jax.Array, head: jax.Array, half: jax.Array, block: jax.Array) -> jax.Array:
        """First row of the square of a half tile of keys and a block of queries."""
        tile, second = lax.div(half, jnp.int32(GROUPS)), lax.rem(half, jnp.int32(GROUPS))
        before = (GROUPS * tile * (self.blocks - tile + 1) + second * (self.blocks - GROUPS * tile)
                  + block - GROUPS * tile)
        return ((batch * self.heads + head) * self.squares() + before) * BLOCK


class Shared(NamedTuple):
    """Slots of what is streamed, and where results are staged."""

    d_s: Any
    k: Any
    k_rope: Any
    out: Any
    full: Any
    empty: Any


def _scratch() -> Shared:
    slots = dict(num_barriers=STAGES)
    return Shared(
        d_s=operand(STAGES, QUERIES, BLOCK), k=operand(STAGES, BLOCK, NOPE), k_rope=operand(STAGES, BLOCK, ROPE),
        out=operand(GROUPS, 2, HALF, CHUNK), full=plgpu.Barrier(num_arrivals=3, **slots),
        empty=plgpu.Barrier(num_arrivals=GROUPS, **slots))


def _produce(shared: Shared, tiles_of: Callable, kept: Kept, d_s, kv, k_rope) -> None:
    def one_tile(batch, head, tile, count):
        def load(half, count):
            slot, keys = lax.rem(count, jnp.int32(STAGES)), pl.ds(half * BLOCK, BLOCK)
            wait_for(shared.empty, count, STAGES)
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[slot], shared.full.at[slot])
            # In the last keys of a tile its first queries have no square; another is read, and not multiplied.
            copy(d_s.at[pl.ds(kept.row(batch, head, half, tile * PARTS), QUERIES)], shared.d_s)
            copy(kv.at[batch, keys, pl.ds(head * (NOPE + VALUE), NOPE)], shared.k)
            copy(k_rope.at[batch, keys], shared.k_rope)
            return count + 1

        return lax.fori_loop(jnp.int32(0), _end(kept, tile, GROUPS - 1), load, count)

    drain(shared.empty, tiles_of(one_tile, jnp.int32(0)), STAGES)


def _end(kept: Kept, tile: jax.Array, group: jax.Array | int) -> jax.Array:
    """How many blocks of keys this warpgroup's queries of a tile see."""
    return lax.min(tile * PARTS + GROUPS * (group + 1), jnp.int32(kept.blocks))


def _consume(shared: Shared, tiles_of: Callable, kept: Kept, d_q, scale: float, group: jax.Array) -> None:
    widths = (NOPE, ROPE) * GROUPS

    def one_tile(batch, head, tile, count):
        slot_of = lambda half: lax.rem(count + half, jnp.int32(STAGES))

        def multiply(half, totals):
            slot = slot_of(half)
            plgpu.barrier_wait(shared.full.at[slot])

            def issue(*refs):
                for i, (ref, total) in enumerate(zip(refs, totals, strict=True)):
                    ref[...] = total
                    rows = pl.ds(group * ROWS + i // 2 * HALF, HALF)
                    keys = (shared.k, shared.k_rope)[i % 2].at[slot]
                    plgpu.wgmma(ref, shared.d_s.at[slot, rows].transpose((1, 0)), keys)

            totals = in_turn(shared, group, False, issue, lambda *refs: tuple(ref[...] for ref in refs), *widths)
            plgpu.barrier_arrive(shared.empty.at[slot])
            return totals

        def pass_by(half, carry):
            plgpu.barrier_wait(shared.full.at[slot_of(half)])
            plgpu.barrier_arrive(shared.empty.at[slot_of(half)])
            return carry

        own, end = _end(kept, tile, group), _end(kept, tile, GROUPS - 1)
        totals = lax.fori_loop(jnp.int32(0), own, multiply, tuple(map(zeros, widths)))
        lax.fori_loop(own, end, pass_by, jnp.int32(0))
        for i, total in enumerate(totals):
            rows = pl.ds(tile * QUERIES + group * ROWS + i // 2 * HALF, HALF)
            first = head * KEY + i % 2 * NOPE
            write(total * scale, shared.out.at[group],
                  lambda column, rows=rows, first=first: d_q.at[batch, rows, pl.ds(first + column, CHUNK)])
        return count + end

    tiles_of(one_tile, jnp.int32(0))


def queries_from_kept(d_s: jax.Array, kept: Kept, kv_BTX: jax.Array, k_rope_BTR: jax.Array, scale: float) -> jax.Array:
    """d_q [B, T, H * 192] = scale dS k, of dS as `Kept` lays it out; keys as attention's other kernels read them."""
    batch, length = kv_BTX.shape[:2]
    tiles = pl.cdiv(kept.blocks, PARTS)

    def kernel(d_s, kv, k_rope, d_q):
        tiles_of = partial(each_tile, batch, kept.heads, tiles)

        def run(**scratch):
            shared, group = Shared(**scratch), lax.axis_index("group")
            split_roles(group, REGISTERS, lambda: _produce(shared, tiles_of, kept, d_s, kv, k_rope),
                        lambda: _consume(shared, tiles_of, kept, d_q, scale, group))

        pl.run_scoped(run, **_scratch()._asdict(), collective_axes="group")

    out = jax.ShapeDtypeStruct((batch, length, kept.heads * KEY), jnp.bfloat16)
    return launch(kernel, [out], multiprocessors(batch, kept.heads, tiles))(d_s, kv_BTX, k_rope_BTR)[0]
