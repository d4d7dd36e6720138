"""All figures of a model on the subsets of a forget / retain split, one pass per subset.

The subsets carry the paper's names: `D_r` and `D_f` of the training set, `D_rt` and `D_ft` (or `D_t`)
of the test set. Predictions are kept, so that membership inference, confidence plots and per-class
figures cost no further pass; what needs a second model (activation and feature distance, ZRF) hangs on
the same pass. Nothing is fixed about the names except the defaults of :meth:`SplitResult.membership`,
:meth:`SplitResult.auc` and :class:`~rfa_fast.metrics.references.References`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from rfa_fast.metrics import passes
from rfa_fast.metrics.membership import (
    MAX_SAMPLES,
    Classifier,
    Feature,
    MembershipAttack,
    membership_attack,
    membership_auc,
)
from rfa_fast.metrics.min_k import MIN_K_DEFAULT
from rfa_fast.metrics.passes import Loader, Progress
from rfa_fast.metrics.predictions import Predictions, predict
from rfa_fast.metrics.references import Comparison, Distances, References


@dataclass(frozen=True)
class SubsetResult:
    """One subset: its predictions, and the figures read off them.

    Attributes:
        name: of the subset, `"D_f"` say.
        predictions: per-item figures.
        seconds: wall-clock time of the pass.
        distances: to the reference models, where any were given.
    """

    name: str
    predictions: Predictions
    seconds: float
    distances: Distances | None = None

    @property
    def is_text_generation(self) -> bool:
        """Whether the labels were one per token."""
        return self.predictions.labels is None

    @property
    def accuracy(self) -> float:
        """Share in [0, 1]; for a label per token, of the texts with every label right."""
        return self.predictions.accuracy

    @property
    def accuracy_percent(self) -> float:
        """`accuracy` in percent, as the paper's tables have it."""
        return 100.0 * self.accuracy

    @property
    def loss(self) -> float:
        """Mean cross-entropy over all labels, in nats."""
        return self.predictions.loss

    @property
    def perplexity(self) -> float:
        """exp of the loss; ValueError for a classification."""
        return self.predictions.perplexity

    def figures(self) -> dict[str, float]:
        """`n`, `accuracy`, `loss`, the mean `entropy` and `confidence`; for a label per token also
        `token_accuracy` and `perplexity`; with reference models also :meth:`Distances.figures`. Items without
        a label are in none of the former but `n`."""
        kept = self.predictions.tokens > 0
        out = {
            "n": float(len(self.predictions)),
            "accuracy": self.accuracy,
            "loss": self.loss,
            "entropy": float(self.predictions.entropy[kept].mean(dtype="float64")),
            "confidence": float(self.predictions.confidence[kept].mean(dtype="float64")),
        }
        if self.is_text_generation:
            out |= {"token_accuracy": self.predictions.token_accuracy, "perplexity": self.perplexity}
        return out if self.distances is None else out | self.distances.figures()


class SplitResult(Mapping[str, SubsetResult]):
    """Subset name -> :class:`SubsetResult`, in the order they were given; read-only."""

    def __init__(self, subsets: Mapping[str, SubsetResult]) -> None:
        self._subsets = dict(subsets)

    def __getitem__(self, name: str) -> SubsetResult:
        return self._subsets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._subsets)

    def __len__(self) -> int:
        return len(self._subsets)

    def __repr__(self) -> str:
        return f"SplitResult({', '.join(f'{name} {item.accuracy_percent:.2f} %' for name, item in self.items())})"

    @property
    def seconds(self) -> float:
        """All passes together."""
        return sum(item.seconds for item in self.values())

    def figures(self) -> dict[str, float]:
        """Every figure of every subset in one flat dict, `"D_f/accuracy"` and so on: for a record or `until`."""
        return {f"{name}/{key}": value for name, item in self.items() for key, value in item.figures().items()}

    def membership(
        self,
        *,
        member: str = "D_r",
        nonmember: str | None = None,
        forget: str = "D_f",
        classifier: Classifier = "logistic",
        feature: Feature = "entropy",
        seed: int = 0,
        balanced: bool = True,
        max_samples: int | None = MAX_SAMPLES,
        min_k: int = MIN_K_DEFAULT,
    ) -> MembershipAttack:
        """:func:`~rfa_fast.metrics.membership.membership_attack` on three of the subsets.

        Args:
            nonmember: `None` takes `D_rt`, or `D_t` where there is no `D_rt`.
            member, forget: names of subsets; the rest as there.

        Raises:
            ValueError: a subset that was not evaluated, and what the attack raises.
        """
        if nonmember is None:
            nonmember = "D_rt" if "D_rt" in self else "D_t"
        self._check_there("membership", member, nonmember, forget)
        return membership_attack(
            self[member].predictions,
            self[nonmember].predictions,
            self[forget].predictions,
            classifier=classifier,
            feature=feature,
            seed=seed,
            balanced=balanced,
            max_samples=max_samples,
            min_k=min_k,
        )

    def auc(
        self,
        *,
        feature: Feature = "entropy",
        forget: str = "D_f",
        test: str | None = None,
        min_k: int = MIN_K_DEFAULT,
    ) -> float:
        """:func:`~rfa_fast.metrics.membership.membership_auc` of two subsets: an attack without a classifier.

        Args:
            test: `None` takes the unseen items that are most like the forgotten ones: `D_ft`, else `D_t`,
                else `D_rt`. Against other classes the classes would be told apart, not what was seen.
            feature, forget, min_k: as there.

        Raises:
            ValueError: a subset that was not evaluated, and what the attack raises.
        """
        if test is None:
            test = next((name for name in ("D_ft", "D_t") if name in self), "D_rt")
        self._check_there("auc", forget, test)
        return membership_auc(self[forget].predictions, self[test].predictions, feature=feature, min_k=min_k)

    def _check_there(self, what: str, *names: str) -> None:
        for name in names:
            if name not in self:
                raise ValueError(f"{what}: got subsets {', '.join(self)}, expected {name} among them")


def evaluate_split(
    model: nn.Module,
    subsets: Mapping[str, Loader],
    *,
    references: References | None = None,
    shift_labels: bool | None = None,
    progress: Progress | None = None,
) -> SplitResult:
    """Evaluate `model` on every subset, one pass each; the model is left as it was.

    Args:
        model, shift_labels: as for :func:`~rfa_fast.metrics.predictions.predict`.
        subsets: name -> loader; leave out a subset that is empty.
        references: models to compare with; their figures come from the same passes.
        progress: called with (batches done, batches in all) over all subsets; 0 in all when a loader does
            not know its length.

    Raises:
        ValueError: no subset; and what :func:`~rfa_fast.metrics.predictions.predict` raises, the subset's name
            in front.

    Example:
        >>> import torch
        >>> retain = [(torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0]))]
        >>> forget = [(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 1]))]
        >>> result = evaluate_split(nn.Identity(), {"D_r": retain, "D_f": forget})
        >>> result["D_f"].accuracy_percent, result.figures()["D_r/accuracy"]
        (50.0, 1.0)
    """
    if not subsets:
        raise ValueError("subsets: got none, expected at least one name -> loader")
    lengths = [passes.length(loader) for loader in subsets.values()]
    total = sum(lengths) if all(lengths) else 0
    done = latest = 0

    def advance(batch: int, _: int) -> None:
        nonlocal latest
        latest = done + batch
        if progress is not None:
            progress(latest, total)

    results: dict[str, SubsetResult] = {}
    for name, loader in subsets.items():
        start = time.perf_counter()
        with passes.named_subset(name):
            observer = None if references is None else Comparison(references, model, name)
            predictions = predict(model, loader, shift_labels=shift_labels, progress=advance, observer=observer)
            distances = None if observer is None else observer.result(predictions)
        results[name] = SubsetResult(name, predictions, time.perf_counter() - start, distances)
        done = latest
    return SplitResult(results)
