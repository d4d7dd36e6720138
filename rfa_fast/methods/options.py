"""The options of a method: what there is, its default, and what a value must be.

A table per method rather than a dataclass: the same table completes a run's settings, refuses a word
that is not in it, and is shown to who asks what there is. Every checked value is JSON-safe, because a
run that is resumed compares its settings with those on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """One option: the default, and a check that returns the value to keep."""

    default: Any
    check: Check


def complete(method: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a method, those not given by their defaults.

    Raises:
        ValueError: an option that the method does not have, or a value out of range.
        TypeError: a value of the wrong type.

    Example:
        >>> known = {"alpha": Option(1.0, number(minimum=0))}
        >>> complete("scrub", known, {})
        {'alpha': 1.0}
        >>> complete("scrub", known, {"beta": 2})
        Traceback (most recent call last):
        ...
        ValueError: scrub: got unknown options beta, expected some of alpha
    """
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{method}: got unknown options {', '.join(unknown)}, expected some of {', '.join(known)}")
    return {name: option.check(name, given.get(name, option.default)) for name, option in known.items()}


def number(
    *, minimum: float = -math.inf, maximum: float = math.inf, above: bool = False, optional: bool = False
) -> Check:
    """A finite number in a range, which `above` opens at its lower end; `None` where it is `optional`.

    Example:
        >>> number(minimum=0, maximum=1, above=True)("retain_share", 0.3)
        0.3
        >>> number(minimum=0, above=True)("beta", 0)
        Traceback (most recent call last):
        ...
        ValueError: beta: got 0, expected a number > 0
    """

    def check(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{name}: got {value!r}, expected a finite number{' or None' if optional else ''}")
        if value > maximum or not (minimum < value if above else minimum <= value):
            bounds = [f"{'>' if above else '>='} {minimum:g}"] if math.isfinite(minimum) else []
            bounds += [f"<= {maximum:g}"] if math.isfinite(maximum) else []
            raise ValueError(f"{name}: got {value!r}, expected a number {' and '.join(bounds)}")
        return float(value)

    return check


def integer(*, minimum: int, optional: bool = False) -> Check:
    """An integer from `minimum` on.

    Example:
        >>> integer(minimum=1)("max_epochs", 2)
        2
    """

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an integer >= {minimum}{' or None' if optional else ''}")
        if value < minimum:
            raise ValueError(f"{name}: got {value}, expected an integer >= {minimum}")
        return value

    return check


def flag(*, optional: bool = False) -> Check:
    """`True` or `False`.

    Example:
        >>> flag(optional=True)("shift_labels", None) is None
        True
    """

    def check(name: str, value: Any) -> bool | None:
        if isinstance(value, bool) or (value is None and optional):
            return value
        raise TypeError(f"{name}: got {value!r}, expected True{', False or None' if optional else ' or False'}")

    return check


def placement(name: str, value: Any) -> str | list[str] | None:
    """`None`, a word or regex, or a list of names, as :func:`rfa_fast.targets.select` takes them.

    Example:
        >>> placement("targets", ("fc", "layer4.0.conv1"))
        ['fc', 'layer4.0.conv1']
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        return list(value)
    raise TypeError(f"{name}: got {value!r}, expected None, a name, a regex or a list of names")


def weights_file(name: str, value: Any) -> str | None:
    """The path of a .safetensors file that exists, or `None`.

    Example:
        >>> weights_file("initial", None) is None
        True
    """
    if value is None:
        return None
    from rfa_fast.models import check_weights_file

    try:
        return str(check_weights_file(value))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(str(error).replace("weights:", f"{name}:", 1)) from error
