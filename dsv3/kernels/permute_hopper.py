"""Moving rows to expert order and back on Hopper, at the speed of memory.

Whole rows travel by the copy engine, which only needs to be told where each begins. Bytes moved: every token once in
and K times out to expert order; K rows in and one out for the sum that brings them back.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.kernels.permute import Plan, permute_scales
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Piece, Streaming, reuse, stream

PERMUTE, COMBINE = Streaming(stages=4, blocks=2, split=2), Streaming(stages=3, blocks=4, split=1024)
"""`split` is, to expert order, the tokens of one step; back, the elements of a row at most."""


def piece_of_row(d: int, limit: int) -> tuple[int, int]:
    """The piece of a row of `d` elements that one step takes, and how many of them neighbour in a thread.

    Threads read as many bytes at once as they can, so the widest reads decide, and then the longest piece. Raises
    `UserError` for a limit of less than 128.
    """
    require(limit >= 128, f"pieces of {limit} elements at most; expected at least the 128 of a warpgroup")
    vector, width = max(
        (next(size for size in (8, 4, 2, 1) if width % (128 * size) == 0), width)
        for width in range(128, min(d, limit) + 1, 128) if d % width == 0)
    return width, vector


def permute_tiles(tiles_TD: Tiles, plan: Plan, settings: Streaming = PERMUTE) -> Tiles:
    """Every token's row with its scales goes to the rows of its choices: [J, D]. Rows of padding are 0, with scale 1.

    Tokens are read in order, once each; the last steps write zeros, and load the last token again for nothing. There
    may be more rows than tokens of the plan.
    """
    values_TD, scales = tiles_TD
    d, (n_tokens, n_choices), n_padding = values_TD.shape[1], plan.row_TK.shape, len(plan.padding_P)
    at_once, of_tokens = settings.split, pl.cdiv(n_tokens, settings.split)
    zeros_at_once, row_of_pair = at_once * n_choices, plan.row_TK.reshape(-1)
    lane = plgpu.Layout.WG_STRIDED((d,), vec_size=next(size for size in (4, 2, 1) if d % (128 * size) == 0))
    tokens = lambda step: [jnp.minimum(step * at_once + one, n_tokens - 1) for one in range(at_once)]

    def work(step, pieces, staged, outputs):
        _, row_ref, padding_ref = step.inputs
        write = lambda what, row: plgpu.copy_smem_to_gmem(what, outputs[0].at[row])

        @pl.when(step.i < of_tokens)
        def _():
            rows = [[row_ref[token * n_choices + k] for k in range(n_choices)] for token in tokens(step.i)]
            for one, piece in enumerate(pieces):
                @pl.when(step.i * at_once + one < n_tokens)
                def _(piece=piece, rows=rows[one]):
                    for row in rows:
                        write(piece, row)

        @pl.when(step.i >= of_tokens)
        def _():
            staged[0][...] = plgpu.layout_cast(jnp.zeros((d,), values_TD.dtype), lane)
            plgpu.commit_smem()
            for one in range(zeros_at_once if n_padding else 0):
                number = (step.i - of_tokens) * zeros_at_once + one
                pl.when(number < n_padding)(lambda number=number: write(staged[0], padding_ref[number]))
        reuse()  # the next rows come where these are

    values_JD, = stream(
        work, (values_TD, row_of_pair, plan.padding_P if n_padding else row_of_pair),  # no argument without elements
        [jax.ShapeDtypeStruct((len(plan.pair_J), d), values_TD.dtype)],
        tiles=(of_tokens + pl.cdiv(n_padding, zeros_at_once), 1), pieces=[Piece((d,), values_TD.dtype)] * at_once,
        source=lambda i, j, values_ref, *_: [values_ref.at[token] for token in tokens(i)],
        staging=[Piece((d,), values_TD.dtype)], warpgroups=1, settings=settings)
    return Tiles(values_JD, permute_scales(scales, plan))


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
