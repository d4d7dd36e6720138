"""What the losses of the methods are made of: labelled rows, log-probabilities, divergences, means per group.

A row is what a model predicts once: a sample of a classifier, a labelled token of a language model. Rows
without a label (−100) are dropped, so that no formula has to mask; that makes shapes depend on values,
which these methods can afford, and the compiled step of RFA, which has formulas of its own, could not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_fast.objective import IGNORED_LABEL, accumulation_dtype


class Rows(NamedTuple):
    """The labelled rows of a batch, in the order of its samples.

    Attributes:
        logits: `(rows, C)`, fp32 or fp64.
        labels: int64 `(rows,)`.
        forget: bool `(rows,)`.
        sample: int64 `(rows,)`, the row's place in the batch.
        size: samples of the batch.
    """

    logits: Tensor
    labels: Tensor
    forget: Tensor
    sample: Tensor
    size: int


def labelled_rows(logits: Tensor, labels: Tensor, forget: Tensor, *, shift: bool) -> Rows:
    """The rows that have a label.

    Args:
        logits: `(B, C)` or `(B, T, C)`.
        labels: int64 `(B,)` or `(B, T)`, unshifted.
        forget: bool `(B,)`.
        shift: position t of a text predicts the label of t + 1; unread for `(B,)`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> text = torch.tensor([[5, -100, 6]])
        >>> rows = labelled_rows(torch.zeros(1, 3, 7), text, torch.tensor([True]), shift=True)
        >>> rows.labels, rows.forget
        (tensor([6]), tensor([True]))
    """
    if logits.shape[:-1] != labels.shape or logits.ndim != labels.ndim + 1:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)} beside logits {tuple(logits.shape)}, expected (B,) beside "
            "(B, C), or (B, T) beside (B, T, C)"
        )
    size = len(labels)
    sample = torch.arange(size, device=labels.device).reshape((-1,) + (1,) * (labels.ndim - 1))
    if labels.ndim == 2 and shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    used = labels != IGNORED_LABEL
    sample = sample.expand(labels.shape)[used]
    wide = logits[used].to(accumulation_dtype(logits.dtype))
    return Rows(wide, labels[used], forget[sample], sample, size)


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values, an exact 0 when there are none; 0-dim.

    Example:
        >>> mean_where(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)


def cross_entropy(rows: Rows, labels: Tensor | None = None) -> Tensor:
    """−log p(label) of every row, `(rows,)`; `labels` stand in for the rows' own.

    Example:
        >>> rows = labelled_rows(torch.zeros(2, 4), torch.tensor([1, 2]), torch.tensor([True, False]), shift=False)
        >>> cross_entropy(rows)
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(rows.logits, rows.labels if labels is None else labels, reduction="none")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of every row at a temperature: logits `(rows, C)` twice -> `(rows,)`.

    The gradient shrinks with the square of the temperature; a caller who wants that undone multiplies by it.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 30.0]]), 1.0)
        tensor([0.6931])
    """
    ours, theirs = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def sequence_log_probs(rows: Rows) -> tuple[Tensor, Tensor]:
    """log π(y|x) of every sample, summed over its labelled rows.

    Returns:
        The sums `(B,)`, 0 for a sample without a labelled row, and int64 `(B,)`, how many rows each has.

    Example:
        >>> text = torch.tensor([[5, 5, 6], [5, -100, -100]])
        >>> rows = labelled_rows(torch.zeros(2, 3, 7), text, torch.tensor([True, True]), shift=True)
        >>> sequence_log_probs(rows)
        (tensor([-3.8918,  0.0000]), tensor([2, 0]))
    """
    per_row = -cross_entropy(rows)
    sums = per_row.new_zeros(rows.size).index_add(0, rows.sample, per_row)
    return sums, torch.bincount(rows.sample, minlength=rows.size)
