"""What is measured of a model in an experiment, beyond accuracy: any of the metrics, from one pass per subset.

A subset can be large (D_r is nine tenths of the training set) and a distance to a second model costs a second
forward. So a pass may be limited to a number of samples, evenly spaced; it begins with those that feature
distances are taken on, because these are kept to the first few hundred; and what the retrained classifier
predicted is kept, and of texts what both trained models gave as far as memory allows, so that they are run
once per split and not once per method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.utils.data import Subset

from rfa_fast.experiments.cache import canonical, labels_of
from rfa_fast.methods.progress import redraws
from rfa_fast.metrics import METRICS, Cost, KeptOutputs, Predictions, References, SplitResult, read_metrics
from rfa_fast.metrics.meters import TokenReduction
from rfa_fast.patching import RFA
from rfa_fast.targets import select

_CONFIDENCES = 2000  # per group: enough for a histogram of 25 bins
FEATURE_ITEMS = 512
"""Samples per subset for feature distance: the mean's error is then some 4 % of the spread."""


def measured_more(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the settings of a row differ from those asked for in holding more metrics, and in nothing else.

    Example:
        >>> wanted = {"seed": 0, "measures": {"metrics": ["accuracy"], "samples": None}}
        >>> measured_more({**wanted, "measures": {"metrics": ["mia_svm", "accuracy"], "samples": None}}, wanted)
        True
        >>> measured_more({**wanted, "measures": {"metrics": ["accuracy"], "samples": 50}}, wanted)
        False
    """
    ours, theirs = wanted.get("measures"), found.get("measures")
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return False
    measured = theirs.get("metrics")
    if not isinstance(measured, list | tuple) or not set(ours["metrics"]) <= set(measured):
        return False
    same = {**found, "measures": {**theirs, "metrics": ours["metrics"]}}
    return canonical(same) == canonical(wanted)


@dataclass(frozen=True)
class Measures:
    """What is measured of every row.

    Attributes:
        metrics: names of :data:`rfa_fast.metrics.METRICS`.
        samples: at most so many of each subset; `None`: all.
        tokens: what becomes of a text's tokens in activation distance.
        lasting: whether D_f is measured again after quantisation, fine-tuning and relearning, see
            :func:`rfa_fast.experiments.persistence.persistence`.

    Raises:
        ValueError: an unknown metric.
    """

    metrics: tuple[str, ...]
    samples: int | None = None
    tokens: TokenReduction = "mean"
    lasting: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics: got {unknown[0]!r}, expected some of {', '.join(METRICS)}")

    def settings(self) -> dict[str, Any]:
        """What shapes the figures, JSON-safe."""
        return {name: value for name, value in asdict(self).items() if name != "lasting" or value}

    def need(self, what: str) -> bool:
        """Whether a metric needs `what`, `"retrained"` say."""
        return any(what in METRICS[name].needs for name in self.metrics)

    def subset(self, subset: Subset[Any]) -> Subset[Any]:
        """The samples of a subset that are measured, in the order measured.

        Example:
            >>> Measures(("accuracy",), samples=2).subset(Subset(["a", "b", "c", "d"], [0, 1, 2, 3])).indices
            [0, 2]
        """
        kept = thinned(range(len(subset)), len(subset) if self.samples is None else self.samples)
        first = thinned(kept, FEATURE_ITEMS)
        taken = set(first)
        return Subset(subset, [*first, *(i for i in kept if i not in taken)])

    def references(
        self,
        original: Callable[[], nn.Module],
        retrained: Callable[[], nn.Module],
        known: Callable[[], Mapping[str, Predictions]],
        seed: int,
        kept: KeptOutputs | None = None,
    ) -> References:
        """The models that the metrics compare with; each is asked for only where one does.

        Args:
            original, retrained: give the models.
            known: gives what the retrained classifier predicts on the measured subsets.
            seed: of the untrained model that ZRF compares with.
            kept: what the three models gave on the measured subsets before.
        """
        base = original() if self.need("original") or self.need("layers") or self.need("incompetent") else None
        predictions: Mapping[str, Predictions] = {}
        if self.need("retrained"):
            predictions = known()
        return References(
            retrained=retrained() if self.need("retrained") else None,
            retrained_predictions=predictions,
            original=base if self.need("original") else None,
            incompetent=_untrained(base, seed) if self.need("incompetent") and base is not None else None,
            layers=adapted_layers(base) if self.need("layers") and base is not None else (),
            tokens=self.tokens,
            feature_items=FEATURE_ITEMS,
            kept=kept,
        )

    def figures(self, result: SplitResult, seconds: float, peak_bytes: int | None, seed: int) -> dict[str, float]:
        """The figures of a measured split, by the names of :func:`rfa_fast.metrics.read_metrics`; NaN where unknown."""
        cost = Cost(seconds, peak_bytes, "measured" if peak_bytes is not None else "unknown")
        figures = read_metrics(result, self.metrics, cost=cost, seed=seed)
        return {name: float(value) if value is not None else math.nan for name, value in figures.items()}


def accuracy_by_class(
    result: SplitResult, subsets: Mapping[str, Subset[Any]], classes: Sequence[str], *, language: bool
) -> dict[str, float]:
    """Class name -> accuracy in [0, 1], classes without a sample left out.

    Of a classification it is over the test samples, kept and forgotten; of a language model over the training samples,
    where a text counts when every token is right.

    Args:
        result: what was measured.
        subsets: those that it was measured on, with a label per item, in order.
        classes: names by index.
        language: a label per token.

    Example:
        >>> import torch
        >>> from rfa_fast.data import TextDataset
        >>> from rfa_fast.metrics import evaluate_split
        >>> texts = TextDataset(["x", "y", "z"], [0, 2, 2], classes=("a", "b", "c"))
        >>> logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        >>> loaders = {name: [(logits, torch.tensor([0, 2, 2]))] for name in ("D_r", "D_f", "D_rt")}
        >>> found = evaluate_split(nn.Identity(), loaders)
        >>> accuracy_by_class(found, {"D_rt": Subset(texts, range(3))}, texts.classes, language=False)
        {'a': 1.0, 'c': 0.5}
    """
    right: dict[int, list[bool]] = {}
    for name in ("D_r", "D_f") if language else ("D_rt", "D_ft", "D_t"):
        if name not in result:
            continue
        predictions = result[name].predictions
        hits = (predictions.tokens_right == predictions.tokens).tolist()
        for label, hit, tokens in zip(labels_of(subsets[name]), hits, predictions.tokens.tolist(), strict=True):
            if tokens:
                right.setdefault(label, []).append(hit)
    return {classes[label]: sum(hits) / len(hits) for label, hits in sorted(right.items())}


def lasting_figures(
    model: nn.Module, subsets: Mapping[str, Any], recipe: Mapping[str, Any], handle: RFA | None, *, bars: bool
) -> dict[str, float]:
    """Accuracy on D_f in the states that a released model meets, by `"4-bit/forget_accuracy"` and so on.

    What trains it again is an epoch at the recipe's own rate and batch size, the likeliest fine-tuning of all.

    Args:
        model: unlearned; left as it was.
        subsets: with `"D_r"` and `"D_f"`.
        recipe: of the Original.
        handle: the adapters, where they are still live.
        bars: show progress.
    """
    from rfa_fast.experiments.persistence import persistence

    options = {name: recipe[name] for name in ("lr", "batch_size", "weight_decay") if name in recipe}
    seed = int(recipe.get("seed", 0))
    return persistence(model, subsets, handle=handle, seed=seed, train_options=options, bars=bars).flat()


def adapted_layers(model: nn.Module) -> list[str]:
    """The layers that RFA adapts everywhere: those that feature distances are taken on, for all methods alike.

    Example:
        >>> from rfa_fast.experiments.models import digits_net
        >>> adapted_layers(digits_net(0))[-1]
        'fc'
    """
    return [target.name for target in select(model, "all").adapted]


def _untrained(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model that has seen nothing."""
    import copy

    from rfa_fast.methods.buffers import copy_tensors
    from rfa_fast.methods.start import initial_tensors, named_state

    other = copy.deepcopy(model)
    copy_tensors(named_state(other), initial_tensors(other, seed))
    return other.eval()


def thinned(values: Sequence[Any], most: int = _CONFIDENCES) -> list[Any]:
    """At most `most` of the values, evenly spaced.

    Example:
        >>> thinned(range(10), 4)
        [0, 2, 5, 7]
    """
    if len(values) <= most:
        return list(values)
    return [values[i * len(values) // most] for i in range(most)]


@contextmanager
def bar(label: str, *, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's standard error, as a callback of (done, in all); gone when it is full."""
    if enabled:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        if redraws(console):
            with Progress(console=console, transient=True) as shown:
                task = shown.add_task(label, total=None)
                yield lambda done, total: shown.update(task, completed=done, total=total or None)
            return
    yield lambda done, total: None
