"""What a run tells the person who waits for it: loss, rate and remaining time.

On a terminal one bar that is redrawn in place; in a log file, where a redrawn bar is unreadable, a line
every few seconds, and the longer it takes the rarer; with `enabled=False` nothing at all. Everything goes
to standard error, so that a program's results stay alone on standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class ProgressReport:
    """Progress of a loop of known or unknown length; used as a context manager.

    Args:
        label: what is under way, such as `"unlearn (rfa)"`.
        total: number of steps, `None` when it is not known.
        start: steps already done before this process (a resumed run), left out of the rate.
        enabled: `False` is silent.
        every: seconds between two lines where there is no terminal; later a twentieth of the time it has taken.
        stream: where to write; standard error by default.
        clock: seconds that only grow; for tests.

    Example:
        >>> ticks = iter([0.0, 20.0, 40.0])
        >>> with ProgressReport("unlearn", total=4, stream=sys.stdout, clock=lambda: next(ticks)) as report:
        ...     report.step(1, loss=0.5, samples=100)
        ...     report.step(2, loss=0.25, samples=100)
        unlearn: step 1/4, loss 0.5, 5 samples/s, 1:00 left
        unlearn: step 2/4, loss 0.25, 5 samples/s, 0:40 left
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        start: int = 0,
        enabled: bool = True,
        every: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.start, self.enabled, self.every = label, total, start, enabled, every
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._samples = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._line: str | None = None
        self._begun = self._printed = 0.0

    def __enter__(self) -> ProgressReport:
        self._begun = self._printed = self._clock()
        if self.enabled:
            from rich.console import Console

            console = Console(file=self._stream)
            if redraws(console):
                self._open_bar(console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._line is not None:
            self._write(self._line)

    def step(self, step: int, *, loss: float, samples: int) -> None:
        """Report step number `step` (from 1), its total loss and how many samples it took."""
        if not self.enabled:
            return
        self._samples += samples
        now = self._clock()
        elapsed = max(now - self._begun, 1e-9)
        rate = self._samples / elapsed
        left = None if self.total is None else elapsed / max(step - self.start, 1) * (self.total - step)
        if self._bar is not None and self._task is not None:
            figures = f"loss {loss:.4g}  {rate:,.0f} samples/s"
            self._bar.update(self._task, completed=step, figures=figures, left=_clock_face(left))
            return
        of = "" if self.total is None else f"/{self.total}"
        remaining = "" if left is None else f", {_clock_face(left)} left"
        self._line = f"{self.label}: step {step}{of}, loss {loss:.4g}, {rate:,.0f} samples/s{remaining}"
        if now - self._printed >= max(self.every, elapsed / 20):
            self._write(self._line)
            self._printed, self._line = now, None

    def say(self, text: str) -> None:
        """Write one line of text, above the bar where there is one; nothing when not enabled."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def _open_bar(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("{task.fields[left]} left", markup=False),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, figures="", left="-:--")
        self._bar.start()

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def redraws(console: Console) -> bool:
    """Whether a line can be written over: `FORCE_COLOR` makes rich call anything a terminal, and a log is none.

    Example:
        >>> from rich.console import Console
        >>> redraws(Console(file=sys.stdout, force_terminal=True)) == sys.stdout.isatty()
        True
    """
    return console.is_jupyter or (console.is_terminal and console.file.isatty())


def _clock_face(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
