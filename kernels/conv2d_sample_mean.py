"""The mean of the retain samples: x (B, C, H, W) -> (C, H, W) fp32.

The frozen branch is linear, so `x̃ = W ∗ mean(x_r) + b`: reading the retain half of x and convolving one
sample costs less than reading x' a second time wherever a layer has no fewer outputs than inputs. Samples of
other groups are masked out, not read.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rfa_fast.kernels.common import launch
from rfa_fast.kernels.conv2d_geometry import channels_last, memory_format
from rfa_fast.kernels.tuning import Config
from torch import Tensor


@triton.jit(do_not_specialize=["SAMPLES"])
def conv2d_sample_mean_kernel(
    x_ptr,  # (B, C, H, W)
    group_ptr,  # (B,) int8
    mean_ptr,  # (C, H, W) fp32, in the order of x
    SAMPLES,
    C,
    HEIGHT,
    WIDTH,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    place_in = places < C * HEIGHT * WIDTH
    if CHANNELS_LAST:
        c, pixel = places % C, places // C
    else:
        c, pixel = places // (HEIGHT * WIDTH), places % (HEIGHT * WIDTH)
    x_at = x_ptr + c * stride_xc + (pixel // WIDTH) * stride_xh + (pixel % WIDTH) * stride_xw
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    count = 0.0
    for first in range(0, SAMPLES, BLOCK_M):
        samples = first + tl.arange(0, BLOCK_M).to(tl.int64)
        kept = tl.load(group_ptr + samples, mask=samples < SAMPLES, other=-1) == 0
        read = kept[:, None] & place_in[None, :]
        x = tl.load(x_at[None, :] + samples[:, None] * stride_xb, mask=read, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
        count += tl.sum(kept.to(tl.float32), axis=0)
    tl.store(mean_ptr + places, total / tl.maximum(count, 1.0), mask=place_in)


def conv2d_sample_mean(x: Tensor, group: Tensor, *, config: Config) -> Tensor:
    """Launch :func:`conv2d_sample_mean_kernel`.

    Args:
        x: `(B, C, H, W)`, any strides.
        group: int8 `(B,)`: 0 retain.
        config: block_m samples at a time, block_n numbers of the mean per program.

    Returns:
        `(1, C, H, W)` fp32 in x's memory format; zeros without a retain sample.
    """
    samples, c, height, width = x.shape
    mean = torch.empty((1, c, height, width), dtype=torch.float32, device=x.device, memory_format=memory_format(x))
    launch(conv2d_sample_mean_kernel)[(triton.cdiv(c * height * width, config.block_n),)](
        x_ptr=x, group_ptr=group, mean_ptr=mean, SAMPLES=samples, C=c, HEIGHT=height, WIDTH=width,
        stride_xb=x.stride(0), stride_xc=x.stride(1), stride_xh=x.stride(2), stride_xw=x.stride(3),
        CHANNELS_LAST=channels_last(x), BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return mean
