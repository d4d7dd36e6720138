"""What every kernel file shares: how a kernel is launched, and the few lines all of them would repeat.

Launchers say `launch(kernel)[grid](…)`. That is `torch.library.wrap_triton`, so that torch.compile sees
through an operator into its kernels; it is also the one place where a launch can be observed, which is
how the kernel sheet compiles exactly what runs, and how the tests know that it ran.

Two things the interpreter (`TRITON_INTERPRET=1`) gets wrong about bfloat16, measured with Triton 3.8:
`tl.dot` returns garbage, because bf16 lives in uint16 there, and a cast from fp32 truncates where the
hardware rounds to nearest even. Kernels take a constexpr `EMULATE`, which only :func:`emulate` sets, and
go through :func:`dot` and :func:`narrow`; compiled code is what it would have been without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.availability import interpreting
from torch.library import wrap_triton

Observer = Callable[[Any, Any, dict[str, Any]], None]
_observer: ContextVar[Observer | None] = ContextVar("rfa_fast_launch_observer", default=None)

MAX_BLOCK_R = 64  # ranks above this are walked in blocks
# A tile that is wide already walks the rank in the narrowest block a product takes: both factors of a wider
# one would have to stay in registers beside the accumulator.
MIN_BLOCK_R = 16


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a · b in fp32; `PRECISION` is what fp32 operands are multiplied in."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """An fp32 value in `dtype`, rounded to nearest even."""
    if EMULATE and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def swizzled(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Tile coordinates that walk GROUP_M row blocks before the next column block, so that L2 keeps both operands."""
    per_group = GROUP_M * blocks_n
    first = (pid // per_group) * GROUP_M
    rows = min(blocks_m - first, GROUP_M)
    inside = pid % per_group
    return first + inside % rows, inside // rows


def launch(kernel: Any) -> Any:
    """`kernel`, ready for `[grid](…)`: traceable by torch.compile, and seen by an observer if there is one."""
    observer = _observer.get()
    return wrap_triton(kernel) if observer is None else _Observed(kernel, observer)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer(kernel, grid, arguments)` for every launch inside, in place of the launch.

    An observer that wants the kernel to run as well calls `kernel[grid](**arguments)` itself.

    Example:
        >>> seen = []
        >>> with observed(lambda kernel, grid, arguments: seen.append(grid)):
        ...     launch(dot)[(1, 1)](a=1)
        >>> seen
        [(1, 1)]
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class _Observed:
    """Stands in for a kernel: the same two calls, handed to the observer."""

    def __init__(self, kernel: Any, observer: Observer, grid: Any = None) -> None:
        self.kernel, self.observer, self.grid = kernel, observer, grid

    def __getitem__(self, grid: Any) -> _Observed:
        return _Observed(self.kernel, self.observer, grid)

    def __call__(self, **arguments: Any) -> None:
        self.observer(self.kernel, self.grid, arguments)


def emulate() -> bool:
    """The value of a kernel's `EMULATE`: whether the interpreter runs it.

    Example:
        >>> emulate() == interpreting()
        True
    """
    return bool(interpreting())


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """What fp32 operands are multiplied in: `"ieee"`, or `"tf32"` where torch's own switch for CUDA says so.

    Example:
        >>> precision(torch.float32, torch.device("cpu"))
        'ieee'
    """
    # The older of the two switches, allow_tf32, sets this one, and cannot be read once this one is set.
    allowed = dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def block_r(rank: int) -> int:
    """The block a rank is padded to inside a kernel: a power of two from 16 to 64.

    Example:
        >>> [block_r(r) for r in (1, 16, 17, 500)]
        [16, 16, 32, 64]
    """
    return min(MAX_BLOCK_R, max(16, int(triton.next_power_of_2(rank))))


def pointer(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a tensor the kernel is told not to read: a pointer argument cannot be None under torch.compile.

    Example:
        >>> pointer(None, torch.ones(1))
        tensor([1.])
    """
    return stand_in if tensor is None else tensor
