"""One read of the upstream gradient G gives G', U and dB of a linear layer.

Shapes: G, y (M, N), h (M, R), B (N, R), x̃ and x'_t broadcast over rows. With fp32 weights w per row::

    G' = G + w_forget (y − x̃) on forget rows, + w_retain (y − x'_t) on retain rows (teacher mode)
    U  = s · G' B        (M, R)              dB = s · G'ᵀ h        (N, R)

Only rows that differ from G are written, into a buffer of G's size: the product that follows picks the
row from the one or the other, and G itself, which belongs to autograd, stays as it is. y is read on those
rows alone. A program keeps a block of columns and walks down the rows: B, x̃ and dB stay in registers, and
what has to be summed over programs is U (blocks of columns) and dB (chunks of rows), both thin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, pointer, precision
from rfa_fast.kernels.linear_forward import Rows
from rfa_fast.kernels.tuning import Config
from torch import Tensor

PROGRAMS = 512  # enough to fill the largest GPUs a few times over


@triton.jit(do_not_specialize=["M", "chunk", "goal_div", "goal_mod", "kept_div", "kept_mod"])
def linear_gradient_kernel(
    g_ptr,  # (M, N)
    y_ptr,  # (M, N)
    h_ptr,  # (M, R)
    b_ptr,  # (N, R)
    group_ptr,  # (M,) int8
    forget_ptr,  # (M,) fp32: w_forget
    retain_ptr,  # (M,) fp32: w_retain
    goal_ptr,  # (P, N): x̃, row (m // goal_div) % goal_mod
    kept_ptr,  # (P', N): x'_t, addressed likewise
    changed_ptr,  # (M, N): G' where it is written
    u_ptr,  # (blocks_n, M, R) fp32
    db_ptr,  # (chunks, N, R) fp32
    M,
    N,
    R,
    chunk,
    scale,
    goal_div,
    goal_mod,
    kept_div,
    kept_mod,
    stride_gm,
    stride_gn,
    stride_bn,
    stride_br,
    stride_goal_p,
    stride_goal_n,
    stride_kept_p,
    stride_kept_n,
    HAS_GOAL: tl.constexpr,
    GOAL_ROWS: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    WRITE_ALL: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    block_n, part, block_rank = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = block_rank * BLOCK_R + tl.arange(0, BLOCK_R)
    col_in, rank_in = cols < N, ranks < R
    b_at = b_ptr + cols[:, None] * stride_bn + ranks[None, :] * stride_br
    b = tl.load(b_at, mask=col_in[:, None] & rank_in[None, :], other=0.0)
    b = narrow(b.to(tl.float32), DTYPE, EMULATE)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if HAS_GOAL and not GOAL_ROWS:
        vector = tl.load(goal_ptr + cols * stride_goal_n, mask=col_in, other=0.0).to(tl.float32)
    for step in range(tl.cdiv(chunk, BLOCK_M)):
        rows = part * chunk + step * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in = rows < M
        inside = row_in[:, None] & col_in[None, :]
        g = tl.load(g_ptr + rows[:, None] * stride_gm + cols[None, :] * stride_gn, mask=inside, other=0.0)
        if HAS_GOAL or HAS_KEPT:
            wide = g.to(tl.float32)
            codes = tl.load(group_ptr + rows, mask=row_in, other=-1)
            differs = codes == 1
            if HAS_KEPT:
                differs = codes >= 0
            read = differs[:, None] & col_in[None, :]
            y = tl.load(y_ptr + rows[:, None] * N + cols[None, :], mask=read, other=0.0).to(tl.float32)
            if HAS_GOAL:
                weight = tl.load(forget_ptr + rows, mask=codes == 1, other=0.0)
                if GOAL_ROWS:
                    goal_row = ((rows // goal_div) % goal_mod) * stride_goal_p
                    goal_at = goal_ptr + goal_row[:, None] + cols[None, :] * stride_goal_n
                    aim = tl.load(goal_at, mask=(codes == 1)[:, None] & col_in[None, :], other=0.0).to(tl.float32)
                    wide += weight[:, None] * (y - aim)
                else:
                    wide += weight[:, None] * (y - vector[None, :])
            if HAS_KEPT:
                weight = tl.load(retain_ptr + rows, mask=codes == 0, other=0.0)
                kept_row = ((rows // kept_div) % kept_mod) * stride_kept_p
                kept_at = kept_ptr + kept_row[:, None] + cols[None, :] * stride_kept_n
                aim = tl.load(kept_at, mask=(codes == 0)[:, None] & col_in[None, :], other=0.0).to(tl.float32)
                wide += weight[:, None] * (y - aim)
            g = narrow(wide, DTYPE, EMULATE)
            if block_rank == 0:
                write = inside if WRITE_ALL else read
                tl.store(changed_ptr + rows[:, None] * N + cols[None, :], g, mask=write)
        u = dot(g, b, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), PRECISION, EMULATE) * scale
        thin = row_in[:, None] & rank_in[None, :]
        tl.store(u_ptr + (block_n * M + rows[:, None]) * R + ranks[None, :], u, mask=thin)
        h = tl.load(h_ptr + rows[:, None] * R + ranks[None, :], mask=thin, other=0.0)
        db = dot(tl.trans(g), h, db, PRECISION, EMULATE)
    db_at = db_ptr + (part * N + cols[:, None]) * R + ranks[None, :]
    tl.store(db_at, db * scale, mask=col_in[:, None] & rank_in[None, :])


class LinearGradient(NamedTuple):
    """Attributes:
    changed: G' `(M, N)` where `whole`, else only the rows that differ; `None` if none can.
    up: U `(M, R)` fp32, without the retain term of residual mode.
    lora_b: dB `(N, R)` fp32, likewise.
    whole: whether every row of `changed` was written.
    """

    changed: Tensor | None
    up: Tensor
    lora_b: Tensor
    whole: bool


def linear_gradient(
    grad: Tensor,
    output: Tensor,
    hidden: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    group: Tensor | None,
    goal: Rows | None,
    forget_weight: Tensor | None,
    kept: Rows | None,
    retain_weight: Tensor | None,
    whole: bool,
    config: Config,
) -> LinearGradient:
    """Launch :func:`linear_gradient_kernel`.

    Args:
        grad: G `(M, N)`, any strides.
        output, hidden: y and h of the forward, contiguous.
        goal, forget_weight: x̃ and w_forget `(M,)` fp32, or neither.
        kept, retain_weight: x'_t and w_retain, or neither.
        whole: write every row of G', for a product that cannot pick rows.
        config: block_m rows at a time, block_n columns per program.

    Returns:
        :class:`LinearGradient`.
    """
    (m, n), rank = grad.shape, hidden.shape[1]
    blocks_n = triton.cdiv(n, config.block_n)
    ranks = block_r(rank)
    # A number of chunks that M has no part in: a batch of another size must not compile another kernel.
    chunks = max(1, min(32, PROGRAMS // blocks_n))
    chunk = triton.cdiv(triton.cdiv(m, chunks), config.block_m) * config.block_m
    moves = goal is not None or kept is not None
    changed = hidden.new_empty((m, n)) if moves else None
    up = torch.empty((blocks_n, m, rank), dtype=torch.float32, device=grad.device)
    down = torch.empty((chunks, n, rank), dtype=torch.float32, device=grad.device)
    aimed, held = goal or Rows(lora_b, 1, 1), kept or Rows(lora_b, 1, 1)
    launch(linear_gradient_kernel)[(blocks_n, chunks, triton.cdiv(rank, ranks))](
        g_ptr=grad, y_ptr=output, h_ptr=hidden, b_ptr=lora_b, group_ptr=pointer(group, hidden),
        forget_ptr=pointer(forget_weight, hidden), retain_ptr=pointer(retain_weight, hidden), goal_ptr=aimed.values,
        kept_ptr=held.values, changed_ptr=pointer(changed, hidden), u_ptr=up, db_ptr=down, M=m, N=n, R=rank,
        chunk=chunk, scale=scale, goal_div=aimed.div, goal_mod=aimed.mod, kept_div=held.div, kept_mod=held.mod,
        stride_gm=grad.stride(0), stride_gn=grad.stride(1), stride_bn=lora_b.stride(0), stride_br=lora_b.stride(1),
        stride_goal_p=aimed.values.stride(0), stride_goal_n=aimed.values.stride(1),
        stride_kept_p=held.values.stride(0), stride_kept_n=held.values.stride(1), HAS_GOAL=goal is not None,
        GOAL_ROWS=aimed.values.shape[0] != 1, HAS_KEPT=kept is not None, WRITE_ALL=whole,
        PRECISION=precision(hidden.dtype, hidden.device),
        EMULATE=emulate(), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=ranks, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return LinearGradient(changed, up.sum(0), down.sum(0), whole)
