"""`rfa_fast::task_sums` and `rfa_fast::probability_sums`: eq. 3 and ỹ from rows of logits.

Shapes: logits (m, V), labels int64 (m,), group int8 (m,), ỹ fp32 (V,). Here also is what a head that makes
its own logits calls on them, :data:`LAUNCHERS` on kernels and :data:`HOST` the same in torch::

    stats      lse of each row, fp32 (2, m): maximum, and log Σ exp(z − maximum); its loss, fp32 (m,)
    gradient   of each row's loss by its logits, times a weight; with it the column sums of the
               probabilities of the labelled retain rows, Σ p (V,)
    sums       the column sums alone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_fast.objective import FORGET, IGNORED_LABEL, RETAIN
from rfa_fast.ops.registration import register


class Roles(NamedTuple):
    """Which rows the task terms are made of, bool `(rows,)`."""

    kept: Tensor
    forgotten: Tensor


def roles(labels: Tensor, group: Tensor) -> Roles:
    """The roles of rows `(m,)`.

    Example:
        >>> roles(torch.tensor([7, -100, 7]), torch.tensor([0, 0, 1], dtype=torch.int8)).kept
        tensor([ True, False, False])
    """
    labelled = labels != IGNORED_LABEL
    return Roles(labelled & (group == RETAIN), labelled & (group == FORGET))


def _stats_launchers(
    logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    from rfa_fast.kernels.softmax_stats import softmax_stats
    from rfa_fast.kernels.tuning import choose

    config = choose("softmax_stats", logits.device, logits.dtype)
    lse, loss = softmax_stats(logits, labels, group, soft_label, softcap=softcap, config=config)
    return lse, loss


def _stats_host(
    logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    kept, forgotten = roles(labels, group)
    z = _capped(logits, softcap)
    top = z.amax(1)
    log_p = z - top[:, None]
    log_total = log_p.logsumexp(1)
    log_p -= log_total[:, None]
    loss = torch.where(kept, -log_p.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1), 0)
    if soft_label is not None:
        loss = torch.where(forgotten, -(log_p @ soft_label), loss)
    return torch.where(kept | forgotten, torch.stack([top, log_total]), 0), loss


def _gradient_launchers(
    logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor | None, weights: Tensor | None,
    softcap: float | None, in_place: bool, columns: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from rfa_fast.kernels.softmax_gradient import softmax_gradient
    from rfa_fast.kernels.tuning import choose

    du, sums = softmax_gradient(
        logits, lse, labels, group, soft_label, weights=weights, softcap=softcap, in_place=in_place, columns=columns,
        config=choose("softmax_gradient", logits.device, logits.dtype),
    )  # fmt: skip
    return du, sums


def _gradient_host(
    logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor | None, weights: Tensor | None,
    softcap: float | None, in_place: bool, columns: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    kept, forgotten = roles(labels, group)
    z = _capped(logits, softcap)
    p = torch.exp((z - lse[0, :, None]) - lse[1, :, None])
    hit = F.one_hot(torch.where(kept, labels, 0), logits.shape[1])
    du = torch.where(kept[:, None], p - hit, 0)
    if soft_label is not None:
        du = torch.where(forgotten[:, None], p * soft_label.sum() - soft_label, du)
    if softcap is not None:
        du = du * (1 - (z / softcap).square())
    if weights is not None:
        du = du * weights[:, None]
    sums = torch.where(kept[:, None], p, 0).sum(0) if columns else None
    return (logits.copy_(du) if in_place else du.to(logits.dtype)), sums


def _sums_launchers(logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, softcap: float | None) -> Tensor:
    from rfa_fast.kernels.softmax_gradient import probability_sums
    from rfa_fast.kernels.tuning import choose

    config = choose("softmax_gradient", logits.device, logits.dtype)
    sums: Tensor = probability_sums(logits, lse, labels, group, softcap=softcap, config=config)
    return sums


def _sums_host(logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, softcap: float | None) -> Tensor:
    p = torch.exp((_capped(logits, softcap) - lse[0, :, None]) - lse[1, :, None])
    return torch.where(roles(labels, group).kept[:, None], p, 0).sum(0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.float()
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


class Rowwise(NamedTuple):
    """One implementation of the three; see the top of this file."""

    stats: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., tuple[Tensor, Tensor | None]]
    sums: Callable[..., Tensor]


LAUNCHERS = Rowwise(_stats_launchers, _gradient_launchers, _sums_launchers)
HOST = Rowwise(_stats_host, _gradient_host, _sums_host)


def row_weights(retain: Tensor | None, forget: Tensor | None, labels: Tensor, group: Tensor) -> Tensor:
    """What each row's loss is multiplied with further up, fp32 `(rows,)`."""
    kept, forgotten = roles(labels, group)
    weights = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    for chosen, upstream in ((kept, retain), (forgotten, forget)):
        if upstream is not None:
            weights = torch.where(chosen, upstream, weights)
    return weights


def _task(
    rowwise: Rowwise, logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    lse, loss = rowwise.stats(logits, labels, group, soft_label, softcap)
    return torch.where(group == RETAIN, loss, 0).sum(), torch.where(group == FORGET, loss, 0).sum(), lse


def _task_fake(
    logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    return torch.empty((), **fp32), torch.empty((), **fp32), torch.empty(2, logits.shape[0], **fp32)


TASK_SUMS = register(
    "task_sums",
    "(Tensor logits, Tensor labels, Tensor group, Tensor soft_label, float? softcap) -> (Tensor, Tensor, Tensor)",
    launchers=lambda *args: _task(LAUNCHERS, *args),
    host=lambda *args: _task(HOST, *args),
    fake=_task_fake,
)


def _task_gradient(
    rowwise: Rowwise, retain_grad: Tensor | None, forget_grad: Tensor | None, logits: Tensor, lse: Tensor,
    labels: Tensor, group: Tensor, soft_label: Tensor, softcap: float | None,
) -> Tensor:  # fmt: skip
    weights = row_weights(retain_grad, forget_grad, labels, group)
    return rowwise.gradient(logits, lse, labels, group, soft_label, weights, softcap, False, False)[0]


_TASK_BACKWARD = register(
    "task_sums_backward",
    "(Tensor? retain_grad, Tensor? forget_grad, Tensor logits, Tensor lse, Tensor labels, Tensor group, "
    "Tensor soft_label, float? softcap) -> Tensor",
    launchers=lambda *args: _task_gradient(LAUNCHERS, *args),
    host=lambda *args: _task_gradient(HOST, *args),
    fake=lambda retain_grad, forget_grad, logits, *rest: logits.new_empty(logits.shape),
)


def _task_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.softcap = inputs[4]


def _task_backward(ctx: Any, retain: Tensor | None, forget: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    logits, labels, group, soft_label, lse = ctx.saved_tensors
    du = _TASK_BACKWARD(retain, forget, logits, lse, labels, group, soft_label, ctx.softcap)
    return du, None, None, None, None


TASK_SUMS.register_autograd(_task_backward, setup_context=_task_context)


def _probabilities(rowwise: Rowwise, logits: Tensor, labels: Tensor, group: Tensor, softcap: float | None) -> Tensor:
    lse, _ = rowwise.stats(logits, labels, group, None, softcap)
    return rowwise.sums(logits, lse, labels, group, softcap)


PROBABILITY_SUMS = register(
    "probability_sums",
    "(Tensor logits, Tensor labels, Tensor group, float? softcap) -> Tensor",
    launchers=lambda *args: _probabilities(LAUNCHERS, *args),
    host=lambda *args: _probabilities(HOST, *args),
    fake=lambda logits, *rest: torch.empty(logits.shape[1], dtype=torch.float32, device=logits.device),
)
