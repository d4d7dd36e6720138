"""The real layers that traffic is counted for: ours as the operators launch it, and the unfused sequence.

bf16, rank 8, squared norm, residual mode, x̃ computed inside, every second row (or sample) to be forgotten. On
`device="meta"` nothing is computed, only recorded; on the CPU the interpreter counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from rfa_fast.kernels import autotune, tuning
from torch import Tensor
from traffic import Groups, Item

RANK, SCALE = 8, 4.0
DTYPE = torch.bfloat16
TUNED_FOR = "sm_90"  # whose configurations the traffic is counted for
Run = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a layer's tensors: x, W, y, h in 16 bits; A, B, x̃ in fp32; and the products' work."""

    x: float
    weight: float
    y: float
    hidden: float
    lora_a: float
    lora_b: float
    mean: float
    frozen_flops: float
    down_flops: float
    up_flops: float


@dataclass(frozen=True)
class Unfused:
    """One step of what people run without fused kernels."""

    name: str
    read: float
    written: float
    flops: float = 0.0

    @property
    def moved(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class Layer:
    """A layer, and the largest ratio to the unfused sequence that is promised for it.

    Attributes:
        shape: `(rows, K, N)`, or `(batch, C, N, size)` of a 3×3 convolution with padding 1.
        route: `"fused"` or `"vendor"`, see :class:`rfa_fast.kernels.tuning.Config`.
        forward_bound, backward_bound: of the two passes.
    """

    name: str
    shape: tuple[int, ...]
    forward_bound: float
    backward_bound: float
    bias: bool = False
    route: str = "fused"

    @property
    def convolution(self) -> bool:
        return len(self.shape) == 4

    @property
    def groups(self) -> Groups:
        return Groups(self.shape[0], self.shape[0] // 2)

    @property
    def sizes(self) -> Sizes:
        batch, inputs, outputs = self.shape[:3]
        pixels, taps = (self.shape[3] ** 2, 9) if self.convolution else (1, 1)
        rows = batch * pixels
        return Sizes(
            x=2.0 * rows * inputs, weight=2.0 * outputs * inputs * taps, y=2.0 * rows * outputs,
            hidden=2.0 * rows * RANK, lora_a=4.0 * RANK * inputs * taps, lora_b=4.0 * outputs * RANK,
            mean=4.0 * outputs * pixels, frozen_flops=2.0 * rows * outputs * inputs * taps,
            down_flops=2.0 * rows * RANK * inputs * taps, up_flops=2.0 * rows * RANK * outputs,
        )  # fmt: skip

    @property
    def minimum(self) -> float:
        """x, W and y (of the backward: G, W and dX), each once."""
        s = self.sizes
        return s.x + s.weight + s.y

    def unfused_forward(self) -> list[Unfused]:
        """Seven steps, each a kernel that reads what it needs and writes what it makes."""
        s = self.sizes
        half, bias = s.y / 2, 2.0 * self.shape[2] * self.bias
        return [
            Unfused("frozen: x' = W x + b", s.x + s.weight + bias, s.y, s.frozen_flops),
            Unfused("A: h = A x", s.x + s.lora_a, s.hidden, s.down_flops),
            Unfused("B: Δ = s B h", s.hidden + s.lora_b, s.y, s.up_flops),
            Unfused("add: y = x' + Δ", 2 * s.y, s.y),
            Unfused("x̃: mean of x' over retain", half, s.mean),
            Unfused("Σ‖Δ‖² over retain", half, 4.0),
            Unfused("Σ‖y − x̃‖² over forget", half + s.mean, 4.0),
        ]

    def unfused_backward(self) -> list[Unfused]:
        """Eight steps; a tensor that a later step reads whole is written whole."""
        s = self.sizes
        half = s.y / 2
        return [
            Unfused("forget gradient into G: G' = G + 2c (y − x̃)", s.y + half + s.mean, s.y),
            Unfused("retain gradient into Δ's: G_Δ = G' + 2c Δ", s.y + half, s.y),
            Unfused("G'·W", s.y + s.weight, s.x, s.frozen_flops),
            Unfused("U = s G_Δ·B", s.y + s.lora_b, s.hidden, s.up_flops),
            Unfused("U·A", s.hidden + s.lora_a, s.x, s.down_flops),
            Unfused("add: dX", 2 * s.x, s.x),
            Unfused("dA from U and x", s.hidden + s.x, s.lora_a, s.down_flops),
            Unfused("dB from G_Δ and h", s.y + s.hidden, s.lora_b, s.up_flops),
        ]

    def run(self, device: str) -> tuple[Run, Run]:
        """Forward, and backward given what the forward returned."""
        return self._convolution(device) if self.convolution else self._linear(device)

    def _linear(self, device: str) -> tuple[Run, Run]:
        from rfa_fast.ops.linear import _backward_launchers, _forward_launchers

        m, k, n = self.shape
        x, w, grad = _tensor(device, m, k), _tensor(device, n, k), _tensor(device, m, n)
        a, b = _tensor(device, RANK, k, dtype=torch.float32), _tensor(device, n, RANK, dtype=torch.float32)
        bias, one = _tensor(device, n) if self.bias else None, torch.ones((), device=device)
        group = every_second(m, device)

        def forward() -> Any:
            return _forward_launchers(
                x, w, bias, a, b, group, None, 1, 1, None, 1, 1, None, None, SCALE, False, 1, False
            )

        def backward(out: Any) -> Any:
            return _backward_launchers(
                grad, None, one, one, x, w, a, b, group, out.mean[None], 1, 1, False, None, None, 1, 1, out.hidden,
                out.output, out.retain_norms, out.forget_norms, SCALE, False, 1, True,
            )  # fmt: skip

        return forward, backward

    def _convolution(self, device: str) -> tuple[Run, Run]:
        from rfa_fast.ops.conv2d import _backward_launchers, _forward_launchers

        batch, inputs, outputs, size = self.shape
        x, w = _image(device, batch, inputs, size, size), _image(device, outputs, inputs, 3, 3)
        grad = _image(device, batch, outputs, size, size)
        a, b = (_tensor(device, *shape, dtype=torch.float32) for shape in ((RANK, inputs, 3, 3), (outputs, RANK, 1, 1)))
        group, one = every_second(batch, device), torch.ones((), device=device)
        where: tuple[Any, ...] = ([1, 1], [1, 1, 1, 1], [1, 1], 1)

        def forward() -> Any:
            return _forward_launchers(x, w, None, a, b, *where, group, None, None, SCALE, False, False)

        def backward(out: Any) -> Any:
            return _backward_launchers(
                grad, None, one, one, x, w, a, b, *where, group, out.mean.expand(out.output.shape), False, None,
                out.hidden, out.output, out.retain_norms, out.forget_norms, SCALE, False, True,
            )  # fmt: skip

        return forward, backward


_STAGE3 = (128, 256, 256, 14)
LAYERS = (
    Layer("Qwen2.5-3B gate: linear 2048 → 11008, 2,048 rows", (2048, 2048, 11008), 0.40, 0.5),
    Layer("Qwen2.5-3B down: linear 11008 → 2048, 2,048 rows", (2048, 11008, 2048), 0.80, 0.5),
    Layer("ViT-B, first MLP layer: linear 768 → 3072, 2,048 rows", (2048, 768, 3072), 0.30, 0.5, bias=True),
    Layer("ResNet18 stage 3: 3×3, 256 → 256, 14×14, batch 128, implicit GEMM", _STAGE3, 0.35, 0.5),
    Layer(
        "ResNet18 stage 3: the same, vendor convolution + fused epilogue", _STAGE3, 0.55, 0.5, route="vendor"
    ),
)  # fmt: skip


def every_second(rows: int, device: str) -> Tensor:
    """Group codes 0, 1, 0, 1, …"""
    return (torch.arange(rows, device=device) % 2).to(torch.int8)


@contextmanager
def tuned_for(target: str = TUNED_FOR, route: str = "fused") -> Iterator[None]:
    """Let launchers choose the configurations of a target that is not there, and a route."""
    tuned = autotune.tuned

    def routed(*args: Any, **named: Any) -> Any:
        return replace(tuned(*args, **named), route=route)

    with patch.object(tuning, "target_of", lambda device: target), patch.object(autotune, "tuned", routed):
        yield


def _tensor(device: str, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _image(device: str, *shape: int) -> Tensor:
    return _tensor(device, *shape).contiguous(memory_format=torch.channels_last)


def ratio(ours: list[Item], unfused: list[Unfused]) -> float:
    """Our bytes to theirs."""
    return sum(i.moved for i in ours) / sum(u.moved for u in unfused)
