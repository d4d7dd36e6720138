"""Rows to retain, of a batch that has others beside them: what teacher mode needs of the original model, and no more.

Its features are compared with on retain rows alone (eq. 7), and x̃ is their mean (eq. 8). So on a CPU its linear layers
compute no sample behind the last one to retain, and nothing is kept of a feature but its retain rows. In a compiled
graph, where no shape may depend on a value, each is an operator of its own that reads the group codes when it runs.
On an accelerator that would mean waiting for the device, and everything is computed and kept.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_fast.objective import RETAIN
from rfa_fast.ops.rows import autocast

_MALLOC_KEEPS = 2**25  # glibc returns what is larger to the system at once, and has it mapped again


def _fresh(like: Tensor) -> Tensor:
    """Memory for a CPU tensor that no earlier tensor had: its pages are there once they are written to."""
    size = like.numel() * like.element_size()
    if size < mmap.PAGESIZE:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(like.shape)


@torch.library.custom_op("rfa_fast::retain_rows", mutates_args=())
def _retain_rows(values: Tensor, group: Tensor) -> Tensor:
    first = _fresh(values)
    rows = (group == RETAIN).nonzero().squeeze(1)
    torch.index_select(values, 0, rows, out=first[: rows.shape[0]])
    return first


@_retain_rows.register_fake
def _(values: Tensor, group: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def retain_rows(values: Tensor, group: Tensor) -> Tensor:
    """The retain rows of `values` `(M, N)`, in their order: what is kept of a teacher's feature for the backward.

    Where there is none, one other row, so that there is one to address.

    In a compiled graph, where no shape may depend on a value, they come first in a tensor of M rows, and the rows
    behind them are not written: no page of a large tensor is there before it is written to. They must not be read.

    Example:
        >>> retain_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0], dtype=torch.int8))
        tensor([[1.],
                [3.]])
    """
    if torch.compiler.is_compiling():
        rows: Tensor = _retain_rows(values, group)
        return rows
    rows = values[group == RETAIN]
    return rows if rows.shape[0] else values[:1]


def places(group: Tensor) -> Tensor:
    """Where each retain row is in :func:`retain_rows`, `(M,)` int64; of any other row, some row that is there.

    Example:
        >>> places(torch.tensor([1, 0, -1, 0], dtype=torch.int8))
        tensor([0, 0, 0, 1])
    """
    return ((group == RETAIN).cumsum(0) - 1).clamp(min=0)


def _zero_behind(count: int, output: Tensor) -> Tensor:
    """Zeros behind row `count`; as pages nobody has written to where malloc would ask for new ones in any case."""
    if output.numel() * output.element_size() > _MALLOC_KEEPS:
        return _fresh(output)
    output[count:] = 0
    return output


def _up_to_last(rows: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor) -> Tensor:
    found = (samples == RETAIN).nonzero()
    last = int(found[-1]) + 1 if found.shape[0] else 0
    count = last * (rows.shape[0] // max(samples.shape[0], 1))
    if count == rows.shape[0]:
        return F.linear(rows, weight, bias)
    output = _zero_behind(count, rows.new_empty((rows.shape[0], weight.shape[0])))
    if bias is None:
        torch.mm(rows[:count], weight.mT, out=output[:count])
    else:
        torch.addmm(bias, rows[:count], weight.mT, out=output[:count])
    return output


@torch.library.custom_op("rfa_fast::retain_linear", mutates_args=())
def _retain_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor) -> Tensor:
    return _up_to_last(rows, weight, bias, samples)


@_retain_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def retain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor) -> Tensor:
    """x Wᵀ + b of the samples up to the last one to retain; 0 for those behind it. No gradient.

    Args:
        x: `(B, …, K)` on a CPU.
        weight, bias: `(N, K)` and `(N,)`.
        samples: group codes `(B,)`. In any order; what lies behind the last 0 costs nothing.

    Example:
        >>> codes = torch.tensor([0, 1], dtype=torch.int8)
        >>> retain_linear(torch.ones(2, 3), torch.ones(1, 3), None, codes)
        tensor([[3.],
                [0.]])
    """
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    rows = x.reshape(-1, x.shape[-1])
    product: Any = _retain_linear if torch.compiler.is_compiling() else _up_to_last
    output: Tensor = product(rows, weight, bias, samples)
    return output.reshape(*x.shape[:-1], weight.shape[0])


def original_output(x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor | None:
    """The output of a frozen `nn.Linear` by :func:`retain_linear`, or `None` where its own forward has to be run.

    That is without codes, on an accelerator, with a weight that is more than a tensor (quantised, sharded), and for an
    input whose first axis need not be the batch: where the second one is as long, or the last (a row each is cheap).
    In a compiled graph axes are not compared, which would compile it once more for a batch where they are equal.

    Example:
        >>> layer, codes = nn.Linear(2, 1), torch.zeros(3, dtype=torch.int8)
        >>> original_output(torch.ones(3, 2), layer.weight, layer.bias, codes) is None
        True
        >>> x = torch.ones(3, 4, 2)
        >>> with torch.no_grad():
        ...     torch.equal(original_output(x, layer.weight, layer.bias, codes), layer(x))
        True
    """
    if type(weight) is not nn.Parameter or x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    if samples is None or x.ndim < 3 or x.shape[0] != samples.shape[0]:
        return None
    if not torch.compiler.is_compiling() and x.shape[1] == samples.shape[0]:
        return None
    return retain_linear(x, weight, bias, samples)
