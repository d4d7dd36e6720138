"""The slice under pytest-benchmark: `pytest benchmarks/bench_step.py`. Never collected with the tests.

pytest-benchmark times one test after the other, which on a machine with other work compares hours rather than
contenders. So the rounds are run here, in turns, and handed to it through a timer of its own kind: each round's
measured duration is what its clock advances by. `make bench` does the same and adds memory, bounds and the page.

Environment: `RFA_BENCH_LENGTH` (tokens per sample, 256), `RFA_BENCH_DTYPE` (auto), `RFA_BENCH_ROUNDS` (5),
`RFA_BENCH_CONTENDERS` (names, all if not set), `RFA_BENCH_TINY` (a model of a few thousand parameters).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import step_slice
from step_parts import Options, slice_workload
from step_run import facts, interleaved, make

NAMES = tuple(os.environ.get("RFA_BENCH_CONTENDERS", "").replace(",", " ").split()) or step_slice.TOGETHER


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


clock = Clock()


@pytest.fixture(scope="module")
def measured():
    options = Options(
        rounds=int(os.environ.get("RFA_BENCH_ROUNDS", "5")),
        dtype=os.environ.get("RFA_BENCH_DTYPE", "auto"),
        length=int(os.environ.get("RFA_BENCH_LENGTH", "256")),
        tiny=bool(os.environ.get("RFA_BENCH_TINY")),
    )
    workload = slice_workload(options)
    contenders = make(workload, [n for n in NAMES if n != "peft-bf16" or workload.dtype == "bf16"])
    times = interleaved(contenders, workload.batch, warmup=options.warmup, rounds=options.rounds)
    return workload, contenders, times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group="slice", timer=clock)
def test_step(name, measured, benchmark):
    workload, contenders, times = measured
    if name not in contenders:
        pytest.skip("bf16 adapters are the model's own dtype only where the model is bf16")
    rounds = iter(times[name])

    def advance():
        clock.now += next(rounds)

    benchmark.extra_info.update(facts(workload), gradient_norm=contenders[name].gradient_norm)
    benchmark.pedantic(advance, rounds=len(times[name]), iterations=1)
