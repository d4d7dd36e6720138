"""Two teachers for one student: a competent one for what is kept, an incompetent one for what is to go.

The competent teacher is the original model, and costs a forward pass over the retained rows. The
incompetent one is a randomly initialised network of the same kind: one copy of the whole model in
memory, and a forward pass over the forget rows. Neither is in a checkpoint: the original weights come
back with the model, the random ones with the seed (or the file).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rfa_fast.methods.base import Batch
from rfa_fast.methods.losses import Rows, divergence
from rfa_fast.methods.options import Option, number, weights_file
from rfa_fast.methods.start import initial_tensors
from rfa_fast.methods.weights import WeightsMethod


class BadT(WeightsMethod):
    """Bad teaching (Chundawat, Tarun, Mandal and Kankanhalli, 2023, arXiv 2205.08096; V-A7).

        L = 1/|B| Σ_{x ∈ B} [(1 − l) KL(T_s(x) ‖ S(x)) + l KL(T_d(x) ‖ S(x))]

    l = 1 for a forget sample; T_s the original model, T_d a random one, S the student, all at the same
    temperature. The mean is over the rows of the batch B as a whole, not per group.

    Options:
        retain_share: share of the retained samples that take part, 30 % by default: of every
            batch the first so many (the run has shuffled them), at least one. In one epoch that is a random
            subset of the data; in the next it is another.
        temperature: divides the logits.
        initial: a .safetensors file with the incompetent teacher's weights, instead of random ones.
        targets, train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> BadT.settings({})["retain_share"]
        0.3
    """

    name = "badt"
    reads_forget_labels = False
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **WeightsMethod.OPTIONS,
        "retain_share": Option(0.3, number(minimum=0, maximum=1, above=True)),
        "temperature": Option(1.0, number(minimum=0, above=True)),
        "initial": Option(None, weights_file),
    }

    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None:
        self._incompetent = initial_tensors(model, seed, self.settings(options)["initial"])
        super().__init__(model, seed=seed, **options)

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """Both divergences; `retain_kl` and `forget_kl` are each a mean over its own rows."""
        part = self._part(batch, self._used(batch.forget))
        if part is None:
            return self._no_step(batch, "retain_kl", "forget_kl")
        student = self._rows(part)
        retain, kept = self._divergence(part, student, ~part.forget, None)
        forget, gone = self._divergence(part, student, part.forget, self._incompetent)
        total = (retain + forget) / max(kept + gone, 1)
        return {"total": total, "retain_kl": retain / max(kept, 1), "forget_kl": forget / max(gone, 1)}

    def _divergence(
        self, batch: Batch, student: Rows, chosen: Tensor, weights: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, int]:
        """The sum over the chosen samples' rows of the divergence from a teacher, and how many rows there are."""
        asked = self._part(batch, chosen)
        if asked is None:
            return torch.zeros((), device=chosen.device), 0
        teacher = self._reference_rows(asked, weights)
        ours = student.logits[chosen[student.sample]]
        return divergence(ours, teacher.logits, self.options["temperature"]).sum(), len(ours)

    def _used(self, forget: Tensor) -> Tensor:
        """The samples of a batch that take part, bool `(B,)`."""
        kept = (~forget).nonzero().flatten()
        count = max(1, round(self.options["retain_share"] * len(kept)))
        used = forget.clone()
        used[kept[:count]] = True
        return used

    def _restore(self) -> None:
        super()._restore()
        self._incompetent = {}
