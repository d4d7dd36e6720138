"""What `RFA.report()` shows: the adapted layers, the others, and the reason for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rfa_fast.modules import RFALayer
from rfa_fast.targets import Plan, Skipped


@dataclass(frozen=True)
class AdaptedRow:
    """A line of :class:`Report`: an adapted layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    parameters: int


@dataclass(frozen=True)
class Report:
    """Which layers are adapted, which are not, and why; `print(report)` shows it as a table.

    Example:
        >>> import rfa_fast
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Embedding(4, 3))
        >>> print(rfa_fast.patch(net, ["0"], rank=2, backend="torch").report())  # doctest: +ELLIPSIS
        1 layers adapted, 14 trainable parameters (51.85 % of the model)
        backend: torch ...
          0...linear  3×4 ...rank 2   scale 16
    """

    adapted: tuple[AdaptedRow, ...]
    skipped: tuple[Skipped, ...]
    backend: str
    frozen_parameters: int

    def __str__(self) -> str:
        trainable = sum(row.parameters for row in self.adapted)
        share = 100 * trainable / max(self.frozen_parameters, 1)
        width = max((len(row.name) for row in self.adapted), default=0)
        width = max(width, *(len(skip.name) for skip in self.skipped), 0)
        lines = [f"{len(self.adapted)} layers adapted, {trainable:,} trainable parameters ({share:.2f} % of the model)"]
        lines.append(f"backend: {self.backend}")
        for row in self.adapted:
            shape = "×".join(map(str, row.shape))
            lines.append(f"  {row.name:<{width}}  {row.kind:<7} {shape:<14} rank {row.rank:<3} scale {row.scale:g}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} layers left as they are")
            lines += [f"  {skip.name:<{width}}  {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)


def describe(model: nn.Module, plan: Plan, layers: Mapping[str, RFALayer], backend: str) -> Report:
    """The report of a patched model.

    Args:
        model: the patched model.
        plan: what was selected.
        layers: the adapted layers by name.
        backend: a line on the backend in use.
    """
    kinds = {target.name: target.kind for target in plan.adapted}
    rows = tuple(
        AdaptedRow(
            name,
            kinds[name],
            tuple(layer.weight.shape),
            layer.rank,
            layer.scale,
            sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad),
        )
        for name, layer in layers.items()
    )
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Report(rows, plan.skipped, backend, frozen)
