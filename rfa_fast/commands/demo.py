"""`rfa-fast demo`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from rfa_fast.commands import options
from rfa_fast.commands.measure import REPORT_JSON, REPORT_PAGE
from rfa_fast.commands.shell import check_output, reported, results, say


def demo(
    context: typer.Context,
    forget_class: Annotated[str, typer.Option("--class", metavar="DIGIT", help="The digit to forget.")] = "3",
    samples: Annotated[int, typer.Option(metavar="N", help="Random samples to forget; 0 leaves this out.", min=0)] = 64,
    mode: Annotated[str, typer.Option(metavar="residual|teacher", help="Whose features are aligned.")] = "residual",
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="For report, page and table, which are replaced.", rich_help_panel=options.OUTPUT
        ),
    ] = Path("runs/demo"),
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.", rich_help_panel=options.OUTPUT)
    ] = False,
    progress: options.Progress = True,
    debug: options.Debug = False,
) -> None:
    """See it work: forget a digit, then 64 random samples, beside a retrained model.

    Trains a small residual network on the handwritten digits that scikit-learn
    ships, retrains it without what is to be forgotten (the gold standard),
    unlearns with RFA, and compares the three. A minute or two on two cores.

    [bold]Example[/bold]

    rfa-fast demo --class 7 --open
    """
    from rfa_fast.experiments.demo import run

    with reported(context, debug=debug):
        check_output(output)
        report = run(
            forget_class=forget_class, samples=samples, mode=mode,  # type: ignore[arg-type]  # checked there
            seed=seed, output=output, say=say, progress=progress,
        )  # fmt: skip
        report.print(results())
        page = output / REPORT_PAGE
        say(f"Report: {output / REPORT_JSON} and {page}")
        if open_page and not webbrowser.open(page.resolve().as_uri()):
            say(f"No browser could be started; open {page} by hand.")
