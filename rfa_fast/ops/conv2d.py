"""`rfa_fast::conv2d_forward` and `rfa_fast::conv2d_backward`: the adapted convolution on fused kernels.

Shapes and the derivative are written out in :mod:`rfa_fast.ops.conv2d_torch`, which is also what these operators do
on a CPU without the interpreter. Two routes: an implicit GEMM with h and the losses in it, for which x̃ is taken from
the mean of x first (a convolution is linear, too); and the vendor's convolution with one fused pass after it, in
which the mean over the samples falls out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfa_fast.config import Norm
from rfa_fast.ops import conv2d_torch
from rfa_fast.ops.conv2d_torch import (
    Convolution,
    aimed_codes,
    as_image,
    by_group,
    derivative,
    losses,
    low_rank,
    remember,
    retain_energy,
    sample_weights,
    thin_terms,
)
from rfa_fast.ops.plain import LayerResult, Pair
from rfa_fast.ops.registration import register
from rfa_fast.ops.rows import autocast


def _forward_launchers(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, group: Tensor | None, target: Tensor | None,
    kept: Tensor | None, scale: float, l2: bool, emit_residual: bool,
) -> Convolution:  # fmt: skip
    from rfa_fast.kernels import conv2d_forward as kernels
    from rfa_fast.kernels.autotune import tuned
    from rfa_fast.kernels.common import MAX_BLOCK_R
    from rfa_fast.kernels.conv2d_epilogue import conv2d_epilogue
    from rfa_fast.kernels.conv2d_geometry import channels_last, convolution, geometry
    from rfa_fast.kernels.conv2d_sample_mean import conv2d_sample_mean
    from rfa_fast.kernels.feature_mean import feature_mean
    from rfa_fast.kernels.tuning import choose

    where = geometry(x, weight, stride, padding, dilation, groups)
    rank, usual = lora_b.shape[1], choose("conv2d_forward", x.device, x.dtype)
    codes = None if group is None else aimed_codes(group, target is not None)
    inside = group is not None and target is None
    none = torch.empty(0, dtype=torch.float32, device=x.device)

    def mean_before() -> Tensor:
        """x̃ = W ∗ mean(x) + b of the retain samples, `(1, N, H', W')` fp32."""
        config = choose("conv2d_sample_mean", x.device, x.dtype)
        mean = conv2d_sample_mean(x, group, config=config)
        found: Tensor = kernels.conv2d_plain(mean, weight, bias, where=where, dtype=torch.float32, config=usual)
        return found

    def product(config: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """y, h, x̃ if it is computed here, and squared errors: retain per sample, forget in any shape."""
        shape = (x.shape[0], weight.shape[0], where.out_height, where.out_width)
        by_vendor = config.route == "vendor"
        columns = by_vendor and inside and not l2
        mean = mean_before() if inside and not columns else none
        goal = (mean if inside else target).expand(shape) if group is not None and not columns else None  # type: ignore[union-attr]
        if not by_vendor:
            hidden = None if rank <= MAX_BLOCK_R else kernels.conv2d_down(x, lora_a, where=where, config=usual)
            out = kernels.conv2d_forward(
                x, weight, bias, lora_a, lora_b, hidden, where=where, scale=scale, group=codes, goal=goal, kept=kept,
                config=config,
            )  # fmt: skip
            return out.output, out.hidden, mean, out.retain_samples, out.forget_samples
        frozen = convolution(x, weight, where)
        hidden = kernels.conv2d_down(x, lora_a, where=where, config=usual)
        image = as_image(hidden, frozen)
        done = conv2d_epilogue(
            by_group(frozen, groups), by_group(image, groups), frozen, lora_b, bias, scale=scale,
            group=codes if not columns else group, goal=goal, kept=kept, columns=columns,
            config=choose("conv2d_epilogue", x.device, x.dtype),
        )  # fmt: skip
        forget = done.forget_samples
        if columns:
            config = choose("feature_mean", x.device, x.dtype)
            flat, forget = feature_mean(done.columns, done.counts, with_loss=True, config=config)
            _, n, height, width = shape
            last = channels_last(frozen)
            mean = flat.view(height, width, n).permute(2, 0, 1) if last else flat.view(n, height, width)
            mean = mean.contiguous()[None]
        return frozen, hidden, mean, done.retain_samples, forget

    sizes = {"N": weight.shape[0], "C": weight.shape[1], "taps": where.taps, "pixels": where.pixels, "R": rank}
    output, hidden, mean, retain, forget = product(tuned("conv2d_forward", x, sizes, product))
    residual = low_rank(hidden, lora_b, output, groups, scale) if emit_residual else x.new_empty(0)
    if group is None or forget is None:
        return Convolution(output, residual, hidden, none, none.clone(), none.clone(), none.sum(), none.sum())
    retain = retain_energy(hidden, lora_b, group, groups, scale) if retain is None else retain
    return Convolution(output, residual, hidden, mean, *losses(retain, forget, l2))


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, group: Tensor | None, target: Tensor | None,
    kept: Tensor | None, scale: float, l2: bool, emit_residual: bool,
) -> Convolution:  # fmt: skip
    from rfa_fast.kernels.conv2d_geometry import geometry, memory_format

    where = geometry(x, weight, stride, padding, dilation, groups)
    shape = (x.shape[0], weight.shape[0], where.out_height, where.out_width)
    layout = memory_format(x)

    def fp32(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    def image() -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    units = x.shape[0] if l2 and group is not None else 0
    mean = fp32(1, *shape[1:]) if group is not None and target is None else fp32(0)
    hidden = x.new_empty((x.shape[0] * where.pixels, lora_a.shape[0]))
    residual = image() if emit_residual else x.new_empty(0)
    return Convolution(image(), residual, hidden, mean, fp32(units), fp32(units), fp32(), fp32())


_FORWARD = register(
    "conv2d_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, int[] stride, int[] padding, "
    "int[] dilation, int groups, Tensor? group, Tensor? target, Tensor? kept, float scale, bool l2, "
    "bool emit_residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launchers=_forward_launchers,
    host=conv2d_torch.forward,
    fake=_forward_fake,
)


def _backward_launchers(
    grad: Tensor, residual_grad: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, x: Tensor,
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, group: Tensor | None, goal: Tensor | None, target_given: bool, kept: Tensor | None, hidden: Tensor,
    output: Tensor, retain_norms: Tensor, forget_norms: Tensor, scale: float, l2: bool, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from rfa_fast.kernels.autotune import tuned
    from rfa_fast.kernels.conv2d_geometry import geometry, input_gradient, memory_format
    from rfa_fast.kernels.conv2d_gradient import conv2d_gradient
    from rfa_fast.kernels.conv2d_input_gradient import conv2d_input_gradient
    from rfa_fast.kernels.conv2d_lora_a_gradient import conv2d_lora_a_gradient
    from rfa_fast.kernels.tuning import choose

    where = geometry(x, weight, stride, padding, dilation, groups)
    w = sample_weights(group, retain_grad, forget_grad, target_given, retain_norms, forget_norms, l2)
    teaches = kept is not None and w.retain is not None
    moves = w.forget is not None or teaches
    changed = torch.empty_like(output) if moves else None
    split = conv2d_gradient(
        grad.to(x.dtype), output, hidden, lora_b, None if changed is None else by_group(changed, groups),
        groups=groups, scale=scale, group=group, goal=goal if w.forget is not None else None, forget_weight=w.forget,
        kept=kept if teaches else None, retain_weight=w.retain if teaches else None,
        config=choose("conv2d_gradient", x.device, x.dtype),
    )  # fmt: skip
    retain = None if kept is not None else w.retain
    up, grad_b = thin_terms(split.up, split.lora_b, residual_grad, hidden, lora_b, retain, groups, scale)
    source = grad.to(x.dtype) if changed is None else changed

    def product(config: Any) -> Tensor:
        if config.route == "vendor":
            low = input_gradient(as_image(up.to(x.dtype), output), lora_a.to(x.dtype), where)
            both: Tensor = input_gradient(source, weight, where) + low
            return both.contiguous(memory_format=memory_format(x))
        found: Tensor = conv2d_input_gradient(
            source, weight, up, lora_a, where=where, memory_format=memory_format(x), config=config
        )
        return found

    grad_x = x.new_empty(0)
    if needs_x:
        sizes = {"N": weight.shape[0], "C": weight.shape[1], "taps": where.taps, "pixels": where.pixels}
        grad_x = product(tuned("conv2d_input_gradient", x, sizes, product))
    config = choose("conv2d_lora_a_gradient", x.device, x.dtype)
    grad_a = conv2d_lora_a_gradient(up, x, where=where, config=config)
    return grad_x, grad_a.to(lora_a.dtype), grad_b.reshape(lora_b.shape).to(lora_b.dtype)


def _backward_fake(
    grad: Tensor, residual_grad: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, x: Tensor,
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from rfa_fast.kernels.conv2d_geometry import memory_format

    grad_x = x.new_empty(0)
    if rest[-1]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return grad_x, lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


_BACKWARD = register(
    "conv2d_backward",
    "(Tensor grad, Tensor? residual_grad, Tensor? retain_grad, Tensor? forget_grad, Tensor x, Tensor weight, "
    "Tensor lora_a, Tensor lora_b, int[] stride, int[] padding, int[] dilation, int groups, Tensor? group, "
    "Tensor? goal, bool target_given, Tensor? kept, Tensor hidden, Tensor output, Tensor retain_norms, "
    "Tensor forget_norms, float scale, bool l2, bool needs_x) -> (Tensor, Tensor, Tensor)",
    launchers=_backward_launchers,
    host=conv2d_torch.backward,
    fake=_backward_fake,
)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return derivative(_BACKWARD, ctx, *grads)


_FORWARD.register_autograd(_backward, setup_context=remember)


def conv2d(
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
    """The layer of :func:`rfa_fast.functional.rfa_conv2d` on fused kernels; arguments are taken as checked."""
    from rfa_fast.kernels.conv2d_geometry import geometry, pair, resolve_padding

    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    steps, spread = pair("stride", stride), pair("dilation", dilation)
    around = resolve_padding(padding, (weight.shape[2], weight.shape[3]), steps, spread)
    where = geometry(x, weight, steps, around, spread, groups)
    shape = (x.shape[0], weight.shape[0], where.out_height, where.out_width)
    aim, held = (
        None if constant is None or group is None else constant.detach().expand(shape)
        for constant in (target, retain_target)
    )
    codes = None if group is None else group.contiguous()
    out = Convolution(
        *_FORWARD(
            x, weight, bias, lora_a, lora_b, steps, around, spread, groups, codes, aim, held, scale, norm == "l2",
            emit_residual,
        )
    )  # fmt: skip
    residual = out.residual if emit_residual else None
    if codes is None:
        return out.output, residual, None, None
    return out.output, residual, out.retain_loss, out.forget_loss
