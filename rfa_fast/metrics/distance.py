"""How far two models are from each other: in what they predict, and in what they compute on the way.

Each function runs two models side by side, batch by batch. Whoever measures a model anyway gives the
second one to :func:`~rfa_fast.metrics.evaluate.evaluate_split` instead, and has these figures from the
same pass. Hooks are fine here, unlike in training: a measurement is never compiled and never
differentiated.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from rfa_fast.head import is_encoder_decoder
from rfa_fast.metrics import passes
from rfa_fast.metrics.meters import ActivationMeter, DivergenceMeter, FeatureMeter, FeatureNorm, TokenReduction
from rfa_fast.metrics.passes import Batch, Loader, Progress


def activation_distance(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Loader,
    squared: bool = False,
    *,
    tokens: TokenReduction = "mean",
    shift_labels: bool | None = None,
    progress: Progress | None = None,
) -> float:
    """Mean L2 distance of the two models' output probabilities (section V-B4).

    The mean is over items, or over labelled tokens for labels `(B, T)`. Two distributions are at most
    √2 apart, and 2 when squared: Table VI has values of 1.66 to 1.80, so the paper's are the squared
    ones. Table VII has values up to 142, which no mean over tokens reaches: for texts try `tokens="sum"`.

    Args:
        model_a, model_b: see :func:`~rfa_fast.metrics.predictions.predict`; each gets the batch on its own device.
        loader: iterated once.
        squared: average the squared distance instead.
        tokens: `"mean"` over all labelled tokens; `"text"`: over each text's tokens, then over texts; `"sum"`:
            summed in each text, mean over texts; `"norm"`: norm of a text's (tokens × vocabulary)
            difference, mean over texts. Unread where there is no token axis.
        shift_labels, progress: as for :func:`~rfa_fast.metrics.predictions.predict`.

    Raises:
        ValueError: an empty loader, models with different numbers of outputs, no labelled token, an
            unknown reduction, and what :func:`~rfa_fast.metrics.predictions.predict` raises.

    Example:
        >>> import torch
        >>> sure, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = sure.weight.copy_(torch.tensor([[99.0, 0.0], [0.0, 0.0]])), other.weight.copy_(-sure.weight)
        >>> round(activation_distance(sure, other, [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))]), 4)
        1.4142
    """
    meter = ActivationMeter(tokens)
    _side_by_side(model_a, model_b, loader, shift_labels, progress, meter.add)
    return meter.value(squared=squared)


def zero_retrain_forgetting(
    model: nn.Module,
    incompetent: nn.Module,
    loader: Loader,
    *,
    shift_labels: bool | None = None,
    progress: Progress | None = None,
) -> float:
    """ZRF: how much like a randomly initialised model it is on the forget set, in [0, 1].

    Chundawat et al., "Can Bad Teaching Induce Forgetting?" (AAAI 2023, arXiv 2205.08096)::

        ZRF = 1 − mean over the forget set of JS(model(x), incompetent(x))

    1: nothing tells it from the model that never learnt anything; no retrained model is needed. Not a
    figure to be maximised by itself, for the same reason as a low membership share: what matters is that it
    is near the retrained model's. The divergence is in bits, so that the score covers [0, 1].

    Args:
        model: the unlearned model.
        incompetent: the same architecture, untrained.
        loader: of the forget set; the mean is over items, or over labelled tokens.
        shift_labels, progress: as for :func:`~rfa_fast.metrics.predictions.predict`.

    Raises:
        ValueError: as for :func:`activation_distance`.

    Example:
        >>> import torch
        >>> certain, undecided = nn.Identity(), nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(undecided.weight), nn.init.zeros_(undecided.bias)
        >>> loader = [(torch.tensor([[99.0, 0.0]]), torch.tensor([0]))]
        >>> round(zero_retrain_forgetting(certain, undecided, loader), 4)  # 1 − (H(¾, ¼) − 1/2)
        0.6887
    """
    meter = DivergenceMeter()
    _side_by_side(model, incompetent, loader, shift_labels, progress, meter.add)
    return 1.0 - meter.value()


def feature_distance(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Loader,
    names: Iterable[str],
    *,
    norm: FeatureNorm = "l2",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean over items of the difference between the two models' features, layer by layer.

    `(1/N) Σ_x |x_k^a − x_k^b|` for each layer k, the feature of an item flattened (section V-B5; the
    paper's single figure is the sum over the layers). With the original model as `model_b` it is the
    paper's Definition 1, with the retrained model Definition 2. Positions where the attention mask is 0
    count as equal.

    Args:
        model_a, model_b: each gets the batch on its own device; they may be one object, at distance 0.
        loader: iterated once; labels are unread.
        names: dotted module names (`RFA.names`, say) that both models have. Features lead with the batch:
            `(B, …)`, or `(B·T, …)` rows in the order of the batch. Of a tuple the first element counts; a
            module called several times contributes all its calls as one feature.
        norm: `"l2"`: the L2 norm of an item's difference; `"abs"`: the mean absolute value of its elements,
            padding left out. The paper's words are "mean absolute relative error" and its formula writes
            |·|; Table VIII's values (0.2 to 3 for 20 layers together) are of the size that `"abs"` gives.
        progress: called with (batches done, batches in all; 0 when unknown).

    Returns:
        Layer name -> distance, in the order of `names`. Differences are taken in fp32, sums in fp64.

    Raises:
        ValueError: an unknown name (with near misses), a layer that is not called, features of different
            shapes, an unknown norm, an empty loader.
        TypeError: a layer that returns no tensor, names given as one string.
        FloatingPointError: a distance that is not finite; names the layer and the batch.

    Example:
        >>> import torch
        >>> a, b = nn.Sequential(nn.Linear(1, 2)), nn.Sequential(nn.Linear(1, 2))
        >>> b.load_state_dict({"0.weight": a[0].weight, "0.bias": a[0].bias.detach() + torch.tensor([3.0, 4.0])})
        <All keys matched successfully>
        >>> loader = [(torch.ones(5, 1), torch.zeros(5, dtype=torch.long))]
        >>> [round(feature_distance(a, b, loader, ["0"], norm=norm)["0"], 4) for norm in ("l2", "abs")]
        [5.0, 3.5]
    """
    layers = layer_names(names, model_a=model_a, model_b=model_b)
    if not layers:
        raise ValueError("names: got no layer, expected at least one")
    meter = FeatureMeter(layers, norm)
    with passes.evaluating(model_a, model_b):
        for batch in passes.batches(loader, progress):
            found = [_features(which, m, batch, layers) for which, m in (("model_a", model_a), ("model_b", model_b))]
            meter.add(found[0], found[1], batch)
    return meter.value()


def layer_names(names: Iterable[str], **models: nn.Module) -> list[str]:
    """The names, each once, after a look at whether every model has them.

    Raises:
        ValueError: a model lacks one; with near misses.
        TypeError: one string.

    Example:
        >>> layer_names(["0", "0"], model=nn.Sequential(nn.ReLU()))
        ['0']
    """
    if isinstance(names, str):
        raise TypeError(f"names: got the string {names!r}, expected a list of layer names; [{names!r}] for one")
    layers = list(dict.fromkeys(names))
    for which, model in models.items():
        known = [name for name, _ in model.named_modules() if name]
        for name in layers:
            if name in known:
                continue
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
            has = f"it has {', '.join(map(repr, known[:5]))}, …"
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else has
            raise ValueError(f"names: got {name!r}, expected a module of {which} ({type(model).__name__}); {hint}")
    return layers


def check_called(which: str, features: dict[str, list[Tensor]], batch: Batch) -> None:
    """Every layer must have run.

    Raises:
        ValueError: one has not.

    Example:
        >>> import torch
        >>> batch = next(passes.batches([(torch.ones(1, 1), torch.tensor([0]))]))
        >>> check_called("model", {"0": [torch.ones(1, 1)]}, batch)
    """
    for name, seen in features.items():
        if not seen:
            raise ValueError(
                f"names: {name!r} of {which} was never called in the forward of batch {batch.index}, "
                "expected a module whose forward runs (a parameter read by a functional call has no output)"
            )


def _side_by_side(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Loader,
    shift_labels: bool | None,
    progress: Progress | None,
    add: Callable[[Tensor, Tensor, Tensor, Batch], None],
) -> None:
    with passes.evaluating(model_a, model_b):
        places = passes.device_of(model_a), passes.device_of(model_b)
        shift = passes.shifts_labels(model_a, shift_labels)
        for batch in passes.batches(loader, progress, shift=shift, encoder_decoder=is_encoder_decoder(model_a)):
            logits_a, logits_b = (passes.forward(m, batch, p) for m, p in zip((model_a, model_b), places, strict=True))
            rows_a, _, item = passes.labelled_rows(logits_a, batch.labels, shift)
            add(rows_a, passes.labelled_rows(logits_b, batch.labels, shift)[0], item, batch)


def _features(which: str, model: nn.Module, batch: Batch, names: list[str]) -> dict[str, list[Tensor]]:
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    with passes.captured(model, names, calls):
        passes.run(model, batch, passes.device_of(model))
    check_called(which, calls, batch)
    return calls
