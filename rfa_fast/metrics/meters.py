"""Running sums of what lies between two models, fed batch by batch.

The loops differ (two models side by side, or a second model beside a pass that is under way anyway);
what is added up does not, and is here once. Nothing of size items × features or tokens × vocabulary
is ever stored, and a shuffling loader is as good as any other. Rows are those of
:func:`rfa_fast.metrics.passes.labelled_rows`: an item of a classification has one, a text one per
labelled token. An item lies in one batch, so that sums per item need no memory beyond it::

    s_t = ‖p_t^a − p_t^b‖²        of row t
    JS_t = H((p_t^a + p_t^b)/2) − (H(p_t^a) + H(p_t^b))/2        in bits: 0 to 1
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from rfa_fast.config import check_choice
from rfa_fast.metrics.passes import Batch
from rfa_fast.metrics.predictions import row_probabilities

TokenReduction = Literal["mean", "text", "sum", "norm"]
FeatureNorm = Literal["l2", "abs"]


class ActivationMeter:
    """Mean distance of two models' output probabilities, plain and squared in one go.

    Args:
        tokens: what becomes of a text's tokens. `"mean"`: over all labelled tokens of all texts; `"text"`:
            over each text's tokens first, then over texts; `"sum"`: summed in each text, mean over
            texts; `"norm"`: the L2 norm of a text's whole (tokens × vocabulary) difference, mean over
            texts. Without tokens the four are one.
    """

    def __init__(self, tokens: TokenReduction = "mean") -> None:
        check_choice("tokens", tokens, get_args(TokenReduction))
        self.tokens: TokenReduction = tokens
        self._plain = self._squared = 0.0
        self._count = 0

    def add(self, rows_a: Tensor, rows_b: Tensor, item: Tensor, batch: Batch) -> None:
        """Logits `(rows, C)` of both models, and the item `(rows,)` of each row."""
        squares = torch.empty(len(item), dtype=torch.float64)
        for rows, log_a, log_b in _pieces(rows_a, rows_b, batch):
            squares[rows] = (log_a.exp() - log_b.exp()).square().sum(-1).cpu().double()
        self.add_squares(squares, item, len(batch.labels))

    def add_squares(self, squares: Tensor, item: Tensor, items: int) -> None:
        """The same from s_t, float64 `(rows,)`, of a batch of `items`."""
        plain = squares.sqrt()
        if self.tokens == "mean":
            self._count += len(squares)
        else:
            tokens = torch.bincount(item, minlength=items)
            zero = torch.zeros(items, dtype=torch.float64)
            squares = zero.index_add(0, item, squares)
            plain = squares.sqrt() if self.tokens == "norm" else zero.index_add(0, item, plain)
            if self.tokens == "text":
                plain, squares = plain / tokens.clamp(min=1), squares / tokens.clamp(min=1)
            self._count += int((tokens > 0).sum())
        self._plain += float(plain.sum())
        self._squared += float(squares.sum())

    def value(self, *, squared: bool = False) -> float:
        """The mean so far.

        Raises:
            ValueError: no row was added.
        """
        if self._count == 0:
            raise ValueError("labels: got no labelled token (all -100), expected at least one")
        return (self._squared if squared else self._plain) / self._count


class DivergenceMeter:
    """Mean Jensen-Shannon divergence of two models' output probabilities, in bits, over all rows."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, rows_a: Tensor, rows_b: Tensor, item: Tensor, batch: Batch) -> None:
        """Logits `(rows, C)` of both models."""
        for _, log_a, log_b in _pieces(rows_a, rows_b, batch):
            p, q = log_a.exp(), log_b.exp()
            apart = torch.special.entr((p + q) / 2) - (torch.special.entr(p) + torch.special.entr(q)) / 2
            # Rounding can leave equal distributions a little below 0.
            self._total += float(apart.sum(-1).clamp(min=0).cpu().double().sum()) / math.log(2)
        self._count += len(item)

    def value(self) -> float:
        """The mean so far, 0 to 1.

        Raises:
            ValueError: no row was added.
        """
        if self._count == 0:
            raise ValueError("labels: got no labelled token (all -100), expected at least one")
        return self._total / self._count


class FeatureMeter:
    """Mean distance of two models' features, layer by layer.

    Args:
        names: the layers.
        norm: of an item's difference: `"l2"`, or `"abs"`, the mean absolute value of its elements.
    """

    def __init__(self, names: Sequence[str], norm: FeatureNorm = "l2") -> None:
        check_choice("norm", norm, get_args(FeatureNorm))
        self.names, self.norm = tuple(names), norm
        self.items = 0
        self._totals = dict.fromkeys(self.names, 0.0)

    def add(self, features_a: dict[str, list[Tensor]], features_b: dict[str, list[Tensor]], batch: Batch) -> None:
        """The layers' outputs in both models, one tensor per call of the layer."""
        for name in self.names:
            self._totals[name] += self._batch_total(name, features_a[name], features_b[name], batch)
        self.items += len(batch.labels)

    def value(self) -> dict[str, float]:
        """Layer -> mean over the items so far.

        Raises:
            ValueError: no item was added.
        """
        if self.items == 0:
            raise ValueError("loader: got no batch, expected at least one; check the subset that it reads is not empty")
        return {name: total / self.items for name, total in self._totals.items()}

    def _batch_total(self, name: str, calls_a: list[Tensor], calls_b: list[Tensor], batch: Batch) -> float:
        shapes_a, shapes_b = ([tuple(call.shape) for call in calls] for calls in (calls_a, calls_b))
        if shapes_a != shapes_b:
            raise ValueError(f"names: {name!r} gives features {shapes_b} in model_b, expected {shapes_a} as in model_a")
        sums = torch.zeros(len(batch.labels), dtype=torch.float64)
        elements = torch.zeros(len(batch.labels), dtype=torch.float64)
        for a, b in zip(calls_a, calls_b, strict=True):
            difference, real = _without_padding(name, a.float() - b.to(a.device).float(), batch)
            rows = difference.reshape(len(sums), -1)
            # fp32 sums of one item are taken where they are, in fp32: fp64 is missing on some devices.
            sums += (rows.square() if self.norm == "l2" else rows.abs()).sum(1).cpu().double()
            elements += rows.shape[1] if real is None else real.sum(1) * (rows.shape[1] // real.shape[1])
        total = float((sums.sqrt() if self.norm == "l2" else sums / elements.clamp(min=1)).sum())
        if not math.isfinite(total):
            raise FloatingPointError(f"names: {name!r} is not finite in batch {batch.index}, expected finite features")
        return total


def _pieces(rows_a: Tensor, rows_b: Tensor, batch: Batch) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Log-probabilities of both, on the device of the first."""
    if rows_a.shape != rows_b.shape:
        raise ValueError(f"model_b: got {rows_b.shape[-1]} outputs, expected {rows_a.shape[-1]} as in model_a")
    both = zip(row_probabilities(rows_a, batch.index), row_probabilities(rows_b, batch.index), strict=True)
    for (rows, log_a), (_, log_b) in both:
        yield rows, log_a, log_b.to(log_a.device)


def _without_padding(name: str, difference: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The difference with 0 at padded positions, and the mask `(B, T)` that did it, if one did."""
    items, mask = len(batch.labels), batch.mask
    if difference.ndim == 0 or difference.shape[0] == 0 or difference.shape[0] % items:
        raise ValueError(
            f"names: {name!r} gives a feature of shape {tuple(difference.shape)} for {items} items, "
            "expected the batch first: (B, …) or (B·T, …)"
        )
    if mask is None:
        return difference, None
    # Two axes are never a token grid: a pooled (B, K) may have K = T by chance.
    if difference.ndim == 3 and difference.shape[:2] == mask.shape:
        real = mask
    elif difference.shape[0] == mask.numel():
        real = mask.flatten()
    else:
        return difference, None
    axes = real.shape + (1,) * (difference.ndim - real.ndim)
    return torch.where(real.reshape(axes).to(difference.device), difference, 0), mask
