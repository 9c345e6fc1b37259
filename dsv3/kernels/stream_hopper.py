"""The frame of the memory-bound Hopper kernels: tiles stream through shared memory, ahead of the arithmetic.

A few thread blocks stay on every multiprocessor and take the tiles of the output in turn. The copy engine brings the
inputs of a block's next tiles while its warpgroups work on the present one; they leave their results in shared memory,
from where the copy engine writes them out. Several blocks on a multiprocessor hide each other's latencies.
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

from dsv3.config import UserError, require

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on any other number the kernels are right, only less evenly spread."""
SHARED_BYTES = 227 * 1024
"""Of shared memory that a thread block may have."""
ALIGNMENT, REDUCTIONS = 1024, 2048
"""What Mosaic rounds every array in shared memory up to, and what it adds for reductions."""
MOST_WARPGROUPS = 8
"""Of a thread block: 1024 threads."""
BARRIERS = 32
"""Of one group, in Mosaic."""


class Streaming(NamedTuple):
    """What is tuned: tiles in flight in a thread block, thread blocks on a multiprocessor, warpgroups to one output.

    `behind`: tiles that other warpgroups may be behind the first one, which waits for them before it fills a slot anew;
    as many tiles fewer are in flight.
    """

    stages: int
    blocks: int
    split: int
    multiprocessors: int = MULTIPROCESSORS
    behind: int = 0

    MAY_BE_ZERO = ("behind",)


class Piece(NamedTuple):
    """An array in shared memory. `swizzle`: bytes of a row that stay together, the unit of slices along rows.

    Without a swizzle, as for vectors, the array is one run of bytes, and so must its source be, unless it is `ragged`:
    partly beyond the array it comes from, where zeros are read, as for all matrices with a swizzle.
    """

    shape: tuple[int, ...]
    dtype: Any
    swizzle: int = 128
    ragged: bool = False

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def smem(self, stages: int | None):
        """Room for it, or for `stages` of them: matrices swizzled, so that neither rows nor columns share banks."""
        return plgpu.SMEM(
            self.shape if stages is None else (stages, *self.shape), self.dtype, transforms=transforms(self))


class Carry(NamedTuple):
    """What a warpgroup keeps in registers from tile to tile: `start()` makes it, `finish(block, group, carry, outputs)`
    has it when all tiles are done."""

    start: Callable
    finish: Callable


NOTHING = Carry(lambda: jnp.int32(0), lambda *_: None)


class Step(NamedTuple):
    """Which warpgroup works on which tile, the arguments in device memory, and what the tile before left (`carry`)."""

    group: jax.Array
    i: jax.Array
    j: jax.Array
    met: Any
    inputs: Any
    constants: Any
    carry: Any

    def meet(self) -> None:
        """Wait for all warpgroups of the thread block; what each wrote to shared memory is there for all."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)


class NoRoom(UserError):
    """More shared memory than there is."""


def check(settings: Streaming, pieces: list[Piece], *lasting: Piece) -> None:
    """Raise `NoRoom` unless `stages` of the pieces, and one of what is `lasting`, fit into shared memory.

    Raises `UserError` for stages that would wait for ever, or that have no barriers.
    """
    stages, behind = settings.stages, settings.behind
    require(0 <= behind < stages, f"{settings} would wait for ever: `behind` must be less than `stages`")
    require(stages <= BARRIERS, f"{settings}: there are barriers for {BARRIERS} stages only")
    whole = lambda piece, number: -(-number * piece.n_bytes // ALIGNMENT) * ALIGNMENT
    n_bytes = sum(whole(piece, stages) for piece in pieces) + sum(whole(piece, 1) for piece in lasting)
    n_bytes += REDUCTIONS + 8 * (2 * stages + 2)  # as well as barriers
    if n_bytes > SHARED_BYTES:
        raise NoRoom(f"{n_bytes} bytes of shared memory with {settings}, of which a thread block has {SHARED_BYTES}")


def transforms(piece: Piece) -> tuple:
    """The layout of matrices that the copy engine and the matrix loads agree on."""
    width = piece.swizzle // jnp.dtype(piece.dtype).itemsize
    if len(piece.shape) < 2 or width == 0:
        return ()
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(piece.swizzle)


def stream(
        work: Callable, arguments: tuple[jax.Array, ...], out_type: list, *, tiles: tuple[int, int],
        pieces: list[Piece], source: Callable, staging: list[Piece], warpgroups: int, settings: Streaming,
        constants: tuple[Piece, ...] = (), approximate: bool = False, carry: Carry = NOTHING):
    """Run `work` on every tile (i, j).

    `source(i, j, *inputs)` gives the parts of the arguments that fill `pieces`; `work(step, pieces, staging, outputs)`
    is one warpgroup's share, which calls `reuse()` before it writes what it copies out of `staging`. The last arguments
    may be `constants`, which stay in shared memory as `step.constants`. `approximate` takes the device's own
    exponential, good to about 1e-6, which is seven instructions shorter. With a `carry`, `work` returns the next one.
    No tiles, as of no tokens, leave zeros. Raises what `check` does.
    """
    tall, wide = tiles
    if tall * wide == 0:
        return [jnp.zeros(out.shape, out.dtype) for out in out_type]
    require(warpgroups <= MOST_WARPGROUPS, f"{settings}: {warpgroups} warpgroups, of which a thread block has no more "
            f"than {MOST_WARPGROUPS}")
    check(settings, pieces, *staging, *constants)
    stages, behind, n_blocks = settings.stages, settings.behind, blocks_for(tall * wide, settings)

    def kernel(*refs):
        inputs, outputs = refs[:len(arguments)], refs[len(arguments):]
        scoped = partial(
            pl.run_scoped,
            slots=[piece.smem(stages) for piece in pieces],
            staged=[piece.smem(None) for piece in staging],
            lasting=[piece.smem(None) for piece in constants],
            full=plgpu.Barrier(num_arrivals=len(pieces), num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            met=plgpu.Barrier(num_arrivals=warpgroups),
            settled=plgpu.Barrier(num_arrivals=max(1, len(constants))),
            collective_axes="warpgroup")

        @scoped
        def _(slots, staged, lasting, full, empty, met, settled):
            block, group = lax.axis_index("block"), lax.axis_index("warpgroup")
            steps = lax.div(tall * wide - 1 - block, n_blocks) + 1
            place = lambda step: (lax.div(block + step * n_blocks, wide), lax.rem(block + step * n_blocks, wide))

            def load(step):
                slot = lax.rem(step, jnp.int32(stages))
                for part, room, piece in zip(source(*place(step), *inputs), slots, pieces, strict=True):
                    copy_in(part, room.at[slot], full.at[slot], piece)

            @pl.when(group == 0)
            def _():
                for part, room, piece in zip(inputs[len(inputs) - len(constants):], lasting, constants, strict=True):
                    copy_in(part, room, settled, piece)
                for ahead in range(stages):
                    pl.when(ahead < steps)(partial(load, jnp.int32(ahead)))

            if constants:
                plgpu.barrier_wait(settled)

            def one_tile(step, kept):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                now = Step(group, *place(step), met, inputs, lasting, kept)
                left = work(now, [room.at[slot] for room in slots], staged, outputs)
                plgpu.barrier_arrive(empty.at[slot])
                pl.when(lax.bitwise_and(group == 0, step >= behind))(partial(refill, step - behind))
                return kept if carry is NOTHING else left

            def refill(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])
                pl.when(step + stages < steps)(partial(load, step + stages))

            carry.finish(block, group, lax.fori_loop(jnp.int32(0), steps, one_tile, carry.start()), outputs)
            for last in range(behind, 0, -1):  # no barrier is left with an arrival that nobody saw
                pl.when(lax.bitwise_and(group == 0, steps >= last))(partial(refill, steps - last))
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    return plgpu.kernel(
        kernel, out_type=out_type, grid=(n_blocks,), grid_names=("block",), num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=approximate))(*arguments)


def blocks_for(tiles: int, settings: Streaming) -> int:
    """Thread blocks that share so many tiles; each has at least one."""
    return min(settings.blocks * settings.multiprocessors, tiles)


def copy_in(part, room, barrier, piece: Piece) -> None:
    """Bring a part of device memory into its room."""
    # One run of bytes of any length must be known to lie inside the array; of a matrix, what lies outside reads as 0.
    inside = None if piece.ragged or transforms(piece) else plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    plgpu.copy_gmem_to_smem(part, room, barrier, oob_mode=inside)


def reuse() -> None:
    """Wait until the copy engine has read what this warpgroup staged last."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
