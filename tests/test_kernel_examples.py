"""The examples in the docstrings of kernels/, under the name the folder is imported by."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import rfa_fast.kernels.availability as one_of_them

MODULES = sorted(path.stem for path in Path(one_of_them.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name: str) -> None:
    # pytest itself would collect the folder under the name `kernels`, which is not ours to import.
    assert doctest.testmod(importlib.import_module(f"rfa_fast.kernels.{name}")).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [t for n in MODULES for t in finder.find(importlib.import_module(f"rfa_fast.kernels.{n}")) if t.examples]
    assert len(found) >= 10
