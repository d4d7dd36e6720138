"""After the vendor's convolution: `y = x' + b + s · B ∗ h`, stored and measured in one pass over it.

Shapes: x' (B, N, H', W') and h (B, g·R, H', W') as the vendor left them, B (N, R), y (B, N, H', W').

A program keeps a block of places (pixels of one image) and of channels, and walks down a chunk of the samples.
So the mean over samples is a running sum in registers, and x̃, where it is given, is found in the cache. Where it
is not given, the chunk leaves behind the retain sum of x', and of y on the forget samples the mean and the sum of
squares about it (Welford's update); :mod:`rfa_fast.kernels.feature_mean` makes x̃ and the loss of them, with
N·H'·W' columns. Places run first in an NCHW image and channels in a channels-last one: either is read in runs.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, pointer, precision
from rfa_fast.kernels.conv2d_geometry import channels_last, common_unit, dense_pixels, pixel_stride
from rfa_fast.kernels.epilogue import low_rank, squared_error
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["SAMPLES", "chunk"])
def conv2d_epilogue_kernel(
    z_ptr,  # (B, g, N/g, H'·W'): x' without the bias; may be y
    h_ptr,  # (B, g, R, H'·W')
    bias_ptr,  # (N,)
    b_ptr,  # (N, R)
    group_ptr,  # (B,) int8
    goal_ptr,  # (B, N, H'·W'): x̃
    kept_ptr,  # (B, N, H'·W'): x'_t
    y_ptr,  # (B, N, H'·W')
    hidden_ptr,  # (B·H'·W', g·R): where h is copied to
    columns_ptr,  # (chunks, 3, N·H'·W') fp32, in the order of y
    counts_ptr,  # (chunks, 2) fp32: retain and forget samples
    errors_ptr,  # (planes, tiles, B) fp32: squared errors of retain samples (HAS_KEPT), then of forget samples
    SAMPLES,
    N,  # outputs per group
    R,
    PIXELS,
    GROUPS,
    chunk,
    scale,
    stride_zb,
    stride_zg,
    stride_zn,
    stride_zp,
    stride_hb,
    stride_hg,
    stride_hr,
    stride_hp,
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
    HAS_BIAS: tl.constexpr,
    HAS_GOAL: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    COPY_HIDDEN: tl.constexpr,
    ONE_BLOCK_R: tl.constexpr,
    UNIT_N: tl.constexpr,
    UNIT_P: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    # Strides of x' and y come in units, of which one is 1: those of a channel or those of a pixel.
    PIXELS, UNIT = PIXELS * UNIT_N, UNIT_N * UNIT_P
    stride_zb, stride_zg, stride_yb = stride_zb * UNIT, stride_zg * UNIT, stride_yb * UNIT
    stride_zn, stride_yn, stride_zp, stride_yp = (
        stride_zn * UNIT_N, stride_yn * UNIT_N, stride_zp * UNIT_P, stride_yp * UNIT_P,
    )  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    conv_group = block // blocks_n
    places = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (block - conv_group * blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = conv_group * N + cols
    place_in, col_in = places < PIXELS, cols < N
    inside = place_in[:, None] & col_in[None, :]
    places = places.to(tl.int64)
    z_at = z_ptr + conv_group * stride_zg + places[:, None] * stride_zp + cols[None, :] * stride_zn
    y_off = places[:, None] * stride_yp + channels[None, :] * stride_yn
    h_from = h_ptr + conv_group * stride_hg
    first_n = block == conv_group * blocks_n
    tile = block * tl.num_programs(0) + block_m
    goal_plane = 0
    if HAS_KEPT:
        goal_plane = tl.num_programs(0) * tl.num_programs(1)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=col_in, other=0.0).to(tl.float32)
    if HAS_GOAL:
        goal_at = goal_ptr + places[:, None] * stride_goal_p + channels[None, :] * stride_goal_n
    if HAS_KEPT:
        kept_at = kept_ptr + places[:, None] * stride_kept_p + channels[None, :] * stride_kept_n
    if HAS_COLUMNS:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        mean = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        about = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        retained = 0.0
        forgotten = 0.0

    if ONE_BLOCK_R:
        ranks = tl.arange(0, BLOCK_R)
        rank_in = ranks < R
        b_at = b_ptr + channels[None, :] * stride_bn + ranks[:, None] * stride_br
        b = tl.load(b_at, mask=rank_in[:, None] & col_in[None, :], other=0.0)
        b = narrow(b.to(tl.float32), DTYPE, EMULATE)
        thin = place_in[:, None] & rank_in[None, :]

    # An explicit depth, because a loop is otherwise pipelined for its products only, and here the loads are the cost.
    for sample in tl.range(part * chunk, tl.minimum(part * chunk + chunk, SAMPLES), num_stages=STAGES):
        acc = tl.load(z_at + sample * stride_zb, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            acc += bias[None, :]
        if HAS_GOAL or HAS_KEPT or HAS_COLUMNS:
            code = tl.load(group_ptr + sample)
        if HAS_COLUMNS:
            total += tl.where(code == 0, acc, 0.0)
            retained += (code == 0).to(tl.float32)
        h_row = sample * stride_hb + places * stride_hp
        if ONE_BLOCK_R:
            h = tl.load(h_from + h_row[:, None] + ranks[None, :] * stride_hr, mask=thin, other=0.0)
            acc = dot(narrow(h.to(tl.float32) * scale, DTYPE, EMULATE), b, acc, PRECISION, EMULATE)
        else:
            acc = low_rank(
                acc, h_from, h_row, place_in, b_ptr, channels, col_in, R, scale, stride_hr, stride_bn, stride_br,
                DTYPE, BLOCK_R, PRECISION, EMULATE,
            )  # fmt: skip
        tl.store(y_ptr + sample * stride_yb + y_off, narrow(acc, DTYPE, EMULATE), mask=inside)
        if COPY_HIDDEN:
            row = (((sample * PIXELS + places) * GROUPS + conv_group) * R)[:, None]
            if ONE_BLOCK_R:
                tl.store(hidden_ptr + row + ranks[None, :], h, mask=thin & first_n)
            else:
                for r0 in range(0, R, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)
                    copied = place_in[:, None] & (r < R)[None, :] & first_n
                    h = tl.load(h_from + h_row[:, None] + r[None, :] * stride_hr, mask=copied, other=0.0)
                    tl.store(hidden_ptr + row + r[None, :], h, mask=copied)
        if HAS_KEPT:
            error = squared_error(acc, kept_at + sample * stride_kept_b, place_in & (code == 0), col_in)
            tl.store(errors_ptr + tile * SAMPLES + sample, tl.sum(error, axis=0))
        if HAS_GOAL:
            error = squared_error(acc, goal_at + sample * stride_goal_b, place_in & (code == 1), col_in)
            tl.store(errors_ptr + (goal_plane + tile) * SAMPLES + sample, tl.sum(error, axis=0))
        if HAS_COLUMNS:
            forgotten += (code == 1).to(tl.float32)
            off = tl.where(code == 1, acc - mean, 0.0)
            mean += off / tl.maximum(forgotten, 1.0)
            about += tl.where(code == 1, off * (acc - mean), 0.0)

    if HAS_COLUMNS:
        columns = GROUPS * N * PIXELS
        statistic = columns_ptr + part * 3 * columns + y_off
        tl.store(statistic, total, mask=inside)
        tl.store(statistic + columns, mean, mask=inside)
        tl.store(statistic + 2 * columns, about, mask=inside)
        if tile == 0:
            tl.store(counts_ptr + part * 2, retained)
            tl.store(counts_ptr + part * 2 + 1, forgotten)


class Conv2dEpilogue(NamedTuple):
    """What the pass leaves behind; a field that was not asked for is `None`.

    Attributes:
        hidden: h `(B·H'·W', g·R)`, where it was to be copied.
        columns, counts: `(chunks, 3, N·H'·W')` and `(chunks, 2)` fp32, columns in the order of y.
        retain_samples, forget_samples: squared errors `(B,)` fp32, 0 outside the group.
    """

    hidden: Tensor | None
    columns: Tensor | None
    counts: Tensor | None
    retain_samples: Tensor | None
    forget_samples: Tensor | None


def conv2d_epilogue(
    product: Tensor,
    hidden: Tensor,
    output: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    group: Tensor | None = None,
    goal: Tensor | None = None,
    kept: Tensor | None = None,
    columns: bool = False,
    copy_hidden: bool = False,
    config: Config,
) -> Conv2dEpilogue:
    """Launch :func:`conv2d_epilogue_kernel`.

    Args:
        product: x' without bias as `(B, g, N/g, H', W')`, images dense; may share its memory with `output`.
        hidden: h as `(B, g, R, H', W')`, images dense.
        output: y `(B, N, H', W')`, dense, filled here.
        goal, kept: x̃ and x'_t expanded to y's shape; they and `columns` need `group (B,)`.
        columns: leave statistics for x̃ and the forget loss.
        copy_hidden: also bring h into rows, for a `hidden` that lies inside a larger buffer.
        config: block_m × block_n: places × channels in a channels-last image, the other way round in NCHW;
            block_k samples per program, or group_m chunks of all samples with `columns`.

    Returns:
        :class:`Conv2dEpilogue`.
    """
    samples, outputs, out_height, out_width = output.shape
    groups, rank, pixels = hidden.shape[1], hidden.shape[2], out_height * out_width
    if not channels_last(output):
        config = replace(config, block_m=config.block_n, block_n=config.block_m)
    block_m = min(config.block_m, max(16, triton.next_power_of_2(pixels)))
    block_n = min(config.block_n, max(16, triton.next_power_of_2(outputs // groups)))
    grid_m, grid_n = triton.cdiv(pixels, block_m), groups * triton.cdiv(outputs // groups, block_n)
    chunk = triton.cdiv(samples, config.group_m) if columns else config.block_k
    chunks = config.group_m if columns else triton.cdiv(samples, chunk)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": output.device}
    copied = output.new_empty((samples * pixels, groups * rank)) if copy_hidden else None
    sums = torch.empty((chunks, 3, outputs * pixels), **wide) if columns else None
    counts = torch.empty((chunks, 2), **wide) if columns else None
    planes = (kept is not None) + (goal is not None)
    errors = torch.empty((planes, grid_m * grid_n, samples), **wide) if planes else None
    aimed, held = (output if t is None else dense_pixels(t) for t in (goal, kept))
    product_p, output_p = pixel_stride(product[:, 0]), pixel_stride(output)
    unit = common_unit(product.stride(0), product.stride(1), output.stride(0), pixels if output_p == 1 else output_p)
    unit_n, unit_p = 1, 1
    if output_p == 1 and product_p == 1:
        unit_n = common_unit(unit, product.stride(2), output.stride(1))
    elif output.stride(1) == 1 and product.stride(2) == 1:
        unit_p = common_unit(unit, product_p, output_p)
    unit = unit_n * unit_p
    if samples > 0:
        launch(conv2d_epilogue_kernel)[(grid_m, grid_n, chunks)](
            z_ptr=product, h_ptr=hidden, bias_ptr=pointer(bias, output), b_ptr=lora_b, group_ptr=pointer(group, output),
            goal_ptr=aimed, kept_ptr=held, y_ptr=output, hidden_ptr=pointer(copied, output),
            columns_ptr=pointer(sums, output), counts_ptr=pointer(counts, output), errors_ptr=pointer(errors, output),
            SAMPLES=samples, N=outputs // groups, R=rank, PIXELS=pixels // unit_n, GROUPS=groups, chunk=chunk,
            scale=scale, stride_zb=product.stride(0) // unit, stride_zg=product.stride(1) // unit,
            stride_zn=product.stride(2) // unit_n, stride_zp=product_p // unit_p, stride_hb=hidden.stride(0),
            stride_hg=hidden.stride(1), stride_hr=hidden.stride(2), stride_hp=pixel_stride(hidden[:, 0]),
            stride_bn=lora_b.stride(0), stride_br=lora_b.stride(1), stride_goal_b=aimed.stride(0),
            stride_goal_n=aimed.stride(1), stride_goal_p=pixel_stride(aimed), stride_kept_b=held.stride(0),
            stride_kept_n=held.stride(1), stride_kept_p=pixel_stride(held), stride_yb=output.stride(0) // unit,
            stride_yn=output.stride(1) // unit_n, stride_yp=output_p // unit_p, HAS_BIAS=bias is not None,
            HAS_GOAL=goal is not None, HAS_KEPT=kept is not None, HAS_COLUMNS=columns, COPY_HIDDEN=copy_hidden,
            ONE_BLOCK_R=rank <= block_r(rank), UNIT_N=unit_n, UNIT_P=unit_p,
            PRECISION=precision(output.dtype, output.device), EMULATE=emulate(), BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_R=block_r(rank), STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    if samples == 0 and sums is not None and counts is not None:
        sums, counts = sums.zero_(), counts.zero_()
    per_sample = None if errors is None else errors.sum(1)
    return Conv2dEpilogue(
        copied, sums, counts, None if kept is None or per_sample is None else per_sample[0],
        None if goal is None or per_sample is None else per_sample[-1],
    )  # fmt: skip
