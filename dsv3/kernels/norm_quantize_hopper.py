"""RMSNorm with quantised results on Hopper.

Along rows, every warpgroup takes a whole row: one read gives its mean square and then its codes, 3 bytes moved for each
bfloat16 element. Tiles along columns need 128 rows, which do not fit: they are a second read, with the factors of the
rows from the first; 6 bytes in all.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.config.quant import Operand
from dsv3.kernels.quantize_hopper import ONE_FORM, Form, out_types, square_of, staging, write_square
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream
from dsv3.kernels.tile_hopper import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    TILE,
    along_columns,
    along_rows,
    dtype_of,
    quantize_piece,
)

NORM = Streaming(stages=2, blocks=2, split=2)
"""Best on an H100. `split` is the rows of one step, each with a warpgroup of its own: a divisor of 128."""
WARPS, EIGHT = 4, 8


def tiles_held(k: int) -> int:
    """Tiles of a row with those of zeros that make every warp hold as many."""
    return -(-k // (WARPS * TILE)) * WARPS


def refusal(k: int) -> str | None:
    """Why rows of k elements have no kernel here, or None."""
    if k % TILE:
        return f"rows of {k} elements: they must be multiples of {TILE}"
    n_tiles, held = k // TILE, tiles_held(k)
    if n_tiles < held and held > EIGHT and held % EIGHT == 0:
        return (f"rows of {n_tiles} tiles of {TILE}: beyond {EIGHT}, the copy engine cannot fill up what is up to "
                f"three less than a multiple of {EIGHT}")
    return None


def layout_of_row(k: int) -> plgpu.Layout:
    """How a warpgroup holds a row as [K / 128, 128]: every tile in one warp, or in half of one where K allows.

    All threads of a tile compute its scale, so the fewer they are, the better. Each holds four neighbours, as loads of
    more than 16 bytes from shared memory bring other elements (jax 0.11.2: they ignore its swizzle).
    """
    if k % (8 * TILE):
        return plgpu.Layout.TILED(plgpu.Tiling(((4, TILE), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, TILE), (2, TILE), (2, TILE // 2), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def norm_quantize(
        x_MK: jax.Array, gain_K: jax.Array, eps: float, rows: Operand, columns: Operand | None,
        settings: Streaming = NORM, column_settings: Streaming = ONE_FORM) -> tuple[Tiles, Tiles | None]:
    """`rms_norm`, rounded to the dtype of x as it is there, then quantised; the columns only where asked for.

    Raises `UserError` for what `refusal` names, and unless `eps` is positive and `split` divides 128.
    """
    n_rows, k = x_MK.shape
    require(eps > 0, f"eps {eps}; expected a positive number: rows of padding are zeros")
    require(refusal(k) is None, f"no Hopper kernel for {refusal(k)}")
    require(TILE % settings.split == 0, f"{settings}: `split` must divide {TILE}, to which rows are padded")
    x_MK, gain_K = jnp.pad(x_MK, ((0, -n_rows % TILE), (0, 0))), gain_K.astype(jnp.float32)
    tiles, factor_M = _normed_rows(x_MK, gain_K, eps, rows, settings)
    return tiles, None if columns is None else _normed_columns(x_MK, gain_K, factor_M, columns, column_settings)


def _normed_rows(x_MK, gain_K, eps, operand, settings):
    (m, k), at_once, whole_row = x_MK.shape, settings.split, layout_of_row(x_MK.shape[1])
    n_tiles, held = k // TILE, tiles_held(k)
    row = lambda dtype, ragged=False: Piece((held, TILE), dtype, swizzle=0, ragged=ragged)
    everywhere = plgpu.Layout.TILED(
        plgpu.Tiling(((held,),)), warp_dims=(plgpu.Replicated(4),), lane_dims=(plgpu.Replicated(32),),
        vector_dim=-1)

    def work(step, pieces, staged, outputs):
        for mine in range(at_once):
            @pl.when(step.group == mine)
            def _(mine=mine):
                values_smem, sums = staged[mine], staged[at_once + mine]
                x = plgpu.load(pieces[mine], layout=whole_row, optimized=False)
                x32 = x.astype(jnp.float32)
                sums[...] = jnp.sum(x32 * x32, axis=1)
                plgpu.commit_smem()
                factor = lax.rsqrt(jnp.sum(plgpu.load(sums, layout=everywhere, optimized=False)) / k + eps)
                gain = plgpu.load(step.constants[0], layout=whole_row, optimized=False)
                values, scales = quantize_piece((x32 * factor * gain).astype(x.dtype), operand)
                index = step.i * at_once + mine
                reuse()
                values_smem[...] = values
                plgpu.commit_smem()
                real = values_smem if held == n_tiles else values_smem.at[pl.ds(0, n_tiles)]
                plgpu.copy_smem_to_gmem(real, outputs[0].at[index])
                outputs[1][:, index] = scales
                outputs[2][index] = factor

    def source(i, j, x_ref, _):
        rows = [x_ref.at[i * at_once + index] for index in range(at_once)]
        return rows if held == n_tiles else [x.at[pl.ds(j * held, held)] for x in rows]

    gain_K = jnp.pad(gain_K, (0, (held - n_tiles) * TILE))  # where a row ends in zeros, so does the gain
    values, scales, factor_M = stream(
        work, (x_MK.reshape(m, n_tiles, TILE), gain_K.reshape(held, TILE)),
        [jax.ShapeDtypeStruct((m, n_tiles, TILE), dtype_of(operand)),
         jax.ShapeDtypeStruct((held, m), jnp.float32), jax.ShapeDtypeStruct((m,), jnp.float32)],
        tiles=(m // at_once, 1), pieces=[row(x_MK.dtype, held > n_tiles)] * at_once, source=source,
        staging=[row(dtype_of(operand))] * at_once + [Piece((held,), jnp.float32)] * at_once,
        warpgroups=at_once, settings=settings, constants=(row(jnp.float32),))
    return Tiles(values.reshape(m, k), scales[:n_tiles]), factor_M


def _normed_columns(x_MK, gain_K, factor_M, operand, settings):
    (m, k), form = x_MK.shape, Form(operand, columns=True)

    def work(step, pieces, staged, outputs):
        square, factors, gains = pieces[0].transpose((1, 0)), pieces[1], pieces[2]

        def piece(rows):
            x = plgpu.load(square.at[rows], layout=MATRIX)
            x32 = x.astype(jnp.float32) * along_columns(plgpu.load(factors, layout=PER_COLUMN), x)
            gain = along_rows(plgpu.load(gains.at[rows], layout=PER_ROW), x)
            return quantize_piece((x32 * gain).astype(x.dtype), operand)

        write_square(step.group, settings.split, step.j, step.i, piece, staged, outputs)

    return Tiles(*stream(
        work, (x_MK, factor_M, gain_K), out_types(form, m, k), tiles=(m // TILE, k // TILE),
        pieces=[Piece((TILE, TILE), x_MK.dtype), Piece((TILE,), jnp.float32), Piece((TILE,), jnp.float32)],
        source=lambda i, j, x_ref, factor_ref, gain_ref: [
            square_of(x_ref, i, j), factor_ref.at[pl.ds(i * TILE, TILE)], gain_ref.at[pl.ds(j * TILE, TILE)]],
        staging=staging(form), warpgroups=settings.split, settings=settings))
