"""The down projection `h = x Aᵀ`: x (M, K), A (R, K) -> h (M, R).

One read of x. The tile is as narrow as the rank, so the product is bound by that read, and rows are cut
finely to have enough programs in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, precision
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def lora_down_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (R, K)
    h_ptr,  # (M, R)
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_K)
    row_in, rank_in = rows < M, ranks < R
    x_at = x_ptr + rows[:, None] * stride_xm + depth[None, :] * stride_xk
    a_at = a_ptr + ranks[None, :] * stride_ar + depth[:, None] * stride_ak
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        deep = depth < K - k0
        x = tl.load(x_at, mask=row_in[:, None] & deep[None, :], other=0.0)
        a = tl.load(a_at, mask=rank_in[None, :] & deep[:, None], other=0.0)
        acc = dot(x, narrow(a.to(tl.float32), DTYPE, EMULATE), acc, PRECISION, EMULATE)
        x_at += BLOCK_K * stride_xk
        a_at += BLOCK_K * stride_ak
    h_at = h_ptr + rows[:, None] * R + ranks[None, :]
    tl.store(h_at, narrow(acc, DTYPE, EMULATE), mask=row_in[:, None] & rank_in[None, :])


def lora_down(x: Tensor, lora_a: Tensor, *, config: Config) -> Tensor:
    """Launch :func:`lora_down_kernel`; `config` cuts block_m rows and block_k of the depth.

    Returns:
        h `(M, R)` contiguous, in x's dtype.
    """
    (m, k), rank = x.shape, lora_a.shape[0]
    hidden = x.new_empty((m, rank))
    ranks = block_r(rank)
    launch(lora_down_kernel)[(triton.cdiv(m, config.block_m), triton.cdiv(rank, ranks))](
        x_ptr=x, a_ptr=lora_a, h_ptr=hidden, M=m, K=k, R=rank, stride_xm=x.stride(0), stride_xk=x.stride(1),
        stride_ar=lora_a.stride(0), stride_ak=lora_a.stride(1), PRECISION=precision(x.dtype, x.device),
        EMULATE=emulate(), BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=ranks, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return hidden
