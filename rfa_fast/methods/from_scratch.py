"""Retrain as a method of :func:`rfa_fast.unlearn`: new weights, and only what is kept to learn from.

The gold standard in the clothes of the others, so that it has their record, checkpoints and resuming.
It is one learning rate without warm-up; the paper's recipes with theirs (section V-A6) are
:func:`rfa_fast.methods.train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from rfa_fast.methods.buffers import copy_tensors
from rfa_fast.methods.finetune import Finetune
from rfa_fast.methods.options import Option, weights_file
from rfa_fast.methods.start import initial_tensors


class Retrain(Finetune):
    """Train from scratch on the retained samples alone (the RFA paper's section V-A7).

        θ₀ random,  L = 1/|D_r| Σ_{(x, y) ∈ D_r} CE(f_θ(x), y)

    Every parameter and buffer starts anew, drawn from the run's seed by the model's own rule, which
    :mod:`rfa_fast.methods.start` describes with its limits. `epochs` and `lr` are those of
    :func:`rfa_fast.unlearn`; its defaults are those of unlearning, and too few for this.

    Options:
        initial: a .safetensors file with the weights to start from, say pretrained ones.
        train_mode, shift_labels: as :class:`~rfa_fast.methods.weights.WeightsMethod`.

    Example:
        >>> Retrain.settings({})
        {'train_mode': True, 'shift_labels': None, 'initial': None}
    """

    name = "retrain"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **{name: option for name, option in Finetune.OPTIONS.items() if name != "targets"},
        "initial": Option(None, weights_file),
    }

    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None:
        start = initial_tensors(model, seed, self.settings(options)["initial"])
        super().__init__(model, seed=seed, **options)
        copy_tensors(self._parameters | self._buffers, start)

    def _trained(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    @contextmanager
    def original(self) -> Iterator[None]:
        """The weights from before."""
        live = self._parameters | self._buffers
        fresh = {name: tensor.detach().clone() for name, tensor in live.items()}
        copy_tensors(live, self._originals)
        try:
            yield
        finally:
            copy_tensors(self._parameters | self._buffers, fresh)
