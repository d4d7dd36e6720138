"""Gradient checkpointing: blocks whose forward runs a second time in the backward, in training code we did not write.

A layer in such a block reports its losses in the first run and must not in the second, but has to compute the same,
or autograd finds other tensors than it expects. By then the batch is over. So the backward of the loss, before it
reaches any block, says which batch it is about (:func:`mark`), and a layer that is called in a backward takes its group
codes from there (:func:`replayed`).

Reentrant checkpointing runs the first forward without gradient, so that a loss taken inside has none. Where
transformers' switch asks for it, the same blocks are checkpointed the other way; where a model's own code does, the
layer refuses. transformers' switch works only while a block is training, and lets the embeddings require a gradient,
which would put the frozen prefix under autograd: for the time of a batch the blocks carry the flag, what is in them
does not, and the hooks on the embeddings rest.

A batch has eval behaviour, and so has the second run of a block, however long after the batch it comes and whatever the
training flags are by then.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from rfa_fast.forwards import flags_down
from rfa_fast.groups import Batch, GroupContext
from rfa_fast.objective import RFALoss

_KINDER: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


@dataclass
class Snapshot:
    """What a layer needs to compute a second time what it computed for a batch, and in which backward it does."""

    model: nn.Module
    batch: Batch
    memory: Mapping[str, tuple[Tensor, Tensor]]
    teacher: dict[str, Tensor]
    backward: int = -1


class _Mark(torch.autograd.Function):
    """The identity; its backward comes before that of everything the loss was computed from."""

    @staticmethod
    def forward(ctx: Any, context: GroupContext, snapshot: Snapshot, *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.context, ctx.snapshot = context, snapshot
        return tuple(term.view_as(term) for term in terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        context = ctx.context
        ctx.snapshot.backward = torch._C._current_graph_task_id()
        context.replay = ctx.snapshot
        calm = ExitStack()
        calm.enter_context(flags_down(ctx.snapshot.model.modules()))

        def over() -> None:
            context.replay = None
            calm.close()

        Variable._execution_engine.queue_callback(over)
        return None, None, *grads


def mark(losses: RFALoss, model: nn.Module, context: GroupContext) -> RFALoss:
    """The losses, whose backward lets checkpointed blocks find the batch that they are about."""
    if not losses.total.requires_grad or torch.compiler.is_compiling() or context.reported is None:
        return losses
    # Features are kept for the second run of a block only where there is one.
    teacher = dict(context.teacher) if context.checkpointed else {}
    marked: Any = _Mark.apply(context, Snapshot(model, *context.reported, teacher), *losses)
    return RFALoss(*marked)


@contextmanager
def replayed(context: GroupContext) -> Iterator[None]:
    """The batch that the backward under way is about, for a layer in a block that runs a second time."""
    snapshot = context.replay
    if not isinstance(snapshot, Snapshot):
        yield
        return
    context.batch, context.memory, context.teacher = snapshot.batch, snapshot.memory, snapshot.teacher
    context.silent = True
    try:
        yield
    finally:
        context.batch, context.memory, context.teacher = None, {}, {}
        context.silent = False


def runs_again(context: GroupContext) -> bool:
    """Whether a layer is called by the backward of a loss, to compute once more what it did not keep.

    Of this loss and no other: a backward that fails does not come to its end, and leaves its batch behind.
    """
    snapshot = context.replay
    return isinstance(snapshot, Snapshot) and snapshot.backward == torch._C._current_graph_task_id() != -1


def note_region(context: GroupContext, name: str) -> None:
    """Look whether a layer runs in a checkpointed block.

    Raises:
        ValueError: one under reentrant checkpointing, where its losses would have no gradient.
    """
    if context.expects_gradient and not torch.is_grad_enabled():
        raise ValueError(
            f"layer {name!r}: got called without gradient inside a batch that wants one, as reentrant checkpointing "
            "does: its adapters would learn nothing; expected torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
        )
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    context.checkpointed = context.checkpointed or top is None or top(False) is not None


@contextmanager
def blocks_checkpoint(model: nn.Module) -> Iterator[None]:
    """Let transformers' switch take effect for one batch, in the one form that is right."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    if not switched:
        yield
        return
    flags = [(module, module.training) for module in switched]
    given: list[tuple[nn.Module, Any]] = [(m, m.__dict__.get("_gradient_checkpointing_func")) for m in switched]
    functions = [(module, function) for module, function in given if function is not None]
    hooks = _embedding_hooks(model)
    for module in switched:
        module.training = True
    for module, function in functions:
        object.__setattr__(module, "_gradient_checkpointing_func", _kinder(module, function))
    before = [(registry, dict(registry)) for registry, _ in hooks]
    for registry, key in hooks:
        registry.pop(key, None)
    try:
        yield
    finally:
        for registry, entries in before:
            registry.clear()
            registry.update(entries)
        for module, function in functions:
            object.__setattr__(module, "_gradient_checkpointing_func", function)
        for module, flag in flags:
            module.training = flag


def _kinder(module: nn.Module, given: Any) -> Any:
    """The checkpointing function of a block in its right form, with eval behaviour in what it runs.

    The same one from one batch to the next, as a compiled graph asks. Compiled, the second run is part of the graph,
    which flags that change in it would break.
    """
    known = _KINDER.get(module)
    if known is not None and known[0] is given:
        return known[1]
    function, block = given, weakref.ref(module)
    if _reentrant(given):
        function = functools.partial(given.func, *given.args, **{**given.keywords, "use_reentrant": False})

    def checkpointed(run: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(run, *args, **kwargs)

        def calm(*args: Any, **kwargs: Any) -> Any:
            here = block()
            with flags_down(() if here is None else here.modules()):
                return run(*args, **kwargs)

        return function(calm, *args, **kwargs)

    _KINDER[module] = given, checkpointed
    return checkpointed


def _reentrant(function: Any) -> bool:
    return isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False


def _embedding_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks of `enable_input_require_grads`, as the registries they are in and their keys."""
    found = []
    for module in model.modules():
        for handle in module.__dict__.get("_require_grads_hooks") or ():
            registry = handle.hooks_dict_ref()
            if registry is not None and handle.id in registry:
                found.append((registry, handle.id))
    return found
