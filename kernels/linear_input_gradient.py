"""dX of a linear layer in one product: `dX = G' W + U A`.

Shapes: G' (M, N), W (N, K), U (M, R), A (R, K), dX (M, K). With SELECT, G' lies in two places: rows that
the alignment loss changed in a buffer, the others in the upstream gradient. A row is chosen once, by its
base pointer, before the loop; inside it the loads are those of any matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rfa_fast.kernels.common import MIN_BLOCK_R, dot, emulate, launch, narrow, pointer, precision, swizzled
from rfa_fast.kernels.tuning import Config
from torch import Tensor

# Which rows lie in the buffer.
NONE, FORGET_ROWS, BOTH_GROUPS = 0, 1, 2


@triton.jit(do_not_specialize=["M"])
def linear_input_gradient_kernel(
    g_ptr,  # (M, N)
    changed_ptr,  # (M, N)
    group_ptr,  # (M,) int8
    w_ptr,  # (N, K)
    u_ptr,  # (M, R) fp32
    a_ptr,  # (R, K)
    dx_ptr,  # (M, K)
    M,
    N,
    K,
    R,
    stride_gm,
    stride_gn,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    SELECT: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    block_m, block_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, col_in = rows < M, cols < K
    inside = row_in[:, None] & col_in[None, :]
    dx_at = dx_ptr + rows[:, None] * K + cols[None, :]
    if HAS_PRODUCT:
        acc = tl.load(dx_at, mask=inside, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        base = g_ptr + rows * stride_gm
        if SELECT > 0:
            codes = tl.load(group_ptr + rows, mask=row_in, other=-1)
            differs = codes == 1
            if SELECT > 1:
                differs = codes >= 0
            base = tl.where(differs, changed_ptr + rows * N, base)
        depth = tl.arange(0, BLOCK_K)
        g_at = base[:, None] + depth[None, :] * stride_gn
        w_at = w_ptr + depth[:, None] * stride_wn + cols[None, :] * stride_wk
        for n0 in range(0, N, BLOCK_K):
            if EVEN_N:
                g = tl.load(g_at, mask=row_in[:, None], other=0.0)
                w = tl.load(w_at, mask=col_in[None, :], other=0.0)
            else:
                deep = depth < N - n0
                g = tl.load(g_at, mask=row_in[:, None] & deep[None, :], other=0.0)
                w = tl.load(w_at, mask=col_in[None, :] & deep[:, None], other=0.0)
            acc = dot(g, w, acc, PRECISION, EMULATE)
            g_at += BLOCK_K * stride_gn
            w_at += BLOCK_K * stride_wn
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = r0 + tl.arange(0, BLOCK_R)
        rank_in = ranks < R
        u_at = u_ptr + rows[:, None] * R + ranks[None, :]
        u = tl.load(u_at, mask=row_in[:, None] & rank_in[None, :], other=0.0)
        a_at = a_ptr + ranks[:, None] * stride_ar + cols[None, :] * stride_ak
        a = tl.load(a_at, mask=rank_in[:, None] & col_in[None, :], other=0.0)
        u = narrow(u, DTYPE, EMULATE)
        acc = dot(u, narrow(a.to(tl.float32), DTYPE, EMULATE), acc, PRECISION, EMULATE)
    tl.store(dx_at, narrow(acc, DTYPE, EMULATE), mask=inside)


def linear_input_gradient(
    grad: Tensor,
    changed: Tensor | None,
    group: Tensor | None,
    weight: Tensor,
    up: Tensor,
    lora_a: Tensor,
    *,
    select: int,
    config: Config,
) -> Tensor:
    """Launch :func:`linear_input_gradient_kernel`.

    Args:
        grad: G `(M, N)`; with `select` its columns must be adjacent.
        changed, group: the buffer and the codes; needed with `select`.
        up: U `(M, R)` fp32 contiguous.
        select: `NONE`, `FORGET_ROWS` or `BOTH_GROUPS`.
        config: block_m × block_n tiles of dX, block_k of the depth N. Its route "vendor" takes G'W from
            the vendor's library, for which `select` must be `NONE`.

    Returns:
        dX `(M, K)` in weight's dtype.
    """
    (m, n), k, rank = grad.shape, weight.shape[1], lora_a.shape[0]
    by_vendor = config.route == "vendor"
    dx = grad.to(weight.dtype) @ weight if by_vendor else weight.new_empty((m, k))
    launch(linear_input_gradient_kernel)[(triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),)](
        g_ptr=grad, changed_ptr=pointer(changed, grad), group_ptr=pointer(group, grad), w_ptr=weight, u_ptr=up,
        a_ptr=lora_a, dx_ptr=dx, M=m, N=n, K=k, R=rank, stride_gm=grad.stride(0), stride_gn=grad.stride(1),
        stride_wn=weight.stride(0), stride_wk=weight.stride(1), stride_ar=lora_a.stride(0), stride_ak=lora_a.stride(1),
        SELECT=select, HAS_PRODUCT=by_vendor, EVEN_N=n % config.block_k == 0,
        PRECISION=precision(weight.dtype, weight.device), EMULATE=emulate(), BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=MIN_BLOCK_R, GROUP_M=config.group_m,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dx
