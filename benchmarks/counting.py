"""Bytes that a kernel asks global memory for, counted lane by lane in Triton's interpreter.

A load or store of a tile counts its active mask lanes times the element's size: that is what the kernel requests,
before any cache. Beside it stands how many different bytes those were, which is what a cache of infinite size would
leave: the compulsory traffic, and the check on what `traffic.py` declares.

Counting needs masks and addresses, not values. So products return their accumulator, tiles of floating-point
tensors read as zeros, and conversions between them are skipped; integers and flags (group codes, labels) and fp32
vectors (the weight of each sample: a row of weight 0 is not read) are read for what they are, because masks come
from them. Every program of the grid runs, at the layer's real size. A test counts a small launch with and without
these savings and finds the same bytes.

This module only works in a process that was started with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import quick_interpreter
import torch
import triton.language as tl
from rfa_fast.kernels.common import observed
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype


@dataclass
class Bytes:
    """Bytes read and written, requested and different."""

    read: int = 0
    written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0

    @property
    def requested(self) -> int:
        return self.read + self.written

    @property
    def distinct(self) -> int:
        return self.distinct_read + self.distinct_written


@dataclass
class Count:
    """One launch: its kernel, and the bytes of each pointer argument (of the first, where several are one tensor)."""

    kernel: str
    arguments: dict[str, Bytes] = field(default_factory=dict)

    @property
    def total(self) -> Bytes:
        parts = self.arguments.values()
        names = ("read", "written", "distinct_read", "distinct_written")
        return Bytes(*(sum(getattr(part, name) for part in parts) for name in names))


class _Tensors:
    """The tensors of one launch by address, and which of their elements were touched."""

    def __init__(self, kernel: str, arguments: dict[str, Any], marks: bool) -> None:
        self.count = Count(kernel)
        self.bases: list[int] = []
        self.names: list[str] = []
        self.seen: list[tuple[Any, Any]] = []
        storages: dict[int, tuple[str, torch.Tensor]] = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr():
                storages.setdefault(value.untyped_storage().data_ptr(), (name, value))
        for base, (name, tensor) in sorted(storages.items()):
            elements = tensor.untyped_storage().nbytes() // tensor.element_size() if marks else 0
            self.bases.append(base)
            self.names.append(name)
            self.seen.append((np.zeros(elements, dtype=bool), np.zeros(elements, dtype=bool)))
            self.count.arguments[name] = Bytes()

    def touch(self, addresses: Any, mask: Any, size: int, write: bool) -> None:
        """Count the active lanes of one access; rows that are selected by pointer may lie in two tensors."""
        # The interpreter's `&` of a tile of flags and a scalar flag is a tile of integers, which numpy would index by.
        active = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)]
        if not active.size:
            return
        first, last = (bisect_right(self.bases, int(edge)) - 1 for edge in (active.min(), active.max()))
        if first == last:
            self._touch(first, active, size, write)
            return
        places = np.searchsorted(np.array(self.bases, dtype=np.uint64), active, side="right") - 1
        for at in np.unique(places):
            self._touch(int(at), active[places == at], size, write)

    def _touch(self, at: int, active: Any, size: int, write: bool) -> None:
        entry, marks = self.count.arguments[self.names[at]], self.seen[at][write]
        new = 0
        if len(marks):
            places = (active - np.uint64(self.bases[at])) // np.uint64(size)
            fresh = places[~marks[places]]
            marks[fresh] = True
            # A tile may name an element more than once, as a broadcast target does.
            new = len(np.unique(fresh)) if fresh.size else 0
        if write:
            entry.written += active.size * size
            entry.distinct_written += new * size
        else:
            entry.read += active.size * size
            entry.distinct_read += new * size


@contextmanager
def _short_cuts(touch: Callable[[Any, Any, int, bool], None], values: bool) -> Iterator[None]:
    """Let the interpreter report every access to `touch`, and, unless `values`, compute no floating-point value."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size_of(pointers: Any) -> int:
        return int(_get_np_dtype(pointers.get_element_ty()).itemsize)

    def counted_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        touch(pointers.data, mask.data, size_of(pointers), False)
        kind = pointers.get_element_ty()
        if values or not kind.is_floating() or (kind == tl.float32 and pointers.data.ndim < 2):
            return load(self, pointers, mask, other, *rest, **named)
        return TensorHandle(np.zeros(pointers.data.shape, dtype=_get_np_dtype(kind)), kind)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(pointers.data, mask.data, size_of(pointers), True)
        if values or not pointers.get_element_ty().is_floating():
            return store(self, pointers, value, mask, *rest, **named)
        return None

    def no_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any, **named: Any) -> Any:
        return TensorHandle(d.data, d.dtype.scalar)

    cast = InterpreterBuilder.cast_impl

    def no_cast(self: Any, source: Any, kind: Any) -> Any:
        if {source.dtype.scalar, kind.scalar} == {tl.bfloat16, tl.float32}:
            return TensorHandle(np.zeros(source.data.shape, dtype=_get_np_dtype(kind)), kind.scalar)
        return cast(self, source, kind)

    with ExitStack() as stack:
        unchecked = interpreter.InterpreterOptions(sanitize_overflow=values)
        stack.enter_context(patch.object(interpreter.interpreter_builder, "options", unchecked))
        replace = [("create_masked_load", counted_load), ("create_masked_store", counted_store)]
        replace += [] if values else [("create_dot", no_dot), ("cast_impl", no_cast)]
        for name, function in replace:
            stack.enter_context(patch.object(InterpreterBuilder, name, function))
        yield


def count(run: Callable[[], Any], *, values: bool = False, marks: bool = True) -> list[Count]:
    """Run `run`, whose launches are counted in the interpreter.

    Args:
        run: calls launchers on CPU tensors.
        values: also compute what the kernels compute (slow; for the test of the savings).
        marks: also find the different bytes.
    """
    counts: list[Count] = []
    quick_interpreter.install()

    def observer(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        tensors = _Tensors(kernel.fn.__name__.removesuffix("_kernel"), arguments, marks)
        changed = {"EMULATE": arguments["EMULATE"] and values} if "EMULATE" in arguments else {}
        with _short_cuts(tensors.touch, values):
            kernel[grid](**{**arguments, **changed})
        counts.append(tensors.count)

    with observed(observer):
        run()
    return counts
