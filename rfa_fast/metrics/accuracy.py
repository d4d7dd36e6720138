"""Accuracy, overall and per class: one pass each, for callers that want a single number.

Whoever wants several figures of the same items takes :func:`~rfa_fast.metrics.predictions.predict`
once and reads them off its result instead.
"""

from __future__ import annotations

from torch import nn

from rfa_fast.metrics.passes import Loader, Progress
from rfa_fast.metrics.predictions import predict


def accuracy(model: nn.Module, loader: Loader, *, progress: Progress | None = None) -> float:
    """Share in [0, 1] of the items whose arg-max is the label (section V-A5).

    Args:
        model, loader, progress: as for :func:`~rfa_fast.metrics.predictions.predict`, which also lists
            the errors. Texts with a label per token count when every label is right.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
        >>> round(accuracy(nn.Identity(), [(logits, torch.tensor([0, 1, 1]))]), 4)
        0.6667
    """
    return predict(model, loader, progress=progress).accuracy


def per_class_accuracy(
    model: nn.Module, loader: Loader, n_classes: int, *, progress: Progress | None = None
) -> list[float]:
    """Accuracy in [0, 1] of each of the `n_classes` classes; NaN for a class without an item.

    Raises:
        ValueError: a label that is not below `n_classes`, labels per token, and what
            :func:`~rfa_fast.metrics.predictions.predict` raises.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
        >>> per_class_accuracy(nn.Identity(), [(logits, torch.tensor([0, 1, 1]))], 3)
        [1.0, 0.5, nan]
    """
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < 1:
        raise ValueError(f"n_classes: got {n_classes!r}, expected an integer >= 1")
    return predict(model, loader, progress=progress).per_class_accuracy(n_classes)
