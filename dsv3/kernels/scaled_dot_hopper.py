"""Block-scaled FP8 products on Hopper's tensor cores: one persistent Pallas kernel, dense or grouped, and its gradient.

Here is which tiles there are and where their operands lie; `scaled_warpgroups_hopper.py` has what is done with a tile.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config import require
from dsv3.kernels.scaled import Blocks, Tiles
from dsv3.kernels.scaled_warpgroups_hopper import DEPTH, HALF, ROWS, Shared, Tile, Tuning, consume, produce, scratch

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on any other number the kernel is right, only less evenly spread."""
WIDEST = 256
"""Columns of a matrix instruction."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
"""Of a thread, where three warpgroups share what there is; two have 255 each."""


def _call(
    tile_of: Callable, n_tiles: int, column_scales: bool, tuning: Tuning, out: jax.ShapeDtypeStruct | jax.Array, *args,
):
    """Run `n_tiles` tiles (or pairs); `tile_of(index, *refs)` describes one. The last four of `args` are operands.

    Sums over nothing, as of no tokens, are zeros. Sums are added to `out` if that is an array.
    """
    adds = not isinstance(out, jax.ShapeDtypeStruct)
    if n_tiles == 0 or not all(operand.size for operand in args[-4:]):
        return out if adds else jnp.zeros(out.shape, out.dtype)

    def kernel(*refs):
        tile_at = lambda index: tile_of(index, *refs)
        each_tile = partial(plgpu.nd_loop, (n_tiles,), collective_axes="multiprocessor")

        def run(**scratch):
            shared, group = Shared(**scratch), lax.axis_index("group")

            @pl.when(group == tuning.groups)
            def _():
                if tuning.groups == 2:
                    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                produce(shared, each_tile, tile_at, tuning)

            @pl.when(group < tuning.groups)
            def _():
                if tuning.groups == 2:
                    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
                consume(shared, each_tile, tile_at, tuning, group, adds)

        shapes = scratch(tuning, column_scales, (args[-4].dtype, args[-2].dtype), out.dtype)
        pl.run_scoped(run, **shapes._asdict(), collective_axes="group")

    require(tuning.rows in (ROWS, HALF), f"{tuning}: tiles have {ROWS} rows or {HALF}")
    require(tuning.width % 16 == 0 and tuning.width <= WIDEST, f"{tuning}: tiles have a multiple of 16 columns, "
            f"{WIDEST} at most")
    require(tuning.pair in (None, "a", "b"), f"{tuning}: `pair` is 'a', 'b' or None")
    require(tuning.stages > tuning.ahead, f"{tuning} would wait for ever: operands arrive {tuning.ahead} steps ahead, "
            f"which takes at least {tuning.ahead + 1} stages")
    pairs = dict(cluster=(2,), cluster_names=("pair",)) if tuning.pair else {}
    run = plgpu.kernel(
        kernel, out_type=() if adds else out, grid=(min(MULTIPROCESSORS // (2 if tuning.pair else 1), n_tiles),),
        grid_names=("multiprocessor",), num_threads=tuning.groups + 1, thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup), **pairs)
    if not adds:
        return run(*args)
    sums = jax.new_ref(out)
    run(*args, sums)
    return jax.freeze(sums)


def _grid(n_rows: int, n_columns: int, tuning: Tuning) -> tuple[int, Callable[[jax.Array], tuple]]:
    """How many tiles (or pairs of them), and from an index to the tile's row and column."""
    tall, wide = (2 if tuning.pair == operand else 1 for operand in ("b", "a"))
    shape = pl.cdiv(n_rows, tall), pl.cdiv(n_columns, wide)

    def place(index):
        row, column = plgpu.planar_snake(index, shape, 0, min(tuning.band, shape[0]))
        member = lax.axis_index("pair") if tuning.pair else 0
        return row * tall + (member if tall == 2 else 0), column * wide + (member if wide == 2 else 0)

    return shape[0] * shape[1], place


def _out(ref, row, column, tuning):
    return lambda group, start, size: ref.at[
        pl.ds(row * tuning.rows + group * HALF, HALF), pl.ds(column * tuning.width + start, size)]


def rows_times_blocks(
    a: Tiles, b: Blocks, expert_Z: jax.Array | None, out: jax.ShapeDtypeStruct, tuning: Tuning,
) -> jax.Array:
    """a [M, K] times b [E, N, K] of the expert of every 128 rows (or b [N, K]): out [m <= M, n <= N].

    m must be a multiple of 8 and n of 32. Rows of expert E, which is none, are taken for zeros: their tiles have no
    more steps than they must.
    """
    require(expert_Z is None or tuning.pair != "b", f"{tuning}: neighbouring rows of tiles may belong to two experts, "
            "so they cannot share columns of b; use pair 'a' or None")
    m, n = out.shape
    height, width = tuning.rows, tuning.width
    n_tiles, place = _grid(pl.cdiv(m, height), pl.cdiv(n, width), tuning)
    segment, last_block, last_row = math.gcd(width, DEPTH), b.scales.shape[-2] - 1, a.values.shape[0] // height - 1
    n_steps = a.values.shape[1] // DEPTH
    enough = n_steps >= tuning.least
    there = lambda step: step if enough else lax.min(step, jnp.int32(n_steps - 1))

    def tile_of(index, *refs):
        experts, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref) = refs[:-5], refs[-5:]
        row, column = place(index)
        rows, columns = pl.ds(row * height, height), pl.ds(column * width, width)
        which, steps, real = (), max(n_steps, tuning.least), None if enough else jnp.int32(n_steps)
        if experts:
            row_block = lax.div(lax.min(row, last_row), jnp.int32(ROWS // height))
            expert, some = experts[0][row_block], jnp.int32(b.values.shape[0])
            which = (lax.min(expert, some - 1),)
            steps = lax.select(expert < some, jnp.int32(steps), jnp.int32(tuning.least))
            real = lax.select(expert < some, jnp.int32(n_steps), jnp.int32(0))
        block = lambda i: lax.min(lax.div(column * width + i * segment, DEPTH), last_block)
        depth = lambda step: pl.ds(there(step) * DEPTH, DEPTH)
        return Tile(
            steps, real,
            lambda step: a_ref.at[rows, depth(step)],
            lambda step: a_scales_ref.at[there(step), rows],
            lambda step: b_ref.at[*which, columns, depth(step)],
            lambda step: [b_scales_ref[*which, block(i), there(step)] for i in range(width // segment)],
            _out(out_ref, row, column, tuning))

    arguments = () if expert_Z is None else (expert_Z,)
    return _call(tile_of, n_tiles, False, tuning, out, *arguments, *a, *b)


def weight_gradient(
    a: Tiles, b: Tiles, start_E: jax.Array | None, steps_E: jax.Array | None, tuning: Tuning,
    into: jax.Array | None = None,
) -> jax.Array:
    """a [D, T] b [F, T]^T over all T (float32 [D, F]), or over every expert's own tokens ([E, D, F], else zero).

    Expert e has the `steps_E[e]` blocks of 128 tokens from `start_E[e]`, a multiple of 128. With `into`, of the shape
    and dtype of the result, that plus the product, in the same memory where `into` is not needed any more. The copy
    engine adds, so numbers below 2^-126 may count as 0.
    """
    height, width = tuning.rows, tuning.width
    require(width % 32 == 0, f"{tuning}: the copy engine needs the {width} scales of a tile's columns to fill a "
            "multiple of 128 bytes; use a width that is a multiple of 32")
    n_tiles, place = _grid(pl.cdiv(a.values.shape[0], height), pl.cdiv(b.values.shape[0], width), tuning)
    shape, n_blocks = (a.values.shape[0], b.values.shape[0]), a.values.shape[1] // DEPTH

    def tile_of(index, *refs):
        groups, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref) = refs[:-5], refs[-5:]
        expert, within = lax.div(index, n_tiles), lax.rem(index, n_tiles)
        row, column = place(within)
        rows, columns = pl.ds(row * height, height), pl.ds(column * width, width)
        first, real = (groups[0][expert], groups[1][expert]) if groups else (0, n_blocks)
        counted = groups or n_blocks < tuning.least
        block = lambda step: lax.min(first + step, jnp.int32(n_blocks - 1)) if counted else step
        depth = lambda step: pl.ds(block(step) * DEPTH, DEPTH)
        return Tile(
            lax.max(jnp.int32(real), jnp.int32(tuning.least)) if counted else n_blocks,
            jnp.int32(real) if counted else None,
            lambda step: a_ref.at[rows, depth(step)],
            lambda step: a_scales_ref.at[block(step), rows],
            lambda step: b_ref.at[columns, depth(step)],
            lambda step: b_scales_ref.at[block(step), columns],
            _out(out_ref.at[expert] if groups else out_ref, row, column, tuning))

    stack, groups = ((), ()) if steps_E is None else ((len(steps_E),), (start_E // DEPTH, steps_E))
    out = jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)
    if into is not None:
        require((into.shape, into.dtype) == (out.shape, out.dtype), f"`into` is {into.dtype.name} {into.shape}; "
                f"expected what the product is, float32 {out.shape}")
        out = into
    return _call(tile_of, n_tiles * math.prod(stack), True, tuning, out, *groups, *a, *b)
