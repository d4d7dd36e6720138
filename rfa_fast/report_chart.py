"""A chart of a report: figures over a setting (γ, placement, rate) or over the methods, as plain numbers.

The x axis is a row of labels at equal distances, whatever they stand for. A placement has no distance
from another, and rates that are tried are mostly a factor apart; where the values are evenly spaced
anyway, nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rfa_fast.report_values import as_iterable, as_list, as_mapping, as_number, as_numbers, as_text


@dataclass
class Chart:
    """One chart.

    Attributes:
        title: above it.
        x: labels of the points, in order.
        series: name -> one figure per point; NaN where there is none.
        spread: name of a series -> half the width of an interval per point; NaN where there is none.
        levels: name -> a figure drawn as a line across, Retrain's say.
        kind: `"line"` or `"bar"` (bars lie: the labels are names).
        x_label, y_label: of the axes.
        unit: `"%"` shows fractions as percentages.

    Raises:
        TypeError: a value that is not what its field says.
        ValueError: a series of another length than `x`, a spread without its series, another kind or unit.

    Example:
        >>> Chart("Accuracy over γ", ["0.1", "0.9"], {"D_f": [0.3, 0.1]}, unit="%").series
        {'D_f': [0.3, 0.1]}
    """

    title: str
    x: list[str]
    series: dict[str, list[float]]
    spread: dict[str, list[float]] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    kind: Literal["line", "bar"] = "line"
    x_label: str = ""
    y_label: str = ""
    unit: Literal["", "%"] = ""

    def __post_init__(self) -> None:
        for name in ("title", "x_label", "y_label"):
            as_text(f"chart {name}", getattr(self, name))
        if self.kind not in ("line", "bar"):
            raise ValueError(f"kind of {self.title!r}: got {self.kind!r}, expected 'line' or 'bar'")
        if self.unit not in ("", "%"):
            raise ValueError(f"unit of {self.title!r}: got {self.unit!r}, expected '' or '%'")
        self.x = as_list(f"x of {self.title!r}", self.x, str)
        self.series = self._points("series", self.series)
        self.spread = self._points("spread", self.spread)
        self.levels = as_numbers(f"levels of {self.title!r}", self.levels)
        if unknown := sorted(set(self.spread) - set(self.series)):
            raise ValueError(f"spread of {self.title!r}: got {unknown}, expected some of {list(self.series)}")

    def _points(self, name: str, values: object) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for key, points in as_mapping(f"{name} of {self.title!r}", values).items():
            where = f"{name} {as_text(f'{name} key', key)!r} of {self.title!r}"
            found[key] = [as_number(where, value) for value in as_iterable(where, points)]
            if len(found[key]) != len(self.x):
                raise ValueError(f"{where}: got {len(found[key])} figures, expected {len(self.x)}, one per label")
        return found
