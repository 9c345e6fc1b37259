"""Training in 8 bits on a Hopper GPU: every function of `Kernels` in its fast form, or the reference after a refusal.

Every fast form is compiled by itself, so that a model with many equal layers lowers each kernel once.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.config import Operand
from dsv3.kernels import (
    norm_hopper,
    norm_quantize_hopper,
    pack_hopper,
    permute_hopper,
    quantize_hopper,
    scaled_dot,
    scaled_products_hopper,
    swiglu_quantize_hopper,
    weights_quantize_hopper,
)
from dsv3.kernels.attention import Attention
from dsv3.kernels.fp8_kernels import REFERENCE, Kernels
from dsv3.kernels.scaled import TILE, Tiles
from dsv3.kernels.scaled_dot import Products
from dsv3.kernels.stream_hopper import NoRoom, Streaming
from dsv3.kernels.tuning import key, tuned

ROUNDED = "e4m3", "e5m2", "e5m6"
"""Formats that the kernels round to."""


def _unknown(*operands: Operand | None) -> str | None:
    found = [operand.format for operand in operands if operand is not None and operand.format not in ROUNDED]
    return f"the format {found[0]}: no kernel rounds to it" if found else None


def _coarse(*operands: Operand | None) -> str | None:
    found = [operand.tile for operand in operands if operand is not None and operand.tile != "inner"]
    return f"scales by {found[0]} of an activation: they must be by inner tiles" if found else _unknown(*operands)


def _not_bfloat16(x: jax.Array) -> str | None:
    return None if x.dtype == jnp.bfloat16 else f"activations in {x.dtype.name}: they must be bfloat16"


def _narrow(width: int, multiple: int) -> str | None:
    return f"rows of {width} elements: they must be multiples of {multiple}" if width % multiple else None


def _of_tokens(x: jax.Array, *operands: Operand | None) -> str | None:
    return _not_bfloat16(x) or _coarse(*operands)


def _of_waiting(packed: Tiles, kept: Operand, columns: Operand, dtype: jnp.dtype) -> str | None:
    k = packed.scales.shape[0] * TILE
    return _not_bfloat16(jax.ShapeDtypeStruct((), dtype)) or _coarse(kept, columns) or pack_hopper.refusal(k, kept)


def _of_packing(x: jax.Array, rows: Operand, kept: Operand) -> str | None:
    return _of_tokens(x, rows, kept) or pack_hopper.refusal(x.shape[1], kept)


def _of_weights(w: jax.Array, operand: Operand) -> str | None:
    if operand.tile != "block" or operand.format == "e5m6":
        return f"weights in {operand.format} with scales by {operand.tile}: they must have 8 bits and blocks"
    return _unknown(operand)


def _of_norm(x: jax.Array, gain: jax.Array, eps: float, *operands: Operand | None) -> str | None:
    return _of_tokens(x, *operands) or norm_quantize_hopper.refusal(x.shape[1])


def _of_swiglu(gate_up: jax.Array, *operands: Operand | None) -> str | None:
    return _of_tokens(gate_up, *operands) or _narrow(gate_up.shape[1], 2 * TILE)


def _of_swiglu_backward(kept: Tiles | jax.Array, d_h: jax.Array, weight, *operands: Operand) -> str | None:
    return _of_tokens(d_h, *operands) or _narrow(2 * d_h.shape[1], 2 * TILE)


def _either(refusal: Callable, fast: Callable, slow: Callable, refuse: Callable[[str], None]) -> Callable:
    """`fast`, or `slow` after `refuse(reason)` for arguments that `refusal` has a reason against or that do not fit."""
    def run(*arguments):
        reason = refusal(*arguments)
        try:
            if not reason:
                return fast(*arguments)
        except NoRoom as error:
            reason = str(error)
        refuse(reason)
        return slow(*arguments)

    return run


def _products(interval: int, accumulator: str, *, kind: str, refuse: Callable[[str], None]) -> Products:
    slow, reason = scaled_dot.products(interval, accumulator), scaled_products_hopper.refusal(interval, accumulator)
    if reason:
        refuse(reason)
        return slow
    of_operands = lambda a, b, *rest: scaled_products_hopper.refuses_operands(a, b)
    pairs = zip(scaled_products_hopper.products(kind), slow, strict=True)
    return Products(*(_either(of_operands, *pair, refuse) for pair in pairs))


def _square(*arguments) -> tuple[int, ...]:
    """The entry of a kernel whose work is squares, whatever matrix they are of."""
    return TILE, TILE


def _values(x: jax.Array | Tiles) -> jax.Array:
    return x.values if isinstance(x, Tiles) else x


def _width(x: jax.Array | Tiles, *rest) -> tuple[int, ...]:
    """The entry of a kernel whose work is rows, however many."""
    return (_values(x).shape[-1],)


class Fast(NamedTuple):
    """A fast form, whose last argument are its settings.

    `refusal` is a function of the other arguments, `static` the positions of those that are no arrays; `default` are
    the settings where the tuning table has none for this `entry` of the arguments.
    """

    function: Callable
    refusal: Callable
    static: tuple[int, ...]
    default: Streaming
    entry: Callable = _square


FAST = {
    "quantize_rows": Fast(quantize_hopper.quantize_rows, _of_tokens, (1,), quantize_hopper.ONE_FORM),
    "quantize_columns": Fast(quantize_hopper.quantize_columns, _of_tokens, (1,), quantize_hopper.ONE_FORM),
    "quantize_both": Fast(quantize_hopper.quantize_both, _of_tokens, (1, 2), quantize_hopper.BOTH_FORMS),
    "requantize_columns": Fast(
        quantize_hopper.requantize_columns, lambda tiles, operand: _coarse(operand), (1,), quantize_hopper.REQUANTIZE),
    "quantize_and_pack": Fast(pack_hopper.quantize_and_pack, _of_packing, (1, 2), pack_hopper.PACK),
    "unpack_both": Fast(pack_hopper.unpack_both, _of_waiting, (1, 2, 3), pack_hopper.UNPACK),
    "quantize_weights": Fast(
        weights_quantize_hopper.quantize_weights, _of_weights, (1,), weights_quantize_hopper.WEIGHTS),
    "norm": Fast(
        norm_hopper.rms_norm_hopper, lambda x, gain, eps: norm_hopper.refusal(x.shape[-1], x.dtype), (2,),
        norm_hopper.FORWARD, _width),
    "norm_quantize": Fast(
        norm_quantize_hopper.norm_quantize, _of_norm, (2, 3, 4), norm_quantize_hopper.NORM, _width),
    "swiglu_quantize": Fast(
        swiglu_quantize_hopper.swiglu_quantize, _of_swiglu, (1, 2), swiglu_quantize_hopper.FORWARD),
    "swiglu_backward_quantize": Fast(
        swiglu_quantize_hopper.swiglu_backward_quantize, _of_swiglu_backward, (3, 4, 5),
        swiglu_quantize_hopper.BACKWARD),
    "permute_tiles": Fast(
        permute_hopper.permute_tiles, lambda *arguments: None, (), permute_hopper.PERMUTE, _width),
    "combine_rows": Fast(
        permute_hopper.combine_rows, lambda rows, *rest: _not_bfloat16(rows) or _narrow(rows.shape[1], TILE), (),
        permute_hopper.COMBINE, _width),
}


def with_settings(name: str, kind: str) -> Callable:
    """A fast form with the settings that the tuning table has for a device of this kind, compiled by itself.

    What does not fit into shared memory with them, as the wider elements of E5M6, takes one tile at a time, or raises
    `NoRoom`.
    """
    fast = FAST[name]

    def run(*arguments):
        settings, reason = tuned(kind, name, fast.entry(*arguments), fast.default), ""
        for fewer in settings, settings._replace(stages=1, behind=0):
            try:
                return fast.function(*arguments, fewer)
            except NoRoom as error:
                reason = str(error)
        raise NoRoom(f"{name} of {key(_values(arguments[0]).shape)}: {reason}")

    run.__name__ = run.__qualname__ = name
    return jax.jit(run, static_argnums=fast.static)


def fast_or_reference(name: str, kind: str, refuse: Callable[[str], None]) -> Callable:
    """One function of the bundle."""
    return _either(FAST[name].refusal, with_settings(name, kind), getattr(REFERENCE, name), refuse)


def hopper_kernels(kind: str, attention: Attention, refuse: Callable[[str], None]) -> Kernels:
    """For a device of this kind. `refuse` is told why something falls back to plain jnp, and may raise."""
    functions = {name: fast_or_reference(name, kind, refuse) for name in FAST}
    return REFERENCE._replace(
        products=partial(_products, kind=kind, refuse=refuse), attention=attention, **functions)
