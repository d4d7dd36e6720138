"""`dA = Uᵀ x`: U (M, R), x (M, K) -> dA (R, K) fp32.

One read of x. A program keeps a block of columns for a chunk of the rows; chunks are summed afterwards, in
a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import block_r, dot, emulate, launch, narrow, precision
from rfa_fast.kernels.linear_gradient import PROGRAMS
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["M", "chunk"])
def lora_a_gradient_kernel(
    u_ptr,  # (M, R) fp32
    x_ptr,  # (M, K)
    da_ptr,  # (chunks, R, K) fp32
    M,
    K,
    R,
    chunk,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    part = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    col_in, rank_in = cols < K, ranks < R
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for step in range(tl.cdiv(chunk, BLOCK_M)):
        rows = part * chunk + step * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in = rows < M
        x_at = x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk
        x = tl.load(x_at, mask=row_in[:, None] & col_in[None, :], other=0.0)
        u_at = u_ptr + rows[None, :] * R + ranks[:, None]
        u = tl.load(u_at, mask=rank_in[:, None] & row_in[None, :], other=0.0)
        acc = dot(narrow(u, DTYPE, EMULATE), x, acc, PRECISION, EMULATE)
    da_at = da_ptr + (part * R + ranks[:, None]) * K + cols[None, :]
    tl.store(da_at, acc, mask=rank_in[:, None] & col_in[None, :])


def lora_a_gradient(up: Tensor, x: Tensor, *, config: Config) -> Tensor:
    """Launch :func:`lora_a_gradient_kernel`; `config` cuts block_m rows at a time, block_k columns per program.

    Args:
        up: U `(M, R)` fp32 contiguous.
        x: `(M, K)`, any strides.
    """
    (m, k), rank = x.shape, up.shape[1]
    blocks_k = triton.cdiv(k, config.block_k)
    chunks = max(1, min(32, PROGRAMS // blocks_k))
    chunk = triton.cdiv(triton.cdiv(m, chunks), config.block_m) * config.block_m
    ranks = block_r(rank)
    parts = torch.empty((chunks, rank, k), dtype=torch.float32, device=x.device)
    launch(lora_a_gradient_kernel)[(blocks_k, chunks, triton.cdiv(rank, ranks))](
        u_ptr=up, x_ptr=x, da_ptr=parts, M=m, K=k, R=rank, chunk=chunk, stride_xm=x.stride(0), stride_xk=x.stride(1),
        PRECISION=precision(x.dtype, x.device), EMULATE=emulate(), BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        BLOCK_R=ranks, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return parts.sum(0)
