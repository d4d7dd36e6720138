"""The objective of Residual Feature Alignment, in plain torch: the reference everything is tested against.

For one adapted layer with frozen weight W, bias b, adapters A and B and scale s::

    x' = x Wᵀ + b        Δ = s · (x Aᵀ) Bᵀ        y = x' + Δ
    retain term   Σ over retain rows of ‖Δ‖²            eq. 1   (teacher mode: ‖y − x'_t‖², eq. 7)
    forget term   Σ over forget rows of ‖y − x̃‖²        eq. 2   (teacher mode: x̃_t for x̃, eq. 8)
    task          λ · CE(retain, label) + μ · CE(forget, ỹ)            eq. 5
    total         γ/m · (α Σ_k retain + β Σ_k forget) + (1 − γ) · task      eq. 6

x̃ is the mean of x' over the retain rows, ỹ the mean softmax over the labelled retain rows; both are
constants to autograd. Readability wins over speed here: every tensor the paper names is built in
full, in the caller's dtype, and sums are taken in fp32 (in fp64 when the inputs are fp64). The
operators of :mod:`rfa_fast.functional` compute the same numbers without building them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_fast.config import Norm

RETAIN, FORGET, IGNORE = 0, 1, -1
IGNORED_LABEL = -100


class RFALoss(NamedTuple):
    """The loss of one batch; every field is a 0-dim tensor.

    Attributes:
        total: γ/m · align + (1 − γ) · task (eq. 6); the one to call `backward()` on.
        align: α · retain_align + β · forget_align (eq. 4).
        task: λ · retain_task + μ · forget_task (eq. 5).
        retain_align, forget_align: bare sums over the adapted layers (eq. 1, 2).
        retain_task, forget_task: cross-entropy against the labels, and against ỹ (eq. 3).
    """

    total: Tensor
    align: Tensor
    task: Tensor
    retain_align: Tensor
    forget_align: Tensor
    retain_task: Tensor
    forget_task: Tensor


class AlignmentSums(NamedTuple):
    """Group sums of one layer; 0-dim, fp32 (fp64 for fp64 inputs)."""

    retain: Tensor
    forget: Tensor


class TaskSums(NamedTuple):
    """Cross-entropy sums of the two groups and how many labelled rows each has; 0-dim."""

    retain: Tensor
    forget: Tensor
    retain_count: Tensor
    forget_count: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else.

    Example:
        >>> accumulation_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand_group(group: Tensor, like: Tensor) -> Tensor:
    """The group codes with trailing axes of size 1, so that they broadcast against `like`.

    Args:
        group: int8 codes over the first axes of `like`.
        like: the tensor they select from.

    Example:
        >>> expand_group(torch.zeros(3, dtype=torch.int8), torch.zeros(3, 4, 5)).shape
        torch.Size([3, 1, 1])
    """
    return group.reshape(group.shape + (1,) * (like.ndim - group.ndim))


def group_mean(values: Tensor, group: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean of the retain rows over `dims`, detached, and where it is defined.

    Args:
        values: `(…, features)`; group codes run over its first axes.
        group: int8 codes: 0 retain, 1 forget, −1 ignore.
        dims: axes averaged over; they are dropped from the result.

    Returns:
        The mean in the accumulation dtype (0 where no retain row contributes), and a bool tensor
        that broadcasts against it: whether any retain row contributed.

    Example:
        >>> group_mean(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1], dtype=torch.int8), (0,))
        (tensor([2.]), tensor([True]))
    """
    with torch.no_grad():
        kept = expand_group(group == RETAIN, values)
        total = torch.where(kept, values, 0).sum(tuple(dims), dtype=accumulation_dtype(values.dtype))
        sizes = [values.shape[d] if d in dims else 1 for d in range(values.ndim)]
        count = kept.expand([max(k, s) for k, s in zip(kept.shape, sizes, strict=True)]).sum(tuple(dims))
        return total / count.clamp(min=1), count > 0


def masked_norm_sum(error: Tensor, selected: Tensor, *, norm: Norm, per_sample: bool) -> Tensor:
    """Sum over the selected rows of ‖e‖² (`"mse"`), or of each unit's ‖e‖ (`"l2"`).

    Args:
        error: `(rows…, features)`, or `(B, C, H, W)`.
        selected: bool over the first axes of `error`.
        norm: `"mse"` or `"l2"`; the gradient of `"l2"` is 0 where the norm is 0, never NaN.
        per_sample: a unit is everything under one index of axis 0; else one row (last axis).

    Returns:
        0-dim tensor in the accumulation dtype.

    Example:
        >>> e = torch.tensor([[3.0, 4.0], [9.0, 9.0]])
        >>> masked_norm_sum(e, torch.tensor([True, False]), norm="l2", per_sample=False)
        tensor(5.)
    """
    wide = error.to(accumulation_dtype(error.dtype))
    squares = torch.where(expand_group(selected, wide), wide, 0).square()
    if norm == "mse":
        return squares.sum()
    per_unit = squares.flatten(1).sum(1) if per_sample else squares.sum(-1)
    positive = per_unit > 0
    return torch.where(positive, torch.where(positive, per_unit, 1).sqrt(), 0).sum()


def alignment_sums(
    frozen: Tensor,
    residual: Tensor,
    group: Tensor,
    *,
    target: Tensor | None = None,
    retain_target: Tensor | None = None,
    norm: Norm = "mse",
    per_sample: bool = False,
    mean_dims: Sequence[int] | None = None,
) -> AlignmentSums:
    """Eq. 1 and 2 (or 7 and 8) of one layer, as sums over each group.

    Args:
        frozen: x' `(…, N)` or `(B, C, H, W)`, the frozen branch.
        residual: Δ, same shape.
        group: int8 codes over the first axes of `frozen`.
        target: x̃, broadcasts against `frozen`; `None`: the mean of x' over the retain rows.
        retain_target: teacher mode's x'_t; `None`: the retain term is of Δ.
        norm, per_sample: see :func:`masked_norm_sum`.
        mean_dims: axes the computed mean runs over; default: every axis that `group` covers.

    Returns:
        The two sums, differentiable with respect to `frozen` and `residual`; the forget sum is an
        exact 0 when there is neither a target nor a retain row.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [5.0]])
        >>> g = torch.tensor([0, 0, 1], dtype=torch.int8)
        >>> alignment_sums(x, torch.zeros_like(x), g)  # the mean of 1 and 3 is 2; (5 - 2)² = 9
        AlignmentSums(retain=tensor(0.), forget=tensor(9.))
    """
    output = frozen + residual
    usable: Tensor | None = None
    if target is None:
        dims = tuple(range(group.ndim)) if mean_dims is None else tuple(mean_dims)
        target, usable = group_mean(frozen, group, dims)
    wide = output.to(accumulation_dtype(output.dtype))
    to_mean = wide - target.detach().to(wide.dtype)
    off = residual if retain_target is None else wide - retain_target.detach().to(wide.dtype)
    forgotten = expand_group(group == FORGET, to_mean)
    if usable is not None:
        forgotten = forgotten & usable
    retain = masked_norm_sum(off, group == RETAIN, norm=norm, per_sample=per_sample)
    forget = masked_norm_sum(to_mean, forgotten.expand_as(to_mean), norm=norm, per_sample=per_sample)
    return AlignmentSums(retain, forget)


def units_and_elements(group: Tensor, shape: Sequence[int], code: int, *, norm: Norm, per_sample: bool) -> Tensor:
    """What a group's sum is divided by: units × elements per unit (`"mse"`), or units (`"l2"`).

    Args:
        group: int8 codes over the first axes of a feature of shape `shape`.
        code: `RETAIN` or `FORGET`.

    Returns:
        0-dim int64 tensor, at least 1.

    Example:
        >>> g = torch.tensor([0, 0, 1], dtype=torch.int8)
        >>> units_and_elements(g, (3, 4, 8, 8), RETAIN, norm="mse", per_sample=True)
        tensor(512)
    """
    chosen = group == code
    beyond = math.prod(shape[group.ndim :])
    if norm == "mse":
        count = chosen.sum() * beyond
    elif per_sample:
        count = chosen.flatten(1).any(1).sum() if chosen.ndim > 1 else chosen.sum()
    else:
        count = chosen.sum() * (beyond // shape[-1])
    return count.clamp(min=1)


def mean_prediction(
    logits: Tensor, labels: Tensor, group: Tensor, *, fallback: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ỹ of eq. 3: the mean softmax over the labelled retain rows, detached.

    Args:
        logits: `(rows, C)`.
        labels: int64 `(rows,)`; rows with −100 do not count.
        group: int8 `(rows,)`.
        fallback: `(C,)`, taken when there is no labelled retain row; zeros without it.

    Returns:
        ỹ `(C,)` in the accumulation dtype, and the 0-dim int64 count of rows it is the mean of.

    Example:
        >>> mean_prediction(torch.zeros(1, 4), torch.tensor([1]), torch.tensor([0], dtype=torch.int8))
        (tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor(1))
    """
    with torch.no_grad():
        kept = (labels != IGNORED_LABEL) & (group == RETAIN)
        probabilities = logits.to(accumulation_dtype(logits.dtype)).softmax(-1)
        fresh, usable = group_mean(probabilities, torch.where(kept, RETAIN, IGNORE), (0,))
        other = torch.zeros_like(fresh) if fallback is None else fallback.to(fresh)
        return torch.where(usable, fresh, other), kept.sum()


def task_sums(logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor) -> TaskSums:
    """Eq. 3: cross-entropy of the retain rows against their labels, of the forget rows against ỹ.

    Args:
        logits: `(rows, C)`.
        labels: int64 `(rows,)`; −100 leaves a row out of both terms. A forget row's label is otherwise
            unread.
        group: int8 `(rows,)`.
        soft_label: ỹ `(C,)`; zeros make the forget term an exact 0.

    Returns:
        Sums and counts; :class:`TaskSums`.

    Example:
        >>> group = torch.tensor([0, 1], dtype=torch.int8)
        >>> t = task_sums(torch.zeros(2, 4), torch.tensor([1, 0]), group, torch.full((4,), 0.25))
        >>> round(t.retain.item(), 4), round(t.forget.item(), 4)  # both log 4
        (1.3863, 1.3863)
    """
    labelled = labels != IGNORED_LABEL
    kept, forgotten = labelled & (group == RETAIN), labelled & (group == FORGET)
    with torch.autocast(logits.device.type, enabled=False):
        log_p = F.log_softmax(logits.to(accumulation_dtype(logits.dtype)), dim=-1)
        safe = torch.where(kept, labels, 0)
        retain = -torch.where(kept, log_p.gather(1, safe[:, None]).squeeze(1), 0).sum()
        # A class that ỹ rules out adds nothing, even one whose logit is −∞.
        weighted = torch.where(soft_label != 0, log_p, 0) @ soft_label.to(log_p)
        forget = -torch.where(forgotten, weighted, 0).sum()
    return TaskSums(retain, forget, kept.sum(), forgotten.sum())


def combine(
    retain_align: Tensor,
    forget_align: Tensor,
    retain_task: Tensor,
    forget_task: Tensor,
    *,
    layers: int,
    gamma: float,
    weights: Sequence[float],
) -> RFALoss:
    """Eq. 4-6 from the four bare terms.

    Args:
        retain_align, forget_align: sums over the m layers of the per-layer means.
        retain_task, forget_task: mean cross-entropies.
        layers: m.
        gamma: γ.
        weights: (α, β, λ, μ).

    Example:
        >>> one = torch.tensor(1.0)
        >>> combine(one, one, one, one, layers=2, gamma=0.5, weights=(1, 1, 1, 1)).total
        tensor(1.5000)
    """
    alpha, beta, lam, mu = weights
    align = alpha * retain_align + beta * forget_align
    task = lam * retain_task + mu * forget_task
    total = gamma / layers * align + (1.0 - gamma) * task
    return RFALoss(total, align, task, retain_align, forget_align, retain_task, forget_task)


def dora_residual_weight(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's weight change `g/‖W + sBA‖ ⊙ (W + sBA) − W`, the norm detached (arXiv 2402.09353, section 4.3).

    Args:
        weight: W `(N, …)`, the norm of an output runs over the other axes.
        product: sBA, same shape.
        magnitude: g `(N,)`.

    Returns:
        `(N, …)`; exactly 0 while B is 0 and g is ‖W‖.

    Example:
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> dora_residual_weight(w, torch.zeros_like(w), torch.tensor([10.0]))
        tensor([[3., 4.]])
    """
    merged = weight + product
    norms = weight_norms(merged.detach())
    ratio = magnitude / torch.where(norms > 0, norms, 1)
    return ratio.reshape((-1,) + (1,) * (weight.ndim - 1)) * merged - weight


def weight_norms(weight: Tensor) -> Tensor:
    """L2 norm of each output's weights: `(N, …)` -> `(N,)`.

    Example:
        >>> weight_norms(torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms


def check_range(labels: Tensor, codes: Tensor, classes: int) -> None:
    """Labels of retain rows must name a class; checked where that costs no device synchronisation.

    Raises:
        ValueError: one does not, on a CPU; on an accelerator an assertion of the device fails.

    Example:
        >>> check_range(torch.tensor([2, 9]), torch.tensor([0, 1], dtype=torch.int8), 3)
    """
    read = (codes == RETAIN) & (labels != IGNORED_LABEL)
    fine = (~read | ((labels >= 0) & (labels < classes))).all()
    if labels.device.type != "cpu":
        torch._assert_async(fine, f"labels: expected values in [0, {classes}) or -100")
    elif not torch.compiler.is_compiling() and not bool(fine):
        bad = labels[read & ((labels < 0) | (labels >= classes))]
        raise ValueError(f"labels: got {int(bad[0])}, expected values in [0, {classes}), or -100 to leave a sample out")
