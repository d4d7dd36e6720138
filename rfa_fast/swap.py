"""Give a frozen layer the class that adapts it, and take it away again.

A layer is adapted in place: the module object keeps its identity, its parameters, its hooks and its place in every
list that refers to it. Restoring is giving the class back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rfa_fast.config import RFAConfig
from rfa_fast.groups import GroupContext
from rfa_fast.modules import RFAConv1D, RFAConv2d, RFALayer, RFALinear
from rfa_fast.targets import Target

_CLASSES: dict[str, type[RFALayer]] = {"linear": RFALinear, "conv2d": RFAConv2d, "conv1d": RFAConv1D}
_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def adapted_class(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    """The class an adapted layer gets: ours, mixed with the original where that is a subclass of its own.

    Example:
        >>> adapted_class("linear", nn.Linear).__name__
        'RFALinear'
    """
    ours = _CLASSES[kind]
    if kind == "conv1d" or original in (nn.Linear, nn.Conv2d):
        return ours
    key = (ours, original)
    if key not in _MIXED:
        own = {"__module__": ours.__module__, "__reduce_ex__": _reduced}
        _MIXED[key] = type(f"RFA{original.__name__}", key, own)
    return _MIXED[key]


def _reduced(layer: RFALayer, protocol: int) -> tuple[Any, ...]:
    """How a layer of a mixed class is copied and pickled: no module has its class by name."""
    return (_blank, (_kind(layer), layer.rfa_original_class), *object.__reduce_ex__(layer, protocol)[2:])


def _kind(layer: RFALayer) -> str:
    return next(kind for kind, ours in _CLASSES.items() if isinstance(layer, ours))


def has_adapted_class(layer: RFALayer) -> bool:
    """Whether a layer still is of the class that :func:`adapt` gave it.

    Example:
        >>> import rfa_fast
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> has_adapted_class(rfa_fast.patch(net, ["0"], rank=1).layers["0"])
        True
    """
    return type(layer) is adapted_class(_kind(layer), layer.rfa_original_class)


def _blank(kind: str, original: type[nn.Module]) -> nn.Module:
    mixed = adapted_class(kind, original)
    return mixed.__new__(mixed)


def adapt(
    module: nn.Module, target: Target, config: RFAConfig, context: GroupContext, *, ambiguous: bool, plain_name: str
) -> RFALayer:
    """Turn a frozen layer into an adapted one, in place.

    Args:
        module: the layer; its class changes, its tensors do not.
        target: name and kind of the layer.
        config: rank, alpha, adapter and dtype.
        context: shared with the other layers of the model.
        ambiguous: a module around the layer declares `batch_first=False`.
        plain_name: the name without wrappers; seeds the layer, so that wrapping a model changes nothing.

    Returns:
        `module` itself.
    """
    values = {
        "rfa_name": target.name,
        "rank": config.rank_of(target.name),
        "alpha": config.alpha_of(target.name),
        "scale": config.scale_of(target.name),
        "adapter": config.adapter,
        "rfa_original_class": type(module),
        "rfa_context": context,
        "rfa_ambiguous": ambiguous,
    }
    module.__class__ = adapted_class(target.kind, type(module))
    if not isinstance(module, RFALayer):
        raise TypeError(f"layer {target.name!r}: got {type(module).__name__}, expected an adapted class")
    for key, value in values.items():
        object.__setattr__(module, key, value)
    module.register_buffer("feature_mean", None, persistent=False)
    module.register_buffer("feature_mean_known", None, persistent=False)
    seed = None if config.seed is None else _layer_seed(config.seed, plain_name)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    module.initialise_adapters(generator, config.adapter_dtype)
    return module


def restore(layer: RFALayer) -> nn.Module:
    """Give an adapted layer its class back and drop what `adapt` added; weight and bias are not touched."""
    original = layer.rfa_original_class
    for name in ("lora_a", "lora_b", "magnitude"):
        layer._parameters.pop(name, None)
    for name in ("initial_a", "initial_b", "feature_mean", "feature_mean_known"):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in ("rfa_name", "rank", "alpha", "scale", "adapter", "rfa_original_class", "rfa_context", "rfa_ambiguous"):
        layer.__dict__.pop(name, None)
    layer.__class__ = original  # type: ignore[assignment]
    return layer


def _layer_seed(seed: int, name: str) -> int:
    """A seed per layer, so that a layer starts the same whichever others are adapted beside it."""
    digest = 0
    for byte in name.encode():
        digest = (digest * 1_000_003 + byte) % (2**31)
    return (seed * 2_147_483_659 + digest) % (2**63 - 1)
