"""With which parameters a kernel runs on a kind of device: what a sweep found, or the kernel's own default.

`tuning.json` maps device kind -> kernel -> shape -> parameters with their evidence; `experiments.benchmark tune` writes
it. Parameters change speed, never results.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from dsv3.config import UserError, require

TABLE = Path(__file__).with_name("tuning.json")
LARGE = 16_384
"""Rows from which on products run alike."""
LEVELS = 3
"""Of the table above an entry: device kind, kernel, shape."""
AGAIN = "run `python -m experiments.benchmark tune` again"


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
    """The table, read once. Raises `UserError` for a file that is no table."""
    mend = "restore it from the repository, or write {} into it for the kernels' own settings"
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the tuning table {path} cannot be read ({error}): {mend}") from error
    damage = _damage(table)
    require(damage is None, f"the tuning table {path} is damaged ({damage}): {mend}")
    return table


def _damage(node: Any, *names: str) -> str | None:
    """What is wrong with the table or its part of these names, or None."""
    where = " ".join(names) or "the whole of it"
    if not isinstance(node, dict):
        return f"{where} is {type(node).__name__}, not a mapping"
    if len(names) == LEVELS:
        return None if isinstance(node.get("parameters"), dict) else f"{where} has no parameters"
    return next(filter(None, (_damage(child, *names, name) for name, child in node.items())), None)


def tuned[P: NamedTuple](kind: str, kernel: str, shape: Sequence[int], default: P, table: Mapping | None = None) -> P:
    """`default` with what the table has for this device kind, kernel and shape; `default` itself where it has nothing.

    What belongs to a shape is the kernel's choice: products round their rows (`rounded_up`), others ignore them.
    Raises `UserError` for an entry with a parameter that the kernel does not have (its sweep is out of date), or has
    with another type, or for a number below 1 that is none of the kernel's `MAY_BE_ZERO`.
    """
    entries = (read() if table is None else table).get(kind, {}).get(kernel, {})
    if key(shape) not in entries:
        return default
    found = entries[key(shape)]["parameters"]
    entry = f"the tuning table's entry for {kernel} {key(shape)} on {kind}"
    unknown = sorted(set(found) - set(default._fields))
    require(not unknown, f"{entry} has {', '.join(unknown)}; expected {', '.join(default._fields)}: {AGAIN}")
    hints = get_type_hints(type(default))
    for name, value in found.items():
        types = get_args(hints[name]) or (hints[name],)
        require(type(value) in types, f"{entry} has {name} {value!r}; expected "
                f"{' or '.join(kind.__name__ for kind in types)}: {AGAIN}")
        least = 0 if name in getattr(default, "MAY_BE_ZERO", ()) else 1
        require(type(value) is not int or value >= least,
                f"{entry} has {name} {value}; expected at least {least}: {AGAIN}")
    return default._replace(**found)
