"""Time the fused layers on a GPU against what people would use instead: `make bench-gpu`.

Each row is checked before it is timed: outputs and gradients of both sides against float64, and a non-zero gradient
of B. Timed with Triton's `do_bench` (it flushes the L2 cache and waits for the device), median and quartiles, forward
and forward with backward. Rivals, all in bf16: the unfused sequence on cuBLAS or cuDNN; the same under torch.compile;
PEFT's LoRA layer, which computes no alignment loss at all.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rfa_fast.kernels.availability import triton_status
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from rfa_fast.functional import rfa_conv2d, rfa_linear

QUARTILES = (0.25, 0.5, 0.75)
RANK, SCALE = 8, 4.0


@dataclass(frozen=True)
class Layer:
    """A real layer: its module, and the input it sees; half of the rows or samples are to be forgotten."""

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]


LAYERS = (
    Layer("Qwen2.5-3B gate 2048→11008, 2048 rows", lambda: nn.Linear(2048, 11008, bias=False), (2048, 2048)),
    Layer("Qwen2.5-3B down 11008→2048, 2048 rows", lambda: nn.Linear(11008, 2048, bias=False), (2048, 11008)),
    Layer("ViT-B MLP 768→3072, 2048 rows", lambda: nn.Linear(768, 3072), (2048, 768)),
    Layer(
        "ResNet18 stage 3, 256→256, 3×3, 14×14, batch 128",
        lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False),
        (128, 256, 14, 14),
    ),
)


def operands(layer: Layer, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments; x, A and B take gradients."""
    torch.manual_seed(0)
    module = layer.module().to(device, dtype)
    x = torch.randn(layer.shape, device=device, dtype=dtype)
    if isinstance(module, nn.Conv2d):
        x, module = x.to(memory_format=torch.channels_last), module.to(memory_format=torch.channels_last)
    outputs, inside = module.weight.shape[0], tuple(module.weight.shape[1:])
    a = torch.randn(RANK, *inside, device=device) / 64
    b = torch.randn(outputs, RANK, *([1, 1] if len(inside) == 3 else []), device=device) / 8
    group = (torch.arange(layer.shape[0], device=device) % 2).to(torch.int8)
    arguments = {
        "x": x.requires_grad_(), "weight": module.weight.detach(), "lora_a": a.requires_grad_(),
        "lora_b": b.requires_grad_(), "bias": None if module.bias is None else module.bias.detach(),
        "scale": SCALE, "group": group,
    }  # fmt: skip
    return arguments | ({"padding": 1} if len(inside) == 3 else {})


def steps(layer: Layer, device: str, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
    """Per contender: what gives the scalar to differentiate, and the leaves."""
    arguments = operands(layer, device, dtype)
    operator = rfa_conv2d if len(layer.shape) == 4 else rfa_linear
    leaves = [arguments[name] for name in ("x", "lora_a", "lora_b")]
    upstream: list[Tensor] = []

    def total(output: Tensor, retain: Tensor | None = None, forget: Tensor | None = None) -> Tensor:
        if not upstream:
            upstream.append(torch.randn_like(output))
        value = (output * upstream[0]).sum()
        return value if retain is None or forget is None else value.float() + 1e-3 * retain + 1e-3 * forget

    def ours(backend: str) -> Tensor:
        out = operator(**arguments, backend=backend)
        return total(out.output, out.retain_loss, out.forget_loss)

    compiled = torch.compile(lambda: ours("torch"), fullgraph=True)
    peft = peft_layer(layer, device, dtype)
    return {
        "ours": lambda: (ours("triton"), leaves),
        "unfused": lambda: (ours("reference"), leaves),
        "unfused, compiled": lambda: (compiled(), leaves),
        "PEFT LoRA, no RFA": lambda: (total(peft(arguments["x"])), [arguments["x"], *_trainable(peft)]),
    }


def _trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def peft_layer(layer: Layer, device: str, dtype: torch.dtype) -> nn.Module:
    """The same layer under PEFT, adapters in fp32."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(layer.module().to(device, dtype))
    wrapped: nn.Module = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["0"]))
    for parameter in _trainable(wrapped):
        parameter.data = parameter.data.float()
    return wrapped


def _widened(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(layer: Layer, device: str, dtype: torch.dtype) -> None:
    """Raise unless our result is at most twice as far from float64 as torch's own in this dtype."""
    arguments = operands(layer, device, dtype)
    operator = rfa_conv2d if len(layer.shape) == 4 else rfa_linear
    results = []
    for wide, backend in ((True, "reference"), (False, "reference"), (False, "triton")):
        named = {k: _widened(v) if wide else v for k, v in arguments.items()}
        leaves = [named[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
        out = operator(**named, backend=backend)
        value = out.output.double().square().mean() + 1e-3 * out.retain_loss.double() + 1e-3 * out.forget_loss.double()
        results.append([out.output, out.retain_loss, out.forget_loss, *torch.autograd.grad(value, leaves)])
    for name, exact, theirs, ours in zip(("y", "retain", "forget", "dx", "dA", "dB"), *results, strict=True):
        errors = [float((t.double() - exact).detach().abs().max()) for t in (ours, theirs)]
        bound = 2 * errors[1] + torch.finfo(dtype).eps * float(exact.abs().max())
        if not errors[0] <= bound:
            raise ArithmeticError(
                f"{layer.name}, {name}: got an error of {errors[0]:.3g}, expected at most {bound:.3g}"
            )
        if name == "dB" and not float(ours.float().norm()) > 0:
            raise ArithmeticError(f"{layer.name}: got a gradient of B of norm 0, expected a layer that learns")


def measure(call: Callable[[], tuple[Tensor, list[Tensor]]], *, backward: bool) -> list[float]:
    """Quartiles in milliseconds."""
    from triton.testing import do_bench

    def once() -> None:
        value, leaves = call()
        if backward:
            torch.autograd.grad(value, leaves)

    times = do_bench(once, warmup=100, rep=400, quantiles=list(QUARTILES))
    return [float(t) for t in times]


def main(
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON, too.")] = None,
    only: Annotated[str, typer.Option(help="Time only layers whose name contains this.")] = "",
) -> None:
    """Time the fused layers against cuBLAS/cuDNN unfused, torch.compile and PEFT on this machine's GPU."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() or not torch.xpu.is_available() else "xpu"
    usable, why = triton_status(device)
    if not usable:
        console.print(f"bench-gpu needs a GPU that Triton compiles for: {why}", style="red", markup=False)
        raise typer.Exit(2)
    dtype, rows = torch.bfloat16, []
    chosen = [layer for layer in LAYERS if only in layer.name]
    with Progress(console=console) as progress:
        task = progress.add_task("Timing", total=8 * len(chosen))
        for layer in chosen:
            check(layer, device, dtype)
            for backward in (False, True):
                for name, call in steps(layer, device, dtype).items():
                    quartiles = measure(call, backward=backward)
                    rows.append({"layer": layer.name, "backward": backward, "contender": name, "ms": quartiles})
                    progress.advance(task)
    table = Table(title=f"bf16, rank {RANK}, half forget; milliseconds, median (quartiles); {why}")
    for heading in ("Layer", "Pass", "Contender", "ms", "to ours"):
        table.add_column(heading)
    for row in rows:
        place = (row["layer"], row["backward"], "ours")
        own = next(r["ms"] for r in rows if (r["layer"], r["backward"], r["contender"]) == place)
        low, middle, high = row["ms"]
        ratio = middle / own[1]
        passed = "forward + backward" if row["backward"] else "forward"
        table.add_row(row["layer"], passed, row["contender"], f"{middle:.3f} ({low:.3f}–{high:.3f})", f"{ratio:.2f}")
    console.print(table)
    if output is not None:
        facts = {"device": why, "torch": torch.__version__, "python": platform.python_version(), "rows": rows}
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        console.print(f"Written: {output}")


if __name__ == "__main__":
    typer.run(main)
