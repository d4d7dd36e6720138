"""What reference models gave on the batches of a pass, held for the passes of the models measured after.

Of a text that is logits per token and outputs per layer, hundreds of kilobytes a token: more than is worth
writing to disk, and little beside running two more models for every row of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from rfa_fast.metrics.passes import Batch
from rfa_fast.prefix_cache import sample_keys

Role: TypeAlias = Literal["original", "retrained", "incompetent"]

KEPT_BYTES = 1 << 30
"""What :class:`KeptOutputs` holds at most by default."""


class Outputs(NamedTuple):
    """What one model gave on one batch.

    Attributes:
        rows: logits `(rows, C)` of what is to be predicted; `None` where only features are compared.
        features: layer -> its output, one tensor per call; empty where only logits are compared.
    """

    rows: Tensor | None
    features: dict[str, list[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        rows = [] if self.rows is None else [self.rows]
        return sum(t.nbytes for t in (*rows, *(call for calls in self.features.values() for call in calls)))


class KeptOutputs:
    """What the reference models gave, batch by batch, for the next model that is measured on the same subsets.

    For one set of references and subsets whose loaders give the same items in the same order: each batch is
    recognised by its subset, its place and its content. What does not fit is run again.

    Args:
        budget: bytes held at most, on the devices of the models; 0 holds nothing.

    Raises:
        ValueError: a budget below 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
        >>> kept = KeptOutputs()
        >>> from rfa_fast.metrics import References, evaluate_split
        >>> wanted = References(original=nn.Sequential(nn.Linear(3, 2)), layers=["0"], kept=kept)
        >>> _ = evaluate_split(nn.Sequential(nn.Linear(3, 2)), {"D_f": batches}, references=wanted)
        >>> kept.nbytes  # two items, two outputs of a layer in fp32
        16
    """

    def __init__(self, budget: int = KEPT_BYTES) -> None:
        if budget < 0:
            raise ValueError(f"budget: got {budget}, expected 0 bytes or more")
        self.budget, self.nbytes = budget, 0
        self._held: dict[tuple[Role, str, int], tuple[str, Outputs]] = {}

    def get(self, role: Role, subset: str, batch: Batch, *, rows: bool, layers: Sequence[str]) -> Outputs | None:
        """What a reference gave on a batch; `None` where that, or a part that is wanted now, is not held.

        Raises:
            ValueError: the batch has other inputs or labels than the one that was kept.
        """
        if (role, subset, batch.index) not in self._held:
            return None
        content, found = self._held[role, subset, batch.index]
        if content != _content(batch):
            raise ValueError(
                f"kept: got other items in batch {batch.index}, expected the same items in the same order "
                "(a loader that does not shuffle)"
            )
        complete = (found.rows is not None or not rows) and all(name in found.features for name in layers)
        return found if complete else None

    def put(self, role: Role, subset: str, batch: Batch, outputs: Outputs) -> None:
        """Hold what a reference gave, if it fits."""
        key = role, subset, batch.index
        if key not in self._held and self.nbytes + outputs.nbytes <= self.budget:
            self._held[key] = _content(batch), outputs
            self.nbytes += outputs.nbytes


def _content(batch: Batch) -> str:
    """A hash of a batch: items of one class have the same labels in any order."""
    return sample_keys({"inputs": batch.inputs, "labels": batch.labels}, 1)[0]
