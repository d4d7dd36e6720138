"""Which of a model's own parameters are trained: from `targets` to names, and what stands in the way.

The words are those of :func:`rfa_fast.targets.select`, so that a method that trains weights can be put
on the very layers that RFA adapts; `None` and `"head"` are added, because these methods are mostly
described for whole models, and for large ones on the last layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from rfa_fast.modules import RFALayer
from rfa_fast.targets import Targets, output_embeddings, select


def parameters_of(model: nn.Module, targets: Targets | None) -> list[str]:
    """Names of the parameters that `targets` stands for, in the model's order, a shared one once.

    Raises:
        ValueError, TypeError: as :func:`rfa_fast.targets.select`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> parameters_of(net, "head"), len(parameters_of(net, None))
        (['2.weight', '2.bias'], 6)
    """
    if targets is None:
        return [name for name, _ in model.named_parameters()]
    layers = [_head(model)] if targets == "head" else [target.name for target in select(model, targets).adapted]
    chosen = {id(p) for layer in layers for p in model.get_submodule(layer).parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in chosen]


def _head(model: nn.Module) -> str:
    """The layer that gives the logits: a language model's, or the classification head."""
    head = output_embeddings(model)
    if head is not None:
        name: str = next(name for name, module in model.named_modules() if module is head)
        weight = getattr(head, "weight", None)
        others = [n for n, m in model.named_modules() if m is not head and m._parameters.get("weight") is weight]
        if weight is not None and others:
            warnings.warn(f"targets: {name} shares its weight with {others[0]}, which is trained too", stacklevel=4)
        return name
    found = [target.name for target in select(model, "deep").adapted if target.is_head]
    if not found:
        raise ValueError("targets: got 'head' for a model without a classification head, expected the layer's name")
    return found[0]


def check_trainable(model: nn.Module, names: Sequence[str]) -> None:
    """The named parameters must be ordinary ones that a gradient can move; a warning for those of low precision.

    Raises:
        ValueError: no name, or a model whose layers are patched.
        TypeError: quantised, integer or meta weights.

    Example:
        >>> check_trainable(nn.Linear(2, 2), ["weight"])
    """
    patched = [name for name, module in model.named_modules() if isinstance(module, RFALayer)]
    if patched:
        raise ValueError(f"model: got one that is patched ({patched[0]}), expected one after merge() or remove()")
    if not names:
        raise ValueError("targets: got a choice without parameters, expected some to train")
    low: list[str] = []
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        if parameter.device.type == "meta" or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise TypeError(
                f"{name}: got {parameter.dtype} on {parameter.device}, expected floating-point weights on a real "
                "device; load the model unquantised"
            )
        low += [name] if parameter.dtype.itemsize < 4 else []
    if low:
        warnings.warn(
            f"{low[0]} and {len(low) - 1} more weights are {parameters[low[0]].dtype}: a step smaller than its "
            "rounding changes nothing in them; load the model as float32, with autocast=torch.bfloat16 if need be",
            stacklevel=4,
        )
