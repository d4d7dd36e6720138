"""Between the commands and the terminal: errors as one line, Ctrl-C with the way to go on, exit codes.

A traceback tells a programmer where, and a user nothing. The package's own errors already name what
was got, what was expected and what to do, so they are printed as they are and the traceback is kept
for `--debug`. Only the kinds of error that the package documents are treated so; anything else is a
defect and shows itself in full.

Exit codes: 0 done, 1 failed on the way (disk, NaN), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from rfa_fast.methods.base import UnlearnInterrupted
from rfa_fast.methods.checkpoint import STATE_FILE

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


class Program(TyperGroup):
    """The group of commands; keeps the words that were typed, to repeat them in a message."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """The context, with the arguments as its `obj`."""
        typed = tuple(args)
        context = super().make_context(info_name, args, *more, **extra)
        context.obj = typed
        return context


def command_line(context: typer.Context, *more: str) -> str:
    """What was typed, with `more` added where it is not there yet, quoted for a shell."""
    typed: tuple[str, ...] = context.find_root().obj or ()
    return shlex.join(["rfa-fast", *typed, *(word for word in more if word not in typed)])


def say(text: str) -> None:
    """One line for the person who waits, on standard error."""
    typer.echo(text, err=True)


def results() -> Console:
    """Where tables go: standard output."""
    return Console()


def check_output(folder: Path, name: str = "--output") -> None:
    """Refuse a folder that results could not go to, before hours go into them.

    Raises:
        ValueError: a file is there, or in the way to it.
        PermissionError: it, or the folder it would be made in, cannot be written to.

    Example:
        >>> check_output(Path("."))
    """
    there = next((place for place in (folder, *folder.parents) if place.exists()), Path("."))
    if not there.is_dir():
        raise ValueError(f"{name}: {there}: got a file, expected a folder, or a name that is free")
    if not os.access(there, os.W_OK | os.X_OK):
        expected = "expected a folder that can; name another"
        raise PermissionError(f"{name}: {there.absolute()} cannot be written to, {expected}")


@contextmanager
def reported(context: typer.Context, *, debug: bool = False, output: Path | None = None) -> Iterator[None]:
    """Turn the errors of what runs inside into one line and an exit code, and warnings into one line each.

    Args:
        context: of the command.
        debug: let errors through, with their traceback.
        output: the folder of a run that can be resumed.

    Raises:
        typer.Exit: with the code; or, with `debug`, the error itself.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt as error:
            _interrupted(context, error, output)
            raise typer.Exit(INTERRUPTED) from error
        except (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError) as error:
            _failed(error, debug=debug)
            raise typer.Exit(WRONG_INPUT) from error
        except (OSError, FloatingPointError) as error:
            _failed(error, debug=debug)
            if isinstance(error, OSError) and output is not None and (output / STATE_FILE).is_file():
                say(_way_on(context, output))
            raise typer.Exit(FAILED) from error


def _failed(error: Exception, *, debug: bool) -> None:
    if debug:
        raise error
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    say(_in_options(str(error)) or type(error).__name__)


def _interrupted(context: typer.Context, error: KeyboardInterrupt, output: Path | None) -> None:
    if output is None or not (output / STATE_FILE).is_file():
        say("Interrupted; nothing was written that a run could go on from.")
        return
    step = f" after step {error.step}" if isinstance(error, UnlearnInterrupted) else ""
    say(f"Interrupted{step}. {_way_on(context, output)}")


def _way_on(context: typer.Context, output: Path) -> str:
    return f"The state is in {output}; go on with\n  {command_line(context, '--resume')}"


def _in_options(text: str) -> str:
    """The message in the words of the command line: where Python says resume=True, one types --resume."""
    return text.replace("resume=True", "--resume").replace("output_dir=…", "--output").replace("output_dir", "--output")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {_in_options(str(message))}")
