"""The adapted convolution as an implicit matrix product: `y = W ∗ x + b + s · B ∗ (A ∗ x)`, measured as it is made.

Shapes: x (B, C, H, W), W (N, C/g, kh, kw), A (g·R, C/g, kh, kw), B (N, R, 1, 1), h = A ∗ x (M, g·R) with one row
per output pixel, M = B·H'·W'; y (B, N, H', W').

Rows of the product are output pixels, its depth is taps × input channels, and a group of the convolution is an
axis of the grid. A step of the loop is one tap and one block of channels, so that it reads whole runs of a
channels-last image and nothing like an im2col buffer ever exists; the weight is brought to channels-last as well
(a copy of W unless the model already is), because a kernel-major weight would be read one element at a time.

With DOWN_FUSED the same loop forms h beside y: BLOCK_R / BLOCK_N more products, and x is read once rather than
twice. With PLAIN there is no low-rank part at all, which is h itself (W := A) and x̃ (x := the mean sample; an
fp32 mean meets a 16-bit W as the sum of two 16-bit numbers, so that x̃ is not rounded before it is used).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, pointer, precision, swizzled
from rfa_fast.kernels.conv2d_geometry import Geometry, dense_pixels, memory_format, pixel_stride
from rfa_fast.kernels.epilogue import low_rank, squared_error
from rfa_fast.kernels.tuning import Config
from torch import Tensor

# Where the low-rank part comes from.
PLAIN, DOWN_READ, DOWN_FUSED = 0, 1, 2


@triton.jit
def pixel(first, PIXELS, WIDTH, BLOCK: tl.constexpr):
    """Sample (int64), place in the sample, image row and column (int32) of the BLOCK rows from `first` on.

    One 64-bit division of a scalar; dividing the vector in 64 bits is a subroutine per element.
    """
    sample = first // PIXELS
    along = (first - sample * PIXELS).to(tl.int32) + tl.arange(0, BLOCK)
    further = along // PIXELS
    place = along - further * PIXELS
    image_row = place // WIDTH
    return sample + further, place, image_row, place - image_row * WIDTH


@triton.jit(do_not_specialize=["M"])
def conv2d_forward_kernel(
    x_ptr,  # (B, C, H, W)
    w_ptr,  # (N, C/g, kh, kw)
    bias_ptr,  # (N,)
    a_ptr,  # (g·R, C/g, kh, kw), read with DOWN_FUSED
    b_ptr,  # (N, R)
    h_ptr,  # (M, g·R), written with DOWN_FUSED, read with DOWN_READ
    group_ptr,  # (B,) int8
    goal_ptr,  # (B, N, H'·W'): x̃
    kept_ptr,  # (B, N, H'·W'): x'_t
    y_ptr,  # (B, N, H'·W')
    rows_ptr,  # (planes, g·blocks_n, M) fp32: squared errors of retain pixels (HAS_KEPT), then of forget pixels
    M,
    N,  # outputs per group
    C,  # inputs per group
    R,
    HEIGHT,
    WIDTH,
    PIXELS,
    OUT_WIDTH,
    TAPS,
    KERNEL_WIDTH,
    GROUPS,
    scale,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    top,
    left,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wn,
    stride_wc,
    stride_wh,
    stride_ww,
    stride_ar,
    stride_ac,
    stride_ah,
    stride_aw,
    stride_bn,
    stride_br,
    stride_goal_b,
    stride_goal_n,
    stride_goal_p,
    stride_kept_b,
    stride_kept_n,
    stride_kept_p,
    stride_yb,
    stride_yn,
    stride_yp,
    LOW_RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GOAL: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty if SPLIT else x_ptr.dtype.element_ty
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M)
    block_m, block_n, part = block_m.to(tl.int64), block_n.to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, col_in = rows < M, cols < N
    inside = row_in[:, None] & col_in[None, :]
    channels = part * N + cols
    sample, place, image_row, image_col = pixel(block_m * BLOCK_M, PIXELS, OUT_WIDTH, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if LOW_RANK == 2:
        down = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        ranks = tl.arange(0, BLOCK_R)
        rank_in = ranks < R
        a_at = a_ptr + (part * R + ranks) * stride_ar
    depth = tl.arange(0, BLOCK_K)
    in_row, in_col = image_row * stride_h - top, image_col * stride_w - left
    x_at = x_ptr + sample * stride_xb + part * C * stride_xc
    x_at += in_row.to(tl.int64) * stride_xh + in_col.to(tl.int64) * stride_xw
    w_at = w_ptr + channels * stride_wn
    blocks_c = tl.cdiv(C, BLOCK_K)
    for step in range(TAPS * blocks_c):
        tap = step // blocks_c
        c = ((step - tap * blocks_c) * BLOCK_K + depth).to(tl.int64)
        tap_row = tap // KERNEL_WIDTH
        tap_col = tap - tap_row * KERNEL_WIDTH
        down_by, right_by = tap_row * dilation_h, tap_col * dilation_w
        seen = row_in & (in_row + down_by >= 0) & (in_row + down_by < HEIGHT)
        seen = seen & (in_col + right_by >= 0) & (in_col + right_by < WIDTH)
        at = x_at + down_by.to(tl.int64) * stride_xh + right_by.to(tl.int64) * stride_xw
        tap_at = w_at + tap_row.to(tl.int64) * stride_wh + tap_col.to(tl.int64) * stride_ww
        if EVEN_C:
            x = tl.load(at[:, None] + c[None, :] * stride_xc, mask=seen[:, None], other=0.0)
            w = tl.load(tap_at[None, :] + c[:, None] * stride_wc, mask=col_in[None, :], other=0.0)
        else:
            x = tl.load(at[:, None] + c[None, :] * stride_xc, mask=seen[:, None] & (c < C)[None, :], other=0.0)
            w = tl.load(tap_at[None, :] + c[:, None] * stride_wc, mask=col_in[None, :] & (c < C)[:, None], other=0.0)
        if w.dtype != DTYPE:
            w = narrow(w.to(tl.float32), DTYPE, EMULATE)
        if SPLIT:
            high = narrow(x, DTYPE, EMULATE)
            acc = dot(narrow(x - high.to(tl.float32), DTYPE, EMULATE), w, acc, PRECISION, EMULATE)
            acc = dot(high, w, acc, PRECISION, EMULATE)
        else:
            acc = dot(x, w, acc, PRECISION, EMULATE)
        if LOW_RANK == 2:
            a_tap = a_at + tap_row.to(tl.int64) * stride_ah + tap_col.to(tl.int64) * stride_aw
            a_in = rank_in[None, :] & (c < C)[:, None]
            a = tl.load(a_tap[None, :] + c[:, None] * stride_ac, mask=a_in, other=0.0)
            down = dot(x, narrow(a.to(tl.float32), DTYPE, EMULATE), down, PRECISION, EMULATE)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channels, mask=col_in, other=0.0).to(tl.float32)[None, :]

    y_at = (sample * stride_yb + place.to(tl.int64) * stride_yp)[:, None] + channels[None, :] * stride_yn
    if LOW_RANK == 2:
        h = narrow(down, DTYPE, EMULATE)
        if block_n == 0:
            h_at = h_ptr + (rows[:, None] * GROUPS + part) * R + ranks[None, :]
            tl.store(h_at, h, mask=row_in[:, None] & rank_in[None, :])
        b_at = b_ptr + channels[None, :] * stride_bn + ranks[:, None] * stride_br
        b = tl.load(b_at, mask=rank_in[:, None] & col_in[None, :], other=0.0)
        h = narrow(h.to(tl.float32) * scale, DTYPE, EMULATE)
        b = narrow(b.to(tl.float32), DTYPE, EMULATE)
        acc = dot(h, b, acc, PRECISION, EMULATE)
    if LOW_RANK == 1:
        acc = low_rank(
            acc, h_ptr, (rows * GROUPS + part) * R, row_in, b_ptr, channels, col_in, R, scale, 1, stride_bn, stride_br,
            DTYPE, BLOCK_R, PRECISION, EMULATE,
        )  # fmt: skip
    tl.store(y_ptr + y_at, narrow(acc, OUT, EMULATE), mask=inside)

    if HAS_GOAL or HAS_KEPT:
        codes = tl.load(group_ptr + sample, mask=row_in, other=-1)
        block = part * blocks_n + block_n
    if HAS_KEPT:
        kept_row = sample * stride_kept_b + place.to(tl.int64) * stride_kept_p
        kept_at = kept_ptr + kept_row[:, None] + channels[None, :] * stride_kept_n
        tl.store(rows_ptr + block * M + rows, squared_error(acc, kept_at, codes == 0, col_in), mask=row_in)
        block += GROUPS * blocks_n
    if HAS_GOAL:
        goal_row = sample * stride_goal_b + place.to(tl.int64) * stride_goal_p
        goal_at = goal_ptr + goal_row[:, None] + channels[None, :] * stride_goal_n
        tl.store(rows_ptr + block * M + rows, squared_error(acc, goal_at, codes == 1, col_in), mask=row_in)


class Conv2dForward(NamedTuple):
    """What the forward of a convolution leaves behind; a field that was not asked for is `None`.

    Attributes:
        output: y `(B, N, H', W')`.
        hidden: h `(M, g·R)` in x's dtype.
        retain_samples, forget_samples: squared errors summed over each sample `(B,)` fp32, 0 outside the group.
    """

    output: Tensor
    hidden: Tensor
    retain_samples: Tensor | None
    forget_samples: Tensor | None


def fit(config: Config, outputs: int, depth: int) -> Config:
    """`config` with blocks no wider than the next power of two of what they cut, and at least 16.

    Example:
        >>> fit(Config(128, 128, 64, warps=8, stages=3), outputs=10, depth=40).block_n
        16
    """
    block_n = min(config.block_n, max(16, triton.next_power_of_2(outputs)))
    return replace(config, block_n=block_n, block_k=min(config.block_k, max(16, triton.next_power_of_2(depth))))


def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor | None,
    *,
    where: Geometry,
    scale: float,
    group: Tensor | None = None,
    goal: Tensor | None = None,
    kept: Tensor | None = None,
    config: Config,
) -> Conv2dForward:
    """Launch :func:`conv2d_forward_kernel`.

    Args:
        x: `(B, C, H, W)`, any strides; y follows its memory format.
        hidden: h `(M, g·R)` contiguous, or `None` to compute it in the same kernel (needs R ≤ 64).
        where: the windows.
        goal, kept: x̃ and x'_t expanded to `(B, N, H', W')`, strides of 0 included; they need `group (B,)`.
        config: block_m pixels × block_n outputs, block_k input channels at a time.

    Returns:
        :class:`Conv2dForward`.
    """
    outputs, rank = lora_b.shape[:2]
    groups = where.groups
    output = _empty(x, outputs, where, x.dtype)
    fused = hidden is None
    m = x.shape[0] * where.pixels
    hidden = x.new_empty((m, groups * rank)) if hidden is None else hidden
    config = fit(config, outputs // groups, x.shape[1] // groups)
    blocks = groups * triton.cdiv(outputs // groups, config.block_n)
    planes = (kept is not None) + (goal is not None)
    rows = torch.empty((planes, blocks, m), dtype=torch.float32, device=x.device) if planes else None
    _launch(
        x, weight, bias, lora_a, lora_b, hidden, output, where, config, group=group, goal=goal, kept=kept,
        rows=rows, scale=scale, source=DOWN_FUSED if fused else DOWN_READ,
    )  # fmt: skip
    sums = None if rows is None else rows.view(planes, blocks, x.shape[0], where.pixels).sum((1, 3))
    return Conv2dForward(
        output, hidden, None if kept is None or sums is None else sums[0],
        None if goal is None or sums is None else sums[-1],
    )  # fmt: skip


def conv2d_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, where: Geometry, dtype: torch.dtype, config: Config
) -> Tensor:
    """`weight ∗ x + bias` by the same kernel, without a low-rank part.

    Args:
        x: `(B, C, H, W)`; fp32 beside a 16-bit weight is split into two 16-bit terms.
        weight: `(N, C/g, kh, kw)`; cast to x's dtype if that is narrower.
        dtype: of the result.
        config: as for :func:`conv2d_forward`.

    Returns:
        `(B, N, H', W')` in x's memory format.
    """
    output = _empty(x, weight.shape[0], where, dtype)
    config = fit(config, weight.shape[0] // where.groups, weight.shape[1])
    _launch(x, weight, bias, weight, weight[:, :1, 0, 0], x, output, where, config)
    return output


def conv2d_down(x: Tensor, lora_a: Tensor, *, where: Geometry, config: Config) -> Tensor:
    """h = A ∗ x as `(M, g·R)` contiguous, in x's dtype, whatever the memory format of x."""
    groups, rank = where.groups, lora_a.shape[0] // where.groups
    hidden = x.new_empty((x.shape[0] * where.pixels, groups * rank))
    as_image = hidden.view(x.shape[0], where.out_height, where.out_width, groups * rank).permute(0, 3, 1, 2)
    _launch(x, lora_a, None, lora_a, lora_a[:, :1, 0, 0], x, as_image, where, fit(config, rank, lora_a.shape[1]))
    return hidden


def _empty(x: Tensor, outputs: int, where: Geometry, dtype: torch.dtype) -> Tensor:
    size = (x.shape[0], outputs, where.out_height, where.out_width)
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=memory_format(x))


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    output: Tensor,
    where: Geometry,
    config: Config,
    *,
    group: Tensor | None = None,
    goal: Tensor | None = None,
    kept: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float = 0.0,
    source: int = PLAIN,
) -> None:
    if x.shape[0] == 0:
        return
    weight = weight.contiguous(memory_format=torch.channels_last)
    m, n, c = x.shape[0] * where.pixels, weight.shape[0] // where.groups, weight.shape[1]
    aimed, held = (output if t is None else dense_pixels(t) for t in (goal, kept))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    launch(conv2d_forward_kernel)[(tiles, where.groups)](
        x_ptr=x, w_ptr=weight, bias_ptr=pointer(bias, x), a_ptr=lora_a, b_ptr=lora_b, h_ptr=hidden,
        group_ptr=pointer(group, x), goal_ptr=aimed, kept_ptr=held, y_ptr=output, rows_ptr=pointer(rows, x), M=m, N=n,
        C=c, R=lora_b.shape[1], HEIGHT=where.height, WIDTH=where.width, PIXELS=where.pixels, OUT_WIDTH=where.out_width,
        TAPS=where.taps, KERNEL_WIDTH=where.kernel[1], GROUPS=where.groups, scale=scale, stride_h=where.stride[0],
        stride_w=where.stride[1], dilation_h=where.dilation[0], dilation_w=where.dilation[1], top=where.before[0],
        left=where.before[1], stride_xb=x.stride(0), stride_xc=x.stride(1), stride_xh=x.stride(2),
        stride_xw=x.stride(3), stride_wn=weight.stride(0), stride_wc=weight.stride(1), stride_wh=weight.stride(2),
        stride_ww=weight.stride(3), stride_ar=lora_a.stride(0), stride_ac=lora_a.stride(1), stride_ah=lora_a.stride(2),
        stride_aw=lora_a.stride(3), stride_bn=lora_b.stride(0), stride_br=lora_b.stride(1),
        stride_goal_b=aimed.stride(0), stride_goal_n=aimed.stride(1), stride_goal_p=pixel_stride(aimed),
        stride_kept_b=held.stride(0), stride_kept_n=held.stride(1), stride_kept_p=pixel_stride(held),
        stride_yb=output.stride(0), stride_yn=output.stride(1), stride_yp=pixel_stride(output), LOW_RANK=source,
        SPLIT=x.dtype == torch.float32 and weight.dtype != torch.float32, HAS_BIAS=bias is not None,
        HAS_GOAL=goal is not None, HAS_KEPT=kept is not None, EVEN_C=c % config.block_k == 0,
        PRECISION=precision(x.dtype, x.device), EMULATE=emulate(), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, BLOCK_R=block_r(lora_b.shape[1]), GROUP_M=config.group_m, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
