"""The console script `rfa-fast`: unlearning for those who have a trained model and no training loop.

    rfa-fast demo                 see it work, on data that is already here
    rfa-fast unlearn MODEL …      forget, keep the rest, leave a record
    rfa-fast evaluate MODEL …     the table for models that exist
    rfa-fast experiment NAME      the paper's tables, computed here beside the paper's figures
    rfa-fast bench MODEL …        what a step takes and needs
    rfa-fast info [MODEL]         what this machine has; what would be adapted

What a command needs beyond torch is imported when it runs: the help must not wait for it. Results go
to standard output, everything said on the way to standard error.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from rfa_fast import __version__
from rfa_fast.commands.bench import bench
from rfa_fast.commands.demo import demo
from rfa_fast.commands.evaluate import evaluate
from rfa_fast.commands.experiment import experiment
from rfa_fast.commands.info import info
from rfa_fast.commands.shell import Program
from rfa_fast.commands.unlearn import unlearn

app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="rfa-fast COMMAND --help shows the options and examples of a command.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rfa-fast {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Make a trained model forget: Residual Feature Alignment unlearning on the command line."""


app.command()(demo)
app.command()(unlearn)
app.command()(evaluate)
app.command()(experiment)
app.command()(bench)
app.command()(info)


def main() -> None:
    """Run the program; ends with its exit code.

    Raises:
        SystemExit: always.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a file that knows no α gets a ? for it
            stream.reconfigure(errors="replace")
    app(prog_name="rfa-fast")
