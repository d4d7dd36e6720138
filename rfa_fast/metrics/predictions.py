"""What a model predicts for a set of items, from one pass: every other figure is read off it.

An item is an image or a text with one label `(B,)`, or a text with a label per token `(B, T)`. Both
are reduced to the same few numbers per item (how sure, how uncertain, how wrong, how many tokens
right), so that accuracy, loss, perplexity and membership inference need no second pass and no second
formula. Full probabilities are kept for classification only: for a language model they would be
tokens × vocabulary, gigabytes that no metric reads again. Nor are log-probabilities per token kept:
what Min-K % makes of them is a number per text, taken while they are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rfa_fast.head import is_encoder_decoder
from rfa_fast.metrics import passes
from rfa_fast.metrics.min_k import MIN_K_DEFAULT, MIN_K_PERCENTS, least_likely
from rfa_fast.metrics.passes import Loader, Observer, Progress
from rfa_fast.objective import IGNORED_LABEL

Floats: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int64]

ENTROPY_TOP_K = 10
"""Tokens whose probabilities enter a language model's entropy (section V-C of the paper)."""

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Predictions:
    """Per-item figures of n items, in the loader's order; numpy arrays on the CPU.

    Attributes:
        confidence: float32 `(n,)`, the largest probability; its mean over the labelled tokens of a text.
        entropy: float32 `(n,)` in nats, `−Σ p log p`. Texts with a label per token: of the ten most
            probable tokens, as they are (not renormalised), averaged over the labelled tokens.
        nll: float32 `(n,)` in nats, `−log p` of the true label; its mean over the labelled tokens.
        tokens: int64 `(n,)`, labels per item: 1 for a classification, 0 where there is none (all −100).
        tokens_right: int64 `(n,)`, those that are the arg-max.
        probabilities: float32 `(n, C)`; `None` for texts with a label per token.
        labels: int64 `(n,)`; `None` for texts with a label per token.
        min_k: float32 `(n, P)` in nats, the mean −log p of each text's least likely k % of labelled
            tokens, for the P percentages of :data:`~rfa_fast.metrics.min_k.MIN_K_PERCENTS`; `None` for a
            classification. See :meth:`min_k_loss`.

    An item without a label has `nll` NaN, and enters no average below; a text without one has no
    entropy, confidence or Min-K % either (NaN).
    """

    confidence: Floats
    entropy: Floats
    nll: Floats
    tokens: Integers
    tokens_right: Integers
    probabilities: Floats | None = None
    labels: Integers | None = None
    min_k: Floats | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unlabelled(self) -> int:
        """Items without a label: in no average."""
        return int((self.tokens == 0).sum())

    @property
    def accuracy(self) -> float:
        """Share in [0, 1] of the labelled items whose every label is the arg-max.

        Raises:
            ValueError: no item has a label.
        """
        labelled = self._labelled()
        return float((self.tokens_right == self.tokens)[labelled].mean())

    @property
    def token_accuracy(self) -> float:
        """Share in [0, 1] of the labels that are the arg-max; equals `accuracy` for a classification."""
        self._labelled()
        return float(self.tokens_right.sum() / self.tokens.sum())

    @property
    def loss(self) -> float:
        """Mean of −log p over all labels, in nats: of tokens, not of texts."""
        labelled = self._labelled()
        weights = self.tokens[labelled].astype(np.float64)
        return float((self.nll[labelled].astype(np.float64) * weights).sum() / weights.sum())

    @property
    def perplexity(self) -> float:
        """exp of the loss of texts with a label per token; inf when that is beyond float64.

        Raises:
            ValueError: a classification.
        """
        if self.labels is not None:
            raise ValueError("perplexity: got one label per item (B,), expected a label per token (B, T)")
        loss = self.loss
        return math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf

    def min_k_loss(self, percent: int = MIN_K_DEFAULT) -> Floats:
        """float32 `(n,)`: mean −log p of each text's `percent` % least likely tokens (Min-K % with its sign turned).

        Low means that no token surprised the model: it may have seen the text.

        Raises:
            ValueError: a classification, or a percentage that the pass did not take.
        """
        if self.min_k is None:
            raise ValueError("min_k: got one label per item (B,), expected a label per token (B, T)")
        if percent not in MIN_K_PERCENTS:
            raise ValueError(f"min_k: got {percent!r}, expected one of {', '.join(map(str, MIN_K_PERCENTS))} (%)")
        column: Floats = self.min_k[:, MIN_K_PERCENTS.index(percent)]
        return column

    def per_class_accuracy(self, n_classes: int) -> list[float]:
        """Accuracy in [0, 1] of each class, NaN for a class without an item.

        Raises:
            ValueError: labels per token, or a label that is not below `n_classes`.
        """
        if self.labels is None:
            raise ValueError("per_class_accuracy: got a label per token (B, T), expected one per item (B,)")
        labelled = self._labelled()
        labels, right = self.labels[labelled], self.tokens_right[labelled]
        if labels.max() >= n_classes:
            raise ValueError(f"n_classes: got {n_classes} but an item of class {labels.max()}, expected more classes")
        total = np.bincount(labels, minlength=n_classes)
        hits = np.bincount(labels, weights=right, minlength=n_classes)
        return [float(h / t) if t else math.nan for h, t in zip(hits, total, strict=True)]

    def _labelled(self) -> npt.NDArray[np.bool_]:
        labelled: npt.NDArray[np.bool_] = self.tokens > 0
        if not labelled.any():
            raise ValueError(f"labels: got {len(self)} items, none with a label (all {IGNORED_LABEL}), expected one")
        return labelled


def predict(
    model: nn.Module,
    loader: Loader,
    *,
    shift_labels: bool | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Predictions:
    """Run `model` over `loader` once, in eval mode and without gradients, leaving the model as it was.

    Args:
        model: returns logits `(B, C)` or `(B, T, V)`: a tensor, `.logits`, or the first of a tuple. Batches
            are moved to its device.
        loader: yields `(inputs, labels)` or dicts with `labels`; labels int `(B,)`, or `(B, T)` unshifted,
            −100 for none. Tokens where the attention mask is 0 count as −100.
        shift_labels: whether position t of `(B, T)` predicts the label of t + 1; `None`: yes for
            transformers' causal language models, no for anything else.
        progress: called with (batches done, batches in all; 0 when unknown).
        observer: also sees every batch's logits, and the outputs of the layers it names; what needs a
            second model (:mod:`rfa_fast.metrics.references`) hangs on the same pass by it.

    Returns:
        One entry per item; probabilities are computed in float32 whatever the model's dtype.

    Raises:
        ValueError: an empty loader, labels or shapes that do not fit the logits.
        TypeError: a batch or a model output of another form.
        FloatingPointError: NaN or infinite logits; names the batch.

    Example:
        >>> items = predict(nn.Identity(), [(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([1, 0]))])
        >>> items.accuracy, items.entropy.round(3).tolist()
        (0.5, [0.6930000185966492, 0.0010000000474974513])
    """
    parts: dict[str, list[Tensor]] = {}
    with passes.evaluating(model, *(observer.models if observer is not None else ())):
        device, shift = passes.device_of(model), passes.shifts_labels(model, shift_labels)
        for batch in passes.batches(loader, progress, shift=shift, encoder_decoder=is_encoder_decoder(model)):
            features: dict[str, list[Tensor]] = {name: [] for name in (observer.layers() if observer else ())}
            with passes.captured(model, features, features):
                logits = passes.forward(model, batch, device)
            if observer is not None:
                observer.see(batch, logits, features, shift)
            figures = _token_items(logits, batch, shift) if batch.labels.ndim == 2 else _class_items(logits, batch)
            if parts and parts.keys() != figures.keys():
                raise ValueError(f"labels: batch {batch.index} mixes (B,) and (B, T), expected one kind per loader")
            for name, value in figures.items():
                parts.setdefault(name, []).append(value)
    _check_widths(parts.get("probabilities", []))
    arrays = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return Predictions(**arrays)


def row_probabilities(logits: Tensor, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """float32 log-probabilities of `logits` `(rows, C)`, in pieces of at most 64 MiB.

    Args:
        batch: its index in the loader, for the message.

    Raises:
        FloatingPointError: a row's normaliser is not finite: NaN, +inf, or nothing but −inf.

    Example:
        >>> [(rows, piece.exp().tolist()) for rows, piece in row_probabilities(torch.zeros(1, 2), 0)]
        [(slice(0, 1, None), [[0.5, 0.5]])]
    """
    rows, classes = logits.shape
    step = max(1, _CHUNK_BYTES // (4 * classes))
    for start in range(0, rows, step):
        wide = logits[start : start + step].float()
        normaliser = wide.logsumexp(-1, keepdim=True)
        if not bool(normaliser.isfinite().all()):
            raise FloatingPointError(
                f"model: NaN or infinite logits in batch {batch}, expected finite numbers; "
                "look for inputs that are not finite, or evaluate in a wider dtype"
            )
        yield slice(start, start + wide.shape[0]), wide - normaliser


def _class_items(logits: Tensor, batch: passes.Batch) -> dict[str, Tensor]:
    labels = batch.labels
    probabilities = torch.empty(logits.shape, dtype=torch.float32)
    figures = _row_figures(logits, labels, batch.index, top_k=None, keep=probabilities)
    labelled = labels != IGNORED_LABEL
    return {
        "confidence": figures["confidence"].float(),
        "entropy": figures["entropy"].float(),
        "nll": torch.where(labelled, figures["nll"], math.nan).float(),
        "tokens": labelled.long(),
        "tokens_right": (labelled & (figures["right"] > 0)).long(),
        "probabilities": probabilities,
        "labels": labels,
    }


def _token_items(logits: Tensor, batch: passes.Batch, shift: bool) -> dict[str, Tensor]:
    rows, labels, item = passes.labelled_rows(logits, batch.labels, shift)
    figures = _row_figures(rows, labels, batch.index, top_k=ENTROPY_TOP_K)
    n = len(batch.labels)
    tokens = torch.bincount(item, minlength=n)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add_(0, item, values)

    # 0 / 0 is the NaN that Predictions promises for a text without a label.
    mean = {name: (total(figures[name]) / tokens).float() for name in ("confidence", "entropy", "nll")}
    min_k = least_likely(figures["nll"], item, n).float()
    return {**mean, "tokens": tokens, "tokens_right": total(figures["right"]).long(), "min_k": min_k}


def _row_figures(
    logits: Tensor, labels: Tensor, batch: int, *, top_k: int | None, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """float64 `(rows,)` on the CPU: confidence, entropy, nll (of label 0 where there is none), right."""
    out = {name: torch.empty(len(labels), dtype=torch.float64) for name in ("confidence", "entropy", "nll", "right")}
    known = labels.clamp(min=0)
    for rows, log_p in row_probabilities(logits, batch):
        p, truth = log_p.exp(), known[rows].to(log_p.device)
        most, arg_max = p.max(-1)
        entropy_of = p if top_k is None else p.topk(min(top_k, p.shape[-1])).values
        out["confidence"][rows] = most.cpu().double()
        out["entropy"][rows] = torch.special.entr(entropy_of).sum(-1).cpu().double()
        out["nll"][rows] = -log_p.gather(-1, truth[:, None]).squeeze(-1).cpu().double()
        out["right"][rows] = (arg_max == truth).cpu().double()
        if keep is not None:
            keep[rows] = p.cpu()
    return out


def _check_widths(parts: list[Tensor]) -> None:
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"model: got logits with {' and '.join(map(str, widths))} classes, expected one number")
