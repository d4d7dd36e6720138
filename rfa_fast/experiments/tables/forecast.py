"""How long a plan takes.

A forecast counts samples (trained on, unlearnt with, measured, once per epoch and model) and multiplies by
seconds per sample: those that earlier runs noted on this machine with as many threads, else those of a
probe of three steps. A method that has not run yet is taken for a multiple of a training step, the multiple
that Table XII has for it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Subset

from rfa_fast.experiments.cache import labels_of
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.comparison import scenario_split
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.plan import Choice, PlannedRow, Sizes, Unit, counted
from rfa_fast.experiments.tables.rates import FORWARD, TRAIN, Rates, forwards_of, passes_of
from rfa_fast.experiments.tables.runner import Workshop
from rfa_fast.methods.record import hash_model

# Table XII, sample: each method's time over Finetune's, which is a training step's. RFA is counted as a full one.
_OVER_TRAINING = {"neggrad": 1.0, "finetune": 1.0, "badt": 1.7, "scrub": 1.5, "salun": 1.2, "graddiff": 1.2, "npo": 1.5,
                  "simnpo": 1.2, "rmu": 1.2, "rfa": 1.2}  # fmt: skip
_STEPS = 3
_EACH = 1.0  # seconds of a row that no sample counts for: the attack's classifier, files
_MODEL = "model"  # likewise, by the model's size: its copy, its hashes, the texts it writes; noted times hold it
_STATES = 8  # that D_f is measured in when it is asked whether it stays forgotten


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
        self.experiments: dict[tuple[str, str], Experiment] = {}
        self.probed: list[str] = []
        for name in dict.fromkeys(unit.pair for unit in units):
            scenarios = sorted({text for unit in units if unit.pair == name for text in unit.scenarios})
            for group in dict.fromkeys(PAIRS[name].group(text) for text in scenarios):
                own = [text for text in scenarios if PAIRS[name].group(text) == group]
                experiment = shop.experiment(name, 0, own[0])
                self.experiments[name, group] = experiment
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
                pending, missing = run.pending(unit.baselines, list(methods.values()))
                rows, finished = rows + len(pending), finished + len(unit.baselines) + len(methods) - len(pending)
                sizes = {name: len(subset) for name, subset in run.subsets.items()}
                epochs = int(run.experiment.recipe["epochs"])
                for label in missing:
                    of = PAIRS[unit.pair].group(scenario) if label == "Original" else scenario
                    if (made := (unit.pair, unit.seed, f"{label} {of}")) in trained:
                        continue
                    trained.add(made)
                    models += 1
                    kept = sizes["D_r"] + (sizes["D_f"] if label == "Original" else 0)
                    seconds += self.rates[unit.pair][TRAIN] * kept * epochs
                forwards = forwards_of(map(len, run.measured.values()), PAIRS[unit.pair].kind)
                unlearned = [
                    (planned[key], dict(method.options)) for key, method in methods.items() if method.label in pending
                ]
                seconds += self._scenario(unit, sizes, forwards, len(pending), unlearned)
        return Estimate(seconds, rows, models, finished, self.source)

    def cost(self, pair: str, sizes: Sizes) -> float:
        """Seconds that the plan's rows of a pair would take at these sizes if nothing were finished."""
        seconds, trained = 0.0, set[tuple[int, str]]()
        seeds = self.choice.seeds_at(sizes)
        for unit in self.units:
            if unit.pair == pair and unit.seed < seeds:
                seconds += self.unit_cost(unit, sizes, trained)
            elif unit.pair == pair and unit.seed < self.choice.retrain_seeds:
                nothing: dict[str, dict[str, PlannedRow]] = {scenario: {} for scenario in unit.scenarios}
                seconds += self.unit_cost(replace(unit, scenarios=nothing, retrain_only=True), sizes, trained)
        return seconds

    def longest_first(self) -> list[Unit]:
        """The units by what they would take, so that no process is left alone with a long one at the end."""
        return sorted(self.units, key=lambda unit: -self.unit_cost(unit, self.choice.sizes_of(unit.pair)))

    def unit_cost(self, unit: Unit, sizes: Sizes, trained: set[tuple[int, str]] | None = None) -> float:
        """Seconds of one unit; `trained`: seeds and names of models that are there, to which its own are added."""
        seconds, trained = 0.0, set() if trained is None else trained
        pair, rate = PAIRS[unit.pair], self.rates[unit.pair][TRAIN]
        for scenario, planned in unit.scenarios.items():
            group = pair.group(scenario)
            extent = self.extents[unit.pair, group]
            limit = extent.train if sizes.limit is None else min(sizes.limit, extent.train)
            epochs = extent.epochs if sizes.epochs is None else min(sizes.epochs, extent.epochs)
            kind, _, target = scenario.partition(":")
            if kind != "sample":
                forgotten = int(extent.forgotten[scenario] * limit / extent.train)
            elif sizes.limit is None or self.choice.scenarios:
                forgotten = int(target)
            else:
                forgotten = counted(int(target), limit)
            parts = {"D_f": forgotten, "D_r": limit - forgotten}
            models = {f"Retrain {scenario}": parts["D_r"]}
            if not unit.retrain_only:
                models[f"Original {group}"] = limit
            seconds += sum(rate * n * epochs for name, n in models.items() if (unit.seed, name) not in trained)
            trained |= {(unit.seed, name) for name in models}
            counts = (*parts.values(), min(extent.test, limit))
            forwards = forwards_of((min(n, sizes.samples or n) for n in counts), pair.kind)
            unlearned = [
                (row, row.options(pair, kind, forgotten, 0, most_epochs=sizes.unlearning)) for row in planned.values()
            ]
            count = len(planned) + len(unit.baselines)
            seconds += self._scenario(unit, parts, forwards, count, unlearned)
        return seconds

    def _scenario(
        self,
        unit: Unit,
        sizes: Mapping[str, int],
        forwards: float,
        count: int,
        unlearned: Sequence[tuple[PlannedRow, Mapping[str, Any]]],
    ) -> float:
        """Seconds of `count` rows, each measured in so many forwards of a sample, some of them after unlearning."""
        rates = self.rates[unit.pair]
        of_row = _EACH + rates.get(_MODEL, 0.0) + rates[FORWARD] * forwards
        if unit.lasting:
            of_row += rates[TRAIN] * (sizes["D_r"] + sizes["D_f"]) + rates[FORWARD] * _STATES * sizes["D_f"]
        seconds = of_row * count
        for row, options in unlearned:
            usual = rates[TRAIN] * _OVER_TRAINING.get(row.spec.method, 1.5)
            seconds += rates.get(row.spec.cost_key, usual) * passes_of(row, sizes, options)
        return seconds

    def _rates(self, name: str, experiment: Experiment) -> dict[str, float]:
        """Those noted earlier, completed by a probe where training or measuring was not noted."""
        noted = Rates(self.choice.cache, name, autocast=self.choice.autocast)
        keys = {row.spec.cost_key for unit in self.units if unit.pair == name
                for rows in unit.scenarios.values() for row in rows.values()}  # fmt: skip
        found = {key: rate for key in (TRAIN, FORWARD, *sorted(keys)) if (rate := noted.get(key)) is not None}
        if TRAIN not in found or FORWARD not in found:
            self.probed.append(name)
            probed = probe(experiment)
            if FORWARD in found:
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
    forward = (time.perf_counter() - begun) / len(few)
    begun = time.perf_counter()
    twin = copy.deepcopy(model)
    for _ in ("before", "after"):
        hash_model(twin)
    if experiment.write is not None:
        experiment.write(twin)
    once = time.perf_counter() - begun
    return {
        TRAIN: seconds / sum(step["samples"] for step in warm),
        FORWARD: forward,
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
