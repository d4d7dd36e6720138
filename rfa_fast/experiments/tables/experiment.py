"""From a request to tables on disk: forecast, compute, average, write.

The forecast comes first and is always printed, because a table can take from a minute to a day. What a budget
chose is kept beside the results: a run that goes on after an interruption must not choose otherwise only
because part of it is finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rfa_fast.experiments.cache import Say
from rfa_fast.experiments.cells import slug
from rfa_fast.experiments.comparison import command_line, deliver, machine
from rfa_fast.experiments.tables.budget import fit
from rfa_fast.experiments.tables.catalogue import TABLES, TableSpec
from rfa_fast.experiments.tables.forecast import Forecaster, words
from rfa_fast.experiments.tables.outputs import write_files
from rfa_fast.experiments.tables.pairs import PAIRS, Pair, find_pairs
from rfa_fast.experiments.tables.plan import Block, Choice, Sizes, Unit, blocks_of, idle_settings, left_out, units_of
from rfa_fast.experiments.tables.presence import all_missing
from rfa_fast.experiments.tables.processes import compute
from rfa_fast.experiments.tables.results import BlockResult, block_result, gap_summaries
from rfa_fast.experiments.tables.runner import Found, Place, Workshop
from rfa_fast.experiments.tables.scenarios import block_scenario, summary_scenario
from rfa_fast.methods import method_settings
from rfa_fast.report import RunReport, write_atomically

PLAN_FILE, SPLITS = "plan.json", "splits"


def choose_pairs(
    tables: Sequence[TableSpec], data: str | None, model: str | None, *, quick: bool, folder: Path | None = None
) -> list[Pair]:
    """The pairs to run: those named, else those of the tables that are on this machine.

    With `quick` and nothing named, the first of each kind, digits for images. `folder` is that of the data, in place
    of where they are looked for.

    Raises:
        ValueError: unknown data or model; a folder for data that take none, or for several.
        FileNotFoundError: none of them is here; the message holds the commands that bring them. No such folder.

    Example:
        >>> [pair.name for pair in choose_pairs([TABLES["table1"]], None, None, quick=True)]
        ['digits/digits-net']
    """
    if data is not None or model is not None:
        wanted = find_pairs(data, model)
    else:
        wanted = [PAIRS[name] for name in dict.fromkeys(name for table in tables for name in table.pairs)]
    if folder is not None:
        _check_folder(folder, wanted)
    absent = {pair.name: all_missing(pair, folder) for pair in wanted}
    found = [pair for pair in wanted if not absent[pair.name]]
    if not found:
        lines = [f"{name} needs {need}: {command}" for name, needs in absent.items() for need, command in needs.items()]
        raise FileNotFoundError("none of the data and models is on this machine:\n  " + "\n  ".join(lines))
    if quick and data is None and model is None:
        order = list(PAIRS)
        found.sort(key=lambda pair: order.index(pair.name))
        found = list({pair.kind: pair for pair in reversed(found)}.values())[::-1]
    return found


def _check_folder(folder: Path, pairs: Sequence[Pair]) -> None:
    """A folder holds one data set, so it is for data that are read from one, and for one of them."""
    named = list(dict.fromkeys(pair.data for pair in pairs))
    read = list(dict.fromkeys(pair.data for pair in pairs if any(need.startswith("data:") for need in pair.needs)))
    if named != read and len(named) == 1:
        raise ValueError(
            f"data_folder: got {str(folder)!r} for {named[0]}, expected none: they are read from no folder"
        )
    if len(named) > 1:
        raise ValueError(
            f"data_folder: got {str(folder)!r} for {', '.join(named)}, expected one data set: choose it with --data, "
            f"one of {', '.join(read)}"
        )
    if not folder.exists():
        raise FileNotFoundError(f"data_folder: {folder} does not exist, expected the folder of {named[0]}")


def quick_sizes(pairs: Sequence[Pair]) -> dict[str, Sizes]:
    """The sizes of `--quick`: minutes for all methods of a table.

    Example:
        >>> quick_sizes([PAIRS["fashion-mnist/resnet18"]])["fashion-mnist/resnet18"]
        Sizes(limit=3000, epochs=2, samples=300, unlearning=None, seeds=None)
    """
    return {pair.name: Sizes(*pair.quick) for pair in pairs}


def run(
    choice: Choice,
    output: Path,
    *,
    budget: float | None = None,
    jobs: int = 1,
    threads: int | None = None,
    forecast_only: bool = False,
    say: Say = print,
    progress: bool = True,
) -> list[RunReport]:
    """Forecast, compute what is not finished, and write the tables.

    Args:
        choice: what was asked for.
        output: folder for `table.csv`, `table.md`, `table.tex`, `report.html`, `report.json`, `table.txt` and the
            splits; with several tables, a folder of each in it. Earlier files are replaced.
        budget: seconds that the plan may take; sizes are chosen for it.
        jobs: seeds computed at a time, each in a process.
        threads: of torch in each process; `None`: this process's, divided among the jobs. Figures are the same
            whatever `jobs` is as long as `threads` is: sums are taken in another order by another number.
        forecast_only: stop after the forecast.
        say: is told what happens, a sentence each.
        progress: show bars on standard error.

    Returns:
        A report for each table; none after a forecast alone.

    Raises:
        ValueError: something asked for is not there, or a budget too small; nothing has been trained then.
        FileNotFoundError: data or a model is not there.
        OSError: output or cache cannot be written.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
    blocks = blocks_of(choice)
    units = units_of(blocks, choice)
    before, jobs = torch.get_num_threads(), min(jobs, len(units))
    torch.set_num_threads(threads if threads is not None else max(1, before // jobs))
    try:
        return _run(
            choice, blocks, units, output, budget=budget, jobs=jobs, forecast_only=forecast_only, say=say,
            progress=progress,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def _run(
    choice: Choice,
    blocks: Sequence[Block],
    units: Sequence[Unit],
    output: Path,
    *,
    budget: float | None,
    jobs: int,
    forecast_only: bool,
    say: Say,
    progress: bool,
) -> list[RunReport]:
    shop = Workshop(choice, say=_unsaid, progress=progress)
    _check(units, shop)
    forecaster = Forecaster(units, choice, shop)
    if budget is not None:
        choice = replace(choice, sizes=_within_budget(forecaster, choice, budget, _abreast(jobs), output, say))
        blocks = blocks_of(choice)
        units = units_of(blocks, choice)
        shop = Workshop(choice, say=_unsaid, progress=progress)
        _check(units, shop)
        forecaster.choice, forecaster.units, forecaster.shop = choice, units, shop
    if without := left_out(blocks, choice):
        say(f"Left out, as they are for none of the methods chosen: {', '.join(without)}.")
    if idle := idle_settings(blocks, choice.overrides):
        say(f"Set, but no row here is of it: {', '.join(idle)}.")
    for line in size_lines(choice, forecaster):
        say(line)
    estimate = forecaster.estimate()
    several = f", {jobs} seeds at a time," if jobs > 1 else ""
    finished = f"; {estimate.finished} rows are finished" if estimate.finished else ""
    time = words(estimate.seconds / _abreast(jobs))
    say(
        f"Forecast: {time}{several} for {estimate.rows} rows and {estimate.models} trained models, {estimate.source}"
        f"{finished}."
    )
    if forecast_only:
        return []
    shop.say = shop.models.say = say
    ordered = forecaster.longest_first() if jobs > 1 else units
    computed = compute(ordered, choice, jobs=jobs, say=say, progress=progress, workshop=shop)
    _save_splits(computed, output)
    reports = []
    for name in choice.tables:
        of_table = [block for block in blocks if block.table.name == name]
        if of_table:
            folder = output if len(choice.tables) == 1 else output / name
            reports.append(_deliver(TABLES[name], of_table, computed, choice, folder, say))
    return reports


def size_lines(choice: Choice, forecaster: Forecaster) -> list[str]:
    """What is left out of each pair, a sentence each."""
    lines = []
    for (pair, _), extent in forecaster.extents.items():
        sizes = choice.sizes_of(pair)
        parts = []
        if sizes.limit is not None:
            parts.append(f"at most {sizes.limit:,} training samples")
        if sizes.epochs is not None:
            parts.append(f"{sizes.epochs} epoch{'' if sizes.epochs == 1 else 's'} of Original and Retrain")
        if sizes.samples is not None:
            parts.append(f"at most {sizes.samples:,} samples measured per subset")
        if sizes.unlearning is not None:
            unset = " where no number is set" if any("epochs" in of for of in choice.overrides.values()) else ""
            count = f"{sizes.unlearning} epoch{'' if sizes.unlearning == 1 else 's'}"
            parts.append(f"at most {count} of unlearning{unset}")
        if sizes.seeds is not None and sizes.seeds < choice.seeds:
            parts.append(f"{sizes.seeds} seed{'' if sizes.seeds == 1 else 's'} of {choice.seeds}")
        if parts:
            lines.append(f"{pair}: {', '.join(parts)}.")
        elif extent.train:
            lines.append(f"{pair}: all {extent.train:,} training samples, {extent.epochs} epochs.")
    return list(dict.fromkeys(lines))


def _check(units: Sequence[Unit], shop: Workshop) -> None:
    """Every split can be made and every method takes its options, before anything is trained.

    Raises:
        ValueError, TypeError: a class or keyword that is not there, an empty subset, a wrong option.
    """
    for unit in units:
        for scenario in unit.scenarios:
            run = shop.scenario(unit, scenario)
            for method in shop.methods(unit, scenario, run).values():
                method_settings(method.options)


def _abreast(jobs: int) -> int:
    """How many of the jobs the cores can serve at once; the others only wait beside them."""
    return max(1, min(jobs, (os.cpu_count() or 1) // torch.get_num_threads()))


def _within_budget(
    forecaster: Forecaster, choice: Choice, budget: float, abreast: int, output: Path, say: Say
) -> Mapping[str, Sizes]:
    """The sizes chosen for this request earlier, else those that fit now, which are kept."""
    path = output / PLAN_FILE
    request = json.loads(json.dumps({**asdict(choice), "budget": budget, "abreast": abreast}, default=str))
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["request"] == request:
            say(f"Sizes as chosen earlier for this budget, from {path}.")
            return {pair: Sizes(**sizes) for pair, sizes in kept["sizes"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or one that cannot be read: it is chosen anew
    sizes = fit(forecaster, budget, abreast)
    content = {"request": request, "sizes": {pair: asdict(size) for pair, size in sizes.items()}}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    say(f"For {words(budget)}:")
    return sizes


def _save_splits(computed: Mapping[Place, Found], output: Path) -> None:
    for at, found in computed.items():
        name = slug(f"{at.pair} {at.scenario} seed {at.seed}")
        found.split.save(output / SPLITS / f"{name}.json", overwrite=True)


def _deliver(
    table: TableSpec,
    blocks: Sequence[Block],
    computed: Mapping[Place, Found],
    choice: Choice,
    folder: Path,
    say: Say,
) -> RunReport:
    results = [block_result(block, computed) for block in blocks]
    summaries = gap_summaries(results)
    number = f"Table {table.number}: " if table.number else ""
    title = f"{number}{table.title}"
    sections = [block_scenario(result) for result in results]
    if (summary := summary_scenario(summaries)) is not None:
        sections.append(summary)
    report = RunReport(
        title, sections, command=command_line(), machine=machine(), summary=_summary(results, choice),
        notes=["Measured on held-out training samples, not on the test set."] if choice.validation else [],
    )  # fmt: skip
    deliver(report, folder, say)
    for path in write_files(folder, title, results, summaries):
        say(f"written: {path}")
    return report


def _summary(results: Sequence[BlockResult], choice: Choice) -> str:
    recipes = dict.fromkeys(f"{result.block.pair.name}: {result.recipe}" for result in results)
    counts = {result.block.pair.name: choice.seeds_of(result.block.pair.name) for result in results}
    most = max(counts.values())
    fewer = ", ".join(f"{name} {count}" for name, count in counts.items() if count < most)
    seeds = f"{most} seed{'' if most == 1 else 's'}" + (f" ({fewer})" if fewer else "")
    more = f", Retrain {choice.retrain_seeds}" if choice.retrain_seeds > choice.seeds else ""
    return f"{seeds}{more}. {'. '.join(recipes)}."


def _unsaid(text: str) -> Any:
    """What is read for a forecast is said when it is computed."""
