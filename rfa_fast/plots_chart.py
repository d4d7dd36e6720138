"""The charts of a report as SVG fragments: lines over a setting, bars over the methods.

Drawn by the same hand as the plots of a scenario (:mod:`rfa_fast.plots`), with the same colours
and the same way to the page. Lines of kept subsets are blue and those of forgotten ones orange,
as everywhere in a report; other series take the colours that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rfa_fast.plots_style import HEIGHT, HEX, WIDTH, Key, Plot, layer_legend, short, svg
from rfa_fast.report_chart import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE_LABEL = 24  # characters of a bar's name before it is cut
_LINE_OF_TEXT = 0.06  # of a chart's height


def chart_plot(chart: Chart, salt: str = "") -> Plot:
    """One chart as a plot; without a finite figure it says so in `missing`.

    Args:
        chart: the numbers.
        salt: anything that differs between the plots of one page.

    Example:
        >>> chart_plot(Chart("Gap", ["NegGrad"], {"gap": [math.nan]}, kind="bar")).missing
        'no figure was measured'
    """
    values = [v for points in chart.series.values() for v in points if math.isfinite(v)]
    if not values:
        return Plot(chart.title, missing="no figure was measured")
    factor = 100.0 if chart.unit == "%" else 1.0
    legend = layer_legend(list(chart.series), "Retrain")
    if chart.kind == "bar":
        legend = [Key(key.label, key.colour, "bar") for key in legend]

    def draw(axes: Axes) -> None:
        if chart.kind == "bar":
            _bars(axes, chart, legend, factor)
        else:
            _lines(axes, chart, legend, factor)

    height = HEIGHT if chart.kind == "line" else 0.7 + 0.26 * max(4, len(chart.x) * len(chart.series))
    told = _lowest(chart, factor) if chart.kind == "bar" else _ends(chart, factor)
    caption = "; ".join(told) + ("." if told else "")
    kind = "Bars" if chart.kind == "bar" else "Lines"
    alt = f"{kind} of {', '.join(chart.series)} over {', '.join(chart.x)}. {caption}".strip()
    shown = legend if len(legend) > 1 or chart.kind == "line" else []
    return Plot(chart.title, svg(draw, min(height, 1.3 * WIDTH), salt), alt, caption, shown)


def _ends(chart: Chart, factor: float) -> list[str]:
    """Where each line begins and ends."""
    unit = " %" if chart.unit else ""
    return [
        f"{name} {points[0] * factor:.3g}{unit} at {chart.x[0]}, {points[-1] * factor:.3g}{unit} at {chart.x[-1]}"
        for name, points in chart.series.items()
        if math.isfinite(points[0]) and math.isfinite(points[-1])
    ]


def _lowest(chart: Chart, factor: float) -> list[str]:
    """The shortest bar of the first series."""
    points = next(iter(chart.series.values()))
    finite = [(value, label) for value, label in zip(points, chart.x, strict=True) if math.isfinite(value)]
    return [f"Least: {min(finite)[1]}, {min(finite)[0] * factor:.3g}{' %' if chart.unit else ''}"] if finite else []


def _lines(axes: Axes, chart: Chart, legend: list[Key], factor: float) -> None:
    places = range(len(chart.x))
    for key, (name, points) in zip(legend, chart.series.items(), strict=True):
        line = {"dashed": (0, (4, 2)), "dotted": (0, (1.2, 1.6))}.get(key.mark, key.mark)
        y = [factor * value if math.isfinite(value) else math.nan for value in points]
        axes.plot(places, y, color=HEX[key.colour], ls=line, lw=1.6, marker="o", ms=3.8)
        spread = [factor * value if math.isfinite(value) else 0.0 for value in chart.spread.get(name, [])]
        if any(spread):
            axes.errorbar(places, y, spread, fmt="none", ecolor=HEX[key.colour], elinewidth=0.9, capsize=2.5)
    levels = sorted((factor * value, name) for name, value in chart.levels.items() if math.isfinite(value))
    for value, _ in levels:
        axes.axhline(value, color=HEX["muted"], lw=0.9, ls=(0, (4, 2)))
    axes.set_xticks(list(places), [short(label, 12) for label in chart.x])
    unit = " (%)" if chart.unit else ""
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label + unit)
    axes.grid(axis="y")
    axes.margins(x=0.06)
    low, high = axes.get_ylim()
    for value, names in _told_apart(levels, _LINE_OF_TEXT * (high - low)):
        axes.annotate(
            names, (1, value), (3, 0), ("axes fraction", "data"), "offset points",
            va="center", size=7.5, color=HEX["muted"],
        )  # fmt: skip


def _told_apart(levels: Sequence[tuple[float, str]], apart: float) -> list[tuple[float, str]]:
    """Levels, lowest first, as one label per line of text: those nearer to each other than `apart` share one."""
    groups: list[list[tuple[float, str]]] = []
    for level in levels:
        if groups and level[0] - groups[-1][0][0] < apart:
            groups[-1].append(level)
        else:
            groups.append([level])
    return [
        (sum(value for value, _ in group) / len(group), "\n".join(name for _, name in reversed(group)))
        for group in groups
    ]


def _bars(axes: Axes, chart: Chart, legend: list[Key], factor: float) -> None:
    thick = 0.76 / len(chart.series)
    for k, (key, (name, points)) in enumerate(zip(legend, chart.series.items(), strict=True)):
        for row, value in enumerate(points):
            place = row + (k - (len(chart.series) - 1) / 2) * thick
            if math.isfinite(value):
                axes.barh(place, factor * value, thick * 0.92, color=HEX[key.colour])
                axes.text(factor * value, place, f" {factor * value:.3g}", va="center", size=7.5, color=HEX["muted"])
            spread = chart.spread.get(name, [math.nan] * len(points))[row]
            if math.isfinite(spread) and math.isfinite(value):
                axes.errorbar(factor * value, place, xerr=factor * spread, fmt="none", ecolor=HEX["ink"], capsize=2)
    axes.set_yticks(range(len(chart.x)), [short(label, _WIDE_LABEL) for label in chart.x])
    axes.set_ylim(len(chart.x) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    unit = " (%)" if chart.unit else ""
    axes.set(xlabel=(chart.x_label or chart.y_label) + unit)
    axes.set_xlim(left=0)
    axes.margins(x=0.14)
    axes.grid(axis="x")
