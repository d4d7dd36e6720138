"""The peak of live tensor memory, counted storage by storage instead of asked from an allocator.

What an allocator or the kernel's page tables report depends on the machine: block sizes, caches, what ran
before. Here every storage that an operation returns is counted from then until nothing refers to it any
more: autograd's saved tensors, gradients and optimizer state included, views once. That number is
the same on every machine, is exact for a tensor of 4 bytes, and needs no tensor to hold anything: it also counts
fake tensors, which is how a model is measured that does not fit (:mod:`rfa_fast.metrics.forecast`).

Not seen: what a kernel allocates and frees inside one call (a BLAS library's packing buffers, cuDNN's workspace),
an allocator's rounding and fragmentation, and what is no tensor. Operators that Python implements
(`rfa_fast::head_loss`) are looked into, because their buffers are tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Body = Callable[..., Any]


@dataclass(frozen=True)
class Storage:
    """One storage as it was first seen.

    Attributes:
        bytes: its size.
        shape, dtype: of the first tensor on it.
        made_by: the operation that returned it, such as `"aten.mm"`; of what was there before, what it is:
            `"parameter"`, `"buffer"`, `"gradient"`, `"optimizer state"` or `"existing"`.
        name: of a parameter or buffer.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str
    name: str = ""

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.bytes:,} B  {kind}[{', '.join(map(str, self.shape))}]  {self.made_by} {self.name}".rstrip()


class LiveStorage:
    """The count of a :func:`live_storage` block; stays readable after it.

    Attributes:
        current: bytes of the storages alive now, 0 after the block only if nothing was kept.
        peak: the largest `current` so far.
        existing: bytes that were alive at the start, as far as they were given.
        largest: the largest storage made inside the block, `None` before there is one.
    """

    def __init__(self) -> None:
        self.current = self.peak = self.existing = 0
        self.largest: Storage | None = None
        self._alive: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._at_peak: list[Storage] | None = []

    @property
    def at_peak(self) -> list[Storage]:
        """The storages that were alive at the peak, largest first."""
        # Nothing was dropped since the peak: what is alive is what it consists of.
        found = self._living() if self._at_peak is None else self._at_peak
        return sorted(found, key=lambda storage: -storage.bytes)

    def by_operation(self) -> dict[str, int]:
        """Bytes alive at the peak by the operation that made them, largest first.

        Example:
            >>> with live_storage() as live:
            ...     kept = [torch.ones(8), torch.ones(8), torch.zeros(4)]
            >>> live.by_operation()
            {'aten.ones': 64, 'aten.zeros': 16}
        """
        out: dict[str, int] = {}
        for storage in self.at_peak:
            out[storage.made_by] = out.get(storage.made_by, 0) + storage.bytes
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def reset_peak(self) -> None:
        """Forget what came before: the peak of what follows starts from what is alive now.

        Example:
            >>> with live_storage() as live:
            ...     before = torch.ones(1000)
            ...     del before
            ...     live.reset_peak()
            ...     kept = torch.ones(2)
            >>> live.peak
            8
        """
        self.peak, self._at_peak, self.largest = self.current, None, None

    def add(self, tensors: Any, made_by: str = "existing", name: str = "") -> None:
        """Count tensors that no operation of the block made; storages counted already are left out.

        Args:
            tensors: a tensor, or any nesting of lists, tuples and dicts that holds some.
            made_by, name: what the breakdown calls them.
        """
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._see(tensor, made_by, name, new=False)

    def _see(self, tensor: Tensor, made_by: str, name: str = "", *, new: bool = True) -> None:
        if tensor.layout != torch.strided:
            for part in _parts(tensor):
                self._see(part, made_by, name, new=new)
            return
        storage = tensor.untyped_storage()
        # The Python object of a storage lives as long as the storage, so that its id is the storage's.
        key, size = id(storage), int(storage.nbytes())
        known = self._alive.get(key)
        if known is not None:
            if known[1].bytes == size:
                return
            self._forget(key)  # resized in place
        entry = Storage(size, tuple(tensor.shape), tensor.dtype, made_by, name)
        self._alive[key] = (weakref.ref(storage, self._dropper(key)), entry)
        self.current += size
        if not new:
            self.existing += size
        elif self.largest is None or size > self.largest.bytes:
            self.largest = entry
        if self.current > self.peak:
            self.peak, self._at_peak = self.current, None

    def _dropper(self, key: int) -> Callable[[Any], None]:
        counter = weakref.ref(self)  # the storages of a model must not keep a finished count alive

        def drop(_: Any) -> None:
            found = counter()
            if found is not None:
                found._forget(key)

        return drop

    def _forget(self, key: int) -> None:
        if key not in self._alive:
            return
        if self._at_peak is None:  # the last moment: while memory only grows, nothing has to be copied
            self._at_peak = self._living()
        self.current -= self._alive.pop(key)[1].bytes

    def _living(self) -> list[Storage]:
        return [entry for _, entry in self._alive.values()]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a sparse one is made of."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd, and its results."""

    def __init__(self, live: LiveStorage, bodies: Mapping[str, Body]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.bodies = live, bodies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor for its device
            return func(*args, **kwargs)
        body = _body_of(func, self.bodies)
        if body is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = body(*args, **kwargs)
        name = str(func.overloadpacket)
        if isinstance(out, Tensor):  # nearly always, and the walk below is not free
            self.live._see(out, name)
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.live._see(tensor, name)
        return out


def _body_of(func: Any, given: Mapping[str, Body]) -> Body | None:
    """The Python implementation of a custom operator; `None` for torch's own operators."""
    if func.namespace in ("aten", "prim", "prims"):
        return None
    name = func._schema.name
    if name in given:
        return given[name]
    from torch._library.custom_ops import OPDEFS

    found = OPDEFS.get(name)
    return None if found is None else found._init_fn


@contextmanager
def live_storage(
    *existing: nn.Module | Tensor | torch.optim.Optimizer | Iterable[Any] | Mapping[Any, Any],
    bodies: Mapping[str, Body] | None = None,
) -> Iterator[LiveStorage]:
    """Count the bytes of live tensor storages while a block runs.

    Args:
        *existing: what is there already and is to count: modules (parameters, buffers and gradients),
            optimizers (their state), tensors, or nestings of these. What is not given is not counted, unless an
            operation of the block returns it.
        bodies: name of a custom operator -> Python function to look into in place of its registered one.

    Yields:
        The :class:`LiveStorage`; its `current` goes on falling after the block as tensors die, but nothing new
        is counted.

    Raises:
        TypeError: `existing` holds something else.

    Example:
        >>> weight = torch.ones(4, 4)
        >>> with live_storage(weight) as live:
        ...     half = weight[:2]          # a view: nothing
        ...     double = weight * 2        # 64 bytes
        ...     del double
        ...     triple = weight * 3        # takes the place of the other
        >>> live.existing, live.peak, str(live.largest)
        (64, 128, '64 B  float32[4, 4]  aten.mul')
    """
    live = LiveStorage()
    for item in existing:
        _add_existing(live, item)
    with _Counting(live, bodies or {}):
        yield live


def _add_existing(live: LiveStorage, item: Any) -> None:
    if isinstance(item, nn.Module):
        for kind, named in (("parameter", item.named_parameters()), ("buffer", item.named_buffers())):
            for name, tensor in named:
                live.add(tensor, kind, name)
                live.add(tensor.grad, "gradient", name)
    elif isinstance(item, torch.optim.Optimizer):
        live.add([state for group in item.state.values() for state in group.values()], "optimizer state")
    elif isinstance(item, Tensor):
        live.add(item)
        live.add(item.grad if item.is_leaf else None, "gradient")
    elif isinstance(item, Mapping):
        for value in item.values():
            _add_existing(live, value)
    elif isinstance(item, list | tuple | set | frozenset):
        for value in item:
            _add_existing(live, value)
    elif item is not None:
        raise TypeError(f"existing: got {type(item).__name__}, expected modules, optimizers, tensors or lists of them")
