"""From the figures of several seeds to means, intervals, gaps and ranks.

    x̄ ± t_{0.975, n−1} · s / √n,        s² = Σ (x_i − x̄)² / (n − 1)

With three seeds t is 4.3, not 2: an interval that a reader can trust is wide, and one seed has none. A
gap is taken seed by seed, because Retrain of a seed saw the same split; its mean over the columns of a
metric orders the methods. Metrics have different units and are never added to each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Several figures in short.

    Attributes:
        mean: of them; NaN where one is missing.
        half: half the width of the interval around the mean; NaN for a single figure.
        low, high: the smallest and the largest.
        n: how many.
    """

    mean: float
    half: float
    low: float
    high: float
    n: int


def summarise(values: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Mean, t-interval, smallest and largest.

    A figure that is not finite makes the mean what it is (a perplexity beyond float64 is infinite) and leaves
    no interval.

    Raises:
        ValueError: no figure, or a confidence that is not in (0, 1).

    Example:
        >>> short = summarise([1.0, 2.0, 3.0])
        >>> short.mean, round(short.half, 3)
        (2.0, 2.484)
    """
    if not values:
        raise ValueError("values: got none, expected at least one figure")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence!r}, expected a number > 0 and < 1")
    n, mean = len(values), _mean(values)
    half = math.nan
    if n > 1 and math.isfinite(mean):
        from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

        deviation = math.hypot(*(value - mean for value in values)) / math.sqrt(n - 1)
        half = float(t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Summary(mean, half, min(values), max(values), n)


def gaps(values: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """Figure minus reference, of every seed that has both.

    Example:
        >>> gaps({0: 0.9, 1: 0.8}, {0: 0.5, 1: 0.5, 2: 0.5})
        [0.4, 0.30000000000000004]
    """
    return [value - reference[seed] for seed, value in values.items() if seed in reference]


def mean_absolute_gap(columns: Sequence[Sequence[float]]) -> float:
    """Mean over the columns of |mean over the seeds of the gap|; NaN without a column, or with a figure missing.

    The absolute value comes after the mean over the seeds: chance around Retrain's figure is no gap.

    Example:
        >>> mean_absolute_gap([[0.1, -0.1], [0.2, 0.4]])
        0.15
    """
    means = [abs(_mean(column)) for column in columns if column]
    return round(_mean(means), 15) if means else math.nan


def _mean(values: Sequence[float]) -> float:
    """The mean, of perplexities whose sum float64 does not hold as well; NaN of infinities of both signs."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values)
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)


def ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Name -> rank, 1 for the smallest; equal figures share the better rank, NaN has none.

    Example:
        >>> ranks({"a": 0.3, "b": 0.1, "c": 0.3, "d": float("nan")})
        {'a': 2, 'b': 1, 'c': 2}
    """
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    return {name: 1 + sum(other < value for other in known.values()) for name, value in known.items()}


def within(value: float, summary: Summary) -> bool:
    """Whether a figure lies between the smallest and the largest of others, both included.

    Example:
        >>> within(0.5, summarise([0.4, 0.6])), within(0.7, summarise([0.4, 0.6]))
        (True, False)
    """
    return summary.low <= value <= summary.high
