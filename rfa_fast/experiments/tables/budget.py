"""How long a plan takes, and how much of the data fits into a given time.

A forecast counts samples (trained on, unlearnt with, measured, once per epoch and model) and multiplies by
seconds per sample: those that earlier runs noted on this machine with as many threads, else those of a
probe of three steps. A method that has not run yet is taken for a multiple of a training step, the multiple
that Table XII has for it. With a budget, sizes shrink in the order in which that costs least in what can be
concluded: first the samples measured, then epochs of Original and Retrain, then the training samples.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Subset

from rfa_fast.experiments.cache import labels_of
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import scenario_split
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.plan import Choice, PlannedRow, Sizes, Unit
from rfa_fast.experiments.tables.rates import MEASURE, TRAIN, Rates, passes_of
from rfa_fast.experiments.tables.runner import BASELINES, Workshop
from rfa_fast.methods.record import hash_model

# Table XII, sample: each method's time over Finetune's, which is a training step's. RFA is counted as a full one.
_OVER_TRAINING = {"neggrad": 1.0, "finetune": 1.0, "badt": 1.7, "scrub": 1.5, "salun": 1.2, "graddiff": 1.2, "npo": 1.5,
                  "simnpo": 1.2, "rmu": 1.2, "rfa": 1.2}  # fmt: skip
# Measuring compares with two other models on part of the samples; what Retrain predicts is kept, texts' logits are not.
_OVER_FORWARD = {"classification": 1.6, "language": 3.0}
_MARGIN = 0.85  # of a budget is planned with
_STEPS = 3
_FEWEST = 200
_EACH = 1.0  # seconds of a row that no sample counts for: the attack's classifier, files
_MODEL = "model"  # likewise, by the model's size: its copy, its hashes, the texts it writes; noted times hold it
_STATES = 8  # that D_f is measured in when it is asked whether it stays forgotten
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

# (samples measured, share of the epochs, share of the training samples), from everything to very little.
LADDER: tuple[tuple[int | None, float, float], ...] = (
    (None, 1, 1), (10_000, 1, 1), (5_000, 1, 1), (5_000, 0.6, 1), (5_000, 0.6, 0.6), (2_000, 0.6, 0.4),
    (2_000, 0.4, 0.25), (1_000, 0.4, 0.12), (1_000, 0.2, 0.06), (500, 0.2, 0.03), (300, 0.1, 0.015),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to take.

    Attributes:
        seconds: in all.
        rows: still to be computed.
        models: still to be trained.
        finished: rows that are read.
        source: where the rates come from, in words.
    """

    seconds: float
    rows: int
    models: int
    finished: int
    source: str


@dataclass(frozen=True)
class Extent:
    """Sizes of a pair's data before anything is left out: samples, the forgotten ones of each scenario, epochs."""

    train: int
    test: int
    forgotten: Mapping[str, int]
    epochs: int


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


class Forecaster:
    """Rates and extents of the pairs of a plan.

    Args:
        units: of the plan.
        choice: what was asked for.
        shop: reads the data.
    """

    def __init__(self, units: Sequence[Unit], choice: Choice, shop: Workshop) -> None:
        self.units, self.choice, self.shop = units, choice, shop
        self.rates: dict[str, dict[str, float]] = {}
        self.extents: dict[tuple[str, str], Extent] = {}
        self.probed: list[str] = []
        for name in dict.fromkeys(unit.pair for unit in units):
            scenarios = sorted({text for unit in units if unit.pair == name for text in unit.scenarios})
            for group in dict.fromkeys(PAIRS[name].group(text) for text in scenarios):
                own = [text for text in scenarios if PAIRS[name].group(text) == group]
                experiment = shop.experiment(name, 0, own[0])
                if name not in self.rates:
                    self.rates[name] = self._rates(name, experiment)
                forgotten = {text: len(scenario_split(experiment, text, 0).forget) for text in own}
                train, test = len(labels_of(experiment.train)), len(labels_of(experiment.test))
                self.extents[name, group] = Extent(train, test, forgotten, int(experiment.recipe["epochs"]))

    @property
    def source(self) -> str:
        """Where the rates come from."""
        if not self.probed:
            return "from the times of earlier rows"
        if len(self.probed) == len(self.rates):
            return f"from a probe of {_STEPS} steps"
        return f"from the times of earlier rows, and for {', '.join(self.probed)} from a probe of {_STEPS} steps"

    def estimate(self) -> Estimate:
        """What the plan takes, finished rows and models left out."""
        seconds, rows, models, finished = 0.0, 0, 0, 0
        trained: set[tuple[str, int, str]] = set()
        for unit in self.units:
            for scenario, planned in unit.scenarios.items():
                run = self.shop.scenario(unit, scenario)
                methods = self.shop.methods(unit, scenario, run)
                baselines = BASELINES[1:] if unit.retrain_only else BASELINES
                pending, missing = run.pending(baselines, list(methods.values()))
                rows, finished = rows + len(pending), finished + len(baselines) + len(methods) - len(pending)
                sizes = {name: len(subset) for name, subset in run.subsets.items()}
                rates, epochs = self.rates[unit.pair], int(run.experiment.recipe["epochs"])
                for label in missing:
                    of = PAIRS[unit.pair].group(scenario) if label == "Original" else scenario
                    if (made := (unit.pair, unit.seed, f"{label} {of}")) in trained:
                        continue
                    trained.add(made)
                    models += 1
                    kept = sizes["D_r"] + (sizes["D_f"] if label == "Original" else 0)
                    seconds += rates[TRAIN] * kept * epochs
                each = sum(map(len, run.measured.values()))
                seconds += (self._once(unit.pair) + rates[MEASURE] * each) * len(pending)
                if unit.lasting:
                    again = rates[TRAIN] * (sizes["D_r"] + sizes["D_f"]) + rates[MEASURE] * _STATES * sizes["D_f"]
                    seconds += again * len(pending)
                for key, method in methods.items():
                    if method.label in pending:
                        seconds += self._row(unit.pair, planned[key], sizes, dict(method.options))
        return Estimate(seconds, rows, models, finished, self.source)

    def total(self, step: tuple[int | None, float, float]) -> float:
        """What the plan would take at a step of the ladder if nothing were finished."""
        seconds = 0.0
        trained: set[tuple[str, int, str]] = set()
        for unit in self.units:
            sizes, rates = self.sizes(unit.pair, step), self.rates[unit.pair]
            for scenario, planned in unit.scenarios.items():
                group = PAIRS[unit.pair].group(scenario)
                extent = self.extents[unit.pair, group]
                share = min(1.0, (sizes.limit or extent.train) / extent.train)
                epochs = sizes.epochs or extent.epochs
                if not unit.retrain_only and (unit.pair, unit.seed, f"Original {group}") not in trained:
                    trained.add((unit.pair, unit.seed, f"Original {group}"))
                    seconds += rates[TRAIN] * extent.train * share * epochs
                counted = scenario.startswith("sample:")
                forgotten = extent.forgotten[scenario] * (1.0 if counted else share)
                parts = {"D_f": int(forgotten), "D_r": int(extent.train * share - forgotten)}
                if (retrain := (unit.pair, unit.seed, f"Retrain {scenario}")) not in trained:
                    trained.add(retrain)
                    seconds += rates[TRAIN] * parts["D_r"] * epochs
                measured = [parts["D_f"], parts["D_r"], int(min(extent.test, sizes.limit or extent.test))]
                each = sum(min(n, sizes.samples or n) for n in measured)
                rows = len(planned) + (1 if unit.retrain_only else 2)
                seconds += (self._once(unit.pair) + rates[MEASURE] * each) * rows
                if unit.lasting:
                    again = rates[TRAIN] * (parts["D_r"] + parts["D_f"]) + rates[MEASURE] * _STATES * parts["D_f"]
                    seconds += again * rows
                for row in planned.values():
                    kind = "sample" if counted else "class"
                    options = row.options(PAIRS[unit.pair], kind, parts["D_f"], 0, quick=self.choice.quick)
                    seconds += self._row(unit.pair, row, parts, options)
        return seconds

    def sizes(self, pair: str, step: tuple[int | None, float, float]) -> Sizes:
        """The sizes of a pair at a step of the ladder; a sample scenario keeps four times as many as it forgets."""
        samples, epoch_share, data_share = step
        given = self.choice.sizes.get(pair, Sizes())
        extents = [extent for (name, _), extent in self.extents.items() if name == pair]
        counts = [n for extent in extents for text, n in extent.forgotten.items() if text.startswith("sample:")]
        most, usual = max(extent.train for extent in extents), max(extent.epochs for extent in extents)
        limit = max(round(most * data_share), _FEWEST, *(4 * count for count in counts))
        epochs = max(1, round(usual * epoch_share))
        return Sizes(
            limit if limit < most else given.limit,
            epochs if epochs < usual else given.epochs,
            samples if given.samples is None or (samples is not None and samples < given.samples) else given.samples,
        )

    def fit(self, budget: float, abreast: int = 1) -> dict[str, Sizes]:
        """The largest sizes whose plan takes less than `budget` seconds with `abreast` seeds computed at a time.

        Raises:
            ValueError: even the smallest take longer; the message says how long.
        """
        for step in LADDER:
            if self.total(step) / abreast <= _MARGIN * budget:
                return {pair: self.sizes(pair, step) for pair in self.rates}
        least = self.total(LADDER[-1]) / abreast / _MARGIN
        raise ValueError(
            f"budget: got {budget:g} s, expected {math.ceil(least)} s or more for this plan at its smallest; ask for "
            "fewer seeds, methods or tables"
        )

    def _once(self, pair: str) -> float:
        """Seconds of any row that no sample counts for."""
        return _EACH + self.rates[pair].get(_MODEL, 0.0)

    def _row(self, pair: str, row: PlannedRow, sizes: dict[str, int], options: dict[str, Any]) -> float:
        rates = self.rates[pair]
        rate = rates.get(row.spec.cost_key, rates[TRAIN] * _OVER_TRAINING.get(row.spec.method, 1.5))
        return rate * passes_of(row, sizes, options)

    def _rates(self, name: str, experiment: Experiment) -> dict[str, float]:
        """Those noted earlier, completed by a probe where training or measuring was not noted."""
        noted = Rates(self.choice.cache, name, autocast=self.choice.autocast)
        keys = {row.spec.cost_key for unit in self.units if unit.pair == name
                for rows in unit.scenarios.values() for row in rows.values()}  # fmt: skip
        found = {key: rate for key in (TRAIN, MEASURE, *sorted(keys)) if (rate := noted.get(key)) is not None}
        if TRAIN not in found or MEASURE not in found:
            self.probed.append(name)
            probed = probe(experiment)
            if MEASURE in found:
                del probed[_MODEL]
            found = {**probed, **found}
        return found


def probe(experiment: Experiment) -> dict[str, float]:
    """Seconds per sample of training and of measuring, and seconds once a row, by a few steps of an untrained model.

    The first step is left out: libraries warm up in it.
    """
    from rfa_fast.methods import train
    from rfa_fast.metrics import predict

    model = experiment.build()
    batch = int(experiment.recipe.get("batch_size", 32))
    few = Subset(experiment.train, range(min(len(labels_of(experiment.train)), batch * _STEPS)))
    settings = {key: value for key, value in experiment.recipe.items() if key not in ("epochs", "warmup_steps")}
    steps = train(
        copy.deepcopy(model), few, epochs=_STEPS, max_steps=_STEPS, progress=False, label="probe", **settings
    ).history
    warm = steps[1:] or steps
    seconds = steps[-1]["seconds"] - (steps[0]["seconds"] if len(steps) > 1 else 0.0)
    predict(model, experiment.loader(Subset(few, range(min(len(few), 8)))))
    begun = time.perf_counter()
    predict(model, experiment.loader(few))
    measuring = _OVER_FORWARD[experiment.kind] * (time.perf_counter() - begun) / len(few)
    begun = time.perf_counter()
    twin = copy.deepcopy(model)
    for _ in ("before", "after"):
        hash_model(twin)
    if experiment.write is not None:
        experiment.write(twin)
    once = time.perf_counter() - begun
    return {
        TRAIN: seconds / sum(step["samples"] for step in warm),
        MEASURE: measuring,
        _MODEL: once,
    }


def words(seconds: float) -> str:
    """A time for people, rounded to what a forecast can say.

    Example:
        >>> words(40), words(700), words(9000)
        ('under a minute', '12 min', '2 h 30 min')
    """
    if seconds < 60:
        return "under a minute"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
