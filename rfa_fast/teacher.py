"""Teacher mode's other forward: the original model, by the same weights with the adapters off.

Nothing of it is read but the adapted layers' features of samples to retain (eq. 7, 8). So a language model's head
stands aside, and on a CPU the linear layers of the blocks behind the frozen prefix (which runs once, for both forwards)
compute no sample behind the last one to retain: :mod:`rfa_fast.ops.retain_rows`. Batches come with those in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.forwards import in_front
from rfa_fast.groups import Batch, GroupContext
from rfa_fast.head import output_layer, standing_aside
from rfa_fast.modules import RFALayer
from rfa_fast.objective import RETAIN
from rfa_fast.ops.retain_rows import original_output
from rfa_fast.targets import sequence_first

_BATCH_FIRST = ("attention_mask", "input_features", "input_ids", "inputs_embeds", "pixel_values", "token_type_ids")


class Teacher:
    """The linear layers of a model that run for the original model's sake, beside the adapted ones.

    Args:
        model: the patched model.
        blocks: names of its repeated blocks, in order.
        prefix: names of those that come before the first adapted layer: their output is the adapted model's, too.

    Attributes:
        names: frozen layers behind the prefix, inside the blocks; none where an axis may lie before the batch's.
        saves: whether the order of a batch makes a difference: not without a linear layer in those blocks.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> Teacher(net, ["0", "1"], ["0"]).names
        ('1.0',)
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], prefix: Sequence[str]) -> None:
        behind = [block for block in blocks if block not in prefix]
        inside = {
            name: module
            for name, module in model.named_modules()
            if any(name == block or name.startswith(f"{block}.") for block in behind)
        }
        self.names = tuple(
            name for name, module in inside.items() if type(module) is nn.Linear and not sequence_first(model, name)
        )
        self.saves = bool(self.names) or any(
            isinstance(module, RFALayer) and module.rfa_original_class is nn.Linear for module in inside.values()
        )
        self._layers: list[nn.Linear] = [model.get_submodule(name) for name in self.names]  # type: ignore[misc]
        self._functions: list[Any] = []

    @contextmanager
    def retain_alone(self, context: GroupContext) -> Iterator[None]:
        """In teacher mode, let the original model's layers skip the samples that nothing is read of.

        Entered before a compiled function is called, with the same functions each time, as
        :meth:`rfa_fast.prefix.Prefix.shared` is.
        """
        # A forward that somebody else has put there is not ours to do without.
        if not skips(context) or any("forward" in layer.__dict__ for layer in self._layers):
            yield
            return
        if not self._functions:
            self._functions = [_skipping(layer, context) for layer in self._layers]
        with in_front(self._layers, self._functions):
            yield

    def retain_first(
        self, context: GroupContext, inputs: Tensor | Mapping[str, Any], labels: Tensor, batch: Batch
    ) -> tuple[Tensor | Mapping[str, Any], Tensor, Batch]:
        """The batch with its samples to retain in front, in their order, where that saves the original model something.

        No loss depends on the order. Inputs stay as they are where one of them is not known to have the batch in front.
        """
        others = batch.samples != RETAIN
        named = {"pixel_values": inputs} if isinstance(inputs, Tensor) else inputs
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        known = set(tensors) <= set(_BATCH_FIRST)
        if not (self.saves and known and skips(context) and others.device.type == "cpu"):
            return inputs, labels, batch
        if bool((others[1:] >= others[:-1]).all()):
            return inputs, labels, batch
        order = others.to(torch.int8).argsort(stable=True)
        tokens = None if batch.tokens is None else batch.tokens[order]
        ordered = replace(batch, samples=batch.samples[order], tokens=tokens)
        moved = {key: value[order] for key, value in tensors.items()}
        return moved["pixel_values"] if isinstance(inputs, Tensor) else {**inputs, **moved}, labels[order], ordered


def skips(context: GroupContext) -> bool:
    """Whether the original model may leave samples out: in teacher mode, with the batch as the first axis."""
    return context.config.mode == "teacher" and context.config.rows in ("auto", "batch")


def _skipping(layer: nn.Linear, context: GroupContext) -> Any:
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        batch = context.batch
        if context.recording and batch is not None:
            output = original_output(x, layer.weight, layer.bias, batch.samples)
            if output is not None:
                return output
        found: Tensor = original(x)
        return found

    return forward


def head_to_skip(model: nn.Module, labels: Tensor, context: GroupContext) -> nn.Linear | None:
    """The head whose logits the original model need not give, or `None`; one that stands aside already is left so."""
    if labels.ndim != 2 or not context.head_stands_aside or context.head_is_aside:
        return None
    head = output_layer(model, context)
    return None if isinstance(head, RFALayer) else head


def record_teacher(
    model: nn.Module, names: Sequence[str], context: GroupContext, args: Sequence[Any], kwargs: Mapping[str, Any],
    head: nn.Linear | None = None,
) -> None:  # fmt: skip
    """Run the original model and note the features of the layers that are adapted.

    Args:
        head: stands aside meanwhile.
    """
    context.recording = True
    try:
        with torch.no_grad(), nullcontext() if head is None else standing_aside(head):
            model(*args, **kwargs)
    finally:
        context.recording = False
    context.check_calls(names)
    context.calls = {}
