"""How an operator is told to torch.library: one call, so that every operator is told the same things.

An operator `rfa_fast::name` has

* for GPUs its Triton launchers, through `triton_op`, so that torch.compile sees the kernels inside;
* for CPU tensors a host implementation: the same launchers where Triton's interpreter is switched on, the
  same mathematics in torch where it is not. It stays opaque to torch.compile (`rfa_fast::name_host`):
  inductor has no GPU code to generate there;
* a fake implementation, which only knows shapes and dtypes;
* a derivative, given by the operator that follows it.

torch replaces an operator that is registered twice without a word, so this module refuses to.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from rfa_fast.kernels.availability import interpreting
from rfa_fast.ops.rows import without_autocast

NAMESPACE = "rfa_fast"
Implementation = Callable[..., Any]
_PLAIN = {"Tensor": torch.Tensor, "float": float, "int": int, "bool": bool, "str": str}


def register(
    name: str,
    schema: str,
    *,
    launchers: Implementation,
    host: Implementation,
    fake: Implementation,
    opaque: bool = False,
) -> Any:
    """Register `rfa_fast::name` and return it, ready for `register_autograd`.

    Args:
        name: the operator's name, without the namespace.
        schema: `"(Tensor x, …) -> (Tensor, …)"`; nothing is mutated and nothing aliases.
        launchers: the implementation on Triton kernels; makes tensors and launches, nothing else.
        host: the same in torch, for CPU tensors without the interpreter.
        fake: shapes and dtypes of the results.
        opaque: do not let torch.compile see inside, for an operator that loops over chunks or compacts
            rows: what it does depends on values, or would be unrolled.

    Raises:
        ValueError: a name that is taken.
    """
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        raise ValueError(f"name: got {name!r}, expected one that is not registered under {NAMESPACE!r} yet")

    launchers, host = _as_given(launchers), _as_given(host)

    def on_host(*args: Any) -> Any:
        return launchers(*args) if interpreting() else host(*args)

    operator: Any
    if opaque:

        def anywhere(*args: Any) -> Any:
            return on_host(*args) if _on_cpu(args) else launchers(*args)

        operator = torch.library.custom_op(f"{NAMESPACE}::{name}", anywhere, mutates_args=(), schema=schema)
    else:
        inner = torch.library.custom_op(f"{NAMESPACE}::{name}_host", on_host, mutates_args=(), schema=schema)
        inner.register_fake(fake)

        def traced(*args: Any) -> Any:
            return inner(*args) if _on_cpu(args) else launchers(*args)

        # Some versions of torch go by the function's signature, whatever schema they are given.
        traced.__signature__ = signature_of(schema)  # type: ignore[attr-defined]
        operator = torch.library.triton_op(f"{NAMESPACE}::{name}", traced, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def signature_of(schema: str) -> inspect.Signature:
    """The signature of a Python function of this schema.

    Args:
        schema: `"(Tensor x, …) -> (Tensor, …)"`, of tensors, numbers, texts, flags and lists of them.

    Example:
        >>> print(signature_of("(Tensor x, Tensor? bias, float scale) -> Tensor"))
        (x: torch.Tensor, bias: Optional[torch.Tensor], scale: float) -> torch.Tensor
    """
    parsed = torch._C.parse_schema(f"{NAMESPACE}::operator{schema}")
    results = tuple(_python_type(result.type) for result in parsed.returns)
    given = [
        inspect.Parameter(each.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_python_type(each.type))
        for each in parsed.arguments
    ]
    returned = results[0] if len(results) == 1 else tuple[results]  # type: ignore[valid-type]
    return inspect.Signature(given, return_annotation=returned)


def _python_type(kind: Any) -> Any:
    """The annotation that torch reads as this type of a schema, in the spelling that all its versions read."""
    name = kind.annotation_str
    if name in _PLAIN:
        return _PLAIN[name]
    inner = _python_type(kind.getElementType())
    return typing.Optional[inner] if name.startswith("Optional") else typing.List[inner]  # type: ignore[valid-type]  # noqa: UP006, UP045


def _on_cpu(args: tuple[Any, ...]) -> bool:
    return _device(args).type == "cpu"


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(a for a in args if isinstance(a, torch.Tensor)).device


def _as_given(run: Implementation) -> Implementation:
    """`run` with products in the dtype that they are written in and, of several GPUs, on that of its tensors.

    What autocast narrows is narrow already; fp32 sums are so for a reason. Triton launches on the current device.
    """

    def given(*args: Any) -> Any:
        device = _device(args)
        with ExitStack() as stack:
            stack.enter_context(without_autocast(device.type))
            if device.type == "cuda" and torch.cuda.device_count() > 1:
                stack.enter_context(torch.cuda.device(device))
            elif device.type == "xpu" and torch.xpu.device_count() > 1:
                stack.enter_context(torch.xpu.device(device))
            return run(*args)

    return given
