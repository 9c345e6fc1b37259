"""Typed trees of frozen dataclasses: checking values, naming near misses, overriding fields by path."""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from dsv3.config.errors import UserError


def _matches(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments and type(value) in {type(option) for option in arguments}
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_matches, value, arguments))
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def check_types(config: Any) -> None:
    """Raise `UserError` unless every field of the dataclass `config` has its annotated type."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _matches(value, hints[field.name]):
            raise UserError(
                f"{type(config).__name__}.{field.name} is {value!r}; expected {_describe(hints[field.name])}")


class Node:
    """Base of every config dataclass: types are checked first, then the subclass's own `validate`."""

    def __post_init__(self) -> None:
        check_types(self)
        self.validate()

    def validate(self) -> None:
        """Raise `UserError` on values that cannot work together."""


def _parse(text: str, annotation: Any, path: str) -> Any:
    """Read `text` as a Python literal, or as a bare string, or several between commas, where the annotation does."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}.get(text.lower(), text)
    for candidate in (value, text, tuple(part.strip() for part in text.split(","))):
        if _matches(candidate, annotation):
            return candidate
    raise UserError(f"config.{path}={text!r} has the wrong type; expected {_describe(annotation)}")


def _item(annotation: Any) -> Any:
    """What a tuple annotated `tuple[item, ...]`, or an option of it, holds; None where no tuple may be."""
    options = (annotation, *typing.get_args(annotation))
    return next((typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple), None)


def nearest(name: str, options: list[str]) -> str:
    """The end of an error about an unknown `name`: the option it is nearest to, or all of them."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(options)}"


def _in_a_file(node: Any, annotation: Any) -> str:
    """The end of an error about fields that `node` lacks: what could have them is given in a config file only."""
    options = [option.__name__ for option in typing.get_args(annotation) if dataclasses.is_dataclass(option)]
    absent = options and not isinstance(node, tuple) and not dataclasses.is_dataclass(node)
    return f"; a config file that gives the {options[0]} itself has them" if absent else ""


def _replace(node: Any, annotation: Any, overrides: Mapping[tuple[str, ...], str], path: str) -> Any:
    if () in overrides:
        if len(overrides) > 1:
            raise UserError(f"config.{path} is set both as a whole and field by field; keep one"
                            + _in_a_file(node, annotation))
        return _parse(overrides[()], annotation, path)
    if dataclasses.is_dataclass(node):
        hints = typing.get_type_hints(type(node))
        children = {field.name: (getattr(node, field.name), hints[field.name]) for field in dataclasses.fields(node)}
    elif isinstance(node, tuple):
        children = {str(i): (value, _item(annotation)) for i, value in enumerate(node)}
    else:
        raise UserError(f"config.{path} is {node!r} and has no fields to set{_in_a_file(node, annotation)}")
    groups: dict[str, dict[tuple[str, ...], str]] = {}
    for (head, *rest), text in overrides.items():
        if head not in children:
            where = f"config.{path}" if path else "config"
            raise UserError(f"{where} has no field {head!r}; {nearest(head, list(children))}")
        groups.setdefault(head, {})[tuple(rest)] = text
    changed = {
        name: _replace(*children[name], group, f"{path}.{name}".strip("."))
        for name, group in groups.items()
    }
    if isinstance(node, tuple):
        return tuple(changed.get(name, value) for name, (value, _) in children.items())
    return dataclasses.replace(node, **changed)


def override[T](config: T, overrides: Mapping[str, str]) -> T:
    """Return `config` with the fields at dotted paths replaced by parsed strings, all at once.

    `override(config, {"train.steps": "200", "model.moe.n_routed_experts": "16"})`; items of a tuple are named by
    their index (`train.learning_rate.0.end`). Values that are only valid together may be given together.

    Raises `UserError` for an unknown field (naming the nearest), a wrong type, or an invalid combination.
    """
    if not overrides:
        return config
    return _replace(config, type(config), {tuple(path.split(".")): text for path, text in overrides.items()}, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dictionaries and lists: what `json.dumps` takes."""
    return dataclasses.asdict(config)


def from_dict[T](annotation: type[T], data: Any) -> T:
    """The inverse of `to_dict`, also after a round trip through JSON: rebuilds and validates the dataclass tree.

    Raises `UserError` for a missing or unknown field.
    """
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        if not isinstance(data, Mapping) or set(data) != set(hints):
            given = sorted(data) if isinstance(data, Mapping) else repr(data)[:200]
            raise UserError(f"{annotation.__name__} has fields {sorted(hints)}, but was given {given}")
        return annotation(**{name: from_dict(hint, data[name]) for name, hint in hints.items()})
    if isinstance(data, (list, tuple)) and _item(annotation) is not None:
        return tuple(from_dict(_item(annotation), item) for item in data)
    options = [option for option in typing.get_args(annotation) if dataclasses.is_dataclass(option)]
    if isinstance(data, Mapping) and options:
        return from_dict(options[0], data)
    return data


def _children(value: Any) -> Mapping[str, Any] | None:
    """The fields of a dictionary, the items of a sequence by index, or None."""
    if isinstance(value, (list, tuple)):
        return {str(i): item for i, item in enumerate(value)}
    return value if isinstance(value, Mapping) else None


def differences(left: Mapping[str, Any], right: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted paths, with both values, at which two `to_dict` trees differ."""
    found = []
    for name in sorted(set(left) | set(right)):
        a, b = left.get(name), right.get(name)
        where = f"{path}.{name}".strip(".")
        inside = _children(a), _children(b)
        if None not in inside:
            found += differences(*inside, where)
        elif a != b:
            found.append(f"{where}: {a!r} != {b!r}")
    return found
