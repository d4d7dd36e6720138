"""What every plot of a report is drawn with: colours, type, size, and the way from matplotlib to the page.

Matplotlib lays a plot out; the page dresses it. Colours are written as stand-ins and replaced by CSS
variables, and text stays text, so one drawing serves light, dark and print in the page's own type.
Figures are drawn through Figure and FigureCanvas objects: pyplot's global state is never touched, and
the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rfa_fast.report_data import SUBSETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-in colour -> CSS variable of the page.
COLOURS = {
    "#010203": "--ink",
    "#040506": "--muted",
    "#070809": "--grid",
    "#0a0b0c": "--retain",
    "#0d0e0f": "--forget",
    "#101112": "--before",
    "#131415": "--test",
    "#161718": "--third",
    "#191a1b": "--band",
}
HEX = {name.removeprefix("--"): value for value, name in COLOURS.items()}
WIDTH = 4.9  # inches; at 72 points each, near the width of a phone, where the text keeps its size
HEIGHT = 2.7
# A subset's name in a text; the group is what is set low.
SUBSET = rf"\bD_({'|'.join(name.removeprefix('D_') for name in SUBSETS)})\b"
_STYLE = {
    "svg.fonttype": "none",
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.4,
    "text.color": HEX["ink"],
    "axes.labelcolor": HEX["muted"],
    "axes.edgecolor": HEX["grid"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": HEX["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": HEX["grid"],
    "ytick.color": HEX["grid"],
    "xtick.labelcolor": HEX["muted"],
    "ytick.labelcolor": HEX["muted"],
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the CSS variable of its colour, and `"bar"`, `"solid"`, `"dashed"` or `"dotted"`."""

    label: str
    colour: str
    mark: str


@dataclass(frozen=True)
class Plot:
    """One plot: an SVG fragment and the words around it; `svg` is empty where there was nothing to draw."""

    title: str
    svg: str = ""
    alt: str = ""
    caption: str = ""
    legend: list[Key] = field(default_factory=list)
    missing: str = ""


def svg(draw: Callable[[Axes], None], height: float, salt: str) -> str:
    """Draw on fresh axes and return an `<svg>` that inherits colour and type from the page around it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": f"rfa-fast {salt}"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The reader's browser sets the text, so a glyph that matplotlib's own font lacks is not missing.
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _dress(buffer.getvalue(), salt)


def _dress(text: str, salt: str) -> str:
    """The `<svg>` element alone: no prolog, no links, ids unique on the page, CSS variables for colours.

    What stands between tags is the user's (matplotlib has escaped it): there the subset of `D_rt` is set as a
    subscript, as everywhere on the page, and nothing else is touched.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    tags = "".join(re.findall(r"<[^>]+>", text))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', tags))

    def rewrite(match: re.Match[str]) -> str:
        tag = match[0]
        if tag.startswith("<svg"):
            tag = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", tag)
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{salt}-{m[1]}"' if m[1] in used else "", tag)
        tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{salt}-", tag)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({COLOURS[m[0]]})" if m[0] in COLOURS else m[0], tag)

    text = re.sub(r"<[^>]+>", rewrite, text).strip()
    return re.sub(r"[^<>]*\bD_[^<>]*(?=</text>)", lambda match: _subscripts(match[0]), text)


def _subscripts(text: str) -> str:
    """The text of a label, whose line goes on at its height behind a subscript."""
    first, *rest = re.split(SUBSET, text)
    low = '<tspan dy=".25em" font-size="72%">{}</tspan><tspan dy="-.18em">{}</tspan>'
    return first + "".join("D" + low.format(name, after) for name, after in zip(rest[::2], rest[1::2], strict=True))


def layer_legend(names: Sequence[str], reference: str) -> list[Key]:
    """Kept and forgotten keep their colours; test subsets are dotted, Retrain dashed; no two look alike."""
    spare = [(colour, mark) for mark in ("solid", "dashed", "dotted") for colour in ("third", "ink", "test", "before")]
    legend: list[Key] = []
    for name in names:
        forget, retain = re.search(r"D_f|forget", name), re.search(r"D_r|D_t|retain|kept", name)
        mark = "dashed" if reference in name else "dotted" if re.search(r"D_r?f?t\b|test", name) else "solid"
        look = ("forget" if forget else "retain", mark)
        if not (forget or retain) or look in [(key.colour, key.mark) for key in legend]:
            look = spare.pop(0) if spare else look
        legend.append(Key(name, *look))
    return legend


def short(name: str, most: int, keep: str = "start") -> str:
    if len(name) <= most:
        return name
    return f"…{name[1 - most :]}" if keep == "end" else f"{name[: most - 1]}…"
