"""The report's recipe for the projection after attention, as the quantisers read it."""

from dataclasses import replace
from typing import NamedTuple


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
