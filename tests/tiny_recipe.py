"""The report's recipe for the projection after attention, as the quantisers read it, and what an operand shows."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3.quant import tiles
from dsv3.quant.formats import format_of

LAYOUT = {"inner": tiles.ALONG_ROWS, "block": tiles.BLOCK, "tensor": tiles.TENSOR}


def seen(x, operand):
    """`x` as an operand shows it, in float64; tiles along the last axis."""
    fmt, tile = format_of(operand.format), LAYOUT[operand.tile]
    quantized = tiles.quantize(jnp.asarray(x, jnp.float32), fmt, tile, power_of_two=operand.power_of_two)
    return np.asarray(tiles.dequantize(quantized, fmt, tile, x.shape[-1]), np.float64)


class Operand(NamedTuple):
    format: str = "e4m3"
    tile: str = "inner"
    power_of_two: bool = False


class Rule(NamedTuple):
    fprop_x: Operand = Operand()
    fprop_w: Operand = Operand(tile="block")
    dgrad_dy: Operand = Operand()
    dgrad_w: Operand = Operand(tile="block")
    wgrad_x: Operand = Operand()
    wgrad_dy: Operand = Operand()
    kept: Operand | None = Operand("e5m6", power_of_two=True)


FIELDS = ("fprop_x", "wgrad_x", "dgrad_dy", "wgrad_dy", "kept", "fprop_w", "dgrad_w")


def motley(rule, shift: int = 0):
    """`rule` with another format or kind of scale for every activation, and two for weights; others for each `shift`.

    Under it, an operand that stands in for its neighbour shows.
    """
    choices = [(name, power) for name in ("e4m3", "e5m6", "e5m2") for power in (False, True)]
    changes = {}
    for index, field in enumerate(FIELDS):
        format, power = choices[(index + 2 * shift) % len(choices)]
        tile = "block" if field.endswith("_w") else "inner"
        changes[field] = replace(rule.fprop_x, format=format, power_of_two=power, tile=tile)
    return replace(rule, **changes)
