"""The results as a report: what the console prints and the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rfa_fast.experiments.tables.columns import metric_of
from rfa_fast.experiments.tables.results import BlockResult, GapSummary, RowResult
from rfa_fast.report import Chart, Example, MethodRow, Metric, Scenario

SUMMARY = "Mean absolute gap to Retrain"


def block_scenario(result: BlockResult) -> Scenario:
    """One block as a section of the report; the plots show RFA's first seed with figures, and Original of that seed."""
    shown = _shown(result)
    first = next(iter(result.founds.values()))
    plots: dict[str, Any] = {}
    notes = result.notes()
    of_seed = None if shown is None or shown.seed is None else result.founds[shown.seed]
    before, after = None if of_seed is None else of_seed.rows.get("Original"), None if shown is None else shown.latest
    if shown is not None and of_seed is not None and before is not None and after is not None:
        target = of_seed.split.target
        plots = {
            "per_class_before": before.per_class,
            "per_class_after": after.per_class,
            "forgotten": [target] if target in before.per_class else [],
            "confidence": {
                "forget before": before.confidence["forget"],
                "forget after": after.confidence["forget"],
                "test": after.confidence["test"],
            },
            "losses": after.losses,
            "feature_distance": {f"{shown.label}, {name}": layers for name, layers in after.distance.items()},
            "examples": [Example(prompt, text, after.texts[prompt]) for prompt, text in before.texts.items()],
        }
        notes.append(f"The plots show {shown.label}, seed {shown.seed}; distances are to the Original.")
    return Scenario(
        f"{result.name}: {result.title} ({result.short})",
        [_row(row, result.columns) for row in (*result.baselines, *result.rows)],
        result.columns,
        notes=notes,
        settings={
            "split": {"scenario": first.split.scenario, "target": first.split.target},
            "seeds": list(result.founds),
            "recipe": first.recipe,
            "samples": first.sizes,
            "methods": {key: options for key, options in first.options.items()
                        if key in [row.key for row in result.block.rows]},
        },
        charts=_charts(result),
        source=result.source,
        **plots,
    )  # fmt: skip


def summary_scenario(summaries: Sequence[GapSummary]) -> Scenario | None:
    """Gap and rank of every method on every pair; `None` where nothing has a gap."""
    if not summaries:
        return None
    metrics: list[Metric] = []
    figures: dict[str, dict[str, float]] = {}
    charts: list[Chart] = []
    for summary in summaries:
        base = f"{summary.pair} {summary.metric}"
        percent = summary.percent
        name = f"{summary.pair}, {summary.metric.replace('_', ' ')}"
        about = f"mean over {summary.columns} columns of |mean gap to Retrain|"
        metrics.append(Metric(f"{base} gap", "gap", "%" if percent else "", "lower", 2, group=name, about=about))
        metrics.append(Metric(f"{base} rank", "rank", "", "lower", 0, group=name, about="1: the smallest gap"))
        for label, gap in summary.gaps.items():
            row = figures.setdefault(label, {})
            if not math.isnan(gap):
                row |= {f"{base} gap": gap, f"{base} rank": float(summary.ranks[label])}
        finite = {label: gap for label, gap in summary.gaps.items() if math.isfinite(gap)}
        if finite:
            charts.append(
                Chart(f"Gap to Retrain: {name}", list(finite), {"gap": list(finite.values())}, kind="bar",
                      x_label="mean absolute gap", unit="%" if percent else "")
            )  # fmt: skip
    rows = [MethodRow(label, values) for label, values in figures.items()]
    notes = ["Over all columns of a metric on a pair, every scenario counted; infinite where a perplexity is."]
    return Scenario(SUMMARY, rows, metrics, original="", reference="", notes=notes, charts=charts)


def _row(row: RowResult, columns: Sequence[Metric]) -> MethodRow:
    keys = [column.key for column in columns]
    spread = {k: v.half for k, v in row.figures.items() if k in keys and not math.isnan(v.half)}
    figures = {k: v.mean for k, v in row.figures.items() if k in keys}
    # Seed by seed, as everywhere: Retrain may have seeds that the row has not. What is not there has no gap.
    gaps = {k: row.gaps[k].mean if k in row.gaps else math.nan for k in figures}
    return MethodRow(row.label, figures, row.seconds, spread, dict(row.paper), gaps)


def _shown(result: BlockResult) -> RowResult | None:
    """The row that the plots show: RFA's last, else the first that has figures."""
    finished = [(of, row) for of, row in zip(result.block.rows, result.rows, strict=True) if row.latest is not None]
    ours = [row for of, row in finished if of.spec.method == "rfa"]
    return next(iter(ours[-1:] or [row for _, row in finished]), None)


def _charts(result: BlockResult) -> list[Chart]:
    """Of a sweep, each metric over the values that were tried, with Retrain's figure as a line."""
    sweep = result.block.table.sweep
    if sweep is None:
        return []
    found: list[Chart] = []
    values = list(sweep.values)
    count = len(result.rows) // len(values)
    for at in range(count):
        rows = result.rows[at * len(values) : (at + 1) * len(values)]
        value = f"{sweep.symbol}{values[0]}"
        base = ", ".join(part for part in rows[0].label.split(", ") if part != value)
        for metric in result.block.metrics:
            columns = [column for column in result.columns if metric_of(column.key) == metric]
            series: Mapping[str, list[float]] = {c.label: [_mean(row, c.key) for row in rows] for c in columns}
            found.append(
                Chart(
                    ", ".join(filter(None, (columns[0].group or columns[0].label, base))),
                    [str(value) for value in values],
                    dict(series),
                    {c.label: [_half(row, c.key) for row in rows] for c in columns},
                    {f"Retrain {c.label}": _mean(result.retrain, c.key) for c in columns
                     if c.label in ("D_f", "D_rt", "D_t") and metric == "accuracy"},
                    x_label=sweep.symbol.rstrip(" =") or sweep.option,
                    y_label=columns[0].group or columns[0].label,
                    unit=columns[0].unit,
                )
            )  # fmt: skip
    return found


def _mean(row: RowResult, key: str) -> float:
    return row.figures[key].mean if key in row.figures else math.nan


def _half(row: RowResult, key: str) -> float:
    return row.figures[key].half if key in row.figures else math.nan
