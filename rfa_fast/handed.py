"""What one block hands on to the next: a tensor that says so when anything else is done with it.

Nothing but the blocks themselves knows whether a model only hands their outputs on or reads them as well, in a sum over
layers, a skip connection, a feature pyramid. Such a tensor is the output, with the same storage; the block that it is
handed to gets the plain one (:func:`given`), and every other use is noted before it takes place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

# What may be asked of a tensor without reading it.
_PLAIN = frozenset(
    getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "layout", "requires_grad")
) | {Tensor.get_device}


class Handed(Tensor):
    """A block's output on its way to the next block.

    Attributes:
        plain: the output itself.
        read: is called before anything is done with it.

    Example:
        >>> handed = hand_on(torch.ones(2), lambda: print("read"))
        >>> given(handed)
        tensor([1., 1.])
        >>> handed.sum()
        read
        tensor(2.)
    """

    plain: Tensor
    read: Callable[[], object]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the use, then do it with the plain tensors."""
        if func not in _PLAIN:
            tree_map_only(Handed, lambda one: one.read(), (args, kwargs or {}))
        return func(*given(args), **given(kwargs or {}))


def hand_on(output: Tensor, read: Callable[[], object]) -> Tensor:
    """`output`, any shape and dtype, as a tensor that calls `read` before anything is done with it.

    Example:
        >>> hand_on(torch.ones(2), print).dtype  # which tells nothing of what is in it
        torch.float32
    """
    handed = torch.Tensor._make_subclass(Handed, output.detach())
    handed.plain, handed.read = output, read
    return handed


def send(output: Any, read: Callable[[], object], *, blank: bool = False) -> tuple[Any, Tensor | None]:
    """A block's output, a tensor or a tuple that begins with one, with that tensor handed on.

    Args:
        output: of any kind.
        read: is called before anything is done with the tensor.
        blank: put an empty tensor in its place.

    Returns:
        The output, and the handed tensor; of another kind of output (nested, sparse, quantised, distributed, fake)
        itself, and `None`.

    Example:
        >>> sent, first = send((torch.ones(2), "rest"), print)
        >>> sent[0] is first, sent[1]
        (True, 'rest')
    """
    several = type(output) is tuple and len(output) > 0
    first = output[0] if several else output
    if not isinstance(first, Tensor) or not _dense(first):
        return output, None
    handed = hand_on(first.new_empty(0) if blank else first, read)
    return (handed, *output[1:]) if several else handed, handed


def _dense(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    # A fake tensor is an object of its own kind already: it takes no second class.
    return plain and not is_traceable_wrapper_subclass(tensor) and not is_fake(tensor)


def given(arguments: Any) -> Any:
    """Arguments, however nested, with plain tensors in the place of handed ones.

    Example:
        >>> type(given({"x": [hand_on(torch.ones(1), print)]})["x"][0]).__name__
        'Tensor'
    """
    return tree_map_only(Handed, lambda one: one.plain, arguments)


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written into; `None` in inference mode, which does not count.

    Example:
        >>> tensor = torch.zeros(2)
        >>> before = version(tensor)
        >>> version(tensor.add_(1)) == before
        False
    """
    return None if tensor.is_inference() else tensor._version
