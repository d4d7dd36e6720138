"""NPO without a reference: the likelihood of a sequence is measured by its length instead of by the original model.

That spares the forward pass of the reference, and long sequences no longer weigh more than short ones.
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


class SimNPO(GradDiff):
    """Simple NPO (Fan, Liu, Lin, Jia, Zhang, Mei and Liu, 2024, arXiv 2410.07163), with a retain term.

        L = −(2/β) w_f · E_{D_f}[log σ(−β (log π_θ(y|x) / |y| + γ))] + w_r · CE(D_r)

    |y| is the number of labelled tokens of a sequence, over which log π(y|x) is summed. The margin γ is inside of β,
    as in the authors' code (github.com/OPTML-Group/Unlearn-Simple), by whose TOFU runs the defaults are: β = 4.5,
    γ = 0 and a forget term that weighs an eighth.

    Options:
        beta, gamma: β and γ, the margin, in nats per token.
        forget_weight, retain_weight: w_f and w_r.
        targets, train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> SimNPO.settings({})["gamma"]
        0.0
    """

    name = "simnpo"
    revision = 1
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **GradDiff.OPTIONS,
        "forget_weight": Option(0.125, number(minimum=0)),
        "beta": Option(4.5, number(minimum=0, above=True)),
        "gamma": Option(0.0, number()),
    }

    def forget_loss(self, batch: Batch, rows: Rows) -> Tensor:
        """−(2/β) E[log σ(−β (log π_θ / |y| + γ))] over the forget sequences that have a labelled token."""
        beta: float = self.options["beta"]
        sums, counts = sequence_log_probs(rows)
        per_token = sums / counts.clamp(min=1)
        inside = -beta * (per_token + self.options["gamma"])
        return -2 / beta * mean_where(F.logsigmoid(inside), batch.forget & (counts > 0))
