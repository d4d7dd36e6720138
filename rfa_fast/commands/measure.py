"""What is measured of one model, and the report that several measurements make.

One pass per subset gives every figure of a row and every number behind the plots. The forgetting
itself is judged by the columns; the rows are the same model before and after, and, where it is given,
the model retrained without the forgotten samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from rfa_fast.commands.inputs import Prepared, title_of
from rfa_fast.commands.shell import say
from rfa_fast.experiments.measuring import accuracy_by_class, bar, thinned
from rfa_fast.metrics import evaluate_split, generate_text
from rfa_fast.report import Example, MethodRow, RunReport, Scenario

REPORT_JSON, REPORT_PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class Measured:
    """The figures of one model on one split.

    Attributes:
        figures: by the keys of :func:`rfa_fast.report.standard_metric`.
        per_class: class name -> accuracy in [0, 1], on the test subsets (of a language model, the training ones).
        confidence: `"forget"` and `"test"` -> one figure per sample.
        texts: prompt -> what the model writes.
    """

    figures: dict[str, float]
    per_class: dict[str, float]
    confidence: dict[str, list[float]]
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measuring:
    """How models are measured: the data, and what was asked for on the command line.

    Raises:
        ValueError: prompts for a model that does not write, or one without a token.
    """

    prepared: Prepared
    batch_size: int | None = None
    limit: int | None = None
    prompts: Sequence[str] = ()
    tokenizer: Any = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.prompts and not self.prepared.language:
            raise ValueError(
                f"--prompt: got {self.prompts[0]!r} for a model that classifies, expected none; leave it out, only a "
                "language model goes on from it"
            )
        if empty := [prompt for prompt in self.prompts if not self.tokenizer(prompt)["input_ids"]]:
            raise ValueError(f"--prompt: got {empty[0]!r} with no token in it, expected a text to go on from")

    def __call__(self, model: nn.Module, label: str) -> Measured:
        """Measure one model.

        Raises:
            ValueError, TypeError, FloatingPointError: as :func:`rfa_fast.metrics.evaluate_split`.
        """
        with bar(f"measure {label}", enabled=self.progress) as advance:
            result = evaluate_split(model, self.prepared.loaders(self.batch_size, self.limit), progress=advance)
        language = self.prepared.language
        figures = {f"{name}/accuracy" if language else name: part.accuracy for name, part in result.items()}
        if language:
            figures |= {f"{name}/perplexity": part.perplexity for name, part in result.items()}
        figures["MIA"] = result.membership(seed=self.seed).forget_share
        test = next(name for name in ("D_ft", "D_t", "D_rt") if name in result)
        confidence = {
            key: thinned(result[name].predictions.confidence.tolist())
            for key, name in (("forget", "D_f"), ("test", test))
        }
        texts = {prompt: generate_text(model, self.tokenizer, prompt) for prompt in self.prompts} if language else {}
        subsets, classes = self.prepared.measured(self.limit), self.prepared.data.classes
        per_class = accuracy_by_class(result, subsets, classes, language=language)
        return Measured(figures, per_class, confidence, texts)


def scenario(
    prepared: Prepared,
    rows: Mapping[str, tuple[Measured, float | None]],
    *,
    before: str,
    after: str | None,
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    losses: Sequence[Mapping[str, float]] = (),
    feature_distance: Mapping[str, Mapping[str, float]] | None = None,
) -> Scenario:
    """The table and the plots of some measured models.

    Args:
        prepared: what they were measured on.
        rows: label -> figures and seconds.
        before, after: labels of the two rows that the plots show; `after` `None` shows one.
        notes, settings, losses, feature_distance: as in :class:`rfa_fast.report.Scenario`.
    """
    first, second = rows[before][0], None if after is None else rows[after][0]
    if second is None:
        confidence = dict(first.confidence)
    else:
        confidence = {
            "forget before": first.confidence["forget"],
            "forget after": second.confidence["forget"],
            "test": second.confidence["test"],
        }
    target = prepared.split.target
    split = prepared.split
    return Scenario(
        title_of(split, prepared.data),
        [MethodRow(label, dict(measured.figures), seconds) for label, (measured, seconds) in rows.items()],
        original=before if second is not None else "Original",
        forgotten=[target] if split.scenario == "class" and target in first.per_class else [],
        per_class_before=first.per_class,
        per_class_after={} if second is None else second.per_class,
        feature_distance={name: dict(layers) for name, layers in (feature_distance or {}).items()},
        confidence=confidence,
        losses=[dict(step) for step in losses],
        examples=[Example(p, text, second.texts[p]) for p, text in first.texts.items()] if second is not None else [],
        notes=list(notes),
        settings=dict(settings or {}),
    )


def finish(report: RunReport, output: Path, console: Console) -> None:
    """Write the report as JSON and as a page, and print it: a closed pipe then takes nothing away.

    Raises:
        OSError: the folder cannot be written; the report is printed nevertheless.
    """
    try:
        places = [report.to_json(output / REPORT_JSON), report.to_html(output / REPORT_PAGE)]
    finally:
        report.print(console)
    say(f"Report: {places[0]} and {places[1]}")
