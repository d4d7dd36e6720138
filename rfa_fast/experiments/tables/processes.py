"""Computing the units of a plan: in this process, or in several at once, one unit each.

Processes share nothing but the folder of trained models and finished rows, so one that ends early loses the row under
way and no other notices. They end with the process that started them, however that ended.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from multiprocessing import get_context, parent_process
from typing import TextIO

import torch

from rfa_fast.experiments.cache import Say
from rfa_fast.experiments.tables.plan import Choice, Unit
from rfa_fast.experiments.tables.runner import Found, Place, Workshop


def compute(
    units: Sequence[Unit],
    choice: Choice,
    *,
    jobs: int = 1,
    say: Say = print,
    progress: bool = True,
    workshop: Workshop | None = None,
) -> dict[Place, Found]:
    """All units, by what each is of.

    Args:
        units: in the order computed.
        choice: what was asked for.
        jobs: processes at a time, each with as many threads as this one; 1 computes here.
        say: is told what happens, a sentence each.
        progress: show bars; with several jobs, lines now and then.
        workshop: data already read.

    Raises:
        ValueError: what a unit raises.
        OSError: the cache cannot be written, or a process was killed.
    """
    if jobs > 1 and len(units) > 1:
        computed = _in_processes(units, choice, jobs, torch.get_num_threads(), say, progress)
    else:
        shop = workshop or Workshop(choice, say=say, progress=progress)
        computed = [shop.compute(unit) for unit in units]
    return {
        Place(unit.pair, unit.seed, scenario, unit.lasting): found
        for unit, scenarios in zip(units, computed, strict=True)
        for scenario, found in scenarios.items()
    }


def _in_processes(
    units: Sequence[Unit], choice: Choice, jobs: int, threads: int, say: Say, progress: bool
) -> list[dict[str, Found]]:
    """What some process found of each unit, in the order of the units."""
    executor = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        waiting = {executor.submit(_work, unit, choice, threads, progress): at for at, unit in enumerate(units)}
        computed: dict[int, dict[str, Found]] = {}
        for done in as_completed(waiting):
            at, found = waiting[done], done.result()
            if found is None:
                raise KeyboardInterrupt
            computed[at] = found
            say(f"{units[at].pair}, seed {units[at].seed}: finished")
        return [computed[at] for at in range(len(units))]
    except BrokenProcessPool as error:
        raise OSError(
            f"jobs: one of {jobs} processes was killed, probably for want of memory; take fewer --jobs. Finished rows "
            "and trained models are kept; the same command goes on where it stopped"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Have this process end when the one that started it is killed, which could not tell it to."""
    if (parent := parent_process()) is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


class Lines(io.TextIOBase):
    """Standard error of one process among several: whole lines that say whose they are, and no terminal for bars.

    Args:
        stream: where they go.
        whose: stands in brackets in front of each.

    Example:
        >>> lines = Lines(sys.stdout, "seed 0")
        >>> lines.write("half a ") + lines.write("line\\nand ")
        [seed 0] half a line
        16
    """

    def __init__(self, stream: TextIO, whose: str) -> None:
        self._stream, self._whose, self._begun = stream, whose, ""

    def write(self, text: str) -> int:
        """Hold back what is not ended yet; a line that is written over ends there."""
        *lines, self._begun = (self._begun + text.replace("\r", "\n")).split("\n")
        self._stream.write("".join(f"[{self._whose}] {line}\n" for line in lines if line))
        return len(text)

    def end(self) -> None:
        """Write what was held back."""
        if self._begun:
            self.write("\n")

    def flush(self) -> None:
        """Hand on the ended lines."""
        self._stream.flush()


def _work(unit: Unit, choice: Choice, threads: int, progress: bool) -> dict[str, Found] | None:
    """One unit in a process of its own; `None` when it was interrupted, which an exception could not say whole."""

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    torch.set_num_threads(threads)
    lines = Lines(sys.stderr, f"{unit.pair}, seed {unit.seed}")
    try:
        with redirect_stderr(lines):
            return Workshop(choice, say=say, progress=progress).compute(unit)
    except KeyboardInterrupt:
        return None
    finally:
        lines.end()
