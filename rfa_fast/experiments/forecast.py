"""The memory of our step and of what people would use instead, before any of them is loaded.

:mod:`rfa_fast.metrics.forecast` counts a step on shapes; here are the steps: ours and the contenders of
:mod:`rfa_fast.experiments.rivals`, none of them compiled. Inductor allocates out of sight of this count: it fuses, and
decides what to keep and what to recompute, so that a compiled step needs another amount, which only a run can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rfa_fast.metrics.forecast import Forecast, Inputs, Step, forecast_step
from rfa_fast.patching import patch
from rfa_fast.step import compile_step
from rfa_fast.targets import Targets

ARRANGEMENTS = ("ours", "paper", "peft", "finetune")


def forecast(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    forget: Tensor,
    *,
    arrangement: str = "ours",
    targets: Targets = "deep",
    rank: int = 8,
    alpha: float = 32,
    checkpointing: bool = False,
    **options: Any,
) -> Forecast:
    """The memory of one training step with AdamW, from shapes alone.

    Args:
        model: unpatched, on any device, `"meta"` included; it is not touched, and nothing of its size is allocated.
        inputs, labels, forget: a batch, as :meth:`rfa_fast.RFA.loss` takes it. The values matter where they say
            which rows belong to what: labels of −100, the attention mask, `forget`.
        arrangement: `"ours"`; `"paper"`, a PEFT student, a copied teacher and hooks (Fig. 4); `"peft"`, LoRA
            fine-tuning without forgetting; `"finetune"`, every parameter of the model itself, no copy.
        targets, rank, alpha: as :func:`rfa_fast.patch` takes them.
        checkpointing: each block of a transformers model keeps its input and is recomputed in the backward.
        **options: more of :func:`rfa_fast.patch`'s, such as `mode="teacher"`; for ours alone.

    Raises:
        ValueError: an unknown arrangement, checkpointing of a model without transformers' switch for it, what
            :func:`rfa_fast.patch` refuses, or a model whose course depends on the values of its activations.
        TypeError: a model that cannot be copied, or options beside a rival.

    Example:
        >>> net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        >>> batch = torch.zeros(2, 512), torch.tensor([0, 1]), torch.tensor([False, True])
        >>> ours, tuned = (forecast(net, *batch, arrangement=name, targets="all") for name in ("ours", "finetune"))
        >>> ours.weights, ours.above_weights < tuned.above_weights / 10
        (2101248, True)
    """
    if arrangement not in ARRANGEMENTS:
        raise ValueError(f"arrangement: got {arrangement!r}, expected one of {', '.join(ARRANGEMENTS)}")
    if arrangement != "ours" and options:
        raise TypeError(f"options: got {', '.join(options)} for {arrangement!r}, expected them for 'ours' alone")
    switch: Callable[[nn.Module], None] = _leave
    if checkpointing:
        check_checkpointing(model)
        switch = switch_on if arrangement == "ours" else wrap_blocks

    def build(copy: nn.Module) -> Step:
        switch(copy)
        if arrangement == "ours":
            return _ours(copy, targets, {"rank": rank, "alpha": alpha, **options})
        return _rival(arrangement, copy, (inputs, labels, forget), targets, rank, alpha)

    return forecast_step(model, build, inputs, labels, forget)


def _ours(model: nn.Module, targets: Targets, options: Mapping[str, Any]) -> Step:
    rfa = patch(model, targets, **options)
    return compile_step(rfa, torch.optim.AdamW(rfa.parameters()), compile=False)


def _rival(
    name: str, model: nn.Module, batch: tuple[Inputs, Tensor, Tensor], targets: Targets, rank: int, alpha: float
) -> Step:
    from rfa_fast.experiments.rivals import Setting, StepBatch, contender

    # In place: the copy at hand is the model's own, as where fine-tuning is all that runs.
    rival = contender(name, model, StepBatch(*batch), Setting(targets, rank, alpha), in_place=True)
    loss, optimizer = rival.loss, rival.optimizer
    if loss is None or optimizer is None:
        raise ValueError(f"arrangement: got {name!r}, which has no loss; expected one that trains")

    # Not the contender's own step: it keeps the start of every B, to show later that B moved.
    def step(inputs: Inputs, labels: Tensor, forget: Tensor) -> None:
        loss(StepBatch(inputs, labels, forget)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_checkpointing(model: nn.Module) -> None:
    """Raises ValueError for a model without transformers' switch.

    Example:
        >>> check_checkpointing(nn.Linear(1, 1))
        Traceback (most recent call last):
        ...
        ValueError: model: got Linear, expected a transformers model that supports gradient checkpointing
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a transformers model that supports gradient checkpointing"
        )


def switch_on(model: nn.Module) -> None:
    """transformers' switch, under the name that its version has."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def wrap_blocks(model: nn.Module) -> None:
    """Checkpoint the blocks whatever the train flag says.

    transformers asks for `training`, and the rivals run in eval mode like us, for comparable numbers. PEFT would let
    the embeddings require a gradient besides, which stores the frozen prefix: the rival is spared that.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.__dict__["forward"] = MethodType(_checkpointed, module)


def _checkpointed(block: Any, *args: Any, **kwargs: Any) -> Any:
    # A cache would be written to once more by the recomputation.
    kwargs |= {key: None for key in ("cache", "past_key_values", "layer_past") if key in kwargs}
    kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
    return checkpoint(partial(type(block).forward, block, **kwargs), *args, use_reentrant=False)


def _leave(model: nn.Module) -> None:
    """No checkpointing."""
