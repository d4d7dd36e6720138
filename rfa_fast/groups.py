"""Retain, forget or ignore: the groups of the batch under way, shared by all adapted layers.

A layer sees only its input, not the batch it came from. The group of each row follows from the
input's shape: `(B, …, K)` is batch first; `(B·T, K)` is a flattened batch whose T is known from the
inputs; pooled heads inside a text model see `(B, K)`. A shape that fits none of these, or fits two,
is settled by the `rows` option (`"batch"`, `"flat"`, `"sequence_first"`) or is an error.

The context also keeps what the layers report back: one pair of alignment terms per call. Losses stay
ordinary tensors of the autograd graph; no hook is involved.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfa_fast.config import RFAConfig
from rfa_fast.objective import FORGET, IGNORE, RETAIN


class Layout(NamedTuple):
    """How a layer's rows map to samples.

    Attributes:
        view: `"batch"`, `"flat"` or `"sequence_first"`.
        group: int8 codes over the first axes of the batch-first view of the input.
        by_token: the codes are those of tokens.
    """

    view: str
    group: Tensor
    by_token: bool


class LayerTerms(NamedTuple):
    """Mean alignment terms of one layer (eq. 1, 2 before the sum over layers); 0-dim."""

    retain: Tensor
    forget: Tensor


class WholeBatch(NamedTuple):
    """How many entries of each group an accumulated batch has, over all of its parts; int64 `(2,)`: retain, forget.

    Attributes:
        samples, tokens: entries of the codes.
        labels: labelled rows.
    """

    samples: Tensor
    tokens: Tensor
    labels: Tensor

    def share(self, counts: Tensor, codes: Tensor, code: int, dtype: torch.dtype) -> Tensor:
        """Entries of `code` among `codes`, over those of the whole batch: 0-dim, 0 where there are none.

        Example:
            >>> two = torch.tensor([4, 1])
            >>> whole = WholeBatch(two, two, two)
            >>> whole.share(whole.samples, torch.tensor([0, 1], dtype=torch.int8), RETAIN, torch.float32)
            tensor(0.2500)
        """
        return (codes == code).sum().to(dtype) / counts[code].clamp(min=1)


@dataclass
class Batch:
    """The groups of one batch.

    Attributes:
        samples: int8 `(B,)`: 0 retain, 1 forget, −1 ignore.
        tokens: int8 `(B, T)`, or `None` when the inputs have no tokens.
        token_units: the unit of the losses is a token rather than a sample.
        whole: the batch that this one is a part of, where gradients are accumulated.
        needed: int8 `(B,)`, 0 for samples that teacher mode's original model has to compute; `None`: all of them.
        decoder: int8 `(B, T)`, the codes by position of what an encoder-decoder writes; `None` in other models. Labels
            are of these, and its layers are aligned by sample.
    """

    samples: Tensor
    tokens: Tensor | None
    token_units: bool
    whole: WholeBatch | None = None
    needed: Tensor | None = None
    decoder: Tensor | None = None

    @property
    def size(self) -> int:
        """B."""
        return self.samples.shape[0]

    @property
    def length(self) -> int | None:
        """T, or `None`."""
        return None if self.tokens is None else self.tokens.shape[1]

    def of(self, samples: slice | Tensor) -> Batch:
        """Some of the samples, or all of them in another order.

        Example:
            >>> make_batch(torch.tensor([False, True]), None, device=torch.device("cpu")).of(slice(1, 2)).samples
            tensor([1], dtype=torch.int8)
        """
        tokens, decoder = (None if codes is None else codes[samples] for codes in (self.tokens, self.decoder))
        return replace(self, samples=self.samples[samples], tokens=tokens, decoder=decoder, needed=None)


def make_batch(
    forget: Tensor,
    valid: Tensor | None,
    *,
    device: torch.device,
    size: int | None = None,
    length: int | None = None,
    token_units: bool = False,
) -> Batch:
    """Check the masks and turn them into group codes.

    Args:
        forget: bool `(B,)`; true for samples to forget.
        valid: bool `(B,)` or `(B, T)`; false rows are in no term. `None`: everything is valid.
        device: where the model is; the masks must be there.
        size: B, when it is known from the inputs.
        length: T, when it is known from the inputs.
        token_units: the unit of the losses is a token.

    Raises:
        TypeError: a mask that is not a bool tensor.
        ValueError: a mask of the wrong shape or device.

    Example:
        >>> batch = make_batch(torch.tensor([False, True]), None, device=torch.device("cpu"))
        >>> batch.samples
        tensor([0, 1], dtype=torch.int8)
    """
    for name, mask in (("forget", forget), ("valid", valid)):
        if mask is None and name == "valid":
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: got {got}, expected a bool tensor")
        if mask.device != device:
            raise ValueError(f"{name}: got device {mask.device}, expected the model's device {device}")
    if forget.ndim != 1:
        raise ValueError(f"forget: got shape {tuple(forget.shape)}, expected (B,), one flag per sample")
    if size is not None and forget.shape[0] != size:
        raise ValueError(f"forget: got {forget.shape[0]} flags, expected {size}, one per sample of the batch")
    samples = forget.to(torch.int8)
    tokens: Tensor | None = None
    if valid is not None:
        shapes: tuple[tuple[int, ...], ...] = ((len(forget),),)
        if valid.ndim == 2:
            shapes += ((len(forget), valid.shape[1] if length is None else length),)
        if tuple(valid.shape) not in shapes:
            wanted = f"({len(forget)},) or ({len(forget)}, {'T' if length is None else length})"
            raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {wanted}")
        if valid.ndim == 2:
            tokens = torch.where(valid, samples[:, None], IGNORE).to(torch.int8)
        samples = torch.where(valid.flatten(1).any(1) if valid.ndim == 2 else valid, samples, IGNORE).to(torch.int8)
    if tokens is None and length is not None:
        tokens = samples[:, None].expand(-1, length)
    return Batch(samples, tokens, token_units)


@dataclass
class GroupContext:
    """What the adapted layers of one model share: the options, the batch under way, and their reports."""

    config: RFAConfig
    enabled: bool = True
    batch: Batch | None = None
    recording: bool = False
    teacher: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, LayerTerms] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    losses: dict[str, LayerTerms] = field(default_factory=dict)
    mean_prediction: Tensor | None = None
    memory: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen_retain: bool = False
    seen_other_shape: bool = False
    head_stands_aside: bool = True
    head_is_aside: bool = False
    reported: tuple[Batch, Mapping[str, tuple[Tensor, Tensor]]] | None = None
    prefix_output: Tensor | None = None
    prefix_outputs: dict[int, Any] = field(default_factory=dict)
    original_output: Any = None
    expects_gradient: bool = False
    checkpointed: bool = False
    replay: object | None = None
    silent: bool = False

    def begin(self, batch: Batch, memory: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Start a batch; reports of the one before are dropped.

        Args:
            memory: x̃ of the batches before by layer, and for which positions it is known.
        """
        self.batch, self.memory, self.replay = batch, memory, None
        self.expects_gradient, self.checkpointed = torch.is_grad_enabled(), False
        self.clear()
        self.reported = batch, memory
        if not torch.compiler.is_compiling():
            self.note_retain(batch)

    def prediction_on(self, device: torch.device) -> Tensor | None:
        """ỹ of the batch before, where the model is now, or `None`."""
        return None if self.mean_prediction is None else self.mean_prediction.to(device)

    def end(self) -> None:
        """The forward is over: outside of it a layer has no group. What was reported stays until it is cleared."""
        self.batch, self.memory = None, {}

    def clear(self) -> None:
        """Drop what the layers reported: a finished batch must keep neither features nor a graph alive."""
        self.teacher, self.terms, self.calls, self.means = {}, {}, {}, {}
        self.reported, self.prefix_outputs, self.original_output = None, {}, None

    def note_retain(self, batch: Batch) -> None:
        """Say so once if there is nothing to align with yet, where asking costs no device synchronisation."""
        if self.seen_retain or batch.samples.device.type != "cpu" or not torch.is_grad_enabled():
            return
        if not bool((batch.samples == RETAIN).any()):
            warnings.warn(
                "this batch has no retain sample and none came before it, so there is no mean feature to align with: "
                "its forget terms are 0; use a sampler that puts retain samples into every batch",
                stacklevel=_outside(),
            )
        self.seen_retain = True

    def note_other_shape(self, name: str, batch: Batch | None) -> None:
        """Say so once if a batch would need the mean feature of one before, which is of another shape."""
        if self.seen_other_shape or batch is None or batch.samples.device.type != "cpu":
            return
        if not bool((batch.samples == RETAIN).any()):
            self.seen_other_shape = True
            warnings.warn(
                f"layer {name!r}: this batch has no retain sample, and the mean feature of the batches before is of "
                "another image size or length, so its forget term is 0; use a sampler that puts retain samples into "
                "every batch",
                stacklevel=_outside(),
            )

    def report(self, name: str, terms: LayerTerms) -> None:
        """A layer hands in its terms; not a second time."""
        if self.silent:
            return
        self.calls[name] = self.calls.get(name, 0) + 1
        self.terms[name] = terms

    def check_calls(self, names: Iterable[str]) -> None:
        """Every adapted layer must have run exactly once in the forward that just ended.

        Raises:
            ValueError: names the layer, and how often it ran.
        """
        for name in names:
            count = self.calls.get(name, 0)
            if count == 0:
                raise ValueError(
                    f"layer {name!r}: got no call in this forward, expected one: its weight may be read by a "
                    "functional call, or its branch is not used; leave it out of targets"
                )
            if count > 1:
                raise ValueError(
                    f"layer {name!r}: got {count} calls in one forward, expected one: a module used twice has two "
                    "features to align; leave it out of targets"
                )

    def layout(self, name: str, shape: tuple[int, ...], *, ambiguous: bool) -> Layout:
        """How the rows of a layer's input map to samples.

        Args:
            name: the layer, for messages and for per-layer `rows`.
            shape: leading axes of the input, `(B,)` for a convolution.
            ambiguous: a module around the layer, or beside it, declares `batch_first=False`.

        Raises:
            ValueError: the shape fits no reading, or two, and `rows` does not settle it.
        """
        batch = self.batch
        if batch is None:
            raise ValueError(f"layer {name!r}: no batch is under way; call RFA.loss or enter RFA.groups first")
        rows = self.config.rows
        choice: str = rows.get(name, "auto") if isinstance(rows, Mapping) else rows
        size, length = batch.size, batch.length
        automatic = choice == "auto"
        fits = _fitting(shape, size, length, ambiguous) if automatic else [choice]
        if len(fits) != 1:
            raise ValueError(
                f"{self._where(name, shape)}: got a shape that fits {' and '.join(fits) or 'no reading'}, expected "
                "exactly one; pass rows='batch', rows='flat' (batch-major) or rows='sequence_first' to patch()"
            )
        choice = fits[0]
        if choice == "batch" and shape[:1] == (size,):
            fine = batch.tokens is not None and shape[:2] == tuple(batch.tokens.shape)
            written = batch.decoder is not None and shape[:2] == tuple(batch.decoder.shape)
            if written and (not fine or "decoder" in name.split(".")):
                return Layout("batch", batch.samples, False)
            if automatic and batch.tokens is not None and len(shape) > 1 and not fine:
                raise ValueError(
                    f"{self._where(name, shape)}: got {shape[1]} rows per sample, expected {length}; "
                    "pass rows='batch' to patch() to align them by sample"
                )
            return Layout("batch", batch.tokens if fine and batch.tokens is not None else batch.samples, fine)
        if choice == "flat" and shape and size and shape[0] % size == 0:
            if length is not None and batch.tokens is not None and shape[0] == size * length:
                return Layout("flat", batch.tokens, True)
            return Layout("flat", batch.samples, False)
        if choice == "sequence_first" and len(shape) >= 2 and shape[1] == size:
            fine = batch.tokens is not None and shape[0] == length
            return Layout("sequence_first", batch.tokens if fine and batch.tokens is not None else batch.samples, fine)
        raise ValueError(
            f"{self._where(name, shape)}: rows={choice!r} does not fit; expected rows='batch', 'flat' or "
            "'sequence_first'"
        )

    def _where(self, name: str, shape: tuple[int, ...]) -> str:
        """The beginning of a message; made when it is needed, since torch.compile cannot follow it."""
        batch = self.batch
        size, length = (0, None) if batch is None else (batch.size, batch.length)
        tokens = "" if length is None else f" of {length} tokens"
        return f"layer {name!r}: its input has leading axes {shape}, the batch has {size} samples{tokens}"


def _fitting(shape: tuple[int, ...], size: int, length: int | None, ambiguous: bool) -> list[str]:
    """The readings of a layer's input that its leading axes allow."""
    fits = []
    if shape[:1] == (size,):
        fits.append("batch")
    if ambiguous and len(shape) >= 2 and shape[1] == size:
        fits.append("sequence_first")
    if length is not None and length > 1 and len(shape) == 1 and shape[0] == size * length and size:
        fits.append("flat")
    return fits


def flat_rows(batch: int, rows: int, codes: Tensor) -> Tensor:
    """Codes `(B,)` or `(B, T)` of a flattened batch as `(rows,)`, batch major.

    Example:
        >>> flat_rows(2, 4, torch.tensor([0, 1], dtype=torch.int8))
        tensor([0, 0, 1, 1], dtype=torch.int8)
    """
    return codes.reshape(-1) if codes.numel() == rows else codes.repeat_interleave(math.ceil(rows / max(batch, 1)))


__all__ = [
    "FORGET",
    "IGNORE",
    "RETAIN",
    "Batch",
    "GroupContext",
    "LayerTerms",
    "Layout",
    "flat_rows",
    "make_batch",
]


def _outside() -> int:
    """The `stacklevel` at which a warning of the caller's names the line that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    return level
