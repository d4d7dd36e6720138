"""Gradient ascent on what is to be forgotten: the shortest way to forget it, and much else with it.

Nothing holds the rest of the model in place, so what this method needs is an early end: `until=` of
:func:`rfa_fast.unlearn`, few steps, or a small learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rfa_fast.methods.base import Batch
from rfa_fast.methods.losses import cross_entropy
from rfa_fast.methods.weights import WeightsMethod


class NegGrad(WeightsMethod):
    """Gradient ascent on the forget samples (Golatkar, Achille and Soatto, 2020, arXiv 1911.04933; V-A7).

        L = −1/|D_f| Σ_{(x, y) ∈ D_f} CE(f_θ(x), y)

    No retained sample goes through the model; a batch without forget samples makes no step.

    Example:
        >>> NegGrad.settings({})["train_mode"]
        True
    """

    name = "neggrad"

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """The negative mean cross-entropy of the forget rows."""
        part = self._part(batch, batch.forget)
        if part is None:
            return self._no_step(batch, "forget_task")
        rows = self._rows(part)
        task = cross_entropy(rows).sum() / max(len(rows.labels), 1)
        return {"total": -task, "forget_task": task}
