"""The weights of a model that has seen nothing: where Retrain starts, and the incompetent teacher of BadT.

Random weights are drawn the way the model itself would: a transformers model is built anew from its
configuration, any other has `reset_parameters` called on every module. The latter is PyTorch's own
distribution, not one that a constructor put in its place (torchvision's ResNet draws otherwise), and a
parameter that it does not touch (a class token, the gain of a subclass, what weight normalisation made of a
weight) is drawn from N(0, 0.02²) and named in a warning: left as it is, it would carry over what was learnt.
A buffer of a module without that function may be a constant or a running average: it stays, and is named as well.
Whoever needs the very start of the original model, pretrained weights included, keeps it in a file and passes that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from rfa_fast.methods.seeding import derive_seed, isolated_generators, seed_generators
from rfa_fast.names import hidden_child, some
from rfa_fast.weights import read_safetensors

_STD = 0.02  # of a parameter that nobody else draws; what transformers gives its embeddings
_CPU = torch.device("cpu")
T = TypeVar("T", bound=Tensor)


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tensor once, sharing storage with the model.

    Example:
        >>> list(named_state(nn.BatchNorm1d(2)))
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    kept = model.state_dict(keep_vars=True).keys()
    found: dict[str, Tensor] = dict(model.named_parameters())
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def initial_tensors(model: nn.Module, seed: int, initial: str | None = None) -> dict[str, Tensor]:
    """Weights and buffers that have seen nothing, under the names of :func:`named_state`.

    Costs one copy of the model, which it takes its time to make on the CPU, so that a seed gives the same
    weights on every device.

    Args:
        model: is not changed.
        seed: of the random weights.
        initial: a .safetensors file with the whole state dict, instead of random weights.

    Raises:
        ValueError: a file without some of the weights, or with another shape.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> one, again = initial_tensors(net, seed=1), initial_tensors(net, seed=1)
        >>> torch.equal(one["0.weight"], again["0.weight"]), torch.equal(one["0.weight"], net[0].weight)
        (True, False)
    """
    wanted = named_state(model)
    found = _read(model, initial) if initial is not None else _draw(model, seed)
    source = "the model built anew" if initial is None else initial
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"initial: {source} lacks {missing[0]} and {len(missing) - 1} more, expected the whole model")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            got = tuple(found[name].shape)
            raise ValueError(f"initial: {source} has {name} of shape {got}, expected {tuple(tensor.shape)}")
    return {name: found[name].detach().to(tensor.device, tensor.dtype, copy=True) for name, tensor in wanted.items()}


def _read(model: nn.Module, path: str) -> Mapping[str, Tensor]:
    found = read_safetensors(path, "initial")
    # A shared tensor is in a file once, under whichever of its names the writer chose.
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        there = [name for name in names if name in found]
        found.update({name: found[there[0]] for name in names if there and name not in found})
    return found


def _draw(model: nn.Module, seed: int) -> Mapping[str, Tensor]:
    prefix, inner = "", model
    while (child := hidden_child(inner)) is not None:
        prefix, inner = f"{prefix}{child}.", inner.get_submodule(child)
    with isolated_generators(_CPU):
        seed_generators(derive_seed(seed, "initial weights"), _CPU)
        fresh = _built_anew(inner) if _from_transformers(inner) else _reset(copy.deepcopy(inner).to(_CPU))
    return {prefix + name: tensor for name, tensor in named_state(fresh).items()}


def _from_transformers(model: nn.Module) -> bool:
    bases = [c for c in type(model).__mro__ if c.__module__.startswith("transformers.")]
    return any(c.__name__ == "PreTrainedModel" for c in bases)


def _built_anew(model: nn.Module) -> nn.Module:
    config = copy.deepcopy(model.config)
    return type(model)(config)


def _reset(model: nn.Module) -> nn.Module:
    orphans: list[str] = []
    kept: list[str] = []
    saved = model.state_dict(keep_vars=True).keys()
    for name, module in model.named_modules():
        parameters = _floating(module.named_parameters(recurse=False))
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            with torch.no_grad():  # what is still NaN afterwards was left alone
                for parameter in parameters.values():
                    parameter.fill_(torch.nan)
            reset()
            parameters = {key: p for key, p in _floating(module.named_parameters(recurse=False)).items() if _is_nan(p)}
        else:  # a buffer beside such a method is the method's affair, which may read it
            kept += [n for key in _floating(module.named_buffers(recurse=False)) if (n := _join(name, key)) in saved]
        for key, parameter in parameters.items():
            nn.init.normal_(parameter, 0.0, _STD)
            orphans.append(_join(name, key))
    if kept:
        warnings.warn(
            f"{some(kept)}: nothing resets these buffers, so they keep what they hold: right for a constant, not for "
            "what was learnt; initial=FILE.safetensors starts from a state of your own",
            stacklevel=2,
        )
    if orphans:
        warnings.warn(
            f"{some(orphans)}: no reset_parameters() in their modules, or none that draws them, so they start from "
            f"N(0, {_STD}²); initial=FILE.safetensors starts from weights of your own",
            stacklevel=2,
        )
    return model


def _join(module: str, key: str) -> str:
    return f"{module}.{key}".lstrip(".")


def _floating(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    return {key: tensor for key, tensor in named if tensor.is_floating_point()}


def _is_nan(tensor: Tensor) -> bool:
    return bool(tensor.isnan().any())
