"""What has to happen in a process of its own: a contender's peak of memory, a comparison of losses, a forecast.

`python benchmarks/step_child.py '{"task": "memory", …}'` prints one line of JSON. The resident peak is the kernel's:
`/proc/self/clear_refs` takes a 5 after the warm-up, which sets VmHWM back to what is resident then, and VmHWM is read
after the measured steps. Before that what the compiler left behind is collected and given back (`malloc_trim`), for
every contender alike. Where there is no /proc, resident memory is sampled (:mod:`rfa_fast.metrics.cost`).
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_child(task: str, **spec: Any) -> dict[str, Any]:
    """Run a task in a fresh interpreter.

    Raises:
        RuntimeError: the child failed; its last words are in the message.
    """
    words = [sys.executable, str(Path(__file__).resolve()), json.dumps({"task": task, **spec})]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise RuntimeError(f"{task} of {spec.get('contender', 'a workload')}: got exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def resident(key: str = "VmRSS") -> int | None:
    """Bytes of the process's resident memory (`"VmHWM"`: its peak); `None` without /proc."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def tidy() -> None:
    """Collect garbage and hand freed memory back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def memory(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A contender's peak, its times, and what the process held before the model was there.

    Libraries that this contender needs are imported before that is looked at, and only those.
    """
    _import_what(spec["contender"])
    from step_run import facts
    from step_workloads import Workload

    from rfa_fast.experiments.rivals import contender
    from rfa_fast.experiments.sharing import weight_bytes
    from rfa_fast.metrics.cost import measure

    workload = Workload(**spec["workload"])
    tidy()
    before = resident()
    model = workload.build()
    weights = weight_bytes(model)
    each = contender(spec["contender"], model, workload.batch(0), workload.setting, in_place=True)
    del model
    start = time.perf_counter()
    for index in range(spec["warmup"]):
        each.step(workload.batch(index))
    warmup = time.perf_counter() - start
    tidy()
    seconds = []
    reset = _reset_peak()
    with measure() as cost:
        for index in range(spec["steps"]):
            batch = workload.batch(spec["warmup"] + index)
            start = time.perf_counter()
            each.step(batch)
            seconds.append(time.perf_counter() - start)
    peak, source = (resident("VmHWM"), "VmHWM, reset after the warm-up") if reset else (cost.peak_bytes, cost.source)
    if each.parameters and not each.gradient_norm > 0:
        raise ArithmeticError(f"{each.name}: got a gradient of norm {each.gradient_norm}, expected a step that learns")
    if each.unmoved():
        raise ArithmeticError(f"{each.name}: got {each.unmoved()[0]} where it started, expected every B to have moved")
    return {
        "contender": each.name, "weights": weights, "peak": peak, "before": before, "source": source,
        "above": None if peak is None else peak - weights, "seconds": seconds, "warmup_seconds": warmup,
        "gradient_norm": each.gradient_norm, "facts": facts(workload), **_flops(spec, workload),
    }  # fmt: skip


def _import_what(name: str) -> None:
    wanted = ["transformers"]
    if name.startswith(("paper", "peft")):
        wanted.append("peft")
    if name in ("ours", "ours-teacher") or name.endswith("-compiled"):
        wanted.append("torch._inductor.compile_fx")
    for module in wanted:
        importlib.import_module(module)


def _flops(spec: Mapping[str, Any], workload: Any) -> dict[str, int]:
    """The floor's and the low-rank products' operations, where asked for: 6 · rows · rank · (K + N) per layer."""
    if not spec.get("flops"):
        return {}
    from rfa_fast.experiments.floor import floor_of
    from rfa_fast.targets import select

    model, batch = workload.build(), workload.batch(0)
    names = [target.name for target in select(model, workload.targets).adapted]
    floor, low_rank = floor_of(model, batch.inputs, batch.labels, names), 0
    for name, shape in floor.features.items():
        weight = model.get_submodule(name).weight
        inputs, outputs = weight.numel() // weight.shape[0], weight.shape[0]
        low_rank += 6 * (math.prod(shape) // outputs) * workload.rank * (inputs + outputs)
    return {"flops": floor.flops, "low_rank_flops": low_rank}


def profile(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The operations of one step by their own time, in seconds."""
    from step_run import facts
    from step_workloads import Workload
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from rfa_fast.experiments.rivals import contender

    workload = Workload(**spec["workload"])
    each = contender(spec["contender"], workload.build(), workload.batch(0), workload.setting)
    for index in range(spec["warmup"]):
        each.step(workload.batch(index))
    batch = workload.batch(spec["warmup"])
    with profiled(activities=[ProfilerActivity.CPU]) as found:
        each.step(batch)
    entries = sorted(found.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total = sum(entry.self_cpu_time_total for entry in entries)
    operations = [
        {
            "name": e.key,
            "calls": e.count,
            "seconds": e.self_cpu_time_total / 1e6,
            "share": e.self_cpu_time_total / total,
        }
        for e in entries[:16]
    ]
    return {"contender": each.name, "seconds": total / 1e6, "operations": operations, "facts": facts(workload)}


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return resident("VmHWM") is not None


def check(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Our total against the reference backend's, both against float64, on a reduced workload.

    Raises:
        ArithmeticError: ours is more than twice as far from float64 as the reference in the same dtype.
    """
    import torch
    from step_workloads import DTYPES, Workload

    from rfa_fast.experiments.rivals import contender, ours

    workload = Workload(**spec["workload"]).reduced()
    model, batch, setting = workload.build(), workload.batch(0), workload.setting
    mode = "teacher" if "teacher" in spec["contender"] else "residual"
    each = contender(spec["contender"], model, batch, setting)
    generator = torch.Generator().manual_seed(7)
    moved = {n: p + 0.01 * torch.randn(p.shape, generator=generator).to(p) for n, p in each.parameters.items()}
    totals = []
    for wide in (False, True):
        plain = copy.deepcopy(model).double() if wide else model
        options: dict[str, Any] = {"adapter_dtype": torch.float64} if wide else {}
        other = ours(plain, setting, mode=mode, compiled=False, backend="reference", **options)
        _put(other.parameters, moved)
        inputs = _widened(batch.inputs) if wide else batch.inputs
        with torch.no_grad():
            totals.append(float(other.rfa.loss(inputs, batch.labels, batch.forget).total))
    _put(each.parameters, moved)
    got, (reference, exact) = float(each.step(batch)), totals
    bound = 2 * abs(reference - exact) + torch.finfo(DTYPES[workload.dtype]).eps * abs(exact)
    if not abs(got - exact) <= bound:
        wanted = f"{exact:.7g} within {bound:.3g} (the reference gave {reference:.7g})"
        raise ArithmeticError(f"{each.name}: got a total of {got:.7g}, expected {wanted}")
    return {"contender": each.name, "total": got, "reference": reference, "float64": exact, "bound": bound}


def _put(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def _widened(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


def forecast(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The live-storage peak of a contender under fake tensors; nothing of the model's size is allocated."""
    import torch
    from step_workloads import Workload

    from rfa_fast.experiments.rivals import StepBatch, contender
    from rfa_fast.metrics.forecast import forecast_step

    workload = Workload(**spec["workload"])
    with torch.device("meta"):
        model = workload.build()
    batch = workload.batch(0)

    def build(copied: Any) -> Any:
        each = contender(spec["contender"], copied, batch, workload.setting, in_place=True)
        return lambda inputs, labels, forget: each.step(StepBatch(inputs, labels, forget))

    found = forecast_step(model, build, batch.inputs, batch.labels, batch.forget).to_dict()
    return {"contender": spec["contender"], **found}


TASKS = {"memory": memory, "check": check, "forecast": forecast, "profile": profile}


def main() -> None:
    spec = json.loads(sys.argv[1])
    print(json.dumps(TASKS[spec["task"]](spec)))


if __name__ == "__main__":
    main()
