"""Gradient of the rows' cross-entropies, and the column sums of their probabilities, from one read of the logits.

Shapes: u (m, V), lse (2, m) from :mod:`rfa_fast.kernels.softmax_stats`, ỹ (V,), w (m,). With z as there and
p = exp(z − lse)::

    labelled retain row     du_iv = w_i · (p_iv − [v = label_i]) · (1 − (z_iv / c)²)
    labelled forget row     du_iv = w_i · (p_iv · Σỹ − ỹ_v) · (1 − (z_iv / c)²)      (only where ỹ is given)
    any other row           du_iv = 0, and its logits are not read
    columns_v = Σ over labelled retain rows of p_iv

du may be written over u: each element is read and written by the same thread. The subtraction happens in
fp32, before the one rounding to u's dtype: of a confident row p − 1 is what remains, and p alone would
have rounded it away.

Column sums need many rows per program, or the partial sums would cost as much traffic as the logits; a
program walks block_m rows, block_k at a time, of block_n columns. No atomics: `(row blocks, V)` partial
sums, then one reduction.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import emulate, launch, narrow, pointer
from rfa_fast.kernels.softmax_stats import row_roles, soft_capped
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def softmax_gradient_kernel(
    u_ptr,  # (M, V)
    lse_ptr,  # (2, M) fp32: the row's maximum, then log Σ exp(z − maximum)
    labels_ptr,  # (M,) int64
    group_ptr,  # (M,) int8
    soft_ptr,  # (V,) fp32: ỹ
    mass_ptr,  # 0-dim fp32: Σỹ
    weights_ptr,  # (M,) fp32
    du_ptr,  # (M, V), may be u_ptr
    columns_ptr,  # (row blocks, V) fp32
    M,
    V,
    cap,
    stride_um,
    stride_uv,
    stride_dm,
    stride_dv,
    HAS_SOFT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_M: tl.constexpr,
):
    blocks_v = tl.cdiv(V, BLOCK_N)
    block_m = (tl.program_id(0) // blocks_v).to(tl.int64)
    block_v = (tl.program_id(0) % blocks_v).to(tl.int64)
    first = block_v * BLOCK_N
    lanes = tl.arange(0, BLOCK_N)
    cols = first + lanes
    col_in = cols < V
    if HAS_SOFT:
        soft = tl.load(soft_ptr + cols, mask=col_in, other=0.0)
        mass = tl.load(mass_ptr)
    if COLUMNS:
        share = tl.zeros((STEP_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, min(BLOCK_M, M - block_m * BLOCK_M), STEP_M):
        rows = block_m * BLOCK_M + step + tl.arange(0, STEP_M)
        row_in = rows < M
        labels, kept, forgotten = row_roles(labels_ptr, group_ptr, rows, row_in)
        used = kept | forgotten if HAS_SOFT and WRITE else kept
        top = tl.load(lse_ptr + rows, mask=row_in, other=0.0)
        log_total = tl.load(lse_ptr + M + rows, mask=row_in, other=0.0)
        inside = used[:, None] & col_in[None, :]
        u_at = u_ptr + rows[:, None] * stride_um + cols[None, :] * stride_uv
        z = tl.load(u_at, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = soft_capped(z, cap)
        p = tl.exp((z - top[:, None]) - log_total[:, None])
        if COLUMNS:
            share += tl.where(kept[:, None] & col_in[None, :], p, 0.0)
        if WRITE:
            hit = (lanes[None, :] == (labels - first).to(tl.int32)[:, None]) & kept[:, None]
            du = p - hit.to(tl.float32)
            if HAS_SOFT:
                du = tl.where(forgotten[:, None], p * mass - soft[None, :], du)
            if HAS_CAP:
                bent = z / cap
                du *= 1.0 - bent * bent
            if HAS_WEIGHTS:
                du *= tl.load(weights_ptr + rows, mask=row_in, other=0.0)[:, None]
            du = narrow(tl.where(inside, du, 0.0), du_ptr.dtype.element_ty, EMULATE)
            du_at = du_ptr + rows[:, None] * stride_dm + cols[None, :] * stride_dv
            tl.store(du_at, du, mask=row_in[:, None] & col_in[None, :])
    if COLUMNS:
        tl.store(columns_ptr + block_m * V + cols, tl.sum(share, axis=0), mask=col_in)


def softmax_gradient(
    logits: Tensor,
    lse: Tensor,
    labels: Tensor,
    group: Tensor,
    soft_label: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    softcap: float | None = None,
    in_place: bool = False,
    columns: bool = False,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """Launch :func:`softmax_gradient_kernel` for the gradient.

    Args:
        logits: `(m, V)` bf16, fp16 or fp32, any strides.
        lse: fp32 `(2, m)`, contiguous.
        labels, group, soft_label, softcap: as :func:`rfa_fast.kernels.softmax_stats.softmax_stats`.
        weights: w, fp32 `(m,)`; `None`: ones.
        in_place: write the gradient over `logits`.
        columns: also take the column sums.

    Returns:
        du `(m, V)` in the dtype of the logits (`logits` itself if `in_place`), and the column sums fp32
        `(V,)` or `None`.

    Example:
        >>> from rfa_fast.kernels.tuning import candidates
        >>> usual = candidates("softmax_gradient", "generic")[0]
        >>> labels, group = torch.tensor([2]), torch.tensor([0], dtype=torch.int8)
        >>> lse = torch.tensor([[0.0], [1.3863]])  # log 4
        >>> du, _ = softmax_gradient(torch.zeros(1, 4), lse, labels, group, config=usual)
        >>> du.round(decimals=4)
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    du = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    partial = _partial_sums(logits, config) if columns else None
    _launch(logits, lse, labels, group, soft_label, weights, softcap, du, partial, config)
    return du, None if partial is None else partial.sum(0)


def probability_sums(
    logits: Tensor, lse: Tensor, labels: Tensor, group: Tensor, *, softcap: float | None = None, config: Config
) -> Tensor:
    """Launch :func:`softmax_gradient_kernel` for the column sums alone; arguments as :func:`softmax_gradient`.

    Returns:
        fp32 `(V,)`, Σ p over the labelled retain rows; divided by their number it is ỹ.

    Example:
        >>> from rfa_fast.kernels.tuning import candidates
        >>> usual = candidates("softmax_gradient", "generic")[0]
        >>> labels, group = torch.tensor([2]), torch.tensor([0], dtype=torch.int8)
        >>> lse = torch.tensor([[0.0], [1.3863]])  # log 4
        >>> probability_sums(torch.zeros(1, 4), lse, labels, group, config=usual).round(decimals=4)
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    partial = _partial_sums(logits, config)
    _launch(logits, lse, labels, group, None, None, softcap, None, partial, config)
    return partial.sum(0)


def _partial_sums(logits: Tensor, config: Config) -> Tensor:
    m, v = logits.shape
    return torch.empty((triton.cdiv(m, config.block_m), v), dtype=torch.float32, device=logits.device)


def _launch(
    logits: Tensor,
    lse: Tensor,
    labels: Tensor,
    group: Tensor,
    soft_label: Tensor | None,
    weights: Tensor | None,
    softcap: float | None,
    du: Tensor | None,
    partial: Tensor | None,
    config: Config,
) -> None:
    """One launch that writes whichever of `du` and `partial` is there."""
    m, v = logits.shape
    soft = None if soft_label is None else soft_label.contiguous()
    mass = None if soft is None else soft.sum()
    weights = None if weights is None else weights.contiguous()
    target = pointer(du, logits)
    block_n = min(config.block_n, triton.next_power_of_2(v))
    launch(softmax_gradient_kernel)[(triton.cdiv(m, config.block_m) * triton.cdiv(v, block_n),)](
        u_ptr=logits, lse_ptr=lse, labels_ptr=labels.contiguous(), group_ptr=group.contiguous(),
        soft_ptr=pointer(soft, lse), mass_ptr=pointer(mass, lse), weights_ptr=pointer(weights, lse), du_ptr=target,
        columns_ptr=pointer(partial, lse), M=m, V=v, cap=1.0 if softcap is None else float(softcap),
        stride_um=logits.stride(0), stride_uv=logits.stride(1), stride_dm=target.stride(0),
        stride_dv=target.stride(1), HAS_SOFT=soft is not None, HAS_WEIGHTS=weights is not None,
        HAS_CAP=softcap is not None, WRITE=du is not None, COLUMNS=partial is not None, EMULATE=emulate(),
        BLOCK_M=config.block_m, BLOCK_N=block_n, STEP_M=config.block_k, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
