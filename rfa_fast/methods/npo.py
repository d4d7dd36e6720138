"""Negative preference: a forgotten sequence should be less likely than it was, and less so the further it is down.

The reference, the original model, costs a forward pass over the forget samples of every step, and no
memory beyond the copy that the run keeps anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from rfa_fast.methods.base import Batch
from rfa_fast.methods.graddiff import GradDiff
from rfa_fast.methods.losses import Rows, mean_where, sequence_log_probs
from rfa_fast.methods.options import Option, number


class NPO(GradDiff):
    """Negative preference optimization (Zhang, Lin, Bai and Mei, 2024, arXiv 2404.05868), with a retain term.

        L = −(2/β) w_f · E_{D_f}[log σ(−β log(π_θ(y|x) / π_ref(y|x)))] + w_r · CE(D_r)

    log π(y|x) is the sum over the labelled tokens of a sequence; the expectation is over sequences.

    Options:
        beta: β, 0.1 by default.
        forget_weight, retain_weight: w_f and w_r.
        targets, train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> NPO.settings({})["beta"]
        0.1
    """

    name = "npo"
    OPTIONS: ClassVar[Mapping[str, Option]] = {**GradDiff.OPTIONS, "beta": Option(0.1, number(minimum=0, above=True))}

    def forget_loss(self, batch: Batch, rows: Rows) -> Tensor:
        """−(2/β) E[log σ(−β log(π_θ / π_ref))] over the forget sequences that have a labelled token."""
        beta: float = self.options["beta"]
        ours, counts = sequence_log_probs(rows)
        asked = self._part(batch, batch.forget)
        if asked is None:
            return ours.new_zeros(())
        theirs, _ = sequence_log_probs(self._reference_rows(asked))
        ratio = ours[batch.forget] - theirs
        return -2 / beta * mean_where(F.logsigmoid(-beta * ratio), counts[batch.forget] > 0)
