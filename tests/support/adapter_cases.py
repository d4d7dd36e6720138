"""Models with moved adapters, and PEFT's own loader; imported by the tests of adapters through the file system."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import rfa_fast


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6, bias=False))


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype).eval()


def train(rfa: rfa_fast.RFA) -> rfa_fast.RFA:
    """Stand in for training: every trainable tensor moves, differently in each layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return rfa


def read_by_peft(model: nn.Module, folder: Path) -> peft.PeftModel:
    """PEFT's own loader, with its warnings about missing or unexpected keys as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def adapted_by_peft(model: peft.PeftModel) -> dict[str, float]:
    """Layer name -> scale."""
    layers = model.base_model.model.named_modules()
    return {n: m.scaling["default"] for n, m in layers if isinstance(m, peft.tuners.lora.LoraLayer)}
