"""Whether Triton can run for tensors on a device, and the sentence that says why or why not.

The package must import, and be useful, where Triton was never installed: macOS, Windows, CPU wheels.
So nothing here runs at import, and the question is asked anew at each call: a test sets
`TRITON_INTERPRET` and a notebook gains a device without either being frozen into a module constant.
The price is a dictionary look-up and a driver query per call, so callers ask once per model or once
per report, not once per step.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

_TRUE = frozenset({"1", "on", "true", "y", "yes"})  # what Triton itself takes for a yes
_COMPILED_FOR = ("cuda", "xpu")  # torch calls ROCm's devices "cuda" as well


def triton_status(device_type: str) -> tuple[bool, str]:
    """Say whether Triton kernels can run on tensors of a device type.

    Args:
        device_type: `tensor.device.type`: `"cpu"`, `"cuda"` (ROCm too), `"xpu"`, `"mps"`, …

    Returns:
        `(usable, sentence)`. The sentence is for people: what was found, or what is missing and how
        to get it.

    Raises:
        TypeError: `device_type` is not a string.

    Example:
        >>> usable, sentence = triton_status("mps")
        >>> usable
        False
        >>> print(sentence)
        Triton does not compile for 'mps' tensors, only for 'cuda' and 'xpu'.
    """
    if not isinstance(device_type, str):
        raise TypeError(
            f"device_type: got {type(device_type).__name__}, expected a string such as 'cuda'; pass tensor.device.type"
        )
    if device_type not in ("cpu", *_COMPILED_FOR):
        expected = " and ".join(repr(name) for name in _COMPILED_FOR)
        return False, f"Triton does not compile for {device_type!r} tensors, only for {expected}."
    triton, problem = _import_triton()
    if triton is None:
        return False, problem
    name = f"Triton {triton.__version__}"
    found, device = _device(device_type)
    if not found:
        return False, f"{name} is installed, but {device}."
    if interpreting():
        return True, f"{name} interprets its kernels on {device} (TRITON_INTERPRET is set): exact enough to test, slow."
    if device_type == "cpu":
        return False, (
            f"{name} compiles for GPUs only; to run its kernels on CPU tensors, slowly, "
            "start Python with TRITON_INTERPRET=1."
        )
    return True, f"{name} compiles for {device}."


def interpreting() -> bool:
    """Whether Triton's interpreter is switched on; it has to be before the first kernel is imported.

    Example:
        >>> isinstance(interpreting(), bool)
        True
    """
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in _TRUE


def _import_triton() -> tuple[ModuleType | None, str]:
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return None, "Triton is not installed; on Linux `pip install triton` brings it."
        return None, f"Triton is installed but does not import: {error}."
    except ImportError as error:
        return None, f"Triton is installed but does not import: {error}."
    return triton, ""


def _device(device_type: str) -> tuple[bool, str]:
    """Whether torch has such a device here, and its name or the reason."""
    if device_type == "cpu":
        return True, "the CPU"
    if device_type == "xpu":
        if not torch.xpu.is_available():
            return False, "torch finds no XPU device here"
        return True, f"{torch.xpu.get_device_name()} (XPU)"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA or ROCm device here"
    if torch.version.hip is not None:
        return True, f"{torch.cuda.get_device_name()} (ROCm {torch.version.hip})"
    major, minor = torch.cuda.get_device_capability()
    return True, f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
