"""What every experiment does: Original, Retrain and some unlearning methods, measured on one split.

An experiment is data, an architecture and a training recipe; a scenario is a split and a list of
methods. Everything else is here once, so that the four experiments differ in nothing that could
explain a difference in their tables. Two things are kept: trained models, in a cache that all runs
share, and the figures of each finished row, in the output folder. A run that is interrupted therefore
loses at most the row under way, and of that row no more than the steps since its last checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from rfa_fast.data import Repeated, Split, collate, collate_text, validation_split
from rfa_fast.experiments.cache import ModelCache, Say, Trained, fingerprint, labels_of, settings_key
from rfa_fast.experiments.cells import CellStore, slug
from rfa_fast.experiments.measuring import FEATURE_ITEMS, Measures, accuracy_by_class, lasting_figures, measured_more
from rfa_fast.experiments.measuring import bar as bar
from rfa_fast.experiments.measuring import thinned as thinned
from rfa_fast.methods import method_settings, train, unlearn
from rfa_fast.methods.checkpoint import RunFolder
from rfa_fast.metrics import KeptOutputs, Predictions, evaluate_split, feature_distance, measure
from rfa_fast.metrics.kept import KEPT_BYTES
from rfa_fast.report import Example, MethodRow, Scenario


@dataclass(frozen=True)
class Experiment:
    """Data, an architecture, and the recipe that Original and Retrain are trained by.

    Attributes:
        name: names the files of its models.
        build: makes the untrained (or pretrained) model.
        architecture: words that change whenever `build` would make another model.
        train, test: datasets of :mod:`rfa_fast.data`, or `Subset`s of them.
        classes: class names by index.
        recipe: keyword arguments of :func:`rfa_fast.methods.train`, JSON-safe.
        kind: `"classification"`, or `"language"` for a label per token: accuracy is then of whole answers.
        write: of a language model: prompt -> what the model writes, for the examples in the report.
        evaluation_batch: samples per batch when nothing is trained.
    """

    name: str
    build: Callable[[], nn.Module]
    architecture: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    recipe: Mapping[str, Any]
    kind: Literal["classification", "language"] = "classification"
    write: Callable[[nn.Module], Mapping[str, str]] | None = None
    evaluation_batch: int = 500

    def settings(self, dataset: Dataset[Any]) -> dict[str, Any]:
        """Everything that shapes a model trained on `dataset`, JSON-safe."""
        return {
            "experiment": self.name,
            "architecture": self.architecture,
            "recipe": dict(self.recipe),
            "data": fingerprint(dataset),
        }

    def fit(self, dataset: Dataset[Any], role: str, cache: ModelCache, *, progress: bool) -> Trained:
        """The model trained on `dataset` by the recipe, read from the cache where it holds it."""

        def training(model: nn.Module) -> float:
            return train(model, dataset, label=f"train {role}", progress=progress, **self.recipe).seconds

        return cache.get(f"{self.name}-{role}", self.settings(dataset), self.build, training)

    def loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """Batches in order, for evaluation."""
        text = isinstance(dataset[0], Mapping)
        return DataLoader(dataset, self.evaluation_batch, collate_fn=collate_text if text else collate)

    def on_validation(self, fraction: float = 0.1, seed: int = 0) -> Experiment:
        """The same experiment with part of the training data in the test set's place: settings are chosen there."""
        kept, held_out = validation_split(range(len(labels_of(self.train))), fraction, seed)
        return replace(
            self, name=f"{self.name}-validation", train=Subset(self.train, kept), test=Subset(self.train, held_out)
        )


@dataclass(frozen=True)
class Method:
    """A row of the table: a label and the keyword arguments of :func:`rfa_fast.unlearn`, JSON-safe.

    `repeat` says how often each sample of D_f comes.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 1


@dataclass(frozen=True)
class Row:
    """The figures of one model on one split, JSON-safe; what a cell holds."""

    seconds: float
    figures: dict[str, float]
    per_class: dict[str, float]
    confidence: dict[str, list[float]]
    texts: dict[str, str] = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)
    distance: dict[str, dict[str, float]] = field(default_factory=dict)


class ScenarioRun:
    """One split of an experiment: its subsets, its two trained models, its rows.

    Args:
        experiment, split: what is measured on what.
        cache: keeps the trained models.
        output: folder for finished rows and the methods' runs; `None` keeps neither.
        say: is told what happens, a sentence each.
        progress: show bars on standard error.
        measures: what is measured of every row; `None`: accuracy (and perplexity) and membership inference,
            under the names of a scenario's table.
        shared: the folder is one that tables share. Rows of several settings lie beside each other, and
            a method writes only what it needs to be resumed, which is deleted once its row is finished.
    """

    def __init__(
        self,
        experiment: Experiment,
        split: Split,
        *,
        cache: ModelCache,
        output: Path | None = None,
        say: Say = print,
        progress: bool = True,
        measures: Measures | None = None,
        shared: bool = False,
    ) -> None:
        self.experiment, self.split, self.cache = experiment, split, cache
        self.output, self.say, self.progress = output, say, progress
        self.measures, self.shared = measures, shared
        self._known: Mapping[str, Predictions] | None = None
        self._kept = KeptOutputs(KEPT_BYTES if experiment.kind == "language" else 0)  # classifications have `known`
        self.name = slug(f"{split.scenario} {split.target}")
        self.subsets = split.named(experiment.train, experiment.test)
        if output is not None:
            split.save(output / "splits" / f"{self.name}-{split.digest()[:16]}.json")
        cells = None if output is None else output / "cells"
        self.cells = CellStore(cells, say, keyed=shared, holds=measured_more)
        self.measured = self.subsets if measures is None else {n: measures.subset(s) for n, s in self.subsets.items()}

    @cached_property
    def original(self) -> Trained:
        """Trained on everything."""
        return self.experiment.fit(self.experiment.train, "original", self.cache, progress=self.progress)

    @cached_property
    def retrain(self) -> Trained:
        """Trained on the retained samples alone, by the same recipe."""
        return self.experiment.fit(self.subsets["D_r"], f"retrain-{self.name}", self.cache, progress=self.progress)

    def known(self) -> Mapping[str, Predictions]:
        """What Retrain predicts on the measured subsets, for classifications: spares its forward in every row."""
        if self._known is None and self.experiment.kind != "language":
            with bar("measure Retrain", enabled=self.progress) as advance:
                result = evaluate_split(self.retrain.model, self._loaders(), progress=advance)
            self._known = {name: item.predictions for name, item in result.items()}
        return self._known or {}

    def baseline(self, label: Literal["Original", "Retrain"]) -> Row:
        """The row of one of the two trained models."""

        def run() -> Row:
            trained = self.original if label == "Original" else self.retrain
            lasting = self._lasting(trained.model, None)
            return self._measured(trained.model, trained.seconds, label, lasting=lasting)

        return self.cells.get(f"{self.name}-{label}", self._baseline_settings(label), Row, run)

    def unlearned(self, method: Method) -> Row:
        """The row of one method, which starts from a copy of the Original."""
        settings, name = self._method_settings(method), f"{self.name}-{slug(method.label)}"
        key = settings_key({k: v for k, v in settings.items() if k != "test"})  # a run does not read the test set
        folder = None if self.output is None else self.output / "runs" / f"{name}-{key}"

        def run() -> Row:
            model = copy.deepcopy(self.original.model)
            forget = self.subsets["D_f"]
            if folder is not None and (why := RunFolder(folder).why_broken()):
                self.cells.say(f"{name}: begun anew, no run can go on from what was kept ({why})")
                shutil.rmtree(folder)
            over = folder is not None and folder.exists() and RunFolder(folder).read_record() is not None
            options = dict(method.options)
            if self.measures is not None and self.measures.lasting and options.get("method", "rfa") == "rfa":
                options["merge"] = False  # with live adapters there are more states to look at
            kept = self._kept.nbytes
            with measure() as cost:
                result = unlearn(
                    model, forget if method.repeat == 1 else Repeated(forget, method.repeat), self.subsets["D_r"],
                    output_dir=folder, resume=folder is not None and folder.exists(), progress=self.progress,
                    save="checkpoints" if self.shared else "all", **options,
                )  # fmt: skip
            lasting = self._lasting(model, result.rfa)
            if result.rfa is not None:
                result.rfa.merge()
            seconds = float(result.record["training"]["seconds"])
            # A run that was over before is only read here; what is kept for measuring is no part of any run.
            peak = None if over or cost.peak_bytes is None else cost.peak_bytes - kept
            row = self._measured(model, seconds, method.label, peak, lasting)
            row = replace(row, losses=[_numbers(step) for step in result.history])
            if self.measures is not None:
                return row
            layers = [name for name in result.record["layers"] if name in dict(self.original.model.named_modules())]
            return replace(row, distance=self._distances(model, layers))

        row = self.cells.get(f"{self.name}-{method.label}", settings, Row, run)
        if self.shared and folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another process that reads this row does the same
        return row

    def trained_here(self) -> list[str]:
        """Which of `"Original"` and `"Retrain"` were trained for this scenario just now, rather than read."""
        known = {"Original": vars(self).get("original"), "Retrain": vars(self).get("retrain")}
        return [label for label, trained in known.items() if trained is not None and not trained.reused]

    def pending(self, baselines: Sequence[str], methods: Sequence[Method]) -> tuple[list[str], list[str]]:
        """What of these rows is still to be computed: labels of rows, and of the trained models they would wait for."""
        settings = {label: self._baseline_settings(label) for label in baselines}
        settings |= {method.label: self._method_settings(method) for method in methods}
        rows = [label for label, found in settings.items() if not self.cells.has(f"{self.name}-{label}", found, Row)]
        experiment, models = self.experiment, []
        for label, dataset in (("Original", experiment.train), ("Retrain", self.subsets["D_r"])):
            role = "original" if label == "Original" else f"retrain-{self.name}"
            wanted = rows and (label in baselines or methods)
            if wanted and not self.cache.has(f"{experiment.name}-{role}", experiment.settings(dataset)):
                models.append(label)
        return rows, models

    def scenario(self, title: str, methods: Sequence[Method], *, shown: str | None = None) -> Scenario:
        """All rows as a :class:`rfa_fast.report.Scenario`; the plots are of the method `shown`, or the first.

        Raises:
            ValueError: no method, or `shown` is none of them.
        """
        labels = [method.label for method in methods]
        shown = labels[0] if shown is None and labels else shown
        if shown not in labels:
            raise ValueError(f"shown: got {shown!r}, expected one of the methods {', '.join(labels) or '(none given)'}")
        rows = {"Original": self.baseline("Original"), "Retrain": self.baseline("Retrain")}
        rows |= {method.label: self.unlearned(method) for method in methods}
        before, after = rows["Original"], rows[shown]
        forgotten = [self.split.target] if self.split.target in before.per_class else []
        prompts = before.texts if self.experiment.write is not None else {}
        return Scenario(
            title,
            [MethodRow(label, dict(row.figures), row.seconds) for label, row in rows.items()],
            forgotten=forgotten,
            per_class_before=before.per_class,
            per_class_after=after.per_class,
            feature_distance={f"{shown}, {name}": layers for name, layers in after.distance.items()},
            confidence={
                "forget before": before.confidence["forget"],
                "forget after": after.confidence["forget"],
                "test": after.confidence["test"],
            },
            losses=after.losses,
            examples=[Example(prompt, text, after.texts[prompt]) for prompt, text in prompts.items()],
            notes=[] if len(methods) == 1 else [f"The plots show {shown}; distances are to the Original."],
            settings={
                "split": {"scenario": self.split.scenario, "target": self.split.target, "digest": self.split.digest()},
                "samples": {name: len(labels_of(subset)) for name, subset in self.subsets.items()},
                "recipe": dict(self.experiment.recipe),
                "methods": {method.label: dict(method.options) for method in methods},
            },
        )

    def _baseline_settings(self, label: str) -> dict[str, Any]:
        dataset = self.experiment.train if label == "Original" else self.subsets["D_r"]
        return self._settings({"model": self.experiment.settings(dataset)})

    def _method_settings(self, method: Method) -> dict[str, Any]:
        settings = self._settings({"model": self.experiment.settings(self.experiment.train)})
        settings |= {"options": dict(method.options), "method": method_settings(method.options)}
        return settings | ({} if method.repeat == 1 else {"repeat": method.repeat})

    def _settings(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """What a row is trusted by."""
        measures = {} if self.measures is None else {"measures": self.measures.settings()}
        return {**more, "split": self.split.digest(), "test": fingerprint(self.experiment.test), **measures}

    def _lasting(self, model: nn.Module, handle: Any) -> dict[str, float]:
        """How the forgetting lasts, where that is measured."""
        if self.measures is None or not self.measures.lasting:
            return {}
        return lasting_figures(model, self.subsets, self.experiment.recipe, handle, bars=self.progress)

    def _measured(
        self,
        model: nn.Module,
        seconds: float,
        label: str,
        peak_bytes: int | None = None,
        lasting: Mapping[str, float] | None = None,
    ) -> Row:
        """Every figure that one pass per subset gives."""
        seed = int(self.experiment.recipe.get("seed", 0))
        references = None
        if self.measures is not None:
            known = self.known if label != "Retrain" else dict  # what it predicts is about to be known
            references = self.measures.references(
                lambda: self.original.model, lambda: self.retrain.model, known, seed, self._kept
            )
        with bar(f"measure {label}", enabled=self.progress) as advance:
            result = evaluate_split(model, self._loaders(), references=references, progress=advance)
        if label == "Retrain" and self.experiment.kind != "language":
            self._known = {name: item.predictions for name, item in result.items()}
        language = self.experiment.kind == "language"
        distance = {
            name: found.to_original
            for name in ("D_r", "D_f")
            if (found := result[name].distances) is not None and found.to_original
        }
        if self.measures is not None:
            figures = self.measures.figures(result, seconds, peak_bytes, seed) | dict(lasting or {})
        else:
            figures = {f"{name}/accuracy" if language else name: item.accuracy for name, item in result.items()}
            if language:
                figures |= {f"{name}/perplexity": item.perplexity for name, item in result.items()}
            figures["MIA"] = result.membership().forget_share
        per_class = accuracy_by_class(result, self.measured, self.experiment.classes, language=language)
        test = next(name for name in ("D_ft", "D_t", "D_rt") if name in result)
        sources = {"forget": result["D_f"], "test": result[test]}
        confidence = {key: thinned(item.predictions.confidence.tolist()) for key, item in sources.items()}
        texts = {} if self.experiment.write is None else dict(self.experiment.write(model))
        return Row(seconds, figures, per_class, confidence, texts, distance=distance)

    def _loaders(self) -> dict[str, DataLoader[Any]]:
        return {name: self.experiment.loader(subset) for name, subset in self.measured.items()}

    def _distances(self, model: nn.Module, layers: Sequence[str]) -> dict[str, dict[str, float]]:
        """Distance of each layer's features to the Original's (section V-B5, definition 1), on kept and forgotten."""
        if not layers:
            return {}
        loaders = {
            name: self.experiment.loader(Subset(subset, thinned(range(len(subset)), FEATURE_ITEMS)))
            for name, subset in self.subsets.items()
            if name in ("D_r", "D_f")
        }
        return {name: feature_distance(model, self.original.model, loader, layers) for name, loader in loaders.items()}


def _numbers(step: Mapping[str, Any]) -> dict[str, float]:
    """A step's record without what is no number."""
    return {key: value for key, value in step.items() if isinstance(value, int | float)}
