"""What the operators refuse: arguments that do not fit each other, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from rfa_fast.config import check_choice
from rfa_fast.objective import accumulation_dtype
from rfa_fast.ops.rows import autocasts


def check_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, group: Tensor | None,
    target: Tensor | None, retain_target: Tensor | None, norm: str, unit: str,
) -> None:  # fmt: skip
    """What a linear layer takes: shapes of its operands, of the group's codes and of the targets."""
    check_operands(x, weight, bias, 2)
    check_adapters(x, lora_a, lora_b, 2)
    check_choice("norm", norm, ("mse", "l2"))
    check_choice("unit", unit, ("row", "sample"))
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {weight.shape[1]}) to fit weight (N, K)")
    check_low_rank(weight, lora_a, lora_b)
    leading = tuple(x.shape[:-1])
    check_group(group, leading, x.device)
    check_target("target", target, (*leading, weight.shape[0]), x)
    check_target("retain_target", retain_target, (*leading, weight.shape[0]), x)
    if unit == "sample" and not leading:
        raise ValueError("unit: got 'sample' for a single row, expected x with a batch axis")


def check_float(**tensors: Tensor | None) -> None:
    """Tensors that are there are of floating point; raises TypeError."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating-point tensor")


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None, ndim: int) -> None:
    """A weight and a bias that fit the input's device and, outside autocast, its dtype."""
    check_float(x=x, weight=weight, bias=bias)
    if weight.ndim != ndim:
        raise ValueError(f"weight: got {weight.ndim} axes, expected {ndim}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_device(name, tensor, x.device)
        if tensor.dtype != x.dtype and not autocasts(x.device.type):
            raise TypeError(
                f"{name}: got {tensor.dtype} beside an input in {x.dtype}, expected the same outside autocast"
            )


def check_adapters(x: Tensor, a: Tensor, b: Tensor, ndim: int) -> None:
    """A and B of floating point, with `ndim` axes, on the input's device."""
    check_float(lora_a=a, lora_b=b)
    for name, tensor in (("lora_a", a), ("lora_b", b)):
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: got {tensor.ndim} axes, expected {ndim}")
        check_device(name, tensor, x.device)


def check_low_rank(weight: Tensor, a: Tensor, b: Tensor) -> None:
    """A `(R, K)` and B `(N, R)` of a weight `(N, K)`."""
    if tuple(a.shape[1:]) != (weight.shape[1],) or tuple(b.shape) != (weight.shape[0], a.shape[0]):
        raise ValueError(
            f"lora_a, lora_b: got {tuple(a.shape)} and {tuple(b.shape)}, expected (R, {weight.shape[1]}) "
            f"and ({weight.shape[0]}, R)"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """The tensor lies where x does."""
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, expected x's device {device}")


def check_group(group: Tensor | None, leading: tuple[int, ...], device: torch.device) -> None:
    """int8 codes over the leading axes of x, or over the first of them."""
    if group is None:
        return
    if group.dtype != torch.int8:
        raise TypeError(f"group: got {group.dtype}, expected torch.int8 (0 retain, 1 forget, -1 ignore)")
    check_device("group", group, device)
    if not leading:
        raise ValueError("group: got one for a single row, which has no axis for it; expected x with a batch axis")
    if group.ndim < 1 or tuple(group.shape) != leading[: group.ndim]:
        raise ValueError(f"group: got shape {tuple(group.shape)}, expected {leading} or ({leading[0]},)")


def check_target(name: str, target: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """A target that is of no other device than x and of no dtype wider than the sums, which would become as wide."""
    if target is None:
        return
    check_float(**{name: target})
    sums = accumulation_dtype(x.dtype)
    if torch.promote_types(target.dtype, sums) != sums:
        raise TypeError(f"{name}: got {target.dtype} beside x in {x.dtype}, expected at most {sums}, as the sums are")
    check_device(name, target, x.device)
    own = tuple(target.shape)
    padded = (1,) * (len(shape) - len(own)) + own
    if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(padded, shape, strict=True)):
        raise ValueError(f"{name}: got shape {tuple(target.shape)}, expected one that broadcasts against {shape}")
