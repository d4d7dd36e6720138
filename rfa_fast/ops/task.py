"""`rfa_fast::task_sums` and `rfa_fast::probability_sums`: eq. 3 and ỹ from rows of logits.

Shapes: logits (m, V), labels int64 (m,), group int8 (m,), ỹ fp32 (V,). Here also is what a head that makes
its own logits calls on them, :data:`LAUNCHERS` on kernels and :data:`HOST` the same in torch::

    stats      lse of each row, fp32 (2, m): maximum, and log Σ exp(z − maximum); its loss, fp32 (m,)
    gradient   of each row's loss by its logits, times a weight; with it the column sums of the
               probabilities of the labelled retain rows, Σ p (V,)
    sums       the column sums alone
    scored     stats and gradient of one pass: losses (m,), and the column sums, if asked for; the
               gradient is written over the logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfa_fast.objective import FORGET, IGNORED_LABEL, RETAIN
from rfa_fast.ops.registration import register

BLOCK_BYTES = 4 * 2**20


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
    hits, mass = torch.where(kept, labels, 0)[:, None], _mass(soft_label)
    stats, loss = torch.zeros(2, *labels.shape, device=logits.device), torch.zeros(labels.shape, device=logits.device)
    for part, z in _blocks(logits, softcap):
        top, total, loss[part] = _exponentials(z, hits[part], Roles(kept[part], forgotten[part]), soft_label, mass)
        stats[0, part], stats[1, part] = top, total.log_()
    return torch.where(kept | forgotten, stats, 0), loss


def _exponentials(
    z: Tensor, hits: Tensor, chosen: Roles, soft_label: Tensor | None, mass: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Write exp(z − maximum) over rows of logits; their maxima, the sums of that, and their losses, each `(m,)`."""
    top = z.amax(1, keepdim=True)
    z -= top
    hit = z.gather(1, hits).squeeze(1)
    # −Σ ỹ log p = Σ ỹ · log Z − Σ ỹ z, before z is overwritten.
    soft = _weighted(z, soft_label) if soft_label is not None else None
    total = z.exp_().sum(1)
    log_total = total.log()
    loss = torch.where(chosen.kept, log_total - hit, 0)
    if soft is not None:
        loss = torch.where(chosen.forgotten, mass * log_total - soft, loss)
    return top.squeeze(1), total, loss


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
    hits, mass = torch.where(kept, labels, 0)[:, None], _mass(soft_label)
    factor = torch.where(kept, 1.0, torch.where(forgotten, mass, 0.0))
    sums = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device) if columns else None
    result = logits if in_place else torch.empty_like(logits)
    for part, z in _blocks(logits, softcap):
        slope = _slope(z, softcap)
        du = z.sub_(lse[0, part, None]).sub_(lse[1, part, None]).exp_()
        if sums is not None:
            sums += kept[part].float() @ du
        du *= factor[part, None]
        _less_target(du, hits[part], Roles(kept[part], forgotten[part]), soft_label, slope)
        if weights is not None:
            du *= weights[part, None]
        result[part] = du
    return result, sums


def _weighted(rows: Tensor, soft_label: Tensor) -> Tensor:
    """Σ ỹ z of each row `(m,)`; a class that ỹ rules out adds nothing, even one whose logit is −∞."""
    found = rows @ soft_label
    if rows.device.type == "cpu" and bool(found.isfinite().all()):
        return found
    return torch.where(soft_label != 0, rows, 0) @ soft_label


def _mass(soft_label: Tensor | None) -> Tensor | float:
    """Σ ỹ."""
    return 0.0 if soft_label is None else soft_label.sum()


def _slope(z: Tensor, softcap: float | None) -> Tensor | None:
    """The derivative of the cap where it gave z."""
    return None if softcap is None else 1 - (z / softcap).square()


def _less_target(du: Tensor, hits: Tensor, chosen: Roles, soft_label: Tensor | None, slope: Tensor | None) -> None:
    """Take the targets from the probabilities, times what they sum to, in place; then through the cap."""
    du.scatter_add_(1, hits, -chosen.kept.float()[:, None])
    if soft_label is not None:
        du.addcmul_(chosen.forgotten.float()[:, None], soft_label, value=-1)
    if slope is not None:
        du *= slope


def _scored_launchers(
    logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor | None, lift: float, softcap: float | None,
    columns: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    lse, loss = _stats_launchers(logits, labels, group, soft_label, softcap)
    weights = None if lift == 1.0 else torch.full_like(loss, lift)
    _, sums = _gradient_launchers(logits, lse, labels, group, soft_label, weights, softcap, True, columns)
    return loss, sums


def _scored_host(
    logits: Tensor, labels: Tensor, group: Tensor, soft_label: Tensor | None, lift: float, softcap: float | None,
    columns: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    kept, forgotten = roles(labels, group)
    hits, mass = torch.where(kept, labels, 0)[:, None], _mass(soft_label)
    factor = torch.where(kept, 1.0, torch.where(forgotten, mass, 0.0))
    sums = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device) if columns else None
    loss = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    second: Tensor | None = None  # torch's own pass over a row takes max, sum and difference while it is in the cache
    for part, z in _blocks(logits, softcap):
        slope, chosen = _slope(z, softcap), Roles(kept[part], forgotten[part])
        second = torch.empty_like(z) if second is None else second
        log_p = torch.log_softmax(z, 1, out=second[: z.shape[0]])
        each = torch.where(chosen.kept, -log_p.gather(1, hits[part]).squeeze(1), 0)
        loss[part] = each if soft_label is None else torch.where(chosen.forgotten, -_weighted(log_p, soft_label), each)
        du = log_p.exp_()
        if sums is not None:
            sums.addmv_(du.mT, chosen.kept.float())
        du *= factor[part, None]
        _less_target(du, hits[part], chosen, soft_label, slope)
        if lift != 1.0:
            du *= lift
        logits[part] = du
    return loss, sums


def _sums_launchers(logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, softcap: float | None) -> Tensor:
    from rfa_fast.kernels.softmax_gradient import probability_sums
    from rfa_fast.kernels.tuning import choose

    config = choose("softmax_gradient", logits.device, logits.dtype)
    sums: Tensor = probability_sums(logits, lse, labels, group, softcap=softcap, config=config)
    return sums


def _sums_host(logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, softcap: float | None) -> Tensor:
    kept = roles(labels, group).kept.float()
    sums = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    for part, z in _blocks(logits, softcap):
        sums += kept[part] @ z.sub_(lse[0, part, None]).sub_(lse[1, part, None]).exp_()
    return sums


def _blocks(logits: Tensor, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows a few at a time, so that what is computed of them stays in the cache of a core: which, and their logits
    in fp32, capped. One buffer serves them all: a fresh one costs more, page by page, than what is computed in it.
    """
    rows = max(1, BLOCK_BYTES // (4 * max(1, logits.shape[1])))
    buffer = torch.empty_like(logits[:rows], dtype=torch.float32)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        z = buffer[: logits.shape[0] - start].copy_(logits[part])
        yield part, z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


class Rowwise(NamedTuple):
    """One implementation of the four; see the top of this file."""

    stats: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., tuple[Tensor, Tensor | None]]
    sums: Callable[..., Tensor]
    scored: Callable[..., tuple[Tensor, Tensor | None]]


LAUNCHERS = Rowwise(_stats_launchers, _gradient_launchers, _sums_launchers, _scored_launchers)
HOST = Rowwise(_stats_host, _gradient_host, _sums_host, _scored_host)


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
