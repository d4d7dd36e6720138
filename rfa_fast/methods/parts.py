"""Inputs and labels of a batch, in either of the two forms that a collate function gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Parts = tuple[Tensor | dict[str, Tensor], Tensor]


def parts(name: str, batch: Any) -> Parts:
    """Inputs and labels of what a loader or a `collate_fn` gave.

    Raises:
        TypeError: it is neither a pair nor a dict with `labels`.

    Example:
        >>> import torch
        >>> parts("retain", {"input_ids": torch.ones(1, 2), "labels": torch.tensor([3])})
        ({'input_ids': tensor([[1., 1.]])}, tensor([3]))
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"a dict with {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise TypeError(f"{name}: got {got} as a batch, expected (inputs, labels) or a dict with 'labels'")
