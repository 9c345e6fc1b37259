"""Moving rows to expert order and back on Hopper, at the speed of memory.

Whole rows travel by the copy engine, which only needs to be told where each begins. Bytes moved: every row once in and
once out to expert order; K rows in and one out for the sum that brings them back.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Piece, Streaming, no_room, reuse, stream

PERMUTE, COMBINE = Streaming(stages=3, blocks=2, split=4), Streaming(stages=3, blocks=4, split=1024)
"""Best on an H100. `split` is, to expert order, the rows of one step; back, the elements of a row at most."""


def piece_of_row(d: int, limit: int) -> tuple[int, int]:
    """The piece of a row of `d` elements that one step takes, and how many of them neighbour in a thread.

    Threads read as many bytes at once as they can, so the widest reads decide, and then the longest piece.
    """
    vector, width = max(
        (next(size for size in (8, 4, 2, 1) if width % (128 * size) == 0), width)
        for width in range(128, min(d, limit) + 1, 128) if d % width == 0)
    return width, vector


def no_room_to_permute(tiles_TD: Tiles, token_J: jax.Array, settings: Streaming) -> str | None:
    """Why rows so wide do not fit into shared memory, or None."""
    _, d = tiles_TD.values.shape
    row = Piece((d,), tiles_TD.values.dtype)
    return no_room(f"rows of {d} elements", settings, [row] * settings.split, row)


def no_room_to_combine(
        rows_JD: jax.Array, row_TK: jax.Array, weights_TK: jax.Array | None, settings: Streaming) -> str | None:
    """Why the rows of one token do not fit into shared memory, or None."""
    row = Piece(piece_of_row(rows_JD.shape[1], settings.split)[:1], rows_JD.dtype)
    n_choices = row_TK.shape[1]
    return no_room(f"{n_choices} rows of a token", settings, [row] * n_choices, row)


def permute_tiles(tiles_TD: Tiles, token_J: jax.Array, settings: Streaming = PERMUTE) -> Tiles:
    """Row j of the result is row token_J[j] with its scales: [J, D]. Where the token is T or more: 0, with scale 1.

    J must be a multiple of `settings.split`.
    """
    values_TD, scales = tiles_TD
    (n_tokens, d), n_rows, at_once = values_TD.shape, len(token_J), settings.split
    lane = plgpu.Layout.WG_STRIDED((d,), vec_size=next(size for size in (4, 2, 1) if d % (128 * size) == 0))

    def source(i, j, token_ref, values_ref):
        tokens = [jnp.minimum(token_ref[i * at_once + row], n_tokens - 1) for row in range(at_once)]
        return [values_ref.at[token] for token in tokens]

    def work(step, pieces, staged, outputs):
        first = step.i * at_once
        reals = [step.inputs[0][first + row] < n_tokens for row in range(at_once)]
        for row, (piece, real) in enumerate(zip(pieces, reals, strict=True)):
            index = first + row

            @pl.when(real)
            def _(piece=piece, index=index):
                plgpu.copy_smem_to_gmem(piece, outputs[0].at[index])

            @pl.when(jnp.logical_not(real))
            def _(index=index):
                reuse()
                staged[0][...] = plgpu.layout_cast(jnp.zeros((d,), values_TD.dtype), lane)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged[0], outputs[0].at[index])
        reuse()  # the next rows come where these are

    values_JD, = stream(
        work, (token_J, values_TD), [jax.ShapeDtypeStruct((n_rows, d), values_TD.dtype)],
        tiles=(n_rows // at_once, 1), pieces=[Piece((d,), values_TD.dtype)] * at_once, source=source,
        staging=[Piece((d,), values_TD.dtype)], warpgroups=1, settings=settings)
    return Tiles(values_JD, scales.at[:, token_J].get(mode="fill", fill_value=1))


def combine_rows(
        rows_JD: jax.Array, row_TK: jax.Array, weights_TK: jax.Array | None,
        settings: Streaming = COMBINE) -> jax.Array:
    """y_t = sum over k of weights[t, k] * rows[row_TK[t, k]], or without weights; float32 inside, k in order.

    D must be a multiple of 128.
    """
    (n_tokens, n_choices), d = row_TK.shape, rows_JD.shape[1]
    width, vector = piece_of_row(d, settings.split)
    lane = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)
    part = lambda j: pl.ds(j * width, width)
    arguments = (rows_JD, row_TK.reshape(-1)) + (() if weights_TK is None else (weights_TK.reshape(-1),))

    def source(i, j, rows_ref, row_ref, *_):
        rows = [row_ref[i * n_choices + k] for k in range(n_choices)]
        return [rows_ref.at[row, part(j)] for row in rows]

    def work(step, pieces, staged, outputs):
        terms = [plgpu.load(piece, layout=lane).astype(jnp.float32) for piece in pieces]
        if weights_TK is not None:
            weights = [step.inputs[2][step.i * n_choices + k] for k in range(n_choices)]
            terms = [term * weight for term, weight in zip(terms, weights, strict=True)]
        total = functools.reduce(operator.add, terms)
        reuse()
        staged[0][...] = total.astype(rows_JD.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged[0], outputs[0].at[step.i, part(step.j)])

    return stream(
        work, arguments, [jax.ShapeDtypeStruct((n_tokens, d), rows_JD.dtype)], tiles=(n_tokens, d // width),
        pieces=[Piece((width,), rows_JD.dtype)] * n_choices, source=source, staging=[Piece((width,), rows_JD.dtype)],
        warpgroups=1, settings=settings)[0]
