"""The frozen prefix: the repeated blocks before the first adapted one, whose output no adapter changes.

It has nothing to train, so autograd keeps nothing of it. Teacher mode needs its output twice, once for the original
model and once for the adapted one, and it is the same: the blocks run for the first and answer the second from what
they returned. The same holds from one epoch to the next while the inputs stay as they are, which is what
:mod:`rfa_fast.prefix_cache` is for.

Blocks are found by structure (:func:`rfa_fast.targets.repeated_blocks`). A block answers by a function put in front of
its `forward` for the time of one batch; its class, its hooks and its parameters stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.forwards import in_front
from rfa_fast.groups import GroupContext

# In place of an output: the block ran behind an adapted layer, whatever the order they are registered in.
_LATE = object()


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
        self.adjacent = all(_adjacent(names)[1:])
        self._runs = _adjacent(names)
        self._functions: tuple[list[Any], list[Callable[..., Any]]] = [], []

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
            ValueError: a model that keeps what an earlier block returned, or runs an adapted layer before the last.
        """
        returned: list[Any] = []
        seen: list[Any] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            first = _first(output)
            seen.append(weakref.ref(first) if isinstance(first, Tensor) else lambda: None)

        def stop(_: nn.Module, args: Any, output: Any) -> None:
            given = args[0] if args else None
            for name, found in zip(self.names, seen, strict=False):
                if found() is not None and found() is not given:
                    raise ValueError(
                        f"cache_prefix: got a model that keeps the output of block {name!r} for later, expected "
                        "one that reads that of the last block alone; take the cache off"
                    )
            returned.append(output)
            raise _Done

        def early(*_: Any) -> None:
            raise ValueError(
                f"cache_prefix: got a model that runs an adapted layer before block {self.names[-1]!r}, expected all "
                "of the frozen blocks to come first; take the cache off"
            )

        hooks = [block.register_forward_hook(note) for block in self._blocks[:-1]]
        hooks += [layer.register_forward_pre_hook(early) for layer in self._adapted]
        hooks.append(self._blocks[-1].register_forward_hook(stop))
        try:
            with torch.no_grad():
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
        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = context.prefix_outputs
            if not context.recording:
                if not context.enabled or not kept:  # the original model itself, or a forward it did not run before
                    return original(*args, **kwargs)
                found = kept[self._owner(index, kept)]
                return original(*args, **kwargs) if found is _LATE else found
            if context.teacher:
                kept[index] = _LATE
                return original(*args, **kwargs)
            # What goes straight into the next block of the same list is not needed a second time, unless somebody else
            # holds it as well. A compiled graph frees what it does not read by itself.
            compiled = torch.compiler.is_compiling()
            if not compiled and self._runs[index] and args and _hands_over(kept.get(index - 1), args[0]):
                context.hand_over(index - 1)
            kept[index] = original(*args, **kwargs)
            return kept[index]

        return forward

    def _owner(self, index: int, kept: dict[int, Any]) -> int:
        """The block whose output stands for block `index`'s: its own, or the one that took it over."""
        while index not in kept:
            index += 1
        return index


def _adjacent(names: Sequence[str]) -> list[bool]:
    """Whether a block directly follows the one before it in one list."""
    flags = []
    for index, name in enumerate(names):
        parent, _, key = name.rpartition(".")
        other, _, before = names[index - 1].rpartition(".") if index else ("", "", "")
        flags.append(
            bool(index) and parent == other and key.isdigit() and before.isdigit() and int(key) == int(before) + 1
        )
    return flags


def _hands_over(output: Any, argument: Any) -> bool:
    first = _first(output)
    return isinstance(first, Tensor) and first is argument


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output
