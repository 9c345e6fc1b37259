"""Recipes of low precision as data."""

from dataclasses import dataclass
from typing import Literal

from dsv3.config.schema import Node


@dataclass(frozen=True, kw_only=True)
class Operand(Node):
    """How one operand of a product is stored: its format, what shares a scale, and which scales there are."""

    format: Literal["e4m3", "e5m2", "e5m6"]
    tile: Literal["inner", "block", "tensor"]
    power_of_two: bool
