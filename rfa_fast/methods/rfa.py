"""Residual Feature Alignment as a method of :func:`rfa_fast.unlearn`.

Nothing but glue: the objective is in :mod:`rfa_fast.objective`, the layers in
:mod:`rfa_fast.modules`. Options are those of :func:`rfa_fast.patch`; only `targets` differs, which is
`"all"` here, the placement of the paper's main experiments (section V-A).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.config import RFAConfig
from rfa_fast.methods.base import Batch, Method
from rfa_fast.patching import patch


class RFAMethod(Method):
    """RFA in residual or teacher mode, with LoRA, PiSSA or DoRA adapters.

    Example:
        >>> RFAMethod.settings({"rank": 4, "mode": "teacher"})["targets"]
        'all'
    """

    name = "rfa"
    reads_forget_labels = False  # ỹ stands in for them (eq. 3)
    trains = "adapters"

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The complete options, JSON-safe; see :meth:`rfa_fast.methods.base.Method.settings`."""
        rest = {k: v for k, v in options.items() if k != "targets"}
        config = RFAConfig.from_dict(rest).to_dict()
        del config["seed"]  # the run's own
        return {"targets": _describe(options.get("targets", "all")), **config}

    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None:
        values = {"targets": "all", "seed": seed, **options}
        self.handle = self.rfa = patch(model, **values)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """A and B (and DoRA's magnitude) of every adapted layer."""
        return self.rfa.named_parameters()

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """Eq. 6 and its parts."""
        return self.rfa.loss(batch.inputs, batch.labels, batch.forget)._asdict()

    def state_tensors(self) -> dict[str, Tensor]:
        """Adapters, and the x̃ and ỹ that a batch without retain samples falls back on."""
        return self.rfa.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` returned."""
        self.rfa.load_state_tensors(dict(tensors))

    def volatile_tensors(self) -> dict[str, Tensor]:
        """The x̃ and ỹ of the last batch that had retain samples."""
        trained = self.rfa.named_parameters()
        return {k: v for k, v in self.rfa.state_tensors().items() if k not in trained}

    def original(self) -> AbstractContextManager[None]:
        """The adapters switched off."""
        return self.rfa.disabled()

    def layers(self) -> list[str]:
        """The adapted layers."""
        return list(self.rfa.names)

    def not_finite(self) -> list[str]:
        """Adapted layers whose alignment loss is NaN or infinite."""
        losses = self.rfa.layer_losses()
        return [name for name, terms in losses.items() if not all(bool(torch.isfinite(t).all()) for t in terms)]

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's format."""
        self.rfa.save(folder)

    def merge(self, dtype: torch.dtype | None) -> dict[str, float]:
        """W' = W + s·BA; returns each layer's rounding error relative to ‖sBA‖."""
        self.handle = None
        return self.rfa.merge(dtype)

    def remove(self) -> None:
        """Take the adapters off."""
        self.handle = None
        self.rfa.remove()


def _describe(targets: object) -> Any:
    if isinstance(targets, str):
        return targets
    if isinstance(targets, Sequence):
        return list(targets)
    if callable(targets):
        return f"callable {getattr(targets, '__qualname__', type(targets).__qualname__)}"
    raise TypeError(f"targets: got {targets!r}, expected a name, a regex, a list of names or a callable")
