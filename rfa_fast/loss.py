"""The loss of one batch, from a model's inputs to eq. 6: what `RFA.loss` and `compile_step` have in common.

In three parts, because only the one in the middle can be compiled. :func:`prepare` reads values and checks them.
:func:`evaluate` takes tensors and returns tensors: what it notes in the context on its way is gone when it returns,
and what has to outlive the batch (x̃ of every layer, ỹ) is among its results. :func:`keep` puts that where the next
batch finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rfa_fast.checkpointing import blocks_checkpoint, mark
from rfa_fast.config import RFAConfig
from rfa_fast.forwards import flags_down
from rfa_fast.groups import Batch, GroupContext, LayerTerms, make_batch
from rfa_fast.head import TaskTerms, check_labels, head_aside, logits_and_task, trying_aside
from rfa_fast.modules import RFALayer
from rfa_fast.objective import RFALoss, accumulation_dtype, combine
from rfa_fast.padding import Inputs, batch_of, decoder_inputs
from rfa_fast.teacher import record_teacher

Means = Mapping[str, tuple[Tensor, Tensor]]


class Evaluation(NamedTuple):
    """What a batch gives.

    Attributes:
        losses: eq. 1-6.
        terms: per layer, retain and forget alignment, `(m, 2)` detached.
        means: per layer x̃, and for which positions it is known.
        mean_prediction: ỹ.
    """

    losses: RFALoss
    terms: Tensor
    means: dict[str, tuple[Tensor, Tensor]]
    mean_prediction: Tensor


def token_units(config: RFAConfig, has_tokens: bool) -> bool:
    """Whether a unit of the losses is a token rather than a sample, as `feature_mean` says.

    Example:
        >>> token_units(RFAConfig(), True), token_units(RFAConfig(feature_mean="sample"), True)
        (True, False)
    """
    return config.feature_mean == "token" or (config.feature_mean == "auto" and has_tokens)


def prepare(
    config: RFAConfig, inputs: Inputs, labels: Tensor, forget: Tensor, valid: Tensor | None, device: torch.device
) -> Batch:
    """Check a batch and turn its masks into group codes; arguments as :meth:`RFA.loss`.

    Raises:
        TypeError, ValueError: a mask or labels of the wrong dtype, shape or device.
    """
    if isinstance(inputs, Mapping) and "labels" in inputs:
        raise ValueError("inputs: got the key 'labels', expected labels as an argument of their own")
    if not isinstance(inputs, Tensor | Mapping):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a tensor or a dict of keyword arguments")
    size, length, mask = batch_of(inputs)
    check_labels(labels, size, device)
    by_token = token_units(config, length is not None)
    batch = make_batch(forget, valid, device=device, size=size, length=length, token_units=by_token)
    if mask is not None:
        both = mask if valid is None else mask & (valid if valid.ndim == 2 else valid[:, None])
        batch = make_batch(forget, both, device=device, size=size, length=length, token_units=by_token)
    written = decoder_inputs(inputs)
    return batch if written is None else replace(batch, decoder=batch.samples[:, None].expand(written.shape[:2]))


def evaluate(
    model: nn.Module,
    names: Sequence[str],
    context: GroupContext,
    inputs: Inputs,
    labels: Tensor,
    batch: Batch,
    memory: Means,
    mean_prediction: Tensor | None,
    prefix_output: Tensor | None = None,
) -> Evaluation:
    """Run the patched model, which has eval behaviour, on a batch.

    Args:
        names: the adapted layers.
        memory, mean_prediction: of the batch before, for groups this one does not have.
        prefix_output: what the prefix returns for this batch, where that is known and its blocks answer with it.

    Raises:
        ValueError: an adapted layer that did not run exactly once, or labels that do not fit.
    """
    context.prefix_output = prefix_output
    try:
        run = partial(_forward, model, names, context, inputs, labels, batch, memory, mean_prediction)
        task: TaskTerms | None = None
        while task is None:  # a second time where the head stood aside for nothing
            tried = not torch.compiler.is_compiling() and not context.head_is_aside
            task = trying_aside(run, head_aside(model, labels, context), context) if tried else run()
        retain, forget = alignment(names, context)
        losses = combine(
            retain, forget, task.retain, task.forget, layers=len(names), gamma=context.config.gamma,
            weights=context.config.weights,
        )  # fmt: skip
        losses = mark(losses, model, context)
        pairs = [torch.stack(tuple(context.terms[name])) for name in names]
        means = {name: finite_mean(*context.means[name]) for name in names if name in context.means}
        prediction, known = finite_mean(
            task.mean_prediction.detach(), torch.ones((), dtype=torch.bool, device=losses.total.device)
        )
        if mean_prediction is not None:
            prediction = torch.where(known, prediction, mean_prediction)
        return Evaluation(losses, torch.stack(pairs).detach(), means, prediction)
    finally:
        context.end()
        context.clear()
        context.prefix_output = None


def _forward(
    model: nn.Module, names: Sequence[str], context: GroupContext, inputs: Inputs, labels: Tensor, batch: Batch,
    memory: Means, mean_prediction: Tensor | None,
) -> TaskTerms | None:  # fmt: skip
    """The forwards of a batch from its beginning; `None` where it has to run again, with the head in its place."""
    context.begin(batch, memory)
    if context.config.mode == "teacher":
        args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)
        head = None if context.head_is_aside else head_aside(model, labels, context)
        record_teacher(model, names, context, args, kwargs, head)
    return logits_and_task(model, inputs, labels, batch, context, mean_prediction)


def finite_mean(mean: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """A mean as it may be kept for a later batch: one that is not finite is not known, and 0.

    Example:
        >>> finite_mean(torch.tensor([float("nan"), 1.0]), torch.tensor(True))
        (tensor([0., 0.]), tensor(False))
    """
    finite = torch.isfinite(mean).all()
    return torch.where(finite, mean, 0.0), known & finite


def alignment(names: Sequence[str], context: GroupContext) -> tuple[Tensor, Tensor]:
    """Σ over the layers of their retain and forget terms.

    Raises:
        ValueError: an adapted layer that did not run exactly once.
    """
    context.check_calls(names)
    wide = accumulation_dtype(context.terms[names[0]].retain.dtype)
    terms = [context.terms[name] for name in names]
    retain = sum((t.retain.to(wide) for t in terms[1:]), start=terms[0].retain.to(wide) + 0)
    forget = sum((t.forget.to(wide) for t in terms[1:]), start=terms[0].forget.to(wide) + 0)
    return retain, forget


def remembered(layers: Mapping[str, RFALayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """x̃ of the most recent batches, of the layers that have one."""
    pairs = {name: (layer.feature_mean, layer.feature_mean_known) for name, layer in layers.items()}
    return {name: (mean, known) for name, (mean, known) in pairs.items() if mean is not None and known is not None}


def keep(layers: Mapping[str, RFALayer], context: GroupContext, means: Means, terms: Mapping[str, LayerTerms]) -> None:
    """The batch is good: keep its means for batches without retain samples, and its terms for who asks.

    A loss without gradient is a look at the model: what is trained next aims at what it would have aimed at.
    """
    for name, (mean, known) in means.items() if torch.is_grad_enabled() else ():
        layers[name].feature_mean, layers[name].feature_mean_known = mean.detach(), known
    context.losses = {name: LayerTerms(t.retain.detach(), t.forget.detach()) for name, t in terms.items()}


@contextmanager
def eval_behaviour(model: nn.Module) -> Iterator[None]:
    """No dropout, no batch statistics, no cache of keys and values; everything comes back as it was."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        with flags_down(model.modules()), blocks_checkpoint(model):
            yield
    finally:
        for config in configs.values():
            config.use_cache = True
