"""A block with its figures: over the seeds, against Retrain, beside the paper.

Everything that is written (console, page, CSV, Markdown, LaTeX) is a view of these objects, so that no two of
them can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rfa_fast.experiments.common import Row
from rfa_fast.experiments.tables.aggregate import Summary, gaps, mean_absolute_gap, ranks, summarise, within
from rfa_fast.experiments.tables.columns import (
    CLASS_SUBSETS,
    DISTANCES,
    LASTING,
    QUOTIENT,
    SAMPLE_SUBSETS,
    columns,
    metric_of,
)
from rfa_fast.experiments.tables.pairs import recipe_kind, recipe_words
from rfa_fast.experiments.tables.paper_figures import Figures, paper_figures
from rfa_fast.experiments.tables.plan import Block
from rfa_fast.experiments.tables.runner import Found, Place
from rfa_fast.report import Metric

NO_GAP = ("seconds", QUOTIENT, "peak_mib")
"""Metrics that Retrain is no yardstick of."""


@dataclass
class RowResult:
    """One row over its seeds.

    Attributes:
        label: in the table.
        figures: column -> mean and interval.
        values: column -> seed -> figure.
        gaps: column -> mean and interval of the gap to Retrain, seed by seed.
        paper: column -> the paper's figure.
        seconds: mean time, `None` where unknown.
        failed: seed -> why it has no figures.
        latest: the row of the first seed that has one, for plots.
        seed: that seed.
    """

    label: str
    figures: dict[str, Summary] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    gaps: dict[str, Summary] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    failed: dict[int, str] = field(default_factory=dict)
    latest: Row | None = None
    seed: int | None = None


@dataclass
class BlockResult:
    """One block with its rows.

    Attributes:
        block: what was asked for.
        columns: in order.
        baselines: rows of Original and Retrain that the table shows.
        rows: those of the methods.
        retrain: Retrain's row, shown or not.
        original: Original's.
        title: what was forgotten.
        recipe: of Original and Retrain, in words; `short`, in few.
        source: the paper's table and what it is of; empty where there is none.
        founds: seed -> what the seed gave.
    """

    block: Block
    columns: list[Metric]
    baselines: list[RowResult]
    rows: list[RowResult]
    retrain: RowResult
    original: RowResult
    title: str
    recipe: str
    short: str
    source: str
    founds: dict[int, Found]

    @property
    def name(self) -> str:
        """`"fashion-mnist/resnet18, sample:128"`."""
        return f"{self.block.pair.name}, {self.block.scenario}"

    def notes(self) -> list[str]:
        """What a reader has to know of this block."""
        first = next(iter(self.founds.values()))
        found = []
        sizes = ", ".join(f"{name} {count:,}" for name, count in first.sizes.items())
        fewer = [f"{count:,} of {name}" for name, count in first.measured.items() if count < first.sizes[name]]
        found.append(f"Samples: {sizes}." + (f" Measured: {', '.join(fewer)}." if fewer else ""))
        for row in self.rows:
            seeds = ", ".join(map(str, row.failed))
            if row.failed:
                found.append(f"{row.label} has no figures for seed {seeds}: {next(iter(row.failed.values()))}.")
        longer = self.block.table.longer
        return [*found, *self._spread(), *([longer] if longer and self._all_epochs() else []), *self.block.table.notes]

    def _all_epochs(self) -> bool:
        """Whether no row has fewer epochs of unlearning than the table asks for."""
        first = next(iter(self.founds.values()))
        for row in self.block.rows:
            had = first.options.get(row.key)
            asked = row.options(self.block.pair, self.block.kind, first.sizes["D_f"], 0)
            if had is not None and any(had.get(key) != asked.get(key) for key in ("epochs", "max_steps")):
                return False
        return True

    def _spread(self) -> list[str]:
        """Whether a sample run of RFA stays within what Retrain's own seeds differ by."""
        keys = [c.key for c in self.columns if c.key in ("D_f/accuracy", "D_t/accuracy")]
        if self.block.kind != "sample" or len(self.retrain.values.get("D_f/accuracy", {})) < 2:
            return []
        found = []
        for key in keys:
            spread = self.retrain.figures[key]
            ours = [
                row for planned, row in zip(self.block.rows, self.rows, strict=True) if planned.spec.method == "rfa"
            ]
            means = {row.label: row.figures[key].mean for row in ours if key in row.figures}
            told = [
                f"{label} {100 * mean:.2f} is {'' if within(mean, spread) else 'not '}within"
                for label, mean in means.items()
            ]
            subset = key.partition("/")[0]
            range_words = f"{100 * spread.low:.2f} to {100 * spread.high:.2f} %"
            words = "; ".join([range_words, *([", ".join(told)] if told else [])])
            found.append(f"Retrain over {spread.n} seeds, {subset}: {words}.")
        return found


def block_result(block: Block, computed: Mapping[Place, Found]) -> BlockResult:
    """The figures of a block.

    Args:
        block: one of the plan.
        computed: what the units of the plan gave.
    """
    wanted = (block.pair.name, block.scenario, block.lasting)
    founds = {at.seed: found for at, found in computed.items() if (at.pair, at.scenario, at.lasting) == wanted}
    first = next(iter(founds.values()))
    subsets = SAMPLE_SUBSETS if "D_t" in first.sizes else CLASS_SUBSETS
    shown = columns(block.metrics, subsets)
    keys = [column.key for column in shown]
    paper, source = paper_for(block)
    compared = next((row.key for row in block.rows if row.spec.name == "finetune"), "finetune")
    finetune = {seed: found.rows[compared].seconds for seed, found in founds.items() if compared in found.rows}

    def result(label: str, key: str, paper_row: str) -> RowResult:
        rows = {seed: found.rows[key] for seed, found in founds.items() if key in found.rows}
        made = RowResult(label, failed={s: f.failed[key] for s, f in founds.items() if key in f.failed})
        made.values = _values(rows, keys, finetune)
        if label == "Retrain":
            made.values = {k: v for k, v in made.values.items() if metric_of(k) != "feature_distance_2"}
        made.figures = {key: summarise(list(values.values())) for key, values in made.values.items()}
        made.paper = {k: v for k, v in (paper or {}).get(paper_row, {}).items() if k in keys}
        times = [row.seconds for row in rows.values()]
        made.seconds = math.fsum(times) / len(times) if times else None
        made.seed, made.latest = next(iter(rows.items()), (None, None))
        return made

    retrain, original = result("Retrain", "Retrain", "Retrain"), result("Original", "Original", "Original")
    rows = [result(row.spec.label, row.key, row.spec.paper) for row in block.rows]
    for row in (original, *rows):
        for key, values in row.values.items():
            of_retrain = retrain.values.get(key)
            if metric_of(key) in DISTANCES:
                of_retrain = dict.fromkeys(values, 0.0)
            if metric_of(key) not in NO_GAP and of_retrain and (apart := gaps(values, of_retrain)):
                row.gaps[key] = summarise(apart)
    baselines = [row for row in (original, retrain) if row.label in block.table.baselines and row.values]
    recipe, short = recipe_words(first.recipe, block.pair), recipe_kind(first.recipe, block.pair)
    return BlockResult(block, shown, baselines, rows, retrain, original, first.title, recipe, short, source, founds)


def paper_for(block: Block) -> tuple[Figures | None, str]:
    """The paper's figures for the pair, or for the first that it stands in for; and where they are from, in words.

    Example:
        >>> from rfa_fast.experiments.tables.plan import Choice, blocks_of
        >>> block = blocks_of(Choice(("table14",), ("fashion-mnist/resnet18",)))[0]
        >>> paper_for(block)[1]
        'Table XIV, cifar-10 and resnet18'
    """
    if not block.table.number:
        return None, ""
    for data, model in block.pair.stands_for:
        found = paper_figures(block.table.number, data, model, block.kind)
        if found is not None:
            return found, f"Table {block.table.number}, {data} and {model}"
    return None, ""


@dataclass(frozen=True)
class GapSummary:
    """Mean absolute gaps of one metric on one pair, over all columns of its scenarios.

    Attributes:
        pair, metric: which.
        gaps: label of a row -> gap; NaN where a figure is missing.
        ranks: label -> rank, 1 for the smallest.
        columns: how many columns the mean is over.
    """

    pair: str
    metric: str
    gaps: dict[str, float]
    ranks: dict[str, int]
    columns: int

    @property
    def percent(self) -> bool:
        """Whether the gap is a fraction that is shown in points."""
        return self.metric in ("accuracy", "token_accuracy", LASTING)


def gap_summaries(results: Sequence[BlockResult]) -> list[GapSummary]:
    """For every pair and metric: how far each method is from Retrain on the average of its columns, and its rank."""
    found: list[GapSummary] = []
    for pair in dict.fromkeys(result.block.pair.name for result in results):
        of_pair = [result for result in results if result.block.pair.name == pair]
        for metric in dict.fromkeys(name for result in of_pair for name in result.block.metrics):
            if metric in NO_GAP:
                continue
            apart, count = _apart(of_pair, metric)
            means = {label: mean_absolute_gap([[gap] for gap in values]) for label, values in apart.items()}
            if count:
                found.append(GapSummary(pair, metric, means, ranks(means), count))
    return found


def _apart(results: Iterable[BlockResult], metric: str) -> tuple[dict[str, list[float]], int]:
    """Label -> gaps of its columns (NaN where it has no figure), and how many columns there are."""
    apart: dict[str, list[float]] = {}
    labels = list(dict.fromkeys(row.label for result in results for row in result.rows))
    count = 0
    for result in results:
        rows = {row.label: row for row in result.rows}
        for column in result.columns:
            if metric_of(column.key) != metric or not any(column.key in row.gaps for row in result.rows):
                continue
            count += 1
            for label in labels:
                gap = rows[label].gaps.get(column.key) if label in rows else None
                apart.setdefault(label, []).append(math.nan if gap is None else gap.mean)
    return apart, count


def _values(rows: Mapping[int, Row], keys: Sequence[str], finetune: Mapping[int, float]) -> dict[str, dict[int, float]]:
    """Column -> seed -> figure; columns without any are left out."""
    found: dict[str, dict[int, float]] = {}
    for seed, row in rows.items():
        for key in keys:
            value = row.figures.get(key)
            if key == "seconds":
                value = row.seconds
            elif key == QUOTIENT:
                value = row.seconds / finetune[seed] if finetune.get(seed) else None
            if value is not None and not math.isnan(value):
                found.setdefault(key, {})[seed] = value
    return found
