"""Adapters folded into the weights they stand beside: W' = W + sBA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from rfa_fast.modules import RFALayer
from rfa_fast.ops.rows import without_autocast


def fold_into_weights(layers: Mapping[str, RFALayer], dtype: torch.dtype | None) -> dict[str, float]:
    """Add each layer's change to its weight, in fp32 (fp64 for fp64 weights), and cast the sum once.

    Args:
        dtype: of the sums; `None`: each weight's own.

    Returns:
        Per layer `‖W' − (W + sBA)‖ / ‖sBA‖`, the share of the change lost to rounding (0 where the change is 0).

    Raises:
        FloatingPointError: an adapter holds NaN or infinity; nothing has been changed then.
        RuntimeError: too little memory for a sum; nothing has been changed then either, unless `dtype` is a wider one.

    Example:
        >>> import rfa_fast
        >>> rfa = rfa_fast.patch(torch.nn.Sequential(torch.nn.Linear(4, 3)), ["0"], rank=2)
        >>> fold_into_weights(rfa.layers, None)
        {'0': 0.0}
    """
    lost: dict[str, float] = {}
    kinds = {layer.weight.device.type for layer in layers.values()}
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:  # weights that autograd may keep
        for kind in kinds:
            stack.enter_context(without_autocast(kind))
        for name, layer in layers.items():
            if not bool(torch.isfinite(layer.delta_weight()).all()):
                raise FloatingPointError(f"layer {name!r}: got NaN or infinity in its adapters, expected finite ones")
        # The largest first: where its sum fits the others' do, so too little memory shows before anything has changed.
        for name, layer in sorted(layers.items(), key=lambda item: -item[1].weight.numel()):
            change = layer.delta_weight()
            exact = layer.weight.to(change.dtype) + change
            merged = exact.to(dtype or layer.weight.dtype)
            size = float(torch.linalg.vector_norm(change))
            lost[name] = float(torch.linalg.vector_norm(merged.to(change.dtype) - exact)) / size if size else 0.0
            layer.weight.data = merged
            del change, exact, merged
    return {name: lost[name] for name in layers}


def warn_of_rounding(layers: Mapping[str, RFALayer], lost: Mapping[str, float]) -> None:
    """Say so where rounding took more than a tenth of a layer's change, which can undo the forgetting.

    Example:
        >>> warn_of_rounding({}, {"fc": 0.05})
    """
    worst = max(lost, key=lambda name: lost[name])
    if lost[worst] > 0.1:
        warnings.warn(
            f"merge: rounding into {layers[worst].weight.dtype} lost {lost[worst]:.0%} of the change of {worst!r}, "
            "which can undo the forgetting; merge(dtype=torch.float32) keeps it",
            stacklevel=3,
        )
