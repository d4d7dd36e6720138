"""Random labels for what is to go, on the weights that it matters to and no others.

Which those are is asked once, before the first step: the gradient of the forget samples' loss at the
original weights, its larger half. That is a pass over the forget samples, forward and backward, and a
mask of one byte per trained weight, in checkpoints too, because a gradient on a GPU is not the same twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rfa_fast.loss import eval_behaviour
from rfa_fast.methods.base import Batch
from rfa_fast.methods.losses import cross_entropy, mean_where
from rfa_fast.methods.options import Option, number
from rfa_fast.methods.weights import WeightsMethod

_MASK = "mask."  # prefix of the masks among the state's tensors


class SalUn(WeightsMethod):
    """Saliency unlearning (Fan, Liu, Zhang, Wong, Wei and Liu, 2024, arXiv 2310.12508), for classifiers.

        m = 1[|∇_θ CE(D_f)| ≥ q],  θ = m ⊙ (θ_o + Δθ) + (1 − m) ⊙ θ_o
        L = E_{(x, y) ∈ D_f, y′ ≠ y}[CE(f_θ(x), y′)] + α E_{(x, y) ∈ D_r}[CE(f_θ(x), y)]

    The threshold q is one for all trained weights, and a weight without any gradient is never inside; y′ is
    drawn anew for every batch, evenly from the other classes. Weights outside the mask keep their bits: weight
    decay does not reach them either.

    Options:
        saliency: share of the trained weights inside the mask; 0.5 makes q the median.
        alpha: weight of the retained samples.
        targets, train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> SalUn.settings({})["saliency"]
        0.5
    """

    name = "salun"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **WeightsMethod.OPTIONS,
        "saliency": Option(0.5, number(minimum=0, maximum=1, above=True)),
        "alpha": Option(1.0, number(minimum=0)),
    }

    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None:
        super().__init__(model, seed=seed, **options)
        self._masks: dict[str, Tensor] = {}
        self._hooks: list[Any] = [
            p.register_hook(self._masked(name))  # type: ignore[no-untyped-call]
            for name, p in self._parameters.items()
        ]

    def prepare(self, forget: Iterator[Batch]) -> None:
        """Work out the mask from everything that is to be forgotten."""
        parameters = list(self._parameters.values())
        sums = [torch.zeros_like(p) for p in parameters]
        with eval_behaviour(self.model):
            for batch in forget:
                loss = cross_entropy(self._rows(batch)).sum()
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                for total, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        total += gradient
        sizes = torch.cat([total.abs().flatten().float() for total in sums])
        outside = len(sizes) - max(1, round(self.options["saliency"] * len(sizes)))
        threshold = sizes.kthvalue(outside + 1).values
        masks = [(total != 0) & (total.abs().float() >= threshold) for total in sums]
        self._masks = dict(zip(self._parameters, masks, strict=True))

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """Both cross-entropies; `forget_task` is against the random labels.

        Raises:
            ValueError: labels per token, or a model with a single class.
        """
        if batch.labels.ndim != 1:
            raise ValueError(f"salun: got labels {tuple(batch.labels.shape)}, expected (B,): it is for classifiers")
        rows = self._rows(batch)
        classes = rows.logits.shape[-1]
        if classes < 2:
            raise ValueError(f"salun: got a model with {classes} class, expected two or more to draw labels from")
        # On the CPU, whose generator the run seeds for every batch, so that all devices draw the same.
        other = torch.randint(1, classes, (len(rows.labels),)).to(rows.labels.device)
        labels = torch.where(rows.forget, (rows.labels + other) % classes, rows.labels)
        losses = cross_entropy(rows, labels)
        forget, retain = mean_where(losses, rows.forget), mean_where(losses, ~rows.forget)
        return {"total": forget + self.options["alpha"] * retain, "forget_task": forget, "retain_task": retain}

    @torch.no_grad()
    def end_step(self) -> None:
        """Weights outside the mask are put back: weight decay reaches them without a gradient."""
        for name, parameter in self._parameters.items():
            if name in self._masks:
                parameter.copy_(torch.where(self._masks[name], parameter, self._originals[name]))

    def state_tensors(self) -> dict[str, Tensor]:
        """The trained parameters and the buffers, and the mask."""
        return {**super().state_tensors(), **{_MASK + name: mask for name, mask in self._masks.items()}}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` returned."""
        masks = {name.removeprefix(_MASK): t for name, t in tensors.items() if name.startswith(_MASK)}
        super().load_state_tensors({name: t for name, t in tensors.items() if not name.startswith(_MASK)})
        self._masks = {name: mask.to(self._parameters[name].device, torch.bool) for name, mask in masks.items()}

    def _masked(self, name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            return gradient * self._masks[name] if name in self._masks else gradient

        return hook

    def _restore(self) -> None:
        super()._restore()
        for hook in self._hooks:
            hook.remove()
        self._masks = {}
