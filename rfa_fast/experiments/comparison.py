"""From a request to a report: what the experiments have in common beyond a single scenario.

A scenario is written `class:NAME`, `sample:COUNT` or `keyword:WORD`. The methods are the product of the
modes and of whatever settings are tried side by side (`lr=5e-5,5e-4`), so that choosing settings on a
validation split and the final run are one command with other arguments.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch.utils.data import Dataset, Subset

from rfa_fast.config import Mode
from rfa_fast.data import Split, split_by_class, split_by_keyword, split_by_sample
from rfa_fast.experiments.cache import ModelCache, Say, cache_folder, labels_of
from rfa_fast.experiments.common import Experiment, Method, ScenarioRun
from rfa_fast.methods import method_settings
from rfa_fast.report import RunReport, write_atomically

Settings = Mapping[str, Mapping[str, Any]]
"""Kind of scenario (`"class"`, `"sample"`, `"keyword"`) -> keyword arguments of :func:`rfa_fast.unlearn` for RFA.

The settings of a class serve for a keyword where it has none; `"class residual"` has what one mode has to itself.
"""


@dataclass(frozen=True)
class Request:
    """What to run and where to put it; the same for every experiment.

    Attributes:
        scenarios: see :func:`scenario_split`; `None`: the experiment's own.
        modes: of RFA, `"residual"` and `"teacher"`.
        tried: settings to compare, see :func:`methods`.
        validation: put a tenth of the training data in the test set's place, to choose settings there.
        seed: of everything drawn.
        epochs: of Original and Retrain; `None`: the experiment's own.
        limit: use only the first so many training samples (and as many of the test set), for a quick try.
        data: folder of the data; `None`: where the loader finds it.
        output: folder for the report and the finished rows; `None` writes nothing.
        cache: folder of trained models; `None`: `$RFA_FAST_CACHE`, else `~/.cache/rfa-fast`.
        say: is told what happens, a sentence each.
        progress: show bars on standard error.
    """

    scenarios: Sequence[str] | None = None
    modes: Sequence[str] = ("residual", "teacher")
    tried: Sequence[str] = ()
    validation: bool = False
    seed: int = 0
    epochs: int | None = None
    limit: int | None = None
    data: str | os.PathLike[str] | None = None
    output: str | os.PathLike[str] | None = None
    cache: str | os.PathLike[str] | None = None
    say: Say = print
    progress: bool = True

    def recipe(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The experiment's recipe with this request's seed and epochs."""
        return {**recipe, "seed": self.seed, **({} if self.epochs is None else {"epochs": self.epochs})}


def compare(
    base: Experiment, settings: Settings, request: Request, *, title: str, scenarios: Sequence[str]
) -> RunReport:
    """Original, Retrain and RFA on each scenario, as a report that is also written to `request.output`.

    Args:
        base: data, model and recipe.
        settings: of RFA.
        request: what to run.
        title: of the report.
        scenarios: those of the experiment, run when the request names none.

    Raises:
        ValueError, TypeError: a scenario, mode or limit that is not there, or a setting that is wrong; nothing has
            been trained then.
        OSError: output or cache cannot be written.
    """
    base = _limited(base, request.limit)
    base = base.on_validation() if request.validation else base
    splits = [scenario_split(base, text, request.seed) for text in request.scenarios or scenarios]
    _check_modes(request.modes)
    rows = [
        methods({m: settings_of(settings, split.scenario, m) for m in request.modes}, request.seed, request.tried)
        for split in splits
    ]
    models = ModelCache(cache_folder(request.cache), request.say)
    output = None if request.output is None else Path(request.output)
    found = []
    for split, wanted in zip(splits, rows, strict=True):
        request.say(title_of(split))
        run = ScenarioRun(base, split, cache=models, output=output, say=request.say, progress=request.progress)
        found.append(run.scenario(title_of(split), wanted))
    notes = ["Measured on held-out training samples, not on the test set."] if request.validation else []
    report = RunReport(title, found, seed=request.seed, command=command_line(), machine=machine(), notes=notes)
    return deliver(report, output, request.say)


def scenario_split(experiment: Experiment, scenario: str, seed: int = 0) -> Split:
    """The split that a scenario's words stand for.

    Args:
        scenario: `"class:6"`, `"class:Shirt"`, `"sample:128"` or `"keyword:film"`.
        seed: of the samples drawn.

    Raises:
        ValueError: another form, an unknown class, a count out of range, a keyword that no text has.
    """
    kind, _, target = scenario.partition(":")
    labels, test_labels = labels_of(experiment.train), labels_of(experiment.test)
    if kind == "class" and target:
        return split_by_class(labels, test_labels, target, experiment.classes)
    if kind == "sample" and target.isdecimal():
        return split_by_sample(len(labels), len(test_labels), int(target), seed)
    if kind == "keyword" and target:
        return split_by_keyword(_texts(experiment.train, scenario), _texts(experiment.test, scenario), target)
    raise ValueError(f"scenario: got {scenario!r}, expected class:NAME, sample:COUNT or keyword:WORD")


def title_of(split: Split) -> str:
    """The scenario in words.

    Example:
        >>> title_of(split_by_sample(9, 3, count=2))
        'Sample unlearning: forget 2 random training samples'
    """
    if split.scenario == "sample":
        return f"Sample unlearning: forget {split.target} random training samples"
    return f"{split.scenario.capitalize()} unlearning: forget {split.target}"


def settings_of(settings: Settings, kind: str, mode: str) -> dict[str, Any]:
    """RFA's settings in a kind of scenario and a mode.

    Example:
        >>> chosen = {"class": {"lr": 5e-4, "rank": 4}, "class residual": {"lr": 1e-3}}
        >>> settings_of(chosen, "keyword", "residual"), settings_of(chosen, "class", "teacher")
        ({'lr': 0.001, 'rank': 4}, {'lr': 0.0005, 'rank': 4})
    """
    kind = kind if kind in settings else "class"
    return {**settings[kind], **settings.get(f"{kind} {mode}", {})}


def methods(settings: Mapping[str, Mapping[str, Any]], seed: int, tried: Sequence[str] = ()) -> list[Method]:
    """RFA in each mode, once for every combination of the values to be tried.

    Args:
        settings: mode -> keyword arguments of :func:`rfa_fast.unlearn`.
        seed: of every run.
        tried: `"lr=5e-5,5e-4"`: a keyword and its values, as JSON; a list is one value; a value that is not JSON is a
            text.

    Raises:
        ValueError, TypeError: not of that form, or a combination that `unlearn` does not take.

    Example:
        >>> [m.label for m in methods({"residual": {"rank": 4}}, 0, ["lr=1e-4,1e-3"])]
        ['RFA residual lr=0.0001', 'RFA residual lr=0.001']
    """
    axes: dict[str, list[Any]] = {}
    for text in tried:
        key, equals, values = text.partition("=")
        if not key.isidentifier() or not equals or not values:
            raise ValueError(f"try: got {text!r}, expected NAME=VALUE,VALUE,… such as lr=5e-5,5e-4")
        listed = json_or_text(f"[{values}]")
        axes[key] = listed if isinstance(listed, list) else [json_or_text(value) for value in values.split(",")]
    found: list[Method] = []
    for mode, own in settings.items():
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            label = " ".join([f"RFA {mode}", *(f"{key}={value}" for key, value in chosen.items())])
            found.append(Method(label, {"mode": mode, "seed": seed, **own, **chosen}))
            method_settings(found[-1].options)
    return found


def json_or_text(value: str) -> Any:
    """What stands behind the = of a KEY=VALUE: JSON, or the text itself.

    Example:
        >>> json_or_text("0.5"), json_or_text("deep")
        (0.5, 'deep')
    """
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def deliver(report: RunReport, output: str | os.PathLike[str] | None, say: Say = print) -> RunReport:
    """Write `report.json`, `report.html` and `table.txt` into `output`, say so, and give the report back.

    Raises:
        OSError: the folder cannot be written; the table is said nevertheless.
    """
    if output is not None:
        import io

        from rich.console import Console

        folder, text = Path(output), io.StringIO()
        report.print(Console(width=120, file=text))
        try:
            report.to_json(folder / "report.json")
            page = report.to_html(folder / "report.html")
            write_atomically(folder / "table.txt", text.getvalue())
        except OSError:
            say(text.getvalue())
            raise
        say(f"page: {page}")
    return report


def command_line() -> str:
    """What was typed, as it can be typed again."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = [Path(sys.argv[0]).name] if spec is None else ["python", "-m", spec.name]
    return shlex.join([*start, *sys.argv[1:]])


def machine() -> str:
    """Cores and accelerator in a few words.

    Example:
        >>> "core" in machine()
        True
    """
    import torch

    cores = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores} core{'' if cores == 1 else 's'} used, {device}"


def _limited(experiment: Experiment, limit: int | None) -> Experiment:
    def first(dataset: Dataset[Any]) -> Dataset[Any]:
        size = len(labels_of(dataset))
        return dataset if limit is None or limit >= size else Subset(dataset, range(limit))

    if limit is not None and limit < 2:
        raise ValueError(f"limit: got {limit}, expected 2 or more samples")
    return replace(experiment, train=first(experiment.train), test=first(experiment.test))


def _check_modes(modes: Sequence[str]) -> None:
    known = get_args(Mode)
    if not modes or (unknown := [mode for mode in modes if mode not in known]):
        raise ValueError(f"modes: got {unknown if modes else list(modes)}, expected some of {', '.join(known)}")


def _texts(dataset: Dataset[Any], scenario: str) -> list[str]:
    if isinstance(dataset, Subset):
        inner = _texts(dataset.dataset, scenario)
        return [inner[i] for i in dataset.indices]
    texts: list[str] | None = getattr(dataset, "texts", None)
    if texts is None:
        raise ValueError(f"scenario: got {scenario!r} for data without texts, expected class:NAME or sample:COUNT")
    return list(texts)
