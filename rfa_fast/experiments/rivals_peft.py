"""The contenders that PEFT makes: the paper's arrangement (Fig. 4), and LoRA fine-tuning without RFA.

The paper's arrangement, as its Fig. 4 draws it and as one writes it in plain torch: a student with PEFT's LoRA on the
layers to align, the original model as a teacher beside it (a copy), forward hooks on every one of those layers of
both, and the losses on what the hooks caught:

    L_r = mean over retain of ‖y − x'_t‖²       eq. 7
    L_f = mean over forget of ‖y − x̃_t‖²        eq. 8, x̃_t the mean over retain of the teacher's feature
    total = γ/m · (α Σ L_r + β Σ L_f) + (1 − γ) · (λ CE(retain, label) + μ CE(forget, ỹ))      eq. 4-6

Squares are averaged over the feature's elements, as `norm="mse"` does. Features stay in the model's dtype, logits
are complete and go to fp32 for the cross-entropies, as transformers does it. Rows are chosen by index, so that the
rival pays for the rows of a term only; the indices are made outside of what is compiled.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_fast.config import RFAConfig
from rfa_fast.experiments.rivals import Contender, Setting, StepBatch, task_loss
from rfa_fast.experiments.sharing import labelled_rows, quiet, sharing_copy
from rfa_fast.head import logits_of, predicts_next_token
from rfa_fast.methods.weights import call
from rfa_fast.padding import batch_of
from rfa_fast.ranks import fit_ranks
from rfa_fast.targets import select


@dataclass(frozen=True)
class Rows:
    """Which rows belong to which term; int64 indices.

    Attributes:
        retain, forget: samples, of B.
        retain_tokens, forget_tokens: valid tokens of B·T; `None` where inputs are no tokens.
        retain_labels, forget_labels: rows of the flattened logits that have a label.
        targets: the labels of `retain_labels`.
        length: T, or `None`.
    """

    retain: Tensor
    forget: Tensor
    retain_tokens: Tensor | None
    forget_tokens: Tensor | None
    retain_labels: Tensor
    forget_labels: Tensor
    targets: Tensor
    length: int | None


def rows_of(batch: StepBatch, model: nn.Module) -> Rows:
    """The indices of a batch.

    Example:
        >>> batch = StepBatch(torch.ones(3, 2), torch.tensor([4, 5, 6]), torch.tensor([False, True, False]))
        >>> rows = rows_of(batch, nn.Linear(2, 7))
        >>> rows.retain, rows.forget, rows.targets
        (tensor([0, 2]), tensor([1]), tensor([4, 6]))
    """
    forget, labels = batch.forget, batch.labels
    _, length, mask = batch_of(batch.inputs)
    tokens: tuple[Tensor | None, Tensor | None] = (None, None)
    valid = torch.ones(len(forget), length or 1, dtype=torch.bool, device=forget.device) if mask is None else mask
    if length is not None:
        tokens = (_index(valid & ~forget[:, None]), _index(valid & forget[:, None]))
    if labels.ndim == 2:
        shifted = labels
        used = torch.where(valid, labels, -100) if length is not None else labels
        labelled = labelled_rows(model, used)
        if predicts_next_token(model):
            shifted = torch.cat([labels[:, 1:], labels[:, :1]], 1)
        if length is not None:
            labelled = labelled & valid
        kept = labelled & ~forget[:, None]
        labels_at, targets = (_index(kept), _index(labelled & forget[:, None])), shifted[kept]
    else:
        labelled = labels != -100
        labels_at, targets = (_index(labelled & ~forget), _index(labelled & forget)), labels[labelled & ~forget]
    return Rows(_index(~forget), _index(forget), *tokens, *labels_at, targets, length)


def _index(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def student_of(model: nn.Module, setting: Setting, adapter_dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's LoRA on our layers, with our ranks, on a sharing copy of `model`, in eval mode.

    Raises:
        TypeError: adapters in a dtype that is neither fp32 nor the model's.
    """
    from peft import LoraConfig, get_peft_model

    own = next(model.parameters()).dtype
    if adapter_dtype not in (torch.float32, own):
        raise TypeError(f"adapter_dtype: got {adapter_dtype}, expected torch.float32 or the model's {own}")
    plan = select(model, setting.targets)
    fitted = fit_ranks(model, plan, RFAConfig(rank=setting.rank, alpha=setting.alpha))
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,  # type: ignore[arg-type]
        target_modules="|".join(re.escape(target.name) for target in plan.adapted),
        rank_pattern={re.escape(name): rank for name, rank in fitted.rank_pattern.items()},
        alpha_pattern={re.escape(name): alpha for name, alpha in fitted.alpha_pattern.items()},
    )
    with warnings.catch_warnings():
        # transformers' transposed Conv1D and a Linear in one model: PEFT settles it layer by layer and warns.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        twin: Any = sharing_copy(model)
        student: nn.Module = get_peft_model(twin, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    return quiet(student)


def adapters_of(student: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trainable tensors under our names: `"layer4.0.conv1.lora_b"`."""
    found = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            found[plain.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = parameter
    return found


def plain(
    model: nn.Module, setting: Setting, *, compiled: bool = False, adapter_dtype: torch.dtype = torch.float32
) -> Contender:
    """PEFT LoRA fine-tuning on the model's own loss, every label, no RFA."""
    student = student_of(model, setting, adapter_dtype)
    inside: Any = student.base_model

    def loss(batch: StepBatch) -> Tensor:
        return task_loss(inside, batch)

    narrow = adapter_dtype != torch.float32
    name = "peft" + ("-bf16" if narrow else "") + ("-compiled" if compiled else "")
    used = torch.compile(loss, dynamic=False) if compiled else loss
    return Contender(name, used, adapters_of(student), setting, compiled=compiled)


class PaperArrangement:
    """Fig. 4: student, teacher, hooks on both.

    Args:
        model: unpatched; the student shares its frozen weights.
        setting: what all contenders share.
        teacher: a copy of the model, `None` makes one.

    Attributes:
        student, teacher: the two models.
        names: aligned layers.
    """

    def __init__(self, model: nn.Module, setting: Setting, teacher: nn.Module | None = None) -> None:
        self.setting = setting
        self.names = [target.name for target in select(model, setting.targets).adapted]
        self.student = student_of(model, setting)
        self.teacher = copy.deepcopy(model) if teacher is None else sharing_copy(teacher)
        self.teacher.requires_grad_(False).eval()
        self.features: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        inside: Any = self.student.base_model
        self.student_model: nn.Module = inside.model
        for name in self.names:
            self.student_model.get_submodule(name).register_forward_hook(self._catch("student", name))
            self.teacher.get_submodule(name).register_forward_hook(self._catch("teacher", name))

    def _catch(self, side: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.features[side][name] = output

        return hook

    def terms(self, inputs: Tensor | Mapping[str, Any], rows: Rows) -> dict[str, Tensor]:
        """`total` and its parts, under the names of :class:`rfa_fast.RFALoss`."""
        with torch.no_grad():
            call(self.teacher, inputs)
        logits = logits_of(call(self.student_model, inputs))
        pairs = [_aligned(self.features["student"][n], self.features["teacher"][n], rows) for n in self.names]
        retain_align, forget_align = (torch.stack([pair[i].float() for pair in pairs]).sum() for i in (0, 1))
        for caught in self.features.values():
            caught.clear()
        flat = logits.flatten(0, 1) if logits.ndim == 3 else logits
        kept, forgotten = flat[rows.retain_labels].float(), flat[rows.forget_labels].float()
        retain_task = F.cross_entropy(kept, rows.targets)
        soft = kept.detach().softmax(-1).mean(0)
        forget_task = F.cross_entropy(forgotten, soft.expand_as(forgotten))
        alpha, beta, lam, mu = self.setting.weights
        align, task = alpha * retain_align + beta * forget_align, lam * retain_task + mu * forget_task
        total = self.setting.gamma / len(self.names) * align + (1 - self.setting.gamma) * task
        return {
            "total": total, "align": align, "task": task, "retain_align": retain_align, "forget_align": forget_align,
            "retain_task": retain_task, "forget_task": forget_task,
        }  # fmt: skip


def _aligned(student: Tensor, teacher: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Eq. 7 and 8 of one layer."""
    retain, forget = rows.retain, rows.forget
    if rows.retain_tokens is not None and rows.forget_tokens is not None and rows.length is not None:
        samples = len(rows.retain) + len(rows.forget)
        if student.ndim == 3 and student.shape[:2] == (samples, rows.length):
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        if student.shape[0] == samples * rows.length:
            retain, forget = rows.retain_tokens, rows.forget_tokens
    kept = teacher[retain]
    wanted = kept.mean(0, keepdim=True)
    moved = student[forget]
    return F.mse_loss(student[retain], kept), F.mse_loss(moved, wanted.expand_as(moved))


def paper(model: nn.Module, setting: Setting, *, compiled: bool = False, teacher: nn.Module | None = None) -> Contender:
    """The paper's arrangement; compiled without `fullgraph`, because hooks may break the graph (breaks are counted)."""
    arrangement = PaperArrangement(model, setting, teacher)
    used = torch.compile(arrangement.terms, dynamic=False) if compiled else arrangement.terms

    def loss(batch: StepBatch) -> Tensor:
        return used(batch.inputs, rows_of(batch, model))["total"]

    name = "paper-compiled" if compiled else "paper"
    return PaperContender(name, loss, arrangement, compiled=compiled)


class PaperContender(Contender):
    """The paper's arrangement as a contender.

    Attributes:
        teacher: its copy of the model; another one can share it.
    """

    def __init__(
        self, name: str, loss: Callable[[StepBatch], Tensor], arrangement: PaperArrangement, *, compiled: bool
    ) -> None:
        note = "compiled without fullgraph" if compiled else ""
        parameters = adapters_of(arrangement.student)
        super().__init__(name, loss, parameters, arrangement.setting, compiled=compiled, note=note)
        self.teacher = arrangement.teacher
