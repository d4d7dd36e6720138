"""The two backends in plain torch, on any device.

`"reference"` builds every tensor the equations name (:mod:`rfa_fast.objective`).
`"torch"` needs no Δ for the retain term: with `h = x Aᵀ`, `‖Δ_i‖² = s² h_i (BᵀB) h_iᵀ`; and here it takes the target
before the product, because the frozen branch is linear: `x̃ = W·mean(x_r) + b`. Of its layers only what is compiled or
empty comes here; the derivatives by hand are in :mod:`rfa_fast.ops.linear_torch` and :mod:`rfa_fast.ops.conv2d_torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rfa_fast.config import Norm
from rfa_fast.objective import (
    FORGET,
    IGNORE,
    IGNORED_LABEL,
    RETAIN,
    TaskSums,
    accumulation_dtype,
    alignment_sums,
    expand_group,
    group_mean,
    masked_norm_sum,
    mean_prediction,
    task_sums,
)
from rfa_fast.ops.rows import without_autocast

LayerResult = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
HeadResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Pair = int | tuple[int, ...]


def linear(
    backend: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    group: Tensor | None,
    target: Tensor | None,
    retain_target: Tensor | None,
    norm: Norm,
    per_sample: bool,
    emit_residual: bool,
) -> LayerResult:
    """The layer of :func:`rfa_fast.functional.rfa_linear`; arguments are taken as checked."""
    hidden = F.linear(x, lora_a.to(x.dtype))
    residual = scale * F.linear(hidden, lora_b.to(x.dtype))
    frozen = F.linear(x, weight, bias)
    if group is not None and target is None and backend != "reference":
        mean, usable = group_mean(x, group, tuple(range(group.ndim)) + tuple(range(group.ndim, x.ndim - 1)))
        with torch.no_grad():
            target = F.linear(mean.to(weight.dtype), weight, bias)
        group = _without_target(group, usable)
    rows = hidden.unsqueeze(-2)
    return _assemble(
        backend, frozen, residual, rows, lora_b[None], scale, group, target, retain_target, norm, per_sample,
        emit_residual, tuple(range(x.ndim - 1)),
    )  # fmt: skip


def conv2d(
    backend: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    group: Tensor | None,
    target: Tensor | None,
    retain_target: Tensor | None,
    norm: Norm,
    emit_residual: bool,
) -> LayerResult:
    """The layer of :func:`rfa_fast.functional.rfa_conv2d`; arguments are taken as checked."""
    window: Callable[..., Tensor] = partial(F.conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups)
    hidden = window(x, lora_a.to(x.dtype))
    residual = scale * F.conv2d(hidden, lora_b.to(x.dtype), groups=groups)
    frozen = window(x, weight, bias)
    if group is not None and target is None and backend != "reference":
        mean, usable = group_mean(x, group, (0,))
        with torch.no_grad():
            target = window(mean[None].to(weight.dtype), weight, bias)
        group = _without_target(group, usable)
    per_group = lora_b.reshape(groups, -1, lora_b.shape[1])
    batch, _, height, width = hidden.shape
    rows = hidden.reshape(batch, groups, lora_b.shape[1], height * width).permute(0, 3, 1, 2)
    return _assemble(
        backend, frozen, residual, rows, per_group, scale, group, target, retain_target, norm, True, emit_residual, (0,)
    )  # fmt: skip


def _without_target(group: Tensor, usable: Tensor) -> Tensor:
    """Forget rows become ignored ones when no retain row gave them a target."""
    return torch.where(usable.any() | (group == RETAIN), group, IGNORE)


def _assemble(
    backend: str,
    frozen: Tensor,
    residual: Tensor,
    rows: Tensor,
    per_group: Tensor,
    scale: float,
    group: Tensor | None,
    target: Tensor | None,
    retain_target: Tensor | None,
    norm: Norm,
    per_sample: bool,
    emit_residual: bool,
    mean_dims: tuple[int, ...],
) -> LayerResult:
    """Add the branches and take the group sums.

    Args:
        rows: h as `(…, groups, R)`.
        per_group: B as `(groups, N/groups, R)`.
    """
    emitted = residual if emit_residual else None
    if group is None:
        return frozen + residual, emitted, None, None
    output = frozen + residual
    with without_autocast(output.device.type):
        if backend == "reference" or retain_target is not None:
            sums = alignment_sums(
                frozen, residual, group, target=target, retain_target=retain_target, norm=norm, per_sample=per_sample,
                mean_dims=mean_dims,
            )  # fmt: skip
            return output, emitted, sums.retain, sums.forget
        if target is None:
            raise ValueError("target: got None, expected the mean feature")
        wide = accumulation_dtype(output.dtype)
        kept = torch.where(expand_group(group == RETAIN, rows), rows, 0).to(wide)
        up = per_group.to(wide)
        energy = scale**2 * (torch.einsum("...gr,grs->...gs", kept, up.mT @ up) * kept).sum((-1, -2)).clamp(min=0)
        retain = energy.sum() if norm == "mse" else _sum_of_roots(energy, per_sample)
        to_mean = output.to(wide) - target.detach().to(wide)
        forget = masked_norm_sum(to_mean, group == FORGET, norm=norm, per_sample=per_sample)
        return output, emitted, retain, forget


def _sum_of_roots(energy: Tensor, per_sample: bool) -> Tensor:
    """Σ over units of the root of the unit's energy, with gradient 0 at 0."""
    per_unit = energy.flatten(1).sum(1) if per_sample and energy.ndim > 1 else energy
    positive = per_unit > 0
    return torch.where(positive, torch.where(positive, per_unit, 1).sqrt(), 0).sum()


def head_loss(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    softcap: float | None,
    fallback: Tensor | None,
    target: Tensor | None,
    norm: Norm,
    chunk_bytes: int,
) -> HeadResult:
    """The loss of :func:`rfa_fast.functional.rfa_head_loss`; arguments are taken as checked.

    ỹ needs every labelled retain row before the first forget row can be scored, so several chunks are
    walked twice: once without gradient for ỹ, once for the sums, where a chunk's logits are recomputed
    in the backward rather than kept.
    """
    aligned = group
    if lora_a is None:
        if not torch.compiler.is_compiling():  # a graph has no shape that depends on labels
            rows = (labels != IGNORED_LABEL).nonzero().squeeze(1)
            hidden, labels, group = hidden[rows], labels[rows], group[rows]
    elif target is None:
        mean, usable = group_mean(hidden, group, (0,))
        with torch.no_grad():
            target = F.linear(mean.to(weight.dtype), weight, bias)
        aligned = _without_target(group, usable)

    def logits_of(part: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = hidden[part]
        if lora_a is None or lora_b is None:
            logits, retain, forget = F.linear(x, weight, bias), None, None
        else:
            logits, _, retain, forget = linear(
                backend, x, weight, lora_a, lora_b, bias, scale, aligned[part], target, None, norm, False, False
            )
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)), retain, forget

    def sums_of(part: slice, soft_label: Tensor) -> tuple[TaskSums, Tensor | None, Tensor | None]:
        logits, retain, forget = logits_of(part)
        return task_sums(logits, labels[part], group[part], soft_label), retain, forget

    if backend == "reference":
        parts = [slice(None)]
    else:
        size = max(1, chunk_bytes // (4 * weight.shape[0]))
        # Counted first: a range that steps to the number of rows would fix that number under torch.compile.
        parts = [slice(i * size, (i + 1) * size) for i in range((hidden.shape[0] + size - 1) // size)] or [slice(0, 0)]
    if len(parts) == 1:
        logits, retain, forget = logits_of(parts[0])
        soft_label, _ = mean_prediction(logits, labels, group, fallback=fallback)
        return *task_sums(logits, labels, group, soft_label), soft_label, retain, forget

    with torch.no_grad():
        shares = torch.zeros(weight.shape[0], dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        count = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for part in parts:
            mean_of_part, n = mean_prediction(logits_of(part)[0], labels[part], group[part])
            shares, count = shares + n * mean_of_part, count + n
        other = torch.zeros_like(shares) if fallback is None else fallback.to(shares)
        soft_label = torch.where(count > 0, shares / count.clamp(min=1), other)
    walked = [checkpoint(sums_of, part, soft_label, use_reentrant=False) for part in parts]
    task = [torch.stack(column).sum() for column in zip(*(sums for sums, _, _ in walked), strict=True)]
    if lora_a is None:
        return task[0], task[1], task[2], task[3], soft_label, None, None
    retain = torch.stack([r for _, r, _ in walked if r is not None]).sum()
    forget = torch.stack([f for _, _, f in walked if f is not None]).sum()
    return task[0], task[1], task[2], task[3], soft_label, retain, forget
