"""The compiled half of the kernel sheet: every kernel, every configuration in the tables, every target.

A job is one kernel with one configuration on one target; it compiles all cases and keeps the worst of them. Runs in
processes without `TRITON_INTERPRET`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from cases import BY_ALIGNMENT, CASES, MATRIX_KERNELS, RANKLESS, RANKS, UNALIGNED
from compiling import MATRIX_INSTRUCTIONS, Compiled, capture, compile_launch
from occupancy import LIMITS, occupancy
from rfa_fast.kernels.tuning import TABLES, TARGETS, Config, candidates, exact
from triton.errors import TritonError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One kernel, configuration and target. `generic`: what unaligned sizes and fp32 operands take there."""

    kernel: str
    target: str
    index: int
    generic: bool = False

    def config(self, dtype: str) -> Config:
        """The configuration on operands of a dtype."""
        if dtype == "fp32":
            return exact(self.kernel, self.target)
        return candidates(self.kernel, self.target, aligned=not self.generic)[self.index]

    def shown(self, dtype: str) -> str:
        """The configuration in words."""
        c = self.config(dtype)
        tile = " × ".join(str(size) for size in (c.block_m, c.block_n, c.block_k) if size)
        return f"{tile}, {c.warps} warps, {c.stages} {'stage' if c.stages == 1 else 'stages'}"


@dataclass
class Row:
    """The worst of a job's cases in one dtype; `spills` names those that spill."""

    kernel: str
    target: str
    config: str
    dtype: str
    generic: bool
    cases: int
    registers: tuple[int, int]
    spilled: int
    shared: int
    blocks: int
    occupancy: float
    bound_by: str
    instructions: dict[str, int]
    spills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def jobs(kernels: Sequence[str], targets: Sequence[str]) -> list[Job]:
    """Every job of these kernels and targets, the longest kernels first."""
    found = []
    for kernel in sorted(kernels, key=lambda name: name not in MATRIX_KERNELS):
        for target in targets:
            own = target in TABLES[kernel]
            found += [Job(kernel, target, i) for i in range(len(candidates(kernel, target)))] if own else []
            generic = candidates(kernel, target, aligned=False)
            found += [Job(kernel, target, i, generic=True) for i in range(len(generic))]
    return found


def compile_job(job: Job, *, only: Sequence[str] = ()) -> list[Row]:
    """Compile every case of a job.

    Args:
        only: dtypes to compile; all by default.

    Raises:
        RuntimeError: a case that does not compile, by name.
    """
    rows = []
    for name, dtype in DTYPES.items():
        if (only and name not in only) or (name == "fp32" and not job.generic):
            continue
        config = job.config(name)
        built = {}
        for rank in RANKS if name == "bf16" and job.kernel not in RANKLESS else RANKS[:1]:
            for case, run in CASES[job.kernel](config, dtype, rank).items():
                if _takes(job, case, name):
                    built[f"{case}, rank {rank}"] = _compile(job, case, name, run)
        if built:
            rows.append(_row(job, name, built))
    return rows


def _takes(job: Job, case: str, dtype: str) -> bool:
    """Whether a case would ever run with this job's configuration: the rule of `tuning.choose`."""
    if job.target not in TABLES[job.kernel] or dtype == "fp32":
        return True
    if job.kernel not in BY_ALIGNMENT:
        return not job.generic
    return case.startswith(UNALIGNED) == job.generic


def _compile(job: Job, case: str, dtype: str, run: object) -> Compiled:
    launches = capture(run)  # type: ignore[arg-type]
    if len(launches) != 1:
        raise RuntimeError(f"{job.kernel}, {case}: got {[x.name for x in launches]}, expected one launch")
    try:
        return compile_launch(launches[0], job.target)
    except (TritonError, RuntimeError) as error:
        where = f"{job.kernel} ({case}, {dtype}) with {job.shown(dtype)} on {job.target}"
        raise RuntimeError(f"{where} does not compile: {type(error).__name__}: {error}") from error


def _row(job: Job, dtype: str, built: dict[str, Compiled]) -> Row:
    fits = [occupancy(c.target, c.registers, c.shared, c.threads) for c in built.values()]
    worst = min(fits, key=lambda fit: fit.share)
    registers = [c.registers for c in built.values()]
    instructions: dict[str, int] = {}
    for one in built.values():
        if one.instruction:
            instructions[one.instruction] = instructions.get(one.instruction, 0) + 1
    row = Row(
        job.kernel, job.target, job.shown(dtype), dtype, job.generic, len(built), (min(registers), max(registers)),
        max(c.spilled for c in built.values()), max(c.shared for c in built.values()), worst.blocks, worst.share,
        worst.bound_by, instructions, [name for name, c in built.items() if c.spilled],
    )  # fmt: skip
    place = f"{job.kernel}, {job.target}, {job.shown(dtype)}, {dtype}"
    row.faults += [f"{place}: spills {c.spilled} bytes ({name})" for name, c in built.items() if c.spilled]
    limit = LIMITS[job.target].shared_per_block
    row.faults += [
        f"{place}: needs {c.shared} bytes of shared memory, {job.target} has {limit} ({name})"
        for name, c in built.items()
        if c.shared > limit
    ]
    if job.kernel in MATRIX_KERNELS and dtype != "fp32":
        own, pattern = MATRIX_INSTRUCTIONS[job.target]
        row.faults += [
            f"{place}: no {own} instruction ({name})"
            for name, c in built.items()
            if not pattern.fullmatch(c.instruction)
        ]
    return row


def table_faults(kernels: Sequence[str], targets: Sequence[str]) -> list[str]:
    """What is wrong with the tables: too few configurations, none that is large, a kernel nobody compiles."""
    faults = [f"tuning table {name!r} has no case in benchmarks/cases.py" for name in TABLES if name not in CASES]
    for kernel in MATRIX_KERNELS:
        for target in TARGETS:
            if kernel not in kernels or target not in targets:
                continue
            table = candidates(kernel, target)
            large = any(c.block_m * c.block_n >= 128 * 128 and c.warps == 8 for c in table)
            if len(table) < 2 or not large:
                faults.append(f"{kernel}, {target}: got {len(table)} configurations, expected 2, one of them large")
    return faults
