"""How a layer's arguments become rows: the shapes the fused linear operator takes, whatever the caller's were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class RowMap(NamedTuple):
    """A tensor that broadcasts over rows, without being expanded.

    Attributes:
        values: `(P, N)`; its columns may have stride 0.
        div, mod: row m of the output takes row `(m // div) % mod` of `values`.
    """

    values: Tensor
    div: int
    mod: int


def row_map(tensor: Tensor, leading: Sequence[int], features: int) -> RowMap:
    """A tensor that broadcasts against `(*leading, features)` as rows.

    One run of axes can be addressed in place, which is every shape the layers pass: one vector, one per
    position, one per sample, or all of them. Anything else is expanded.

    Example:
        >>> m = row_map(torch.zeros(3, 5), (2, 3), 5)  # one per position
        >>> m.values.shape, m.div, m.mod
        (torch.Size([3, 5]), 1, 3)
        >>> row_map(torch.zeros(2, 1, 5), (2, 3), 5)[1:]  # one per sample
        (3, 2)
    """
    padded = tensor.reshape((1,) * (len(leading) + 1 - tensor.ndim) + tuple(tensor.shape))
    real = [axis for axis in range(len(leading)) if padded.shape[axis] != 1]
    if not real:
        return RowMap(padded.reshape(1, -1).expand(1, features), 1, 1)
    first, last = real[0], real[-1]
    if any(padded.shape[axis] != leading[axis] for axis in range(first, last + 1)):
        padded = padded.expand(*leading, padded.shape[-1])
        first, last = 0, len(leading) - 1
    values = padded.reshape(math.prod(leading[first : last + 1]), -1)
    return RowMap(values.expand(-1, features), math.prod(leading[last + 1 :]), math.prod(leading[first : last + 1]))


def group_rows(group: Tensor, leading: Sequence[int]) -> Tensor:
    """Group codes over the leading axes, or the first ones, as `(rows,)` contiguous.

    Example:
        >>> group_rows(torch.tensor([0, 1], dtype=torch.int8), (2, 3))
        tensor([0, 0, 0, 1, 1, 1], dtype=torch.int8)
    """
    trailing = (1,) * (len(leading) - group.ndim)
    return group.reshape(tuple(group.shape) + trailing).expand(tuple(leading)).reshape(-1).contiguous()


def picks(rows: Tensor) -> bool:
    """Whether to pick the rows of a group rather than mask the others.

    Picking touches only what is needed, but waits for a device and makes shapes of values: on a CPU, and
    outside a compiled graph, neither matters.

    Example:
        >>> picks(torch.zeros(1))
        True
    """
    return eager_on_cpu(rows)


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed with this tensor runs on a CPU, operator by operator.

    Example:
        >>> eager_on_cpu(torch.zeros(1)), eager_on_cpu(torch.zeros(1, device="meta"))
        (True, False)
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def unit_sums(per_row: Tensor, unit_rows: int) -> Tensor:
    """`(rows,)` -> `(units,)`, a unit being `unit_rows` adjacent rows.

    Example:
        >>> unit_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
        tensor([3., 7.])
    """
    return per_row.reshape(-1, unit_rows).sum(1)


def row_weights(
    upstream: Tensor, selected: Tensor, norms: Tensor | None, unit_rows: int, *, factor: float = 2.0
) -> Tensor:
    """What a row's error is multiplied with in the gradient of its group's sum.

    Args:
        upstream: 0-dim, the gradient of the sum.
        selected: bool `(rows,)`.
        norms: `(units,)` for the unsquared norm, whose gradient is e/‖e‖ and 0 at 0; `None` for the
            squared one, 2e.

    Example:
        >>> row_weights(torch.tensor(3.0), torch.tensor([True, False]), None, 1)
        tensor([6., 0.])
    """
    if norms is None:
        return torch.where(selected, factor * upstream, 0)
    positive = norms > 0
    each = torch.where(positive, upstream / torch.where(positive, norms, 1), 0)
    return torch.where(selected, each[:, None].expand(-1, unit_rows).reshape(-1), 0)


def autocast(tensor: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on, as torch's own products would take them.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast(torch.zeros(1))[0].dtype
        torch.bfloat16
    """
    kind = tensor.device.type
    if not autocasts(kind):
        return (tensor, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (tensor, *others))


# Asked once: not every torch can ask it within a compiled function.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "ipu", torch._C._get_privateuse1_backend_name())
_WITH_AUTOCAST = frozenset(kind for kind in _DEVICES if torch.amp.is_autocast_available(kind))


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device; for one that has none, such as meta, it is not.

    Example:
        >>> autocasts("cpu"), autocasts("meta")
        (False, False)
    """
    return kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Context in which products stay in their own dtype: what :func:`autocast` narrows is narrow already.

    Args:
        kind: type of the device, `"cpu"` or `"cuda"` say.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast("cpu"):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    return torch.autocast(kind, enabled=False) if kind in _WITH_AUTOCAST else nullcontext()
