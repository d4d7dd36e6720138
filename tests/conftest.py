"""What all tests share: Triton's interpreter where there is no GPU to test on, and a Ctrl-C that works."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Decide before anything imports Triton, which reads the variable once, whether kernels are interpreted."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        return
    os.environ.pop("TRITON_INTERPRET", None)
    from rfa_fast.kernels.availability import triton_status

    usable, why = triton_status("cuda")
    if not usable:
        usable, _ = triton_status("xpu")
    if not usable:
        pytest.exit(f"pytest -m gpu needs a GPU that Triton compiles for: {why}", returncode=2)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
