"""Ascent on what is to go and descent on what is kept, as one loss; and the frame of NPO and SimNPO.

The three differ in one term, what is done about a forgotten sequence. Gradient difference lets its
likelihood fall without limit, which ends in a model that knows nothing; the other two put a bound to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from rfa_fast.methods.base import Batch
from rfa_fast.methods.losses import Rows, cross_entropy, mean_where
from rfa_fast.methods.options import Option, number
from rfa_fast.methods.weights import WeightsMethod


class GradDiff(WeightsMethod):
    """Gradient difference (Liu, Liu and Stone, 2022, arXiv 2203.12817; as in TOFU, arXiv 2401.06121).

        L = −w_f · CE(D_f) + w_r · CE(D_r)

    CE is the mean over the labelled tokens of the group (over its samples for a classifier).

    Options:
        forget_weight, retain_weight: w_f and w_r.
        targets, train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> GradDiff.settings({"retain_weight": 2})["retain_weight"]
        2.0
    """

    name = "graddiff"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **WeightsMethod.OPTIONS,
        "forget_weight": Option(1.0, number(minimum=0)),
        "retain_weight": Option(1.0, number(minimum=0)),
    }

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """`forget_loss` is the method's own term, `retain_task` the cross-entropy of what is kept."""
        rows = self._rows(batch)
        forget = self.forget_loss(batch, rows)
        retain = mean_where(cross_entropy(rows), ~rows.forget)
        total = self.options["forget_weight"] * forget + self.options["retain_weight"] * retain
        return {"total": total, "forget_loss": forget, "retain_task": retain}

    def forget_loss(self, batch: Batch, rows: Rows) -> Tensor:
        """What is done about the forget samples: a mean over their group, 0 without any; 0-dim.

        Args:
            batch: the batch.
            rows: what the model says of the whole of it.
        """
        return -mean_where(cross_entropy(rows), rows.forget)
