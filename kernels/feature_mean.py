"""x̃ and Σ‖y − x̃‖² from the column statistics that the tiles left behind.

Per column, over row blocks p with retain sums S_p, and forget counts n_p, means μ_p, spreads Q_p::

    x̃ = Σ_p S_p / Σ_p n_retain,p           Σ_forget (y − x̃)² = Σ_p Q_p + n_p (μ_p − x̃)²

The second is Chan, Golub and LeVeque's combination of partial variances (1979) about a given point: a
sum of non-negative terms, so that nothing cancels. Reads columns (P, 3, N) once for the mean and its
last two thirds once more for the loss: P is rows / block_m, a hundredth of y.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rfa_fast.kernels.common import launch, pointer
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["P"])
def feature_mean_kernel(
    columns_ptr,  # (P, 3, N) fp32: retain sum, forget mean, forget spread
    counts_ptr,  # (P, 2) fp32: retain and forget rows
    fallback_ptr,  # (N,) fp32: x̃ where there is no retain row
    known_ptr,  # () bool: whether the fallback is one
    mean_ptr,  # (N,) fp32
    loss_ptr,  # (blocks_n,) fp32
    P,
    N,
    WITH_LOSS: tl.constexpr,
    HAS_FALLBACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = cols < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    rows = 0.0
    for p in range(P):
        total += tl.load(columns_ptr + p * 3 * N + cols, mask=col_in, other=0.0)
        rows += tl.load(counts_ptr + p * 2)
    mean = total / tl.maximum(rows, 1.0)
    known = tl.where(rows > 0.0, 1, 0)
    if HAS_FALLBACK:
        mean = tl.where(rows > 0.0, mean, tl.load(fallback_ptr + cols, mask=col_in, other=0.0))
        known = known | tl.load(known_ptr).to(tl.int32)
    tl.store(mean_ptr + cols, mean, mask=col_in)
    if WITH_LOSS:
        loss = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for p in range(P):
            count = tl.load(counts_ptr + p * 2 + 1)
            centre = tl.load(columns_ptr + (p * 3 + 1) * N + cols, mask=col_in, other=0.0)
            about = tl.load(columns_ptr + (p * 3 + 2) * N + cols, mask=col_in, other=0.0)
            off = centre - mean
            loss += about + count * off * off
        # Without a retain row, now or before, there is no x̃, and the loss is an exact 0.
        tl.store(loss_ptr + block, tl.where(known > 0, tl.sum(loss, axis=0), 0.0))


def feature_mean(
    columns: Tensor,
    counts: Tensor,
    *,
    fallback: Tensor | None = None,
    fallback_known: Tensor | None = None,
    with_loss: bool,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """Launch :func:`feature_mean_kernel`.

    Args:
        columns, counts: `(P, 3, N)` and `(P, 2)` fp32, of :func:`rfa_fast.kernels.linear_forward.linear_forward`.
        fallback, fallback_known: `(N,)` fp32 and a 0-dim bool: the x̃ of an earlier batch, for one without
            retain rows; or neither.
        with_loss: also combine the spreads.
        config: block_n columns per program.

    Returns:
        x̃ `(N,)` fp32, zeros where it is not known; and the forget sum of each program, or `None`.
    """
    parts, _, n = columns.shape
    blocks = triton.cdiv(n, config.block_n)
    mean = columns.new_empty(n)
    loss = columns.new_empty(blocks) if with_loss else None
    launch(feature_mean_kernel)[(blocks,)](
        columns_ptr=columns, counts_ptr=counts, fallback_ptr=pointer(fallback, columns),
        known_ptr=pointer(fallback_known, columns), mean_ptr=mean, loss_ptr=pointer(loss, columns), P=parts, N=n,
        WITH_LOSS=with_loss, HAS_FALLBACK=fallback is not None, BLOCK_N=config.block_n,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return mean, loss
