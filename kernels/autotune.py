"""Measure which configuration is fastest on this device, once, and remember it.

Off by default: the tables of :mod:`rfa_fast.kernels.tuning` are used as they are. With `RFA_FAST_AUTOTUNE=1`
the first call of a kernel for a layer's shape times every candidate, the vendor's own product with small
kernels around it among them, and the winner is kept in `tuning.json` under `$RFA_FAST_CACHE`, else
`~/.cache/rfa-fast`. A result belongs to a capability, a Triton version, a dtype and a layer's sizes; the
number of rows has no part in it, so that a batch of another size neither measures nor compiles anew.
Nothing is measured while torch.compile traces: run one eager step first, or tuned shapes from an earlier run.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rfa_fast.kernels.tuning import GENERIC, Config, candidates, choose, target_of
from torch import Tensor

SWITCH = "RFA_FAST_AUTOTUNE"
# Besides "fused": what else a kernel can be asked to do with the same result.
ROUTES = {
    "linear_forward": ("vendor", "single"),
    "linear_input_gradient": ("vendor",),
    "conv2d_forward": ("vendor", "split"),
    "conv2d_input_gradient": ("vendor",),
}
Timer = Callable[[Callable[[], Any]], float]
_known: dict[Path, dict[str, Config]] = {}


def switched_on() -> bool:
    """Whether `RFA_FAST_AUTOTUNE` asks for measurements.

    Example:
        >>> import os
        >>> os.environ.get("RFA_FAST_AUTOTUNE") in ("1", "on", "true", "yes") or not switched_on()
        True
    """
    return os.environ.get(SWITCH, "").strip().lower() in ("1", "on", "true", "yes")


def tuning_file() -> Path:
    """Where results are kept.

    Example:
        >>> tuning_file().name
        'tuning.json'
    """
    folder = os.environ.get("RFA_FAST_CACHE") or "~/.cache/rfa-fast"
    return Path(folder).expanduser() / "tuning.json"


def contenders(kernel: str, device: torch.device, dtype: torch.dtype, *widths: int) -> tuple[Config, ...]:
    """Every configuration worth timing: the one that runs untuned, the table's, and the first on each other route.

    Args:
        widths: as of :func:`rfa_fast.kernels.tuning.choose`.

    Example:
        >>> [c.route for c in contenders("linear_input_gradient", torch.device("cpu"), torch.bfloat16)]
        ['fused', 'vendor']
    """
    default = choose(kernel, device, dtype, *widths)
    table = candidates(kernel, target_of(device))
    if dtype.itemsize == 4:
        table = tuple(replace(c, block_k=c.block_k // 2) if c.block_k > 16 else c for c in table)
    routes = tuple(replace(default, route=route) for route in ROUTES.get(kernel, ()) if route != default.route)
    return tuple(dict.fromkeys((default, *table, *routes)))


def tuned(
    kernel: str,
    sample: Tensor,
    sizes: Mapping[str, int],
    run: Callable[[Config], Any],
    *,
    timer: Timer | None = None,
) -> Config:
    """The configuration to run a kernel with: the table's, or the measured one where that is asked for.

    Args:
        kernel: a key of the tables.
        sample: the layer's input; its device and dtype are looked at, and whether it has data.
        sizes: what the choice depends on besides, such as `{"N": 11008, "K": 2048, "R": 8}`.
        run: does the whole of what is compared, with one configuration.
        timer: milliseconds of a call; `None`: Triton's `do_bench`, the median.

    Raises:
        RuntimeError: no candidate runs on this device.

    Example:
        >>> tuned("linear_forward", torch.zeros(1), {"N": 8}, print).route
        'fused'
    """
    widths = [sizes[name] for name in ("N", "K", "C") if name in sizes]
    default = choose(kernel, sample.device, sample.dtype, *widths)
    if not switched_on():
        return default
    import triton

    file = tuning_file()
    if file not in _known:
        _known[file] = _read(file)
    key = "/".join(
        [_capability(sample.device), f"triton-{triton.__version__}", kernel, str(sample.dtype).removeprefix("torch.")]
        + [f"{name}={size}" for name, size in sizes.items()]
    )
    if key not in _known[file]:
        if (sample.device.type == "cpu" and timer is None) or not _has_data(sample):
            return default
        times = _times(contenders(kernel, sample.device, sample.dtype, *widths), run, timer or _median)
        _known[file][key] = min(times, key=times.__getitem__)
        _write(file, key, _known[file][key])
    return _known[file][key]


def _capability(device: torch.device) -> str:
    """More exact than the tables' targets: an unlisted GPU's results must not be another's."""
    name = target_of(device)
    if name != GENERIC or device.type != "cuda":
        return name if device.type != "xpu" else f"xpu-{torch.xpu.get_device_name(device)}"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _has_data(sample: Tensor) -> bool:
    """Not a fake or functional tensor of a trace."""
    return type(sample) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _median(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def _times(configs: tuple[Config, ...], run: Callable[[Config], Any], timer: Timer) -> dict[Config, float]:
    from triton.runtime.errors import OutOfResources

    times, reasons = {}, []
    for config in configs:
        try:
            times[config] = timer(lambda config=config: run(config))  # type: ignore[misc]
        except OutOfResources as error:  # a card with less shared memory than its table's
            reasons.append(f"{config}: {error}")
    if not times:
        raise RuntimeError(f"no configuration runs on this device: {'; '.join(reasons)}")
    return times


def _read(file: Path) -> dict[str, Config]:
    if not file.exists():
        return {}
    try:
        return {key: Config(**fields) for key, fields in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file}: cannot be read ({error}); kernels are measured again", stacklevel=2)
        return {}


def _write(file: Path, key: str, config: Config) -> None:
    """Add one result to what the file holds by now: several processes may be tuning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        results = {**_read(file), **_known[file], key: config}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            json.dump({name: asdict(each) for name, each in sorted(results.items())}, part, indent=1)
        os.replace(part.name, file)
    except OSError as error:
        warnings.warn(f"{file}: cannot be written ({error}); the measurement holds for this process", stacklevel=2)
