"""Teacher mode's other forward: the original model, by the same weights with the adapters off.

Nothing of it is read but the adapted layers' features of samples to retain (eq. 7, 8). So a language model's head
stands aside, and on a CPU the linear layers of the blocks behind the frozen prefix (which runs once, for both forwards)
compute no sample behind the last one to retain: :mod:`rfa_fast.ops.retain_rows`. Batches come with those in front.
That a sample's features do not depend on the others of its batch is what groups mean in the first place; where batch
norm takes its statistics of the batch, which can be seen from outside, everything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.forwards import batch_statistics, flags_down, in_front
from rfa_fast.groups import Batch, GroupContext
from rfa_fast.head import standing_aside
from rfa_fast.modules import RFALayer
from rfa_fast.objective import RETAIN
from rfa_fast.ops.retain_rows import original_output
from rfa_fast.prefix import asks_gradient
from rfa_fast.targets import sequence_first

_TEXT = ("attention_mask", "input_ids", "inputs_embeds", "token_type_ids")
_ALONE = ("input_features", "input_values", "pixel_values")


class Teacher:
    """The linear layers of a model that run for the original model's sake, beside the adapted ones.

    Args:
        model: the patched model.
        blocks: names of its repeated blocks, in order.
        prefix: names of those that come before the first adapted layer: their output is the adapted model's, too.

    Attributes:
        names: frozen layers behind the prefix, inside the blocks; none where an axis may lie before the batch's.
        saves: whether the order of a batch makes a difference: not without a linear layer in those blocks, and not in a
            model whose samples see one another, by the statistics of a batch.

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
        adapted = any(isinstance(m, RFALayer) and m.rfa_original_class is nn.Linear for m in inside.values())
        self.saves = (bool(self.names) or adapted) and batch_statistics(model) is None
        self._layers: list[nn.Linear] = [model.get_submodule(name) for name in self.names]  # type: ignore[misc]
        self._functions: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions in front of the layers: those of a copy are its own."""
        return {**self.__dict__, "_functions": []}

    @contextmanager
    def retain_alone(self, context: GroupContext, batch: Batch) -> Iterator[None]:
        """Let the original model's layers skip the samples of a batch that are not needed, where it says which are.

        Entered before a compiled function is called, with the same functions each time, as
        :meth:`rfa_fast.prefix.Prefix.shared` is.
        """
        # A forward that somebody else has put there is not ours to do without.
        if batch.needed is None or any("forward" in layer.__dict__ for layer in self._layers):
            yield
            return
        if not self._functions:
            self._functions = [_skipping(layer, context) for layer in self._layers]
        with in_front(self._layers, self._functions):
            yield

    def retain_first(
        self, context: GroupContext, inputs: Tensor | Mapping[str, Any], labels: Tensor, batch: Batch, *,
        anew: bool = False,
    ) -> tuple[Tensor | Mapping[str, Any], Tensor, Batch]:  # fmt: skip
        """The batch with its samples to retain in front, in their order, and what the original model needs of it.

        No loss depends on the order. A batch is left as it is, and computed whole, where that saves nothing, or where
        one of the inputs is not known to hold one entry per sample.

        Args:
            anew: copy a batch that is in order already, as our sampler's are: a compiled graph would see the
                difference, in what shares memory with what.
        """
        if not (self._applies(context) and batch.samples.device.type == "cpu" and _by_sample(inputs, batch.size)):
            return inputs, labels, batch
        others = batch.samples != RETAIN
        if not anew and bool((others[1:] >= others[:-1]).all()):
            return inputs, labels, replace(batch, needed=_needed(batch, batch.samples))
        order = others.to(torch.int8).argsort(stable=True)
        ordered = batch.of(order)
        moved: Tensor | dict[str, Any]
        if isinstance(inputs, Tensor):
            moved = inputs[order]
        else:
            moved = {key: value[order] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        return moved, labels[order], replace(ordered, needed=_needed(batch, ordered.samples))

    def _applies(self, context: GroupContext) -> bool:
        """In teacher mode, with the batch as the first axis, and the mse.

        A product of fewer rows may round differently. Where original and student ought to agree, before the first
        update, the gradient of the l2 norm of such a rounding is of full size and of any direction.
        """
        config = context.config
        return self.saves and config.mode == "teacher" and config.norm == "mse" and config.rows in ("auto", "batch")


def _needed(batch: Batch, samples: Tensor) -> Tensor:
    """The codes of a batch as the original model needs them; all of them count as retained where tokens are as many
    as samples: a model that puts the tokens in front could not be told from one that does not.
    """
    return torch.full_like(samples, RETAIN) if batch.length == batch.size else samples


def _by_sample(inputs: Tensor | Mapping[str, Any], size: int) -> bool:
    """Whether every input is either one entry per sample, or the same for all of them."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0] == size
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    plain = all(
        value is None or isinstance(value, bool | int | float | str)
        for key, value in inputs.items()
        if key not in tensors
    )
    # Beside text, images need not be one per sample, even where there are as many.
    known = set(tensors) <= set(_TEXT) or (len(tensors) == 1 and set(tensors) <= set(_ALONE))
    return plain and known and all(value.ndim > 0 and value.shape[0] == size for value in tensors.values())


def _skipping(layer: nn.Linear, context: GroupContext) -> Any:
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        batch = context.batch
        if context.recording and batch is not None:
            output = original_output(x, layer.weight, layer.bias, batch.needed)
            if output is not None:
                return output
        found: Tensor = original(x)
        return found

    return forward


def record_teacher(
    model: nn.Module, names: Sequence[str], context: GroupContext, args: Sequence[Any], kwargs: Mapping[str, Any],
    head: nn.Linear | None = None,
) -> None:  # fmt: skip
    """Run the original model and note the features of the layers that are adapted.

    Args:
        head: stands aside meanwhile.
    """
    context.recording = True
    # Checkpointed blocks carry the train flag for the student's sake; without gradient nothing is checkpointed here.
    calm = nullcontext() if torch.compiler.is_compiling() else flags_down(model.modules())
    try:
        with torch.no_grad(), calm, nullcontext() if head is None else standing_aside(head):
            output = model(*args, **kwargs)
            if context.prefix_outputs and asks_gradient((args, kwargs)):
                context.prefix_outputs = {}  # none of them passes one on
            # What it holds of the prefix's outputs, the adapted model's holds as well, for somebody to read.
            if context.prefix_outputs and not torch.compiler.is_compiling():
                context.original_output = output
    finally:
        context.recording = False
    context.check_calls(names)
    context.calls = {}
