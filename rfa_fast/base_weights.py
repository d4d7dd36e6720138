"""Which frozen weights an adapter belongs to: what is written down of them, and whether a model has them.

A hash of elements that are rounded to bf16 says it for a model that is loaded again in the same precision, in
bf16 or in fp32. fp16 has other mantissas and a smaller range, so that its elements round to other bf16 numbers:
for it a few elements are kept as they are and compared within the rounding of both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HASHED, _KEPT = 4096, 64
_DIGITS = 1e-3  # elements are kept to seven digits
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def describe_weights(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is kept of frozen weights, as JSON: a hash per layer under "weights", elements under "elements".

    Args:
        weights: layer name -> weight, of any floating-point dtype.

    Example:
        >>> described = describe_weights({"head": torch.ones(2, 1)})
        >>> described["elements"]
        {'head': {'shape': [2, 1], 'dtype': 'float32', 'values': [1.0, 1.0]}}
    """
    return {
        "weights": {name: fingerprint(weight) for name, weight in weights.items()},
        "elements": {
            name: {
                "shape": list(weight.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "values": [float(f"{value:.7g}") for value in _spread(weight, _KEPT).double().tolist()],
            }
            for name, weight in weights.items()
        },
    }


def other_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The layers, of those that both have, whose weights are not the same.

    Args:
        one, other: of :func:`describe_weights`; a record of before there were elements will do.

    Example:
        >>> weight = torch.linspace(-1, 1, 50)
        >>> half, single = ({"head": weight.to(dtype)} for dtype in (torch.float16, torch.float32))
        >>> other_weights(describe_weights(half), describe_weights(single))
        []
        >>> other_weights(describe_weights(half), describe_weights({"head": weight + 0.01}))
        ['head']
    """
    both = [name for name in one["weights"] if name in other["weights"]]
    return [n for n in both if one["weights"][n] != other["weights"][n] and not _rounded_alike(one, other, n)]


def same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of the same layers of the same class of model, with the same weights.

    Example:
        >>> net = {"class": "Net", **describe_weights({"head": torch.ones(2, 1)})}
        >>> same_base(net, net), same_base(net, net | {"class": "Other"})
        (True, False)
    """
    if one.get("class") != other.get("class") or not all(isinstance(r.get("weights"), dict) for r in (one, other)):
        return False
    return set(one["weights"]) == set(other["weights"]) and not other_weights(one, other)


def fingerprint(weight: Tensor) -> str:
    """Hash of a weight's shape and of up to 8,191 evenly spaced elements.

    The elements are rounded to bf16 first, so that the same model loaded in bf16 or in fp32 is the same.

    Example:
        >>> fingerprint(torch.ones(2, 3)) == fingerprint(torch.ones(2, 3, dtype=torch.bfloat16))
        True
        >>> fingerprint(torch.ones(2, 3)) == fingerprint(torch.ones(3, 2))
        False
    """
    sample = _spread(weight, _HASHED).to(torch.bfloat16).float()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + sample.numpy().tobytes()).hexdigest()


def _spread(weight: Tensor, least: int) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // least)].cpu()


def _rounded_alike(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether the elements differ by what rounding one set of weights to two dtypes, fp16 among them, can do.

    Either moves an element by at most half its eps, relative to the element; below its smallest normal number fp16
    moves it by half its smallest step.
    """
    found, beside = (_elements(record.get("elements"), name) for record in (one, other))
    if found is None or beside is None:
        return False
    (shape, dtype, a), (other_shape, other_dtype, b) = found, beside
    if shape != other_shape or a.shape != b.shape or dtype == other_dtype or torch.float16 not in (dtype, other_dtype):
        return False
    half = torch.finfo(torch.float16)
    relative, step = (torch.finfo(dtype).eps + torch.finfo(other_dtype).eps) / 2, half.smallest_normal * half.eps / 2
    apart = (a - b).abs() <= relative * torch.maximum(a.abs(), b.abs()) * (1 + _DIGITS) + step
    return bool(apart.all())


def _elements(record: Any, name: str) -> tuple[Any, torch.dtype, Tensor] | None:
    """Shape, dtype and elements of a layer as a file has them; `None` where it has none that can be read."""
    found = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    dtype, values = _DTYPES.get(str(found.get("dtype"))), found.get("values")
    if dtype is None or not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return None
    return found.get("shape"), dtype, torch.tensor(values, dtype=torch.float64)
