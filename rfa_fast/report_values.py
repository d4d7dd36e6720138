"""Values on their way into a report: checked by type, and made plain where that loses nothing.

Everything a report holds must be written as JSON at the end of a run that may have taken hours, so what
JSON cannot hold is refused when it comes in, with the name of its field.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat, TypeVar

import torch

T = TypeVar("T")


def as_text(name: str, value: object) -> str:
    """The string, or a TypeError that names the field."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}, expected a string")
    return value


def as_number(name: str, value: object) -> float:
    """A plain int or float; `None`, "not measured", becomes NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    return value if isinstance(value, int) else float(value)


def as_numbers(name: str, values: object) -> dict[str, float]:
    """A dict of plain numbers with string keys."""
    return {as_text(f"{name} key", k): as_number(f"{name}[{k!r}]", v) for k, v in as_mapping(name, values).items()}


def as_mapping(name: str, values: object) -> Mapping[Any, Any]:
    """The mapping, or a TypeError that names the field."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: got {type(values).__name__}, expected a dict")
    return values


def as_iterable(name: str, values: object) -> Iterable[Any]:
    """The iterable, which must not be a string or a mapping."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: got {type(values).__name__}, expected a list")
    return values


def as_list(name: str, values: object, kind: type[T]) -> list[T]:
    """A list whose items are all of `kind`."""
    items = list(as_iterable(name, values))
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"{name}: got {item!r}, expected a list of {kind.__name__}")
    return items


def json_safe(name: str, value: object) -> Any:
    """The value as JSON can hold it: tuples become lists, paths, dtypes and devices their names."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, os.PathLike | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {as_text(f"{name} key", k): json_safe(f"{name}[{k!r}]", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(f"{name}[{i}]", v) for i, v in enumerate(value)]
    raise TypeError(f"{name}: got {type(value).__name__}, expected a JSON value (text, number, list or dict)")
