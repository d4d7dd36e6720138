"""What `patch(vocabulary_skip=…)` changes and saves on a real language model, SmolLM2-135M on trivia.

The gradient of one step with blocks of the vocabulary skipped, against the same step without; beside it what the
model's own bf16 changes against fp32. Every token counts as a label, so that the head has rows to work on.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rfa_fast import patch
from rfa_fast.data import collate_text
from rfa_fast.experiments import smollm2
from rfa_fast.experiments.comparison import Request
from rfa_fast.objective import IGNORED_LABEL
from rfa_fast.ops import head

SKIPS = (0.0, 2**-16, 2**-12, 2**-10, 2**-8, 2**-6)


@contextmanager
def counted(blocks: list[tuple[int, int]]) -> Iterator[None]:
    """Note of every backward product that may skip how many blocks it took, and of how many."""
    original = head._used

    def noting(parts: Tensor, rest: Tensor, skip: float) -> Tensor:
        used = original(parts, rest, skip)
        blocks.append((len(used), parts.shape[1]))
        return used

    head._used = noting
    try:
        yield
    finally:
        head._used = original


class Step:
    """Forward, loss and backward of one batch, without an update: every call gives the same gradient."""

    def __init__(self, model: nn.Module, skip: float, batch: tuple[dict[str, Tensor], Tensor, Tensor]) -> None:
        self.rfa, self.batch = patch(model, targets="deep", vocabulary_skip=skip, seed=0), batch
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.rfa.named_parameters().items():
            if name.endswith("lora_b"):
                parameter.data.normal_(0, 0.01, generator=generator)

    def __call__(self) -> Tensor:
        self.rfa.loss(*self.batch).total.backward()
        parameters = self.rfa.named_parameters().values()
        found = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        return found


def batch_of(samples: int) -> tuple[nn.Module, tuple[dict[str, Tensor], Tensor, Tensor]]:
    """The model in fp32 and a batch of whole questions and answers, half of it to be forgotten."""
    made = smollm2.experiment(Request(scenarios=("class:starwars",)))
    size = len(made.train)  # type: ignore[arg-type]
    inputs = collate_text([made.train[i * size // samples] for i in range(samples)])
    inputs.pop("labels")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
    return made.build().eval(), (inputs, labels, torch.arange(samples) % 2 == 0)


def main(
    samples: Annotated[int, typer.Option(min=2, help="Of the batch.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each setting, in turns.")] = 7,
) -> None:
    """Print the table."""
    model, batch = batch_of(samples)
    rows = int((batch[1][:, 1:] != IGNORED_LABEL).sum())
    exact = Step(copy.deepcopy(model), 0.0, batch)()
    model = model.to(torch.bfloat16)
    steps = {skip: Step(copy.deepcopy(model), skip, batch) for skip in SKIPS}
    gradients: dict[float, Tensor] = {}
    shares: dict[float, float] = {}
    for skip, step in steps.items():
        blocks: list[tuple[int, int]] = []
        with counted(blocks):
            gradients[skip] = step()
        shares[skip] = sum(used for used, _ in blocks) / sum(whole for _, whole in blocks) if blocks else 1.0
    seconds: dict[float, list[float]] = {skip: [] for skip in SKIPS}
    for _ in range(rounds):
        for skip, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[skip].append(time.perf_counter() - begun)
    show(rows, exact, gradients, shares, seconds)


def show(
    rows: int, exact: Tensor, gradients: dict[float, Tensor], shares: dict[float, float], seconds: dict[float, Any]
) -> None:
    """Errors relative to the norm of what is compared with."""
    whole = gradients[0.0]
    table = Table(title=f"vocabulary_skip, SmolLM2-135M in bf16, {rows} labelled tokens, 49,152 tokens to predict")
    for heading in ("skip", "blocks in the backward", "change of the gradient", "step / step without"):
        table.add_column(heading, justify="right")
    usual = statistics.median(seconds[0.0])
    for skip, gradient in gradients.items():
        change = float((gradient - whole).norm() / whole.norm())
        ratio = statistics.median(seconds[skip]) / usual
        table.add_row(f"{skip:.1e}" if skip else "0", f"{shares[skip]:.1%}", f"{change:.1e}", f"{ratio:.3f}")
    console = Console()
    console.print(table)
    rounding = float((whole - exact).norm() / exact.norm())
    console.print(f"bf16 itself changes the gradient by {rounding:.1e} against fp32. A step takes {usual:.2f} s.")


if __name__ == "__main__":
    typer.run(main)
