"""Everything that training changes in a patched model, as tensors by name: read, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rfa_fast.groups import GroupContext
from rfa_fast.modules import RFALayer

_TRAINED = ("lora_a", "lora_b", "magnitude")
_FEATURES = ("feature_mean", "feature_mean_known")  # there from the first batch on
_BUFFERS = ("initial_a", "initial_b", *_FEATURES)
_PREDICTION = "mean_prediction"


def trained_parameters(layers: Mapping[str, RFALayer]) -> dict[str, nn.Parameter]:
    """The trainable tensors by name: `"layer4.0.conv1.lora_a"` and so on.

    Example:
        >>> import rfa_fast
        >>> rfa = rfa_fast.patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
        >>> list(trained_parameters(rfa.layers))
        ['0.lora_a', '0.lora_b']
    """
    return {
        f"{name}.{key}": layer._parameters[key]  # type: ignore[misc]
        for name, layer in layers.items()
        for key in _TRAINED
        if key in layer._parameters
    }


def read_state(layers: Mapping[str, RFALayer], context: GroupContext) -> dict[str, Tensor]:
    """The adapters, and the last x̃ and ỹ: detached tensors that share storage with the model's.

    Example:
        >>> import rfa_fast
        >>> rfa = rfa_fast.patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
        >>> sorted(read_state(rfa.layers, rfa._context))
        ['0.lora_a', '0.lora_b']
    """
    out: dict[str, Tensor] = {name: p.detach() for name, p in trained_parameters(layers).items()}
    for name, layer in layers.items():
        for key in _BUFFERS:
            value = layer._buffers.get(key)
            if value is not None:
                out[f"{name}.{key}"] = value.detach()
    if context.mean_prediction is not None:
        out[_PREDICTION] = context.mean_prediction.detach()
    return out


def write_state(
    layers: Mapping[str, RFALayer], context: GroupContext, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Put back what :func:`read_state` gave, x̃ and ỹ onto `device`; those that are not given are not known.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or kind than this model's; nothing has been
            changed then.

    Example:
        >>> import rfa_fast
        >>> rfa = rfa_fast.patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
        >>> write_state(rfa.layers, rfa._context, {"0.lora_a": torch.zeros(2, 4)}, torch.device("cpu"))
        Traceback (most recent call last):
        ValueError: tensors: missing ['0.lora_b'], unknown []; expected those of this patched model
    """
    current = read_state(layers, context)
    required = {k for k in current if k.rpartition(".")[2] not in (*_FEATURES, _PREDICTION)}
    optional = {f"{n}.{k}" for n in layers for k in _FEATURES} | {_PREDICTION}
    missing, unknown = sorted(required - set(tensors)), sorted(set(tensors) - required - optional)
    if missing or unknown:
        raise ValueError(f"tensors: missing {missing[:3]}, unknown {unknown[:3]}; expected those of this patched model")
    for name in required:
        if tensors[name].shape != current[name].shape:
            got, expected = tuple(tensors[name].shape), tuple(current[name].shape)
            raise ValueError(f"{name}: got shape {got}, expected {expected}")
    for name, layer in layers.items():
        _check_feature_mean(name, layer, *(tensors.get(f"{name}.{key}") for key in _FEATURES))
    _check_prediction(tensors.get(_PREDICTION), context.mean_prediction)
    with torch.no_grad():
        for name in sorted(optional - set(tensors)):
            _set_volatile(layers, context, name, None)
        for name, value in tensors.items():
            if name in required:
                current[name].copy_(value)
            else:
                _set_volatile(layers, context, name, value.to(device, copy=True))
    context.seen_retain = _PREDICTION in tensors or context.seen_retain


def _set_volatile(layers: Mapping[str, RFALayer], context: GroupContext, name: str, value: Tensor | None) -> None:
    layer, _, key = name.rpartition(".")
    if layer:
        setattr(layers[layer], key, value)
    else:
        context.mean_prediction = value


def _check_feature_mean(name: str, layer: RFALayer, mean: Tensor | None, known: Tensor | None) -> None:
    """x̃ of a layer, whose outputs are its last axis, or a convolution's first; and for which positions it is known."""
    if mean is None and known is None:
        return
    if mean is None or known is None:
        raise ValueError(f"{name}.feature_mean, {name}.feature_mean_known: got one of them, expected both or neither")
    outputs = layer.lora_b.shape[0]
    convolution = layer.lora_b.ndim == 4
    fits = mean.is_floating_point() and mean.ndim >= 1 and mean.shape[0 if convolution else -1] == outputs
    if not fits or (convolution and mean.ndim != 3):
        expected = f"({outputs}, H, W)" if convolution else f"(..., {outputs})"
        raise ValueError(f"{name}.feature_mean: got {mean.dtype} {tuple(mean.shape)}, expected floats of {expected}")
    axes = zip(reversed(known.shape), reversed(mean.shape), strict=False)
    if known.dtype != torch.bool or known.ndim > mean.ndim or any(a not in (1, b) for a, b in axes):
        got, expected = f"{known.dtype} {tuple(known.shape)}", f"bool that broadcasts to {tuple(mean.shape)}"
        raise ValueError(f"{name}.feature_mean_known: got {got}, expected {expected}")


def _check_prediction(given: Tensor | None, current: Tensor | None) -> None:
    """ỹ: a probability for every class."""
    if given is None:
        return
    if given.ndim != 1 or not given.is_floating_point() or (current is not None and given.shape != current.shape):
        expected = "(classes,)" if current is None else str(tuple(current.shape))
        raise ValueError(f"{_PREDICTION}: got {given.dtype} {tuple(given.shape)}, expected floats of {expected}")
