"""The adapted linear layer in plain torch, forward and backward by hand; and what the kernels share with it.

Shapes: x (M, K), weight (N, K), lora_a (R, K), lora_b (N, R), group (M,) int8. Products are taken in x's dtype,
sums in fp32 (fp64 for fp64). The derivative, with h = x Aᵀ, s the scale, w the weight of a row::

    G' = G + w_f (y − x̃)        U = s G' B + w_r s² h BᵀB        dX = G' W + U A
    dA = Uᵀ x                    dB = s G'ᵀ h + s² B (Hᵀ diag(w_r) H)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_fast.config import Norm
from rfa_fast.objective import FORGET, RETAIN, accumulation_dtype, group_mean
from rfa_fast.ops.gradients import by_autograd, differentiable_once
from rfa_fast.ops.retain_rows import places, retain_rows
from rfa_fast.ops.rows import (
    autocast,
    eager_on_cpu,
    group_rows,
    picks,
    row_map,
    row_weights,
    unit_sums,
    without_autocast,
)

LayerAndMean = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Linear(NamedTuple):
    """The results of `linear_forward`; a field that was not asked for is an empty tensor.

    Attributes:
        output: y `(M, N)`.
        residual: Δ `(M, N)`.
        hidden: h `(M, R)`.
        mean: x̃ `(N,)` fp32, where it was computed inside.
        retain_norms, forget_norms: ‖e_u‖ of each unit `(U,)`, for the unsquared norm.
        retain_loss, forget_loss: 0-dim fp32.
    """

    output: Tensor
    residual: Tensor
    hidden: Tensor
    mean: Tensor
    retain_norms: Tensor
    forget_norms: Tensor
    retain_loss: Tensor
    forget_loss: Tensor


@torch.library.custom_op("rfa_fast::add_product_", mutates_args=("base",))
def _add_product(base: Tensor, left: Tensor, right: Tensor) -> None:
    base.addmm_(left, right)


@_add_product.register_fake
def _(base: Tensor, left: Tensor, right: Tensor) -> None:
    return None


def add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left · right, written over base `(M, N)`; rounded once.

    An operator of its own where it is compiled: of `addmm_` inductor makes a product that first copies its base.

    Example:
        >>> add_product(torch.ones(1, 1), torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0], [1.0]]))
        tensor([[6.]])
    """
    if not torch.compiler.is_compiling():
        return base.addmm_(left, right)
    _add_product(base, left, right)
    return base


def losses(retain: Tensor, forget: Tensor, l2: bool, unit_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms and sums from squared errors per row `(M,)`; without l2 a sum may come as any shape."""
    none = retain.new_empty(0)
    if not l2:
        return none, none.clone(), retain.sum(), forget.sum()
    norms = [unit_sums(rows, unit_rows).sqrt() for rows in (retain, forget)]
    return norms[0], norms[1], norms[0].sum(), norms[1].sum()


def retain_energy(hidden: Tensor, lora_b: Tensor, group: Tensor, scale: float) -> Tensor:
    """‖Δ_i‖² of the retain rows from R × R: s² h_i (BᵀB) h_iᵀ, fp32 `(M,)`."""
    wide = accumulation_dtype(hidden.dtype)
    h = torch.where((group == RETAIN)[:, None], hidden, 0).to(wide)
    up = lora_b.to(wide)
    return scale**2 * ((h @ (up.mT @ up)) * h).sum(1).clamp(min=0)


def usable(group: Tensor, fallback_known: Tensor | None) -> Tensor:
    """Whether an x̃ that is computed inside is known: from this batch, or from one before."""
    fresh = (group == RETAIN).any()
    return fresh if fallback_known is None else fresh | fallback_known


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, group: Tensor | None,
    target: Tensor | None, target_div: int, target_mod: int, kept: Tensor | None, kept_div: int, kept_mod: int,
    fallback: Tensor | None, fallback_known: Tensor | None, scale: float, l2: bool, unit_rows: int,
    emit_residual: bool, *, picked: bool = False,
) -> Linear:  # fmt: skip
    """`rfa_fast::linear_forward` in torch; `picked` says that `kept` is of :func:`retain_rows`."""
    hidden = F.linear(x, lora_a.to(x.dtype))
    frozen = F.linear(x, weight, bias)
    delta = scale * F.linear(hidden, lora_b.to(x.dtype)) if emit_residual else None
    # x̃ first: without Δ to show, x' becomes y in place, and no second tensor of its size is made.
    found = group_mean(frozen, group, (0,)) if group is not None and target is None else None
    up = lora_b.to(x.dtype).mT
    if delta is not None:
        output = frozen + delta
    elif torch.is_grad_enabled():  # autograd follows, and what it keeps is not to be written into
        output = torch.addmm(frozen, scale * hidden, up)
    else:
        output = add_product(frozen, scale * hidden, up)
    none = torch.empty(0, dtype=accumulation_dtype(x.dtype), device=x.device)
    residual = x.new_empty(0) if delta is None else delta
    if group is None:
        return Linear(output, residual, hidden, none, none.clone(), none.clone(), none.sum(), none.sum())
    mean, aimed, goal = none, group == FORGET, none if target is None else target
    if found is not None:
        fresh, known = found
        mean = fresh if fallback is None else torch.where(known, fresh, fallback)
        goal, aimed = mean[None], aimed & usable(group, fallback_known)
    forget = squared_errors(output, goal, target_div, target_mod, aimed)
    if kept is None:
        retain = retain_energy(hidden, lora_b, group, scale)
    else:
        place = places(group) if picked else None
        retain = squared_errors(output, kept, kept_div, kept_mod, group == RETAIN, place)
    return Linear(output, residual, hidden, mean, *losses(retain, forget, l2, unit_rows))


def squared_errors(
    output: Tensor, values: Tensor, div: int, mod: int, selected: Tensor, place: Tensor | None = None
) -> Tensor:
    """‖y − values‖² of the selected rows, `(M,)`, 0 on the others.

    Args:
        div, mod: as of :func:`off_rows`.
        place: `(M,)`, the row of `values` that row m is compared with, where `div` and `mod` do not say it.
    """
    if not picks(output):
        return torch.where(selected[:, None], off_rows(output, values, div, mod, place), 0).square().sum(1)
    rows = selected.nonzero().squeeze(1)
    off = output[rows].to(accumulation_dtype(output.dtype)) - values[_value_of(rows, div, mod, place)]
    return off.new_zeros(output.shape[0]).index_put_((rows,), off.square_().sum(1))


def off_rows(output: Tensor, values: Tensor, div: int, mod: int, place: Tensor | None = None) -> Tensor:
    """y − row (m // div) % mod of `values`, or row `place[m]`, `(M, N)` in the dtype of sums; nothing is expanded."""
    values = values if place is None else values[place]
    features = output.shape[1]
    wide = accumulation_dtype(output.dtype)
    blocks = output.to(wide).reshape(-1, mod, div, features)
    return (blocks - values.to(wide).reshape(mod, 1, features)).reshape(-1, features)


def _value_of(rows: Tensor, div: int, mod: int, place: Tensor | None) -> Tensor:
    return (rows // div) % mod if place is None else place[rows]


class Weights(NamedTuple):
    """w_f and w_r, `(M,)`."""

    forget: Tensor | None
    retain: Tensor | None


def group_weights(
    group: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, known: Tensor | None,
    target_given: bool, retain_norms: Tensor, forget_norms: Tensor, l2: bool, unit_rows: int,
) -> Weights:  # fmt: skip
    """w_f and w_r, `(M,)` fp32; `None` where nobody asked for that loss."""
    forget = retain = None
    if group is not None and forget_grad is not None:
        chosen = group == FORGET
        if not target_given:
            chosen = chosen & usable(group, known)
        forget = row_weights(forget_grad, chosen, forget_norms if l2 else None, unit_rows)
    if group is not None and retain_grad is not None:
        retain = row_weights(retain_grad, group == RETAIN, retain_norms if l2 else None, unit_rows)
    return Weights(forget, retain)


def thin_terms(
    up: Tensor, grad_b: Tensor, residual_grad: Tensor | None, hidden: Tensor, lora_b: Tensor, retain: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """U and dB with what does not come from G': the r × r retain term, and a gradient of the residual itself."""
    dtype = accumulation_dtype(hidden.dtype)
    wide, lifted = hidden.to(dtype), lora_b.to(dtype)
    if retain is not None:
        weighted = retain[:, None] * wide
        up = up + scale**2 * (weighted @ (lifted.mT @ lifted))
        grad_b = grad_b + scale**2 * (lifted @ (wide.mT @ weighted))
    if residual_grad is not None:
        off = residual_grad.to(dtype)
        up = up + scale * (off @ lifted)
        grad_b = grad_b + scale * (off.mT @ wide)
    return up.contiguous(), grad_b


def _added(
    grad: Tensor, each: Tensor, output: Tensor, values: Tensor, div: int, mod: int, place: Tensor | None = None
) -> Tensor:
    """G + w (y − values) on the rows whose weight w is not 0; row m's value is at `place[m]`, where that is given."""
    wide = accumulation_dtype(output.dtype)
    if not picks(output):
        off = torch.where((each != 0)[:, None], off_rows(output, values, div, mod, place), 0)
        return grad.to(wide) + each[:, None] * off
    rows = each.nonzero().squeeze(1)
    off = output[rows].to(wide) - values[_value_of(rows, div, mod, place)]
    moved = off.mul_(each[rows, None]).add_(grad[rows])
    return grad.index_put((rows,), moved.to(grad.dtype))


def _thin_gradient(changed: Tensor, hidden: Tensor) -> Tensor:
    """G'ᵀ h `(N, R)`. As (hᵀ G')ᵀ a CPU's library reads the wide factor as it lies, in a tenth of the time."""
    if eager_on_cpu(changed):
        return (hidden.mT @ changed).mT.contiguous()
    return changed.mT @ hidden


def backward(
    grad: Tensor, residual_grad: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, x: Tensor,
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, group: Tensor | None, goal: Tensor | None, goal_div: int,
    goal_mod: int, target_given: bool, known: Tensor | None, kept: Tensor | None, kept_div: int, kept_mod: int,
    hidden: Tensor, output: Tensor, retain_norms: Tensor, forget_norms: Tensor, scale: float, l2: bool,
    unit_rows: int, needs_x: bool, *, picked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rfa_fast::linear_backward` in torch; `picked` says that `kept` is of :func:`retain_rows`."""
    w = group_weights(
        group, retain_grad, forget_grad, known, target_given, retain_norms, forget_norms, l2, unit_rows
    )  # fmt: skip
    changed, wide = grad, accumulation_dtype(x.dtype)
    if goal is not None and w.forget is not None:
        changed = _added(changed, w.forget, output, goal, goal_div, goal_mod)
    if kept is not None and w.retain is not None and group is not None:
        place = places(group) if picked else None
        changed = _added(changed, w.retain, output, kept, kept_div, kept_mod, place)
    changed = changed.to(x.dtype)
    up = scale * (changed @ lora_b.to(x.dtype)).to(wide)
    grad_b = scale * _thin_gradient(changed, hidden).to(wide)
    up, grad_b = thin_terms(up, grad_b, residual_grad, hidden, lora_b, None if kept is not None else w.retain, scale)
    narrow = up.to(x.dtype)
    # dA first: an x that is computed again for it is gone before dX, which is as large, is made.
    grad_a = (narrow.mT @ x).to(lora_a.dtype)
    grad_x = add_product(changed @ weight, narrow, lora_a.to(x.dtype)) if needs_x else x.new_empty(0)
    return grad_x, grad_a, grad_b.to(lora_b.dtype)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What autograd keeps of a forward."""
    x, weight, _, a, b, group, target, t_div, t_mod, kept, k_div, k_mod, _, known, scale, l2, unit_rows, emit = inputs
    result = Linear(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(result.hidden, result.mean, result.retain_norms, result.forget_norms)
    goal = result.mean if target is None else target
    # Without a group y is compared with nothing: it is not kept for us, and may be added to in place.
    held = None if group is None else result.output
    ctx.save_for_backward(
        x, weight, a, b, group, goal, known, kept, result.hidden, held, result.retain_norms, result.forget_norms
    )
    ctx.shape = result.output.shape
    ctx.options = (t_div, t_mod, target is not None, k_div, k_mod, scale, l2, unit_rows, emit)


def derivative(
    operator: Any, ctx: Any, grad: Tensor | None, residual: Tensor | None, *rest: Tensor | None
) -> tuple[Any, ...]:
    """The gradients of a forward's inputs, by `operator` (the backward)."""
    x, weight, a, b, group, goal, known, kept, hidden, output, retain_norms, forget_norms = ctx.saved_tensors
    t_div, t_mod, given, k_div, k_mod, scale, l2, unit_rows, emit = ctx.options
    retain_grad, forget_grad = rest[-2:]
    if grad is None:
        grad = x.new_zeros(ctx.shape)
    output = grad if output is None else output
    goal = goal[None] if goal.ndim == 1 else goal
    grads = operator(
        grad, residual if emit else None, retain_grad, forget_grad, x, weight, a, b, group,
        None if group is None else goal, t_div, t_mod, given, known, kept, k_div, k_mod, hidden, output, retain_norms,
        forget_norms, scale, l2, unit_rows, ctx.needs_input_grad[0],
    )  # fmt: skip
    grad_x = grads[0] if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grads[1], grads[2], *([None] * 13)


class _Layer(torch.autograd.Function):
    """The two above, on any device; on a CPU nothing is kept of a teacher's feature but the retain rows.

    They are picked before anything is compared with them: in a compiled graph, whose order is not ours, the rest could
    otherwise stay until the end of the forward.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        group, kept = arguments[5], arguments[9]
        ctx.picked = kept is not None and group is not None and _row_by_row(kept, group)
        if ctx.picked:
            arguments = (*arguments[:9], retain_rows(kept, group), *arguments[10:])
        ctx.kind = arguments[0].device.type
        with without_autocast(ctx.kind):  # the sums stay wide
            result = forward(*arguments, picked=ctx.picked)
        remember(ctx, arguments, result)
        return tuple(result)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        with without_autocast(ctx.kind):
            return derivative(partial(backward, picked=ctx.picked), ctx, *grads)


def _row_by_row(kept: Tensor, group: Tensor) -> bool:
    return kept.device.type == "cpu" and kept.shape[0] == group.shape[0]


def run(
    operator: Any,
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
    fallback: Tensor | None = None,
    fallback_known: Tensor | None = None,
) -> LayerAndMean:
    """A layer of any shape by an operator on rows; arguments are taken as checked.

    Args:
        operator: `rfa_fast::linear_forward`, or the same in torch.
        fallback, fallback_known: `(N,)` and 0-dim bool: x̃ of an earlier batch, in case this one has no
            retain row; or neither.

    Returns:
        The results of :func:`rfa_fast.functional.rfa_linear`, and x̃ `(N,)` where it was computed here,
        else `None`.
    """
    leading, features = tuple(x.shape[:-1]), weight.shape[0]
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    rows = x.reshape(-1, x.shape[-1])
    codes = None if group is None else group_rows(group, leading)
    aim, held = (
        (None, 1, 1) if constant is None or codes is None else row_map(constant.detach(), leading, features)
        for constant in (target, retain_target)
    )
    unit_rows = rows.shape[0] // leading[0] if per_sample else 1
    earlier = None if fallback is None else fallback.to(accumulation_dtype(x.dtype)).contiguous()
    out = Linear(
        *operator(
            rows, weight, bias, lora_a, lora_b, codes, *aim, *held, earlier, fallback_known, scale, norm == "l2",
            unit_rows, emit_residual,
        )
    )  # fmt: skip
    shape = (*leading, features)
    residual = out.residual.reshape(shape) if emit_residual else None
    if codes is None:
        return out.output.reshape(shape), residual, None, None, None
    mean = out.mean if target is None else None
    return out.output.reshape(shape), residual, out.retain_loss, out.forget_loss, mean


def _operator(*arguments: Any) -> Any:
    """The layer on rows. Without a group autograd follows it, as often as a derivative is asked for."""
    return by_autograd(forward, arguments) if arguments[5] is None else _Layer.apply(*arguments)


def linear_and_mean(*arguments: Any, **named: Any) -> LayerAndMean:
    """The layer of :func:`rfa_fast.functional.rfa_linear` in torch; see :func:`run`."""
    return run(_operator, *arguments, **named)
