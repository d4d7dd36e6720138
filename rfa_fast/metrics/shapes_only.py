"""Run a training step on shapes: the operations of a model happen, its numbers do not.

torch's fake tensors know shape, dtype and strides and hold nothing, so that a model of any size can be walked
through in seconds. Alone they stop at the first decision that depends on a value: which rows are to be
forgotten, where a label is missing, whether a gradient is finite. So what decisions are made from stays
real: masks, ids, labels, and whatever is computed from those alone. A scalar or a vector that is computed from fake
numbers (a loss, a gradient norm, a weight per row) becomes a real one of ones, the value under which a healthy step
goes on. Only storage is meant to be right on such a run; no result is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_REAL_NUMBERS = 2**20
_REAL_CODES = 2**22
# torch takes their mean into the buffer of the elementwise losses, which the scalar then keeps.
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_REDUCED_IN_PLACE = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("mse_loss", "smooth_l1_loss", "binary_cross_entropy", "soft_margin_loss")
)


class DependsOnValues(ValueError):
    """The code's course depends on numbers that a run on shapes does not have."""


@contextmanager
def shapes_only() -> Iterator[FakeTensorMode]:
    """Context in which matrices are fake, and masks, ids and small vectors real.

    Yields:
        The mode that made the fakes.

    Raises:
        DependsOnValues: inside, where the code's course depends on the values of a large tensor; a ValueError.

    Example:
        >>> with shapes_only():
        ...     weight = torch.ones(10**6, 10**6)  # four terabytes, were they there
        ...     product = weight @ weight[0]
        ...     rows = torch.tensor([True, False, True]).nonzero()
        >>> tuple(product.shape), product.dtype, rows.tolist()
        ((1000000,), torch.float32, [[0], [2]])
    """
    fake = _Shapes(allow_non_fake_inputs=True)
    with fake, _Values(fake):
        yield fake


def fake_copy(model: nn.Module) -> nn.Module:
    """A model of the same structure, on the CPU, whose matrices are fake; the model itself is not touched.

    Biases, norms, masks and running statistics keep their values. Tied parameters stay tied. To be called inside
    :func:`shapes_only`.

    Args:
        model: on any device, `"meta"` included.

    Raises:
        TypeError: the model cannot be copied.

    Example:
        >>> net = nn.Linear(3, 2, device="meta")
        >>> with shapes_only():
        ...     other = fake_copy(net)
        ...     tuple(other(torch.ones(5, 3)).shape)
        (5, 2)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _like(tensor)
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"model: got a {type(model).__name__} that cannot be copied ({error})") from error


def _like(tensor: Tensor) -> Tensor:
    if not _may_be_real(tensor):
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    elif tensor.is_meta:
        like = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    else:
        with unset_fake_temporarily():
            like = tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(like, requires_grad=tensor.requires_grad)
    return like


class _Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A fake tensor refers to its mode: copying a model must not copy that, or the copies would belong to nobody."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shapes:
        return self


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Decides which tensors hold values."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memo = fake.fake_tensor_converter.tensor_memo
        # torch would make a new one for every use, and not remember what an operation does with it.
        self._stand_ins: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._settled(func, args, kwargs or {})
        # A new fake is remembered by a weak reference, under which nn.Module.to() would refuse to swap it.
        self._memo.clear()
        return out

    def _settled(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "prim":  # asks a tensor for its device
            return func(*args, **kwargs)
        inputs = tensors_in(args, [])
        if kwargs:
            tensors_in(kwargs.values(), inputs)
        if any(isinstance(leaf, FakeTensor) for leaf in inputs):
            return self._from_fakes(func, args, kwargs, inputs)
        # Indices that are numbers select as many rows as they are; only of a mask the values count.
        asks = _needs_values(func) and (func not in _INDEXED or any(leaf.dtype == torch.bool for leaf in inputs[1:]))
        if inputs and (asks or _aliases(func) or _stays_small(func, inputs)):
            return _really(func, args, kwargs)
        # On shapes first: what turns out large is not to be made.
        shown = tree_map(self._stand_in, (args, kwargs)) if inputs else (args, kwargs)
        out = func(*shown[0], **shown[1])
        return _really(func, args, kwargs) if all(map(_may_be_real, tensors_in((out,), []))) else out

    def _from_fakes(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        if args and _only_writes(func):
            return args[0]  # nothing to write, and nothing to ask torch about
        shown = (args, kwargs)
        if not all(isinstance(leaf, FakeTensor) for leaf in inputs):
            if func in _INDEXED:
                args = (args[0], _by_number(args[1]), *args[2:])
            shown = tree_map(self._stand_in, (args, kwargs))
        try:
            out = func(*shown[0], **shown[1])
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in inputs)
            raise DependsOnValues(
                f"model: got {func} of {shapes}, whose result depends on values; expected a step whose course depends "
                "on its masks, ids and labels alone"
            ) from error
        if _aliases(func):
            return _the_same(func, args, kwargs, out)
        if isinstance(out, FakeTensor) and out.ndim > 1:
            return out
        if func in _REDUCED_IN_PLACE and out.ndim == 0:
            elements = (inputs[0] + inputs[1]).numel()
            return torch.empty(elements, dtype=out.dtype).as_strided((), ())
        storages = {id(leaf.untyped_storage()) for leaf in inputs}

        def settle(leaf: Any) -> Any:
            if not isinstance(leaf, FakeTensor) or leaf.ndim > 1 or leaf.numel() > _REAL_NUMBERS:
                return leaf
            return leaf if id(leaf.untyped_storage()) in storages else _healthy(func, leaf)

        return tree_map(settle, out)

    def _stand_in(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        known = self._stand_ins.get(leaf)
        if known is None or known.shape != leaf.shape:
            known = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            self._stand_ins[leaf] = known
        return known


def tensors_in(values: Iterable[Any], found: list[Tensor]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, added to `found`.

    Operations take and return tensors and lists of them, nothing deeper: torch's general walk costs more than the
    operation does on shapes.

    Example:
        >>> [t.item() for t in tensors_in((torch.tensor(1), 3, [torch.tensor(2), None]), [])]
        [1, 2]
    """
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            tensors_in(value, found)
    return found


@cache
def _needs_values(func: Any) -> bool:
    wanted = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in wanted)


def _stays_small(func: Any, inputs: list[Tensor]) -> bool:
    """Whether the result is known to be small without a look: no operation but these outgrows an outer product."""
    most = _REAL_NUMBERS if any(t.is_floating_point() for t in inputs) else _REAL_CODES
    name = func._schema.name
    return not name.startswith(("aten::new_", "aten::repeat")) and math.prod(t.numel() for t in inputs) <= most


@cache
def _aliases(func: Any) -> bool:
    """Whether results are views of, or the same as, arguments, or arguments are written to."""
    schema = func._schema
    return any(part.alias_info is not None for part in (*schema.returns, *schema.arguments))


@cache
def _only_writes(func: Any) -> bool:
    """Whether an operation changes the numbers of its first argument, not its shape, and returns it."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    return (
        schema.name.startswith("aten::")
        and name.endswith("_")
        and not name.startswith("_")
        and name not in ("resize_", "resize_as_", "set_")
        and torch.Tag.inplace_view not in func.tags
        and len(schema.returns) == 1
    )


def _the_same(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """The result of an operation that writes to a real tensor is that tensor, not its fake stand-in."""
    schema = func._schema
    if not schema.is_mutable or len(schema.returns) != 1:
        return out
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            target = kwargs[argument.name] if argument.name in kwargs else args[place] if place < len(args) else None
            if isinstance(target, Tensor):
                return out if isinstance(target, FakeTensor) else target
    return out


def _may_be_real(tensor: Tensor) -> bool:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.ndim <= 1 and tensor.numel() <= _REAL_NUMBERS
    return tensor.numel() <= _REAL_CODES


def _by_number(indices: Iterable[Any]) -> list[Any]:
    """A mask that is known selects a known number of rows."""
    out: list[Any] = []
    for index in indices:
        known = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
        out += _really(torch.nonzero, (index,), {"as_tuple": True}) if known else [index]
    return out


def _really(func: Any, args: Any, kwargs: Any) -> Any:
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _healthy(func: Any, like: Tensor) -> Tensor:
    """Ones; `any`, which asks whether something is wrong (a NaN, an overflow), says no."""
    value = 0 if func.overloadpacket is torch.ops.aten.any else 1
    with unset_fake_temporarily():
        return torch.full(like.shape, value, dtype=like.dtype)
