"""The counted half of the kernel sheet: what each real layer moves, declared, counted and unfused.

The declaration needs shapes only (`record_pass`); the count runs every program in the interpreter (`count_pass`),
in a process of its own that was started with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from counting import Count, count
from layers import LAYERS, TUNED_FOR, Layer, Unfused, tuned_for
from torch import Tensor
from torch.utils._pytree import tree_map
from traffic import Item, gathered, record

PASSES = ("forward", "backward")


@dataclass
class Traffic:
    """One pass of one layer.

    Attributes:
        ours: launches in order, with what torch does between them.
        requested: bytes each launch asked for, `None` where it was not counted.
        unfused: the same in steps of its own.
    """

    layer: Layer
    passed: str
    ours: list[Item]
    unfused: list[Unfused]
    bound: float
    requested: list[float | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def moved(self) -> float:
        return sum(item.moved for item in self.ours)

    @property
    def moved_unfused(self) -> float:
        return sum(item.moved for item in self.unfused)

    @property
    def ratio(self) -> float:
        return self.moved / self.moved_unfused

    @property
    def held(self) -> bool:
        return self.ratio <= self.bound


def record_pass(index: int, passed: str, target: str = TUNED_FOR) -> Traffic:
    """What a pass of `LAYERS[index]` would launch, from shapes alone."""
    layer = LAYERS[index]
    with tuned_for(target, layer.route):
        forward, backward = layer.run("meta")
        out, items = record(forward, layer.groups)
        if passed == "backward":
            _, items = record(lambda: backward(out), layer.groups)
    backwards = passed == "backward"
    unfused = layer.unfused_backward() if backwards else layer.unfused_forward()
    bound = layer.backward_bound if backwards else layer.forward_bound
    return Traffic(layer, passed, gathered(items), unfused, bound)


def count_pass(index: int, passed: str, target: str = TUNED_FOR) -> list[Count]:
    """The same pass, run in the interpreter on the CPU; only the addresses are real."""
    layer = LAYERS[index]
    with tuned_for(target, layer.route):
        forward, backward = layer.run("cpu")
        if passed == "forward":
            return count(forward)
        return count(lambda: backward(_like_forward(layer)))


def _like_forward(layer: Layer) -> Any:
    """Zeros for everything a forward returns: its shapes are all that the backward's addresses depend on."""
    forward, _ = layer.run("meta")
    out, _ = record(forward, layer.groups)
    return tree_map(lambda t: _zeros_like(t) if isinstance(t, Tensor) else t, out)


def _zeros_like(tensor: Tensor) -> Tensor:
    storage = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def combine(traffic: Traffic, counts: list[Count]) -> Traffic:
    """Put the counted bytes beside the declared ones; it is a fault where the different bytes are not those."""
    left = list(counts)
    for item in traffic.ours:
        if not item.kernel:
            traffic.requested.append(None)
            continue
        own = left.pop(0).total
        traffic.requested.append(float(own.requested))
        for word, declared, seen in (
            ("read", item.read, own.distinct_read),
            ("written", item.written, own.distinct_written),
        ):
            if abs(declared - seen) > 1:
                traffic.faults.append(
                    f"{traffic.layer.name}, {traffic.passed}, {item.name}: {declared:.0f} bytes {word} are declared "
                    f"in traffic.py, the interpreter saw {seen}"
                )
    return traffic
