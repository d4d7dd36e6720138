"""The adapted convolution in plain torch, forward and backward by hand; and what the kernels share with it.

Shapes: x (B, C, H, W), weight (N, C/g, kh, kw), lora_a (g·R, C/g, kh, kw), lora_b (N, R, 1, 1), group (B,) int8; h as
rows (B·H'·W', g·R); x̃ and x'_t expanded to y's shape (B, N, H', W'). A unit of the losses is a sample. With h = A ∗ x,
s the scale, w the weight of a sample, and ᵀ for the transposed convolution::

    G' = G + w_f (y − x̃)        U = s G' B + w_r s² h BᵀB        dX = Wᵀ ∗ G' + Aᵀ ∗ U
    dA = Σ U ⊗ windows of x      dB = s G'ᵀ h + s² B (Hᵀ diag(w_r) H), group by group
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_fast.config import Norm
from rfa_fast.kernels.conv2d_geometry import (
    channels_last,
    convolution,
    geometry,
    input_gradient,
    memory_format,
    pair,
    resolve_padding,
    weight_gradient,
)
from rfa_fast.objective import FORGET, RETAIN, accumulation_dtype, group_mean
from rfa_fast.ops.gradients import by_autograd, differentiable_once
from rfa_fast.ops.plain import LayerResult, Pair
from rfa_fast.ops.rows import autocast, picks, row_weights, without_autocast


class Convolution(NamedTuple):
    """The results of `conv2d_forward`; a field that was not asked for is an empty tensor.

    Attributes:
        output: y `(B, N, H', W')`.
        residual: Δ, likewise.
        hidden: h `(B·H'·W', g·R)`.
        mean: x̃ `(1, N, H', W')` in the dtype of sums, where it was computed inside.
        retain_norms, forget_norms: ‖e‖ of each sample `(B,)`, for the unsquared norm.
        retain_loss, forget_loss: 0-dim.
    """

    output: Tensor
    residual: Tensor
    hidden: Tensor
    mean: Tensor
    retain_norms: Tensor
    forget_norms: Tensor
    retain_loss: Tensor
    forget_loss: Tensor


def as_image(rows: Tensor, like: Tensor) -> Tensor:
    """Rows `(B·H'·W', C)` as `(B, C, H', W')`, a view."""
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def as_rows(image: Tensor) -> Tensor:
    """`(B, C, H, W)` as `(B·H·W, C)`, contiguous."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def by_group(image: Tensor, groups: int) -> Tensor:
    """`(B, C, H, W)` as `(B, g, C/g, H, W)`, a view."""
    return image.view(image.shape[0], groups, -1, *image.shape[2:])


def low_rank(hidden: Tensor, lora_b: Tensor, like: Tensor, groups: int, scale: float) -> Tensor:
    """Δ `(B, N, H', W')` from h; `like` has the sizes."""
    return scale * F.conv2d(as_image(hidden, like), lora_b.to(hidden.dtype), groups=groups)


def losses(retain: Tensor, forget: Tensor, l2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms and sums from squared errors per sample `(B,)`; without l2 a sum may come as any shape."""
    if not l2:
        return retain.new_empty(0), retain.new_empty(0), retain.sum(), forget.sum()
    norms = retain.sqrt(), forget.sqrt()
    return *norms, norms[0].sum(), norms[1].sum()


def retain_energy(hidden: Tensor, lora_b: Tensor, group: Tensor, groups: int, scale: float) -> Tensor:
    """‖Δ‖² of each retain sample from R × R: s² Σ h (BᵀB) hᵀ over its pixels and groups, `(B,)`."""
    rank = lora_b.shape[1]
    wide = accumulation_dtype(hidden.dtype)
    h = hidden.reshape(group.shape[0], -1, groups, rank)
    h = torch.where((group == RETAIN)[:, None, None, None], h, 0).to(wide)
    up = lora_b.to(wide).reshape(groups, -1, rank)
    return scale**2 * (torch.einsum("bpgr,grs->bpgs", h, up.mT @ up) * h).sum((1, 2, 3)).clamp(min=0)


def aimed_codes(group: Tensor, target_given: bool) -> Tensor:
    """The codes, with forget samples ignored where no retain sample gives them an x̃."""
    return group if target_given else torch.where((group == RETAIN).any() | (group == RETAIN), group, -1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, group: Tensor | None, target: Tensor | None,
    kept: Tensor | None, scale: float, l2: bool, emit_residual: bool,
) -> Convolution:  # fmt: skip
    """`rfa_fast::conv2d_forward` in torch."""
    where = geometry(x, weight, stride, padding, dilation, groups)
    wide, layout = accumulation_dtype(x.dtype), memory_format(x)
    down = convolution(x, lora_a.to(x.dtype), where)
    frozen = convolution(x, weight, where, bias).contiguous(memory_format=layout)
    delta = (scale * F.conv2d(down, lora_b.to(x.dtype), groups=groups)).contiguous(memory_format=layout)
    none = x.new_empty(0, dtype=wide)
    mean, goal = none, target
    if group is not None and goal is None:
        mean = group_mean(frozen, group, (0,))[0][None].contiguous(memory_format=layout)
        goal = mean
    # x̃ first: without Δ to show, x' becomes y in place, and no third tensor of its size is made.
    output = frozen + delta if emit_residual or torch.is_grad_enabled() else frozen.add_(delta)
    residual = delta if emit_residual else x.new_empty(0)
    hidden = as_rows(down)
    if group is None or goal is None:
        return Convolution(output, residual, hidden, none, none.clone(), none.clone(), none.sum(), none.sum())
    forget = _sample_errors(output, goal, aimed_codes(group, target is not None) == FORGET)
    if kept is None:
        retain = retain_energy(hidden, lora_b, group, groups, scale)
    else:
        retain = _sample_errors(output, kept, group == RETAIN)
    return Convolution(output, residual, hidden, mean, *losses(retain, forget, l2))


def _sample_errors(output: Tensor, goal: Tensor, selected: Tensor) -> Tensor:
    """‖y − goal‖² of the selected samples, `(B,)`, 0 on the others."""
    wide = accumulation_dtype(output.dtype)
    if not picks(output):
        off = torch.where(selected[:, None, None, None], output.to(wide) - goal, 0)
        return off.square().sum((1, 2, 3))
    rows = selected.nonzero().squeeze(1)
    if _most(rows, output):
        off = output.to(wide) - goal
        off[~selected] = 0
        return off.square_().sum((1, 2, 3))
    off = output[rows].to(wide) - _picked(goal, rows)
    return off.new_zeros(output.shape[0]).index_put_((rows,), off.square_().sum((1, 2, 3)))


def _most(rows: Tensor, output: Tensor) -> bool:
    """Whether picking these samples would copy more of `output` than it leaves out."""
    return 2 * rows.shape[0] > output.shape[0]


def _picked(goal: Tensor, rows: Tensor) -> Tensor:
    """These samples of it, or the one that stands for all."""
    return goal[:1] if goal.shape[0] == 1 or goal.stride(0) == 0 else goal[rows]


class Weights(NamedTuple):
    """w_f and w_r, `(B,)`; `None` where nobody asked for that loss."""

    forget: Tensor | None
    retain: Tensor | None


def sample_weights(
    group: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, target_given: bool,
    retain_norms: Tensor, forget_norms: Tensor, l2: bool,
) -> Weights:  # fmt: skip
    """What each sample's error is multiplied with in the gradient."""
    forget = retain = None
    if group is not None and forget_grad is not None:
        chosen = aimed_codes(group, target_given) == FORGET
        forget = row_weights(forget_grad, chosen, forget_norms if l2 else None, 1)
    if group is not None and retain_grad is not None:
        retain = row_weights(retain_grad, group == RETAIN, retain_norms if l2 else None, 1)
    return Weights(forget, retain)


def residual_terms(
    parts: Tensor, grad_b: Tensor, residual_grad: Tensor | None, hidden: Tensor, lora_b: Tensor, groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """U in parts `(P, M, g·R)`, and dB, with what comes from a gradient of the residual itself."""
    if residual_grad is None:
        return parts, grad_b
    dtype, rank, rows = accumulation_dtype(hidden.dtype), lora_b.shape[1], hidden.shape[0]
    wide, lifted = hidden.to(dtype).reshape(rows, groups, rank), lora_b.to(dtype).reshape(groups, -1, rank)
    off = as_rows(residual_grad).to(dtype).reshape(rows, groups, -1)
    own = scale * torch.einsum("mgn,gnr->mgr", off, lifted).reshape(1, rows, -1)
    return torch.cat([parts, own]), grad_b + scale * torch.einsum("mgn,mgr->gnr", off, wide).reshape(grad_b.shape)


def thin_terms(
    up: Tensor, grad_b: Tensor, residual_grad: Tensor | None, hidden: Tensor, lora_b: Tensor, retain: Tensor | None,
    groups: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """U `(M, g·R)` and dB with what does not come from G': the r × r retain term, and the residual's own gradient."""
    parts, grad_b = residual_terms(up[None], grad_b, residual_grad, hidden, lora_b, groups, scale)
    up = parts.sum(0)
    dtype, rank, rows = accumulation_dtype(hidden.dtype), lora_b.shape[1], hidden.shape[0]
    if retain is not None:
        wide, lifted = hidden.to(dtype).reshape(rows, groups, rank), lora_b.to(dtype).reshape(groups, -1, rank)
        weighted = retain.repeat_interleave(rows // retain.shape[0], output_size=rows)[:, None, None] * wide
        up = up + scale**2 * torch.einsum("mgr,grs->mgs", weighted, lifted.mT @ lifted).reshape(rows, -1)
        gram = torch.einsum("mgr,mgs->grs", wide, weighted)
        grad_b = grad_b + scale**2 * (lifted @ gram).reshape(grad_b.shape)
    return up, grad_b


def _added(grad: Tensor, each: Tensor, selected: Tensor, output: Tensor, goal: Tensor) -> Tensor:
    """G + w (y − goal) on the selected samples; `output` has all samples, or those alone (:func:`_compared`)."""
    wide = accumulation_dtype(output.dtype)
    if not picks(output):
        factor = each[:, None, None, None]
        return grad.to(wide) + factor * torch.where(factor != 0, output.to(wide) - goal, 0)
    rows = selected.nonzero().squeeze(1)
    whole = output.shape[0] == grad.shape[0]
    if whole and _most(rows, output):
        off = output.to(wide) - goal
        off[~selected] = 0
        return off.mul_(each[:, None, None, None]).add_(grad)
    off = (output[rows] if whole else output).to(wide) - _picked(goal, rows)
    moved = off.mul_(each[rows, None, None, None]).add_(grad[rows])
    return grad.index_put((rows,), moved.to(grad.dtype))


def _compared(output: Tensor, group: Tensor, target_given: bool, kept: Tensor | None) -> Tensor:
    """Of y what the backward compares: where samples are picked, a copy of those to forget.

    So y is the caller's alone: it is not kept for us, and may be added to in place.
    """
    if not picks(output) or kept is not None:
        return output
    return output[(aimed_codes(group, target_given) == FORGET).nonzero().squeeze(1)]


def _lifted(changed: Tensor, hidden: Tensor, lora_b: Tensor, groups: int, scale: float) -> tuple[Tensor, Tensor]:
    """What comes from G': s G' B as rows `(M, g·R)`, and dB `(N, R)`; both in the dtype of sums."""
    wide, rank = accumulation_dtype(changed.dtype), lora_b.shape[1]
    lifted = lora_b.to(changed.dtype).reshape(groups, -1, rank)
    if channels_last(changed):
        rows, thin = as_rows(changed).reshape(-1, groups, lifted.shape[1]), hidden.reshape(-1, groups, rank)
        up = torch.einsum("mgn,gnr->mgr", rows, lifted).reshape(hidden.shape)
        grad_b = torch.einsum("mgn,mgr->gnr", rows, thin)
    else:
        # As rows, G' would be copied; sample by sample it is a matrix as it lies.
        image = changed.reshape(changed.shape[0], groups, lifted.shape[1], -1)
        thin = hidden.reshape(changed.shape[0], -1, groups, rank)
        up = torch.einsum("bgnp,gnr->bpgr", image, lifted).reshape(hidden.shape)
        grad_b = torch.einsum("bgnp,bpgr->bgnr", image, thin).sum(0)
    return scale * up.to(wide), scale * grad_b.reshape(-1, rank).to(wide)


def backward(
    grad: Tensor, residual_grad: Tensor | None, retain_grad: Tensor | None, forget_grad: Tensor | None, x: Tensor,
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, group: Tensor | None, goal: Tensor | None, target_given: bool, kept: Tensor | None, hidden: Tensor,
    output: Tensor, retain_norms: Tensor, forget_norms: Tensor, scale: float, l2: bool, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rfa_fast::conv2d_backward` in torch."""
    where = geometry(x, weight, stride, padding, dilation, groups)
    w = sample_weights(group, retain_grad, forget_grad, target_given, retain_norms, forget_norms, l2)
    changed = grad
    if group is not None:
        codes = aimed_codes(group, target_given)
        for aim, each, code in ((goal, w.forget, FORGET), (kept, w.retain, RETAIN)):
            if aim is not None and each is not None:
                changed = _added(changed, each, codes == code, output, aim)
    changed = changed.to(x.dtype)
    up, grad_b = _lifted(changed, hidden, lora_b, groups, scale)
    retain = None if kept is not None else w.retain
    up, grad_b = thin_terms(up, grad_b, residual_grad, hidden, lora_b, retain, groups, scale)
    image = as_image(up.to(x.dtype), grad)
    grad_x = x.new_empty(0)
    if needs_x:
        grad_x = input_gradient(changed, weight, where) + input_gradient(image, lora_a.to(x.dtype), where)
        grad_x = grad_x.contiguous(memory_format=memory_format(x))
    grad_a = weight_gradient(image, x, lora_a.shape[0], where).contiguous()
    return grad_x, grad_a.to(lora_a.dtype), grad_b.reshape(lora_b.shape).to(lora_b.dtype)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Any, compared: Tensor | None = None) -> None:
    """What autograd keeps of a forward: of y all, or what it is `compared` by."""
    x, weight, _, a, b, stride, padding, dilation, groups, group, target, kept, scale, l2, emit = inputs
    result = Convolution(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(result.hidden, result.mean, result.retain_norms, result.forget_norms)
    goal = result.mean if target is None else target
    held = result.output if compared is None else compared
    ctx.save_for_backward(
        x, weight, a, b, group, goal, kept, result.hidden, held, result.retain_norms, result.forget_norms
    )
    ctx.options = (stride, padding, dilation, groups, target is not None, scale, l2, emit)
    ctx.shape = result.output.shape


def derivative(
    operator: Any, ctx: Any, grad: Tensor | None, residual: Tensor | None, *rest: Tensor | None
) -> tuple[Any, ...]:
    """The gradients of a forward's inputs, by `operator` (the backward)."""
    x, weight, a, b, group, goal, kept, hidden, output, retain_norms, forget_norms = ctx.saved_tensors
    stride, padding, dilation, groups, given, scale, l2, emit = ctx.options
    retain_grad, forget_grad = rest[-2:]
    if grad is None:
        grad = output.new_zeros(ctx.shape)
    goal = None if group is None else goal.expand(ctx.shape)
    grads = operator(
        grad, residual if emit else None, retain_grad, forget_grad, x, weight, a, b, stride, padding, dilation, groups,
        group, goal, given, kept, hidden, output, retain_norms, forget_norms, scale, l2, ctx.needs_input_grad[0],
    )  # fmt: skip
    grad_x = grads[0] if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grads[1], grads[2], *([None] * 10)


class _Layer(torch.autograd.Function):
    """The two above, on any device."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.kind = arguments[0].device.type
        with without_autocast(ctx.kind):  # the sums stay wide
            result = forward(*arguments)
        group, target, kept = arguments[9:12]
        remember(ctx, arguments, result, _compared(result.output, group, target is not None, kept))
        return tuple(result)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        with without_autocast(ctx.kind):
            return derivative(backward, ctx, *grads)


def run(
    operator: Any,
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
    """The layer of :func:`rfa_fast.functional.rfa_conv2d` by an operator; arguments are taken as checked.

    Args:
        operator: `rfa_fast::conv2d_forward`, or the same in torch.
    """
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
        *operator(
            x, weight, bias, lora_a, lora_b, steps, around, spread, groups, codes, aim, held, scale, norm == "l2",
            emit_residual,
        )
    )  # fmt: skip
    residual = out.residual if emit_residual else None
    if codes is None:
        return out.output, residual, None, None
    return out.output, residual, out.retain_loss, out.forget_loss


def _operator(*arguments: Any) -> Any:
    """The layer on images. Without a group autograd follows it, as often as a derivative is asked for."""
    return by_autograd(forward, arguments) if arguments[9] is None else _Layer.apply(*arguments)


def conv2d(*arguments: Any) -> LayerResult:
    """The layer of :func:`rfa_fast.functional.rfa_conv2d` in torch; see :func:`run`."""
    return run(_operator, *arguments)
