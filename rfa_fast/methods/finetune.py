"""Fine-tuning on what is kept: forgetting by neglect, and the price of an ordinary epoch of training.

The weakest of the baselines and the measure of cost: a method that takes longer than this has to be
compared with training on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rfa_fast.methods.base import Batch
from rfa_fast.methods.losses import cross_entropy
from rfa_fast.methods.weights import WeightsMethod


class Finetune(WeightsMethod):
    """Fine-tuning on the retained samples alone (the RFA paper's section V-A7).

        L = 1/|D_r| Σ_{(x, y) ∈ D_r} CE(f_θ(x), y)

    No forget sample goes through the model.

    Example:
        >>> Finetune.settings({"targets": "deep"})
        {'targets': 'deep', 'train_mode': True, 'shift_labels': None}
    """

    name = "finetune"
    reads_forget_labels = False

    @classmethod
    def uses_forget(cls, options: Mapping[str, Any], epoch: int) -> bool:
        """Never."""
        return False

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """The mean cross-entropy of the retained rows."""
        part = self._part(batch, ~batch.forget)
        if part is None:
            return self._no_step(batch, "retain_task")
        rows = self._rows(part)
        task = cross_entropy(rows).sum() / max(len(rows.labels), 1)
        return {"total": task, "retain_task": task}
