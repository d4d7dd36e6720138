"""Compile every kernel for five GPUs, count its bytes, write docs/kernels.md: `make kernel-sheet`.

Compilation happens in processes without `TRITON_INTERPRET`, counting in processes with it: Triton reads the variable
once, when it is imported. So this process imports neither Triton nor a kernel before its workers are done.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHEET = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
_SWITCH = "TRITON_INTERPRET"


def _plan(kernels: list[str], targets: list[str], layers: str) -> tuple[list[Any], list[str], list[tuple[int, str]]]:
    import sheet_compile
    from layers import LAYERS
    from sheet_traffic import PASSES

    passes = [(i, p) for i, layer in enumerate(LAYERS) for p in PASSES if layers in layer.name]
    return sheet_compile.jobs(kernels, targets), sheet_compile.table_faults(kernels, targets), passes


def _names(_: None) -> tuple[list[str], list[str]]:
    from rfa_fast.kernels.tuning import TABLES, TARGETS

    return list(TABLES), list(TARGETS)


def _planned(arguments: tuple[list[str], list[str], str]) -> Any:
    return _plan(*arguments)


def _compiled(arguments: tuple[Any, tuple[str, ...]]) -> Any:
    import sheet_compile

    job, dtypes = arguments
    return sheet_compile.compile_job(job, only=dtypes)


def _recorded(arguments: tuple[int, str]) -> Any:
    import sheet_traffic

    return sheet_traffic.record_pass(*arguments)


def _counted(arguments: tuple[int, str]) -> Any:
    import sheet_traffic

    return sheet_traffic.count_pass(*arguments)


def _start(interpret: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if interpret:
        os.environ[_SWITCH] = "1"
    else:
        os.environ.pop(_SWITCH, None)


@contextmanager
def _workers(count: int, *, interpret: bool) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(interpret,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _all(
    pool: ProcessPoolExecutor, function: Callable[[Any], Any], work: list[Any], progress: Progress, words: str
) -> list[Any]:
    """Every result, in the order of the work; the first failure ends it."""
    task = progress.add_task(words, total=len(work))
    futures = {pool.submit(function, each): i for i, each in enumerate(work)}
    results: list[Any] = [None] * len(work)
    for future in as_completed(futures):
        results[futures[future]] = future.result()
        progress.advance(task)
    return results


def main(
    output: Annotated[Path, typer.Option(help="Where to write the sheet.")] = SHEET,
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; may be given again.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Only this target; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only bf16, fp16 or fp32; may be given again.")] = None,
    layers: Annotated[str, typer.Option(help="Count only layers whose name contains this.")] = "",
    compiled: Annotated[bool, typer.Option(help="Compile the kernels.")] = True,
    traffic: Annotated[bool, typer.Option(help="List the bytes of the real layers.")] = True,
    counted: Annotated[bool, typer.Option(help="Count requested bytes in the interpreter (minutes).")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
) -> None:
    """Compile every kernel for five GPUs, count its bytes, and write docs/kernels.md. No GPU is needed."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Any] = []
    traffics: list[Any] = []
    faults: list[str] = []
    try:
        with Progress(*columns, console=console) as progress:
            with _workers(processes, interpret=False) as pool:
                known_kernels, known_targets = pool.submit(_names, None).result()
                kernels = _chosen("kernel", kernel, known_kernels)
                targets = _chosen("target", target, known_targets)
                dtypes = tuple(_chosen("dtype", dtype, ["bf16", "fp16", "fp32"]))
                work, faults, passes = pool.submit(_planned, (kernels, targets, layers)).result()
                passes = passes if traffic else []
                traffics = _all(pool, _recorded, passes, progress, "Recording layers")
                if compiled:
                    found = _all(pool, _compiled, [(job, dtypes) for job in work], progress, "Compiling")
                    rows = [row for each in found for row in each]
            if counted and passes:
                with _workers(processes, interpret=True) as pool:
                    counts = _all(pool, _counted, passes, progress, "Counting bytes")
                traffics = [_beside(t, c) for t, c in zip(traffics, counts, strict=True)]
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    from sheet_page import page

    order = {name: i for i, name in enumerate(known_kernels)}
    rows.sort(key=lambda row: (order[row.kernel], known_targets.index(row.target), row.generic))
    partial = bool(kernel or target or dtype or layers) or not (compiled and traffic and counted)
    faults += [fault for row in rows for fault in row.faults]
    faults += [fault for t in traffics for fault in t.faults]
    faults += [
        f"{t.layer.name}, {t.passed}: got {t.ratio:.3f} of the unfused bytes, expected at most {t.bound}"
        for t in traffics
        if not t.held
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(rows, traffics, partial=partial, faults=faults), encoding="utf-8")
    console.print(f"Written: {output} ({sum(row.cases for row in rows)} compilations, {len(traffics)} passes)")
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    if faults:
        console.print(f"{len(faults)} of these are not as they should be.", style="red")
        sys.exit(1)


def _beside(traffic: Any, counts: Any) -> Any:
    from sheet_traffic import combine

    return combine(traffic, counts)


def _chosen(name: str, given: list[str] | None, known: list[str]) -> list[str]:
    for value in given or ():
        if value not in known:
            raise typer.BadParameter(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    return list(given or known)


if __name__ == "__main__":
    typer.run(main)
