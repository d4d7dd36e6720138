"""`dA = Σ over outputs of U ⊗ the window they saw`: U (B, g·R, H', W'), x (B, C, H, W) -> dA (g·R, C/g, kh, kw) fp32.

A program keeps one tap, one block of input channels and one chunk of the outputs; taps are next to each other in
the grid, so that the nine readings of a block of x by a 3×3 kernel find it in the cache. The windows themselves
are never laid out. Chunks are summed afterwards, in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, precision
from rfa_fast.kernels.conv2d_forward import pixel
from rfa_fast.kernels.conv2d_geometry import Geometry, pixel_stride
from rfa_fast.kernels.linear_gradient import PROGRAMS
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["M", "chunk"])
def conv2d_lora_a_gradient_kernel(
    u_ptr,  # (B, g, R, H'·W')
    x_ptr,  # (B, C, H, W)
    da_ptr,  # (chunks, g·R, kh·kw, C/g) fp32
    M,
    C,  # inputs per group
    R,
    HEIGHT,
    WIDTH,
    PIXELS,
    OUT_WIDTH,
    TAPS,
    KERNEL_WIDTH,
    GROUPS,
    chunk,
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
    stride_ub,
    stride_ug,
    stride_ur,
    stride_up,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    blocks_r = tl.cdiv(R, BLOCK_R)
    tap, block = tl.program_id(0) % TAPS, tl.program_id(0) // TAPS
    part = tl.program_id(1).to(tl.int64)
    conv_group, block_rank = tl.program_id(2).to(tl.int64) // blocks_r, tl.program_id(2) % blocks_r
    cols = block.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = block_rank * BLOCK_R + tl.arange(0, BLOCK_R)
    col_in, rank_in = cols < C, ranks < R
    down_by, right_by = (tap // KERNEL_WIDTH) * dilation_h - top, (tap % KERNEL_WIDTH) * dilation_w - left
    x_from = x_ptr + (conv_group * C + cols) * stride_xc
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for first in range(part * chunk, tl.minimum(part * chunk + chunk, M), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        sample, place, image_row, image_col = pixel(first, PIXELS, OUT_WIDTH, BLOCK_M)
        row, col = image_row * stride_h + down_by, image_col * stride_w + right_by
        seen = (rows < M) & (row >= 0) & (row < HEIGHT) & (col >= 0) & (col < WIDTH)
        at = sample * stride_xb + row.to(tl.int64) * stride_xh + col.to(tl.int64) * stride_xw
        x = tl.load(x_from[None, :] + at[:, None], mask=seen[:, None] & col_in[None, :], other=0.0)
        u_at = u_ptr + conv_group * stride_ug + (sample * stride_ub + place.to(tl.int64) * stride_up)[None, :]
        u = tl.load(u_at + ranks[:, None] * stride_ur, mask=rank_in[:, None] & seen[None, :], other=0.0)
        acc = dot(narrow(u.to(tl.float32), DTYPE, EMULATE), x, acc, PRECISION, EMULATE)
    da_at = da_ptr + (((part * GROUPS + conv_group) * R + ranks[:, None]) * TAPS + tap) * C + cols[None, :]
    tl.store(da_at, acc, mask=rank_in[:, None] & col_in[None, :])


def conv2d_lora_a_gradient(up: Tensor, x: Tensor, *, where: Geometry, config: Config) -> Tensor:
    """Launch :func:`conv2d_lora_a_gradient_kernel`; `config` cuts block_m outputs at a time, block_k input channels.

    Args:
        up: U `(B, g, R, H', W')` with dense pixels; taken in x's dtype.
        x: `(B, C, H, W)`, any strides.
        where: the windows of the forward.

    Returns:
        dA `(g·R, C/g, kh, kw)` fp32.
    """
    m, groups = x.shape[0] * where.pixels, where.groups
    c, rank = x.shape[1] // groups, up.shape[2]
    block_k = min(config.block_k, max(16, triton.next_power_of_2(c)))
    blocks_k, ranks = triton.cdiv(c, block_k), block_r(rank)
    blocks_r = triton.cdiv(rank, ranks)
    chunks = max(1, min(32, PROGRAMS // (blocks_k * where.taps * groups * blocks_r)))
    chunk = triton.cdiv(triton.cdiv(m, chunks), config.block_m) * config.block_m
    parts = torch.empty((chunks, groups * rank, where.taps, c), dtype=torch.float32, device=x.device)
    if x.shape[0] == 0:
        parts.zero_()
    else:
        launch(conv2d_lora_a_gradient_kernel)[(blocks_k * where.taps, chunks, groups * blocks_r)](
            u_ptr=up, x_ptr=x, da_ptr=parts, M=m, C=c, R=rank, HEIGHT=where.height, WIDTH=where.width,
            PIXELS=where.pixels, OUT_WIDTH=where.out_width, TAPS=where.taps, KERNEL_WIDTH=where.kernel[1],
            GROUPS=groups, chunk=chunk, stride_h=where.stride[0], stride_w=where.stride[1],
            dilation_h=where.dilation[0], dilation_w=where.dilation[1], top=where.before[0], left=where.before[1],
            stride_xb=x.stride(0), stride_xc=x.stride(1), stride_xh=x.stride(2), stride_xw=x.stride(3),
            stride_ub=up.stride(0), stride_ug=up.stride(1), stride_ur=up.stride(2), stride_up=pixel_stride(up[:, 0]),
            PRECISION=precision(x.dtype, x.device), EMULATE=emulate(), BLOCK_M=config.block_m, BLOCK_K=block_k,
            BLOCK_R=ranks, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    shape = (groups * rank, *where.kernel, c)
    return parts.sum(0).view(shape).permute(0, 3, 1, 2).contiguous()
