"""How much of the data, how many epochs and how many seeds fit into a given time.

Every pair has a ladder of sizes, from everything to two dozen samples, or to what `--quick` takes where that is
less. They shrink in the order in which that costs least in what can be concluded: the samples measured, epochs of
Original and Retrain, training samples, then seeds; the last rungs are too little for a conclusion but show that it
runs. It is always the pair that takes longest that goes a rung down, so that the time is shared among the pairs and
none is left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from rfa_fast.experiments.comparison import scenario_split
from rfa_fast.experiments.tables.forecast import Forecaster
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.plan import Sizes
from rfa_fast.experiments.tables.runner import spaced

_MARGIN = 0.85  # of a budget is planned with
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Rung:
    """Sizes relative to a pair's.

    Attributes:
        samples: measured per subset.
        epochs: share of those of Original and Retrain.
        data: share of the training samples, of which `fewest` are kept.
        fewest: see `data`.
        seeds: at most.
        unlearning: epochs of it, at most.
        forget_all: a sample scenario keeps all it forgets, and four times as many training samples.
    """

    samples: int | None = None
    epochs: float = 1.0
    data: float = 1.0
    fewest: int = 200
    seeds: int | None = None
    unlearning: int | None = None
    forget_all: bool = True


RUNGS = (
    Rung(), Rung(10_000), Rung(5_000), Rung(5_000, 0.6), Rung(5_000, 0.6, 0.6), Rung(2_000, 0.6, 0.4),
    Rung(2_000, 0.4, 0.25), Rung(1_000, 0.4, 0.12), Rung(1_000, 0.2, 0.06), Rung(500, 0.2, 0.03),
    Rung(300, 0.1, 0.015), Rung(300, 0.1, 0.015, seeds=2), Rung(300, 0.1, 0.015, seeds=1),
    Rung(200, 0.1, 0.015, seeds=1, forget_all=False),
    Rung(100, 0.1, 0.015, 100, seeds=1, unlearning=4, forget_all=False),
    Rung(50, 0.1, 0.015, 100, seeds=1, unlearning=2, forget_all=False),
    Rung(50, 0.1, 0.015, 50, seeds=1, unlearning=2, forget_all=False),
    Rung(24, 0.1, 0.015, 24, seeds=1, unlearning=1, forget_all=False),
)  # fmt: skip


def read_budget(text: str) -> float:
    """Seconds from `"3h"`, `"90min"`, `"45m"` or `"600"`.

    Raises:
        ValueError: not of that form, or nothing.

    Example:
        >>> read_budget("3h"), read_budget("1.5m"), read_budget("90")
        (10800.0, 90.0, 90.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or (match[2] or "s") not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"budget: got {text!r}, expected a time such as 3h, 90min or 600s")
    return float(match[1]) * _UNITS[match[2] or "s"]


def ladder(forecaster: Forecaster, pair: str) -> list[Sizes]:
    """The sizes of a pair, falling; without those that leave a scenario nothing."""
    given = forecaster.choice.sizes_of(pair)
    extents = [extent for (name, _), extent in forecaster.extents.items() if name == pair]
    counts = [n for extent in extents for text, n in extent.forgotten.items() if text.startswith("sample:")]
    most, usual = max(extent.train for extent in extents), max(extent.epochs for extent in extents)
    asked = bool(forecaster.choice.scenarios)  # by the user, whose counts stay
    found: list[Sizes] = []
    for rung in RUNGS:
        kept = [4 * count for count in counts] if rung.forget_all or asked else []
        limit, epochs = max(round(most * rung.data), rung.fewest, *kept), max(1, round(usual * rung.epochs))
        sizes = Sizes(
            limit if limit < most else None,
            epochs if epochs < usual else None,
            rung.samples,
            rung.unlearning,
            rung.seeds,
        )
        found.append(least(found[-1] if found else given, sizes))
    quick = Sizes(*PAIRS[pair].quick)
    if not asked or quick.limit is None or quick.limit >= max((4 * count for count in counts), default=0):
        found.append(least(found[-1], quick))
    return [sizes for sizes in dict.fromkeys(found) if sizes == found[0] or possible(forecaster, pair, sizes)]


def least(*several: Sizes) -> Sizes:
    """The smaller of each size.

    Example:
        >>> least(Sizes(limit=100, epochs=2), Sizes(limit=80, samples=5))
        Sizes(limit=80, epochs=2, samples=5, unlearning=None, seeds=None)
    """

    def smallest(name: str) -> int | None:
        return min((value for sizes in several if (value := getattr(sizes, name)) is not None), default=None)

    return Sizes(**{field.name: smallest(field.name) for field in fields(Sizes)})


def possible(forecaster: Forecaster, pair: str, sizes: Sizes) -> bool:
    """Whether every class and keyword of the plan still has samples to forget and to keep, learnt and new."""
    for (name, group), experiment in forecaster.experiments.items():
        if name == pair:
            train, test = spaced(experiment.train, sizes.limit), spaced(experiment.test, sizes.limit)
            fewer = replace(experiment, train=train, test=test)
            for scenario in forecaster.extents[name, group].forgotten:
                if not scenario.startswith("sample:"):
                    try:
                        scenario_split(fewer, scenario, 0)
                    except ValueError:
                        return False
    return True


def fit(forecaster: Forecaster, budget: float, abreast: int = 1) -> dict[str, Sizes]:
    """Sizes of each pair whose plan takes less than `budget` seconds with `abreast` units computed at a time.

    Raises:
        ValueError: even the smallest take longer; the message says how long.
    """
    ladders = {pair: ladder(forecaster, pair) for pair in forecaster.rates}
    at = dict.fromkeys(ladders, 0)
    costs = {pair: forecaster.cost(pair, sizes[0]) for pair, sizes in ladders.items()}
    available = _MARGIN * budget * abreast
    while sum(costs.values()) > available:
        lower = [pair for pair in ladders if at[pair] + 1 < len(ladders[pair])]
        if not lower:
            least_time = math.ceil(sum(costs.values()) / abreast / _MARGIN)
            raise ValueError(
                f"budget: got {budget:g} s, expected {least_time} s or more for this plan at its smallest; ask for "
                "fewer tables or methods, or other data"
            )
        longest = max(lower, key=lambda pair: costs[pair])
        at[longest] += 1
        costs[longest] = forecaster.cost(longest, ladders[longest][at[longest]])
    for pair in sorted(costs, key=lambda pair: costs[pair]):  # what the last step left over
        while (
            at[pair]
            and sum(costs.values()) - costs[pair] + (more := forecaster.cost(pair, ladders[pair][at[pair] - 1]))
            <= available
        ):
            at[pair], costs[pair] = at[pair] - 1, more
    return {pair: sizes[at[pair]] for pair, sizes in ladders.items()}
