"""Per row, `‖y − x̃‖²` over the forget rows: y (M, N) -> (M,) fp32, 0 on every other row.

For the unsquared norm without a target: each unit's root has to be taken of its whole sum, so the column
statistics that spare the squared norm a second look at y do not help, and the forget rows are read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import launch
from rfa_fast.kernels.epilogue import squared_error
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def row_error_kernel(
    y_ptr,  # (M, N)
    goal_ptr,  # (N,) fp32
    group_ptr,  # (M,) int8
    error_ptr,  # (M,) fp32
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < M
    forgotten = tl.load(group_ptr + rows, mask=row_in, other=-1) == 1
    error = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for n0 in range(0, N, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        col_in = cols < N
        read = forgotten[:, None] & col_in[None, :]
        y = tl.load(y_ptr + rows[:, None] * N + cols[None, :], mask=read, other=0.0).to(tl.float32)
        error += squared_error(y, goal_ptr + (rows * 0)[:, None] + cols[None, :], forgotten, col_in)
    tl.store(error_ptr + rows, error, mask=row_in)


def row_error(y: Tensor, goal: Tensor, group: Tensor, *, config: Config) -> Tensor:
    """Launch :func:`row_error_kernel`; `config` cuts block_m rows, block_n columns at a time.

    Args:
        y: `(M, N)` contiguous.
        goal: x̃ `(N,)` fp32.
        group: int8 `(M,)`.
    """
    m, n = y.shape
    error = torch.empty(m, dtype=torch.float32, device=y.device)
    launch(row_error_kernel)[(triton.cdiv(m, config.block_m),)](
        y_ptr=y, goal_ptr=goal, group_ptr=group, error_ptr=error, M=m, N=n, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return error
