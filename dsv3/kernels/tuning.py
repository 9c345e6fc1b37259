"""With which parameters a kernel runs on a kind of device: what a sweep found, or the kernel's own default.

`tuning.json` maps device kind -> kernel -> shape -> parameters with their evidence; `experiments.benchmark tune` writes
it. Parameters change speed, never results.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dsv3.config import require

TABLE = Path(__file__).with_name("tuning.json")
LARGE = 16_384
"""Rows from which on products run alike."""


def key(shape: Sequence[int]) -> str:
    """A shape as the table spells it: `4096x2112x7168`."""
    return "x".join(map(str, shape))


def rounded_up(m: int) -> int:
    """How many rows an entry is for: m up to a power of two, and all of 16,384 and more alike.

    From there on a product is so many rounds of all multiprocessors that its last one hardly counts.
    """
    return min(LARGE, 1 << (m - 1).bit_length())


@cache
def read(path: Path = TABLE) -> Mapping[str, Mapping[str, Mapping[str, Mapping]]]:
    """The table, read once."""
    return json.loads(path.read_text())


def tuned[P: NamedTuple](kind: str, kernel: str, shape: Sequence[int], default: P, table: Mapping | None = None) -> P:
    """`default` with what the table has for this device kind, kernel and shape; `default` itself where it has nothing.

    What belongs to a shape is the kernel's choice: products round their rows (`rounded_up`), others ignore them.
    Raises `UserError` for an entry with a parameter that the kernel does not have (its sweep is out of date).
    """
    entries = (read() if table is None else table).get(kind, {}).get(kernel, {})
    if key(shape) not in entries:
        return default
    found = entries[key(shape)]["parameters"]
    unknown = sorted(set(found) - set(default._fields))
    require(not unknown, f"the tuning table's entry for {kernel} {key(shape)} on {kind} has {', '.join(unknown)}; "
            f"expected {', '.join(default._fields)}: run `python -m experiments.benchmark tune` again")
    return default._replace(**found)
