"""A model's buffers by their places: a module may put another tensor where one was, as running averages do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of a model that have these names.

    Args:
        model: any module.
        names: as in `model.named_buffers()`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> buffers = Buffers(norm, ["running_mean"])
        >>> norm.running_mean = norm.running_mean + 1  # another tensor in its place
        >>> buffers.live()
        {'running_mean': tensor([1., 1.])}
        >>> buffers.restore({"running_mean": torch.zeros(2)})
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        self._tensors = self.live()

    def live(self) -> dict[str, Tensor]:
        """The tensors that are there now, sharing storage with the model."""
        found = {name: module._buffers.get(key) for name, (module, key) in self._places.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Put the tensors of the beginning back in their places, with these values (copies, if a shape changed)."""
        for name, tensor in self._tensors.items():
            module, key = self._places[name]
            value = values.get(name)
            if value is not None and tensor.shape == value.shape:
                copy_tensors({name: tensor}, values)
                module._buffers[key] = tensor
            else:  # of another shape, or there was none
                module._buffers[key] = None if value is None else value.clone()


@torch.no_grad()
def copy_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into those of the same name, in place.

    Example:
        >>> there = {"a": torch.zeros(1)}
        >>> copy_tensors(there, {"a": torch.ones(1), "b": torch.ones(1)})
        >>> there
        {'a': tensor([1.])}
    """
    for name, tensor in into.items():
        tensor.copy_(tensors[name])
