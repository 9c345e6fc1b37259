"""`grouped_dot` on Hopper tensor cores: one persistent Pallas kernel for the product and both of its gradients.

Every expert's rows fill whole blocks of `BLOCK` rows, so a tile of the output belongs to one expert and nothing is
masked. On every multiprocessor one warpgroup streams operand tiles into shared memory, running ahead across output
tiles, while two others multiply, each its half of the tile's rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.kernels.grouped_dot import block_experts, block_starts

BLOCK = 128
"""Rows of an output tile, and what every expert's rows are padded to."""
STEP = 64
"""Depth of one multiplication: 128 bytes of bfloat16, the widest swizzle."""
STAGES = 4
"""Operand tiles in flight: 4 x 48 KiB of the 227 KiB of shared memory."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on any other number the kernel is right, only less evenly spread."""


class Tile(NamedTuple):
    """One output tile: how many steps it takes, its operands' tiles at a step, and where it goes."""

    steps: int | jax.Array
    a: Callable[[jax.Array], Any]
    b: Callable[[jax.Array], Any]
    out: Any


def tile_width(n: int) -> int:
    """Columns of an output tile: 256 keeps the tensor cores busiest, 128 where 256 does not divide `n`."""
    return 256 if n % 256 == 0 else 128


def refusal(n_in: int, n_out: int, dtype: jnp.dtype, block: int) -> str | None:
    """Why [J, n_in] x [E, n_in, n_out] cannot run here, or None."""
    if dtype != jnp.bfloat16:
        return f"experts in {jnp.dtype(dtype).name}: they must be bfloat16"
    if n_in % 128 or n_out % 128:
        return f"experts of {n_in} x {n_out}: both must be multiples of 128"
    return None if block % BLOCK == 0 else f"row blocks of {block}: must be a multiple of {BLOCK}"


def _transforms(dtype: jnp.dtype) -> tuple:
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _persistent(tile_of: Callable, multiply: Callable, n_tiles: int, a_shape: tuple, b_shape: tuple, out_type, *args):
    """Run `n_tiles` output tiles of [BLOCK, width] over all multiprocessors.

    `tile_of(index, *refs)` describes a tile; `multiply(accumulator, a, b, half)` adds one step to half of its rows.
    Sums over nothing, as of no rows, are zeros.
    """
    if n_tiles == 0 or not all(operand.size for operand in args[-2:]):
        return jnp.zeros(out_type.shape, out_type.dtype)
    width = b_shape[1] if multiply is not _multiply_transposed else b_shape[0]
    piece = 128 // jnp.dtype(out_type.dtype).itemsize

    def kernel(*refs):
        scoped = partial(
            pl.run_scoped,
            a_smem=plgpu.SMEM((STAGES, *a_shape), jnp.bfloat16, transforms=_transforms(jnp.bfloat16)),
            b_smem=plgpu.SMEM((STAGES, *b_shape), jnp.bfloat16, transforms=_transforms(jnp.bfloat16)),
            out_smem=plgpu.SMEM((2, 2, BLOCK // 2, piece), out_type.dtype, transforms=_transforms(out_type.dtype)),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            collective_axes="group")

        @scoped
        def _(a_smem, b_smem, out_smem, full, empty):
            group = lax.axis_index("group")
            each_tile = plgpu.nd_loop((n_tiles,), collective_axes="multiprocessor", init_carry=jnp.int32(0))

            @pl.when(group == 2)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                @each_tile
                def count(loop, carry):
                    tile = tile_of(loop.index[0], *refs)

                    def load(step, count):
                        slot = lax.rem(count, STAGES)

                        @pl.when(count >= STAGES)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        plgpu.copy_gmem_to_smem(tile.a(step), a_smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(tile.b(step), b_smem.at[slot], full.at[slot])
                        return count + 1

                    return lax.fori_loop(0, tile.steps, load, carry)

                for last in range(STAGES):  # no barrier is left with an arrival that nobody saw
                    @pl.when(count > last)
                    def _(last=last):
                        plgpu.barrier_wait(empty.at[lax.rem(count - 1 - last, STAGES)])

            @pl.when(group < 2)
            def _():
                plgpu.set_max_registers(232, action="increase")

                @each_tile
                def _(loop, carry):
                    tile = tile_of(loop.index[0], *refs)

                    def accumulate(acc):
                        def step(_, count):
                            slot = lax.rem(count, STAGES)
                            plgpu.barrier_wait(full.at[slot])
                            multiply(acc, a_smem.at[slot], b_smem.at[slot], group)
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])
                            return count + 1

                        count = lax.fori_loop(0, tile.steps, step, carry)
                        return acc[...], count

                    acc, count = pl.run_scoped(accumulate, plgpu.ACC((BLOCK // 2, width)))
                    acc = acc.astype(out_type.dtype)
                    for i in range(width // piece):
                        staged = out_smem.at[group, i % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        staged[...] = acc[:, i * piece:(i + 1) * piece]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            staged, tile.out.at[pl.ds(group * (BLOCK // 2), BLOCK // 2), pl.ds(i * piece, piece)])
                    return count

                plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    return plgpu.kernel(
        kernel, out_type=out_type, grid=(min(MULTIPROCESSORS, n_tiles),), grid_names=("multiprocessor",), num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(*args)


def _half(group: jax.Array):
    return pl.ds(group * (BLOCK // 2), BLOCK // 2)


def _multiply(acc, a, b, group):
    plgpu.wgmma(acc, a.at[_half(group)], b)


def _multiply_transposed(acc, a, b, group):
    plgpu.wgmma(acc, a.at[_half(group)], b.transpose((1, 0)))


def _multiply_over_rows(acc, a, b, group):
    plgpu.wgmma(acc, a.at[:, _half(group)].transpose((1, 0)), b)


def rows_times_experts(rows_JK: jax.Array, expert_Z: jax.Array, w: jax.Array, *, transpose: bool) -> jax.Array:
    """rows @ w[expert of the row's block], or @ w[expert]^T: the product and its gradient by rows, both bfloat16.

    Blocks of expert E, which is none, are zeros.
    """
    n_out = w.shape[1 if transpose else 2]
    width = tile_width(n_out)
    n_wide = n_out // width

    def tile_of(index, expert_ref, rows_ref, w_ref, out_ref):
        block, column = lax.div(index, n_wide), lax.rem(index, n_wide)
        rows, columns = pl.ds(block * BLOCK, BLOCK), pl.ds(column * width, width)
        expert, some = expert_ref[block], jnp.int32(w.shape[0])
        matrix = w_ref.at[lax.min(expert, some - 1)]
        depth = lambda step: pl.ds(step * STEP, STEP)
        return Tile(
            lax.select(expert < some, jnp.int32(rows_JK.shape[1] // STEP), jnp.int32(0)),
            lambda step: rows_ref.at[rows, depth(step)],
            lambda step: matrix.at[columns, depth(step)] if transpose else matrix.at[depth(step), columns],
            out_ref.at[rows, columns])

    return _persistent(
        tile_of, _multiply_transposed if transpose else _multiply, rows_JK.shape[0] // BLOCK * n_wide,
        (BLOCK, STEP), (width, STEP) if transpose else (STEP, width),
        jax.ShapeDtypeStruct((rows_JK.shape[0], n_out), rows_JK.dtype), expert_Z, rows_JK, w)


def weight_gradient(rows_JD: jax.Array, start_E: jax.Array, steps_E: jax.Array, d_out_JF: jax.Array) -> jax.Array:
    """rows^T @ d_out over every expert's own rows, float32 [E, D, F]; zero where an expert has none."""
    (_, n_in), (_, n_out) = rows_JD.shape, d_out_JF.shape
    width = tile_width(n_out)
    n_tall, n_wide = n_in // BLOCK, n_out // width

    def tile_of(index, start_ref, steps_ref, rows_ref, d_out_ref, out_ref):
        expert, within = lax.div(index, n_tall * n_wide), lax.rem(index, n_tall * n_wide)
        tall, wide = pl.ds(lax.div(within, n_wide) * BLOCK, BLOCK), pl.ds(lax.rem(within, n_wide) * width, width)
        start = start_ref[expert]
        rows = lambda step: pl.ds(pl.multiple_of(start + step * STEP, STEP), STEP)
        return Tile(
            steps_ref[expert],
            lambda step: rows_ref.at[rows(step), tall],
            lambda step: d_out_ref.at[rows(step), wide],
            out_ref.at[expert, tall, wide])

    return _persistent(
        tile_of, _multiply_over_rows, len(start_E) * n_tall * n_wide, (STEP, BLOCK), (STEP, width),
        jax.ShapeDtypeStruct((len(start_E), n_in, n_out), jnp.float32), start_E, steps_E, rows_JD, d_out_JF)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot_hopper(rows_JD: jax.Array, sizes_E: jax.Array, w_EDF: jax.Array, block: int) -> jax.Array:
    """`grouped_dot` for bfloat16 rows and widths that are multiples of 128 (`refusal` says why not)."""
    return _forward(rows_JD, sizes_E, w_EDF, block)[0]


def _forward(rows_JD, sizes_E, w_EDF, block):
    # One block of BLOCK rows belongs to one expert also where the caller's blocks are several of ours.
    expert_Z = jnp.repeat(block_experts(sizes_E, rows_JD.shape[0] // block, block), block // BLOCK)
    out_JF = rows_times_experts(rows_JD, expert_Z, w_EDF.astype(rows_JD.dtype), transpose=False)
    return out_JF, (rows_JD, sizes_E, expert_Z, w_EDF)


def _backward(block, residuals, d_out_JF):
    rows_JD, sizes_E, expert_Z, w_EDF = residuals
    d_rows_JD = rows_times_experts(d_out_JF, expert_Z, w_EDF.astype(rows_JD.dtype), transpose=True)
    steps_E = (sizes_E + STEP - 1) // STEP  # rows of padding are zero, so the last step may run into them
    d_w_EDF = weight_gradient(rows_JD, block_starts(sizes_E, block), steps_E, d_out_JF)
    return d_rows_JD, None, d_w_EDF.astype(w_EDF.dtype)


grouped_dot_hopper.defvjp(_forward, _backward)
