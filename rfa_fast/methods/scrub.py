"""A student that disobeys its teacher about what is to go, and obeys it about what is kept, in turns.

The two aims pull against each other, so they are not summed but alternate by whole passes: away from
the teacher over the forget samples, then back to it over the retained ones. The teacher is the original
model: a forward pass per step, and no memory beyond the copy that the run keeps anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rfa_fast.loss import eval_behaviour
from rfa_fast.methods.base import Batch
from rfa_fast.methods.buffers import copy_tensors
from rfa_fast.methods.losses import cross_entropy, divergence
from rfa_fast.methods.options import Option, integer, number
from rfa_fast.methods.weights import WeightsMethod

_BEST = "rewind."  # prefix of the kept weights among the state's tensors
_ERROR = "rewind_error"


class SCRUB(WeightsMethod):
    """SCRUB (Kurmanji, Triantafillou, Hayes and Triantafillou, 2023, arXiv 2302.09880; V-A7).

        max pass:  L = −1/|D_f| Σ_{x ∈ D_f} d(x)
        min pass:  L = α/|D_r| Σ_{x ∈ D_r} d(x) + γ/|D_r| Σ_{(x, y) ∈ D_r} CE(f_θ(x), y)
        d(x) = T² KL(softmax(f_o(x) / T) ‖ softmax(f_θ(x) / T)),  f_o the original model

    Each of the first `max_epochs` epochs of a run is a max pass followed by a min pass, every further one a
    min pass. To the loop every pass is an epoch, in the history too: `epochs=1` makes two. A max pass goes once
    over D_f, in batches full of it; a min pass goes over D_r and leaves out the batches' forget samples.

    Options:
        max_epochs: epochs that begin with a max pass.
        temperature: T.
        alpha, gamma: weights of the min pass; the defaults are those of the authors' notebook for large-scale
            unlearning (github.com/meghdadk/SCRUB), which has T = 4 too. It makes 2 max and 3 min passes by SGD.
        rewind: go back, at the end, to the weights after that min pass whose error on the forget samples was
            closest to this (0 to 1): the error that unseen samples of their kind have, which a run does not
            know and the authors measure on a validation set. Costs one more copy of the trained weights and
            a pass over the forget samples after each min pass; reads their labels.
        targets, train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> SCRUB.passes(SCRUB.settings({}), epochs=3)
        4
    """

    name = "scrub"
    revision = 1
    reads_forget_labels = False
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **WeightsMethod.OPTIONS,
        "max_epochs": Option(1, integer(minimum=0)),
        "temperature": Option(4.0, number(minimum=0, above=True)),
        "alpha": Option(0.001, number(minimum=0)),
        "gamma": Option(0.99, number(minimum=0)),
        "rewind": Option(None, number(minimum=0, maximum=1, optional=True)),
    }

    @classmethod
    def passes(cls, options: Mapping[str, Any], epochs: int) -> int:
        """One for each epoch, and one more for each that begins with a max pass."""
        most: int = options["max_epochs"]
        return epochs + min(most, epochs)

    @classmethod
    def forget_passes(cls, options: Mapping[str, Any], epochs: int) -> frozenset[int]:
        """The max passes: every other pass, from the first, as long as there are max passes left."""
        return frozenset(range(0, 2 * min(options["max_epochs"], epochs), 2))

    @classmethod
    def uses_forget(cls, options: Mapping[str, Any], epoch: int) -> bool:
        """In the max passes alone; `rewind` measures on the samples to forget, beside the steps."""
        return epoch in cls.forget_passes(options, options["max_epochs"])

    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None:
        super().__init__(model, seed=seed, **options)
        self._maximises = False
        self._best: dict[str, Tensor] = {}

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Passes take turns, a max pass first."""
        self._maximises = epoch in self.forget_passes(self.options, epochs // 2)

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """The loss of the pass under way; the terms of the other one are 0."""
        names = ("forget_kl", "retain_kl", "retain_task")
        part = self._part(batch, batch.forget if self._maximises else ~batch.forget)
        if part is None:
            return self._no_step(batch, *names)
        rows, temperature = self._rows(part), self.options["temperature"]
        count = max(len(rows.labels), 1)
        teacher = self._reference_rows(part)
        kl = temperature**2 * divergence(rows.logits, teacher.logits, temperature).sum() / count
        zero = torch.zeros_like(kl)
        if self._maximises:
            return {"total": -kl, "forget_kl": kl, "retain_kl": zero, "retain_task": zero}
        task = cross_entropy(rows).sum() / count
        total = self.options["alpha"] * kl + self.options["gamma"] * task
        return {"total": total, "forget_kl": zero, "retain_kl": kl, "retain_task": task}

    def end_epoch(self, forget: Iterator[Batch], *, last: bool) -> None:
        """Keep these weights if their error is closer to the one wished for; at the end take the closest."""
        wished = self.options["rewind"]
        if wished is None:
            return
        error = None if self._maximises else self._error(forget)
        live = self._parameters | self._buffers
        best = float(self._best[_ERROR]) if self._best else math.inf
        if error is not None and abs(error - wished) < abs(best - wished):
            self._best = {_BEST + name: tensor.detach().clone() for name, tensor in live.items()}
            self._best[_ERROR] = torch.tensor(error, dtype=torch.float64)
        if last and self._best:
            copy_tensors(live, {name: self._best[_BEST + name] for name in live})

    def state_tensors(self) -> dict[str, Tensor]:
        """The trained parameters and the buffers, and those to go back to."""
        return {**super().state_tensors(), **self._best}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` returned."""
        mine = {name: tensor for name, tensor in tensors.items() if name == _ERROR or name.startswith(_BEST)}
        super().load_state_tensors({name: tensor for name, tensor in tensors.items() if name not in mine})
        live = self._parameters | self._buffers
        device = next(iter(live.values())).device
        self._best = {name: t if name == _ERROR else t.to(device, copy=True) for name, t in mine.items()}

    @torch.no_grad()
    def _error(self, forget: Iterator[Batch]) -> float:
        """Share of the forget rows that the model gets wrong, in eval behaviour."""
        wrong, count = 0, 0
        with eval_behaviour(self.model):
            for batch in forget:
                rows = self._rows(batch)
                wrong += int((rows.logits.argmax(-1) != rows.labels).sum())
                count += len(rows.labels)
        return wrong / max(count, 1)

    def _restore(self) -> None:
        super()._restore()
        self._best = {}
