"""How modules run for the time of one batch: with a function in front of `forward`, with the train flag put down.

The module keeps its class, its hooks and its parameters; what another has put there before comes back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def in_front(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let each module run the function beside it in place of its `forward`.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with in_front([layer], [lambda x: x + 1]):
        ...     layer(1)
        2
        >>> "forward" in layer.__dict__
        False
    """
    own = [module.__dict__.get("forward") for module in modules]
    for module, function in zip(modules, functions, strict=True):
        object.__setattr__(module, "forward", function)
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", before)


@contextmanager
def flags_down(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules behave as in eval mode; those that were in train mode are again afterwards.

    The flag alone is changed: a module's own `train()` is not called.

    Example:
        >>> net = nn.Sequential(nn.Dropout())
        >>> with flags_down(net.modules()):
        ...     net.training, net[0].training
        (False, False)
        >>> net.training
        True
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def running_statistics(model: nn.Module) -> AbstractContextManager[None]:
    """Batch norms keep to their running statistics: one sample has no variance of its own.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with running_statistics(norm):
        ...     norm.training
        False
    """
    return flags_down(module for module in model.modules() if isinstance(module, _BatchNorm))


def batch_statistics(model: nn.Module) -> str | None:
    """Name of the first batch norm that takes its statistics from the batch in eval mode too, if there is one.

    With such a layer what a sample gives depends on the other samples of its batch.

    Example:
        >>> batch_statistics(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)))
        '1'
    """
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))
    return next((name for name, norm in norms if norm.running_mean is None), None)
