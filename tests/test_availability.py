"""The answer to "can Triton run here?" for every combination of device, installation and switch."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rfa_fast.kernels.availability import triton_status

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Stand in for an installation: Triton 9.9, the devices that are named, the switch's value."""

    def arrange(*, interpret: str | None = None, cuda: bool = False, hip: str | None = None, xpu: bool = False) -> None:
        triton = types.ModuleType("triton")
        triton.__version__ = "9.9"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if interpret is not None:
            monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
        monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Some XPU")

    return arrange


@pytest.mark.parametrize(
    ("arrangement", "device_type", "usable", "words"),
    [
        pytest.param({}, "cpu", False, "start Python with TRITON_INTERPRET=1", id="cpu"),
        pytest.param({"interpret": "0"}, "cpu", False, "compiles for GPUs only", id="cpu-switched-off"),
        pytest.param(
            {"interpret": "1"}, "cpu", True, "Triton 9.9 interprets its kernels on the CPU", id="cpu-interpreted"
        ),
        pytest.param({"interpret": "True"}, "cpu", True, "interprets", id="cpu-interpreted-word"),
        pytest.param({}, "cuda", False, "no CUDA or ROCm device", id="cuda-absent"),
        pytest.param({"interpret": "1"}, "cuda", False, "no CUDA or ROCm device", id="cuda-absent-interpreted"),
        pytest.param({"cuda": True}, "cuda", True, "compiles for Some GPU (sm_90)", id="cuda"),
        pytest.param(
            {"cuda": True, "interpret": "1"}, "cuda", True, "interprets its kernels on Some GPU", id="cuda-interpreted"
        ),
        pytest.param({"cuda": True, "hip": "7.1"}, "cuda", True, "Some GPU (ROCm 7.1)", id="rocm"),
        pytest.param({}, "xpu", False, "no XPU device", id="xpu-absent"),
        pytest.param({"xpu": True}, "xpu", True, "compiles for Some XPU (XPU)", id="xpu"),
        pytest.param({"cuda": True, "interpret": "1"}, "mps", False, "does not compile for 'mps'", id="mps"),
    ],
)
def test_every_combination(
    pretend: Pretend, arrangement: dict[str, Any], device_type: str, usable: bool, words: str
) -> None:
    pretend(**arrangement)
    found, sentence = triton_status(device_type)
    assert found is usable
    assert words in sentence
    assert sentence.endswith(".")


def test_the_switch_is_read_at_each_call(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend()
    assert not triton_status("cpu")[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_status("cpu")[0]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        pytest.param(
            ModuleNotFoundError("No module named 'triton'", name="triton"),
            "Triton is not installed; on Linux `pip install triton` brings it.",
            id="absent",
        ),
        pytest.param(
            ModuleNotFoundError("No module named 'numpy'", name="numpy"),
            "Triton is installed but does not import: No module named 'numpy'.",
            id="lacks-a-module",
        ),
        pytest.param(
            ImportError("libtriton.so: bad header"),
            "Triton is installed but does not import: libtriton.so: bad header.",
            id="broken",
        ),
    ],
)
def test_no_usable_triton(monkeypatch: pytest.MonkeyPatch, error: ImportError, sentence: str) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any, **named: Any) -> Any:
        if name == "triton":
            raise error
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert triton_status("cpu") == (False, sentence)


def test_a_device_instead_of_its_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"device_type: got device, expected a string .* pass tensor\.device\.type"):
        triton_status(torch.device("cpu"))  # type: ignore[arg-type]
