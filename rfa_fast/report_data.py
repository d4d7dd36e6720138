"""The numbers of one unlearning scenario: columns, rows, and what the plots are drawn from.

Values are checked when a scenario is put together, not when it is written, so that a run never
reaches its last line only to find that its results cannot be saved. What can be converted without
loss is (NumPy and torch scalars, tuples, paths); anything else is an error that names the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rfa_fast.report_chart import Chart
from rfa_fast.report_values import as_iterable, as_list, as_mapping, as_number, as_numbers, as_text, json_safe

Better = Literal["closer to Retrain", "higher", "lower"]
_BETTER = ("closer to Retrain", "higher", "lower")
_CONFIDENCE_DIGITS = 5
_LOSS_DIGITS = 7
_TOO_LONG = 1e7  # a figure from here on is written with an exponent
SUBSETS = {
    "D_r": "training samples that are kept",
    "D_f": "training samples to forget",
    "D_rt": "test samples of what is kept",
    "D_ft": "test samples of what is forgotten",
    "D_t": "test samples",
    "D_v": "validation samples",
}


@dataclass(frozen=True)
class Metric:
    """One column of a results table.

    Attributes:
        key: the name under which :attr:`MethodRow.metrics` holds the figure.
        label: the heading; `D_rt` is set with a subscript on the page. Empty: the key.
        unit: `"%"` shows a fraction as a percentage, `""` shows it as it is.
        better: what counts as falling short of Retrain. `"higher"` forgives a figure above it,
            `"lower"` one below it, `"closer to Retrain"` neither.
        digits: decimals on the screen; the page shows one more, of whole numbers none.
        tolerance: the shortfall, in the figure's own unit, that still counts as close. `None`:
            one point for `"%"`, else 5 % of Retrain's figure.
        group: a heading shared with the neighbouring columns of the same group.
        about: what the column measures, in half a sentence.

    Raises:
        ValueError: an unknown unit or direction, negative digits or tolerance, an empty key.

    Example:
        >>> Metric("D_rt", unit="%").format(0.9141)
        '91.4'
    """

    key: str
    label: str = ""
    unit: Literal["", "%"] = ""
    better: Better = "closer to Retrain"
    digits: int = 1
    tolerance: float | None = None
    group: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        for name in ("key", "label", "group", "about"):
            as_text(f"metric {name}", getattr(self, name))
        if not self.key:
            raise ValueError("metric key: got an empty string, expected the name the rows use")
        if not self.label:
            object.__setattr__(self, "label", self.key)
        if self.unit not in ("", "%"):
            raise ValueError(f"unit of {self.key}: got {self.unit!r}, expected '' or '%'")
        if self.better not in _BETTER:
            raise ValueError(f"better of {self.key}: got {self.better!r}, expected one of {', '.join(_BETTER)}")
        if isinstance(self.digits, bool) or not isinstance(self.digits, int) or self.digits < 0:
            raise ValueError(f"digits of {self.key}: got {self.digits!r}, expected an integer >= 0")
        if self.tolerance is not None and not as_number(f"tolerance of {self.key}", self.tolerance) > 0:
            raise ValueError(f"tolerance of {self.key}: got {self.tolerance!r}, expected a number > 0")

    def format(self, value: float, extra: int = 0, *, signed: bool = False) -> str:
        """The figure as it is printed, without its unit, with `digits + extra` decimals; a whole number has none.

        Example:
            >>> Metric("D_f", unit="%").format(-0.0312, signed=True), Metric("D_f/perplexity").format(7.5e25)
            ('-3.1', '7.50e25')
        """
        if math.isnan(value):
            return "n/a"
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        decimals, shown = self.digits and self.digits + extra, value * (100 if self.unit == "%" else 1)
        text = f"{shown:+.2e}".replace("e+", "e") if abs(shown) >= _TOO_LONG else f"{shown:+.{decimals}f}"
        return text[1:] if text.strip("+-0.") == "" or (text[0] == "+" and not signed) else text

    def shortfall(self, value: float, reference: float) -> float:
        """How far `value` falls short of `reference`, in tolerances: 0 as good, up to 1 close, above 3 far.

        Example:
            >>> accuracy = Metric("D_rt", unit="%", better="higher")
            >>> round(accuracy.shortfall(0.89, 0.91), 6), accuracy.shortfall(0.93, 0.91)
            (2.0, 0.0)
        """
        gap = value - reference
        if self.better != "closer to Retrain":
            gap = max(0.0, -gap if self.better == "higher" else gap)
        near = self.tolerance or (0.01 if self.unit == "%" else 0.05 * abs(reference))
        if gap == 0:
            return 0.0
        return abs(gap) / near if near else math.inf


@dataclass
class MethodRow:
    """One method's figures.

    Attributes:
        method: its name in the table.
        metrics: figures by :attr:`Metric.key`; where there are several runs, their mean.
        seconds: wall-clock time, or `None`.
        spread: by the same keys, what stands behind ±: half the width of an interval around the mean.
        published: by the same keys, what somebody else printed for this row, in the same units.
        gaps: by the same keys, the difference from the reference, where that is not the one of the two rows' figures:
            of means over runs that the two do not share all, say. NaN: this figure is compared with nothing.
    """

    method: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    spread: dict[str, float] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        as_text("method", self.method)
        self.metrics = as_numbers(f"metrics of {self.method}", self.metrics)
        self.spread = as_numbers(f"spread of {self.method}", self.spread)
        self.published = as_numbers(f"published of {self.method}", self.published)
        self.gaps = as_numbers(f"gaps of {self.method}", self.gaps)
        if self.seconds is not None:
            self.seconds = as_number(f"seconds of {self.method}", self.seconds)


@dataclass
class Example:
    """A text the model continues: the prompt, and what it writes before and after."""

    prompt: str
    before: str
    after: str

    def __post_init__(self) -> None:
        for name in ("prompt", "before", "after"):
            as_text(f"example {name}", getattr(self, name))


@dataclass
class Scenario:
    """One thing that was forgotten: the rows of its table and the numbers behind its plots.

    Attributes:
        title: for instance `"Class unlearning: forget digit 3"`.
        rows: one per method, in the order shown.
        metrics: the columns; empty: one per key of the rows, with the field's usual meaning.
        original, reference: the `method` of the rows that are no unlearning methods. Gaps are to
            `reference`; with no such row, none are shown. Empty: a table that compares with nothing.
        forgotten: the class names (keys of `per_class_before`) that were forgotten.
        per_class_before, per_class_after: class name -> accuracy in [0, 1]; the same classes.
        feature_distance: method or subset (`"D_r"`, `"D_f"`) -> layer name -> distance; layers in depth order.
        confidence: `"forget before"`, `"forget after"`, `"test"` -> one confidence per sample, kept to
            five decimals.
        losses: one mapping per step: `step` and any of `total`, `retain_align`, `forget_align`,
            `retain_task`, `forget_task`; other numbers (`lr`, `seconds`) are kept and not drawn. Kept to
            seven significant digits, about what fp32 carries.
        examples: texts before and after, for a model that writes.
        notes: sentences printed below the table.
        settings: JSON-safe values that were chosen.
        charts: further plots, of figures over a setting or over the methods.
        source: where published figures were published, for the heading above them.

    A number that is `None` stands for "not measured" and is kept as NaN.

    Raises:
        TypeError: a value that is not what its field says.
        ValueError: a repeated method or column, a figure that no column shows, per-class accuracies
            of different classes.

    Example:
        >>> rows = [MethodRow("Retrain", {"D_rt": 0.914}, 402.0), MethodRow("RFA", {"D_rt": 0.912}, 31.0)]
        >>> [m.unit for m in Scenario("forget class 3", rows).metrics]
        ['%']
    """

    title: str
    rows: list[MethodRow] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    original: str = "Original"
    reference: str = "Retrain"
    forgotten: list[str] = field(default_factory=list)
    per_class_before: dict[str, float] = field(default_factory=dict)
    per_class_after: dict[str, float] = field(default_factory=dict)
    feature_distance: dict[str, dict[str, float]] = field(default_factory=dict)
    confidence: dict[str, list[float]] = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("title", "original", "reference", "source"):
            as_text(name, getattr(self, name))
        self.rows = as_list("rows", self.rows, MethodRow)
        self.examples = as_list("examples", self.examples, Example)
        self.notes = as_list("notes", self.notes, str)
        self.forgotten = as_list("forgotten", self.forgotten, str)
        self.charts = as_list("charts", self.charts, Chart)
        _check_unique("method", [row.method for row in self.rows])
        keys = list(
            dict.fromkeys(key for row in self.rows for key in (*row.metrics, *row.spread, *row.published, *row.gaps))
        )
        if not self.metrics:
            self.metrics = [standard_metric(key) for key in keys]
        self.metrics = as_list("metrics", self.metrics, Metric)
        columns = [metric.key for metric in self.metrics]
        _check_unique("metric", columns)
        if extra := [key for key in keys if key not in columns]:
            raise ValueError(
                f"metrics: the rows have {', '.join(map(repr, extra))}, which no column shows; "
                f"got columns {', '.join(map(repr, columns))}: add a Metric or drop the figure"
            )
        self.per_class_before = as_numbers("per_class_before", self.per_class_before)
        self.per_class_after = as_numbers("per_class_after", self.per_class_after)
        classes = set(self.per_class_before)
        if self.per_class_after and set(self.per_class_after) != classes:
            different = ", ".join(map(repr, sorted(classes ^ set(self.per_class_after))))
            raise ValueError(f"per_class_after: expected the classes of per_class_before, but only one has {different}")
        if classes and (unknown := sorted(set(self.forgotten) - classes)):
            raise ValueError(f"forgotten: got {unknown}, expected some of the classes {sorted(classes)}")
        self.feature_distance = {
            as_text("feature_distance key", key): as_numbers(f"feature_distance[{key!r}]", layers)
            for key, layers in as_mapping("feature_distance", self.feature_distance).items()
        }
        self.confidence = {
            as_text("confidence key", key): _rounded(f"confidence[{key!r}]", values)
            for key, values in as_mapping("confidence", self.confidence).items()
        }
        self.losses = [
            {
                k: v if isinstance(v, int) else float(f"{v:.{_LOSS_DIGITS}g}")
                for k, v in as_numbers("losses", step).items()
            }
            for step in as_iterable("losses", self.losses)
        ]
        self.settings = json_safe("settings", as_mapping("settings", self.settings))


def standard_metric(key: str) -> Metric:
    """The column a key usually stands for; one it does not know becomes a plain number.

    Known are the subsets (`"D_r"`, `"D_f"`, `"D_rt"`, `"D_ft"`, `"D_t"`: accuracy), `"MIA"`, and the keys of
    :meth:`rfa_fast.metrics.SplitResult.figures` (`"D_f/accuracy"`, `"D_f/token_accuracy"`, `"D_f/perplexity"`).
    More than Retrain keeps is no fault, more than it forgets is: the first is one-sided.

    Example:
        >>> standard_metric("D_r/perplexity").better, standard_metric("D_f").unit, standard_metric("depth").unit
        ('lower', '%', '')
    """
    if key == "MIA":
        about = "share of the forget samples that a membership attack calls trained on"
        return Metric(key, unit="%", tolerance=0.05, about=about)
    subset, _, kind = key.partition("/")
    kept = subset in ("D_r", "D_rt", "D_t", "D_v")
    name = kind.replace("_", " ")
    if subset in SUBSETS and kind in ("", "accuracy", "token_accuracy"):
        about = f"{name or 'accuracy'} on the {SUBSETS[subset]}"
        better: Better = "higher" if kept else "closer to Retrain"
        return Metric(key, subset, "%", better, group=name.capitalize(), about=about)
    if subset in SUBSETS and kind == "perplexity":
        better = "lower" if kept else "closer to Retrain"
        return Metric(key, subset, "", better, group="Perplexity", about=f"perplexity on the {SUBSETS[subset]}")
    return Metric(key, digits=3)


def _rounded(name: str, values: object) -> list[float]:
    return [round(as_number(name, value), _CONFIDENCE_DIGITS) for value in as_iterable(name, values)]


def _check_unique(name: str, values: list[str]) -> None:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{name}: got {', '.join(map(repr, repeated))} more than once, expected each once")
