"""Our step beside its rivals on one model: what each needs, whether it fits, how long it takes.

Memory comes first, from shapes (:mod:`rfa_fast.experiments.forecast`), because a rival that does not fit must not
take the machine down with it. Time is taken in turns: one step of each, on the same random batch, then the next
round, so that a busy machine slows all of them. A contender whose first gradient is 0, or whose B did not move,
has its row marked: a fast step that trains nothing is no result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfa_fast.data.draws import generator
from rfa_fast.experiments.forecast import check_checkpointing, forecast, switch_on, wrap_blocks
from rfa_fast.experiments.geometry import Batches
from rfa_fast.experiments.rivals import NAMES, Contender, Setting, StepBatch, contender
from rfa_fast.experiments.sharing import sharing_copy
from rfa_fast.metrics.cost import measure
from rfa_fast.metrics.forecast import Forecast
from rfa_fast.metrics.shapes_only import DependsOnValues

# What a rival's making or step may raise on a model that it does not take.
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_CPU_FULL = ("DefaultCPUAllocator", "can't allocate memory")
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
_MEMINFO = Path("/proc/meminfo")


@dataclass
class Row:
    """One contender.

    Attributes:
        name: as in :data:`rfa_fast.experiments.rivals.NAMES`.
        forecast: its memory, `None` for the floor, which has no model.
        seconds: of each timed step.
        first_seconds: of its first step, compilation included; NaN before it.
        extra_bytes: measured while a warm step ran, above what lay in memory before it; `None` where unknown.
        extra_source: where that figure comes from.
        problem: why the row is no result, or was left out; empty where it counts.
    """

    name: str
    forecast: Forecast | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = math.nan
    extra_bytes: int | None = None
    extra_source: str = ""
    problem: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile of `seconds`; NaN where there are none.

        Example:
            >>> Row("ours", seconds=[3.0, 1.0, 2.0, 4.0, 5.0]).quartiles
            (2.0, 3.0, 4.0)
        """
        if not self.seconds:
            return (math.nan,) * 3
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: NaN is null."""
        low, median, high = (None if math.isnan(x) else x for x in self.quartiles)
        return {
            "name": self.name,
            "forecast": None if self.forecast is None else self.forecast.to_dict(),
            "seconds": self.seconds,
            "quartiles": {"low": low, "median": median, "high": high},
            "first_seconds": None if math.isnan(self.first_seconds) else self.first_seconds,
            "extra_bytes": self.extra_bytes,
            "extra_source": self.extra_source,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Bench:
    """What is compared, on what.

    Attributes:
        batches: random batches.
        setting: targets, rank and so on of all contenders.
        names: contenders, the first is ours.
        checkpointing: each block of a transformers model is recomputed in the backward, for all of them.
        seed: of the batches.
    """

    batches: Batches
    setting: Setting
    names: Sequence[str] = ("ours", "floor", "peft", "paper", "finetune")
    checkpointing: bool = False
    seed: int = 0

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for unknown or repeated names, a rival in front, or checkpointing that is not there."""
        if unknown := [name for name in self.names if name not in NAMES]:
            raise ValueError(f"rival: got {', '.join(unknown)}, expected some of {', '.join(NAMES)}")
        if len(set(self.names)) < len(self.names) or not self.names[:1] or not self.names[0].startswith("ours"):
            raise ValueError(f"rivals: got {', '.join(self.names)}, expected ours first and each name once")
        if self.checkpointing:
            check_checkpointing(model)

    def forecasts(self, model: nn.Module, bar: Bar, unknown: dict[str, str] | None = None) -> dict[str, Forecast]:
        """The memory of each contender but the floor, and of the paper's arrangement, asked for or not.

        Args:
            model: unpatched; may be on `"meta"`.
            bar: shows progress; gets a label.
            unknown: gets the reason why a rival has none, by contender; an error of ours is raised.

        Returns:
            By contender; a rival that failed is not among them, nor one whose course depends on the values of
            activations.
        """
        batch = self.batches.draw(generator(self.seed, "bench", "forecast"))
        found: dict[str, Forecast] = {}
        known: dict[tuple[str, str], Forecast | None] = {}
        names = [name for name in (*self.names, "paper") if name != "floor"]
        with bar("memory, from shapes") as advance:
            for done, name in enumerate(names):
                arrangement = name.split("-")[0]
                mode = "teacher" if name.startswith("ours-teacher") else "residual"
                if (arrangement, mode) not in known:
                    try:
                        known[arrangement, mode] = self._forecast(model, batch, arrangement, mode)
                    except _FAILURES as error:
                        if arrangement == "ours":
                            raise
                        known[arrangement, mode] = None
                        if unknown is not None:
                            unknown[name] = reason(error)
                if (one := known[arrangement, mode]) is not None:
                    found[name] = one
                advance(done + 1, len(names))
        return found

    def _forecast(self, model: nn.Module, batch: StepBatch, arrangement: str, mode: str) -> Forecast | None:
        options: dict[str, Any] = {
            "targets": self.setting.targets, "rank": self.setting.rank, "alpha": self.setting.alpha,
        }  # fmt: skip
        if arrangement == "ours":
            options["mode"] = mode
        try:
            return forecast(
                model, batch.inputs, batch.labels, batch.forget, arrangement=arrangement,
                checkpointing=self.checkpointing, **options,
            )  # fmt: skip
        except DependsOnValues:
            return None

    def fitting(self, forecasts: Mapping[str, Forecast], free: int | None) -> list[Row]:
        """The rows, with the problem of those that do not fit.

        All contenders are in memory at once, to be run in turns: what each keeps between its steps adds up, what it
        needs during one does not.

        Args:
            forecasts: by contender.
            free: bytes that the model's own weights do not take; `None`: not known, everything is tried.

        Example:
            >>> bench = Bench(Batches(2, (1,), None, None, torch.float32), Setting(), ("ours", "paper", "peft"))
            >>> found = {"ours": Forecast(10, 15, 1), "paper": Forecast(10, 40, 12), "peft": Forecast(10, 18, 1)}
            >>> [row.name for row in bench.fitting(found, free=20) if not row.problem]
            ['ours', 'peft']
        """
        rows, kept, peak = [], 0, 0
        for name in self.names:
            row = Row(name, forecasts.get(name))
            rows.append(row)
            if row.forecast is None:
                continue
            state, during = row.forecast.state, row.forecast.above_weights - row.forecast.state
            # Alone it trains the model itself; beside the others, which need that as it was, a copy.
            copied = row.forecast.weights if name.startswith("finetune") else 0
            state += copied
            needed = kept + state + max(peak, during)
            if free is not None and needed > free:
                row.problem = (
                    f"left out: it needs {size_text(row.forecast.peak + copied)}, and beside the weights and what "
                    f"runs with it {size_text(max(free - kept, 0))} are free"
                )
                continue
            kept, peak = kept + state, max(peak, during)
        return rows

    def make(self, row: Row, model: nn.Module, device: torch.device) -> Contender:
        """The contender of a row, on a copy of the model that shares its weights."""
        if self.checkpointing:
            model = sharing_copy(model)
            (switch_on if row.name.startswith("ours") else wrap_blocks)(model)
        return contender(
            row.name, model, self.batches.draw(generator(self.seed, "bench", "first"), device), self.setting
        )

    def run(
        self, rows: Sequence[Row], model: nn.Module, device: torch.device, *, rounds: int, warmup: int, bar: Bar
    ) -> bool:
        """Make the contenders of the rows without a problem, and time them in turns.

        Args:
            rows: filled in, after each round that is complete.
            model: with weights, on `device`.
            rounds: timed steps of each.
            warmup: steps of each before those; the first makes graphs and optimizer state.
            bar: shows progress; gets a label.

        Returns:
            Whether it ran to its end: Ctrl-C stops it, and leaves the rounds so far. A rival that fails has the
            reason in its row, and the others go on.

        Raises:
            Exception: what ours, the first of the rows, raised; out of memory in its warm-up is said in its row.
        """
        running: list[tuple[Row, Contender]] = []
        try:
            taking_part = [row for row in rows if not row.problem]
            with bar("warm up") as advance:
                for place, row in enumerate(taking_part):
                    rival = self._warm(row, model, device, warmup, ours=row is rows[0])
                    if rival is not None:
                        running.append((row, rival))
                    advance(place + 1, len(taking_part))
            total = rounds * len(running)
            with bar("measure") as advance:
                for number in range(rounds):
                    batch = self.batches.draw(generator(self.seed, "bench", number), device)
                    times: list[float | None] = []
                    for place, (row, rival) in enumerate(running):
                        try:
                            times.append(timed(device, partial(rival.step, batch)))
                        except _FAILURES as error:
                            if row is rows[0]:
                                raise
                            row.problem = reason(error)
                            times.append(None)
                        advance(number * len(running) + place + 1, total)
                    for (row, _), taken in zip(running, times, strict=True):
                        if taken is not None:
                            row.seconds.append(taken)
                    running = [pair for pair, taken in zip(running, times, strict=True) if taken is not None]
        except KeyboardInterrupt:
            finished = False
        else:
            finished = True
        for row, rival in running:
            if rival.parameters and (still := rival.unmoved()):
                row.problem = row.problem or f"no result: {still[0]} and {len(still) - 1} more did not move"
        return finished

    def _warm(self, row: Row, model: nn.Module, device: torch.device, warmup: int, *, ours: bool) -> Contender | None:
        try:
            rival = self.make(row, model, device)
            batch = self.batches.draw(generator(self.seed, "bench", "warm", 0), device)
            row.first_seconds = timed(device, partial(rival.step, batch))
            for number in range(1, warmup):
                batch = self.batches.draw(generator(self.seed, "bench", "warm", number), device)
                before = present_bytes(device)
                with measure(device) as cost:
                    rival.step(batch)
                if cost.peak_bytes is not None and before is not None:
                    row.extra_bytes, row.extra_source = max(cost.peak_bytes - before, 0), cost.source
        except _FAILURES as error:
            if ours and not out_of_memory(error):
                raise
            row.problem = reason(error)
            return None
        if rival.parameters and not (math.isfinite(rival.gradient_norm) and rival.gradient_norm > 0):
            row.problem = f"no result: its first gradient has norm {rival.gradient_norm}"
        return rival


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is full: on a CPU, torch has no exception of its own for that.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("x"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_FULL)


def reason(error: BaseException) -> str:
    """An error in a row's words.

    Example:
        >>> reason(ValueError("rank: got 0, expected 1 or more")), reason(MemoryError())
        ('cannot run: rank: got 0, expected 1 or more', 'out of memory (MemoryError)')
    """
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"out of memory ({said})" if out_of_memory(error) else f"cannot run: {said}"


def timed(device: torch.device, run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, the device's queue included.

    Example:
        >>> timed(torch.device("cpu"), lambda: None) >= 0
        True
    """
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken: the device's, or what Linux calls MemAvailable; `None` where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def present_bytes(device: torch.device) -> int | None:
    """Memory taken now: CUDA's allocator, or the process's resident memory; `None` where nobody says."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return None
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def size_text(count: int) -> str:
    """Bytes for people.

    Example:
        >>> size_text(3 * 2**30), size_text(5_000_000), size_text(100)
        ('3.0 GiB', '4.8 MiB', '0.1 KiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def sentence(forecasts: Mapping[str, Forecast], ours: str, batches: Batches) -> str:
    """The forecast in a sentence.

    Example:
        >>> found = {"ours": Forecast(2**30, 2 * 2**30, 0), "paper": Forecast(2**30, 4 * 2**30, 0)}
        >>> print(sentence(found, "ours", Batches(4, (512,), "input_ids", 10, torch.float32)))
        This step on this model at 4 × 512 tokens needs 2.0 GiB (1.0 GiB of them weights); the paper's arrangement \
would need 4.0 GiB.
    """
    mine, paper = forecasts.get(ours), forecasts.get("paper")
    if mine is None:
        return "What memory a step needs cannot be told from shapes: this model decides by the values of activations."
    theirs = "is not known" if paper is None else f"would need {size_text(paper.peak)}"
    return (
        f"This step on this model at {batches} needs {size_text(mine.peak)} ({size_text(mine.weights)} of them "
        f"weights); the paper's arrangement {theirs}."
    )
