"""The four plots of a scenario, as SVG fragments to be set into a page.

What is drawn is decided here, how it looks in :mod:`rfa_fast.plots_style`. Legends are left to the page,
where they wrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rfa_fast.plots_style import HEIGHT, HEX, Key, Plot, layer_legend, short, svg
from rfa_fast.report_data import Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "confidence_plot", "draw_plots", "feature_distance_plot", "loss_plot", "per_class_plot"]

_MOST_CLASSES = 20


def draw_plots(scenario: Scenario, salt: str = "") -> list[Plot]:
    """The plots of one scenario, in reading order; one without data says why in `missing`.

    Args:
        scenario: the numbers.
        salt: anything that differs between the plots of one page, so that no two elements share an id.

    Example:
        >>> [plot.missing != "" for plot in draw_plots(Scenario("nothing measured"))]
        [True, True, True, True]
    """
    classes, features = per_class_plot(scenario, f"{salt}p0"), feature_distance_plot(scenario, f"{salt}p2")
    # Two plots stand side by side: the two whose height is free take that of their neighbour.
    heights = [_class_height(scenario), _layer_height(scenario)] if classes.svg else [HEIGHT, HEIGHT]
    confidence = confidence_plot(scenario, f"{salt}p1", heights[0])
    losses = loss_plot(scenario, f"{salt}p3", heights[1] if confidence.svg else heights[0])
    if classes.svg and confidence.svg:
        return [classes, confidence, features, losses]
    return [classes, confidence, losses, features]


def per_class_plot(scenario: Scenario, salt: str = "") -> Plot:
    """Accuracy per class before and after, as grouped bars, the forgotten classes marked."""
    title, before, after = "Accuracy per class", scenario.per_class_before, scenario.per_class_after
    if not _any_finite(before.values()):
        return Plot(title, missing="this run has no accuracies per class")
    change = {name: abs(after.get(name, math.nan) - before[name]) for name in before}
    names = list(before)
    if len(names) > _MOST_CLASSES:
        order = sorted(names, key=lambda n: (n not in scenario.forgotten, -_finite(change[n], 0.0)))
        names = [name for name in names if name in set(order[:_MOST_CLASSES])]
    series = [("before", "before", before), ("after", "retain", after)] if after else [("accuracy", "retain", before)]

    def draw(axes: Axes) -> None:
        thick = 0.76 / len(series)
        for row, name in enumerate(names):
            if name in scenario.forgotten:
                axes.axhspan(row - 0.5, row + 0.5, color=HEX["band"], lw=0)
            for k, (label, colour, values) in enumerate(series):
                colour = "forget" if name in scenario.forgotten and label != "before" else colour
                place = row + (k - (len(series) - 1) / 2) * thick
                axes.barh(place, 100 * _finite(values[name], 0.0), thick * 0.92, color=HEX[colour])
                if name in scenario.forgotten and math.isfinite(values[name]):
                    text = f"{100 * values[name]:.1f}"
                    axes.text(100 * values[name] + 1.2, place, text, va="center", size=7.5, color=HEX["forget"])
        axes.set(xlim=(0, 108), ylim=(len(names) - 0.5, -0.5), xlabel="accuracy (%)", xticks=range(0, 101, 20))
        axes.set_yticks(range(len(names)), [short(name, 18) for name in names])
        for tick, name in zip(axes.get_yticklabels(), names, strict=True):
            if name in scenario.forgotten:
                tick.set(color=HEX["forget"], weight="bold")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    legend = [Key(label, colour, "bar") for label, colour, _ in series]
    if scenario.forgotten:
        legend.append(Key("forgotten, after" if after else "forgotten", "forget", "bar"))
    told = [
        f"{name} {100 * before[name]:.1f} %" + (f" to {100 * after[name]:.1f} %" if after else "")
        for name in scenario.forgotten
    ]
    kept = {n: c for n, c in change.items() if n not in scenario.forgotten and math.isfinite(c)}
    alt = f"Grouped bars of accuracy for {len(names)} classes." + (f" Forgotten: {', '.join(told)}." if told else "")
    caption = ""
    if kept:
        most = max(kept, key=lambda name: kept[name])
        points = 100 * (after[most] - before[most])
        moved = f"The kept class that moved most is {most}: {_signed(points)} points."
        caption = moved if kept[most] else "No kept class moved."
    if len(names) < len(before):
        caption += f" Drawn: the {len(names)} of {len(before)} classes that moved most."
    return Plot(title, svg(draw, _class_height(scenario), salt), alt, caption.strip(), legend)


def confidence_plot(scenario: Scenario, salt: str = "", height: float = HEIGHT) -> Plot:
    """Distribution of the confidence on forget samples before and after, and on test samples."""
    import numpy as np

    title = "Confidence on forget and test samples"
    groups = {key: [v for v in values if math.isfinite(v)] for key, values in scenario.confidence.items()}
    groups = {key: values for key, values in groups.items() if values}
    if not groups:
        return Plot(title, missing="this run recorded no confidences")
    low, high = min(map(min, groups.values())), max(map(max, groups.values()))
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
    edges = np.linspace(low, high, 26)
    styles = {"forget before": ("forget", "dashed"), "forget after": ("forget", "solid"), "test": ("test", "bar")}
    spare = iter([("retain", "solid"), ("third", "solid"), ("ink", "dotted")] * len(groups))
    legend = [Key(f"{key} ({len(values):,})", *styles.get(key, next(spare))) for key, values in groups.items()]

    def draw(axes: Axes) -> None:
        for key, values in zip(legend, groups.values(), strict=True):
            share = 100 * np.histogram(values, edges)[0] / len(values)
            colour = HEX[key.colour]
            if key.mark == "bar":
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.45, lw=0, zorder=1)
            else:
                axes.stairs(share, edges, color=colour, lw=1.6, ls={"dashed": (0, (4, 2))}.get(key.mark, key.mark))
        axes.set(xlim=(low, high), xlabel="confidence (largest probability)", ylabel="samples (%)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    means = [f"{key} {sum(values) / len(values):.2f}" for key, values in groups.items()]
    caption = f"Mean: {', '.join(means)}."
    alt = f"Histograms of confidence in 25 bins. Mean {', '.join(means)}."
    return Plot(title, svg(draw, height, salt), alt, caption, legend)


def feature_distance_plot(scenario: Scenario, salt: str = "") -> Plot:
    """Feature distance per layer, one line per subset or method, the layers from the input down."""
    title = "Feature distance per layer"
    series = {key: values for key, values in scenario.feature_distance.items() if _any_finite(values.values())}
    if not series:
        return Plot(title, missing="this run measured no feature distances")
    layers = list(dict.fromkeys(layer for values in series.values() for layer in values))
    legend = layer_legend(list(series), scenario.reference)
    every = math.ceil(len(layers) / 24)
    prefix = _shared_parents(layers) if len(layers) > 1 else ""

    def draw(axes: Axes) -> None:
        for key, values in zip(legend, series.values(), strict=True):
            line = {"dashed": (0, (4, 2)), "dotted": (0, (1.2, 1.6))}.get(key.mark, key.mark)
            width = [values.get(layer, math.nan) for layer in layers]
            marker = "o" if len(layers) <= 40 else ""
            axes.plot(width, range(len(layers)), color=HEX[key.colour], ls=line, lw=1.4, marker=marker, ms=3.6)
        rows = range(0, len(layers), every)
        axes.set_yticks(rows, [short(layers[row][len(prefix) :], 26, keep="end") for row in rows])
        axes.set(ylim=(len(layers) - 0.5, -0.5), xlabel="distance (mean L2)")
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="both")

    finite = [(v, key, layer) for key, values in series.items() for layer, v in values.items() if math.isfinite(v)]
    value, key, layer = max(finite)
    caption = f"Largest: {value:.3g} ({key}, {layer})." + (f" Names without “{prefix}”." if prefix else "")
    alt = f"Lines of feature distance over {len(layers)} layers for {', '.join(series)}. {caption}"
    return Plot(title, svg(draw, _layer_height(scenario), salt), alt, caption, legend)


def loss_plot(scenario: Scenario, salt: str = "", height: float = HEIGHT) -> Plot:
    """Loss terms over the steps; the scale is logarithmic where they span more than two decades."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    title = "Loss"
    styles = {
        "total": ("total", "ink", "solid"),
        "retain_task": ("task, retain", "retain", "solid"),
        "forget_task": ("task, forget", "forget", "solid"),
        "retain_align": ("alignment, retain", "retain", "dotted"),
        "forget_align": ("alignment, forget", "forget", "dotted"),
    }
    steps = np.array([row.get("step", i + 1) for i, row in enumerate(scenario.losses)], dtype=float)
    terms = {k: np.array([row.get(k, math.nan) for row in scenario.losses], dtype=float) for k in styles}
    terms = {k: np.where(np.isfinite(v), v, math.nan) for k, v in terms.items() if np.isfinite(v).any()}
    if not terms:
        return Plot(title, missing="this run recorded no losses")
    positive = np.concatenate([v[v > 0] for v in terms.values()])
    log = positive.size > 0 and positive.max() > 100 * positive.min()
    window = max(1, len(steps) // 40)

    def draw(axes: Axes) -> None:
        for order, (key, values) in enumerate(reversed(terms.items())):
            _, colour, mark = styles[key]
            line = {"dotted": (0, (1.2, 1.6))}.get(mark, mark)
            values = np.where(values > 0, values, math.nan) if log else values
            x, y = _binned(steps, values, window)
            width = 2.0 if key == "total" else 1.5
            axes.plot(x, y, color=HEX[colour], ls=line, lw=width, zorder=3 + order, marker="o" if len(x) == 1 else "")
        axes.set(xlabel="step", yscale="log" if log else "linear")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if log:
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.tick_params(axis="y", which="minor", length=0)
        axes.grid(axis="y")
        axes.margins(x=0.02)

    first, last = (_edge(terms.get("total", next(iter(terms.values()))), end) for end in (0, -1))
    name = "total" if "total" in terms else styles[next(iter(terms))][0]
    caption = f"{name.capitalize()}: {first:.3g} at first, {last:.3g} at last."
    caption += f" Means of {window} steps each." if window > 1 else ""
    caption += " Logarithmic scale." if log else ""
    alt = f"Lines of {len(terms)} loss terms over {len(steps)} steps. {caption}"
    legend = [Key(*styles[key]) for key in terms]
    return Plot(title, svg(draw, height, salt), alt, caption, legend)


def _binned(steps: Any, values: Any, window: int) -> tuple[Any, Any]:
    """Means over `window` steps each, which keeps a noisy curve readable and the page small."""
    import numpy as np

    groups = [slice(i, i + window) for i in range(0, len(steps), window)]
    finite = [group for group in groups if np.isfinite(values[group]).any()]
    return np.array([steps[g].mean() for g in finite]), np.array([np.nanmean(values[g]) for g in finite])


def _shared_parents(layers: Sequence[str]) -> str:
    """The leading parts that all dotted names share, with their dots: `"model.layers."`, or an empty string."""
    shared = ""
    for parts in zip(*(layer.split(".")[:-1] for layer in layers), strict=False):
        if len(set(parts)) > 1:
            break
        shared += f"{parts[0]}."
    return shared


def _any_finite(values: Any) -> bool:
    return any(math.isfinite(value) for value in values)


def _finite(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _edge(values: Any, end: int) -> float:
    finite: Sequence[float] = [value for value in values if math.isfinite(value)]
    return float(finite[end])


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _class_height(scenario: Scenario) -> float:
    return 0.62 + 0.235 * min(max(len(scenario.per_class_before), 6), _MOST_CLASSES)


def _layer_height(scenario: Scenario) -> float:
    layers = {layer for values in scenario.feature_distance.values() for layer in values}
    return 0.62 + min(max(0.17 * len(layers), 2.0), 4.4)
