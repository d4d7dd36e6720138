"""Tensors of a shape and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Case = Callable[[], object]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data.

    Example:
        >>> meta(2, 3).shape
        torch.Size([2, 3])
    """
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_image(*shape: int, dtype: torch.dtype = torch.float32, nchw: bool = False) -> Tensor:
    """Four axes, channels adjacent unless `nchw`."""
    layout = torch.contiguous_format if nchw else torch.channels_last
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
