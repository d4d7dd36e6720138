"""The retain term of residual mode, which never needs more than h and r × r numbers per group of the convolution.

With h (M, g·R) and the Gram matrices C = s² BᵀB (g, R, R), fp32::

    forward    ‖Δ_m‖² = Σ over groups of h_m C h_mᵀ                      on retain samples, 0 elsewhere
    backward   U = Σ over blocks of channels of U_block + w h C          w (B,): the sample's weight
               K = Hᵀ diag(w) H   (g, R, R)                              for dB += s² B K

The backward's kernel also sums what :mod:`rfa_fast.kernels.conv2d_gradient` left in parts, rounds U to what the
products that follow take it in, and puts it where they want it. In torch the same is a dozen passes over fp32
copies of h. Products are exact fp32: C is a square, and 16 bits of it would show in the gradient.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import emulate, launch, narrow, pointer
from rfa_fast.kernels.conv2d_forward import pixel
from rfa_fast.kernels.conv2d_geometry import pixel_stride
from rfa_fast.kernels.linear_gradient import PROGRAMS
from rfa_fast.kernels.tuning import Config
from torch import Tensor

RANKS = 16  # at a time: exact fp32 products keep their operands in registers


@triton.jit
def thin_rows(h_ptr, rows, row_in, first, R, stride, BLOCK_R: tl.constexpr):
    """BLOCK_R columns of h from `first` on, as fp32; `first` counts from the rows' own start."""
    ranks = first + tl.arange(0, BLOCK_R)
    at = h_ptr + rows[:, None] * stride + ranks[None, :]
    return tl.load(at, mask=row_in[:, None] & (ranks < R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def times_gram(h_ptr, gram_ptr, rows, row_in, ranks, R, stride, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns `ranks` of h C, fp32."""
    product = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for q0 in tl.range(0, R, BLOCK_R, num_stages=1):
        others = q0 + tl.arange(0, BLOCK_R)
        gram_at = gram_ptr + others[:, None] * R + ranks[None, :]
        gram = tl.load(gram_at, mask=(others < R)[:, None] & (ranks < R)[None, :], other=0.0)
        h = thin_rows(h_ptr, rows, row_in, q0, R, stride, BLOCK_R)
        product = tl.dot(h, gram, product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["M"])
def conv2d_retain_energy_kernel(
    h_ptr,  # (M, g·R)
    gram_ptr,  # (g, R, R) fp32: C
    group_ptr,  # (B,) int8
    energy_ptr,  # (M,) fp32
    M,
    R,
    PIXELS,
    GROUPS,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    sample, _, _, _ = pixel(first, PIXELS, PIXELS, BLOCK_M)
    row_in = rows < M
    kept = tl.load(group_ptr + sample, mask=row_in, other=-1) == 0
    energy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for part in range(GROUPS):
        own, gram = h_ptr + part * R, gram_ptr + part * R * R
        for r0 in range(0, R, BLOCK_R):
            ranks = r0 + tl.arange(0, BLOCK_R)
            product = times_gram(own, gram, rows, kept, ranks, R, GROUPS * R, BLOCK_M, BLOCK_R)
            energy += tl.sum(product * thin_rows(own, rows, kept, r0, R, GROUPS * R, BLOCK_R), axis=1)
    tl.store(energy_ptr + rows, tl.maximum(energy, 0.0), mask=row_in)


@triton.jit(do_not_specialize=["M", "chunk"])
def conv2d_retain_gradient_kernel(
    parts_ptr,  # (PARTS, M, g·R) fp32
    h_ptr,  # (M, g·R)
    gram_ptr,  # (g, R, R) fp32: C
    weight_ptr,  # (B,) fp32: w
    u_ptr,  # (B, g, R, H'·W')
    k_ptr,  # (chunks, g, R, R) fp32
    M,
    PARTS,
    R,
    PIXELS,
    GROUPS,
    chunk,
    stride_ub,
    stride_ug,
    stride_ur,
    stride_up,
    HAS_RETAIN: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    DTYPE: tl.constexpr = u_ptr.dtype.element_ty
    blocks_r = tl.cdiv(R, BLOCK_R)
    stretch, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = pair // (blocks_r * blocks_r)
    left, right = (pair // blocks_r) % blocks_r, pair % blocks_r
    ranks, others = right * BLOCK_R + tl.arange(0, BLOCK_R), left * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_in = ranks < R
    own = h_ptr + part * R
    seen = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    for first in range(stretch * chunk, tl.minimum(stretch * chunk + chunk, M), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        sample, place, _, _ = pixel(first, PIXELS, PIXELS, BLOCK_M)
        row_in = rows < M
        if HAS_RETAIN:
            weight = tl.load(weight_ptr + sample, mask=row_in, other=0.0)
            kept = row_in & (weight != 0.0)
            weighted = weight[:, None] * thin_rows(own, rows, kept, left * BLOCK_R, R, GROUPS * R, BLOCK_R)
            h = thin_rows(own, rows, kept, right * BLOCK_R, R, GROUPS * R, BLOCK_R)
            seen = tl.dot(tl.trans(weighted), h, seen, input_precision="ieee")
        if left == 0:
            thin = row_in[:, None] & rank_in[None, :]
            u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for p in range(PARTS):
                at = parts_ptr + ((p * M.to(tl.int64) + rows) * GROUPS + part)[:, None] * R + ranks[None, :]
                u += tl.load(at, mask=thin, other=0.0)
            if HAS_RETAIN:
                gram = gram_ptr + part * R * R
                u += weight[:, None] * times_gram(own, gram, rows, kept, ranks, R, GROUPS * R, BLOCK_M, BLOCK_R)
            row_at = u_ptr + sample * stride_ub + part * stride_ug + place.to(tl.int64) * stride_up
            tl.store(row_at[:, None] + ranks[None, :] * stride_ur, narrow(u, DTYPE, EMULATE), mask=thin)
    if HAS_RETAIN:
        k_at = k_ptr + ((stretch * GROUPS + part) * R + others[:, None]) * R + ranks[None, :]
        tl.store(k_at, seen, mask=(others < R)[:, None] & rank_in[None, :])


def gram_matrices(lora_b: Tensor, groups: int, scale: float) -> Tensor:
    """C = s² BᵀB `(g, R, R)` fp32 of B `(N, R, 1, 1)`.

    Example:
        >>> gram_matrices(torch.tensor([3.0, 4.0]).view(2, 1, 1, 1), 1, 2.0)
        tensor([[[100.]]])
    """
    up = lora_b.float().reshape(groups, -1, lora_b.shape[1])
    return scale**2 * (up.mT @ up)


def conv2d_retain_energy(hidden: Tensor, gram: Tensor, group: Tensor, *, pixels: int, config: Config) -> Tensor:
    """Launch :func:`conv2d_retain_energy_kernel`; `config` cuts block_m rows.

    Args:
        hidden: h `(B·pixels, g·R)` contiguous.
        gram: C, of :func:`gram_matrices`.
        group: int8 `(B,)`.

    Returns:
        ‖Δ‖² of each retain sample `(B,)` fp32, 0 for the others.
    """
    m, (groups, rank, _) = hidden.shape[0], gram.shape
    energy = torch.empty(m, dtype=torch.float32, device=hidden.device)
    if group.shape[0] > 0:
        launch(conv2d_retain_energy_kernel)[(triton.cdiv(m, config.block_m),)](
            h_ptr=hidden, gram_ptr=gram, group_ptr=group, energy_ptr=energy, M=m, R=rank, PIXELS=pixels, GROUPS=groups,
            BLOCK_M=config.block_m, BLOCK_R=RANKS, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return energy.view(group.shape[0], pixels).sum(1)


def conv2d_retain_gradient(
    parts: Tensor, hidden: Tensor, up: Tensor, gram: Tensor, weight: Tensor | None, *, config: Config
) -> Tensor | None:
    """Launch :func:`conv2d_retain_gradient_kernel`.

    Args:
        parts: `(P, M, g·R)` fp32, U in parts, of :func:`rfa_fast.kernels.conv2d_gradient.conv2d_gradient`.
        hidden: h `(M, g·R)` contiguous.
        up: `(B, g, R, H', W')` with dense pixels, where U goes.
        gram: C, of :func:`gram_matrices`.
        weight: w `(B,)` fp32, or `None` without a retain term: then U is only summed.
        config: block_m rows at a time.

    Returns:
        K `(g, R, R)` fp32, or `None`.
    """
    count, m, _ = parts.shape
    samples, groups, rank, height, width = up.shape
    pairs = groups * triton.cdiv(rank, RANKS) ** 2
    chunks = max(1, min(128, PROGRAMS // pairs))
    chunk = triton.cdiv(triton.cdiv(m, chunks), config.block_m) * config.block_m
    seen = None
    if weight is not None:
        seen = torch.empty((chunks, groups, rank, rank), dtype=torch.float32, device=hidden.device)
    if samples > 0:
        launch(conv2d_retain_gradient_kernel)[(chunks, pairs)](
            parts_ptr=parts, h_ptr=hidden, gram_ptr=gram, weight_ptr=pointer(weight, hidden), u_ptr=up,
            k_ptr=pointer(seen, hidden), M=m, PARTS=count, R=rank, PIXELS=height * width, GROUPS=groups, chunk=chunk,
            stride_ub=up.stride(0), stride_ug=up.stride(1), stride_ur=up.stride(2), stride_up=pixel_stride(up[:, 0]),
            HAS_RETAIN=weight is not None, EMULATE=emulate(), BLOCK_M=config.block_m, BLOCK_R=RANKS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    elif seen is not None:
        seen.zero_()
    return None if seen is None else seen.sum(0)
