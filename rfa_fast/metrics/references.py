"""Figures that compare a model with a second one, taken during the pass that is under way anyway.

Activation distance and ZRF need a second model's outputs, feature distance its layers. Each second
model costs one forward per batch and no pass of its own over the data. Three things save more: a
reference that is the measured model itself is not run again, what a retrained classifier predicted
in an earlier :func:`~rfa_fast.metrics.evaluate.evaluate_split` can be given in its place, and what
the references gave on the batches of one pass can be kept for the passes of the next model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor, nn

from rfa_fast.config import check_choice
from rfa_fast.metrics import passes
from rfa_fast.metrics.distance import check_called, layer_names
from rfa_fast.metrics.kept import KeptOutputs, Outputs, Role
from rfa_fast.metrics.meters import (
    ActivationMeter,
    DivergenceMeter,
    FeatureMeter,
    FeatureNorm,
    TokenReduction,
)
from rfa_fast.metrics.passes import Batch
from rfa_fast.metrics.predictions import Predictions


@dataclass(frozen=True)
class References:
    """What a model is to be compared with.

    Attributes:
        retrained: activation distance to it, and feature distance of Definition 2.
        retrained_predictions: subset -> what the retrained model predicted there, for classifications whose
            loader gives the same items in the same order: spares its forward. Subsets that are not in it, and
            texts with a label per token, are run.
        original: feature distance of Definition 1.
        incompetent: an untrained model of the same architecture: ZRF.
        layers: for feature distance, names that the models share (`RFA.names`, say).
        tokens, norm: as for :func:`~rfa_fast.metrics.distance.activation_distance` and
            :func:`~rfa_fast.metrics.distance.feature_distance`.
        feature_items: feature distance is of the loader's first so many items, whole batches; `None`: of all.
        zrf_subsets: the subsets that ZRF is taken on; it is meant for the forgotten ones.
        kept: what these models gave on the same subsets before, and gives now.

    Raises:
        ValueError: an unknown reduction or norm, or a count below 1.

    Example:
        >>> References(retrained=nn.Linear(2, 2), tokens="sum").original is None
        True
    """

    retrained: nn.Module | None = None
    retrained_predictions: Mapping[str, Predictions] = field(default_factory=dict)
    original: nn.Module | None = None
    incompetent: nn.Module | None = None
    layers: Sequence[str] = ()
    tokens: TokenReduction = "mean"
    norm: FeatureNorm = "l2"
    feature_items: int | None = None
    zrf_subsets: Sequence[str] = ("D_f", "D_ft")
    kept: KeptOutputs | None = None

    def __post_init__(self) -> None:
        check_choice("tokens", self.tokens, get_args(TokenReduction))
        check_choice("norm", self.norm, get_args(FeatureNorm))
        count = self.feature_items
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"feature_items: got {count!r}, expected an integer >= 1 or None")


@dataclass(frozen=True)
class Distances:
    """What came of the comparison on one subset; `None` where the model to compare with was not given.

    Attributes:
        activation, activation_squared: distance of the outputs to the retrained model's.
        zrf: see :func:`~rfa_fast.metrics.distance.zero_retrain_forgetting`.
        to_original, to_retrained: layer -> feature distance, the paper's Definitions 1 and 2.
    """

    activation: float | None = None
    activation_squared: float | None = None
    zrf: float | None = None
    to_original: dict[str, float] | None = None
    to_retrained: dict[str, float] | None = None

    def figures(self) -> dict[str, float]:
        """Those that there are, by the names of :data:`rfa_fast.metrics.METRICS`; features summed over layers.

        Example:
            >>> Distances(zrf=0.5, to_original={"a": 1.0, "b": 2.0}).figures()
            {'zrf': 0.5, 'feature_distance_1': 3.0}
        """
        found = {
            "activation_distance": self.activation,
            "activation_distance_squared": self.activation_squared,
            "zrf": self.zrf,
            "feature_distance_1": None if self.to_original is None else sum(self.to_original.values()),
            "feature_distance_2": None if self.to_retrained is None else sum(self.to_retrained.values()),
        }
        return {name: value for name, value in found.items() if value is not None}


class Comparison:
    """An :class:`~rfa_fast.metrics.passes.Observer` of the pass over one subset.

    Args:
        references: what to compare with.
        model: the model that is measured.
        subset: the subset's name.

    Raises:
        ValueError: a layer that one of the models lacks.
    """

    def __init__(self, references: References, model: nn.Module, subset: str) -> None:
        self._model, self._wanted, self._subset = model, references, subset
        named: dict[Role, nn.Module | None] = {
            "original": references.original, "retrained": references.retrained, "incompetent": references.incompetent,
        }  # fmt: skip
        self._others = {role: other for role, other in named.items() if other is not None}
        with_features = {role: other for role, other in self._others.items() if role != "incompetent"}
        self._layers = layer_names(references.layers, model=model, **with_features) if with_features else []
        compared = with_features if self._layers else ()
        self._features: dict[Role, FeatureMeter] = {r: FeatureMeter(self._layers, references.norm) for r in compared}
        self._known = references.retrained_predictions.get(subset)
        self._activation = ActivationMeter(references.tokens)
        self._zrf = (
            DivergenceMeter() if references.incompetent is not None and subset in references.zrf_subsets else None
        )
        self._items = 0

    @property
    def models(self) -> Sequence[nn.Module]:
        """The models that may be run."""
        return list(self._others.values())

    def layers(self) -> Sequence[str]:
        """The layers, until enough items were seen."""
        most = self._wanted.feature_items
        return self._layers if self._features and (most is None or self._items < most) else []

    def see(self, batch: Batch, logits: Tensor, features: dict[str, list[Tensor]], shift: bool) -> None:
        """Run what has to be run on one batch, and add up."""
        if features:
            check_called("model", features, batch)
        rows, _, item = passes.labelled_rows(logits, batch.labels, shift)
        mine = Outputs(rows, features)
        for role in self._others:
            meter = self._features.get(role) if features else None
            by_rows = self._compared_by_rows(role, batch)
            if meter is None and by_rows is None:
                continue
            names = tuple(features) if meter is not None else ()
            theirs = self._outputs(role, batch, mine, names, rows=by_rows is not None, shift=shift)
            if meter is not None:
                meter.add(features, theirs.features, batch)
            if by_rows is not None and theirs.rows is not None:
                by_rows.add(rows, theirs.rows, item, batch)
        self._items += len(batch.labels)

    def result(self, predictions: Predictions) -> Distances:
        """The figures, once the pass is over.

        Args:
            predictions: what the pass gave.

        Raises:
            ValueError: `retrained_predictions` are of other items.
        """
        plain = squared = None
        read_known = self._known is not None and predictions.labels is not None
        if read_known and self._known is not None:
            self._add_known(predictions, self._known)
        if read_known or self._wanted.retrained is not None:
            plain, squared = self._activation.value(), self._activation.value(squared=True)
        found = {role: meter.value() for role, meter in self._features.items()}
        zrf = None if self._zrf is None else 1.0 - self._zrf.value()
        return Distances(plain, squared, zrf, found.get("original"), found.get("retrained"))

    def _compared_by_rows(self, role: Role, batch: Batch) -> ActivationMeter | DivergenceMeter | None:
        """What adds up the distance to a model's probabilities on this batch, if anything does."""
        if role == "incompetent":
            return self._zrf
        reads_known = self._known is not None and batch.labels.ndim == 1
        return self._activation if role == "retrained" and not reads_known else None

    def _outputs(
        self, role: Role, batch: Batch, mine: Outputs, layers: Sequence[str], *, rows: bool, shift: bool
    ) -> Outputs:
        """What another model gives on a batch: kept, the measured model's own, or run."""
        other, kept = self._others[role], self._wanted.kept
        if kept is not None:
            found = kept.get(role, self._subset, batch, rows=rows, layers=layers)
            if found is not None:
                return found
        if other is self._model:
            given = Outputs(mine.rows if rows else None, {name: mine.features[name] for name in layers})
        else:
            theirs: dict[str, list[Tensor]] = {name: [] for name in layers}
            with passes.captured(other, theirs, theirs):
                logits = passes.forward(other, batch, passes.device_of(other))
            check_called(role, theirs, batch)
            given = Outputs(passes.labelled_rows(logits, batch.labels, shift)[0] if rows else None, theirs)
        if kept is not None:
            kept.put(role, self._subset, batch, given)
        return given

    def _add_known(self, mine: Predictions, known: Predictions) -> None:
        if mine.probabilities is None or known.probabilities is None or mine.labels is None or known.labels is None:
            raise ValueError("retrained_predictions: got those of texts with a label per token, expected classes")
        if mine.probabilities.shape != known.probabilities.shape or (mine.labels != known.labels).any():
            raise ValueError(
                f"retrained_predictions: got {known.probabilities.shape} probabilities or other labels, expected "
                f"{mine.probabilities.shape} of the same items in the same order (a loader that does not shuffle)"
            )
        difference = torch.from_numpy(mine.probabilities - known.probabilities)
        items = len(difference)
        self._activation.add_squares(difference.square().sum(-1).double(), torch.arange(items), items)
