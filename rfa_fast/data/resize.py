"""Images at another size, scaled when they are taken.

A pretrained ViT takes 224 × 224 pixels. CIFAR-10 at that size would fill 36 GB; its images are kept as
they are, and each is scaled when a batch wants it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import ImageDataset
from rfa_fast.data.draws import integer


@dataclass(frozen=True)
class Resize:
    """Scale an image (C, H, W) to (C, size, size), bilinear and antialiased, after `before`.

    Example:
        >>> import torch
        >>> Resize(4)(torch.ones(3, 2, 2)).shape
        torch.Size([3, 4, 4])
    """

    size: int
    before: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """The image at its new size."""
        image = image if self.before is None else self.before(image)
        return F.interpolate(image[None], (self.size, self.size), mode="bilinear", antialias=True)[0]


def resized(data: DataBundle, size: int) -> DataBundle:
    """The same images shown at `size` × `size` pixels; nothing is copied, and `data` stays as it is.

    Raises:
        TypeError: a data set that does not hold its images in memory.
        ValueError: `size` below 1.

    Example:
        >>> from rfa_fast.data import load_digits
        >>> resized(load_digits(), 16).train[0][0].shape
        torch.Size([1, 16, 16])
    """
    integer("size", size, 1)
    parts: list[ImageDataset] = []
    for part in (data.train, data.test):
        if not isinstance(part, ImageDataset):
            raise TypeError(f"data: got {type(part).__name__}, expected ImageDataset; folders have an option `size`")
        shown = copy.copy(part)
        shown.transform = Resize(size, part.transform)
        parts.append(shown)
    note = f"scaled to {size} × {size} pixels when taken"
    return replace(data, train=parts[0], test=parts[1], notes=(*data.notes, note))
