"""The frozen prefix: the repeated blocks before the first adapted one, whose output no adapter changes.

It has nothing to train, so autograd keeps nothing of it. Teacher mode needs its output twice, once for the original
model and once for the adapted one, and it is the same: the blocks run for the first and answer the second from what
they returned. The same holds from one epoch to the next while the inputs stay as they are, which is what
:mod:`rfa_fast.prefix_cache` is for.

Blocks are found by structure (:func:`rfa_fast.targets.repeated_blocks`). A block answers by a function put in front of
its `forward` for the time of one batch; its class, its hooks and its parameters stay as they are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rfa_fast.forwards import in_front
from rfa_fast.groups import GroupContext
from rfa_fast.handed import Handed, given, send, version


class _Done(Exception):
    """The prefix has returned."""


class Prefix:
    """The blocks of a model that come before its first adapted layer.

    Args:
        model: the patched model.
        blocks: names of its repeated blocks, in order.
        adapted: names of its adapted layers.

    Attributes:
        names: the blocks of the prefix; none where the first block is adapted, or an adapted layer lies outside
            the blocks and may run before them.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> Prefix(net, ["0", "1", "2"], ["2"]).names
        ('0', '1')
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], adapted: Sequence[str]) -> None:
        order = [name for name, _ in model.named_modules()]
        first_block = order.index(blocks[0]) if blocks else 0
        before = [name for name in adapted if order.index(name) < first_block]
        names: list[str] = []
        for block in blocks if not before else ():
            if any(name == block or name.startswith(f"{block}.") for name in adapted):
                break
            names.append(block)
        self.names = tuple(names)
        self._blocks = [model.get_submodule(name) for name in names]
        self._adapted = [model.get_submodule(name) for name in adapted]
        self._functions: tuple[list[Any], list[Callable[..., Any]]] = [], []
        self._overwritten = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions in front of the blocks: those of a copy are its own."""
        return {**self.__dict__, "_functions": ([], [])}

    @contextmanager
    def shared(self, context: GroupContext) -> Iterator[None]:
        """In teacher mode, let the prefix run for the original model only; nothing otherwise.

        Entered before a compiled function is called, not inside it: inductor merges equal computations, but not
        attention's, and so nothing behind the first block. The functions are the same from one batch to the next,
        for that is what a compiled graph asks of a module's forward.
        """
        if not self._blocks or context.config.mode != "teacher":
            yield
            return
        own = [block.__dict__.get("forward") for block in self._blocks]
        before, functions = self._functions
        if not functions or any(a is not b for a, b in zip(own, before, strict=True)):
            functions = [self._answering(i, block.forward, context) for i, block in enumerate(self._blocks)]
            self._functions = own, functions
        try:
            with in_front(self._blocks, functions):
                yield
        finally:
            context.prefix_outputs = {}

    def run(self, model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
        """The output of the prefix for a batch, `(B, …)`, without gradient; what comes after it does not run.

        Raises:
            TypeError: a last block that returns more than one tensor.
            ValueError: a model that reads what an earlier block returned, or runs an adapted layer before the last.
        """
        returned: list[Any] = []
        handed: dict[str, weakref.ref[Tensor]] = {}

        def reads(name: str) -> None:
            raise ValueError(
                f"cache_prefix: got a model that reads the output of block {name!r} itself, expected one that hands it "
                "on to the next block and reads that of the last alone; take the cache off"
            )

        def early(*_: Any) -> None:
            raise ValueError(
                f"cache_prefix: got a model that runs an adapted layer before block {self.names[-1]!r}, expected all "
                "of the frozen blocks to come first; take the cache off"
            )

        def running(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = original(*given(args), **given(kwargs))
                if name != self.names[-1]:
                    output, first = send(output, functools.partial(reads, name))
                    if first is not None:
                        handed[name] = weakref.ref(first)
                    return output
                for other, reference in handed.items():
                    held = reference()
                    if held is not None and all(held is not one for one in (*args, *kwargs.values())):
                        reads(other)
                returned.append(output)
                raise _Done

            return forward

        functions = [running(name, block.forward) for name, block in zip(self.names, self._blocks, strict=True)]
        hooks = [layer.register_forward_pre_hook(early) for layer in self._adapted]
        try:
            with in_front(self._blocks, functions), torch.no_grad():
                model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
        except _Done:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        output = returned[0] if returned else None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"cache_prefix: block {self.names[-1]!r} returned {type(output).__name__}, expected one tensor"
            )
        return output

    @contextmanager
    def answered(self, context: GroupContext) -> Iterator[None]:
        """Let every block of the prefix answer with `context.prefix_output`, which is the last one's."""

        def answer(*_: Any, **__: Any) -> Any:
            return context.prefix_output

        with in_front(self._blocks, [answer] * len(self._blocks)):
            yield

    def _answering(self, index: int, original: Callable[..., Any], context: GroupContext) -> Callable[..., Any]:
        last = index == len(self._blocks) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not context.recording:
                if context.enabled and isinstance(context.prefix_outputs.get(index), _Kept):
                    context.prefix_outputs = self._answers(context.prefix_outputs)
                # Nothing: the original model itself, a forward that it did not run before, or a late block.
                if not context.enabled or index not in context.prefix_outputs:
                    return original(*args, **kwargs)
                return context.prefix_outputs[index]
            # Behind an adapted layer, whatever the order they are registered in: its output is the original model's.
            if context.teacher or self._overwritten:
                return original(*args, **kwargs)
            output = original(*given(args), **given(kwargs))
            if torch.compiler.is_compiling():  # the graph frees by itself what nobody reads
                context.prefix_outputs[index] = output
                return output
            kept = context.prefix_outputs[index] = _Kept(output)
            return output if last else kept.send(self.names[index])

        return forward

    def _answers(self, kept: dict[int, Any]) -> dict[int, Any]:
        """What the blocks answer the adapted model: nothing where the original one wrote into an output.

        Such a model runs its prefix twice, in the batches to come as well.
        """
        self._overwritten = any(block.overwritten() for block in kept.values())
        return {} if self._overwritten else {index: block.answer() for index, block in kept.items()}


class _Kept:
    """What is kept of a block's output, from the original model's forward to the adapted one's.

    Of one that is handed on to the next block, as most are, it is what the model does with it besides: the output once
    it has been read, and else the rest of a tuple that begins with it.
    """

    def __init__(self, output: Any) -> None:
        self._output = output
        self._versions = [version(tensor) for tensor in _tensors(output)]

    def send(self, name: str) -> Any:
        """The output as the model gets it, which from now on is kept only when it is read."""

        def late() -> None:
            raise ValueError(
                f"block {name!r}: got its output read in the adapted model's forward but not in the original's, which "
                "ran without gradient; expected the same of both: pass targets that begin with the first block"
            )

        output = self._output
        sent, first = send(output, lambda: setattr(self, "_output", output))
        if first is not None:
            self._output, _ = send(output, late, blank=True)
        return sent

    def overwritten(self) -> bool:
        """Whether the model wrote into what is kept."""
        now = [None if isinstance(tensor, Handed) else version(tensor) for tensor in _tensors(self._output)]
        return any(new is not None and new != old for new, old in zip(now, self._versions, strict=True))

    def answer(self) -> Any:
        """What the block returns to the adapted model."""
        return self._output


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
