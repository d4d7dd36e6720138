"""The metrics by name: what each needs, and how it is read off a measured split.

The functions of this package are the interface for code; a command takes names. Whatever accepts
metric names checks them here before anything is trained, because a misspelt one found afterwards has
cost the training. Adding a metric is adding a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rfa_fast.metrics.cost import Cost
from rfa_fast.metrics.evaluate import SplitResult

Kind = Literal["classification", "language"]
Need = Literal["retrained", "original", "incompetent", "layers", "test", "cost"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        description: a phrase for a list; names its place in the paper.
        kinds: the tasks it is defined for; `"language"` is a label per token.
        needs: besides the model and its subsets: a `retrained`, `original` or `incompetent` model and the shared
            `layers` (all of :class:`~rfa_fast.metrics.references.References`), a `test` subset, or the `cost`
            of the run.
        split: reads a figure of the whole split, given it and a seed; `None`: a figure of each subset, by
            this metric's name in :meth:`~rfa_fast.metrics.evaluate.SubsetResult.figures`, or of the cost.
    """

    description: str
    kinds: tuple[Kind, ...] = ("classification", "language")
    needs: tuple[Need, ...] = ()
    split: Callable[[SplitResult, int], float] | None = None


def _attack(description: str, **options: object) -> Metric:
    """Share of D_f that a trained attacker calls a member."""

    def read(result: SplitResult, seed: int) -> float:
        return result.membership(seed=seed, **options).forget_share  # type: ignore[arg-type]

    kinds: tuple[Kind, ...] = ("language",) if options.get("feature") == "min_k" else ("classification", "language")
    return Metric(description, kinds, ("test",), read)


def _auc(description: str, **options: object) -> Metric:
    """Area under the ROC curve of D_f against unseen items."""

    def read(result: SplitResult, seed: int) -> float:
        return result.auc(**options)  # type: ignore[arg-type]

    kinds: tuple[Kind, ...] = ("language",) if options.get("feature") == "min_k" else ("classification", "language")
    return Metric(description, kinds, ("test",), read)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric("share of items predicted right, of texts whole answers (V-A5)"),
        "token_accuracy": Metric("share of labelled tokens predicted right", kinds=("language",)),
        "perplexity": Metric("exp of the mean loss of a token (V-A5)", kinds=("language",)),
        "loss": Metric("mean cross-entropy in nats"),
        "activation_distance": Metric("mean L2 distance of probabilities to Retrain's (V-B4)", needs=("retrained",)),
        "activation_distance_squared": Metric("the same, squared: Table VI's scale", needs=("retrained",)),
        "feature_distance_1": Metric("of the layers to Original's, summed (V-B5)", needs=("original", "layers")),
        "feature_distance_2": Metric("of the layers to Retrain's, summed (V-B5)", needs=("retrained", "layers")),
        "mia_svm": _attack("share of D_f an SVM on entropies calls a member (V-C)", classifier="svm"),
        "mia_logistic": _attack("the same with logistic regression", classifier="logistic"),
        "mia_svm_unbalanced": _attack("mia_svm on sets of unequal size", classifier="svm", balanced=False),
        "mia_logistic_unbalanced": _attack(
            "mia_logistic on sets of unequal size", classifier="logistic", balanced=False
        ),
        "mia_auc": _auc("ROC area of D_f's entropies against unseen items'"),
        "mia_loss": _attack("share of D_f that logistic regression on losses calls a member", feature="loss"),
        "mia_loss_auc": _auc("ROC area of D_f's losses against unseen items'", feature="loss"),
        "mia_min_k": _attack("share of D_f that logistic regression on Min-20 % calls a member", feature="min_k"),
        "mia_min_k_auc": _auc("ROC area of D_f's Min-20 % against unseen texts'", feature="min_k"),
        "zrf": Metric("likeness to an untrained model on forgotten items (Chundawat et al.)", needs=("incompetent",)),
        "seconds": Metric("time of the unlearning run (Table XII)", needs=("cost",)),
        "peak_mib": Metric("peak memory of the unlearning run in MiB", needs=("cost",)),
    }
)
"""Name -> metric."""


def check_metrics(
    names: Iterable[str], *, kind: Kind | None = None, available: Iterable[str] | None = None
) -> list[str]:
    """The names, each once, after a look at whether each is known and can be had.

    Args:
        names: of metrics.
        kind: the task; `None` does not look.
        available: what there is of what metrics need (:data:`Need`); `None` does not look.

    Raises:
        ValueError: an unknown name (with the known ones), one that is not defined for `kind`, or one that
            needs what is not there.
        TypeError: one string.

    Example:
        >>> check_metrics(["accuracy", "mia_svm", "accuracy"], kind="classification", available=["test"])
        ['accuracy', 'mia_svm']
    """
    if isinstance(names, str):
        raise TypeError(f"metrics: got the string {names!r}, expected a list of names; [{names!r}] for one")
    wanted = list(dict.fromkeys(names))
    there = None if available is None else set(available)
    for name in wanted:
        if name not in METRICS:
            raise ValueError(f"metrics: got {name!r}, expected some of {', '.join(METRICS)}")
        metric = METRICS[name]
        if kind is not None and kind not in metric.kinds:
            raise ValueError(f"metrics: got {name!r} for a {kind} task, expected one that is defined for it")
        missing = [] if there is None else [need for need in metric.needs if need not in there]
        if missing:
            raise ValueError(f"metrics: got {name!r} without {' and '.join(missing)}, expected what it needs")
    return wanted


def read_metrics(
    result: SplitResult, names: Iterable[str], *, cost: Cost | None = None, seed: int = 0
) -> dict[str, float]:
    """The figures of these metrics, in one flat dict.

    Args:
        result: of :func:`~rfa_fast.metrics.evaluate.evaluate_split`, with the references that the metrics need.
        names: of metrics.
        cost: of the unlearning run.
        seed: of the attackers' subsampling.

    Returns:
        `"D_f/accuracy"` and so on for a figure of each subset that has it, `"mia_svm"` for one of the split.

    Raises:
        ValueError: an unknown name, or a metric that this result does not hold.

    Example:
        >>> import torch
        >>> from rfa_fast.metrics import evaluate_split
        >>> result = evaluate_split(torch.nn.Identity(), {"D_f": [(torch.eye(2), torch.tensor([0, 0]))]})
        >>> read_metrics(result, ["accuracy"])
        {'D_f/accuracy': 0.5}
    """
    figures = result.figures()
    out: dict[str, float] = {}
    for name in check_metrics(names):
        metric = METRICS[name]
        if metric.split is not None:
            out[name] = metric.split(result, seed)
            continue
        if "cost" in metric.needs:
            if cost is None:
                raise ValueError(f"metrics: got {name!r} without the cost of the run, expected cost=…")
            out[name] = cost.seconds if name == "seconds" else cost.peak_mib
            continue
        found = {f"{subset}/{name}": figures[f"{subset}/{name}"] for subset in result if f"{subset}/{name}" in figures}
        if not found:
            needs = f"references with {' and '.join(metric.needs)}" if metric.needs else "labels of the other kind"
            raise ValueError(f"metrics: got {name!r} of a split measured without it, expected {needs}")
        out |= found
    return out
