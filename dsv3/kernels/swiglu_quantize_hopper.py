"""SwiGLU with quantised results on Hopper, forward and backward, each one pass over memory (report section 3.3.3).

Forward, a step reads the squares of gate and up that belong together and writes h and both as they are kept. Backward,
it reads those and the gradient of h, and writes the gradients of gate and up along rows and along columns, and h along
columns. The columns' warpgroups compute everything again from transposed reads: exchanging float32 through shared
memory would cost as much. Bytes moved for each element of h: 7 forward, 9 backward.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.config.quant import Operand
from dsv3.kernels.quantize_hopper import Form, copy_square, out_types, padded, square_of, staging, write_square
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream
from dsv3.kernels.tile_hopper import (
    MATRIX,
    ROWS,
    SHORT,
    SHORT_PER_COLUMN,
    SHORT_PER_ROW,
    SHORT_ROWS,
    TILE,
    along_columns,
    along_rows,
    quantize_piece,
)

FORWARD = Streaming(stages=2, blocks=1, split=2)
BACKWARD = Streaming(stages=1, blocks=1, split=2)
"""Best on an H100."""


def sigmoid(x: jax.Array) -> jax.Array:
    """Of float32."""
    return 1 / (1 + jnp.exp(-x))


def _halves(width: int) -> int:
    """Columns of tiles in each half of gate_up. Raises `UserError` for halves with broken tiles."""
    require(width % (2 * TILE) == 0, f"gate_up has {width} columns; expected a multiple of {2 * TILE}")
    return width // (2 * TILE)


def swiglu_quantize(
        gate_up_MF: jax.Array, rows: Operand, kept: Operand | None,
        settings: Streaming = FORWARD) -> tuple[Tiles, Tiles | jax.Array]:
    """h = silu(gate) * up in tiles along features, [M', F / 2], and gate_up as it waits, [M', F], or itself."""
    wide, x_MF = _halves(gate_up_MF.shape[1]), padded(gate_up_MF)
    m, split = len(x_MF), settings.split
    form, kept_form = Form(rows, columns=False), Form(kept or rows, columns=False)

    def work(step, pieces, staged, outputs):
        part = lax.rem(step.group, split)
        load = lambda piece, rows: plgpu.load(piece.at[rows], layout=MATRIX)

        def h(of_rows):
            gate, up = (load(piece, of_rows).astype(jnp.float32) for piece in pieces)
            return quantize_piece((gate * sigmoid(gate) * up).astype(x_MF.dtype), rows)

        @pl.when(step.group < split)
        def _():
            write_square(part, split, step.i, step.j, h, staged[:2], outputs[:2])

        if kept is not None:
            @pl.when(step.group >= split)
            def _():
                for half, piece in enumerate(pieces):
                    write_square(
                        part, split, step.i, step.j + half * wide,
                        lambda of_rows, piece=piece: quantize_piece(load(piece, of_rows), kept),
                        staged[2 + 2 * half:4 + 2 * half], outputs[2:])

    out = stream(
        work, (x_MF,), out_types(form, m, wide * TILE) + (
            [] if kept is None else out_types(kept_form, m, 2 * wide * TILE)),
        tiles=(m // TILE, wide), pieces=[Piece((TILE, TILE), x_MF.dtype)] * 2,
        source=lambda i, j, x_ref: [square_of(x_ref, i, j), square_of(x_ref, i, j + wide)],
        staging=staging(form) + ([] if kept is None else 2 * staging(kept_form)),
        warpgroups=split if kept is None else 2 * split, settings=settings)
    return Tiles(*out[:2]), gate_up_MF if kept is None else Tiles(*out[2:])


def swiglu_backward_quantize(
        kept: Tiles | jax.Array, d_h_MF: jax.Array, weight_M: jax.Array | None, rows: Operand, columns: Operand,
        h_columns: Operand, settings: Streaming = BACKWARD) -> tuple[Tiles, Tiles, Tiles, jax.Array | None]:
    """The gradient of gate_up, both ways, and weight * h along columns, from gate_up as it was kept.

    `d_h_MF` [M, F / 2] is the gradient of h, in bfloat16, without the gate weights `weight_M` of experts' rows. Returns
    d_gate_up [M', F], its transpose [F, M'], (weight * h) transposed [F / 2, M'], and d_weight[m] = sum over features
    of h * d_h, or None without weights.
    """
    codes, scales = kept if isinstance(kept, Tiles) else (padded(kept), None)
    n_rows, split, widen = len(d_h_MF), settings.split, jnp.dtype(codes.dtype).itemsize == 1
    (m, f), wide, d_h_MF = codes.shape, _halves(codes.shape[1]), padded(d_h_MF)
    weighted, scaled = weight_M is not None, scales is not None
    row_form, column_form, h_form = Form(rows, False), Form(columns, True), Form(h_columns, True)

    def source(i, j, codes_ref, d_h_ref, *rest):
        tokens = pl.ds(i * TILE, TILE)
        vectors = [rest[0].at[j, tokens], rest[0].at[j + wide, tokens]] if scaled else []
        return [square_of(codes_ref, i, j), square_of(codes_ref, i, j + wide), square_of(d_h_ref, i, j),
                *vectors, *([rest[-1].at[tokens]] if weighted else [])]

    def work(step, pieces, staged, outputs):
        part, squares = lax.rem(step.group, split), pieces[:3]
        if widen:
            squares = [*staged[-2:], pieces[2]]
            step.meet()  # all have read the squares before
            for half in range(2):
                @pl.when(lax.div(step.group, split) == half)
                def _(half=half):
                    for start in range(0, TILE // split, ROWS):
                        some = pl.ds(part * (TILE // split) + start, ROWS)
                        squares[half][some] = plgpu.load(pieces[half].at[some], layout=MATRIX).astype(jnp.float16)
            step.meet()

        def load(some, transposed):
            """Gate, up and the gradient of h, and what spreads a number for every token, for some of the rows."""
            spread = along_columns if transposed else along_rows
            of_tokens = lambda ref: (plgpu.load(ref, layout=SHORT_PER_COLUMN) if transposed
                                     else plgpu.load(ref.at[some], layout=SHORT_PER_ROW))
            square = lambda ref: plgpu.load(
                (ref.transpose((1, 0)) if transposed else ref).at[some], layout=SHORT).astype(jnp.float32)
            gate, up, d_h = map(square, squares)
            if scaled:
                gate, up = (x * spread(of_tokens(ref), x) for x, ref in zip((gate, up), pieces[3:5], strict=True))
            return gate, up, d_h, spread(of_tokens(pieces[-1]), gate) if weighted else None

        def results(some, transposed):
            """Gradients of gate and up, weight * h, and h * d_h."""
            gate, up, d_h, weight = load(some, transposed)
            sig = sigmoid(gate)
            silu = gate * sig
            h, change = silu * up, None
            if weighted:
                change, h, d_h = h * d_h, h * weight, d_h * weight
            return d_h * up * sig * (1 + gate * (1 - sig)), d_h * silu, h, change

        def each(transposed, operands, staged, outputs, row):
            """Quantise and write as many of the results as there are operands."""
            reuse()
            for start in range(0, TILE // split, SHORT_ROWS):
                some = pl.ds(part * (TILE // split) + start, SHORT_ROWS)
                *arrays, change = results(some, transposed)
                for index, operand in enumerate(operands):
                    staged[2 * index][some], staged[2 * index + 1][some] = quantize_piece(arrays[index], operand)
                if weighted and not transposed:
                    staged[4][some] = jnp.sum(change, axis=1)
            plgpu.commit_smem()
            for index in range(len(operands)):
                pair = slice(2 * index, 2 * index + 2)
                copy_square(part, split, *row(index), staged[pair], outputs[index])

        @pl.when(step.group < split)
        def _():
            each(False, [rows] * 2, [*staged[:4], staged[10]], [outputs[:2]] * 2,
                 lambda index: (step.i, step.j + index * wide))
            if weighted:
                mine = pl.ds(part * (TILE // split), TILE // split)
                tokens = pl.ds(step.i * TILE + part * (TILE // split), TILE // split)
                plgpu.copy_smem_to_gmem(staged[10].at[mine], outputs[6].at[step.j, tokens])

        @pl.when(step.group >= split)
        def _():
            each(True, [columns, columns, h_columns], staged[4:10], [outputs[2:4]] * 2 + [outputs[4:6]],
                 lambda index: (step.j + (wide if index == 1 else 0), step.i))

    vector = Piece((TILE,), jnp.float32)
    square = lambda dtype: Piece((TILE, TILE), dtype, swizzle=128 if dtype.itemsize == 1 else 2 * SHORT_ROWS)
    arguments = [codes, d_h_MF, *([scales] if scaled else []),
                 *([jnp.pad(weight_M.astype(jnp.float32), (0, m - n_rows))] if weighted else [])]
    out = stream(
        work, tuple(arguments),
        out_types(row_form, m, f) + out_types(column_form, m, f) + out_types(h_form, m, f // 2)
        + ([jax.ShapeDtypeStruct((wide, m), jnp.float32)] if weighted else []),
        tiles=(m // TILE, wide),
        pieces=[square(codes.dtype)] * 2 + [square(d_h_MF.dtype)] + [vector] * (2 * scaled + weighted), source=source,
        staging=2 * staging(row_form) + 2 * staging(column_form) + staging(h_form) + [vector]
        + [square(jnp.dtype(jnp.float16))] * (2 * widen),
        warpgroups=2 * split, settings=settings, approximate=True)
    d_weight_M = jnp.sum(out[6], axis=0)[:n_rows] if weighted else None
    return Tiles(*out[:2]), Tiles(*out[2:4]), Tiles(*out[4:6]), d_weight_M
