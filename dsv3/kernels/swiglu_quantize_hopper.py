"""SwiGLU with quantised results on Hopper, forward and backward, each one pass over memory (report section 3.3.3).

Forward, a step reads the squares of gate and up that belong together and writes h and both as they are kept. Backward,
it reads those and the gradient of h, and writes the gradients of gate and up along rows and along columns, and h along
columns. What goes along columns passes through shared memory in bfloat16, to be read transposed. Bytes moved for each
element of h: 7 forward, 9 backward.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.config.quant import Operand
from dsv3.kernels.quantize_hopper import Form, copy_square, out_types, padded, share, square_of, staging, write_square
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream
from dsv3.kernels.tile_hopper import (
    MATRIX,
    SHORT,
    SHORT_PER_ROW,
    SHORT_ROWS,
    TILE,
    along_rows,
    dtype_of,
    quantize_piece,
)

FORWARD = Streaming(stages=2, blocks=1, split=2)
BACKWARD = Streaming(stages=2, blocks=1, split=4)
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
    share(split)
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
    n_rows, split = len(d_h_MF), settings.split
    (m, f), wide, d_h_MF = codes.shape, _halves(codes.shape[1]), padded(d_h_MF)
    weighted, scaled = weight_M is not None, scales is not None
    row_form, column_form, h_form = Form(rows, False), Form(columns, True), Form(h_columns, True)
    per_part, one_staging = share(split, SHORT_ROWS), dtype_of(columns) == dtype_of(h_columns)

    def source(i, j, codes_ref, d_h_ref, *rest):
        tokens = pl.ds(i * TILE, TILE)
        vectors = [rest[0].at[j, tokens], rest[0].at[j + wide, tokens]] if scaled else []
        return [square_of(codes_ref, i, j), square_of(codes_ref, i, j + wide), square_of(d_h_ref, i, j),
                *vectors, *([rest[-1].at[tokens]] if weighted else [])]

    def results(pieces, some):
        """Gradients of gate and up and weight * h in bfloat16, for some of the rows, and the sums of h * d_h."""
        of_rows = lambda ref, like: along_rows(plgpu.load(ref.at[some], layout=SHORT_PER_ROW), like)
        gate, up, d_h = (plgpu.load(square.at[some], layout=SHORT).astype(jnp.float32) for square in pieces[:3])
        if scaled:
            gate, up = (x * of_rows(ref, x) for x, ref in zip((gate, up), pieces[3:5], strict=True))
        sig = sigmoid(gate)
        silu = gate * sig
        h, change = silu * up, None
        if weighted:
            weight = of_rows(pieces[-1], gate)
            change, h, d_h = jnp.sum(h * d_h, axis=1), h * weight, d_h * weight
        d_gate = d_h * up * sig * (1 + gate * (1 - sig))
        return *(x.astype(d_h_MF.dtype) for x in (d_gate, d_h * silu, h)), change

    def work(step, pieces, staged, outputs):
        parts = [pl.ds(step.group * per_part + start, SHORT_ROWS) for start in range(0, per_part, SHORT_ROWS)]
        d_gate_square, square = pieces[2], staged[7]  # the gradient of h makes room for that of gate

        def write_columns(source, form, row, staged, out):
            """Tiles along columns of a whole square, every warpgroup its share of them."""
            reuse()
            for some in parts:
                x = plgpu.load(source.transpose((1, 0)).at[some], layout=SHORT)
                staged[0][some], staged[1][some] = quantize_piece(x, form.operand)
            plgpu.commit_smem()
            copy_square(step.group, split, row, step.i, staged, out)

        step.meet()  # all have read the square of the tile before
        kept_h = []
        reuse()
        for some in parts:
            d_gate, d_up, h, change = results(pieces, some)
            kept_h.append(h)
            for index, x in enumerate((d_gate, d_up)):
                staged[2 * index][some], staged[2 * index + 1][some] = quantize_piece(x, rows)
            d_gate_square[some], square[some] = d_gate, d_up
            if weighted:
                staged[6][some] = change
        plgpu.commit_smem()
        for index in range(2):
            copy_square(step.group, split, step.i, step.j + index * wide, staged[2 * index:2 * index + 2], outputs[:2])
        if weighted:
            mine = pl.ds(step.group * per_part, per_part)
            tokens = pl.ds(step.i * TILE + step.group * per_part, per_part)
            plgpu.copy_smem_to_gmem(staged[6].at[mine], outputs[6].at[step.j, tokens])
        step.meet()
        write_columns(d_gate_square, column_form, step.j, staged[4:6], outputs[2:4])
        write_columns(square, column_form, step.j + wide, staged[4:6], outputs[2:4])
        step.meet()
        for some, h in zip(parts, kept_h, strict=True):
            square[some] = h
        step.meet()
        write_columns(square, h_form, step.j, staged[4:6] if one_staging else staged[8:], outputs[4:6])

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
        staging=2 * staging(row_form) + staging(column_form) + [vector, square(d_h_MF.dtype)]
        + ([] if one_staging else staging(h_form)),
        warpgroups=split, settings=settings, approximate=True)
    d_weight_M = jnp.sum(out[6], axis=0)[:n_rows] if weighted else None
    return Tiles(*out[:2]), Tiles(*out[2:4]), Tiles(*out[4:6]), d_weight_M
