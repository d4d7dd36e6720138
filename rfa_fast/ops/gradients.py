"""What autograd is told of the derivatives by hand: which tensors they leave to it, and that they are the last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rfa_fast.ops.rows import without_autocast

_TWICE = "rfa_fast: the gradient of a fused operator cannot be differentiated again; backend='reference' can"


def trained(*tensors: Tensor | None) -> bool:
    """Whether one of a layer's own tensors is to get a gradient, which the derivatives by hand leave out.

    Example:
        >>> trained(torch.zeros(1), None), trained(torch.zeros(1, requires_grad=True))
        (False, True)
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def by_autograd(forward: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """A layer's forward as autograd follows it; like the derivatives by hand without autocast, in x's own dtype.

    Example:
        >>> by_autograd(torch.add, (torch.ones(1), torch.ones(1)))
        tensor([2.])
    """
    with without_autocast(arguments[0].device.type):
        return forward(*arguments)


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose results raise where they are differentiated again, instead of passing for constants.

    :func:`torch.autograd.function.once_differentiable` does so only where what comes in requires a gradient.

    Args:
        backward: from `ctx` and the gradients of the outputs to the gradients of the inputs, or `None` for each.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...     backward = staticmethod(differentiable_once(lambda ctx, grad: (2 * grad * ctx.saved_tensors[0],)))
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> (slope,) = torch.autograd.grad(Square.apply(x), x, create_graph=True)
        >>> slope.backward()
        Traceback (most recent call last):
        ...
        RuntimeError: rfa_fast: the gradient of a fused operator cannot be differentiated again; backend='reference' can
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        error = torch._C._functions.DelayedError(_TWICE, len(found))
        marked: Any = error(*[None if grad is None else grad.detach().requires_grad_() for grad in found])  # type: ignore[arg-type]
        return marked if isinstance(marked, tuple) else (marked,)

    return once
