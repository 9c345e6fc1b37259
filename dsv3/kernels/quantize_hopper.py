"""Quantisation in tiles on Hopper: along rows, along columns, or both from one read (report section 3.3.2).

Every step takes a square of 128 x 128 elements through shared memory. One warpgroup reads its rows and one its columns,
so that each tile of 128 elements lies in four threads, and the codes go back by way of shared memory as whole lines.
Bytes moved per bfloat16 element: 2 in, 1 out for each form.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.config.quant import Operand
from dsv3.kernels.scaled import Tiles, whole
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream
from dsv3.kernels.tile_hopper import MATRIX, PER_COLUMN, ROWS, TILE, along_columns, dtype_of, quantize_piece

ONE_FORM = Streaming(stages=2, blocks=2, split=2)
BOTH_FORMS = Streaming(stages=2, blocks=2, split=1)
REQUANTIZE = Streaming(stages=2, blocks=2, split=2)
"""Best on an H100."""


class Form(NamedTuple):
    """One quantised copy: its operand, and whether its tiles run along columns, so that it is stored transposed."""

    operand: Operand
    columns: bool


def padded(x_MK: jax.Array, rows: int = TILE, columns: int = TILE) -> jax.Array:
    """With zeros to multiples of so many rows and columns."""
    widths = [(0, -size % multiple) for size, multiple in zip(x_MK.shape, (rows, columns), strict=True)]
    return jnp.pad(x_MK, widths) if any(right for _, right in widths) else x_MK


def out_types(form: Form, m: int, k: int) -> list[jax.ShapeDtypeStruct]:
    """Values and scales of a form of [m, k]."""
    rows, columns = (k, m) if form.columns else (m, k)
    return [jax.ShapeDtypeStruct((rows, columns), dtype_of(form.operand)),
            jax.ShapeDtypeStruct((columns // TILE, rows), jnp.float32)]


def staging(form: Form) -> list[Piece]:
    """Values and scales of one square."""
    return [Piece((TILE, TILE), dtype_of(form.operand)), Piece((TILE,), jnp.float32)]


def share(split: int, height: int = ROWS) -> int:
    """Rows of a square for each of `split` warpgroups, which take `height` at a time."""
    require(TILE % (split * height) == 0,
            f"split {split}: so many warpgroups do not share {TILE} rows in pieces of {height}")
    return TILE // split


def write_square(
        part: jax.Array, split: int, row: jax.Array, column: jax.Array, piece: Callable, staged, outputs,
        height: int = ROWS) -> None:
    """One warpgroup's part of the square (row, column) of an output: `piece(rows)` gives `height` rows at a time."""
    reuse()
    per_part = share(split, height)
    for start in range(0, per_part, height):
        rows = pl.ds(part * per_part + start, height)
        staged[0][rows], staged[1][rows] = piece(rows)
    plgpu.commit_smem()
    copy_square(part, split, row, column, staged, outputs)


def copy_square(part: jax.Array, split: int, row: jax.Array, column: jax.Array, staged, outputs) -> None:
    """Values and scales of a part of a square, from where they are staged to where they belong."""
    per_part = TILE // split
    mine, rows = pl.ds(part * per_part, per_part), pl.ds(row * TILE + part * per_part, per_part)
    plgpu.copy_smem_to_gmem(staged[0].at[mine], outputs[0].at[rows, pl.ds(column * TILE, TILE)])
    plgpu.copy_smem_to_gmem(staged[1].at[mine], outputs[1].at[column, rows])


def square_of(ref, i, j):
    """The square (i, j) of a matrix in device memory."""
    return ref.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)]


def quantize_forms(x_MK: jax.Array, forms: list[Form], settings: Streaming) -> list[Tiles]:
    """Every form of a bfloat16 matrix from one read."""
    share(settings.split)
    m, k = map(whole, x_MK.shape)
    x_MK = padded(x_MK, 8, TILE // 2)  # what the copy engine counts in; beyond the array it reads zeros

    def work(step, pieces, staged, outputs):
        for index, form in enumerate(forms):
            square = pieces[0].transpose((1, 0)) if form.columns else pieces[0]
            pair = slice(2 * index, 2 * index + 2)

            @pl.when(lax.div(step.group, settings.split) == index)
            def _(form=form, square=square, pair=pair):
                piece = lambda rows: quantize_piece(plgpu.load(square.at[rows], layout=MATRIX), form.operand)
                part = lax.rem(step.group, settings.split)
                row, column = (step.j, step.i) if form.columns else (step.i, step.j)
                write_square(part, settings.split, row, column, piece, staged[pair], outputs[pair])

    out = stream(
        work, (x_MK,), sum((out_types(form, m, k) for form in forms), []), tiles=(m // TILE, k // TILE),
        pieces=[Piece((TILE, TILE), x_MK.dtype)], source=lambda i, j, x_ref: [square_of(x_ref, i, j)],
        staging=sum((staging(form) for form in forms), []), warpgroups=len(forms) * settings.split, settings=settings)
    return [Tiles(*out[2 * index:2 * index + 2]) for index in range(len(forms))]


def quantize_rows(x_MK: jax.Array, operand: Operand, settings: Streaming = ONE_FORM) -> Tiles:
    """Tiles along features: what the forward product and the gradient of its input read."""
    return quantize_forms(x_MK, [Form(operand, columns=False)], settings)[0]


def quantize_columns(x_MK: jax.Array, operand: Operand, settings: Streaming = ONE_FORM) -> Tiles:
    """Tiles along tokens, transposed: what the gradient of a weight reads."""
    return quantize_forms(x_MK, [Form(operand, columns=True)], settings)[0]


def quantize_both(
        x_MK: jax.Array, rows_operand: Operand, columns_operand: Operand,
        settings: Streaming = BOTH_FORMS) -> tuple[Tiles, Tiles]:
    """`quantize_rows` and `quantize_columns` from one read."""
    return tuple(quantize_forms(x_MK, [Form(rows_operand, False), Form(columns_operand, True)], settings))


def requantize_columns(tiles_MK: Tiles, operand: Operand, settings: Streaming = REQUANTIZE) -> Tiles:
    """`quantize_columns` of the numbers that tiles stand for (report section 3.5.2).

    The matrix loads transpose 16-bit elements only, so codes of 8 bits are widened in shared memory, which is exact.
    """
    per_part, (values, scales) = share(settings.split), tiles_MK
    (m, k), form, wide = values.shape, Form(operand, columns=True), jnp.dtype(values.dtype).itemsize == 2

    def work(step, pieces, staged, outputs):
        codes, row_scales = pieces
        if wide:
            square = codes
        else:
            square = staged[2]
            step.meet()  # all have read the square before
            for start in range(0, per_part, ROWS):
                rows = pl.ds(step.group * per_part + start, ROWS)
                square[rows] = plgpu.load(codes.at[rows], layout=MATRIX).astype(jnp.float16)
            step.meet()
        square = square.transpose((1, 0))

        def piece(rows):
            x = plgpu.load(square.at[rows], layout=MATRIX).astype(jnp.float32)
            return quantize_piece(x * along_columns(plgpu.load(row_scales, layout=PER_COLUMN), x), operand)

        write_square(step.group, settings.split, step.j, step.i, piece, staged[:2], outputs)

    return Tiles(*stream(
        work, (values, scales), out_types(form, m, k), tiles=(m // TILE, k // TILE),
        pieces=[Piece((TILE, TILE), values.dtype), Piece((TILE,), jnp.float32)],
        source=lambda i, j, values_ref, scales_ref: [
            square_of(values_ref, i, j), scales_ref.at[j, pl.ds(i * TILE, TILE)]],
        staging=staging(form) + ([] if wide else [Piece((TILE, TILE), jnp.float16)]),
        warpgroups=settings.split, settings=settings))
