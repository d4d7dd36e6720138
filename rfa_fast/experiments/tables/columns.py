"""The columns of the tables: which figures a metric gives on which subsets, and how they are shown.

A figure is called as :func:`rfa_fast.metrics.read_metrics` calls it: `"D_f/accuracy"` for one of a subset,
`"mia_svm"` for one of a split. Two names are none of :data:`rfa_fast.metrics.METRICS`: `"seconds/finetune"`, the
quotient that Table XII is read for, and `"persistence"`, accuracy on D_f in the states that a released model meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rfa_fast.metrics import METRICS, check_metrics
from rfa_fast.report import Metric, standard_metric

QUOTIENT, LASTING = "seconds/finetune", "persistence"
DERIVED = (QUOTIENT, LASTING)

SAMPLE_SUBSETS, CLASS_SUBSETS = ("D_r", "D_f", "D_t"), ("D_r", "D_f", "D_rt", "D_ft")

DISTANCES = ("activation_distance", "activation_distance_squared", "feature_distance_2")
"""Metrics that are themselves a distance to Retrain: the figure is the gap."""

_PER_SUBSET = {
    "token_accuracy": ("Token accuracy", "%", "closer to Retrain", 1, None),
    "loss": ("Loss", "", "closer to Retrain", 3, None),
    "activation_distance": ("Activation distance", "", "lower", 3, 0.05),
    "activation_distance_squared": ("Activation distance, squared", "", "lower", 3, 0.05),
    "feature_distance_1": ("Feature distance to Original", "", "closer to Retrain", 2, None),
    "feature_distance_2": ("Feature distance to Retrain", "", "lower", 2, None),
    "zrf": ("ZRF", "", "closer to Retrain", 3, 0.05),
}
_STATES = {
    "merged/forget_accuracy": "on D_f, adapters merged",
    "live/forget_accuracy": "the same with adapters beside the frozen weights",
    "8-bit/forget_accuracy": "after rounding the weights to 8 bits",
    "8-bit live/forget_accuracy": "after rounding the frozen weights alone to 8 bits",
    "4-bit/forget_accuracy": "after rounding the weights to 4 bits",
    "4-bit live/forget_accuracy": "after rounding the frozen weights alone to 4 bits",
    "finetuned/forget_accuracy": "after an epoch of training on D_r",
    "relearnt/forget_unseen_accuracy": "after training on a tenth of D_f, on the other nine tenths",
}
_PER_SPLIT = {
    "mia_svm": "MIA SVM",
    "mia_logistic": "MIA logistic",
    "mia_svm_unbalanced": "MIA SVM unbalanced",
    "mia_logistic_unbalanced": "MIA logistic unbalanced",
    "mia_auc": "MIA AUC",
    "mia_loss": "MIA loss",
    "mia_loss_auc": "MIA loss AUC",
    "mia_min_k": "MIA Min-K",
    "mia_min_k_auc": "MIA Min-K AUC",
}


def check_columns(names: Iterable[str], *, kind: str | None = None) -> list[str]:
    """The metric names, each once, known and defined for the kind of pair.

    Raises:
        ValueError: an unknown one (the message lists the known), or one that is not defined for `kind`.

    Example:
        >>> check_columns(["accuracy", "seconds/finetune"], kind="image")
        ['accuracy', 'seconds/finetune']
    """
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in METRICS and name not in DERIVED]:
        raise ValueError(f"metrics: got {unknown[0]!r}, expected some of {', '.join((*METRICS, *DERIVED))}")
    task = None if kind is None else "language" if kind == "language" else "classification"
    check_metrics([name for name in wanted if name not in DERIVED], kind=task)  # type: ignore[arg-type]
    return wanted


def measured_metrics(kind: str, wanted: Iterable[str] = (), *, only: bool = False) -> tuple[str, ...]:
    """What is measured of every row: all that the tables show of this kind of pair, and whatever is `wanted` beside.

    One set for all tables, so that a row that one table has measured is finished for the others too. Whoever names
    metrics wants those `only`, and the time: distances run Original and Retrain over every subset of every row again.

    Example:
        >>> "perplexity" in measured_metrics("image"), "perplexity" in measured_metrics("language")
        (False, True)
        >>> measured_metrics("image", ["accuracy"], only=True)
        ('accuracy', 'seconds')
    """
    if only:
        return tuple(sorted({*(name for name in wanted if name not in DERIVED), "seconds"}))
    names = ["accuracy", "loss", "activation_distance", "activation_distance_squared", "feature_distance_1"]
    names += ["feature_distance_2", "mia_svm", "mia_logistic", "mia_auc", "seconds", "peak_mib"]
    if kind == "language":
        names += ["token_accuracy", "perplexity"]
    names += sorted({name for name in wanted if name not in DERIVED} - set(names))
    return tuple(names)


def columns(metrics: Sequence[str], subsets: Sequence[str]) -> list[Metric]:
    """The columns of a table, metric by metric, subset by subset.

    Example:
        >>> [column.key for column in columns(["accuracy", "mia_svm"], ["D_r", "D_f"])]
        ['D_r/accuracy', 'D_f/accuracy', 'mia_svm']
    """
    found: list[Metric] = []
    for name in metrics:
        if name in _PER_SPLIT:
            label = _PER_SPLIT[name]
            found.append(Metric(name, label, digits=2, tolerance=0.05, about=METRICS[name].description))
        elif name == "seconds":
            found.append(Metric(name, "Seconds", better="lower", digits=1, about=METRICS[name].description))
        elif name == "peak_mib":
            found.append(Metric(name, "Peak MiB", better="lower", digits=0, about=METRICS[name].description))
        elif name == LASTING:
            found += [
                Metric(key, key.partition("/")[0], "%", group="Forget accuracy", about=about)
                for key, about in _STATES.items()
            ]
        elif name == QUOTIENT:
            found.append(Metric(name, "× Finetune", better="lower", digits=2, about="its time over Finetune's"))
        else:
            found += [_of_subset(name, subset) for subset in subsets if name != "zrf" or subset in ("D_f", "D_ft")]
    return found


def metric_of(key: str) -> str:
    """The metric that a column shows.

    Example:
        >>> [metric_of(key) for key in ("D_f/accuracy", "mia_svm", "seconds/finetune", "4-bit/forget_accuracy")]
        ['accuracy', 'mia_svm', 'seconds/finetune', 'persistence']
    """
    if key in _STATES:
        return LASTING
    return key if key == QUOTIENT else key.rpartition("/")[2]


def _of_subset(name: str, subset: str) -> Metric:
    key = f"{subset}/{name}"
    if name in ("accuracy", "perplexity"):
        return standard_metric(key)
    group, unit, better, digits, tolerance = _PER_SUBSET[name]
    return Metric(key, subset, unit, better, digits, tolerance, group, METRICS[name].description)  # type: ignore[arg-type]
