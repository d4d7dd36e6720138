"""`make bench`: measure the parts, print their tables, write JSON, docs/benchmarks.md and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import step_page
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from step_figures import figures_of
from step_parts import PARTS, RESULTS, Options, known, load, save, steps_of


def split(text: str) -> tuple[str, ...]:
    """Words between commas or spaces.

    Example:
        >>> split("slice, growth")
        ('slice', 'growth')
    """
    return tuple(text.replace(",", " ").split())


def show(console: Console, part: dict[str, object]) -> None:
    """The figures of a part on the console."""
    shown = Table(title=f"{part['part']}")
    for heading in ("figure", "start / paper", "bound", "measured", ""):
        shown.add_column(heading)
    for f in figures_of(part):
        value = f"{f.value:.3g}{f.unit}" if f.measured else "–"
        shown.add_row(f.name, f.beside, f.bound_text(), value, f.verdict().strip("*"))
    console.print(shown)


def main(
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(PARTS)}; all, if not given.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of each contender before that, compilation included.")] = 2,
    dtype: Annotated[str, typer.Option(help="auto (bf16 where the CPU multiplies it), bf16 or fp32.")] = "auto",
    samples: Annotated[int, typer.Option(min=2, help="Samples of the slice's batch.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens per sample of the slice.")] = 256,
    contenders: Annotated[str, typer.Option(help="Only these of the slice and full3b.")] = "",
    models: Annotated[str, typer.Option(help="Only these of table12; the others keep their rows.")] = "",
    memory: Annotated[bool, typer.Option(help="Measure memory (a process for each contender).")] = True,
    compiled: Annotated[bool, typer.Option(help="growth and full3b: our step compiled.")] = True,
    tiny: Annotated[bool, typer.Option(help="Tiny models: tries the instruments, measures nothing.")] = False,
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page; its plots go into a folder of its name.")] = step_page.PAGE,
    only_page: Annotated[bool, typer.Option(help="Write the page from the JSON that is there.")] = False,
) -> None:
    """Measure the step against its rivals and against the bare products, and write docs/benchmarks.md."""
    console = Console()
    chosen = split(parts) or tuple(PARTS)
    options = Options(
        rounds=rounds, warmup=warmup, dtype=dtype, samples=samples, length=length, contenders=split(contenders),
        models=split(models), memory=memory, compiled=compiled, tiny=tiny,
    )  # fmt: skip
    try:
        for name in chosen:
            known(name, options.contenders, options.models, tiny=tiny)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if dtype not in ("auto", "bf16", "fp32"):
        raise typer.BadParameter(f"dtype: got {dtype!r}, expected auto, bf16 or fp32")
    if tiny and results.resolve() == RESULTS.resolve():
        raise typer.BadParameter("tiny: got the folder of the real results, expected --results and --page elsewhere")
    if page.resolve() == step_page.PAGE.resolve() and results.resolve() != RESULTS.resolve():
        raise typer.BadParameter("page: got the page of the real results, expected --page elsewhere beside --results")
    failures = [] if only_page else _measure(console, chosen, options, results)
    found = load(results)
    for part in found.values():
        if part["part"] != "profile":
            show(console, part)
    for path in step_page.write(found, page):
        console.print(f"Written: {path.name}")
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _measure(console: Console, chosen: tuple[str, ...], options: Options, results: Path) -> list[str]:
    """Measure part by part; a part that fails does not keep the others from being measured."""
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in chosen:
            task = progress.add_task(name, total=steps_of(name, options))

            def say(text: str, task: object = task) -> None:
                progress.update(task, advance=1, description=text)  # type: ignore[arg-type]

            try:
                save(results, PARTS[name](options, results, say))
            except (ArithmeticError, RuntimeError) as error:
                failures.append(f"{name}: {error}")
    return failures


if __name__ == "__main__":
    typer.run(main)
