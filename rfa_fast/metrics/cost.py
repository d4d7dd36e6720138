"""What a piece of work costs: wall-clock seconds and the peak of memory while it ran.

On CUDA the allocator knows its own peak exactly. The resident memory of a process has no peak that
can be reset without disturbing others who read it, so on the CPU a thread samples it every 20 ms,
and the process's own high-water mark takes over when the work set a new one: that one is exact.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.02


@dataclass
class Cost:
    """Filled in when the :func:`measure` block ends, also by an error.

    Attributes:
        seconds: wall-clock time, the device's queue included; NaN while the block runs.
        peak_bytes: peak memory during the block, everything allocated before it included; `None` where
            the platform does not tell.
        source: where the peak comes from, in words.
    """

    seconds: float = math.nan
    peak_bytes: int | None = None
    source: str = "not measured yet"

    @property
    def peak_mib(self) -> float:
        """`peak_bytes` in MiB, NaN where unknown."""
        return math.nan if self.peak_bytes is None else self.peak_bytes / 2**20


@contextmanager
def measure(device: torch.device | str | None = None) -> Iterator[Cost]:
    """Time a block and find its peak memory.

    Args:
        device: a CUDA device to wait for and whose allocator is asked (its peak statistics are reset);
            anything else, or `None`, asks for the process's resident memory.

    Yields:
        A :class:`Cost` that is complete after the block.

    Raises:
        RuntimeError: torch's own, for a CUDA device that is not there.

    Example:
        >>> with measure() as cost:
        ...     _ = torch.ones(10).sum()
        >>> cost.seconds >= 0
        True
    """
    place = torch.device("cpu" if device is None else device)
    cost = Cost()
    if place.type == "cuda":
        yield from _measure_cuda(cost, place)
    else:
        yield from _measure_process(cost)


def _measure_cuda(cost: Cost, device: torch.device) -> Iterator[Cost]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = torch.cuda.max_memory_allocated(device)
        cost.source = f"allocator of {device}"


def _measure_process(cost: Cost) -> Iterator[Cost]:
    samples: list[int] = []
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(samples, stop), daemon=True)
    high_before = _high_water()
    _take(samples)
    sampler.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        stop.set()
        sampler.join()
        _take(samples)
        high_after = _high_water()
        if high_before is not None and high_after is not None and high_after > high_before:
            cost.peak_bytes = high_after
            cost.source = "high-water mark of the process"
        elif samples:
            cost.peak_bytes = max(samples)
            cost.source = f"resident memory, sampled every {_SAMPLE_SECONDS * 1000:.0f} ms"
        else:
            cost.source = "not available: the block set no new high-water mark and the platform has no /proc"


def _sample(samples: list[int], stop: threading.Event) -> None:
    while not stop.wait(_SAMPLE_SECONDS):
        _take(samples)


def _take(samples: list[int]) -> None:
    """Keep the larger of the sample so far and the present one: a run of a day would make millions."""
    if _STATM.is_file():
        import resource

        samples[:] = [max([*samples, int(_STATM.read_text().split()[1]) * resource.getpagesize()])]


def _high_water() -> int | None:
    """Largest resident memory of the process so far, in bytes; `None` on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
