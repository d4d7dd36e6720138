"""The contenders of a step: ours, and everything people would use instead, for any model and batch.

| name | what it is |
|---|---|
| `floor` | the bare matrix products of our step (:mod:`rfa_fast.experiments.floor`) |
| `ours`, `ours-teacher` | `patch` and `compile_step`, residual and teacher mode; `-eager`: the same, not compiled |
| `paper` | Fig. 4: a PEFT student, a copied teacher, hooks, full logits; `-compiled` |
| `peft` | PEFT LoRA fine-tuning without RFA, adapters in fp32; `-compiled`; `-bf16`: adapters in bf16 |
| `finetune` | every parameter trained, AdamW, fp32 or bf16 as the model is |

All get the same layers, rank, alpha, AdamW and learning rate. Dropout is off and BatchNorm keeps its statistics in
all of them, which makes the rivals cheaper, not dearer. The frozen weights are shared by all contenders that are made
from one model; only the paper's teacher and the fine-tuned model are copies, because that is what they are.

A contender that was not checked is not a result: :attr:`Contender.gradient_norm` and :meth:`Contender.unmoved`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from rfa_fast.experiments.floor import Floor, floor_of
from rfa_fast.experiments.sharing import quiet, sharing_copy
from rfa_fast.head import logits_of
from rfa_fast.methods.weights import call
from rfa_fast.patching import RFA, patch
from rfa_fast.targets import Targets, select

LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class StepBatch:
    """What one step sees.

    Attributes:
        inputs: a tensor, or a transformers model's keyword dict without labels.
        labels: int64 `(B,)` or `(B, T)`, unshifted.
        forget: bool `(B,)`.
    """

    inputs: Tensor | Mapping[str, Any]
    labels: Tensor
    forget: Tensor


@dataclass(frozen=True)
class Setting:
    """What all contenders share.

    Attributes:
        targets: as :func:`rfa_fast.patch` takes them.
        rank, alpha: of every adapter.
        gamma, weights: of eq. 4-6.
        learning_rate: AdamW's.
    """

    targets: Targets = "deep"
    rank: int = 8
    alpha: float = 32
    gamma: float = 0.5
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    learning_rate: float = LEARNING_RATE


class Contender:
    """One way to do a step: forward, loss, backward, optimiser, gradients freed.

    Args:
        name: its row.
        loss: gives the 0-dim loss of a batch, differentiable.
        parameters: what it trains, by name.
        setting: gives the learning rate.
        compiled: whether `loss` is under torch.compile; graph breaks are counted then.
        note: said beside its row.

    Attributes:
        optimizer: AdamW over `parameters`.
        graph_breaks: in the compilations so far.
        gradient_norm: of all gradients in the first step, read off AdamW's first moment; NaN before it.
    """

    def __init__(
        self,
        name: str,
        loss: Callable[[StepBatch], Tensor] | None,
        parameters: Mapping[str, nn.Parameter],
        setting: Setting,
        *,
        compiled: bool = False,
        note: str = "",
    ) -> None:
        self.name, self.loss, self.compiled, self.note = name, loss, compiled, note
        self.parameters = dict(parameters)
        self.optimizer = torch.optim.AdamW(list(parameters.values()), setting.learning_rate) if parameters else None
        self.graph_breaks = 0
        self.gradient_norm = math.nan
        self._start = {n: p.detach().clone() for n, p in self.parameters.items() if n.endswith("lora_b")}

    def step(self, batch: StepBatch) -> Tensor:
        """The whole step; returns the loss before it, 0-dim and detached."""
        breaks = sum(counters["graph_break"].values())
        total = self._step(batch)
        self.graph_breaks += sum(counters["graph_break"].values()) - breaks
        if math.isnan(self.gradient_norm) and self.optimizer is not None:
            self.gradient_norm = first_gradient_norm(self.optimizer)
        return total.detach()

    def _step(self, batch: StepBatch) -> Tensor:
        if self.loss is None or self.optimizer is None:
            raise ValueError(f"contender {self.name!r}: got neither a loss nor a step of its own")
        total = self.loss(batch)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def unmoved(self) -> list[str]:
        """Matrices B that are still where they started."""
        return [name for name, start in self._start.items() if torch.equal(self.parameters[name].detach(), start)]

    def trainable_elements(self) -> int:
        """How many numbers it trains."""
        return sum(parameter.numel() for parameter in self.parameters.values())


class FloorContender(Contender):
    """The bare products; a batch is not looked at.

    Attributes:
        floor: the products.
    """

    def __init__(self, floor: Floor, setting: Setting, device: torch.device) -> None:
        super().__init__("floor", None, {}, setting)
        self.floor = floor
        floor.prepare(device)

    def _step(self, batch: StepBatch) -> Tensor:
        self.floor.run()
        return torch.zeros(())


class OurContender(Contender):
    """`patch` and `compile_step`.

    Attributes:
        rfa: the handle.
    """

    def __init__(self, name: str, rfa: RFA, setting: Setting, *, compiled: bool, note: str = "") -> None:
        super().__init__(name, None, rfa.named_parameters(), setting, compiled=compiled, note=note)
        self.rfa = rfa
        self._run = step_of(rfa, self.optimizer, compiled=compiled)

    def _step(self, batch: StepBatch) -> Tensor:
        total: Tensor = self._run(batch.inputs, batch.labels, batch.forget).total
        return total


def step_of(rfa: RFA, optimizer: Any, *, compiled: bool) -> Callable[..., Any]:
    """Our step: `(inputs, labels, forget) -> RFALoss`."""
    from rfa_fast.step import compile_step

    step: Callable[..., Any] = compile_step(rfa, optimizer, compile=compiled)
    return step


def first_gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Norm of all gradients of AdamW's first step, `‖m₁‖ / (1 − β₁)`: nobody has to keep the gradients for it."""
    total = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moment = optimizer.state[parameter].get("exp_avg") if parameter in optimizer.state else None
            if moment is not None:
                total += float((torch.linalg.vector_norm(moment.float()) / (1 - group["betas"][0])) ** 2)
    return math.sqrt(total)


def ours(
    model: nn.Module, setting: Setting, *, mode: str = "residual", compiled: bool = True, **options: Any
) -> Contender:
    """Our step on a sharing copy of `model`; `options` are :func:`rfa_fast.patch`'s."""
    name = ("ours" if mode == "residual" else "ours-teacher") + ("" if compiled else "-eager")
    twin = quiet(sharing_copy(model))
    options = {"seed": 0} | options
    rfa = patch(
        twin, setting.targets, rank=setting.rank, alpha=setting.alpha, gamma=setting.gamma, weights=setting.weights,
        mode=mode, **options,
    )  # fmt: skip
    return OurContender(name, rfa, setting, compiled=compiled)


def task_loss(model: nn.Module, batch: StepBatch) -> Tensor:
    """The model's own cross-entropy on every label: what plain fine-tuning minimises."""
    if isinstance(batch.inputs, Mapping):
        found: Tensor = model(**batch.inputs, labels=batch.labels).loss
        return found
    logits, labels = logits_of(call(model, batch.inputs)).float(), batch.labels
    if logits.ndim == 3:  # classes come last here, second in cross_entropy
        logits, labels = logits.flatten(0, 1), labels.flatten()
    return F.cross_entropy(logits, labels)


def finetune(model: nn.Module, setting: Setting, *, compiled: bool = False, in_place: bool = False) -> Contender:
    """Every parameter of a copy of `model` is trained, or with `in_place` of the model itself."""
    own = quiet(model if in_place else copy.deepcopy(model)).requires_grad_(True)

    def loss(batch: StepBatch) -> Tensor:
        return task_loss(own, batch)

    name = "finetune-compiled" if compiled else "finetune"
    used = torch.compile(loss, dynamic=False) if compiled else loss
    return Contender(name, used, dict(own.named_parameters()), setting, compiled=compiled)


def floor(model: nn.Module, batch: StepBatch, setting: Setting) -> FloorContender:
    """The bare products of a step on `batch`."""
    names = [target.name for target in select(model, setting.targets).adapted]
    device = next(model.parameters()).device
    return FloorContender(floor_of(model, batch.inputs, batch.labels, names), setting, device)


def contender(
    name: str,
    model: nn.Module,
    batch: StepBatch,
    setting: Setting,
    *,
    teacher: nn.Module | None = None,
    in_place: bool = False,
) -> Contender:
    """A contender by its name.

    Args:
        name: one of :data:`NAMES`.
        model: unpatched; it stays as it is.
        batch: of the shapes to come.
        setting: what all share.
        teacher: the copy for the paper's arrangement, where several share one; `None` makes it.
        in_place: full fine-tuning trains `model` itself, as it does where it is alone; memory is measured so.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = StepBatch(torch.ones(2, 4), torch.tensor([0, 1]), torch.tensor([False, True]))
        >>> rival = contender("paper", net, batch, Setting("all", rank=2))
        >>> rival.step(batch).ndim, rival.gradient_norm > 0, rival.unmoved()
        (0, True, [])
    """
    from rfa_fast.experiments import rivals_peft

    makers: dict[str, Callable[[], Contender]] = {
        "floor": lambda: floor(model, batch, setting),
        "ours": lambda: ours(model, setting),
        "ours-eager": lambda: ours(model, setting, compiled=False),
        "ours-teacher": lambda: ours(model, setting, mode="teacher"),
        "ours-teacher-eager": lambda: ours(model, setting, mode="teacher", compiled=False),
        "paper": lambda: rivals_peft.paper(model, setting, teacher=teacher),
        "paper-compiled": lambda: rivals_peft.paper(model, setting, teacher=teacher, compiled=True),
        "peft": lambda: rivals_peft.plain(model, setting),
        "peft-compiled": lambda: rivals_peft.plain(model, setting, compiled=True),
        "peft-bf16": lambda: rivals_peft.plain(model, setting, adapter_dtype=torch.bfloat16),
        "finetune": lambda: finetune(model, setting, in_place=in_place),
        "finetune-compiled": lambda: finetune(model, setting, compiled=True, in_place=in_place),
    }
    if name not in makers:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(makers)}")
    return makers[name]()


NAMES: Sequence[str] = (
    "floor", "ours", "ours-eager", "ours-teacher", "ours-teacher-eager", "paper", "paper-compiled", "peft",
    "peft-compiled", "peft-bf16", "finetune", "finetune-compiled",
)  # fmt: skip
