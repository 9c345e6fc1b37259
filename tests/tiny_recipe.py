"""The report's recipe for one product, as the quantisers read it."""

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
