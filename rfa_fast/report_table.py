"""The results table of a scenario: its cells, the sentence that sums it up, and the screen's rendering.

The screen and the page show the same cells, so what counts as a gap, as close or as best is decided
here once. A gap is signed, figure minus Retrain; its colour is one-sided where the column says that
a figure beyond Retrain's is no fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rfa_fast.report_data import MethodRow, Metric, Scenario

if TYPE_CHECKING:
    from rfa_fast.report import RunReport

Level = Literal["", "close", "near", "far"]
_NEAR = 3.0  # tolerances; beyond it a gap is "far"
_STYLES: dict[Level, str] = {"": "dim", "close": "dim green", "near": "dim yellow", "far": "dim red"}


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        text: the figure.
        gap: the signed gap to Retrain, or empty.
        level: how close it is.
        best: whether its gap is the smallest of the column.
        spread: what stands behind ±, or empty.
        published: the figure that somebody else printed, or empty.
    """

    text: str
    gap: str = ""
    level: Level = ""
    best: bool = False
    spread: str = ""
    published: str = ""


def reference_row(scenario: Scenario) -> MethodRow | None:
    """The row that gaps are measured from, or `None` when the scenario has none."""
    return next((row for row in scenario.rows if row.method == scenario.reference), None)


def unlearned_rows(scenario: Scenario) -> list[MethodRow]:
    """The rows of unlearning methods: neither the original model nor the reference.

    Example:
        >>> rows = [MethodRow("Original"), MethodRow("Retrain"), MethodRow("RFA")]
        >>> [row.method for row in unlearned_rows(Scenario("forget 3", rows))]
        ['RFA']
    """
    return [row for row in scenario.rows if row.method not in (scenario.original, scenario.reference)]


def table_cells(scenario: Scenario, extra: int = 0) -> list[list[Cell]]:
    """The cells of every row, in the order of `scenario.metrics`, with `extra` decimals more.

    The best gap of a column is marked where two or more methods are compared and not all tie.

    Example:
        >>> rows = [MethodRow("Retrain", {"D_rt": 0.914}), MethodRow("RFA", {"D_rt": 0.912})]
        >>> table_cells(Scenario("forget 3", rows))[1]
        [Cell(text='91.2', gap='-0.2', level='close', best=False, spread='', published='')]
    """
    reference, compared = reference_row(scenario), unlearned_rows(scenario)
    columns: list[list[Cell]] = []
    for metric in scenario.metrics:
        target = reference.metrics.get(metric.key, math.nan) if reference else math.nan
        gaps = [_shortfall(metric, row, target) for row in compared]
        finite = [gap for gap in gaps if gap is not None]
        best = min(finite) if len(finite) > 1 and min(finite) < max(finite) else None
        column = []
        for row in scenario.rows:
            value = row.metrics.get(metric.key)
            beside = {
                name: metric.format(values[metric.key], extra)
                for name, values in (("spread", row.spread), ("published", row.published))
                if not math.isnan(values.get(metric.key, math.nan))
            }
            if value is None:
                column.append(Cell("", **beside))  # type: ignore[arg-type]  # both are texts
                continue
            gap = _shortfall(metric, row, target) if row in compared else None
            signed = "" if gap is None else metric.format(_gap(metric, row, target), extra, signed=True)
            level: Level = "" if gap is None else _level(gap)
            best_here = gap is not None and gap == best
            column.append(Cell(metric.format(value, extra), signed, level, best_here, **beside))
        columns.append(column)
    return [[column[i] for column in columns] for i in range(len(scenario.rows))]


def verdict(scenario: Scenario) -> str:
    """How close the closest method comes to Retrain, where it is furthest from it, and in what time.

    Empty when nothing was compared with a reference.

    Example:
        >>> rows = [MethodRow("Retrain", {"D_rt": 0.914}), MethodRow("RFA", {"D_rt": 0.911})]
        >>> verdict(Scenario("forget 3", rows))
        'RFA is close to Retrain in every column, furthest on D_rt: 91.10 % against 91.40 %.'
    """
    reference = reference_row(scenario)
    if reference is None:
        return ""
    judged: list[tuple[float, int, list[tuple[float, Metric]], MethodRow]] = []
    for row in unlearned_rows(scenario):
        gaps = [
            (gap, metric)
            for metric in scenario.metrics
            if (gap := _shortfall(metric, row, reference.metrics.get(metric.key, math.nan))) is not None
        ]
        if gaps:
            judged.append((max(gap for gap, _ in gaps), len(judged), gaps, row))
    if not judged:
        return ""
    worst, _, gaps, row = min(judged)
    close = sum(_level(gap) == "close" for gap, _ in gaps)
    count = "every column" if close == len(gaps) else f"{close} of {len(gaps)} columns"
    text = f"{row.method} is close to {reference.method} in {count}"
    if worst > 0:
        metric = max(gaps, key=lambda pair: pair[0])[1]
        name = f"{metric.group.lower()} {metric.label}".strip()
        unit = " %" if metric.unit == "%" else ""
        ours, theirs = (metric.format(values[metric.key], 1) + unit for values in (row.metrics, reference.metrics))
        text += f", furthest on {name}: {ours} against {theirs}"
    if row.seconds and reference.seconds:
        faster = row.seconds <= reference.seconds
        times = f"{max(row.seconds, reference.seconds) / min(row.seconds, reference.seconds):.1f}"
        speed = "as long" if times == "1.0" else f"{times} times as {'fast' if faster else 'slow'}"
        text += f". It took {duration(row.seconds)} against {duration(reference.seconds)}: {speed}"
    return text + "."


def duration(seconds: float | None) -> str:
    """A time for people; in seconds up to an hour, so that the times of a table compare at a glance.

    Example:
        >>> duration(3.21), duration(402.3), duration(7384), duration(None)
        ('3.2 s', '402 s', '2 h 3 min', '')
    """
    if seconds is None:
        return ""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 3600:
        return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def print_report(report: RunReport, console: Console | None = None) -> None:
    """Print the report's tables; see :meth:`rfa_fast.report.RunReport.print`."""
    console = console or Console()
    console.print(Text(report.title, style="bold"))
    if report.summary:
        console.print(Text(report.summary))
    for scenario in report.scenarios:
        console.print()
        console.print(Text(scenario.title, style="bold cyan"))
        for table in _tables(scenario, console):
            console.print(table)
            console.print()
        if line := verdict(scenario):
            console.print(Text(line))
        for note in scenario.notes:
            console.print(Text(note, style="dim"))
    for note in report.notes:
        console.print(Text(note, style="dim"))


def _gap(metric: Metric, row: MethodRow, target: float) -> float:
    return row.gaps.get(metric.key, row.metrics.get(metric.key, math.nan) - target)


def _shortfall(metric: Metric, row: MethodRow, target: float) -> float | None:
    gap = _gap(metric, row, target)
    return metric.shortfall(target + gap, target) if math.isfinite(gap) and math.isfinite(target) else None


def _level(gap: float) -> Level:
    slack = 1e-9  # 0.914 - 0.904 is a little more than 0.01
    return "close" if gap <= 1 + slack else "near" if gap <= _NEAR + slack else "far"


def _tables(scenario: Scenario, console: Console) -> list[Table]:
    """One table with gaps beside the figures, else below them; else several, split between groups of columns."""
    unbounded = console.options.update(max_width=10_000)
    names = [row.method for row in scenario.rows]
    # Only the methods' names may wrap, and only between words.
    spare = max(map(len, names), default=0) - max((len(word) for name in names for word in name.split()), default=0)

    def fits(columns: list[int], beside: bool) -> bool:
        table = _table(scenario, columns, beside)
        return Measurement.get(console, unbounded, table).maximum - spare <= console.width

    everything = list(range(len(scenario.metrics)))
    for beside in (True, False):
        if fits(everything, beside) or not everything:
            return [_table(scenario, everything, beside)]
    parts: list[list[int]] = [[]]
    for _, group in groupby(everything, key=lambda i: scenario.metrics[i].group):
        columns = list(group)
        if fits(parts[-1] + columns, True):
            parts[-1] += columns
            continue
        parts.append([])
        for i in columns:
            if parts[-1] and not fits([*parts[-1], i], True):
                parts.append([])
            parts[-1].append(i)
    return [_table(scenario, part, True) for part in parts if part]


def _table(scenario: Scenario, columns: list[int], beside: bool) -> Table:
    """The table of some columns; the figures stay aligned where a gap stands beside only some of them."""
    shown = [scenario.metrics[i] for i in columns]
    percent = all(metric.unit == "%" for metric in shown)
    table = Table(box=SIMPLE_HEAD, show_edge=False, caption_justify="left")
    table.add_column("Method", overflow="fold")
    rows = table_cells(scenario)
    texts: list[list[Text]] = [[] for _ in rows]
    papers: list[list[Text]] = [[] for _ in rows]
    group = ""
    for i, metric in zip(columns, shown, strict=True):
        head = metric.label if percent or not metric.unit else f"{metric.label} {metric.unit}"
        figures, published = _aligned([row[i] for row in rows])
        figure = max(len(text) for text in (head, *figures))
        gap = max((len(row[i].gap) for row in rows), default=0) if beside else 0
        lines = [head.rjust(figure)]
        if any(other.group for other in shown):
            lines.insert(0, metric.group if metric.group != group else "")
        group = metric.group
        table.add_column(Text("\n".join(lines)), justify="left" if gap else "right", no_wrap=True)
        for row, cells, line, whole in zip(scenario.rows, rows, texts, figures, strict=True):
            cell = cells[i]
            text = Text(whole.rjust(figure) if gap else whole, style=_row_style(scenario, row))
            if cell.gap:
                text.append(f" {cell.gap:>{gap}}" if gap else f"\n{cell.gap}", style=_STYLES[cell.level])
            line.append(text)
        for line, whole in zip(papers, published, strict=True):
            line.append(Text(whole.rjust(figure) if gap else whole, style="dim"))
    timed = any(row.seconds is not None for row in scenario.rows)
    if timed:
        table.add_column("Time", justify="right", no_wrap=True)
    for row, line, paper in zip(scenario.rows, texts, papers, strict=True):
        time = [Text(duration(row.seconds))] if timed else []
        table.add_row(Text(row.method, style=_row_style(scenario, row)), *line, *time)
        if any(text.plain.strip() for text in paper):
            table.add_row(Text("  paper", style="dim"), *paper)
    reference = reference_row(scenario)
    caption = ["figures in %"] if percent and shown else []
    if reference is not None and unlearned_rows(scenario):
        caption.append(f"{'beside' if beside else 'below'} each: difference from {reference.method}")
    if any(row.spread for row in scenario.rows):
        caption.append("±: half a 95 % interval")
    if scenario.source and any(row.published for row in scenario.rows):
        caption.append(f"paper: {scenario.source}")
    table.caption = Text("; ".join(caption)) if caption else None
    return table


def _aligned(cells: list[Cell]) -> tuple[list[str], list[str]]:
    """The figures of a column with their intervals, and the published ones: decimals below each other."""
    left = max((len(text) for cell in cells for text in (cell.text, cell.published)), default=0)
    right = max((len(cell.spread) + 1 for cell in cells if cell.spread), default=0)
    figures = [cell.text.rjust(left) + (f"±{cell.spread}" if cell.spread else "").ljust(right) for cell in cells]
    return figures, [cell.published.rjust(left) + " " * right if cell.published else "" for cell in cells]


def _row_style(scenario: Scenario, row: MethodRow) -> str:
    return "" if row.method in (scenario.original, scenario.reference) else "bold"
