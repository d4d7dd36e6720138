"""The operators an adapted layer is made of: frozen product, low-rank product and alignment loss in one call.

This module checks arguments and documents shapes; which implementation runs is decided in
:mod:`rfa_fast.ops.backends`. All of them compute the equations of :mod:`rfa_fast.objective`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rfa_fast.config import Backend, Norm, check_choice
from rfa_fast.kernels.conv2d_geometry import geometry, pair, resolve_padding
from rfa_fast.objective import check_range
from rfa_fast.ops import backends
from rfa_fast.ops.arguments import (
    check_adapters,
    check_device,
    check_float,
    check_group,
    check_linear,
    check_low_rank,
    check_operands,
    check_target,
)
from rfa_fast.ops.gradients import trained

Unit = Literal["row", "sample"]

CHUNK_BYTES, CHUNK_BYTES_CPU = 256 * 2**20, 96 * 2**20


class RFAOutput(NamedTuple):
    """What an adapted layer computes.

    Attributes:
        output: y = x' + Δ.
        residual: Δ, if `emit_residual`; else `None`.
        retain_loss, forget_loss: fp32 sums over each group (fp64 for fp64 inputs); `None` without a group.
    """

    output: Tensor
    residual: Tensor | None
    retain_loss: Tensor | None
    forget_loss: Tensor | None


class HeadLoss(NamedTuple):
    """What the fused language-model head computes.

    Attributes:
        retain, forget: cross-entropy sums against the labels and against ỹ (eq. 3), fp32.
        retain_count, forget_count: labelled rows of each group, int64.
        mean_prediction: ỹ `(V,)`, fp32, detached.
        retain_align, forget_align: alignment sums of an adapted head (eq. 1, 2); `None` otherwise.
    """

    retain: Tensor
    forget: Tensor
    retain_count: Tensor
    forget_count: Tensor
    mean_prediction: Tensor
    retain_align: Tensor | None
    forget_align: Tensor | None


def rfa_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    group: Tensor | None = None,
    target: Tensor | None = None,
    retain_target: Tensor | None = None,
    norm: Norm = "mse",
    unit: Unit = "row",
    emit_residual: bool = False,
    backend: Backend = "auto",
) -> RFAOutput:
    """`y = x Wᵀ + b + s · (x Aᵀ) Bᵀ` with the alignment sums of eq. 1-2 (eq. 7-8 with `retain_target`).

    Args:
        x: `(…, K)` floating point.
        weight: W `(N, K)`; one that is to get a gradient, or such a bias, takes plain torch in the place of a fused
            backend.
        lora_a, lora_b: A `(R, K)` and B `(N, R)`, any floating dtype; cast to `x`'s for the products.
        bias: `(N,)` or `None`.
        scale: s.
        group: int8 codes over the leading axes of `x`, or only the first: 0 retain, 1 forget, any other
            (−1): ignored.
        target: x̃, broadcasts against `(…, N)`, in a dtype no wider than the sums' (fp32; float64 for a float64 `x`);
            `None`: the mean of the frozen output over all retain rows.
        retain_target: x'_t of teacher mode, likewise.
        norm: `"mse"` sums squares, `"l2"` the norm of each unit.
        unit: `"row"`, or `"sample"`: everything under one index of axis 0.
        emit_residual: also return Δ.
        backend: see :func:`rfa_fast.ops.backends.select`.

    Raises:
        ValueError: shapes that do not fit, or a backend that is not there.
        TypeError: a dtype that is not supported.

    Example:
        >>> x, w = torch.eye(3), torch.eye(3)
        >>> a, b = torch.ones(1, 3), torch.ones(3, 1)
        >>> group = torch.tensor([0, 0, 1], dtype=torch.int8)
        >>> out = rfa_linear(x, w, a, b, scale=1.0, group=group)
        >>> out.retain_loss  # two rows of three ones
        tensor(6.)
    """
    check_linear(x, weight, lora_a, lora_b, bias, group, target, retain_target, norm, unit)
    chosen, _ = backends.select(backend, x)
    return RFAOutput(
        *backends.linear(
            chosen, x, weight, lora_a, lora_b, bias, scale, group, target, retain_target, norm, unit == "sample",
            emit_residual,
        )
    )  # fmt: skip


def rfa_linear_and_mean(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    group: Tensor,
    fallback: Tensor | None,
    fallback_known: Tensor | None,
    norm: Norm = "mse",
    unit: Unit = "row",
    backend: Backend = "auto",
) -> tuple[RFAOutput, Tensor] | None:
    """:func:`rfa_linear` for a layer that remembers x̃: in one pass, where the backend can.

    Args:
        fallback: `(N,)`, x̃ of an earlier batch, in case this one has no retain row; or `None`.
        fallback_known: 0-dim bool, whether the fallback is one; goes with it.
        x, weight, lora_a, lora_b, bias, scale, group, norm, unit, backend: as :func:`rfa_linear`.

    Returns:
        The layer's results, and the x̃ they are about, fp32 `(N,)`; `None` with the reference backend, for a
        batch without rows and for a weight or a bias to train, which take the target from the caller.

    Raises:
        ValueError: shapes that do not fit, or a backend that is not there.
        TypeError: a dtype that is not supported.

    Example:
        >>> x, group = torch.eye(3), torch.tensor([0, 0, 1], dtype=torch.int8)
        >>> args = torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
        >>> rfa_linear_and_mean(
        ...     x, *args, scale=1.0, group=group, fallback=None, fallback_known=None, backend="torch"
        ... )[1]
        tensor([0.5000, 0.5000, 0.0000])
    """
    chosen, _ = backends.select(backend, x)
    if chosen == "reference" or x.numel() == 0 or trained(weight, bias):
        return None
    check_linear(x, weight, lora_a, lora_b, bias, group, fallback, None, norm, unit)
    output, residual, retain, forget, mean = backends.linear_and_mean(
        chosen, x, weight, lora_a, lora_b, bias, scale, group, None, None, norm, unit == "sample", False, fallback,
        fallback_known,
    )  # fmt: skip
    if mean is None:
        raise ValueError("target: got one, expected the operator to compute x̃")
    return RFAOutput(output, residual, retain, forget), mean


def rfa_conv2d(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    group: Tensor | None = None,
    target: Tensor | None = None,
    retain_target: Tensor | None = None,
    norm: Norm = "mse",
    emit_residual: bool = False,
    backend: Backend = "auto",
) -> RFAOutput:
    """`y = W ∗ x + b + s · B ∗ (A ∗ x)` with the alignment sums of eq. 1-2; a unit is a sample.

    Args:
        x: `(B, C, H, W)`, already padded if the padding mode is not zeros.
        weight: `(N, C/groups, kh, kw)`; to train it, as in :func:`rfa_linear`.
        lora_a: A `(groups·R, C/groups, kh, kw)`.
        lora_b: B `(N, R, 1, 1)`.
        bias: `(N,)` or `None`.
        scale: s.
        stride, padding, dilation, groups: as :func:`torch.nn.functional.conv2d`.
        group: int8 `(B,)`: 0 retain, 1 forget; −1 and any other: ignored.
        target: x̃, broadcasts against `(B, N, H', W')`; `None`: the mean map over the retain samples.
        retain_target, norm, emit_residual, backend: as :func:`rfa_linear`.

    Raises:
        ValueError: shapes that do not fit, or a backend that is not there.
        TypeError: a dtype that is not supported.

    Example:
        >>> x = torch.ones(2, 3, 5, 5)
        >>> out = rfa_conv2d(x, torch.ones(4, 3, 3, 3), torch.ones(2, 3, 3, 3), torch.zeros(4, 2, 1, 1), scale=4.0)
        >>> out.output.shape
        torch.Size([2, 4, 3, 3])
    """
    check_operands(x, weight, bias, 4)
    check_adapters(x, lora_a, lora_b, 4)
    check_choice("norm", norm, ("mse", "l2"))
    outputs, per_group = weight.shape[0], weight.shape[1]
    if x.ndim != 4 or x.shape[1] != per_group * groups:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {per_group * groups}, H, W)")
    rank = lora_b.shape[1]
    wanted_a, wanted_b = (groups * rank, *weight.shape[1:]), (outputs, rank, 1, 1)
    if tuple(lora_a.shape) != wanted_a or tuple(lora_b.shape) != wanted_b:
        raise ValueError(
            f"lora_a, lora_b: got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}, expected {wanted_a} and {wanted_b}"
        )
    if group is not None and group.ndim != 1:
        raise ValueError(f"group: got shape {tuple(group.shape)}, expected (B,) = ({x.shape[0]},)")
    check_group(group, (x.shape[0],), x.device)
    if target is not None or retain_target is not None:
        steps, spread = pair("stride", stride), pair("dilation", dilation)
        around = resolve_padding(padding, (weight.shape[2], weight.shape[3]), steps, spread)
        where = geometry(x, weight, steps, around, spread, groups)
        shape = (x.shape[0], outputs, where.out_height, where.out_width)
        check_target("target", target, shape, x)
        check_target("retain_target", retain_target, shape, x)
    chosen, _ = backends.select(backend, x)
    return RFAOutput(
        *backends.conv2d(
            chosen, x, weight, lora_a, lora_b, bias, scale, stride, padding, dilation, groups, group, target,
            retain_target, norm, emit_residual,
        )
    )  # fmt: skip


def rfa_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: Tensor,
    bias: Tensor | None = None,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    mean_prediction: Tensor | None = None,
    target: Tensor | None = None,
    norm: Norm = "mse",
    chunk_bytes: int | None = None,
    skip: float = 0.0,
    backend: Backend = "auto",
) -> HeadLoss:
    """Eq. 3 of a language model from its last hidden states, without ever holding all the logits.

    Args:
        hidden: `(rows, K)`.
        weight: `(V, K)`.
        labels: int64 `(rows,)`, already shifted; −100 leaves a row out of the task terms and of ỹ.
        group: int8 `(rows,)`.
        bias: `(V,)` or `None`.
        lora_a, lora_b, scale: adapters of the head, or `None`; with them the alignment sums are returned too.
        softcap: logits become `softcap · tanh(logits / softcap)`.
        mean_prediction: ỹ `(V,)` to use when no retain row has a label.
        target: x̃ `(V,)` of an adapted head; `None`: the mean of its frozen output over the retain rows.
        norm: norm of an adapted head's alignment, a unit is a row.
        chunk_bytes: logits held at one time, in bytes; `None`: 256 MiB on an accelerator, 96 MiB on a CPU, where
            shorter products are no slower.
        skip: in the gradient of a head that is frozen, leave out blocks of 128 classes where every row's entry is at
            most this fraction of the row's largest; 0: none. `2**-8` is what bf16 resolves. The losses stay exact.
        backend: see :func:`rfa_fast.ops.backends.select`; `"reference"` holds all the logits.

    Raises:
        ValueError: shapes that do not fit, a label of a retain row that is no class (on an accelerator an assertion of
            the device), one adapter without the other, a backend that is not there.
        TypeError: labels that are not int64, or an unsupported dtype.

    Example:
        >>> h, w = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> group = torch.tensor([0, 1], dtype=torch.int8)
        >>> out = rfa_head_loss(h, w, torch.tensor([2, 0]), group)
        >>> round(out.retain.item(), 4)  # log 4
        1.3863
    """
    check_float(hidden=hidden, weight=weight, bias=bias)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: got {tuple(hidden.shape)} and {tuple(weight.shape)}, expected (rows, K), (V, K)"
        )
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a, lora_b: got one of them, expected both or neither")
    if lora_a is not None and lora_b is not None:
        check_adapters(hidden, lora_a, lora_b, 2)
        check_low_rank(weight, lora_a, lora_b)
    check_operands(hidden, weight, bias, 2)
    check_choice("norm", norm, ("mse", "l2"))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, expected a number above 0, or None for logits as they are")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}, expected torch.int64")
    if tuple(labels.shape) != (hidden.shape[0],):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({hidden.shape[0]},)")
    check_device("labels", labels, hidden.device)
    if tuple(group.shape) != (hidden.shape[0],):
        raise ValueError(f"group: got shape {tuple(group.shape)}, expected ({hidden.shape[0]},)")
    check_group(group, (hidden.shape[0],), hidden.device)
    check_range(labels, group, weight.shape[0])
    check_target("target", target, (weight.shape[0],), hidden)
    if mean_prediction is not None:
        check_float(mean_prediction=mean_prediction)
        check_device("mean_prediction", mean_prediction, hidden.device)
        if tuple(mean_prediction.shape) != (weight.shape[0],):
            got = tuple(mean_prediction.shape)
            raise ValueError(f"mean_prediction: got shape {got}, expected ({weight.shape[0]},), one entry per class")
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: got {chunk_bytes}, expected >= 1")
    if not 0 <= skip < 1:
        raise ValueError(f"skip: got {skip}, expected a number in [0, 1)")
    if skip and (lora_a is not None or weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(f"skip: got {skip} for a head with something to train, expected 0: it needs every block")
    chosen, _ = backends.select(backend, hidden)
    return HeadLoss(
        *backends.head_loss(
            chosen, hidden, weight, labels, group, bias, lora_a, lora_b, scale, softcap, mean_prediction, target,
            norm, chunk_bytes, skip=skip,
        )
    )  # fmt: skip
