"""What waits in 12 bits, on Hopper: quantised and packed in one read, unpacked for both readers in one (section 3.3.3).

Packed tiles are planes (`dsv3/quant/formats.py:pack`): low bytes [M, K], and behind them in every row high halves
[M, K / 2], 64 bytes a tile. So the copy engine moves them as a square and half of one, and both are whole lines.
Bytes moved for each element of 12 bits: 4.5 to pack (2 in; 1 of rows and 1.5 out), 4.5 to unpack (1.5 in; 2 and 1 out).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.quant import Operand
from dsv3.kernels.quantize_hopper import (
    Form,
    copy_square,
    out_types,
    padded,
    quantize_forms,
    share,
    square_of,
    staging,
    write_square,
)
from dsv3.kernels.scaled import Tiles, whole
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream
from dsv3.kernels.tile_hopper import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    SHORT,
    SHORT_ROWS,
    TILE,
    along_columns,
    along_rows,
    amax_of,
    decode_e5m6,
    encode,
    encode_e5m6,
    over_scale,
    pack,
    quantize_piece,
    unpack,
)
from dsv3.quant.formats import format_of

PACK = Streaming(stages=2, blocks=2, split=2)
UNPACK = Streaming(stages=2, blocks=2, split=2)
"""By shared memory alone: what fits twice into a multiprocessor."""

HALF = TILE // 2
PLANES = [Piece((TILE, TILE), jnp.uint8), Piece((TILE, HALF), jnp.uint8, swizzle=HALF)]
"""Low bytes and high halves of a square."""


def planes_of(ref, i, j, k: int, rows: int = TILE) -> list:
    """The low bytes and high halves of `rows` of the square (i, j) of a packed matrix of k columns, in device memory.

    i counts in so many rows.
    """
    some = pl.ds(i * rows, rows)
    return [ref.at[some, pl.ds(j * TILE, TILE)], ref.at[some, pl.ds(k + j * HALF, HALF)]]


def refusal(k: int, kept: Operand) -> str | None:
    """Why rows of k elements cannot wait in this format here, or None."""
    if format_of(kept.format).dtype is None and whole(k) // TILE % 2:
        return (f"rows of {k} elements in {kept.format}: the copy engine wants whole {TILE} bytes, so they must have "
                f"an even number of tiles of {TILE}")
    return None


def quantize_and_pack(
        x_MK: jax.Array, rows: Operand, kept: Operand, settings: Streaming = PACK) -> tuple[Tiles, Tiles]:
    """`quantize_rows` of a bfloat16 matrix in two formats from one read; `kept`, where it has 12 bits, is packed."""
    if format_of(kept.format).dtype is not None:
        return tuple(quantize_forms(x_MK, [Form(rows, False), Form(kept, False)], settings))
    (m, k), split, form = map(whole, x_MK.shape), settings.split, Form(rows, columns=False)
    per_part = share(split, SHORT_ROWS)

    def work(step, pieces, staged, outputs):
        reuse()
        for start in range(0, per_part, SHORT_ROWS):
            some = pl.ds(step.group * per_part + start, SHORT_ROWS)
            x = plgpu.load(pieces[0].at[some], layout=SHORT)
            amax_R = amax_of(x)
            scaled, staged[1][some] = over_scale(x, amax_R, rows)
            staged[0][some] = encode(scaled, rows)
            scaled, staged[2][some] = over_scale(x, amax_R, kept)
            staged[3][some], staged[4][some] = pack(encode_e5m6(scaled))
        plgpu.commit_smem()
        copy_square(step.group, split, step.i, step.j, staged[:2], outputs[:2])
        mine, part = pl.ds(step.group * per_part, per_part), step.i * split + step.group
        plgpu.copy_smem_to_gmem(staged[2].at[mine], outputs[3].at[step.j, pl.ds(part * per_part, per_part)])
        for plane, room in zip(staged[3:], planes_of(outputs[2], part, step.j, k, per_part), strict=True):
            plgpu.copy_smem_to_gmem(plane.at[mine], room)

    out = stream(
        work, (padded(x_MK, 8, HALF),), out_types(form, m, k) + [
            jax.ShapeDtypeStruct((m, k + k // 2), jnp.uint8), jax.ShapeDtypeStruct((k // TILE, m), jnp.float32)],
        tiles=(m // TILE, k // TILE), pieces=[Piece((TILE, TILE), x_MK.dtype, swizzle=HALF)],
        source=lambda i, j, x_ref: [square_of(x_ref, i, j)],
        staging=staging(form) + [Piece((TILE,), jnp.float32), *PLANES], warpgroups=split, settings=settings)
    return Tiles(*out[:2]), Tiles(*out[2:])


def unpack_both(
        packed: Tiles, kept: Operand, columns: Operand, dtype: jnp.dtype,
        settings: Streaming = UNPACK) -> tuple[jax.Array, Tiles]:
    """What waited as rows of the format `kept`, decoded to bfloat16, and quantised along columns, from one read.

    The numbers over their scales, which bfloat16 holds exactly, lie in one square: read by columns, they are quantised;
    then every warpgroup puts the decoded numbers of its own rows in their place.
    """
    n_tiles, m = packed.scales.shape
    k, split, twelve = n_tiles * TILE, settings.split, format_of(kept.format).dtype is None
    per_part, form = share(split), Form(columns, columns=True)

    def codes(pieces, some):
        """float32 [ROWS, 128], over their scales."""
        parts = [plgpu.load(piece.at[some], layout=MATRIX) for piece in pieces]
        return decode_e5m6(unpack(*parts)) if twelve else parts[0].astype(jnp.float16).astype(jnp.float32)

    def work(step, pieces, staged, outputs):
        *pieces, scales = pieces
        square = staged[2]
        mine = [pl.ds(step.group * per_part + start, ROWS) for start in range(0, per_part, ROWS)]
        reuse()
        for some in mine:
            square[some] = codes(pieces, some).astype(dtype)
        step.meet()

        def piece(some):
            x = plgpu.load(square.transpose((1, 0)).at[some], layout=MATRIX).astype(jnp.float32)
            return quantize_piece(x * along_columns(plgpu.load(scales, layout=PER_COLUMN), x), columns)

        write_square(step.group, split, step.j, step.i, piece, staged[:2], outputs[:2])
        step.meet()  # all have read the square
        for some in mine:
            x = plgpu.load(square.at[some], layout=MATRIX).astype(jnp.float32)
            square[some] = (x * along_rows(plgpu.load(scales.at[some], layout=PER_ROW), x)).astype(dtype)
        plgpu.commit_smem()
        part = pl.ds(step.group * per_part, per_part)
        rows = pl.ds((step.i * split + step.group) * per_part, per_part)
        plgpu.copy_smem_to_gmem(square.at[part], outputs[2].at[rows, pl.ds(step.j * TILE, TILE)])

    def source(i, j, values_ref, scales_ref):
        planes = planes_of(values_ref, i, j, k) if twelve else [square_of(values_ref, i, j)]
        return [*planes, scales_ref.at[j, pl.ds(i * TILE, TILE)]]

    *tiles, x_MK = stream(
        work, tuple(packed), out_types(form, m, k) + [jax.ShapeDtypeStruct((m, k), dtype)],
        tiles=(m // TILE, k // TILE),
        pieces=(PLANES if twelve else [Piece((TILE, TILE), packed.values.dtype)]) + [Piece((TILE,), jnp.float32)],
        source=source, staging=staging(form) + [Piece((TILE, TILE), dtype)], warpgroups=split, settings=settings)
    return x_MK, Tiles(*tiles)
