"""From what was asked for to blocks, what a reader sees together, and units, what is computed together.

A block is one table on one pair and one scenario. A unit is one pair and one seed with every scenario and row
that any block needs of them: its two kinds of trained models are shared by all its rows, so it is the piece
that a process works on alone. Everything that can be wrong in a request is found here, before anything is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rfa_fast.experiments.tables.catalogue import TABLES, TableSpec
from rfa_fast.experiments.tables.columns import LASTING, check_columns, measured_metrics
from rfa_fast.experiments.tables.pairs import PAIRS, Pair
from rfa_fast.experiments.tables.rows import RowSpec, find_rows


@dataclass(frozen=True)
class Sizes:
    """How much of a pair is used; `None` keeps all of it.

    Attributes:
        limit: training samples (and at most as many of the test set), evenly spaced.
        epochs: of Original and Retrain.
        samples: measured per subset.
        unlearning: epochs of unlearning, at most.
        seeds: at most.
    """

    limit: int | None = None
    epochs: int | None = None
    samples: int | None = None
    unlearning: int | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Choice:
    """What was asked for.

    Attributes:
        tables: names of tables.
        pairs: names of pairs.
        scenarios: `class:NAME`, `sample:COUNT` or `keyword:WORD`; empty: each pair's own.
        methods: names of rows; `None`: each table's own.
        metrics: names of metrics, the only ones that are measured then; `None`: each table's own.
        seeds: how many, from 0.
        retrain_seeds: how many Retrain has, if more.
        sizes: pair -> how much of it is used.
        repeat: how often each sample of D_f comes, for rows that do not say.
        quick: one scenario of each kind, and of several tables each on one pair.
        overrides: method or row -> options of :func:`rfa_fast.unlearn` in place of the pair's.
        validation: measure on a tenth of the training data, held out.
        autocast: `"bfloat16"`: training and unlearning compute in it where autocast does; measuring never.
        data: folder of the data; `None`: where it is found.
        cache: folder of trained models and finished rows.
    """

    tables: tuple[str, ...]
    pairs: tuple[str, ...]
    scenarios: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    seeds: int = 3
    retrain_seeds: int = 0
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    repeat: int = 1
    quick: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    validation: bool = False
    autocast: str | None = None
    data: Path | None = None
    cache: Path = Path()

    @property
    def numerics(self) -> dict[str, Any]:
        """What :func:`rfa_fast.methods.train` and :func:`rfa_fast.unlearn` are both told."""
        return {} if self.autocast is None else {"autocast": self.autocast}

    def sizes_of(self, pair: str) -> Sizes:
        """How much of a pair is used."""
        return self.sizes.get(pair, Sizes())

    def seeds_of(self, pair: str) -> int:
        """How many seeds a pair has."""
        return self.seeds_at(self.sizes_of(pair))

    def seeds_at(self, sizes: Sizes) -> int:
        """How many a pair of these sizes would have."""
        return self.seeds if sizes.seeds is None else min(self.seeds, sizes.seeds)

    def planned(self, row: RowSpec, epochs: int = 1) -> PlannedRow:
        """The row with what the user set for it, by its method's name and by its own."""
        name = row.base or row.name
        of_row = {} if name == row.method else self.overrides.get(name, {})
        return PlannedRow(row, epochs, self.overrides.get(row.method, {}), of_row)


@dataclass(frozen=True)
class PlannedRow:
    """A row as it is computed.

    Attributes:
        spec: what it is.
        epochs: times the usual ones.
        of_method, of_row: what the user set for its method, and for itself.
    """

    spec: RowSpec
    epochs: int = 1
    of_method: Mapping[str, Any] = field(default_factory=dict)
    of_row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for rows that are one run."""
        return self._named(self.of_method, self.of_row)

    @property
    def name(self) -> str:
        """The key as it were if the user had set nothing: what its finished figures are kept under."""
        return self._named({}, {})

    def _named(self, of_method: Mapping[str, Any], of_row: Mapping[str, Any]) -> str:
        return self.spec.identity(of_method, of_row) + (f" epochs*{self.epochs}" if self.epochs != 1 else "")

    def options(
        self, pair: Pair, kind: str, forgotten: int, seed: int, *, most_epochs: int | None = None
    ) -> dict[str, Any]:
        """The keyword arguments of :func:`rfa_fast.unlearn`; see :meth:`RowSpec.keywords`.

        Args:
            forgotten: samples in D_f, each once.
            most_epochs: of unlearning, unless the user set how many.
        """
        chosen = {**self.of_method, **self.of_row}
        most_epochs = None if "epochs" in chosen else most_epochs
        forgotten *= self.spec.repeat
        return self.spec.keywords(pair, kind, forgotten, seed, self.epochs, chosen, most_epochs=most_epochs)


@dataclass(frozen=True)
class Block:
    """One table on one pair and one scenario."""

    table: TableSpec
    pair: Pair
    scenario: str
    rows: tuple[PlannedRow, ...]
    metrics: tuple[str, ...]

    @property
    def lasting(self) -> bool:
        """Whether it shows how the forgetting lasts, which costs every row another epoch and more."""
        return LASTING in self.metrics

    @property
    def kind(self) -> str:
        """Of the scenario: `"class"`, `"sample"` or `"keyword"`."""
        return self.scenario.partition(":")[0]


@dataclass(frozen=True)
class Unit:
    """One pair, one seed: scenario -> rows; no rows where Retrain alone is wanted.

    Attributes:
        pair: its name.
        seed: of everything drawn.
        scenarios: scenario -> key -> row.
        metrics: what is measured of each row.
        retrain_only: neither Original nor methods.
        lasting: whether D_f is measured again after rounding and training.
    """

    pair: str
    seed: int
    scenarios: Mapping[str, Mapping[str, PlannedRow]]
    metrics: tuple[str, ...]
    retrain_only: bool = False
    lasting: bool = False

    @property
    def baselines(self) -> tuple[str, ...]:
        """The trained models that it measures."""
        return ("Retrain",) if self.retrain_only else ("Original", "Retrain")


def blocks_of(choice: Choice) -> list[Block]:
    """The blocks of all tables, in the order shown.

    Raises:
        ValueError: an unknown method or metric, one that a pair's kind does not have, a scenario of no known
            form, a setting of the user's that a row does not leave open, two rows of one label, or nothing left to
            show.

    Example:
        >>> blocks = blocks_of(Choice(("table1",), ("digits/digits-net",)))
        >>> [block.scenario for block in blocks], len(blocks[0].rows)
        (['sample:64', 'class:3'], 7)
    """
    if not choice.pairs:
        raise ValueError("pairs: got none, expected at least one pair of data and model")
    for scenario in choice.scenarios:
        kind, _, target = scenario.partition(":")
        if kind not in ("class", "sample", "keyword") or not target:
            raise ValueError(f"scenario: got {scenario!r}, expected class:NAME, sample:COUNT or keyword:WORD")
    chosen = None if choice.methods is None else tuple(find_rows(choice.methods))
    found: list[Block] = []
    shown: set[str] = set()
    _check_here(chosen)
    for table in (TABLES[name] for name in choice.tables):
        for pair in _pairs_of(table, choice):
            mine = chosen
            if chosen is not None and len(choice.tables) > 1:
                mine = tuple(row for row in chosen if pair.kind in row.kinds and table.takes(row))
                if not mine:
                    continue
            metrics = _metrics(table, pair, choice)
            specs = table.row_specs(pair, mine)
            rows = tuple(choice.planned(row, table.epochs) for row in _repeated(specs, choice))
            _check_labels(table, rows)
            scenarios = dict.fromkeys(choice.scenarios or _own(table, pair, choice))
            found += [Block(table, pair, text, rows, metrics) for text in scenarios]
            shown |= {row.base or row.name for row in specs if scenarios}
    if left := [row.name for row in chosen or () if row.name not in shown]:
        raise ValueError(
            f"methods: got {', '.join(left)} for {', '.join(choice.pairs)}, expected rows for such data; --list has "
            "them all"
        )
    if not found:
        raise ValueError(
            f"tables: {', '.join(choice.tables)} has no scenario for {', '.join(choice.pairs)}, expected other data or "
            "--scenario"
        )
    _check_overrides(found, choice.overrides)
    return found


def left_out(blocks: Sequence[Block], choice: Choice) -> list[str]:
    """The tables meant for the pairs chosen that none of the methods chosen is for.

    Of several tables each takes the rows it can; one by itself says what it expects.

    Example:
        >>> choice = Choice(("table14", "fig6"), ("digits/digits-net",), methods=("finetune",))
        >>> left_out(blocks_of(choice), choice)
        ['fig6']
    """
    if choice.methods is None:
        return []
    shown = {block.table.name for block in blocks}
    return [name for name in choice.tables if name not in shown and _pairs_of(TABLES[name], choice)]


def units_of(blocks: Sequence[Block], choice: Choice) -> list[Unit]:
    """What has to be computed for the blocks, each run once however many of them show it.

    Example:
        >>> choice = Choice(("table1",), ("digits/digits-net",), seeds=1, retrain_seeds=2)
        >>> [(unit.seed, unit.retrain_only) for unit in units_of(blocks_of(choice), choice)]
        [(0, False), (1, True)]
    """
    scenarios: dict[tuple[str, bool], dict[str, dict[str, PlannedRow]]] = {}
    wanted: dict[str, list[str]] = {}
    for block in blocks:
        rows = scenarios.setdefault((block.pair.name, block.lasting), {}).setdefault(block.scenario, {})
        for row in block.rows:
            rows.setdefault(row.key, row)
        wanted.setdefault(block.pair.name, []).extend(block.metrics)
    units: list[Unit] = []
    for (name, lasting), rows_of in scenarios.items():
        metrics = measured_metrics(PAIRS[name].kind, wanted[name], only=choice.metrics is not None)
        units += [Unit(name, seed, rows_of, metrics, lasting=lasting) for seed in range(choice.seeds_of(name))]
        alone = tuple(m for m in metrics if not m.startswith(("feature_", "activation_", "zrf")))
        nothing: dict[str, dict[str, PlannedRow]] = {scenario: {} for scenario in rows_of}
        extra = range(choice.seeds_of(name), choice.retrain_seeds)
        units += [Unit(name, seed, nothing, alone, retrain_only=True, lasting=lasting) for seed in extra]
    return units


def _pairs_of(table: TableSpec, choice: Choice) -> list[Pair]:
    """Of the pairs chosen, those for a table.

    A table asked for by itself takes them all; of several each takes those it is meant for, with `quick` the first.
    """
    if len(choice.tables) == 1:
        return [PAIRS[name] for name in choice.pairs]
    meant = [PAIRS[name] for name in choice.pairs if name in table.pairs]
    return meant[:1] if choice.quick else meant


def _own(table: TableSpec, pair: Pair, choice: Choice) -> list[str]:
    """The pair's scenarios of the table's kinds; of few samples no more than a quarter are forgotten."""
    texts: list[str] = []
    for kind in table.kinds:
        of_kind = pair.scenarios.get(kind, ())
        texts += of_kind[:1] if choice.quick else of_kind
    limit = choice.sizes_of(pair.name).limit
    if limit is None:
        return texts
    counts = [(kind, target) for kind, _, target in (text.partition(":") for text in texts)]
    return [f"{kind}:{counted(int(target), limit)}" if kind == "sample" else f"{kind}:{target}"
            for kind, target in counts]  # fmt: skip


def counted(asked: int, limit: int) -> int:
    """How many samples are forgotten of `limit`: those asked for, but no more than a quarter.

    Example:
        >>> counted(128, 4000), counted(128, 200)
        (128, 50)
    """
    return min(asked, max(1, limit // 4))


def _check_here(chosen: tuple[RowSpec, ...] | None) -> None:
    from rfa_fast.methods import METHODS

    for row in chosen or ():
        if row.method not in METHODS:
            raise ValueError(
                f"methods: got {row.name!r}, whose method {row.method!r} is not among {', '.join(METHODS)}"
            )


def _check_labels(table: TableSpec, rows: Sequence[PlannedRow]) -> None:
    """A report tells its rows apart by their labels."""
    labels = [*table.baselines, *(row.spec.label for row in rows)]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise ValueError(
            f"methods: got {twice[0]!r} more than once for {table.name}, expected rows of different labels"
        )


def _check_overrides(blocks: Sequence[Block], overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """What the user set is what the rows that it is for run with.

    A sweep goes over its values whatever was set, which then holds for the other rows.

    Raises:
        ValueError: a row that fixes the option itself, or no row but those that vary it.
    """
    for place, key, value in ((place, key, value) for place, of in overrides.items() for key, value in of.items()):
        got = f"set: got {place}.{key} = {value!r}"
        meant = [(block, row.spec) for block in blocks for row in block.rows
                 if place in (row.spec.method, row.spec.base or row.spec.name)]  # fmt: skip
        for block, row in meant:
            if (fixed := row.fixed(block.pair).get(key)) is not None:
                name = row.base or row.name
                raise ValueError(
                    f"{got}, expected another option for {name}: that row fixes {key} to {fixed}; choose other rows "
                    "(--methods) or set it for one of the others alone"
                )
        if meant and all(key in row.varied for _, row in meant):
            tables = ", ".join(dict.fromkeys(block.table.name for block, _ in meant))
            values = ", ".join(dict.fromkeys(repr(row.options[key]) for _, row in meant))
            raise ValueError(f"{got}, expected another option: {tables} varies {key} itself ({values})")


def idle_settings(blocks: Sequence[Block], overrides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the user set for methods and rows that the plan does not have, `"scrub.lr"`.

    Example:
        >>> choice = Choice(("table14",), ("digits/digits-net",), overrides={"scrub": {"lr": 1e-4}})
        >>> idle_settings(blocks_of(choice), choice.overrides)
        ['scrub.lr']
    """
    here = {name for block in blocks for row in block.rows
            for name in (row.spec.method, row.spec.base or row.spec.name)}  # fmt: skip
    return [f"{place}.{key}" for place, of in overrides.items() if place not in here for key in of]


def _metrics(table: TableSpec, pair: Pair, choice: Choice) -> tuple[str, ...]:
    if choice.metrics is not None:
        return tuple(check_columns(choice.metrics, kind=pair.kind))
    return tuple(check_columns(table.metrics, kind=pair.kind))


def _repeated(rows: Sequence[RowSpec], choice: Choice) -> list[RowSpec]:
    """The rows with D_f as often as asked for; one that thereby becomes a row that is there already is left out."""
    if choice.repeat == 1:
        return list(rows)
    there = {row.identity() for row in rows if row.repeat != 1}
    found = []
    for row in rows:
        if row.repeat != 1:
            found.append(row)
            continue
        more = replace(row, label=f"{row.label}, D_f × {choice.repeat}", repeat=choice.repeat)
        if more.identity() not in there:
            found.append(more)
    return found
