"""`rfa_fast::linear_forward` and `rfa_fast::linear_backward`: the adapted linear layer on fused kernels.

Shapes inside: x (M, K), weight (N, K), lora_a (R, K), lora_b (N, R), group (M,) int8. What autograd keeps
is x, h, y and the constants x̃ or x'_t; never Δ and never x'. The derivative is written out in
:mod:`rfa_fast.ops.linear_torch`, which is also what these operators do on a CPU without the interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfa_fast.config import Norm
from rfa_fast.objective import RETAIN
from rfa_fast.ops import linear_torch
from rfa_fast.ops.linear_torch import Linear, group_weights, losses, retain_energy, thin_terms, usable
from rfa_fast.ops.registration import register
from rfa_fast.ops.rows import autocast, group_rows, row_map

SMALL = 64  # rows up to which one launch is worth more than the products it repeats


def _forward_launchers(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, group: Tensor | None,
    target: Tensor | None, target_div: int, target_mod: int, kept: Tensor | None, kept_div: int, kept_mod: int,
    fallback: Tensor | None, fallback_known: Tensor | None, scale: float, l2: bool, unit_rows: int,
    emit_residual: bool,
) -> Linear:  # fmt: skip
    from rfa_fast.kernels import feature_mean as means
    from rfa_fast.kernels import linear_forward as forward
    from rfa_fast.kernels.autotune import tuned
    from rfa_fast.kernels.common import MAX_BLOCK_R
    from rfa_fast.kernels.lora_down import lora_down
    from rfa_fast.kernels.row_error import row_error
    from rfa_fast.kernels.tuning import choose

    m, rank = x.shape[0], lora_a.shape[0]
    goal = None if target is None else forward.Rows(target, target_div, target_mod)
    held = None if kept is None else forward.Rows(kept, kept_div, kept_mod)
    columns = forward.NO_COLUMNS
    if group is not None and goal is None:
        columns = forward.MEAN if l2 else forward.MEAN_AND_SPREAD

    def product(config: Any) -> Any:
        small = config.route == "fused" and isinstance(m, int) and m <= SMALL
        single = (config.route == "single" or small) and rank <= MAX_BLOCK_R
        hidden = None if single else lora_down(x, lora_a, config=choose("lora_down", x.device, x.dtype))
        return forward.linear_forward(
            x, weight, bias, lora_a, lora_b, hidden, scale=scale, group=group, goal=goal, kept=held, columns=columns,
            emit_delta=emit_residual, config=config,
        )  # fmt: skip

    sizes = {"N": weight.shape[0], "K": weight.shape[1], "R": rank}
    out = product(tuned("linear_forward", x, sizes, product))
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    residual = x.new_empty(0) if out.delta is None else out.delta
    if group is None:
        return Linear(out.output, residual, out.hidden, none, none.clone(), none.clone(), none.sum(), none.sum())
    mean, forget = none, none
    if out.forget_rows is not None:
        forget = out.forget_rows.sum(0)
    elif out.columns is not None and out.counts is not None:
        mean, loss = means.feature_mean(
            out.columns, out.counts, fallback=fallback, fallback_known=fallback_known, with_loss=not l2,
            config=choose("feature_mean", x.device, x.dtype),
        )  # fmt: skip
        if loss is None:
            aimed = torch.where(usable(group, fallback_known) | (group == RETAIN), group, -1)
            forget = row_error(out.output, mean, aimed, config=choose("row_error", x.device, x.dtype))
        else:
            forget = loss
    taught = out.retain_rows
    retain = retain_energy(out.hidden, lora_b, group, scale) if taught is None else taught.sum(0)
    return Linear(out.output, residual, out.hidden, mean, *losses(retain, forget, l2, unit_rows))


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, group: Tensor | None,
    target: Tensor | None, target_div: int, target_mod: int, kept: Tensor | None, kept_div: int, kept_mod: int,
    fallback: Tensor | None, fallback_known: Tensor | None, scale: float, l2: bool, unit_rows: int,
    emit_residual: bool,
) -> Linear:  # fmt: skip
    m, n = x.shape[0], weight.shape[0]

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    units = m // unit_rows if l2 and group is not None else 0
    mean = n if group is not None and target is None else 0
    residual = x.new_empty((m, n) if emit_residual else (0,))
    return Linear(
        x.new_empty((m, n)), residual, x.new_empty((m, lora_a.shape[0])), fp32(mean), fp32(units), fp32(units),
        fp32(), fp32(),
    )  # fmt: skip


_FORWARD = register(
    "linear_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? group, Tensor? target, "
    "SymInt target_div, SymInt target_mod, Tensor? kept, SymInt kept_div, SymInt kept_mod, Tensor? fallback, "
    "Tensor? fallback_known, float scale, bool l2, SymInt unit_rows, bool emit_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launchers=_forward_launchers,
    host=linear_torch.forward,
    fake=_forward_fake,
)


def _backward_launchers(
    grad: Tensor, residual_grad: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, x: Tensor,
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, group: Tensor | None, goal: Tensor | None, goal_div: int,
    goal_mod: int, target_given: bool, known: Tensor | None, kept: Tensor | None, kept_div: int, kept_mod: int,
    hidden: Tensor, output: Tensor, retain_norms: Tensor, forget_norms: Tensor, scale: float, l2: bool,
    unit_rows: int, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from rfa_fast.kernels import linear_input_gradient as products
    from rfa_fast.kernels.autotune import tuned
    from rfa_fast.kernels.linear_forward import Rows
    from rfa_fast.kernels.linear_gradient import linear_gradient
    from rfa_fast.kernels.lora_a_gradient import lora_a_gradient
    from rfa_fast.kernels.tuning import choose

    w = group_weights(
        group, retain_grad, forget_grad, known, target_given, retain_norms, forget_norms, l2, unit_rows
    )  # fmt: skip
    teaches = kept is not None and w.retain is not None

    def product(config: Any) -> tuple[Tensor, Tensor, Tensor]:
        # A product that takes its rows from two places needs them laid out alike; the vendor's takes one matrix.
        whole = config.route == "vendor" or grad.stride(1) != 1
        split = linear_gradient(
            grad, output, hidden, lora_b, scale=scale, group=group,
            goal=None if w.forget is None or goal is None else Rows(goal, goal_div, goal_mod),
            forget_weight=w.forget, kept=Rows(kept, kept_div, kept_mod) if teaches and kept is not None else None,
            retain_weight=w.retain if teaches else None, whole=whole,
            config=choose("linear_gradient", x.device, x.dtype, weight.shape[0]),
        )  # fmt: skip
        retain = None if kept is not None else w.retain
        up, grad_b = thin_terms(split.up, split.lora_b, residual_grad, hidden, lora_b, retain, scale)
        if not needs_x:
            return x.new_empty(0), up, grad_b
        select, source = products.NONE, grad
        if split.changed is not None and whole:
            source = split.changed
        elif split.changed is not None:
            select = products.BOTH_GROUPS if teaches else products.FORGET_ROWS
        grad_x = products.linear_input_gradient(
            source, split.changed, group, weight, up, lora_a, select=select, config=config
        )
        return grad_x, up, grad_b

    sizes = {"N": weight.shape[0], "K": weight.shape[1], "R": lora_a.shape[0]}
    config = (
        tuned("linear_input_gradient", x, sizes, product)
        if needs_x
        else choose("linear_input_gradient", x.device, x.dtype, *weight.shape)
    )
    grad_x, up, grad_b = product(config)
    grad_a = lora_a_gradient(up, x, config=choose("lora_a_gradient", x.device, x.dtype))
    return grad_x, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def _backward_fake(
    grad: Tensor, residual_grad: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, x: Tensor,
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = x.new_empty(x.shape if rest[-1] else (0,))
    return grad_x, lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


_BACKWARD = register(
    "linear_backward",
    "(Tensor grad, Tensor? residual_grad, Tensor? retain_grad, Tensor? forget_grad, Tensor x, Tensor weight, "
    "Tensor lora_a, Tensor lora_b, Tensor? group, Tensor? goal, SymInt goal_div, SymInt goal_mod, bool target_given, "
    "Tensor? known, Tensor? kept, SymInt kept_div, SymInt kept_mod, Tensor hidden, Tensor output, "
    "Tensor retain_norms, Tensor forget_norms, float scale, bool l2, SymInt unit_rows, bool needs_x) "
    "-> (Tensor, Tensor, Tensor)",
    launchers=_backward_launchers,
    host=linear_torch.backward,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Linear) -> None:
    x, weight, _, a, b, group, target, t_div, t_mod, kept, k_div, k_mod, _, known, scale, l2, unit_rows, emit = inputs
    result = Linear(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(result.hidden, result.mean, result.retain_norms, result.forget_norms)
    goal = result.mean if target is None else target
    ctx.save_for_backward(
        x, weight, a, b, group, goal, known, kept, result.hidden, result.output, result.retain_norms,
        result.forget_norms,
    )  # fmt: skip
    ctx.options = (t_div, t_mod, target is not None, k_div, k_mod, scale, l2, unit_rows, emit)


def _backward(ctx: Any, grad: Tensor | None, residual: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    x, weight, a, b, group, goal, known, kept, hidden, output, retain_norms, forget_norms = ctx.saved_tensors
    t_div, t_mod, given, k_div, k_mod, scale, l2, unit_rows, emit = ctx.options
    retain_grad, forget_grad = rest[-2:]
    if grad is None:
        grad = torch.zeros_like(output)
    goal = goal[None] if goal.ndim == 1 else goal
    grads = _BACKWARD(
        grad, residual if emit else None, retain_grad, forget_grad, x, weight, a, b, group,
        None if group is None else goal, t_div, t_mod, given, known, kept, k_div, k_mod, hidden, output, retain_norms,
        forget_norms, scale, l2, unit_rows, ctx.needs_input_grad[0],
    )  # fmt: skip
    grad_x = grads[0] if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grads[1], grads[2], *([None] * 13)


_FORWARD.register_autograd(_backward, setup_context=_setup_context)


def linear_and_mean(
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The layer of :func:`rfa_fast.functional.rfa_linear` on fused kernels; arguments are taken as checked.

    Args:
        fallback, fallback_known: `(N,)` and 0-dim bool: x̃ of an earlier batch, in case this one has no
            retain row; or neither.

    Returns:
        The results of `rfa_linear`, and x̃ `(N,)` where it was computed here, else `None`.
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
    earlier = None if fallback is None else fallback.float().contiguous()
    out = Linear(
        *_FORWARD(
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


def linear(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`linear_and_mean` without x̃."""
    return linear_and_mean(*arguments, **named)[:4]
