"""Quantisation of weights on Hopper: blocks of 128 x 128, both layouts from one read (report section 3.3.2).

A block has the same codes either way, so they are rounded once, and those that cross are carried through shared memory
as 16-bit numbers, which the matrix loads transpose. Bytes moved per float32 element: 4 in, 2 out.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.config.quant import Operand
from dsv3.kernels.quantize_hopper import share, square_of
from dsv3.kernels.scaled import Blocks
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream
from dsv3.kernels.tile_hopper import (
    MATRIX,
    PER_COLUMN,
    ROWS,
    TILE,
    along_rows,
    amax_of,
    dtype_of,
    encode,
    reciprocal,
    scale_of,
)

WEIGHTS = Streaming(stages=2, blocks=1, split=2)
"""Best on an H100."""


def quantize_weights(w: jax.Array, operand: Operand, settings: Streaming = WEIGHTS) -> tuple[Blocks, Blocks]:
    """w [..., D, F] as [..., F', D'] for the forward pass and as [..., D', F'] for the gradient of its input.

    Raises `UserError` for formats of more than 8 bits.
    """
    dtype, split = dtype_of(operand), settings.split
    require(jnp.dtype(dtype).itemsize == 1, f"weights in {operand.format}; expected a format of 8 bits")
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, -size % TILE) for size in w.shape[-2:]])
    *stack, d, f = w.shape
    tall, per_part = d // TILE, share(split)
    n_stack = w.size // (d * f)

    def work(step, pieces, staged, outputs):
        plain, crossed, carried, maxima, scales = staged
        matrix, row = lax.div(step.i, tall), lax.rem(step.i, tall)
        parts = [pl.ds(step.group * per_part + start, ROWS) for start in range(0, per_part, ROWS)]
        step.meet()  # all have read what is carried, and the maxima
        for rows in parts:
            maxima[rows] = amax_of(plgpu.load(pieces[0].at[rows], layout=MATRIX))
        step.meet()
        maxima_R128 = lax.broadcast_in_dim(plgpu.load(maxima, layout=PER_COLUMN), (ROWS, TILE), (1,))
        scale_R = scale_of(amax_of(maxima_R128), operand)
        inverse_R = reciprocal(scale_R)
        reuse()
        for rows in parts:
            x = plgpu.load(pieces[0].at[rows], layout=MATRIX).astype(jnp.float32)
            codes = encode(x * along_rows(inverse_R, x), operand)
            plain[rows], scales[rows] = codes, scale_R
            carried[rows] = codes.astype(jnp.float16)
        step.meet()
        for rows in parts:
            crossed[rows] = plgpu.load(carried.transpose((1, 0)).at[rows], layout=MATRIX).astype(dtype)
        plgpu.commit_smem()
        mine = pl.ds(step.group * per_part, per_part)
        down = lambda block: pl.ds(block * TILE + step.group * per_part, per_part)
        across = lambda block: pl.ds(block * TILE, TILE)
        plgpu.copy_smem_to_gmem(crossed.at[mine], outputs[0].at[matrix, down(step.j), across(row)])
        plgpu.copy_smem_to_gmem(plain.at[mine], outputs[2].at[matrix, down(row), across(step.j)])

        @pl.when(step.group == 0)
        def _():
            scale = scales[0]
            outputs[1][matrix, step.j, row] = scale
            outputs[3][matrix, row, step.j] = scale

    forms = [(f, d), (d, f)]
    out = stream(
        work, (w.reshape(-1, f),),
        [jax.ShapeDtypeStruct(shape, kind) for rows, columns in forms for shape, kind in (
            ((n_stack, rows, columns), dtype), ((n_stack, rows // TILE, columns // TILE), jnp.float32))],
        tiles=(n_stack * tall, f // TILE), pieces=[Piece((TILE, TILE), w.dtype)],
        source=lambda i, j, w_ref: [square_of(w_ref, i, j)],
        staging=[Piece((TILE, TILE), dtype), Piece((TILE, TILE), dtype), Piece((TILE, TILE), jnp.float16),
                 Piece((TILE,), jnp.float32), Piece((TILE,), jnp.float32)],
        warpgroups=split, settings=settings)
    out = [x.reshape(*stack, *x.shape[1:]) for x in out]
    return Blocks(*out[:2]), Blocks(*out[2:])
