"""Seeded random choices: each depends on the seed and on its purpose, and on nothing drawn before.

One generator shared by everything would be shorter, and would change the test set whenever someone
shuffles once more in front of it.
"""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose: streams of different seeds and purposes are unrelated.

    Raises:
        TypeError: a seed that is no integer.

    Example:
        >>> generator(0, "a").initial_seed() == generator(0, "b").initial_seed()
        False
    """
    text = "/".join(str(part) for part in (integer("seed", seed), *purpose))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def permutation(n: int, seed: int, *purpose: object) -> list[int]:
    """The numbers 0 to n − 1 in the order that seed and purpose give.

    Example:
        >>> sorted(permutation(4, 0, "example"))
        [0, 1, 2, 3]
    """
    order: list[int] = torch.randperm(n, generator=generator(seed, *purpose)).tolist()
    return order


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int.

    Raises:
        TypeError: not an integer (a bool is none).
        ValueError: below `minimum`.

    Example:
        >>> integer("count", 3, minimum=1)
        3
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from error
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name}: got {number}, expected an integer >= {minimum}")
    return number
