"""`rfa-fast experiment`: the paper's tables and figures, computed here and set beside the paper's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rfa_fast.commands import options
from rfa_fast.commands.shell import INTERRUPTED, check_output, reported, results, say

if TYPE_CHECKING:
    from rfa_fast.experiments.tables.plan import Sizes

_FOLDER = "the experiment's own; its folders are --cache and --output, and the same command resumes"
_CALLED = "a callable, which cannot be typed"
_OURS = {
    "method": "chosen by --methods", "seed": "chosen by --seeds", "progress": "chosen by --no-progress",
    "output_dir": _FOLDER, "resume": _FOLDER, "save": _FOLDER,
    "evaluate": _CALLED, "until": _CALLED, "callbacks": _CALLED, "collate_fn": _CALLED,
}  # fmt: skip
"""Keywords of `unlearn` that no setting may give, and why."""

_WHAT, _SIZE, _RUN = "What to compare", "How much", "Running"


def experiment(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A table or figure, see --list; all runs every one.", show_default=False)
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the names, what they need, and what is here.")] = False,
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="Data to run it on.", rich_help_panel=_WHAT,
                                 show_default="the table's that are here")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model to run it on.", rich_help_panel=_WHAT,
                                 show_default="the table's that are here")
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:TARGET", help="class:NAME, sample:COUNT or keyword:WORD. Repeatable.",
                     rich_help_panel=_WHAT, show_default="the data's"),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Rows, see --list.", rich_help_panel=_WHAT,
                                 show_default="the table's")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="A,B", help="Columns, see --list; nothing else is measured then.",
                                 rich_help_panel=_WHAT, show_default="the table's")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KEY=VALUE", help="An option of a method in place of ours, such as "
                     "scrub.lr=1e-4. Repeatable.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    repeat_forget: Annotated[
        int, typer.Option(metavar="N", help="How often each sample to forget comes; section V-B2 of the paper has 5.",
                          min=1, rich_help_panel=_WHAT)
    ] = 1,
    validation: Annotated[
        bool, typer.Option("--validation", help="Measure on a tenth of the training data, held out: for choosing "
                           "settings.", rich_help_panel=_WHAT)
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Seeds, from 0.", min=1, rich_help_panel=_SIZE,
                                 show_default="3, with --quick 1")
    ] = None,
    retrain_seeds: Annotated[
        int, typer.Option(metavar="N", help="Seeds of Retrain, where it is to have more.", min=0, rich_help_panel=_SIZE)
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A very small run that ends within minutes; of all tables, each on one "
                            "pair of data and model.", rich_help_panel=_SIZE)
    ] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Choose sizes so that it takes at most this: 3h, 90min.",
                                 rich_help_panel=_SIZE, show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Use so many training samples.", min=2, rich_help_panel=_SIZE,
                                 show_default="all")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Epochs of Original and Retrain.", min=1, rich_help_panel=_SIZE,
                                 show_default="the recipe's")
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Measure at most N samples of each subset.", min=1,
                                 rich_help_panel=_SIZE, show_default="all")
    ] = None,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Seeds computed at a time, each in a process.", min=1, rich_help_panel=_RUN)
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads of each process. Figures are bit-equal for equal numbers.",
                                 min=1, rich_help_panel=_RUN, show_default="cores / jobs")
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(metavar="bfloat16", help="Train and unlearn in this where torch.autocast does; "
                                 "measure in the model's own.", rich_help_panel=_RUN, show_default=False)
    ] = None,
    forecast_only: Annotated[
        bool, typer.Option("--forecast-only", help="Print the forecast and leave.", rich_help_panel=_RUN)
    ] = False,
    data_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the data, of one --data.", rich_help_panel=_RUN,
                                  show_default="$RFA_FAST_DATA or where it is installed")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of trained models and finished rows, for all tables.",
                                  rich_help_panel=_RUN, show_default="$RFA_FAST_CACHE or ~/.cache/rfa-fast")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For the tables, the page and the splits, which are replaced.",
                                  rich_help_panel=options.OUTPUT, show_default="runs/NAME")
    ] = None,
    progress: options.Progress = True,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Run a table or figure of the paper and set our figures beside the paper's.

    Prints a forecast first. Trains Original and Retrain for each seed, runs
    every method on the same split, and writes mean and 95 % interval over the
    seeds, the gap to Retrain and the paper's figure as CSV, Markdown, LaTeX and
    a page. Trained models and finished rows are kept: the same command goes on
    where it was interrupted, and another table uses what this one computed.

    [bold]Examples[/bold]

    rfa-fast experiment --list

    rfa-fast experiment table1 --quick

    rfa-fast experiment table1 --data fashion-mnist --model resnet18

    rfa-fast experiment table1 --data fashion-mnist --model resnet18 \\
        --scenario class:Shirt --methods scrub,rfa --retrain-seeds 5

    rfa-fast experiment all --budget 3h --output runs/all
    """
    with reported(context, debug=debug):
        if list_all:
            from rfa_fast.commands.experiment_list import print_list

            print_list(results())
            return
        if name is None:
            raise ValueError("got no NAME, expected a table or figure, or --list to see them")
        from rfa_fast.experiments.cache import cache_folder
        from rfa_fast.experiments.tables.budget import read_budget
        from rfa_fast.experiments.tables.catalogue import find_tables
        from rfa_fast.experiments.tables.experiment import choose_pairs, quick_sizes, run
        from rfa_fast.experiments.tables.plan import Choice, Sizes
        from rfa_fast.methods.checks import autocast_dtype

        for variable, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
            os.environ.setdefault(variable, value)  # a report and a bar for every model that is opened are too many
        autocast_dtype(autocast)
        tables = find_tables(name)
        seconds = None if budget is None else read_budget(budget)
        pairs = choose_pairs(tables, data, model, quick=quick, folder=data_folder)
        sizes = {pair.name: Sizes() for pair in pairs}
        if quick:
            sizes = quick_sizes(pairs)
        given = Sizes(limit, epochs, eval_samples)
        choice = Choice(
            tables=tuple(table.name for table in tables),
            pairs=tuple(pair.name for pair in pairs),
            scenarios=tuple(scenario or ()),
            methods=_names("--methods", methods),
            metrics=_names("--metrics", metrics),
            seeds=seeds if seeds is not None else 1 if quick else 3,
            retrain_seeds=retrain_seeds,
            sizes={pair: _merged(size, given) for pair, size in sizes.items()},
            repeat=repeat_forget,
            quick=quick,
            overrides=read_settings(setting or []),
            validation=validation,
            autocast=autocast,
            data=data_folder,
            cache=cache_folder(cache),
        )
        folder = Path("runs", name) if output is None else output
        check_output(folder)
        check_output(choice.cache, "--cache")
        try:
            reports = run(
                choice, folder, budget=seconds, jobs=jobs, threads=threads, forecast_only=forecast_only, say=say,
                progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            say("Interrupted. Finished rows and trained models are kept; the same command goes on.")
            raise typer.Exit(INTERRUPTED) from error
        for report in reports:
            report.print(results())


def read_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method or row -> options, from `METHOD.KEY=VALUE`; the value is JSON or a text.

    Raises:
        ValueError: not of that form, a method that no row has, an option given twice, or one that the experiment
            gives itself.

    Example:
        >>> read_settings(["scrub.lr=1e-4", "rfa.targets=deep"])
        {'scrub': {'lr': 0.0001}, 'rfa': {'targets': 'deep'}}
    """
    from rfa_fast.experiments.comparison import json_or_text
    from rfa_fast.experiments.tables.rows import ROWS

    known = list(dict.fromkeys([*(row.method for row in ROWS.values()), *ROWS]))
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        place, equals, value = word.partition("=")
        method, dot, key = place.partition(".")
        if not equals or not dot or not key.isidentifier():
            raise ValueError(f"--set: got {word!r}, expected METHOD.KEY=VALUE such as scrub.lr=1e-4")
        if method not in known:
            raise ValueError(f"--set: got method {method!r}, expected one of {', '.join(known)}")
        if key in _OURS:
            raise ValueError(f"--set: got {place}, expected an option of the method: {key} is {_OURS[key]}")
        if key in found.get(method, {}):
            raise ValueError(f"--set: got {place} twice, expected it once")
        found.setdefault(method, {})[key] = json_or_text(value)
    return found


def _names(flag: str, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ValueError(f"{flag}: got {text!r}, expected names with commas between them")
    return names


def _merged(own: Sizes, given: Sizes) -> Sizes:
    """What was typed, and of the rest what there was."""
    from dataclasses import replace

    typed = {name: value for name, value in vars(given).items() if value is not None}
    return replace(own, **typed)
