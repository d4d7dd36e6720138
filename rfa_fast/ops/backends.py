"""Which implementation an operator runs on: the one place where that is decided.

* `"reference"`: every tensor the equations name, built in full (:mod:`rfa_fast.objective`);
* `"torch"`: the same numbers in plain torch, on any device, with little kept for the backward;
* `"triton"`: fused kernels, registered with torch.library under `torch.ops.rfa_fast`.

The registered operators are imported when the first of them is chosen: the package imports, and works,
where Triton was never installed.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rfa_fast.config import Backend
from rfa_fast.ops import conv2d_torch, linear_torch, plain
from rfa_fast.ops.gradients import trained
from rfa_fast.ops.linear_torch import LayerAndMean

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select(backend: Backend, x: Tensor) -> tuple[str, str]:
    """The backend that will run for `x`, and why.

    Args:
        backend: `"auto"`, or the one to force: `"reference"`, `"torch"`, `"triton"`. The automatic choice
            is Triton for a CUDA, ROCm or XPU tensor it has kernels for, torch for every other.
        x: the layer's input; only its device and dtype are looked at.

    Raises:
        ValueError: `"triton"` where it cannot run, or an unknown name.
        TypeError: `"triton"` for a dtype it has no kernels for.

    Example:
        >>> select("auto", torch.zeros(1))[0]
        'torch'
    """
    if backend in ("reference", "torch"):
        return backend, "forced by the backend argument"
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend: got {backend!r}, expected one of 'auto', 'reference', 'torch', 'triton'")
    kind = x.device.type
    if backend == "auto" and kind not in ("cuda", "xpu"):
        return "torch", f"automatic choice for a tensor on {kind}"
    usable, why = _usable(kind), _why(kind)
    typed = x.dtype in FUSED_DTYPES
    if backend == "auto" and usable and _before_tensor_cores(kind):
        usable, why = False, "Triton has tensor cores from compute capability 8.0 on."
    if backend == "auto":
        if usable and typed:
            return "triton", f"automatic choice for a tensor on {kind}: {why}"
        return "torch", f"automatic choice for a tensor on {kind}: " + (
            why if not usable else f"there are no Triton kernels for {x.dtype}."
        )
    if not usable:
        raise ValueError(
            f"backend: got 'triton' for a tensor on {kind}, expected a usable Triton: {why} "
            "Or take backend='torch', or 'auto'."
        )
    if not typed:
        names = ", ".join(str(dtype) for dtype in FUSED_DTYPES)
        raise TypeError(f"x: got {x.dtype}, expected one of {names} for backend='triton'")
    return "triton", f"forced by the backend argument: {why}"


@cache
def _status(kind: str, interpreted: str | None) -> tuple[bool, str]:
    """Asked once per device type: a driver query is not for every layer of every step."""
    from rfa_fast.kernels.availability import triton_status

    status: tuple[bool, str] = triton_status(kind)
    return status


# Constants to torch.compile, which could not trace the queries behind them.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _usable(kind: str) -> bool:
    return _status(kind, os.environ.get("TRITON_INTERPRET"))[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why(kind: str) -> str:
    return _status(kind, os.environ.get("TRITON_INTERPRET"))[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _before_tensor_cores(kind: str) -> bool:
    """Whether Triton compiles products for this GPU without the tensor cores that the vendor's libraries use."""
    return kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0)


def linear(backend: str, x: Tensor, *arguments: Any) -> plain.LayerResult:
    """The layer of :func:`rfa_fast.functional.rfa_linear`; arguments as :func:`rfa_fast.ops.plain.linear`'s."""
    if backend == "reference" or _empty(x, arguments) or _own_gradient(arguments):
        return plain.linear(_in_torch(backend), x, *arguments)
    return linear_and_mean(backend, x, *arguments)[:4]


def linear_and_mean(backend: str, x: Tensor, *arguments: Any) -> LayerAndMean:
    """The fused layer with the x̃ it computed; arguments as :func:`rfa_fast.ops.linear_torch.run`'s."""
    if backend == "torch":
        return linear_torch.linear_and_mean(x, *arguments)
    from rfa_fast.ops.linear import linear_and_mean as fused

    return fused(x, *arguments)


def conv2d(backend: str, x: Tensor, *arguments: Any) -> plain.LayerResult:
    """The layer of :func:`rfa_fast.functional.rfa_conv2d`; arguments as :func:`rfa_fast.ops.plain.conv2d`'s."""
    # Compiled, autograd's derivative is fused no worse than the one by hand.
    fused_elsewhere = backend == "torch" and torch.compiler.is_compiling()
    if backend == "reference" or fused_elsewhere or _empty(x, arguments) or _own_gradient(arguments):
        return plain.conv2d(_in_torch(backend), x, *arguments)
    if backend == "torch":
        return conv2d_torch.conv2d(x, *arguments)
    from rfa_fast.ops.conv2d import conv2d as fused

    return fused(x, *arguments)


def head_loss(backend: str, hidden: Tensor, *arguments: Any, skip: float) -> plain.HeadResult:
    """The loss of :func:`rfa_fast.functional.rfa_head_loss`; arguments as :func:`rfa_fast.ops.plain.head_loss`'s."""
    if backend == "reference" or _empty(hidden, arguments) or hidden.dtype == torch.float64:
        return plain.head_loss(_in_torch(backend), hidden, *arguments)
    from rfa_fast.ops import head

    if backend == "triton":
        return head.head_loss(hidden, *arguments, skip=skip)
    weight, labels, group, bias, lora_a, _, _, softcap, fallback, _, _, chunk_bytes = arguments
    if lora_a is None and not trained(weight, bias):
        return head.frozen_head_loss(backend, hidden, weight, labels, group, bias, softcap, fallback, chunk_bytes, skip)
    return plain.head_loss(backend, hidden, *arguments)


def _empty(x: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether there are no rows, or no outputs; the weight is the first of the arguments."""
    return x.numel() == 0 or arguments[0].numel() == 0


def _own_gradient(arguments: tuple[Any, ...]) -> bool:
    """Whether a layer's weight or bias, among the arguments after its input, is to get a gradient: by autograd."""
    weight, _, _, bias = arguments[:4]
    return trained(weight, bias)


def _in_torch(backend: str) -> str:
    """A batch without rows has nothing to launch; torch gives its empty result and its zero gradients."""
    return "torch" if backend == "triton" else backend
