"""How far two models are from each other: in what they predict, and in what they compute on the way.

Both distances run the two models side by side, batch by batch, and keep running sums: nothing of
size items × features is ever stored, and a shuffling loader is as good as any other. Hooks are fine
here, unlike in training: a measurement is never compiled and never differentiated.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rfa_fast.metrics import passes
from rfa_fast.metrics.passes import Batch, Loader, Progress
from rfa_fast.metrics.predictions import row_probabilities


def activation_distance(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Loader,
    squared: bool = False,
    *,
    shift_labels: bool | None = None,
    progress: Progress | None = None,
) -> float:
    """Mean L2 distance of the two models' output probabilities (section V-B4).

    The mean is over items, or over labelled tokens for labels `(B, T)`. Two distributions are at most
    √2 apart; Table VI has values above it, so the paper's figures are not all on this scale.

    Args:
        model_a, model_b: see :func:`~rfa_fast.metrics.predictions.predict`; each gets the batch on its own device.
        loader: iterated once.
        squared: average the squared distance (at most 2) instead.
        shift_labels, progress: as for :func:`~rfa_fast.metrics.predictions.predict`.

    Raises:
        ValueError: an empty loader, models with different numbers of outputs, no labelled token, and
            what :func:`~rfa_fast.metrics.predictions.predict` raises.

    Example:
        >>> sure, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = sure.weight.copy_(torch.tensor([[99.0, 0.0], [0.0, 0.0]])), other.weight.copy_(-sure.weight)
        >>> round(activation_distance(sure, other, [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))]), 4)
        1.4142
    """
    total, rows = 0.0, 0
    with passes.evaluating(model_a, model_b):
        places = passes.device_of(model_a), passes.device_of(model_b)
        shift = passes.shifts_labels(model_a, shift_labels)
        for batch in passes.batches(loader, progress):
            a, b = (
                passes.labelled_rows(passes.forward(model, batch, place), batch.labels, shift)[0]
                for model, place in zip((model_a, model_b), places, strict=True)
            )
            if a.shape != b.shape:
                raise ValueError(f"model_b: got {b.shape[-1]} outputs, expected {a.shape[-1]} as in model_a")
            pieces = zip(row_probabilities(a, batch.index), row_probabilities(b, batch.index), strict=True)
            for (_, log_a), (_, log_b) in pieces:
                squares = (log_a.exp() - log_b.exp().to(log_a.device)).square().sum(-1).cpu().double()
                total += float(squares.sum() if squared else squares.sqrt().sum())
            rows += a.shape[0]
    if rows == 0:
        raise ValueError("labels: got no labelled token (all -100), expected at least one")
    return total / rows


def feature_distance(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Loader,
    names: Iterable[str],
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean over items of the L2 norm of the difference between the two models' features, layer by layer.

    `(1/N) Σ_x ‖x_k^a − x_k^b‖` for each layer k, the feature of an item flattened (section V-B5; the
    paper's single figure is the sum over the layers). With the original model as `model_b` it is the
    paper's Definition 1, with the retrained model Definition 2. Positions where the attention mask is 0
    count as equal.

    Args:
        model_a, model_b: each gets the batch on its own device; they may be one object, at distance 0.
        loader: iterated once; labels are unread.
        names: dotted module names (`RFA.names`, say) that both models have. Features lead with the batch:
            `(B, …)`, or `(B·T, …)` rows in the order of the batch. Of a tuple the first element counts; a
            module called several times contributes all its calls as one feature.
        progress: called with (batches done, batches in all; 0 when unknown).

    Returns:
        Layer name -> distance, in the order of `names`. Differences are taken in fp32, sums in fp64.

    Raises:
        ValueError: an unknown name (with near misses), a layer that is not called, features of different
            shapes, an empty loader.
        TypeError: a layer that returns no tensor, names given as one string.
        FloatingPointError: a distance that is not finite; names the layer and the batch.

    Example:
        >>> a, b = nn.Sequential(nn.Linear(1, 2)), nn.Sequential(nn.Linear(1, 2))
        >>> b.load_state_dict({"0.weight": a[0].weight, "0.bias": a[0].bias.detach() + torch.tensor([3.0, 4.0])})
        <All keys matched successfully>
        >>> round(feature_distance(a, b, [(torch.ones(5, 1), torch.zeros(5, dtype=torch.long))], ["0"])["0"], 4)
        5.0
    """
    if isinstance(names, str):
        raise TypeError(f"names: got the string {names!r}, expected a list of layer names; [{names!r}] for one")
    layers = list(dict.fromkeys(names))
    if not layers:
        raise ValueError("names: got no layer, expected at least one")
    for which, model in (("model_a", model_a), ("model_b", model_b)):
        _check_names(which, model, layers)
    totals, items = dict.fromkeys(layers, 0.0), 0
    with passes.evaluating(model_a, model_b):
        for batch in passes.batches(loader, progress):
            features_a = _features("model_a", model_a, batch, layers)
            features_b = _features("model_b", model_b, batch, layers)
            for name in layers:
                totals[name] += _distance(name, features_a[name], features_b[name], batch)
            items += len(batch.labels)
    return {name: total / items for name, total in totals.items()}


def _check_names(which: str, model: nn.Module, names: list[str]) -> None:
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"it has {', '.join(map(repr, known[:5]))}, …"
        raise ValueError(f"names: got {name!r}, expected a module of {which} ({type(model).__name__}); {hint}")


def _features(which: str, model: nn.Module, batch: Batch, names: list[str]) -> dict[str, list[Tensor]]:
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    with passes.captured(model, names, calls):
        passes.run(model, batch, passes.device_of(model))
    for name, seen in calls.items():
        if not seen:
            raise ValueError(
                f"names: {name!r} of {which} was never called in the forward of batch {batch.index}, "
                "expected a module whose forward runs (a parameter read by a functional call has no output)"
            )
    return calls


def _distance(name: str, calls_a: list[Tensor], calls_b: list[Tensor], batch: Batch) -> float:
    """Sum over the batch's items of the L2 norm of the difference of one layer's features."""
    shapes_a, shapes_b = ([tuple(call.shape) for call in calls] for calls in (calls_a, calls_b))
    if shapes_a != shapes_b:
        raise ValueError(f"names: {name!r} gives features {shapes_b} in model_b, expected {shapes_a} as in model_a")
    squares = torch.zeros(len(batch.labels), dtype=torch.float64)
    for a, b in zip(calls_a, calls_b, strict=True):
        difference = a.float() - b.to(a.device).float()
        squares += _item_squares(name, difference, batch)
    total = float(squares.sqrt().sum())
    if not math.isfinite(total):
        raise FloatingPointError(f"names: {name!r} is not finite in batch {batch.index}, expected finite features")
    return total


def _item_squares(name: str, difference: Tensor, batch: Batch) -> Tensor:
    """float64 `(B,)`: sum of squares per item, padded positions left out."""
    items, mask = len(batch.labels), batch.mask
    if difference.ndim == 0 or difference.shape[0] == 0 or difference.shape[0] % items:
        raise ValueError(
            f"names: {name!r} gives a feature of shape {tuple(difference.shape)} for {items} items, "
            "expected the batch first: (B, …) or (B·T, …)"
        )
    if mask is not None:
        # Two axes are never a token grid: a pooled (B, K) may have K = T by chance.
        if difference.ndim == 3 and difference.shape[:2] == mask.shape:
            real = mask
        elif difference.shape[0] == mask.numel():
            real = mask.flatten()
        else:
            real = None
        if real is not None:
            axes = real.shape + (1,) * (difference.ndim - real.ndim)
            difference = torch.where(real.reshape(axes).to(difference.device), difference, 0)
    # fp32 squares of one item are summed where they are, in fp32: fp64 is missing on some devices.
    return difference.reshape(items, -1).square().sum(1).cpu().double()
