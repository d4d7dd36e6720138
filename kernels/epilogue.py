"""What a tile does between its frozen product and the end: add Δ, store y, and measure it.

With the tile's frozen branch x' (rows, cols) in the fp32 accumulator::

    Δ = s · h Bᵀ        y = x' + Δ
    columns: Σ_retain x'          and, of y over the tile's forget rows, mean and Σ (y − mean)²
    rows:    ‖y − x̃‖² on forget rows            ‖y − x'_t‖² on retain rows

The columns route needs no x̃ beforehand: the spread about the tile's own mean is exact in fp32, and the
spreads of all tiles combine into Σ‖y − x̃‖² once x̃ is known (Chan, Golub and LeVeque's rule; see
:mod:`rfa_fast.kernels.feature_mean`). The textbook Σ y² − 2 x̃ Σ y + n x̃² would cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rfa_fast.kernels.common import dot, narrow


@triton.jit
def low_rank(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    h_ptr,  # (M, R)
    h_row,  # int64 (BLOCK_M,), element offset of each row of h
    row_in,
    b_ptr,  # (N, R)
    cols,
    col_in,
    R,
    scale,
    stride_hr,
    stride_bn,
    stride_br,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """acc + s · h Bᵀ, with both factors in DTYPE; the scale goes to h, which is the smaller."""
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        r_in = r < R
        h = tl.load(h_ptr + h_row[:, None] + r[None, :] * stride_hr, mask=row_in[:, None] & r_in[None, :], other=0.0)
        b_at = b_ptr + cols[None, :] * stride_bn + r[:, None] * stride_br
        b = tl.load(b_at, mask=r_in[:, None] & col_in[None, :], other=0.0)
        scaled = narrow(h.to(tl.float32) * scale, DTYPE, EMULATE)
        acc = dot(scaled, narrow(b.to(tl.float32), DTYPE, EMULATE), acc, PRECISION, EMULATE)
    return acc


@triton.jit
def store_columns(columns_ptr, block, cols, col_in, N, values, PLACE: tl.constexpr):
    """One of the three column statistics of a row block: `columns (blocks, 3, N)`."""
    tl.store(columns_ptr + (block * 3 + PLACE) * N + cols, values, mask=col_in)


@triton.jit
def spread(y, selected):
    """Mean of the selected rows of a tile and the sum of squares about it, per column."""
    count = tl.sum(selected.to(tl.float32), axis=0)
    chosen = tl.where(selected[:, None], y, 0.0)
    mean = tl.sum(chosen, axis=0) / tl.maximum(count, 1.0)
    off = tl.where(selected[:, None], y - mean[None, :], 0.0)
    return mean, tl.sum(off * off, axis=0)


@triton.jit
def squared_error(y, goal_at, selected, col_in):
    """Per row, ‖y − goal‖² over the tile's columns on the selected rows, 0 on the others."""
    read = selected[:, None] & col_in[None, :]
    goal = tl.load(goal_at, mask=read, other=0.0).to(tl.float32)
    off = tl.where(read, y - goal, 0.0)
    return tl.sum(off * off, axis=1)
