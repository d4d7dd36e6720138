"""An empty folder with networks and images, and a way to run a command in it; imported by the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rfa_fast.cli import app

QUICK = ["--max-steps", "2", "--no-progress", "--rank", "2", "--lr", "0.01", "--no-distances"]

NETS = """
import signal
import torch
from torch import nn

class Net(nn.Module):
    calls = 0
    interrupt_at = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        if self.training is False and torch.is_grad_enabled():
            Net.calls += 1
            if Net.calls == Net.interrupt_at:
                signal.raise_signal(signal.SIGINT)
        return self.fc(self.blocks(x).mean((2, 3)).repeat(1, 4))

def build():
    return Net()

def build_nan():
    net = Net()
    net.fc.weight.data[0] = float("nan")
    return net

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 3))

def broken():
    raise RuntimeError("a defect")

def needs(width):
    return Net()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a module of networks; results default into it."""
    monkeypatch.chdir(tmp_path)
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    (tmp_path / "nets.name").write_text(name)
    generator = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (generator.random((60, 6, 6)) * 60 + 60 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return tmp_path


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second less per page, where the test is not about the page."""
    monkeypatch.setattr("rfa_fast.report_page.draw_plots", lambda scenario, anchor: [])


def nets(place: Path) -> str:
    return (place / "nets.name").read_text()


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result
