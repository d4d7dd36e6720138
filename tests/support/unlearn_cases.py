"""A small convolutional net, its images and settings for `unlearn`; for the tests of its course and its failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from rfa_fast.data import ImageDataset

CLASSES = 3


def net(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


LAYERS = ["0", "4", "6"]
OPTIONS: dict[str, Any] = {
    "targets": LAYERS, "rank": 2, "batch_size": 10, "forget_per_batch": 4, "lr": 1e-2, "progress": False
}  # fmt: skip
LOADED = {k: v for k, v in OPTIONS.items() if k not in ("batch_size", "forget_per_batch")}
unseen = pytest.mark.filterwarnings("ignore:unlearn. [0-9]+ forget samples were drawn:UserWarning")


def data(n: int = 41) -> tuple[ImageDataset, Subset[Any], Subset[Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 1, 6, 6, generator=generator)
    everything = ImageDataset(images, [i % CLASSES for i in range(n)], classes=("a", "b", "c"))
    forget = [i for i in range(n) if i % CLASSES == 1]
    return everything, Subset(everything, forget), Subset(everything, [i for i in range(n) if i % CLASSES != 1])
