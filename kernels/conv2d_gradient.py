"""One read of the upstream gradient G gives G', U and dB of a convolution.

Shapes: G, y (B, N, H', W'), h (M, g·R), B (N, R), M = B·H'·W'. With fp32 weights w per sample::

    G' = G + w_forget (y − x̃) on forget samples, + w_retain (y − x'_t) on retain samples (teacher mode)
    U  = s · G' B        (M, g·R)              dB = s · G'ᵀ h        (N, R), group by group

A program keeps a block of places and of channels and walks down the samples, as the forward's epilogue does: B
and dB stay in registers, x̃ in the cache, and G is read in runs in either memory format. What has to be summed
over programs, U over blocks of channels and dB over blocks of places and chunks of samples, is thin. G' is
written whole: a convolution that picked its samples from G and from a buffer would lose the vector loads that a
fixed base pointer allows, for a quarter of the bytes here. Where nothing changes G, it is not written at all.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, pointer, precision
from rfa_fast.kernels.conv2d_geometry import common_unit, dense_pixels, pixel_stride
from rfa_fast.kernels.linear_gradient import PROGRAMS
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["SAMPLES", "chunk"])
def conv2d_gradient_kernel(
    g_ptr,  # (B, N, H'·W')
    y_ptr,  # (B, N, H'·W')
    h_ptr,  # (M, g·R)
    b_ptr,  # (N, R)
    group_ptr,  # (B,) int8
    forget_ptr,  # (B,) fp32: w_forget
    retain_ptr,  # (B,) fp32: w_retain
    goal_ptr,  # (B, N, H'·W'): x̃
    kept_ptr,  # (B, N, H'·W'): x'_t
    changed_ptr,  # (B, g, N/g, H'·W'): G'
    u_ptr,  # (blocks_n, M, g·R) fp32
    db_ptr,  # (chunks·blocks_m, N, R) fp32
    SAMPLES,
    N,  # outputs per group
    R,
    PIXELS,
    GROUPS,
    chunk,
    scale,
    stride_gb,
    stride_gn,
    stride_gp,
    stride_yb,
    stride_yn,
    stride_yp,
    stride_bn,
    stride_br,
    stride_goal_b,
    stride_goal_n,
    stride_goal_p,
    stride_kept_b,
    stride_kept_n,
    stride_kept_p,
    stride_cb,
    stride_cg,
    stride_cn,
    stride_cp,
    HAS_GOAL: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_CHANGED: tl.constexpr,
    UNIT_N: tl.constexpr,
    UNIT_P: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    # Strides of G, y and G' come in units, of which one is 1: those of a channel or those of a pixel.
    PIXELS, UNIT = PIXELS * UNIT_N, UNIT_N * UNIT_P
    stride_gb, stride_yb, stride_cb, stride_cg = stride_gb * UNIT, stride_yb * UNIT, stride_cb * UNIT, stride_cg * UNIT
    stride_gn, stride_yn, stride_cn = stride_gn * UNIT_N, stride_yn * UNIT_N, stride_cn * UNIT_N
    stride_gp, stride_yp, stride_cp = stride_gp * UNIT_P, stride_yp * UNIT_P, stride_cp * UNIT_P
    blocks_n, blocks_r = tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    block_m, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, block_rank = tl.program_id(2).to(tl.int64) // blocks_r, tl.program_id(2) % blocks_r
    conv_group = block // blocks_n
    block_n = block - conv_group * blocks_n
    places = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = block_rank * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = conv_group * N + cols
    place_in, col_in, rank_in = places < PIXELS, cols < N, ranks < R
    inside, thin = place_in[:, None] & col_in[None, :], place_in[:, None] & rank_in[None, :]
    places = places.to(tl.int64)
    g_at = g_ptr + places[:, None] * stride_gp + channels[None, :] * stride_gn
    b_at = b_ptr + channels[:, None] * stride_bn + ranks[None, :] * stride_br
    b = tl.load(b_at, mask=col_in[:, None] & rank_in[None, :], other=0.0)
    b = narrow(b.to(tl.float32), DTYPE, EMULATE)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if HAS_GOAL or HAS_KEPT:
        y_at = y_ptr + places[:, None] * stride_yp + channels[None, :] * stride_yn
    if HAS_GOAL:
        goal_at = goal_ptr + places[:, None] * stride_goal_p + channels[None, :] * stride_goal_n
    if HAS_KEPT:
        kept_at = kept_ptr + places[:, None] * stride_kept_p + channels[None, :] * stride_kept_n
    if HAS_CHANGED:
        changed_at = changed_ptr + conv_group * stride_cg + places[:, None] * stride_cp + cols[None, :] * stride_cn

    for sample in range(part * chunk, tl.minimum(part * chunk + chunk, SAMPLES)):
        g = tl.load(g_at + sample * stride_gb, mask=inside, other=0.0)
        if HAS_GOAL or HAS_KEPT:
            code = tl.load(group_ptr + sample)
            wide = g.to(tl.float32)
            differs = code == 1
            if HAS_KEPT:
                differs = code >= 0
            y = tl.load(y_at + sample * stride_yb, mask=inside & differs, other=0.0).to(tl.float32)
            if HAS_GOAL:
                read = inside & (code == 1)
                aim = tl.load(goal_at + sample * stride_goal_b, mask=read, other=0.0).to(tl.float32)
                wide += tl.load(forget_ptr + sample) * tl.where(read, y - aim, 0.0)
            if HAS_KEPT:
                read = inside & (code == 0)
                aim = tl.load(kept_at + sample * stride_kept_b, mask=read, other=0.0).to(tl.float32)
                wide += tl.load(retain_ptr + sample) * tl.where(read, y - aim, 0.0)
            g = narrow(wide, DTYPE, EMULATE)
        if HAS_CHANGED:
            tl.store(changed_at + sample * stride_cb, g, mask=inside & (block_rank == 0))
        u = dot(g, b, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), PRECISION, EMULATE) * scale
        row = ((sample * PIXELS + places) * GROUPS + conv_group)[:, None] * R + ranks[None, :]
        tl.store(u_ptr + block_n * SAMPLES * PIXELS * GROUPS * R + row, u, mask=thin)
        h = tl.load(h_ptr + row, mask=thin, other=0.0)
        db = dot(tl.trans(g), h, db, PRECISION, EMULATE)

    share = part * tl.num_programs(0) + block_m
    db_at = db_ptr + (share * GROUPS * N + channels[:, None]) * R + ranks[None, :]
    tl.store(db_at, db * scale, mask=col_in[:, None] & rank_in[None, :])


class Conv2dGradient(NamedTuple):
    """What the pass leaves behind.

    Attributes:
        up: U in parts, one per block of channels, `(P, M, g·R)` fp32, without the retain term of residual mode.
        lora_b: dB `(N, R)` fp32, likewise.
    """

    up: Tensor
    lora_b: Tensor


def conv2d_gradient(
    grad: Tensor,
    output: Tensor,
    hidden: Tensor,
    lora_b: Tensor,
    changed: Tensor | None,
    *,
    groups: int,
    scale: float,
    group: Tensor | None,
    goal: Tensor | None,
    forget_weight: Tensor | None,
    kept: Tensor | None,
    retain_weight: Tensor | None,
    config: Config,
) -> Conv2dGradient:
    """Launch :func:`conv2d_gradient_kernel`.

    Args:
        grad: G `(B, N, H', W')`, any strides, in h's dtype.
        output: y `(B, N, H', W')`, dense.
        hidden: h `(M, g·R)` contiguous.
        changed: `(B, g, N/g, H', W')` with dense images, where G' goes, or `None`.
        goal, forget_weight: x̃ expanded to y's shape and w_forget `(B,)` fp32, or neither.
        kept, retain_weight: x'_t likewise and w_retain, or neither.
        config: block_m places × block_n channels.

    Returns:
        :class:`Conv2dGradient`.
    """
    samples, outputs, out_height, out_width = grad.shape
    pixels, rank, each = out_height * out_width, lora_b.shape[1], outputs // groups
    block_m = min(config.block_m, max(16, triton.next_power_of_2(pixels)))
    block_n = min(config.block_n, max(16, triton.next_power_of_2(each)))
    # Exact fp32 products keep every operand in registers: more ranks at a time would spill.
    ranks = block_r(rank) if hidden.dtype.itemsize < 4 else 16
    grid_m, blocks_n, blocks_r = triton.cdiv(pixels, block_m), triton.cdiv(each, block_n), triton.cdiv(rank, ranks)
    # A number of chunks that the batch has no part in: one of another size must not compile another kernel.
    chunks = max(1, min(32, PROGRAMS // (grid_m * groups * blocks_n)))
    wide: dict[str, Any] = {"dtype": torch.float32, "device": grad.device}
    up = torch.empty((blocks_n, samples * pixels, groups * rank), **wide)
    down = torch.empty((chunks * grid_m, outputs, rank), **wide)
    if samples == 0:
        return Conv2dGradient(up, down.zero_().sum(0))
    grad = dense_pixels(grad)
    aimed, held = (output if t is None else dense_pixels(t) for t in (goal, kept))
    target = output.view(samples, groups, each, out_height, out_width) if changed is None else changed
    grad_p, output_p, target_p = pixel_stride(grad), pixel_stride(output), pixel_stride(target[:, 0])
    unit = common_unit(grad.stride(0), output.stride(0), target.stride(0), target.stride(1))
    unit_n, unit_p = 1, 1
    if grad_p == 1 and output_p == 1 and target_p == 1:
        unit_n = common_unit(unit, pixels, grad.stride(1), output.stride(1), target.stride(2))
    elif grad.stride(1) == 1 and output.stride(1) == 1 and target.stride(2) == 1:
        unit_p = common_unit(unit, grad_p, output_p, target_p)
    unit = unit_n * unit_p
    launch(conv2d_gradient_kernel)[(grid_m, groups * blocks_n, chunks * blocks_r)](
        g_ptr=grad, y_ptr=output, h_ptr=hidden, b_ptr=lora_b, group_ptr=pointer(group, hidden),
        forget_ptr=pointer(forget_weight, hidden), retain_ptr=pointer(retain_weight, hidden), goal_ptr=aimed,
        kept_ptr=held, changed_ptr=target, u_ptr=up, db_ptr=down, SAMPLES=samples, N=each, R=rank,
        PIXELS=pixels // unit_n, GROUPS=groups, chunk=triton.cdiv(samples, chunks), scale=scale,
        stride_gb=grad.stride(0) // unit, stride_gn=grad.stride(1) // unit_n, stride_gp=grad_p // unit_p,
        stride_yb=output.stride(0) // unit, stride_yn=output.stride(1) // unit_n, stride_yp=output_p // unit_p,
        stride_bn=lora_b.stride(0), stride_br=lora_b.stride(1), stride_goal_b=aimed.stride(0),
        stride_goal_n=aimed.stride(1), stride_goal_p=pixel_stride(aimed), stride_kept_b=held.stride(0),
        stride_kept_n=held.stride(1), stride_kept_p=pixel_stride(held), stride_cb=target.stride(0) // unit,
        stride_cg=target.stride(1) // unit, stride_cn=target.stride(2) // unit_n, stride_cp=target_p // unit_p,
        HAS_GOAL=goal is not None, HAS_KEPT=kept is not None, HAS_CHANGED=changed is not None, UNIT_N=unit_n,
        UNIT_P=unit_p, PRECISION=precision(hidden.dtype, hidden.device), EMULATE=emulate(), BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_R=ranks, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return Conv2dGradient(up, down.sum(0))
