"""The command line that the experiments share: `python -m rfa_fast.experiments.fashion_mnist --help`.

Imported by an experiment only when it is started, so that importing the experiment does not bring in
typer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from rfa_fast.experiments.comparison import Request
from rfa_fast.report import RunReport

Run = Callable[[Request], RunReport]


def start(run: Run, name: str, scenarios: Sequence[str], about: str) -> None:
    """Read the command line, run the experiment, print its tables.

    Args:
        run: the experiment.
        name: of the folder below `runs/` that results go to.
        scenarios: what is run when none is named.
        about: the first lines of `--help`.
    """
    folder = Path("runs", name)

    def command(
        output: Annotated[Path, typer.Option(help="Folder for the report and the finished rows.")] = folder,
        scenario: Annotated[
            list[str] | None,
            typer.Option(help="class:NAME, sample:COUNT or keyword:WORD; repeatable. [default: those above]"),
        ] = None,
        mode: Annotated[
            list[str] | None,
            typer.Option(help="residual or teacher; repeatable. [default: both]"),
        ] = None,
        tried: Annotated[
            list[str] | None,
            typer.Option("--try", help="Settings to compare, such as lr=5e-5,5e-4; repeatable."),
        ] = None,
        validation: Annotated[
            bool, typer.Option("--validation", help="Measure on a tenth of the training data, held out.")
        ] = False,
        seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
        epochs: Annotated[
            int | None,
            typer.Option(help="Epochs of Original and Retrain. [default: the experiment's]"),
        ] = None,
        limit: Annotated[
            int | None,
            typer.Option(help="Use the first so many samples only, for a quick try."),
        ] = None,
        data: Annotated[
            Path | None,
            typer.Option(help="Folder of the data. [default: $RFA_FAST_DATA or where it is installed]"),
        ] = None,
        cache: Annotated[
            Path | None,
            typer.Option(help="Folder of trained models. [default: $RFA_FAST_CACHE or ~/.cache/rfa-fast]"),
        ] = None,
        progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    ) -> None:
        request = Request(
            scenarios=scenario or None,
            modes=tuple(mode) if mode else Request.modes,
            tried=tuple(tried or ()),
            validation=validation,
            seed=seed,
            epochs=epochs,
            limit=limit,
            data=data,
            output=output,
            cache=cache,
            progress=progress,
        )
        try:
            report = run(request)
        except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            typer.echo(f"{error or 'interrupted'}. The same command goes on with what is finished.", err=True)
            raise typer.Exit(130) from None
        report.print()

    command.__doc__ = f"{about}\n\nScenarios: {' '.join(scenarios)}."
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    app()
