"""`rfa_fast::linear_forward` and `rfa_fast::linear_backward`: the adapted linear layer on fused kernels.

Shapes inside: x (M, K), weight (N, K), lora_a (R, K), lora_b (N, R), group (M,) int8. What autograd keeps
is x, h, y and the constants x̃ or x'_t; never Δ and never x'. The derivative is written out in
:mod:`rfa_fast.ops.linear_torch`, which is also what these operators do on a CPU without the interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfa_fast.objective import RETAIN
from rfa_fast.ops import linear_torch
from rfa_fast.ops.gradients import differentiable_once
from rfa_fast.ops.linear_torch import (
    LayerAndMean,
    Linear,
    derivative,
    group_weights,
    losses,
    remember,
    retain_energy,
    thin_terms,
    usable,
)
from rfa_fast.ops.registration import register

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


@differentiable_once
def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return derivative(_BACKWARD, ctx, *grads)


_FORWARD.register_autograd(_backward, setup_context=remember)


def linear_and_mean(*arguments: Any, **named: Any) -> LayerAndMean:
    """The layer of :func:`rfa_fast.functional.rfa_linear` on fused kernels; :func:`rfa_fast.ops.linear_torch.run`."""
    return linear_torch.run(_FORWARD, *arguments, **named)


def linear(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`linear_and_mean` without x̃."""
    return linear_and_mean(*arguments, **named)[:4]
