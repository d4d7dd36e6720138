"""The frozen prefix: the repeated blocks before the first adapted one, whose output no adapter changes.

As long as it has nothing to train, autograd keeps nothing of it. Teacher mode needs its output twice, once for the
original model and once for the adapted one, and it is the same: the blocks run for the first and answer the second
from what they returned. The same holds from one epoch to the next while the inputs stay as they are, which is what
:mod:`rfa_fast.prefix_cache` is for.

Blocks are found by structure (:func:`rfa_fast.targets.repeated_blocks`). A block answers by a function put in front of
its `forward` for the time of one batch; its class, its hooks and its parameters stay as they are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rfa_fast.forwards import in_front
from rfa_fast.groups import GroupContext
from rfa_fast.handed import Handed, given, send, version
from rfa_fast.head import logits_of
from rfa_fast.padding import Inputs

_FROZEN = (
    "expected it frozen: what it gives would be kept from before its update, without a gradient. Freeze it, or take "
    "the cache off"
)


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
        # Whether the original model's outputs do for the adapted one; `None`: no batch has shown it yet.
        self._sharable: bool | None = None
        self._cachable = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions in front of the blocks: those of a copy are its own."""
        return {**self.__dict__, "_functions": ([], [])}

    @contextmanager
    def shared(self, context: GroupContext) -> Iterator[None]:
        """In teacher mode, let the prefix run for the original model only; nothing otherwise.

        Entered before a compiled function is called, not inside it: inductor merges equal computations, but not
        attention's, and so nothing behind the first block. The functions are the same from one batch to the next,
        for that is what a compiled graph asks of a module's forward. Inference mode does not count what is written
        into, blocks compiled one by one take no handed tensors, and what is trained in the prefix or in front of it
        wants a gradient, which the original model's outputs do not pass on: these run the prefix twice.
        """
        idle = not self._blocks or context.config.mode != "teacher" or torch.is_inference_mode_enabled()
        if idle or self._trained() or any(block._compiled_call_impl is not None for block in self._blocks):
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

    def _trained(self) -> str | None:
        """The first parameter of the prefix that is to get a gradient."""
        for name, block in zip(self.names, self._blocks, strict=True):
            for key, parameter in block.named_parameters():
                if parameter.requires_grad:
                    return f"{name}.{key}"
        return None

    def check_frozen(self, inputs: Inputs) -> None:
        """That a cache, which passes no gradient on, leaves nothing without one.

        Raises:
            ValueError: a parameter of the prefix, or an input, that is to get a gradient.
        """
        if (name := self._trained()) is not None:
            raise ValueError(f"cache_prefix: got {name!r} to train, {_FROZEN}")
        if asks_gradient(inputs):
            raise ValueError(
                "cache_prefix: got inputs with requires_grad, expected ones without: a cache passes no gradient on"
            )

    def run(
        self,
        model: nn.Module,
        inputs: Inputs,
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """The output of the prefix for a batch, `(B, …)`, without gradient; what comes after it does not run.

        The first time it does, for what the model does with what the blocks returned; and once more with the blocks
        answering, which must come to the same.

        Args:
            aside: makes what is entered meanwhile; see :func:`rfa_fast.head.standing_aside`.

        Raises:
            TypeError: a last block that returns more than one tensor.
            ValueError: a model that reads what an earlier block returned, writes into the last one's, calls a block
                twice, or runs the last before another or behind an adapted layer.
        """
        returned: list[Any] = []
        ran: list[str] = []
        versions: list[int | None] = []

        def refuse(what: str, expected: str) -> NoReturn:
            raise ValueError(f"cache_prefix: got a model that {what}, expected {expected}; take the cache off")

        def reads(name: str) -> None:
            refuse(
                f"reads the output of block {name!r} itself",
                "one that hands it on to the next block and reads that of the last alone",
            )

        def early(*_: Any) -> None:
            if not returned:
                refuse(
                    f"runs an adapted layer before block {self.names[-1]!r}", "all of the frozen blocks to come first"
                )

        def running(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                _check_no_gradient(name, args, kwargs)
                torch.set_grad_enabled(False)  # for the rest of the forward
                if name in ran:
                    refuse(f"calls block {name!r} twice", "one call of each")
                ran.append(name)
                output = original(*given(args), **given(kwargs))
                if name == self.names[-1]:
                    if missing := [each for each in self.names if each not in ran]:
                        refuse(
                            f"runs block {name!r} before {missing[0]!r}", "the last of the frozen blocks to run last"
                        )
                    returned.append(output)
                    versions.extend(version(tensor) for tensor in _tensors(output))
                    if self._cachable:
                        raise _Done
                    return output
                sent, first = send(output, functools.partial(reads, name))
                if first is None:
                    refuse(
                        f"returns {type(output).__name__} from block {name!r}",
                        "a dense tensor, or a tuple that begins with one",
                    )
                return sent

            return forward

        functions = [running(name, block.forward) for name, block in zip(self.names, self._blocks, strict=True)]
        hooks = [layer.register_forward_pre_hook(early) for layer in self._adapted]
        whole: Any = None
        try:
            # With gradient up to the first block, to see whether anything in front of it is trained.
            with in_front(self._blocks, functions), torch.enable_grad(), aside():
                whole = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
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
        if [version(output)] != versions:
            refuse(f"writes into the output of block {self.names[-1]!r}", "one that leaves it as it is")
        if not self._cachable:
            answers = [lambda *_, **__: output] * len(self._blocks)
            with in_front(self._blocks, answers), torch.no_grad(), aside():
                again = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
            if not _alike(logits_of(whole), logits_of(again)):
                refuse(
                    f"gives something else where its frozen blocks answer with what {self.names[-1]!r} returned",
                    "one that reads that alone, and gives the same for the same inputs",
                )
        self._cachable = True
        return output

    @contextmanager
    def answered(self, context: GroupContext) -> Iterator[None]:
        """Let every block of the prefix answer with `context.prefix_output`, which is the last one's."""

        def answering(name: str) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                if not torch.compiler.is_compiling():  # a compiled step has run once without by then
                    _check_no_gradient(name, args, kwargs)
                return context.prefix_output

            return answer

        with in_front(self._blocks, [answering(name) for name in self.names]):
            yield

    def _answering(self, index: int, original: Callable[..., Any], context: GroupContext) -> Callable[..., Any]:
        last = index == len(self._blocks) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not context.recording:
                if context.enabled and isinstance(context.prefix_outputs.get(index), _Kept):
                    context.prefix_outputs = self._answers(context.prefix_outputs)
                    context.original_output = None
                # Nothing: the original model itself, a forward that it did not run before, or a late block.
                if not context.enabled or index not in context.prefix_outputs:
                    return original(*args, **kwargs)
                if wants_gradient((args, kwargs)):  # and so do the blocks behind this one, which get its output
                    return original(*args, **kwargs)
                return context.prefix_outputs[index]
            # Behind an adapted layer, whatever the order they are registered in: its output is the original model's.
            if context.teacher or self._sharable is False:
                return original(*args, **kwargs)
            if torch.compiler.is_compiling():
                output = original(*args, **kwargs)
                if self._sharable:  # the graph frees by itself what nobody reads
                    context.prefix_outputs[index] = output
                return output
            output = original(*given(args), **given(kwargs))
            if index in context.prefix_outputs:  # called twice
                self._sharable = False
                return output
            kept = context.prefix_outputs[index] = _Kept(output)
            return output if last else kept.send(self.names[index])

        return forward

    def _answers(self, kept: dict[int, Any]) -> dict[int, Any]:
        """What the blocks answer the adapted model: nothing where the original one wrote into an output.

        Such a model runs its prefix twice, in the batches to come as well.
        """
        self._sharable = self._sharable is not False and not any(block.overwritten() for block in kept.values())
        return {index: block.answer() for index, block in kept.items()} if self._sharable else {}


class _Kept:
    """What is kept of a block's output, from the original model's forward to the adapted one's.

    Of one that is handed on to the next block, as most are, it is what the model does with it besides: the output once
    it has been read, and else the rest of a tuple that begins with it.
    """

    def __init__(self, output: Any) -> None:
        self._output = output
        self._versions = [version(tensor) for tensor in _tensors(output)]
        self._sent: weakref.ref[Tensor] | None = None

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
            self._sent = weakref.ref(first)
        return sent

    def overwritten(self) -> bool:
        """Whether the model wrote into what is kept."""
        now = [None if isinstance(tensor, Handed) else version(tensor) for tensor in _tensors(self._output)]
        return any(new is not None and new != old for new, old in zip(now, self._versions, strict=True))

    def answer(self) -> Any:
        """What the block returns to the adapted model; an output that is still there counts as read."""
        sent = None if self._sent is None else self._sent()
        if isinstance(sent, Handed) and any(isinstance(tensor, Handed) for tensor in _tensors(self._output)):
            sent.read()
        return self._output


def wants_gradient(arguments: Any) -> bool:
    """Whether what a block is called with comes from something that is trained.

    A leaf that is no parameter is nobody's: `enable_input_require_grads` makes such of embeddings. A model's own inputs
    are looked at by :func:`asks_gradient`.

    Example:
        >>> prompt = nn.Parameter(torch.zeros(1))
        >>> wants_gradient([prompt + 1]), wants_gradient([torch.zeros(1, requires_grad=True)])
        (True, False)
    """
    return torch.is_grad_enabled() and any(
        tensor.requires_grad and (not tensor.is_leaf or isinstance(tensor, nn.Parameter))
        for tensor in _tensors(arguments)
    )


def _check_no_gradient(block: str, args: Any, kwargs: Any) -> None:
    if wants_gradient((args, kwargs)):
        raise ValueError(f"cache_prefix: got something to train in front of block {block!r}, {_FROZEN}")


def asks_gradient(inputs: Any) -> bool:
    """Whether one of a model's inputs, however nested, is to get a gradient.

    Example:
        >>> asks_gradient({"inputs_embeds": torch.zeros(1, requires_grad=True)}), asks_gradient(torch.zeros(1))
        (True, False)
    """
    return any(tensor.requires_grad for tensor in _tensors(inputs))


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether a model's logits are the same twice but for rounding, infinite and NaN ones in the same places."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0, one - other).float().norm()
    size = torch.where(one.isfinite(), one, 0).float().norm()
    return bool(difference <= torch.finfo(one.dtype).eps ** 0.5 * size)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
