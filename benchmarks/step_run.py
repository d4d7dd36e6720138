"""Contenders in one process, in turns, checked: their times, and the facts that stand beside them."""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from step_workloads import Workload
from torch import Tensor

from rfa_fast.commands.info import has_bf16_products
from rfa_fast.experiments.floor import Floor
from rfa_fast.experiments.rivals import Contender, Setting, StepBatch, contender

Advance = Callable[[str], None]


def facts(workload: Workload | None = None) -> dict[str, Any]:
    """The machine, the versions and the shapes of a row; nothing that names the machine or its owner."""
    found = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": has_bf16_products(),
        "memory GiB": round(_memory() / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "rfa-fast")},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if workload is not None:
        found |= {"dtype": workload.dtype, "shapes": workload.words()}
    return found


def chosen_dtype(asked: str) -> str:
    """`"auto"` as what this CPU can multiply: bf16, or fp32 where it has no instructions for it."""
    return asked if asked != "auto" else "bf16" if has_bf16_products() else "fp32"


def make(workload: Workload, names: Sequence[str]) -> dict[str, Contender]:
    """The contenders of one workload on shared weights; two of the paper's arrangement share its teacher."""
    model, batch = workload.build(), workload.batch(0)
    made: dict[str, Contender] = {}
    teacher: Any = None
    for name in names:
        made[name] = contender(name, model, batch, workload.setting, teacher=teacher)
        teacher = getattr(made[name], "teacher", teacher)
    return made


def interleaved(
    contenders: Mapping[str, Contender],
    batch: Callable[[int], StepBatch],
    *,
    warmup: int,
    rounds: int,
    advance: Advance = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each whole step, A B C A B C …, after a warm-up in turns; checked before and after.

    Args:
        contenders: by row.
        batch: step -> batch; called outside of the time.
        warmup: steps of each that are not timed; compilation happens there.
        rounds: timed steps of each.
        advance: told the row before each step.

    Raises:
        ArithmeticError: a contender with a gradient of norm 0 or none, or a B that has not moved.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        gc.collect()
        for name, each in contenders.items():
            advance(name)
            fresh = batch(index)
            start = time.perf_counter()
            each.step(fresh)
            seconds = time.perf_counter() - start
            if index >= warmup:
                times[name].append(seconds)
            elif index == 0 and each.parameters and not 0 < each.gradient_norm < math.inf:
                raise ArithmeticError(
                    f"{name}: got a gradient of norm {each.gradient_norm}, expected a step that learns"
                )
    for name, each in contenders.items():
        unmoved = each.unmoved()
        if unmoved:
            raise ArithmeticError(f"{name}: got {unmoved[0]} where it started, expected every B to have moved")
    return times


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """q1, median, q3 and all of them.

    Example:
        >>> quartiles([3.0, 1.0, 2.0])["median"]
        2.0
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"q1": low, "median": middle, "q3": high, "all": list(values)}


def rows_of(
    contenders: Mapping[str, Contender], times: Mapping[str, Sequence[float]], workload: Workload, **more: Any
) -> list[dict[str, Any]]:
    """The rows of a group that was timed together; ratios are of medians, to its own floor and its own "ours"."""
    middles = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, each in contenders.items():
        row = {"contender": name, "seconds": quartiles(times[name]), "facts": facts(workload), **more}
        row["to_floor"] = middles[name] / middles["floor"] if "floor" in middles else None
        row["to_ours"] = middles[name] / middles["ours"] if "ours" in middles else None
        row["trainable"] = each.trainable_elements()
        row["gradient_norm"] = each.gradient_norm if each.parameters else None
        row["graph_breaks"] = each.graph_breaks if each.compiled else None
        floor = getattr(each, "floor", None)
        if isinstance(floor, Floor):
            row["flops"] = floor.flops
            row["features"] = {layer: list(shape) for layer, shape in floor.features.items()}
        rows.append(row)
    return rows


class RetainTerm(Contender):
    """The retain loss alone, forward and backward, of every adapted layer at its real size.

    With h `(M, R)` and B `(N, R)` per layer, as :mod:`rfa_fast.ops.linear_torch` computes it: the energy
    `h (BᵀB) · h` of the retain rows, `h BᵀB` for the gradient of h, `B (Hᵀ H)` for that of B. Compiled, as in
    the step that it is set against; `compiled=False` calls each operation by itself.
    """

    def __init__(
        self, floor: Floor, setting: Setting, forget_share: float, dtype: torch.dtype, *, compiled: bool = True
    ) -> None:
        super().__init__("retain-term-compiled" if compiled else "retain-term", None, {}, setting)
        self._term = torch.compile(_retain_term, dynamic=False) if compiled else _retain_term
        self._layers: list[tuple[Tensor, Tensor, Tensor]] = []
        for shape in floor.features.values():
            spatial = len(shape) == 4
            outputs = shape[1] if spatial else shape[-1]
            rows = math.prod(shape) // outputs
            hidden, up = torch.randn(rows, setting.rank, dtype=dtype), torch.randn(outputs, setting.rank)
            self._layers.append((hidden, up, torch.arange(rows) < rows * (1 - forget_share)))

    @torch.no_grad()
    def _step(self, batch: StepBatch) -> Tensor:
        return self._term(self._layers)[0]


def _retain_term(layers: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The energy of all layers, and the gradients of h and B of each."""
    total, gradients = torch.zeros(()), []
    for hidden, up, kept in layers:
        wide = torch.where(kept[:, None], hidden, 0).float()
        pulled = wide @ (up.mT @ up)
        total = total + (pulled * wide).sum()
        gradients.append((pulled.to(hidden.dtype), up @ (wide.mT @ wide)))
    return total, gradients


def _cpu() -> str:
    place = Path("/proc/cpuinfo")
    if place.is_file():
        for line in place.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return 0
    return math.prod(os.sysconf(name) for name in names)
