"""What an unlearning method is to the loop, and what a step is to everyone.

The loop of :mod:`rfa_fast.methods.unlearn` owns data, optimizer, checkpoints and the record; a
method owns the loss and the tensors that training changes. Seeing no more of each other than this
page is what keeps a method one short file, at the price that a method cannot bring an optimizer of
its own. Most methods are a loss and nothing else; the few that need more of a run (a look at what is to
be forgotten, phases, a choice among epochs) find the places for it at the end of :class:`Method`, where
every default does nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

StepRecord: TypeAlias = dict[str, Any]
"""One step: `step` (from 1), `epoch` (from 1), the loss's fields, `grad_norm`, `lr`, `retain` and
`forget` (samples of each in the batch), `seconds` since the run began."""


class Batch(NamedTuple):
    """One batch on the model's device.

    Attributes:
        inputs: tensor `(B, …)`, or a transformers model's keyword dict of tensors.
        labels: `(B,)` or `(B, T)` int64.
        forget: bool `(B,)`, true for the samples to forget.
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor
    forget: Tensor


class Method(ABC):
    """An unlearning method applied to one model.

    Constructing it prepares the model (`__init__(self, model, *, seed, **options)`); after that the
    loop calls the rest. A method that cannot be prepared raises and leaves the model as it was.
    """

    name: ClassVar[str]
    reads_forget_labels: ClassVar[bool] = True
    revision: ClassVar[int] = 0
    """Raised by 1 when the same options come to mean another computation: figures kept of the earlier one are stale."""
    trains: ClassVar[str] = "weights"
    """What a step changes, in the words of a message."""
    handle: object | None = None
    """What the caller may keep working with when nothing was merged; for RFA the `RFA`, else the method itself."""

    @classmethod
    @abstractmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, completed and checked, as JSON-safe values.

        Raises:
            ValueError, TypeError: an unknown option or a wrong value.
        """

    @abstractmethod
    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None: ...

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, in a fixed order."""

    @abstractmethod
    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """The loss of one batch, 0-dim tensors; `"total"` is the one to call `backward()` on."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, parameters included, the optimizer's excluded."""

    @abstractmethod
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` returned."""

    def volatile_tensors(self) -> dict[str, Tensor]:
        """The part of :meth:`state_tensors` that computing a loss changes, without any optimizer step."""
        return {}

    def original(self) -> AbstractContextManager[None]:
        """A context in which the model is what it was before, as long as no step has been made."""
        return nullcontext()

    @abstractmethod
    def layers(self) -> list[str]:
        """Names of the layers the method changes."""

    def not_finite(self) -> list[str]:
        """Layers whose part of the last loss is NaN or infinite, first in the model first."""
        return []

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained to `folder`, which is made."""

    @abstractmethod
    def merge(self, dtype: torch.dtype | None) -> dict[str, float]:
        """Make the model an ordinary one again (of `dtype`), with what was trained in it; rounding per layer."""

    @abstractmethod
    def remove(self) -> None:
        """Make the model what it was before, bit for bit."""

    @classmethod
    def passes(cls, options: Mapping[str, Any], epochs: int) -> int:
        """Passes over the data that a run of `epochs` takes; each is an epoch to the loop."""
        return epochs

    @classmethod
    def forget_passes(cls, options: Mapping[str, Any], epochs: int) -> frozenset[int]:
        """Which of :meth:`passes` (from 0) read the samples to forget and no others, in batches full of them."""
        return frozenset()

    @classmethod
    def uses_forget(cls, options: Mapping[str, Any], epoch: int) -> bool:
        """Whether the steps of an epoch (from 0) put the samples to forget of their batches through the model."""
        return True

    def prepare(self, forget: Iterator[Batch]) -> None:  # noqa: B027
        """Before the first step of a run, and not when one is resumed: `forget` is all there is to forget, once."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:  # noqa: B027
        """Before the steps of an epoch (from 0), and again where a run is resumed: depend on the arguments alone."""

    def end_step(self) -> None:  # noqa: B027
        """After the optimizer has changed the parameters."""

    def end_epoch(self, forget: Iterator[Batch], *, last: bool) -> None:  # noqa: B027
        """After the last step of an epoch, or (`last`) of the run, be it within an epoch.

        A run that is resumed between two epochs calls it once more, in the same state.
        """

    def hand_over(self) -> None:  # noqa: B027
        """The steps are over, be it since an earlier call: set the model's flags as the caller is to find them."""


class UnlearnInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`rfa_fast.unlearn`; what was done is kept where the message says.

    Attributes:
        step: steps done.
        output_dir: of the run, `None` where none was given.
        rfa: the live handle on the model when nothing was saved; `None` when the model is as before the call, and the
            same call with `resume=True` goes on, and when the result was merged before (`merged`).
        history: the steps so far.
        merged: Ctrl-C came in the `evaluate` after the merge: the steps are over and the model has forgotten. What is
            missing is the deletion record, which needs the call with `resume=True` and the model from before.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        output_dir: Path | None,
        rfa: object | None,
        history: list[StepRecord],
        merged: bool = False,
    ) -> None:
        super().__init__(message)
        self.step, self.output_dir, self.rfa, self.history, self.merged = step, output_dir, rfa, history, merged


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the optimizer has not seen it.

    Attributes:
        step: the step that failed; the model's state is that after the one before.
        layers: names of the layers (or parameters) concerned; empty when only the task's loss is.
        output_dir, rfa, history: as in :class:`UnlearnInterrupted`.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        layers: list[str],
        output_dir: Path | None = None,
        rfa: object | None = None,
        history: list[StepRecord] | None = None,
    ) -> None:
        super().__init__(message)
        self.step, self.layers, self.output_dir, self.rfa = step, layers, output_dir, rfa
        self.history = [] if history is None else history
