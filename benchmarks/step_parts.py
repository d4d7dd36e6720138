"""The parts of `make bench`, each its own file in benchmarks/results: measured again alone, read by the page.

A part's file is {"part", "settings", "rows": […], …}; every row holds its figures and the facts of the machine it was
measured on. What is finished is written at once, so that an interrupted part keeps its rows.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import step_slice
import torch
from step_child import in_child
from step_run import RetainTerm, chosen_dtype, facts, interleaved, make, rows_of
from step_workloads import DTYPES, Workload, full_3b, narrow, table_twelve

from rfa_fast.experiments.rivals import FloorContender, contender
from rfa_fast.report import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
Say = Callable[[str], None]
Child = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What a run may change.

    Attributes:
        rounds, warmup: steps of each contender, timed and not.
        dtype: `"auto"`, `"bf16"` or `"fp32"`.
        samples, length: of the slice.
        contenders: only these (the floor and ours always come along).
        models: of table12.
        memory: measure memory, too.
        compiled: of growth and full3b: our step under torch.compile.
        tiny: every model a few thousand parameters: tries the instruments, measures nothing.
    """

    rounds: int = 5
    warmup: int = 2
    dtype: str = "auto"
    samples: int = 8
    length: int = 256
    contenders: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    memory: bool = True
    compiled: bool = True
    tiny: bool = False


def save(folder: Path, part: Mapping[str, Any]) -> None:
    """Write a part, whole or under way."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{part['part']}.json", json.dumps(part, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts that are there."""
    names = [name for name in PARTS if (folder / f"{name}.json").is_file()]
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def slice_workload(options: Options) -> Workload:
    """The slice as the options have it."""
    dtype = chosen_dtype(options.dtype)
    if options.tiny:
        return step_slice.tiny(dtype)
    return step_slice.workload(dtype, samples=options.samples, length=options.length)


def time_slice(workload: Workload, options: Options, say: Say) -> list[dict[str, Any]]:
    """The slice's rows, group by group; a row of the second group has the first's floor and ours left out."""
    rows: list[dict[str, Any]] = []
    for group in (step_slice.TOGETHER, step_slice.APART):
        names = [n for n in group if not options.contenders or n in options.contenders or n in ("floor", "ours")]
        if set(names) <= {"floor", "ours"} and rows:
            continue
        if "peft-bf16" in names and workload.dtype != "bf16":
            names.remove("peft-bf16")
        contenders = make(workload, names)
        times = interleaved(
            contenders, workload.batch, warmup=options.warmup, rounds=options.rounds,
            advance=lambda name: say(f"slice: timing {name}"),
        )  # fmt: skip
        known = {row["contender"] for row in rows}
        rows += [row for row in rows_of(contenders, times, workload) if row["contender"] not in known]
        contenders.clear()
        gc.collect()
        torch._dynamo.reset()
    return rows


def measure_slice(options: Options, folder: Path, say: Say, child: Child = in_child) -> dict[str, Any]:
    """The slice: ours checked, all timed in turns, then each one's memory in a process of its own."""
    workload = slice_workload(options)
    part: dict[str, Any] = {
        "part": "slice",
        "settings": {"workload": workload.to_dict(), "rounds": options.rounds, "warmup": options.warmup},
        "checks": [],
        "rows": [],
    }
    for name in ("ours", "ours-teacher"):
        say(f"slice: checking {name}")
        part["checks"].append(child("check", workload=workload.to_dict(), contender=name))
    part["rows"] = time_slice(workload, options, say)
    save(folder, part)
    if options.memory:
        for row in part["rows"]:
            if row["contender"] == "floor":
                continue
            say(f"slice: memory of {row['contender']}")
            found = child(
                "memory", workload=workload.to_dict(), contender=row["contender"], warmup=options.warmup, steps=2
            )
            row["memory"] = {key: found[key] for key in ("weights", "peak", "before", "above", "source")}
            save(folder, part)
    return part


def table12_workloads(dtype: str, *, tiny: bool) -> dict[str, Workload]:
    """The models of table12 by their names."""
    return {"tiny": step_slice.tiny(dtype)} if tiny else table_twelve(dtype)


def _joined(found: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [each for rows in found.values() for each in rows]


def measure_table12(options: Options, folder: Path, say: Say, child: Child = in_child) -> dict[str, Any]:
    """Ours / Finetune of the paper's four models, `"all"` and `"deep"`, and the retain term alone."""
    dtype = chosen_dtype(options.dtype)
    workloads = table12_workloads(dtype, tiny=options.tiny)
    kept = load(folder).get("table12", {"rows": [], "checks": []})
    # What is there stays until its own model has been measured again.
    by_model = {
        key: {name: [each for each in kept[key] if each["model"] == name] for name in workloads}
        for key in ("checks", "rows")
    }
    part: dict[str, Any] = {"part": "table12", "settings": {"rounds": options.rounds}}
    part |= {key: _joined(found) for key, found in by_model.items()}
    for name, deep in workloads.items():
        if options.models and name not in options.models:
            continue
        checks = []
        whole = replace(deep, targets="all")
        for workload in (whole, deep):
            say(f"table12: checking {name}, {workload.targets}")
            checks.append({"model": name, **child("check", workload=workload.to_dict(), contender="ours")})
        contenders = make(whole, ("floor", "finetune", "finetune-compiled", "ours"))
        contenders["ours-deep"] = contender("ours", deep.build(), deep.batch(0), deep.setting)
        floor = contenders["floor"]
        if isinstance(floor, FloorContender):
            share = whole.forget / whole.samples
            for compiled in (True, False):
                term = RetainTerm(floor.floor, whole.setting, share, DTYPES[dtype], compiled=compiled)
                contenders[term.name] = term
        times = interleaved(
            contenders, whole.batch, warmup=options.warmup, rounds=options.rounds,
            advance=lambda each, name=name: say(f"table12: {name}, timing {each}"),
        )  # fmt: skip
        by_model["checks"][name] = checks
        by_model["rows"][name] = rows_of(contenders, times, whole, model=name)
        part |= {key: _joined(found) for key, found in by_model.items()}
        save(folder, part)
        contenders.clear()
        gc.collect()
        torch._dynamo.reset()
    return part


def measure_full3b(options: Options, folder: Path, say: Say, child: Child = in_child) -> dict[str, Any]:
    """A real step of Qwen2.5-3B, and what ours and the rivals would need, counted on shapes."""
    dtype = chosen_dtype(options.dtype)
    workload = step_slice.tiny(dtype) if options.tiny else full_3b(dtype)
    part: dict[str, Any] = {"part": "full3b", "settings": {"workload": workload.to_dict()}, "rows": []}
    counted = workload if options.tiny else full_3b("bf16")
    for name in ("ours-eager", "ours-teacher-eager", "peft", "paper", "finetune"):
        if options.contenders and name.removesuffix("-eager") not in options.contenders:
            continue
        say(f"full3b: counting {name}")
        found = child("forecast", workload=counted.to_dict(), contender=name)
        row = {key: found[key] for key in ("contender", "weights", "peak", "above_weights", "state")}
        part["rows"].append({"kind": "live storage, fake tensors", **row, "facts": facts(counted)})
        save(folder, part)
    for name in real_steps(options):
        say(f"full3b: a real step of {name}")
        found = child("memory", workload=workload.to_dict(), contender=name, warmup=1, steps=1)
        part["rows"].append({"kind": "resident, measured", **found})
        save(folder, part)
    return part


def real_steps(options: Options) -> tuple[str, ...]:
    """Whose real step of the whole model is measured."""
    if not options.memory:
        return ()
    return ("ours", "ours-eager") if options.compiled else ("ours-eager",)


TOKENS = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
LAYERS = (1, 2, 4, 9, 18, 36)


def growth_points(dtype: str) -> list[tuple[str, int, Workload]]:
    """What is varied, its value, and the workload; one of the three at a time."""
    return [
        *(("tokens", n, narrow(dtype, tokens=n)) for n in TOKENS),
        *(("rank", r, narrow(dtype, rank=r)) for r in RANKS),
        *(("adapted layers", n, narrow(dtype, adapted=n)) for n in LAYERS),
    ]


def measure_growth(options: Options, folder: Path, say: Say, child: Child = in_child) -> dict[str, Any]:
    """Time and memory of our step over tokens, rank and adapted layers; a process for each point."""
    dtype = chosen_dtype(options.dtype)
    points = growth_points(dtype)
    if options.tiny:
        points = [("tokens", n, replace(step_slice.tiny(dtype), length=n)) for n in (8, 16)]
    settings = {"rounds": options.rounds, "compiled": options.compiled}
    part: dict[str, Any] = {"part": "growth", "settings": settings, "rows": []}
    for varied, value, workload in points:
        say(f"growth: {varied} {value}")
        name = "ours" if options.compiled else "ours-eager"
        steps = {"warmup": options.warmup, "steps": options.rounds, "flops": True}
        found = child("memory", workload=workload.to_dict(), contender=name, **steps)
        place = {"varied": varied, "value": value, "tokens": workload.tokens, "rank": workload.rank}
        part["rows"].append({**place, **found})
        save(folder, part)
    return part


def measure_profile(options: Options, folder: Path, say: Say, child: Child = in_child) -> dict[str, Any]:
    """Where the time of our step goes on the slice: torch's profiler, eager, so that every operation has its name."""
    workload = slice_workload(options)
    part: dict[str, Any] = {"part": "profile", "settings": {"workload": workload.to_dict()}, "rows": []}
    for name in ("ours-eager", "ours-teacher-eager"):
        say(f"profile: {name}")
        part["rows"].append(child("profile", workload=workload.to_dict(), contender=name, warmup=options.warmup))
        save(folder, part)
    return part


Measure = Callable[[Options, Path, Say, Child], dict[str, Any]]
PARTS: dict[str, Measure] = {
    "slice": measure_slice,
    "table12": measure_table12,
    "full3b": measure_full3b,
    "growth": measure_growth,
    "profile": measure_profile,
}


def steps_of(part: str, options: Options) -> int:
    """How often a part will say something: the length of its progress bar."""
    each = options.warmup + options.rounds
    if part == "slice":
        wanted = [n for n in step_slice.CONTENDERS if not options.contenders or n in options.contenders]
        apart = len(step_slice.APART) if "finetune" in wanted else 0
        return 2 + each * (len(set(wanted) | {"floor", "ours"}) - ("finetune" in wanted) + apart) + len(wanted)
    if part == "table12":
        return (1 if options.tiny else len(options.models) or 4) * (2 + 7 * each)
    if part in ("full3b", "profile"):
        return 5 + len(real_steps(options)) if part == "full3b" else 2
    return 2 if options.tiny else len(TOKENS) + len(RANKS) + len(LAYERS)


def known(part: str, names: Sequence[str], models: Sequence[str] = (), *, tiny: bool = False) -> None:
    """Refuse a part, contender or model of table12 that is not there.

    Raises:
        ValueError: with the names that are.
    """
    if part not in PARTS:
        raise ValueError(f"parts: got {part!r}, expected some of {', '.join(PARTS)}")
    for name in names:
        if name not in step_slice.CONTENDERS:
            raise ValueError(f"contenders: got {name!r}, expected some of {', '.join(step_slice.CONTENDERS)}")
    there = table12_workloads("fp32", tiny=tiny)
    for name in models:
        if name not in there:
            raise ValueError(f"models: got {name!r}, expected some of {', '.join(there)}")
