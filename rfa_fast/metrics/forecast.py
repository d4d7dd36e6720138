"""How much memory a training step needs, computed from shapes before anything is loaded or run.

The step itself runs, on a copy of the model whose tensors are fake (:mod:`rfa_fast.metrics.shapes_only`), and
:mod:`rfa_fast.metrics.live_storage` counts. So the forecast knows every layer type that torch knows, and is
the real step's count to the byte where the step takes the same course. What an allocator adds, and
libraries that need room inside a kernel, is not in it.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rfa_fast.metrics.live_storage import Body, live_storage
from rfa_fast.metrics.shapes_only import fake_copy, shapes_only

Inputs = Tensor | Mapping[str, Any]
Step = Callable[[Any, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Forecast:
    """Memory of a step, in bytes.

    Attributes:
        weights: one copy of the model's parameters and buffers.
        peak: everything alive at the worst moment of a step that is not the first: weights (and copies of them),
            adapters, optimizer state, gradients, saved activations, buffers.
        state: what lies between two steps besides the weights: adapters, a teacher's copy, optimizer state.
        largest: the biggest parts of the peak by the operation that made them, largest first.
    """

    weights: int
    peak: int
    state: int
    largest: dict[str, int] = field(default_factory=dict)

    @property
    def above_weights(self) -> int:
        """`peak` without one copy of the weights."""
        return self.peak - self.weights

    def to_dict(self) -> dict[str, Any]:
        """The fields and `above_weights`, JSON-safe.

        Example:
            >>> Forecast(100, 130, 5).to_dict()["above_weights"]
            30
        """
        return {**asdict(self), "above_weights": self.above_weights}


def forecast_step(
    model: nn.Module,
    build: Callable[[nn.Module], Step],
    inputs: Inputs,
    labels: Tensor,
    forget: Tensor,
    *,
    parts: int = 12,
) -> Forecast:
    """The memory that a step will need.

    Args:
        model: the model to train, unpatched; on any device, `"meta"` included. It is not touched.
        build: makes a step of a model: patches or wraps it, makes the optimizer, and returns a callable
            `(inputs, labels, forget)` that does forward, loss, backward, update and `zero_grad`. It gets a
            copy of the model that holds shapes alone, and must keep to plain torch operations.
        inputs: a batch: a tensor, or a transformers model's keyword dict.
        labels: int64 `(B,)` or `(B, T)`.
        forget: bool `(B,)`.
        parts: how many entries `largest` keeps.

    Raises:
        TypeError: a model that cannot be copied.
        ValueError: a step whose course depends on the values of activations.

    Example:
        >>> import torch
        >>> def build(net):  # plain training, 4 bytes a parameter
        ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ...     def step(inputs, labels, forget):
        ...         nn.functional.cross_entropy(net(inputs), labels).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     return step
        >>> net = nn.Linear(1000, 1000, bias=False, device="meta")
        >>> labels = torch.zeros(2, dtype=torch.int64)
        >>> found = forecast_step(net, build, torch.zeros(2, 1000), labels, labels.bool())
        >>> found.weights, found.above_weights >= 4_000_000  # the gradient
        (4000000, True)
    """
    with warnings.catch_warnings(), shapes_only():
        # torch's own deepcopy asks a fake for its address, to find out that it has none.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        copy = fake_copy(model)
        batch = tree_map(_on_cpu, (dict(inputs) if isinstance(inputs, Mapping) else inputs, labels, forget))
        bodies = _quick_bodies()
        with live_storage(copy, bodies=bodies) as live:
            weights = live.current
            live.add(batch)
            given = live.current - weights
            step = build(copy)
            del copy
            # The first step makes the optimizer's state, and the method's: a later one has it all the time. What it
            # needs on the way is of no interest.
            step(*batch)
            bodies.update(_bodies())
            gc.collect()
            state = live.current - weights - given
            live.reset_peak()
            step(*batch)
        largest = dict(list(live.by_operation().items())[:parts])
        return Forecast(weights, live.peak, state, largest)


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _bodies() -> dict[str, Body]:
    """The head's operator by what it does on a CPU, where Triton's interpreter has no part.

    What an operator registers for shapes is its results; the logits of a chunk, and what is made of them, are larger.
    """
    from rfa_fast.ops import head

    return dict.fromkeys(("rfa_fast::head_loss", "rfa_fast::head_loss_torch"), head._host)


def _quick_bodies() -> dict[str, Body]:
    """The same by their results alone: the walk over a vocabulary's rows is most of a forecast's time."""
    from rfa_fast.ops import head

    def results(*args: Any) -> Any:
        return tuple(tensor.zero_() for tensor in head._fake(*args))

    return dict.fromkeys(("rfa_fast::head_loss", "rfa_fast::head_loss_torch"), results)
