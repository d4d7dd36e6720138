"""`rfa_fast::conv2d_forward` and `rfa_fast::conv2d_backward`: the adapted convolution on fused kernels.

Shapes and the derivative are written out in :mod:`rfa_fast.ops.conv2d_torch`, which is also what these operators do
on a CPU without the interpreter. The routes of a layer:

* `"fused"`: an implicit GEMM with h and the losses in it, for which x̃ is taken from the mean of x first (a convolution
  is linear, too);
* `"vendor"`: the vendor's convolution of W and A side by side, one read of x, and one fused pass after it, in which
  the mean over the samples falls out. Backward, G' and U side by side go through one transposed convolution;
* `"split"`: the same with h in a kernel of its own: it reads x twice, but spares the vendor's product the columns of
  A, which can cost it a whole tile where N fills its tiles exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
    residual_terms,
    sample_weights,
)
from rfa_fast.ops.gradients import differentiable_once
from rfa_fast.ops.plain import LayerResult
from rfa_fast.ops.registration import register

FUSED_RANK = 32  # up to which h in the same kernel costs less than reading x again


def implicit_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether an implicit product suits a layer at all.

    It reads and writes runs of channels: a channels-last image, and groups wide enough for a tile. In NCHW it would
    move one element at a time, and a depthwise layer would fill one lane of sixteen; the vendor has kernels for both.

    Example:
        >>> implicit_pays(torch.zeros(1, 16, 4, 4).to(memory_format=torch.channels_last), torch.zeros(32, 16, 3, 3))
        True
    """
    from rfa_fast.kernels.conv2d_geometry import channels_last

    outputs = weight.shape[0] * weight.shape[1] // x.shape[1]  # of one group
    return channels_last(x) and weight.shape[1] >= 16 and outputs >= 16


def _sizes(x: Tensor, weight: Tensor, where: Any, rank: int) -> dict[str, int]:
    """What decides which configuration is fastest, besides the number of samples."""
    from rfa_fast.kernels.conv2d_geometry import channels_last

    return {
        "N": weight.shape[0], "C": weight.shape[1], "taps": where.taps, "pixels": where.pixels, "R": rank,
        "groups": where.groups, "stride": where.stride[0] * where.stride[1],
        "dilation": where.dilation[0] * where.dilation[1], "channels_last": int(channels_last(x)),
    }  # fmt: skip


def _routed(config: Any, x: Tensor, weight: Tensor) -> Any:
    return config if config.route != "fused" or implicit_pays(x, weight) else replace(config, route="vendor")


def _forward_launchers(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, group: Tensor | None, target: Tensor | None,
    kept: Tensor | None, scale: float, l2: bool, emit_residual: bool,
) -> Convolution:  # fmt: skip
    from rfa_fast.kernels import conv2d_forward as kernels
    from rfa_fast.kernels.autotune import tuned
    from rfa_fast.kernels.conv2d_epilogue import conv2d_epilogue
    from rfa_fast.kernels.conv2d_geometry import convolution, geometry, joint_weight, memory_format
    from rfa_fast.kernels.conv2d_retain import conv2d_retain_energy, gram_matrices
    from rfa_fast.kernels.conv2d_sample_mean import conv2d_sample_mean
    from rfa_fast.kernels.feature_mean import feature_mean
    from rfa_fast.kernels.tuning import choose

    where, layout = geometry(x, weight, stride, padding, dilation, groups), memory_format(x)
    rank, widths = lora_b.shape[1], (weight.shape[0], weight.shape[1])
    usual = choose("conv2d_forward", x.device, x.dtype, *widths)
    shape = (x.shape[0], weight.shape[0], where.out_height, where.out_width)
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
        route = _routed(config, x, weight).route
        columns = route != "fused" and inside and not l2
        mean = mean_before() if inside and not columns else none
        goal = (mean if inside else target).expand(shape) if group is not None and not columns else None  # type: ignore[union-attr]
        if route == "fused":
            down = kernels.conv2d_down(x, lora_a, where=where, config=usual) if rank > FUSED_RANK else None
            out = kernels.conv2d_forward(
                x, weight, bias, lora_a, lora_b, down, where=where, scale=scale, group=codes, goal=goal, kept=kept,
                config=config,
            )  # fmt: skip
            return out.output, out.hidden, mean, out.retain_samples, out.forget_samples
        output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        if route == "split":
            frozen = convolution(x, weight, where)
            hidden = kernels.conv2d_down(x, lora_a, where=where, config=usual)
            image, down = by_group(frozen, groups), by_group(as_image(hidden, frozen), groups)
            output = frozen if frozen.stride() == output.stride() else output
        else:
            both = by_group(convolution(x, joint_weight(weight, lora_a, groups, layout), where), groups)
            each = shape[1] // groups
            image, down = both[:, :, :each], both[:, :, each : each + rank]
        done = conv2d_epilogue(
            image, down, output, lora_b, bias, scale=scale, group=group if columns else codes, goal=goal, kept=kept,
            columns=columns, copy_hidden=route != "split", config=choose("conv2d_epilogue", x.device, x.dtype),
        )  # fmt: skip
        forget = done.forget_samples
        if columns:
            config = choose("feature_mean", x.device, x.dtype)
            flat, forget = feature_mean(done.columns, done.counts, with_loss=True, config=config)
            # Columns lie as y does: a sample of it, whose place in memory any of them shows.
            mean = flat.as_strided((1, *shape[1:]), (flat.shape[0], *output.stride()[1:]))
        return output, hidden if done.hidden is None else done.hidden, mean, done.retain_samples, forget

    sizes = _sizes(x, weight, where, rank)
    output, hidden, mean, retain, forget = product(tuned("conv2d_forward", x, sizes, product))
    residual = x.new_empty(0)
    if emit_residual:
        residual = low_rank(hidden, lora_b, output, groups, scale).contiguous(memory_format=layout)
    if group is None or forget is None:
        return Convolution(output, residual, hidden, none, none.clone(), none.clone(), none.sum(), none.sum())
    if retain is None:
        gram = gram_matrices(lora_b, groups, scale)
        config = choose("conv2d_retain", x.device, x.dtype)
        retain = conv2d_retain_energy(hidden, gram, group, pixels=where.pixels, config=config)
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

    def image(samples: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((samples, *shape[1:]), dtype=dtype, device=x.device, memory_format=layout)

    units = x.shape[0] if l2 and group is not None else 0
    mean = image(1, torch.float32) if group is not None and target is None else fp32(0)
    hidden = x.new_empty((x.shape[0] * where.pixels, lora_a.shape[0]))
    output = image(x.shape[0], x.dtype)
    residual = torch.empty_like(output) if emit_residual else x.new_empty(0)
    return Convolution(output, residual, hidden, mean, fp32(units), fp32(units), fp32(), fp32())


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
    from rfa_fast.kernels.conv2d_geometry import (
        geometry,
        input_gradient,
        joint_weight,
        memory_format,
        weight_gradient,
    )
    from rfa_fast.kernels.conv2d_gradient import conv2d_gradient
    from rfa_fast.kernels.conv2d_input_gradient import conv2d_input_gradient
    from rfa_fast.kernels.conv2d_lora_a_gradient import conv2d_lora_a_gradient
    from rfa_fast.kernels.conv2d_retain import conv2d_retain_gradient, gram_matrices
    from rfa_fast.kernels.tuning import choose

    where, layout = geometry(x, weight, stride, padding, dilation, groups), memory_format(output)
    w = sample_weights(group, retain_grad, forget_grad, target_given, retain_norms, forget_norms, l2)
    teaches = kept is not None and w.retain is not None
    moves = w.forget is not None or teaches
    retain = None if kept is not None else w.retain
    outputs, rank, grad = weight.shape[0] // groups, lora_b.shape[1], grad.to(x.dtype)

    def product(config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """dX, U as `(B, g, R, H', W')`, dB."""
        route = _routed(config, x, weight).route if needs_x else "fused"
        weights = joint_weight(weight, lora_a, groups, memory_format(x)) if route != "fused" else weight
        if route == "fused":
            rows = hidden.new_empty(hidden.shape)
            up = by_group(as_image(rows, output), groups)
            changed = by_group(torch.empty_like(output), groups) if moves and needs_x else None
        else:
            # G' and U side by side, as W and A are: one transposed convolution takes both.
            size = (x.shape[0], weights.shape[0], where.out_height, where.out_width)
            joint = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
            changed, rest = by_group(joint, groups)[:, :, :outputs], by_group(joint, groups)[:, :, outputs:]
            up = rest[:, :, :rank]
            if rest.shape[2] > rank:
                rest[:, :, rank:].zero_()
        split = conv2d_gradient(
            grad, output, hidden, lora_b, changed, groups=groups, scale=scale, group=group,
            goal=goal if w.forget is not None else None, forget_weight=w.forget, kept=kept if teaches else None,
            retain_weight=w.retain if teaches else None,
            config=choose("conv2d_gradient", x.device, x.dtype, weight.shape[0]),
        )  # fmt: skip
        parts, grad_b = residual_terms(split.up, split.lora_b, residual_grad, hidden, lora_b, groups, scale)
        gram = gram_matrices(lora_b, groups, scale)
        config_thin = choose("conv2d_retain", x.device, x.dtype)
        seen = conv2d_retain_gradient(parts, hidden, up, gram, retain, config=config_thin)
        if seen is not None:
            lifted = lora_b.float().reshape(groups, outputs, rank)
            grad_b = grad_b + scale**2 * (lifted @ seen).reshape(grad_b.shape)
        if not needs_x:
            return x.new_empty(0), up, grad_b
        if route == "fused":
            source = grad if changed is None else changed.flatten(1, 2)
            grad_x = conv2d_input_gradient(
                source, weight, up, lora_a, where=where, memory_format=memory_format(x), config=config
            )
        else:
            grad_x = input_gradient(joint, weights, where).contiguous(memory_format=memory_format(x))
        return grad_x, up, grad_b

    sizes = _sizes(x, weight, where, rank)
    config = (
        tuned("conv2d_input_gradient", x, sizes, product)
        if needs_x
        else choose("conv2d_input_gradient", x.device, x.dtype, weight.shape[0], weight.shape[1])
    )
    grad_x, up, grad_b = product(config)
    if implicit_pays(x, weight):
        config = choose("conv2d_lora_a_gradient", x.device, x.dtype, weight.shape[1])
        grad_a = conv2d_lora_a_gradient(up, x, where=where, config=config)
    else:
        grad_a = weight_gradient(up.flatten(1, 2), x, lora_a.shape[0], where).contiguous()
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


@differentiable_once
def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return derivative(_BACKWARD, ctx, *grads)


_FORWARD.register_autograd(_backward, setup_context=remember)


def conv2d(*arguments: Any) -> LayerResult:
    """The layer of :func:`rfa_fast.functional.rfa_conv2d` on fused kernels; :func:`rfa_fast.ops.conv2d_torch.run`."""
    return conv2d_torch.run(_FORWARD, *arguments)
