"""Cross-entropy of each row from one read of its logits: an online logsumexp, the label's logit, and z · ỹ.

Shapes: u (m, V) a chunk of logits, labels and group (m,), ỹ (V,). With z = u, or c · tanh(u / c) under a softcap::

    lse_i = log Σ_v exp z_iv = top_i + log Σ_v exp(z_iv − top_i),  top_i = max_v z_iv
    labelled retain row     loss_i = lse_i − z_i[label_i]
    labelled forget row     loss_i = lse_i · Σ_v ỹ_v − Σ_v ỹ_v z_iv        (only where ỹ is given)
    any other row           all are 0, and its logits are not read

The two parts of lse are kept apart, and the losses leave the kernel in place of the logits they are made of,
because here those are known relative to the row's maximum: the textbook differences would lose the digits
of a common offset. The factor Σỹ, 1 up to rounding, keeps a ỹ of zeros (no retain row yet) an exact 0.

Config: block_m rows (1 for a vocabulary) by block_n columns at a time.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import launch, pointer
from rfa_fast.kernels.tuning import Config
from torch import Tensor

UNLABELLED = tl.constexpr(-100)


@triton.jit
def soft_capped(u, cap):
    """cap · tanh(u / cap) to fp32 accuracy: Lambert's continued fraction near 0, where the exponential cancels."""
    x = u / cap
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return cap * tl.where(tl.abs(x) < 0.75, near, far)


@triton.jit
def row_roles(labels_ptr, group_ptr, rows, row_in):
    """The rows' labels, and which of them are labelled retain rows and labelled forget rows."""
    labels = tl.load(labels_ptr + rows, mask=row_in, other=UNLABELLED)
    codes = tl.load(group_ptr + rows, mask=row_in, other=-1)
    labelled = labels != UNLABELLED
    return labels, labelled & (codes == 0), labelled & (codes == 1)


@triton.jit(do_not_specialize=["M"])
def softmax_stats_kernel(
    u_ptr,  # (M, V)
    labels_ptr,  # (M,) int64
    group_ptr,  # (M,) int8
    soft_ptr,  # (V,) fp32: ỹ
    lse_ptr,  # (2, M) fp32: top, then the logarithm
    loss_ptr,  # (M,) fp32
    M,
    V,
    cap,
    stride_um,
    stride_uv,
    HAS_SOFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < M
    labels, kept, forgotten = row_roles(labels_ptr, group_ptr, rows, row_in)
    used = kept | forgotten if HAS_SOFT else kept
    u_row = u_ptr + rows[:, None] * stride_um

    # Everything is relative to `base`, the running maximum. It starts below every logit but −inf, for −inf − (−inf) is
    # no number, and from there on only rises, so that no factor overflows.
    base = tl.full((BLOCK_M,), -1e38, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    soft_mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    soft_z = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = used[:, None] & (cols < V)[None, :]
        z = tl.load(u_row + cols[None, :] * stride_uv, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = soft_capped(z, cap)
        z = tl.where(inside, z, float("-inf"))
        old = base
        base = tl.maximum(base, tl.max(z, axis=1))
        z -= base[:, None]
        total = total * tl.exp(old - base) + tl.sum(tl.exp(z), axis=1)
        if HAS_SOFT:
            wanted = forgotten[:, None] & (cols < V)[None, :]
            soft = tl.load(soft_ptr + cols[None, :] + rows[:, None] * 0, mask=wanted, other=0.0)
            # A class that ỹ rules out adds nothing, not even where its logit is −inf.
            soft_z += soft_mass * (old - base) + tl.sum(soft * tl.where(soft != 0.0, z, 0.0), axis=1)
            soft_mass += tl.sum(soft, axis=1)

    log_total = tl.log(tl.where(used, total, 1.0))
    readable = kept & (labels >= 0) & (labels < V)
    picked = tl.load(u_ptr + rows * stride_um + labels * stride_uv, mask=readable, other=0.0).to(tl.float32)
    if HAS_CAP:
        picked = soft_capped(picked, cap)
    loss = tl.where(kept, log_total - (picked - base), 0.0)
    if HAS_SOFT:
        loss = tl.where(forgotten, soft_mass * log_total - soft_z, loss)
    tl.store(lse_ptr + rows, tl.where(used, base, 0.0), mask=row_in)
    tl.store(lse_ptr + M + rows, log_total, mask=row_in)
    tl.store(loss_ptr + rows, loss, mask=row_in)


def softmax_stats(
    logits: Tensor,
    labels: Tensor,
    group: Tensor,
    soft_label: Tensor | None = None,
    *,
    softcap: float | None = None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`softmax_stats_kernel`.

    Args:
        logits: `(m, V)` bf16, fp16 or fp32, any strides.
        labels: int64 `(m,)`, −100 for none; read on retain rows only, where it must name a column.
        group: int8 `(m,)`.
        soft_label: ỹ fp32 `(V,)`; without it forget rows count as unlabelled.
        softcap: c.

    Returns:
        Both parts of lse, fp32 `(2, m)`, and loss, fp32 `(m,)`.

    Example:
        >>> from rfa_fast.kernels.tuning import candidates
        >>> usual = candidates("softmax_stats", "generic")[0]
        >>> lse, loss = softmax_stats(
        ...     torch.zeros(1, 4), torch.tensor([2]), torch.tensor([0], dtype=torch.int8), config=usual
        ... )
        >>> lse.squeeze(), loss  # log 4
        (tensor([0.0000, 1.3863]), tensor([1.3863]))
    """
    m, v = logits.shape
    lse = torch.empty((2, m), dtype=torch.float32, device=logits.device)
    loss = torch.empty((m,), dtype=torch.float32, device=logits.device)
    labels, group = labels.contiguous(), group.contiguous()
    soft = None if soft_label is None else soft_label.contiguous()
    launch(softmax_stats_kernel)[(triton.cdiv(m, config.block_m),)](
        u_ptr=logits, labels_ptr=labels, group_ptr=group, soft_ptr=pointer(soft, lse), lse_ptr=lse, loss_ptr=loss,
        M=m, V=v, cap=1.0 if softcap is None else float(softcap), stride_um=logits.stride(0),
        stride_uv=logits.stride(1), HAS_SOFT=soft is not None, HAS_CAP=softcap is not None, BLOCK_M=config.block_m,
        BLOCK_N=min(config.block_n, triton.next_power_of_2(v)), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return lse, loss
