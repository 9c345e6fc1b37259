"""The report's recipe for the projection after attention, as the quantisers read it."""

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
