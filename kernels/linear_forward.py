"""The adapted linear layer in one pass over its output: `y = x Wᵀ + b + s · h Bᵀ`, and what the losses need.

Shapes: x (M, K), W (N, K), h = x Aᵀ (M, R), B (N, R), y and Δ (M, N).

Split at h, as the published fused LoRA kernels are: h is M × R, and computing it once costs one read of x,
while computing it in every tile costs BLOCK_R / BLOCK_N more products. The second is still the better of
the two where a launch costs more than that, or where K ≫ N and reading x twice is what costs; FUSE_DOWN
selects it. With HAS_PRODUCT the vendor's GEMM has put x' into y already, and this kernel is its epilogue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import MIN_BLOCK_R, block_r, dot, emulate, launch, narrow, pointer, precision, swizzled
from rfa_fast.kernels.epilogue import low_rank, spread, squared_error, store_columns
from rfa_fast.kernels.tuning import Config
from torch import Tensor

# What the columns of a tile are summed for.
NO_COLUMNS, MEAN, MEAN_AND_SPREAD = 0, 1, 2


@triton.jit(do_not_specialize=["M", "goal_div", "goal_mod", "kept_div", "kept_mod"])
def linear_forward_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,)
    a_ptr,  # (R, K), read with FUSE_DOWN
    b_ptr,  # (N, R)
    h_ptr,  # (M, R), written with FUSE_DOWN, else read
    group_ptr,  # (M,) int8
    goal_ptr,  # (P, N): x̃; row m aims at row (m // goal_div) % goal_mod
    kept_ptr,  # (P', N): x'_t, addressed likewise
    y_ptr,  # (M, N)
    delta_ptr,  # (M, N)
    columns_ptr,  # (blocks_m, 3, N) fp32
    counts_ptr,  # (blocks_m, 2) fp32: retain and forget rows
    rows_ptr,  # (2, blocks_n, M) fp32: squared errors of retain and forget rows
    M,
    N,
    K,
    R,
    scale,
    goal_div,
    goal_mod,
    kept_div,
    kept_mod,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_goal_p,
    stride_goal_n,
    stride_kept_p,
    stride_kept_n,
    HAS_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GROUP: tl.constexpr,
    HAS_GOAL: tl.constexpr,
    GOAL_ROWS: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMIT_DELTA: tl.constexpr,
    FUSE_DOWN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M)
    block_m, block_n = block_m.to(tl.int64), block_n.to(tl.int64)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, col_in = rows < M, cols < N
    inside = row_in[:, None] & col_in[None, :]
    y_at = rows[:, None] * N + cols[None, :]

    if HAS_PRODUCT:
        acc = tl.load(y_ptr + y_at, mask=inside, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        depth = tl.arange(0, BLOCK_K)
        x_at = x_ptr + rows[:, None] * stride_xm + depth[None, :] * stride_xk
        w_at = w_ptr + cols[None, :] * stride_wn + depth[:, None] * stride_wk
        if FUSE_DOWN:
            down = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            ranks = tl.arange(0, BLOCK_R)
            rank_in = ranks < R
            a_at = a_ptr + ranks[None, :] * stride_ar + depth[:, None] * stride_ak
        for k0 in range(0, K, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_at, mask=row_in[:, None], other=0.0)
                w = tl.load(w_at, mask=col_in[None, :], other=0.0)
            else:
                deep = depth < K - k0
                x = tl.load(x_at, mask=row_in[:, None] & deep[None, :], other=0.0)
                w = tl.load(w_at, mask=col_in[None, :] & deep[:, None], other=0.0)
            acc = dot(x, w, acc, PRECISION, EMULATE)
            if FUSE_DOWN:
                a = tl.load(a_at, mask=rank_in[None, :] & (depth < K - k0)[:, None], other=0.0)
                down = dot(x, narrow(a.to(tl.float32), DTYPE, EMULATE), down, PRECISION, EMULATE)
                a_at += BLOCK_K * stride_ak
            x_at += BLOCK_K * stride_xk
            w_at += BLOCK_K * stride_wk
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_in, other=0.0).to(tl.float32)[None, :]

    if HAS_GROUP:
        codes = tl.load(group_ptr + rows, mask=row_in, other=-1)
        retained, forgotten = codes == 0, codes == 1
    if COLUMNS > 0:
        store_columns(columns_ptr, block_m, cols, col_in, N, tl.sum(tl.where(retained[:, None], acc, 0.0), axis=0), 0)
        if block_n == 0:
            tl.store(counts_ptr + block_m * 2, tl.sum(retained.to(tl.float32), axis=0))
            tl.store(counts_ptr + block_m * 2 + 1, tl.sum(forgotten.to(tl.float32), axis=0))

    if FUSE_DOWN:
        h = narrow(down, DTYPE, EMULATE)
        if block_n == 0:
            h_at = h_ptr + rows[:, None] * R + ranks[None, :]
            tl.store(h_at, h, mask=row_in[:, None] & rank_in[None, :])
        b_at = b_ptr + cols[None, :] * stride_bn + ranks[:, None] * stride_br
        b = tl.load(b_at, mask=rank_in[:, None] & col_in[None, :], other=0.0)
        h = narrow(h.to(tl.float32) * scale, DTYPE, EMULATE)
        b = narrow(b.to(tl.float32), DTYPE, EMULATE)
        if EMIT_DELTA:
            delta = dot(h, b, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION, EMULATE)
            acc += delta
        else:
            acc = dot(h, b, acc, PRECISION, EMULATE)
    elif EMIT_DELTA:
        delta = low_rank(
            tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), h_ptr, rows * R, row_in, b_ptr, cols, col_in, R, scale, 1,
            stride_bn, stride_br, DTYPE, BLOCK_R, PRECISION, EMULATE,
        )  # fmt: skip
        acc += delta
    else:
        acc = low_rank(
            acc, h_ptr, rows * R, row_in, b_ptr, cols, col_in, R, scale, 1, stride_bn, stride_br, DTYPE, BLOCK_R,
            PRECISION, EMULATE,
        )  # fmt: skip
    if EMIT_DELTA:
        tl.store(delta_ptr + y_at, narrow(delta, DTYPE, EMULATE), mask=inside)
    tl.store(y_ptr + y_at, narrow(acc, DTYPE, EMULATE), mask=inside)

    if COLUMNS > 1:
        mean, about = spread(acc, forgotten)
        store_columns(columns_ptr, block_m, cols, col_in, N, mean, 1)
        store_columns(columns_ptr, block_m, cols, col_in, N, about, 2)
    if HAS_KEPT:
        kept_row = ((rows // kept_div) % kept_mod) * stride_kept_p
        kept_at = kept_ptr + kept_row[:, None] + cols[None, :] * stride_kept_n
        tl.store(rows_ptr + block_n * M + rows, squared_error(acc, kept_at, retained, col_in), mask=row_in)
    if HAS_GOAL:
        if GOAL_ROWS:
            goal_row = ((rows // goal_div) % goal_mod) * stride_goal_p
            goal_at = goal_ptr + goal_row[:, None] + cols[None, :] * stride_goal_n
            error = squared_error(acc, goal_at, forgotten, col_in)
        else:  # a vector instead of a tile: what lets a 128 × 256 tile stay in registers
            goal = tl.load(goal_ptr + cols * stride_goal_n, mask=col_in, other=0.0).to(tl.float32)
            off = tl.where(forgotten[:, None] & col_in[None, :], acc - goal[None, :], 0.0)
            error = tl.sum(off * off, axis=1)
        tl.store(rows_ptr + (blocks_n + block_n) * M + rows, error, mask=row_in)


class Rows(NamedTuple):
    """A tensor that broadcasts over rows: row m is row `(m // div) % mod` of `values (P, N)`."""

    values: Tensor
    div: int
    mod: int


class LinearForward(NamedTuple):
    """What one launch leaves behind; a field that was not asked for is `None`.

    Attributes:
        output: y `(M, N)`.
        delta: Δ `(M, N)`.
        hidden: h `(M, R)`, in x's dtype.
        columns, counts: `(blocks, 3, N)` and `(blocks, 2)` fp32, for :mod:`rfa_fast.kernels.feature_mean`.
        retain_rows, forget_rows: squared errors `(blocks_n, M)` fp32, to be summed over the first axis.
    """

    output: Tensor
    delta: Tensor | None
    hidden: Tensor
    columns: Tensor | None
    counts: Tensor | None
    retain_rows: Tensor | None
    forget_rows: Tensor | None


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor | None,
    *,
    scale: float,
    group: Tensor | None = None,
    goal: Rows | None = None,
    kept: Rows | None = None,
    columns: int = NO_COLUMNS,
    emit_delta: bool = False,
    config: Config,
) -> LinearForward:
    """Launch :func:`linear_forward_kernel`.

    Args:
        hidden: h `(M, R)` contiguous, or `None` to compute it in the same kernel (needs R ≤ 64 and the
            fused route).
        goal, kept: x̃ and x'_t, where known; they and `columns` need `group (M,)`.
        columns: `NO_COLUMNS`, `MEAN` or `MEAN_AND_SPREAD`.
        config: block_m × block_n tiles of y, block_k deep. Its route "vendor" takes x' from cuBLAS or
            hipBLASLt and leaves the epilogue to the kernel.

    Returns:
        :class:`LinearForward`.
    """
    (m, k), (n, rank) = x.shape, lora_b.shape
    by_vendor = config.route == "vendor"
    fuse_down = hidden is None
    blocks_m, blocks_n = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    output = torch.nn.functional.linear(x, weight, bias) if by_vendor else x.new_empty((m, n))
    delta = x.new_empty((m, n)) if emit_delta else None
    hidden = x.new_empty((m, rank)) if hidden is None else hidden
    sums = x.new_empty((blocks_m, 3, n), dtype=torch.float32) if columns else None
    counts = x.new_empty((blocks_m, 2), dtype=torch.float32) if columns else None
    measured = goal is not None or kept is not None
    rows = x.new_empty((2, blocks_n, m), dtype=torch.float32) if measured else None
    aimed, held = goal or Rows(weight, 1, 1), kept or Rows(weight, 1, 1)
    launch(linear_forward_kernel)[(blocks_m * blocks_n,)](
        x_ptr=x, w_ptr=weight, bias_ptr=pointer(bias, x), a_ptr=lora_a, b_ptr=lora_b, h_ptr=hidden,
        group_ptr=pointer(group, x), goal_ptr=aimed.values, kept_ptr=held.values, y_ptr=output,
        delta_ptr=pointer(delta, x), columns_ptr=pointer(sums, x), counts_ptr=pointer(counts, x),
        rows_ptr=pointer(rows, x), M=m, N=n, K=k, R=rank, scale=scale, goal_div=aimed.div, goal_mod=aimed.mod,
        kept_div=held.div, kept_mod=held.mod, stride_xm=x.stride(0), stride_xk=x.stride(1),
        stride_wn=weight.stride(0), stride_wk=weight.stride(1), stride_ar=lora_a.stride(0), stride_ak=lora_a.stride(1),
        stride_bn=lora_b.stride(0), stride_br=lora_b.stride(1), stride_goal_p=aimed.values.stride(0),
        stride_goal_n=aimed.values.stride(1), stride_kept_p=held.values.stride(0), stride_kept_n=held.values.stride(1),
        HAS_PRODUCT=by_vendor, HAS_BIAS=bias is not None and not by_vendor, HAS_GROUP=group is not None,
        HAS_GOAL=goal is not None, GOAL_ROWS=aimed.values.shape[0] != 1,
        HAS_KEPT=kept is not None, COLUMNS=columns, EMIT_DELTA=emit_delta,
        FUSE_DOWN=fuse_down, EVEN_K=k % config.block_k == 0, PRECISION=precision(x.dtype, x.device), EMULATE=emulate(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=block_r(rank) if fuse_down else MIN_BLOCK_R,
        GROUP_M=config.group_m, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return LinearForward(
        output, delta, hidden, sums, counts,
        None if kept is None or rows is None else rows[0], None if goal is None or rows is None else rows[1],
    )  # fmt: skip
