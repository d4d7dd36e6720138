"""A report as one HTML page that needs no other file and no network.

The page is a jinja2 template with autoescaping on; the only markup that bypasses it is made here:
subscripts, whose parts are escaped one by one, the plots, whose text matplotlib has escaped, and the
raw numbers, in which no character can end the element that holds them. What is embedded twice (the
numbers drawn and the numbers kept) costs some kilobytes and spares the reader a second file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rfa_fast.plots import Plot, draw_plots
from rfa_fast.plots_chart import chart_plot
from rfa_fast.plots_style import SUBSET
from rfa_fast.report_data import MethodRow, Metric, Scenario
from rfa_fast.report_table import Cell, duration, reference_row, table_cells, unlearned_rows, verdict

if TYPE_CHECKING:
    from rfa_fast.report import RunReport

_TEMPLATES = Path(__file__).parent / "templates"
_CLOSENESS = {"close": "close to Retrain", "near": "near Retrain", "far": "far from Retrain", "": ""}


@dataclass(frozen=True)
class Line:
    """One row of the page's table: `kind` is `"original"`, `"reference"` or `"method"`."""

    row: MethodRow
    kind: str
    cells: list[Cell]
    time: str
    speed: str


@dataclass(frozen=True)
class Section:
    """One scenario, ready to be set; `published` has the width of each column's published figures, in characters."""

    anchor: str
    scenario: Scenario
    verdict: str
    groups: list[tuple[str, int]]
    lines: list[Line]
    plots: list[Plot]
    missing: list[Plot]
    settings: list[tuple[str, str]]
    compared: bool
    marked: bool
    published: dict[str, int]
    spread: bool
    timed: bool


def render(report: RunReport) -> str:
    """The page as text; the same report always gives the same page.

    Example:
        >>> from rfa_fast.report import RunReport
        >>> page = render(RunReport("A < B"))
        >>> "A &lt; B" in page, "http" in page
        (True, False)
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["heading"] = heading
    environment.filters["tolerance"] = _tolerance
    environment.filters["minus"] = lambda text: text.replace("-", "−")
    sections = [_section(scenario, f"s{i}") for i, scenario in enumerate(report.scenarios, 1)]
    return environment.get_template("report.html.j2").render(
        report=report, sections=sections, raw=embedded_json(report.to_dict()), closeness=_CLOSENESS, svg=Markup
    )


def heading(label: str) -> Markup:
    """A column's label, with the subset of `D_rt` as a subscript.

    Example:
        >>> str(heading("D_rt")), str(heading("<b>"))
        ('<i>D</i><sub>rt</sub>', '&lt;b&gt;')
    """
    parts = re.split(SUBSET, label)
    texts = [
        Markup("<i>D</i><sub>{}</sub>").format(part) if i % 2 else Markup.escape(part) for i, part in enumerate(parts)
    ]
    return Markup("").join(texts)


def embedded_json(values: Mapping[str, Any]) -> Markup:
    """JSON that is safe inside a script element: nothing in it can open or close markup.

    Example:
        >>> str(embedded_json({"title": "</script>"}))
        '{"title":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Markup(re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", text))


def _section(scenario: Scenario, anchor: str) -> Section:
    reference, compared = reference_row(scenario), unlearned_rows(scenario)
    lines = []
    for row, cells in zip(scenario.rows, table_cells(scenario, extra=1), strict=True):
        kind = "method" if row in compared else "reference" if row is reference else "original"
        speed = ""
        if kind == "method" and reference and reference.seconds and row.seconds:
            ratio = reference.seconds / row.seconds
            speed = f"{ratio:.1f}× as fast" if ratio >= 1 else f"{1 / ratio:.1f}× as slow"
        lines.append(Line(row, kind, cells, duration(row.seconds), speed))
    charts = [chart_plot(chart, f"{anchor}c{i}") for i, chart in enumerate(scenario.charts)]
    plots = [*charts, *draw_plots(scenario, anchor)]
    return Section(
        anchor,
        scenario,
        verdict(scenario),
        [(name, len(list(part))) for name, part in groupby(scenario.metrics, key=lambda metric: metric.group)],
        lines,
        [plot for plot in plots if plot.svg],
        [plot for plot in plots if not plot.svg],
        _flat(scenario.settings),
        reference is not None and bool(compared),
        any(cell.best for line in lines for cell in line.cells),
        _published(scenario, lines),
        any(row.spread for row in scenario.rows),
        any(line.time for line in lines),
    )


def _published(scenario: Scenario, lines: Sequence[Line]) -> dict[str, int]:
    """Column with published figures -> the characters that its longest needs, at least those of its heading."""
    shown = {key for row in scenario.rows for key in row.published}
    return {
        metric.key: max(len("paper"), *(len(line.cells[i].published) for line in lines))
        for i, metric in enumerate(scenario.metrics)
        if metric.key in shown
    }


def _tolerance(metric: Metric) -> str:
    if metric.unit == "%":
        points = 100 * (metric.tolerance or 0.01)
        return f"{points:g} point{'' if points == 1 else 's'}"
    return f"{metric.tolerance:g}" if metric.tolerance else "5 % of Retrain's figure"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return pairs
