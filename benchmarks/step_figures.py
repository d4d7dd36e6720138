"""The figures of the tables: from a part's rows to a value, beside the bound that was promised for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAPER_QUOTIENTS = {"ResNet18": 1.50, "ViT-B/16": 1.43, "DistilBERT": 1.73, "DistilGPT2": 1.21}
BYTES = {"bf16": 2, "fp32": 4}
GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """A value and its bound.

    Attributes:
        name: what it is.
        value: NaN where it was not measured.
        bound: what was promised; `None` for a value shown for comparison.
        at_most: whether the bound is an upper one.
        unit: put behind both.
        beside: the value elsewhere: where we started, or the paper's.
    """

    name: str
    value: float
    bound: float | None
    at_most: bool = True
    unit: str = ""
    beside: str = ""

    @property
    def measured(self) -> bool:
        return math.isfinite(self.value)

    @property
    def held(self) -> bool:
        """Whether it was measured and is within its bound."""
        if not self.measured or self.bound is None:
            return False
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def verdict(self) -> str:
        """`"held"`, `"**not held**"`, `"not measured"`, or nothing without a bound."""
        if not self.measured:
            return "not measured"
        return "" if self.bound is None else "held" if self.held else "**not held**"

    def bound_text(self) -> str:
        if self.bound is None:
            return ""
        return f"{'≤' if self.at_most else '≥'} {self.bound:.3g}{self.unit}"


def figures_of(part: Mapping[str, Any]) -> list[Figure]:
    """The figures of a part, in the order of the issue.

    Raises:
        ValueError: a part without figures of its own kind.
    """
    makers = {"slice": _slice, "table12": _table12, "full3b": _full3b, "growth": _growth}
    if part["part"] not in makers:
        raise ValueError(f"part: got {part['part']!r}, expected one of {', '.join(makers)}")
    return makers[part["part"]](part)


def _slice(part: Mapping[str, Any]) -> list[Figure]:
    rows = {row["contender"]: row for row in part["rows"]}

    def seconds(name: str) -> float:
        return float(rows[name]["seconds"]["median"]) if name in rows else math.nan

    def above(name: str) -> float:
        found = rows.get(name, {}).get("memory") or {}
        value = found.get("above")
        return math.nan if value is None else float(value)

    def alone(name: str) -> float:
        found = rows.get(name, {}).get("memory") or {}
        return above(name) - float(found.get("before") or 0)

    ours, floor = seconds("ours"), seconds("floor")
    copy_of_features = retain_feature_bytes(part)
    return [
        Figure("step / floor", ours / floor, 1.2, beside="1.5"),
        Figure("paper's arrangement eager / ours", seconds("paper") / ours, 4.5, at_most=False, beside="3.6"),
        Figure("ours / plain PEFT LoRA step (no RFA) eager", ours / seconds("peft"), 0.7, beside="0.86"),
        Figure(
            "memory above one copy of the weights, ours / paper's arrangement", above("ours") / above("paper"), 0.12,
            beside="0.18",
        ),
        Figure("the same, ours / plain PEFT LoRA", above("ours") / above("peft"), 0.2, beside="0.32"),
        Figure("without the interpreter's share, ours / paper's arrangement", alone("ours") / alone("paper"), None),
        Figure("without the interpreter's share, ours / plain PEFT LoRA", alone("ours") / alone("peft"), None),
        Figure("teacher mode: step / floor", seconds("ours-teacher") / floor, 1.45),
        Figure(
            "teacher mode: memory above the weights, more than residual mode's",
            (above("ours-teacher") - above("ours")) / GIB, copy_of_features / GIB, unit=" GiB",
        ),
    ]  # fmt: skip


def retain_feature_bytes(part: Mapping[str, Any]) -> float:
    """One copy of the adapted layers' retain features in the model's dtype."""
    floor = next((row for row in part["rows"] if row["contender"] == "floor"), None)
    if floor is None:
        return math.nan
    workload = part["settings"]["workload"]
    elements = sum(math.prod(shape) for shape in floor["features"].values())
    kept = 1 - workload["forget"] / workload["samples"]
    return float(elements * kept * BYTES[workload["dtype"]])


def _table12(part: Mapping[str, Any]) -> list[Figure]:
    found: list[Figure] = []
    for model in dict.fromkeys(row["model"] for row in part["rows"]):
        times = {r["contender"]: r["seconds"]["median"] for r in part["rows"] if r["model"] == model}
        retain = times.get("retain-term-compiled", times["retain-term"])
        rival = min(times["finetune"], times.get("finetune-compiled", math.inf))
        paper = f"{PAPER_QUOTIENTS[model]:.2f}" if model in PAPER_QUOTIENTS else ""
        found += [
            Figure(f"{model}: ours / Finetune, all", times["ours"] / rival, 1.0, beside=paper),
            Figure(f"{model}: ours / Finetune, deep", times["ours-deep"] / rival, 0.65, beside=paper),
            Figure(f"{model}: ours, all / Finetune eager", times["ours"] / times["finetune"], None),
            Figure(f"{model}: retain loss's share of the step, all", retain / times["ours"], 0.02),
        ]
    return found


def _full3b(part: Mapping[str, Any]) -> list[Figure]:
    counted = {r["contender"]: r for r in part["rows"] if r["kind"].startswith("live")}
    real = {r["contender"]: r for r in part["rows"] if r["kind"].startswith("resident") and r["peak"] is not None}
    found = []
    for name, how in (("ours", "compiled"), ("ours-eager", "eager")):
        resident = real[name]["peak"] / real[name]["weights"] if name in real else math.nan
        found.append(Figure(f"a real step, {how}: peak resident / weights", resident, 1.35))
    bounds: dict[str, float | None] = {"ours-eager": 1.15}
    for name in ("ours-eager", "ours-teacher-eager", "peft", "paper", "finetune"):
        bound = bounds.get(name)
        row = counted.get(name)
        if row is not None or bound is not None:
            value = math.nan if row is None else row["peak"] / row["weights"]
            found.append(Figure(f"live-storage peak / weights, {name.removesuffix('-eager')}", value, bound))
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms; NaN with fewer than two.

    Example:
        >>> round(slope([(1, 3), (10, 300)]), 3)
        2.0
    """
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth_series(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per varied quantity: values, seconds, memory above the weights and the interpreter, and the slopes.

    The expected slope of the time is that of the operations counted for the same points: the floor's products and the
    low-rank ones, 6 · tokens · rank · (K + N) per adapted layer; of the memory it is 1 over the tokens, 0 over the
    rank, and at most 1 over the layers, as what a step saves is per token and adapted block.
    """
    series: dict[str, dict[str, Any]] = {}
    for varied in dict.fromkeys(row["varied"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["varied"] == varied]
        values = [float(row["value"]) for row in rows]
        seconds = [sorted(row["seconds"])[len(row["seconds"]) // 2] for row in rows]
        memory = [math.nan if row["above"] is None else row["above"] - (row["before"] or 0) for row in rows]
        work = [float(row["flops"] + row["low_rank_flops"]) for row in rows]
        finite = [(v, m) for v, m in zip(values, memory, strict=True) if math.isfinite(m)]
        series[varied] = {
            "values": values, "seconds": seconds, "memory": memory, "work": work,
            "slope": slope(list(zip(values, seconds, strict=True))),
            "expected": slope(list(zip(values, work, strict=True))),
            "memory_slope": slope(finite),
            "memory_expected": {"tokens": 1.0, "rank": 0.0, "adapted layers": 1.0}.get(varied, math.nan),
        }  # fmt: skip
    return series


def _growth(part: Mapping[str, Any]) -> list[Figure]:
    found = []
    for varied, each in growth_series(part).items():
        expected = f"expected {each['expected']:.2f}"
        found.append(Figure(f"slope of the time over {varied}", each["slope"], None, beside=expected))
        expected = f"expected {each['memory_expected']:.2f}"
        found.append(Figure(f"slope of the memory over {varied}", each["memory_slope"], None, beside=expected))
    return found
