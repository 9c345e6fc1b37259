"""RMSNorm on Hopper: one read forward, one read of x and d_out backward (4 and 6 bytes moved for each element).

A thread keeps its columns from row to row, so that the gradient of the gain stays in its registers until the thread
block is done: one partial sum a block (and a warp), which XLA adds in a fixed order. No atomics: results repeat.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3.config.errors import require
from dsv3.kernels.stream_hopper import Carry, Piece, Streaming, blocks_for, reuse, stream
from dsv3.kernels.tile_hopper import TILE, along_columns, along_rows

FORWARD = Streaming(stages=2, blocks=2, split=1)
BACKWARD = Streaming(stages=2, blocks=2, split=1)
"""Not tuned. A thread block is one warpgroup."""
WARPS, LANES = 4, 32
WIDEST = 8192
"""64 elements of every array in a thread."""
STEP = 8192
MOST_GROUPS = 8
"""Elements that one step takes at most, and groups of them, each of which is code of its own."""
EVERYWHERE = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS,),)), warp_dims=(plgpu.Replicated(WARPS),), lane_dims=(plgpu.Replicated(LANES),),
    vector_dim=-1)


def refusal(width: int, dtype) -> str | None:
    """Why rows of this width and dtype have no kernel here, or None."""
    if dtype != jnp.bfloat16:
        return f"RMSNorm in {jnp.dtype(dtype).name}: it must be bfloat16"
    if width % TILE or not TILE <= width <= WIDEST:
        return f"RMSNorm of {width} elements: it must be a multiple of {TILE} up to {WIDEST}"
    return None


class Rows(NamedTuple):
    """How a warpgroup takes rows: `groups` at a time, each of four parts, one to a warp; a row is `warps` parts."""

    warps: int
    part: int
    groups: int

    @property
    def at_once(self) -> int:
        """Rows of a step."""
        return self.groups * WARPS // self.warps

    @property
    def layout(self) -> plgpu.Layout:
        """A group [4, part]: neighbouring lanes hold neighbouring vectors of up to 16 bytes."""
        vector = next(size for size in (8, 4, 2, 1) if self.part // LANES % size == 0)
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, LANES * vector), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def piece(self, dtype) -> Piece:
        """A step's rows, as one run of bytes."""
        return Piece((self.groups * WARPS, self.part), dtype, swizzle=0)

    def load(self, ref, group: int) -> jax.Array:
        """A group of a piece, in float32."""
        part = ref.at[pl.ds(group * WARPS, WARPS)]
        return plgpu.load(part, layout=self.layout, optimized=False).astype(jnp.float32)

    def gain(self, ref, like: jax.Array) -> jax.Array:
        """The gain of every element of a group."""
        if self.warps > 1:
            return plgpu.load(ref, layout=self.layout, optimized=False)
        return along_columns(plgpu.load(ref, layout=self.layout.reduce(0), optimized=False), like)

    def whole(self, sums: list[jax.Array], scratch) -> list[jax.Array]:
        """Sums over parts, one a warp, become sums over the whole rows: the same [4], or one number a group."""
        if self.warps == 1:
            return sums
        for index, part in enumerate(sums):
            scratch[0][index] = part
        plgpu.commit_smem()
        return [jnp.sum(plgpu.load(scratch[0].at[index], layout=EVERYWHERE, optimized=False))
                for index in range(len(sums))]

    def scratch(self, sums: int) -> list[Piece]:
        """Room for so many sums of every group to meet in, where parts are less than rows."""
        return [] if self.warps == 1 else [Piece((sums * self.groups, WARPS), jnp.float32, swizzle=0)]


def rows_of(width: int) -> Rows:
    """A warp holds a row of up to 2048 elements by itself, and needs shuffles only; wider ones take all four."""
    warps = 1 if WARPS * width <= WIDEST else WARPS
    part = width // warps
    return Rows(warps, part, min(MOST_GROUPS, max(1, STEP // (WARPS * part))))


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """A number of each row, or of all of them."""
    return along_rows(x, like) if x.ndim else x


def _store(rows: Rows, staged, group: int, values: jax.Array) -> None:
    staged[pl.ds(group * WARPS, WARPS)] = values.astype(staged.dtype)


def _send(staged, out) -> None:
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, out)


def _steps(x_MK: jax.Array, rows: Rows, fill: float) -> jax.Array:
    """[steps, parts, part]: whole steps, the last one filled up."""
    n_steps = -(-len(x_MK) // rows.at_once)
    missing = n_steps * rows.at_once - len(x_MK)
    if missing:
        x_MK = jnp.pad(x_MK, ((0, missing), (0, 0)), constant_values=fill)
    return x_MK.reshape(n_steps, rows.groups * WARPS, rows.part)


def _gain_argument(gain_K: jax.Array, rows: Rows) -> tuple[jax.Array, Piece]:
    shape = (WARPS, rows.part) if rows.warps > 1 else (rows.part,)
    return gain_K.astype(jnp.float32).reshape(shape), Piece(shape, jnp.float32, swizzle=0)


def _forward(x_MK, gain_K, eps, settings):
    (m, k), rows = x_MK.shape, rows_of(x_MK.shape[1])
    x_SPK, (gain, gain_piece) = _steps(x_MK, rows, 1), _gain_argument(gain_K, rows)

    def work(step, pieces, staged, outputs):
        x_ref, out, *scratch = *pieces, *staged
        squares = [jnp.sum(jnp.square(rows.load(x_ref, group)), axis=1) for group in range(rows.groups)]
        squares = rows.whole(squares, scratch)
        reuse()
        for group in range(rows.groups):
            x = rows.load(x_ref, group)
            scale = _spread(lax.rsqrt(squares[group] / k + eps), x)
            _store(rows, out, group, x * scale * rows.gain(step.constants[0], x))
        _send(out, outputs[0].at[step.i])

    y_SPK, = stream(
        work, (x_SPK, gain), [jax.ShapeDtypeStruct(x_SPK.shape, x_MK.dtype)], tiles=(len(x_SPK), 1),
        pieces=[rows.piece(x_MK.dtype)], source=lambda i, j, x_ref, _: [x_ref.at[i]],
        staging=[rows.piece(x_MK.dtype), *rows.scratch(1)], warpgroups=1, settings=settings, constants=(gain_piece,))
    return y_SPK.reshape(-1, k)[:m]


def _backward(x_MK, gain_K, d_out_MK, eps, settings):
    (m, k), rows = x_MK.shape, rows_of(x_MK.shape[1])
    # Rows of ones with no gradient add nothing, whatever eps is.
    x_SPK, d_out_SPK = _steps(x_MK, rows, 1), _steps(d_out_MK, rows, 0)
    gain, gain_piece = _gain_argument(gain_K, rows)

    def work(step, pieces, staged, outputs):
        x_ref, d_ref, out, *scratch = *pieces, *staged
        sums = []
        for group in range(rows.groups):
            x, d_out = rows.load(x_ref, group), rows.load(d_ref, group)
            sums += [jnp.sum(x * x, axis=1), jnp.sum(d_out * rows.gain(step.constants[0], x) * x, axis=1)]
        sums, d_gain = rows.whole(sums, scratch), step.carry
        reuse()
        for group in range(rows.groups):
            squares, product = sums[2 * group:2 * group + 2]
            x, d_out = rows.load(x_ref, group), rows.load(d_ref, group)
            scale = lax.rsqrt(squares / k + eps)
            slope, scale = _spread(scale * (product / k), x), _spread(scale, x)
            unit = x * scale
            _store(rows, out, group, scale * (d_out * rows.gain(step.constants[0], x) - unit * slope))
            d_gain += d_out * unit
        _send(out, outputs[0].at[step.i])
        return d_gain

    def start():
        return plgpu.layout_cast(jnp.zeros((WARPS, rows.part), jnp.float32), rows.layout)

    def finish(block, group, d_gain, outputs):
        outputs[1][block] = d_gain

    piece, n_blocks = rows.piece(x_MK.dtype), blocks_for(len(x_SPK), settings)
    d_x_SPK, d_gain_NPK = stream(
        work, (x_SPK, d_out_SPK, gain),
        [jax.ShapeDtypeStruct(x_SPK.shape, x_MK.dtype),
         jax.ShapeDtypeStruct((n_blocks, WARPS, rows.part), jnp.float32)],
        tiles=(len(x_SPK), 1), pieces=[piece, piece], source=lambda i, j, x_ref, d_ref, _: [x_ref.at[i], d_ref.at[i]],
        staging=[piece, *rows.scratch(2)], warpgroups=1, settings=settings, constants=(gain_piece,),
        carry=Carry(start, finish))
    return d_x_SPK.reshape(-1, k)[:m], jnp.sum(d_gain_NPK.reshape(-1, k), axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def rms_norm_hopper(
        x: jax.Array, gain: jax.Array, eps: float, forward: Streaming = FORWARD,
        backward: Streaming = BACKWARD) -> jax.Array:
    """`rms_norm` of bfloat16: gain * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32.

    Only `x` is kept for the backward pass. Raises `UserError` for what `refusal` names.
    """
    reason = refusal(x.shape[-1], x.dtype)
    require(reason is None, f"no Hopper kernel for {reason}; use rms_norm")
    return _forward(x.reshape(-1, x.shape[-1]), gain, eps, forward).reshape(x.shape)


def _rms_norm_forward(x, gain, eps, forward, backward):
    return rms_norm_hopper(x, gain, eps, forward, backward), (x, gain)


def _rms_norm_backward(eps, forward, backward, residuals, d_out):
    x, gain = residuals
    as_rows = (-1, x.shape[-1])
    d_x, d_gain = _backward(x.reshape(as_rows), gain, d_out.reshape(as_rows), eps, backward)
    return d_x.reshape(x.shape), d_gain.astype(gain.dtype)


rms_norm_hopper.defvjp(_rms_norm_forward, _rms_norm_backward)
