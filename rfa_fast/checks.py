"""What a model has to be like for its layers to be adapted, trained, merged and saved; nothing has changed yet.

Most of it is what others do to a model's parameters: wrappers, shards, pruning, parametrisations, PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rfa_fast.modules import RFALayer
from rfa_fast.names import is_a, some
from rfa_fast.swap import has_adapted_class


def patchable(model: nn.Module) -> None:
    """Refuse a model that is patched already, or whose processes would never average what `patch` adds.

    Raises:
        ValueError: saying which of the two, and what to do.

    Example:
        >>> patchable(nn.Linear(2, 2))
    """
    patched = [name for name, module in model.named_modules() if isinstance(module, RFALayer)]
    if patched:
        raise ValueError(
            f"model: got one that is already patched ({patched[0]} and {len(patched) - 1} more), "
            "expected an unpatched one; call merge() or remove() on its handle first"
        )
    for module in model.modules():
        group: Any = getattr(module, "process_group", None) if is_a(module, "DistributedDataParallel") else None
        if group is not None and group.size() > 1:
            raise ValueError(
                f"model: got a DistributedDataParallel model of {group.size()} processes, expected the model inside "
                "it: adapters made after the wrapping are never averaged; patch the inner model, wrap it then, and run "
                "the wrapped model's forward inside `with rfa.groups(...)`"
            )


def not_sharded(model: nn.Module, layers: Mapping[str, nn.Module], what_to_do: str) -> None:
    """Refuse layers that FSDP2 or tensor parallelism holds in pieces: their weights are not where we would write.

    Args:
        layers: name -> layer, of `model`.
        what_to_do: the end of the message.

    Raises:
        ValueError: a weight or an adapter is a DTensor, or a module around the layer is sharded by `fully_shard`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> not_sharded(net, {"0": net[0]}, "patch first")
    """
    # Between a forward and the next gathering the weights of FSDP2 are plain tensors, and those are thrown away.
    managed = {id(inner) for module in model.modules() if is_a(module, "FSDPModule") for inner in module.modules()}
    for name, layer in layers.items():
        pieces = [key for key, tensor in layer._parameters.items() if is_a(tensor, "DTensor")]
        if pieces or id(layer) in managed:
            found = f"a DTensor for its {pieces[0]}" if pieces else "one inside a module sharded by fully_shard"
            raise ValueError(f"layer {name!r}: got {found}, expected a layer that is not sharded; {what_to_do}")


def restorable(model: nn.Module, layers: Mapping[str, RFALayer]) -> None:
    """Refuse to merge or remove where an adapted layer has become something else since `patch`.

    Raises:
        ValueError: a layer is sharded, its class has changed, or its weight or adapters are no plain parameters.

    Example:
        >>> import rfa_fast
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> restorable(net, rfa_fast.patch(net, ["0"], rank=1).layers)
    """
    not_sharded(model, layers, "save the adapters and merge them into a copy of the model that is not sharded")
    for name, layer in layers.items():
        lost = [key for key in ("weight", "lora_a", "lora_b") if layer._parameters.get(key) is None]
        if lost or not has_adapted_class(layer):
            found = f"no parameter {lost[0]!r}" if lost else f"the class {type(layer).__name__}"
            raise ValueError(
                f"layer {name!r}: got {found}, expected the layer that patch made; "
                "take the parametrization or pruning off it first, and make a weight that is a buffer then (torch does "
                "that to frozen ones) an nn.Parameter again"
            )


def trainable(layers: Iterable[RFALayer]) -> None:
    """Raise unless an adapter can learn; where gradients are off, nothing is to be learnt.

    Raises:
        ValueError: no adapter requires a gradient.

    Example:
        >>> with torch.no_grad():
        ...     trainable([])
    """
    if torch.is_grad_enabled() and not any(layer.lora_b.requires_grad for layer in layers):
        raise ValueError(
            "rfa.parameters(): got none that requires a gradient, expected adapters to train; what froze them (PEFT's "
            "get_peft_model does) belongs before patch"
        )


def warn_unaveraged(model: nn.Module, layers: Iterable[RFALayer]) -> None:
    """Say, where several processes run, that this loss's gradients are those of one of them.

    FSDP2 averages them: it changes the model itself, and does not stand around it.

    Example:
        >>> warn_unaveraged(nn.Linear(2, 2), [])  # one process
    """
    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    pieces = any(is_a(tensor, "DTensor") for layer in layers for tensor in layer._parameters.values())
    if torch.is_grad_enabled() and not pieces and not any(is_a(module, "FSDPModule") for module in model.modules()):
        warnings.warn(
            f"rfa_fast: one of {distributed.get_world_size()} processes takes the loss of the model that was patched; "
            "DistributedDataParallel around it does not see that, so average the gradients yourself, or run the "
            "wrapped model's forward inside `with rfa.groups(...)`",
            stacklevel=3,
        )


def warn_unsaved(model: nn.Module, adapters: Iterable[nn.Parameter]) -> None:
    """Say which parameters are trained beside the adapters, and so are not in the adapters' files.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> warn_unsaved(net, net.parameters())
    """
    own = {id(parameter) for parameter in adapters}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        warnings.warn(
            f"save: beside the adapters there is more that requires a gradient ({some(others)}), and it is no part "
            "of an adapter; save the model's state_dict() as well, or freeze what was not trained",
            stacklevel=4,
        )
