"""What the tests of the kernels share: poisoned buffers, a count of launches, and drawn cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import quick_interpreter
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rfa_fast.kernels import (
    common,
    conv2d_gradient,
    conv2d_lora_a_gradient,
    conv2d_retain,
    linear_gradient,
    lora_a_gradient,
)
from torch import Tensor

quick_interpreter.install()

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
drawn_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer a launcher allocates starts as NaN: what a kernel forgets to write shows."""
    poison_allocations(monkeypatch)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs without work cost the interpreter as much as those with it: enough for several chunks, and no more."""
    for module in (
        conv2d_gradient, conv2d_lora_a_gradient, conv2d_retain, linear_gradient, lora_a_gradient,
    ):  # fmt: skip
        monkeypatch.setattr(module, "PROGRAMS", 6)


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def filled(*args: Any, _original: Callable[..., Tensor] = original, **named: Any) -> Tensor:
            tensor = _original(*args, **named)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, filled)


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Run kernels as usual, and count them by name."""
    seen: Counter[str] = Counter()

    def note(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        seen[kernel.fn.__name__] += 1
        kernel[grid](**arguments)

    with common.observed(note):
        yield seen


def drawn(strategy: st.SearchStrategy[Any], examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`@given(case=strategy)` with a number of examples and no deadline: the interpreter is slow."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        quiet = settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        return quiet(given(case=strategy)(test))

    return decorate


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def codes(rows: int, seed: int) -> Tensor:
    """Group codes; one seed in four gives a group to all rows alike."""
    if seed % 4 == 0:
        return torch.full((rows,), seed // 4 % 3 - 1, dtype=torch.int8)
    return torch.randint(-1, 2, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def close(ours: Tensor, formula: Callable[..., Tensor], *operands: Tensor, dtype: torch.dtype) -> None:
    """err(ours, fp64) ≤ 2 · err(the same formula in torch and `dtype`, fp64) + one unit of its largest terms.

    The terms' size is the formula of the absolute values: no sum can be expected to be more exact than
    what is summed. A drawn case can be one number, and torch's error of one number can be 0 by luck.

    Args:
        formula: in torch, of `operands`; products and sums with a plus sign only.
        dtype: what the products are taken in.
    """
    exact = formula(*(t.double() for t in operands))
    size = formula(*(t.double().abs() for t in operands))
    rival = formula(*(t.to(dtype) for t in operands))
    assert ours.shape == exact.shape
    assert bool(torch.isfinite(ours).all())
    if exact.numel() == 0:
        return
    unit = torch.finfo(dtype).eps * float(size.max())
    for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        mine, theirs = float(measure(ours.double() - exact)), float(measure(rival.double() - exact))
        assert mine <= 2 * theirs + unit, (mine, theirs, unit)
