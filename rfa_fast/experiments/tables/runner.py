"""Computing one unit of a plan: its data, its trained models, its rows.

Everything that takes time ends up on disk at once: trained models in the cache, finished rows beside them,
an unlearning run's steps in its checkpoint. So a run that is interrupted, killed, or repeated for another
table loses at most the row under way. A row that cannot be had (NegGrad's training runs off to infinity, a rank is
more than a layer has) has no figures and a sentence that says why; the table goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Subset

from rfa_fast.data import Split
from rfa_fast.experiments.cache import ModelCache, Say, labels_of
from rfa_fast.experiments.common import Experiment, Method, Row, ScenarioRun
from rfa_fast.experiments.comparison import Request, scenario_split, title_of
from rfa_fast.experiments.measuring import Measures, thinned
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.plan import Choice, Unit
from rfa_fast.experiments.tables.rates import Rates

SMALLEST = 2


class Place(NamedTuple):
    """What figures are of: pair, seed, scenario, and whether they say how the forgetting lasts."""

    pair: str
    seed: int
    scenario: str
    lasting: bool = False


@dataclass
class Found:
    """What one seed gave on one scenario.

    Attributes:
        rows: `"Original"`, `"Retrain"`, and each row by its key.
        failed: key -> why a row has no figures.
        split: what was forgotten.
        sizes: subset -> samples.
        measured: subset -> samples measured.
        recipe: of Original and Retrain.
        options: key -> keyword arguments of :func:`rfa_fast.unlearn`.
        title: the scenario in words.
    """

    rows: dict[str, Row]
    failed: dict[str, str]
    split: Split
    sizes: dict[str, int]
    measured: dict[str, int]
    recipe: dict[str, Any]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    title: str = ""


class Workshop:
    """The experiments of a process: data are held once per pair, whatever the seed.

    Args:
        choice: what was asked for.
        say: is told what happens.
        progress: show bars on standard error.
    """

    def __init__(self, choice: Choice, *, say: Say, progress: bool) -> None:
        self.choice, self.say, self.progress = choice, say, progress
        self.models = ModelCache(choice.cache, say)
        self._data: dict[tuple[str, str], tuple[Dataset[Any], Dataset[Any]]] = {}
        self._experiments: dict[tuple[str, int, str], Experiment] = {}

    def experiment(self, pair: str, seed: int, scenario: str) -> Experiment:
        """Data, model and recipe of a pair at the sizes of the plan.

        Raises:
            FileNotFoundError: data or model are not there; the message holds the command that brings them.
            ValueError: a limit too small.
        """
        group = PAIRS[pair].group(scenario)
        if (pair, seed, group) in self._experiments:
            return self._experiments[pair, seed, group]
        sizes = self.choice.sizes_of(pair)
        if sizes.limit is not None and sizes.limit < SMALLEST:
            raise ValueError(f"limit: got {sizes.limit}, expected {SMALLEST} or more samples")
        request = Request(
            scenarios=(scenario,), seed=seed, epochs=sizes.epochs, data=self.choice.data, cache=self.choice.cache,
            say=self.say, progress=self.progress,
        )  # fmt: skip
        made = PAIRS[pair].make(request)
        if (pair, group) not in self._data:
            held = made.on_validation() if self.choice.validation else made
            self._data[pair, group] = (spaced(held.train, sizes.limit), spaced(held.test, sizes.limit))
        train, test = self._data[pair, group]
        name = f"{made.name}-validation" if self.choice.validation else made.name
        recipe = {**made.recipe, **self.choice.numerics}
        found = replace(made, name=name, train=train, test=test, recipe=recipe)
        self._experiments[pair, seed, group] = found
        return found

    def scenario(self, unit: Unit, scenario: str) -> ScenarioRun:
        """One scenario of a unit, ready to be computed.

        Raises:
            ValueError: a class or keyword that is not there, or a subset that would be empty.
        """
        experiment = self.experiment(unit.pair, unit.seed, scenario)
        split = scenario_split(experiment, scenario, unit.seed)
        samples = self.choice.sizes_of(unit.pair).samples
        measures = Measures(unit.metrics, samples, lasting=unit.lasting)
        folder = self.choice.cache / "rows" / unit.pair.replace("/", "-")
        return ScenarioRun(
            experiment, split, cache=self.models, output=folder, say=self.say, progress=self.progress,
            measures=measures, shared=True,
        )  # fmt: skip

    def methods(self, unit: Unit, scenario: str, run: ScenarioRun) -> dict[str, Method]:
        """Key -> the unlearning run that it stands for."""
        pair, kind = PAIRS[unit.pair], scenario.partition(":")[0]
        forgotten, most = len(run.subsets["D_f"]), self.choice.sizes_of(unit.pair).unlearning
        found: dict[str, Method] = {}
        names = Counter(row.name for row in unit.scenarios[scenario].values())
        for key, row in unit.scenarios[scenario].items():
            options = self.choice.numerics | row.options(pair, kind, forgotten, unit.seed, most_epochs=most)
            label = row.name if names[row.name] == 1 else key
            found[key] = Method(f"seed {unit.seed} {label}", options, row.spec.repeat)
        return found

    def compute(self, unit: Unit) -> dict[str, Found]:
        """Every row of a unit, those finished earlier read: scenario -> figures."""
        rates = Rates(self.choice.cache, unit.pair, autocast=self.choice.autocast)
        return {scenario: self._compute(unit, scenario, rates) for scenario in unit.scenarios}

    def _compute(self, unit: Unit, scenario: str, rates: Rates) -> Found:
        run = self.scenario(unit, scenario)
        methods = self.methods(unit, scenario, run)
        self.say(f"{unit.pair}, seed {unit.seed}: {title_of(run.split)}")
        found = Found(
            {}, {}, run.split, {name: len(labels_of(subset)) for name, subset in run.subsets.items()},
            {name: len(subset) for name, subset in run.measured.items()}, dict(run.experiment.recipe),
            {key: dict(method.options) for key, method in methods.items()}, title_of(run.split),
        )  # fmt: skip
        for label in unit.baselines:
            found.rows[label] = run.baseline(label)  # type: ignore[arg-type]
        rates.note_training(found, run.trained_here())
        for key, method in methods.items():
            begun = time.perf_counter()
            try:
                found.rows[key] = run.unlearned(method)
            except (FloatingPointError, ValueError) as error:
                found.failed[key] = str(error)
                self.say(f"{key}, seed {unit.seed}: no figures, {error}")
                continue
            if run.cells.computed:
                # With named metrics or with what lasts, measuring is not what the next forecast asks for.
                usual = self.choice.metrics is None and not unit.lasting
                seconds = time.perf_counter() - begun if usual else None
                rates.note_row(unit.scenarios[scenario][key], found, key, seconds)
        rates.save()
        return found


def spaced(dataset: Dataset[Any], limit: int | None) -> Dataset[Any]:
    """At most `limit` samples, evenly spaced, so that data in the order of its classes keeps them all."""
    size = len(labels_of(dataset))
    return dataset if limit is None or limit >= size else Subset(dataset, thinned(range(size), limit))
