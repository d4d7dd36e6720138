"""dX of a convolution as one implicit product: `dX = Wᵀ ∗ G' + Aᵀ ∗ U`, both transposed convolutions.

Shapes: G' (B, N, H', W'), W (N, C/g, kh, kw), U (B, g·R, H', W'), A (g·R, C/g, kh, kw), dX (B, C, H, W).

Input (ih, iw) was seen by output (oh, ow) through tap (i, j) iff `oh · stride_h = ih + top − i · dilation_h`, and
likewise across. Under a stride most pairs of an input and a tap have no such output, so inputs are taken by their
phase `ih mod stride_h, iw mod stride_w`, an axis of the grid: all inputs of a phase meet the same taps, every
`stride / gcd(stride, dilation)`-th one, and no product is computed only to be masked away. The first such tap
solves `i · dilation ≡ phase + top (mod stride)`, for which the host passes an inverse.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, precision, swizzled
from rfa_fast.kernels.conv2d_forward import fit, pixel
from rfa_fast.kernels.conv2d_geometry import Geometry, pixel_stride
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit
def phase_taps(phase, before, kernel, stride, dilation, divisor, inverse):
    """Of one axis: the first tap that inputs of a phase meet, the step to the next, and how many there are."""
    step = stride // divisor
    shifted = phase + before
    first = ((shifted // divisor) * inverse) % step
    count = (kernel - first + step - 1) // step
    return first, step, tl.where((shifted % divisor == 0) & (first < kernel), count, 0)


@triton.jit(do_not_specialize=["SAMPLES"])
def conv2d_input_gradient_kernel(
    g_ptr,  # (B, N, H', W')
    w_ptr,  # (N, C/g, kh, kw)
    u_ptr,  # (B, g, R, H'·W')
    a_ptr,  # (g·R, C/g, kh, kw)
    dx_ptr,  # (B, C, H, W)
    SAMPLES,
    N,  # outputs per group
    C,  # inputs per group
    R,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    top,
    left,
    divisor_h,
    divisor_w,
    inverse_h,
    inverse_w,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_gw,
    stride_wn,
    stride_wc,
    stride_wh,
    stride_ww,
    stride_ar,
    stride_ac,
    stride_ah,
    stride_aw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ub,
    stride_ug,
    stride_ur,
    stride_up,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    phase_h, phase_w = tl.program_id(1) // stride_w, tl.program_id(1) % stride_w
    part = tl.program_id(2).to(tl.int64)
    rows_h, rows_w = (HEIGHT - phase_h + stride_h - 1) // stride_h, (WIDTH - phase_w + stride_w - 1) // stride_w
    inputs = tl.maximum(rows_h * rows_w, 1)
    # The grid is cut for the first phase, which has the most inputs.
    most = tl.cdiv(HEIGHT, stride_h) * tl.cdiv(WIDTH, stride_w)
    blocks_m = tl.cdiv(SAMPLES.to(tl.int64) * most, BLOCK_M)
    block_m, block_n = swizzled(tl.program_id(0).to(tl.int64), blocks_m, tl.cdiv(C, BLOCK_N), GROUP_M)
    sample, _, i, j = pixel(block_m * BLOCK_M, inputs, tl.maximum(rows_w, 1), BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, col_in = (sample < SAMPLES) & (i < rows_h) & (j < rows_w), cols < C

    first_h, step_h, count_h = phase_taps(phase_h, top, KERNEL_HEIGHT, stride_h, dilation_h, divisor_h, inverse_h)
    first_w, step_w, count_w = phase_taps(phase_w, left, KERNEL_WIDTH, stride_w, dilation_w, divisor_w, inverse_w)
    # Exact divisions: this is what the first tap was chosen for.
    out_row = i + (phase_h + top - first_h * dilation_h) // stride_h
    out_col = j + (phase_w + left - first_w * dilation_w) // stride_w
    taps = count_h * count_w

    at = g_ptr + sample * stride_gb
    at += out_row.to(tl.int64) * stride_gh + out_col.to(tl.int64) * stride_gw + part * N * stride_gn
    w_at = w_ptr + cols * stride_wc + part * N * stride_wn
    a_at = a_ptr + cols * stride_ac + part * R * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    depth = tl.arange(0, BLOCK_K)
    blocks_k = tl.cdiv(N, BLOCK_K)
    for step in range(taps * blocks_k):
        tap = step // blocks_k
        n = ((step - tap * blocks_k) * BLOCK_K + depth).to(tl.int64)
        th, tw = tap // count_w, tap % count_w
        up_by, left_by = th * (dilation_h // divisor_h), tw * (dilation_w // divisor_w)
        seen = row_in & (out_row - up_by >= 0) & (out_row - up_by < OUT_HEIGHT)
        seen = seen & (out_col - left_by >= 0) & (out_col - left_by < OUT_WIDTH)
        tap_h, tap_w = (first_h + th * step_h).to(tl.int64), (first_w + tw * step_w).to(tl.int64)
        tap_at = w_at + tap_h * stride_wh + tap_w * stride_ww
        from_at = at - up_by.to(tl.int64) * stride_gh - left_by.to(tl.int64) * stride_gw
        if EVEN_N:
            g = tl.load(from_at[:, None] + n[None, :] * stride_gn, mask=seen[:, None], other=0.0)
            w = tl.load(tap_at[None, :] + n[:, None] * stride_wn, mask=col_in[None, :], other=0.0)
        else:
            g = tl.load(from_at[:, None] + n[None, :] * stride_gn, mask=seen[:, None] & (n < N)[None, :], other=0.0)
            w = tl.load(tap_at[None, :] + n[:, None] * stride_wn, mask=col_in[None, :] & (n < N)[:, None], other=0.0)
        acc = dot(g, w, acc, PRECISION, EMULATE)
    u_from = (u_ptr + part * stride_ug + sample * stride_ub)[:, None]
    blocks_r = tl.cdiv(R, BLOCK_R)
    for step in tl.range(0, taps * blocks_r, num_stages=1):
        tap = step // blocks_r
        ranks = (step - tap * blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
        th, tw = tap // count_w, tap % count_w
        up_by, left_by = th * (dilation_h // divisor_h), tw * (dilation_w // divisor_w)
        seen = row_in & (out_row - up_by >= 0) & (out_row - up_by < OUT_HEIGHT)
        seen = seen & (out_col - left_by >= 0) & (out_col - left_by < OUT_WIDTH)
        tap_h, tap_w = (first_h + th * step_h).to(tl.int64), (first_w + tw * step_w).to(tl.int64)
        place = (out_row - up_by) * OUT_WIDTH + out_col - left_by
        u_at = u_from + (place.to(tl.int64) * stride_up)[:, None] + ranks[None, :] * stride_ur
        u = tl.load(u_at, mask=seen[:, None] & (ranks < R)[None, :], other=0.0)
        tap_at = a_at + tap_h * stride_ah + tap_w * stride_aw
        a_in = col_in[None, :] & (ranks < R)[:, None]
        a = tl.load(tap_at[None, :] + ranks[:, None] * stride_ar, mask=a_in, other=0.0)
        u = narrow(u.to(tl.float32), DTYPE, EMULATE)
        acc = dot(u, narrow(a.to(tl.float32), DTYPE, EMULATE), acc, PRECISION, EMULATE)

    image_row, image_col = (i * stride_h + phase_h).to(tl.int64), (j * stride_w + phase_w).to(tl.int64)
    x_row = sample * stride_xb + image_row * stride_xh + image_col * stride_xw
    x_at = dx_ptr + x_row[:, None] + (part * C + cols)[None, :] * stride_xc
    tl.store(x_at, narrow(acc, DTYPE, EMULATE), mask=row_in[:, None] & col_in[None, :])


def _congruence(stride: int, dilation: int) -> tuple[int, int]:
    """gcd of the two, and the inverse of dilation / gcd modulo stride / gcd (0 where that modulus is 1)."""
    divisor = math.gcd(stride, dilation)
    modulus = stride // divisor
    return divisor, pow(dilation // divisor, -1, modulus) if modulus > 1 else 0


def conv2d_input_gradient(
    grad: Tensor,
    weight: Tensor,
    up: Tensor,
    lora_a: Tensor,
    *,
    where: Geometry,
    memory_format: torch.memory_format,
    config: Config,
) -> Tensor:
    """Launch :func:`conv2d_input_gradient_kernel`.

    Args:
        grad: G' `(B, N, H', W')` in weight's dtype, any strides.
        up: U `(B, g, R, H', W')` with dense pixels; taken in weight's dtype.
        where: the windows of the forward.
        memory_format: of dX.
        config: block_m inputs × block_n input channels, block_k output channels at a time.

    Returns:
        dX `(B, C, H, W)` in weight's dtype.
    """
    samples, outputs, groups = grad.shape[0], grad.shape[1], where.groups
    n, c, rank = outputs // groups, weight.shape[1], lora_a.shape[0] // groups
    size = (samples, c * groups, where.height, where.width)
    dx = torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=memory_format)
    if samples == 0:
        return dx
    weight = weight.contiguous(memory_format=torch.channels_last)
    config = fit(config, c, n)
    most = triton.cdiv(where.height, where.stride[0]) * triton.cdiv(where.width, where.stride[1])
    tiles = triton.cdiv(samples * most, config.block_m) * triton.cdiv(c, config.block_n)
    (divisor_h, inverse_h), (divisor_w, inverse_w) = (
        _congruence(s, d) for s, d in zip(where.stride, where.dilation, strict=True)
    )
    launch(conv2d_input_gradient_kernel)[(tiles, where.stride[0] * where.stride[1], groups)](
        g_ptr=grad, w_ptr=weight, u_ptr=up, a_ptr=lora_a, dx_ptr=dx, SAMPLES=samples, N=n, C=c, R=rank,
        HEIGHT=where.height, WIDTH=where.width, OUT_HEIGHT=where.out_height, OUT_WIDTH=where.out_width,
        KERNEL_HEIGHT=where.kernel[0], KERNEL_WIDTH=where.kernel[1], stride_h=where.stride[0], stride_w=where.stride[1],
        dilation_h=where.dilation[0], dilation_w=where.dilation[1], top=where.before[0], left=where.before[1],
        divisor_h=divisor_h, divisor_w=divisor_w, inverse_h=inverse_h, inverse_w=inverse_w, stride_gb=grad.stride(0),
        stride_gn=grad.stride(1), stride_gh=grad.stride(2), stride_gw=grad.stride(3), stride_wn=weight.stride(0),
        stride_wc=weight.stride(1), stride_wh=weight.stride(2), stride_ww=weight.stride(3), stride_ar=lora_a.stride(0),
        stride_ac=lora_a.stride(1), stride_ah=lora_a.stride(2), stride_aw=lora_a.stride(3), stride_xb=dx.stride(0),
        stride_xc=dx.stride(1), stride_xh=dx.stride(2), stride_xw=dx.stride(3), stride_ub=up.stride(0),
        stride_ug=up.stride(1), stride_ur=up.stride(2), stride_up=pixel_stride(up[:, 0]),
        EVEN_N=n % config.block_k == 0, PRECISION=precision(weight.dtype, weight.device), EMULATE=emulate(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=min(32, block_r(rank)),
        GROUP_M=config.group_m, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dx
