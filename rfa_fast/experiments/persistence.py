"""Does it stay forgotten? What an unlearned model does after it was rounded, trained on, or reminded.

A model can score 0 on the forget set and still hold everything: 4-bit rounding alone has brought back
most of what was "forgotten" (arXiv 2410.16454), and a few samples may do the rest. So the figures are
taken again in the states that a released model meets: its weights rounded to 8 and 4 bits, after one
epoch of fine-tuning on what was kept, after relearning on a tenth of what was forgotten; and, where
adapters are still live, with them beside the frozen weights instead of merged in. Each state is reached
on a copy, one at a time, so that the price in memory is one further model.

None of these figures says much alone. A retrained model relearns too, from nothing: the same call on it
gives the line to compare with. And relearning is judged on the items that it was *not* shown.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from rfa_fast.data import collate, collate_text
from rfa_fast.data.draws import permutation
from rfa_fast.experiments.quantisation import GROUP_SIZE, Quantiser, check_options, quantise_weights
from rfa_fast.methods import checks, train
from rfa_fast.methods.seeding import derive_seed
from rfa_fast.metrics import predict
from rfa_fast.modules import RFALayer
from rfa_fast.patching import RFA

Figures = Callable[[nn.Module], Mapping[str, float]]
StateProgress = Callable[[str, int, int], object]

RELEARN_SHARE = 0.1
RELEARN_EPOCHS = 10
"""Ten passes over a tenth of a small forget set are a handful of steps; a single one would be no attack."""

_OURS = ("epochs", "seed", "label", "progress")


class Persistence(dict[str, dict[str, float]]):
    """State -> figure -> value, and in :attr:`how` what was done to reach each state.

    States: `"merged"`, the model as it is, adapters merged; `"8-bit"`, `"4-bit"`; `"finetuned"`; `"relearnt"`; and
    with live adapters `"live"`, `"8-bit live"`, `"4-bit live"`, where the frozen base alone is rounded.
    Figures: `forget_accuracy` on all of D_f, `forget_unseen_accuracy` on the part that relearning does not
    see (missing when it sees all), and the caller's. A dict of floats: JSON-safe as long as the caller's
    figures are finite.
    """

    how: dict[str, str]

    def __init__(self, rows: Mapping[str, Mapping[str, float]] | None = None, how: Mapping[str, str] | None = None):
        super().__init__({name: dict(row) for name, row in (rows or {}).items()})
        self.how = dict(how or {})

    def flat(self) -> dict[str, float]:
        """Every figure in one dict, `"4-bit/forget_accuracy"` and so on.

        Example:
            >>> Persistence({"4-bit": {"forget_accuracy": 0.5}}).flat()
            {'4-bit/forget_accuracy': 0.5}
        """
        return {f"{state}/{name}": value for state, row in self.items() for name, value in row.items()}


def persistence(
    model: nn.Module,
    subsets: Mapping[str, Any],
    figures: Figures | None = None,
    *,
    handle: RFA | None = None,
    bits: Sequence[int] = (8, 4),
    group_size: int = GROUP_SIZE,
    quantiser: Quantiser = "auto",
    relearn_share: float = RELEARN_SHARE,
    relearn_epochs: int = RELEARN_EPOCHS,
    seed: int = 0,
    train_options: Mapping[str, Any] | None = None,
    evaluation_batch: int = 256,
    progress: StateProgress | None = None,
    bars: bool = False,
) -> Persistence:
    """Measure an unlearned model, and copies of it after quantisation, fine-tuning and relearning.

    Args:
        model: the unlearned model; left as it was.
        subsets: map-style datasets by name, `"D_r"` and `"D_f"` among them, for one of each.
        figures: `figures(model)` gives further named figures; it sees the model in eval mode.
        handle: the live adapters, where they were not merged (`unlearn(merge=False).rfa`).
        bits: of the quantised states, each 2 to 8.
        group_size, quantiser: as for :func:`~rfa_fast.experiments.quantisation.quantise_weights`.
        relearn_share: of D_f, that is shown again: that many items, rounded to the nearest, at least one.
        relearn_epochs: passes over them.
        seed: of the choice of items, of order and dropout.
        train_options: keyword arguments of :func:`rfa_fast.methods.train` for both trainings (`lr`, `batch_size`).
        evaluation_batch: items per batch when D_f is measured.
        progress: called with (state, states done, states in all) before each, and once at the end.
        bars: show training on standard error.

    Returns:
        The figures by state, in the order: merged, live, quantised, finetuned, relearnt.

    Raises:
        ValueError, TypeError: an option out of range, a subset missing or empty, adapters that are live and
            not given, a model without anything to train, or a figure named like ours. Nothing has been
            measured then, the last excepted.
        NonFiniteError: of a training.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> net = nn.Linear(4, 2)
        >>> subsets = {"D_r": TensorDataset(x[:2], y[:2]), "D_f": TensorDataset(x[2:], y[2:])}
        >>> found = persistence(net, subsets, bits=[8], train_options={"lr": 0.1})
        >>> list(found), sorted(found["8-bit"])
        (['merged', '8-bit', 'finetuned', 'relearnt'], ['forget_accuracy', 'forget_unseen_accuracy'])
    """
    checks.positive_integers(epochs=relearn_epochs, evaluation_batch=evaluation_batch)
    check_options(bits, group_size, quantiser)
    checks.callables((), figures=figures, progress=progress)
    if isinstance(relearn_share, bool) or not isinstance(relearn_share, int | float) or not 0 < relearn_share <= 1:
        raise ValueError(f"relearn_share: got {relearn_share!r}, expected a number above 0 and at most 1")
    options = _train_options(train_options)
    sizes = {name: _size(subsets, name) for name in ("D_r", "D_f")}
    _check_model(model, handle)
    shown = permutation(sizes["D_f"], seed, "relearn")[: max(1, round(relearn_share * sizes["D_f"]))]
    states = _States(
        model, handle, subsets["D_r"], Subset(subsets["D_f"], shown), group_size, quantiser, seed, options, bars
    )
    forget = _Forget(subsets["D_f"], frozenset(shown), evaluation_batch)

    ways: dict[str, Callable[[], tuple[nn.Module, str]]] = {"merged": states.merged}
    if handle is not None:
        ways["live"] = states.live
    for each in dict.fromkeys(bits):
        ways[f"{each}-bit"] = partial(states.quantised, each, live=False)
        if handle is not None:
            ways[f"{each}-bit live"] = partial(states.quantised, each, live=True)
    ways["finetuned"] = states.finetuned
    ways["relearnt"] = partial(states.relearnt, relearn_epochs)

    rows: dict[str, dict[str, float]] = {}
    how: dict[str, str] = {}
    for done, (name, reach) in enumerate(ways.items()):
        if progress is not None:
            progress(name, done, len(ways))
        changed, how[name] = reach()
        rows[name] = forget.figures(changed)
        further = {} if figures is None else checks.figures(figures, changed)
        if clash := sorted(set(further) & set(rows[name])):
            raise ValueError(f"figures: got {clash[0]!r}, expected other names than {', '.join(rows[name])}")
        rows[name] |= further
        del changed  # one copy at a time
    if progress is not None:
        progress(next(reversed(ways)), len(ways), len(ways))
    return Persistence(rows, how)


class _States:
    """The ways to each state, each on a copy of its own, with words for what was done."""

    def __init__(
        self,
        model: nn.Module,
        handle: RFA | None,
        retain: Any,
        shown: Subset[Any],
        group_size: int,
        quantiser: Quantiser,
        seed: int,
        train_options: Mapping[str, Any],
        bars: bool,
    ) -> None:
        self.model, self.handle, self.retain, self.shown = model, handle, retain, shown
        self.group_size, self.quantiser = group_size, quantiser
        self.seed, self.train_options, self.bars = seed, train_options, bars

    def live(self) -> tuple[nn.Module, str]:
        """Adapters beside the frozen weights."""
        return copy.deepcopy(self.model), "adapters live, nothing merged"

    def merged(self) -> tuple[nn.Module, str]:
        """An ordinary model."""
        if self.handle is None:
            return copy.deepcopy(self.model), "the model as given"
        model, handle = copy.deepcopy((self.model, self.handle))
        lost = max(handle.merge().values())
        return model, f"adapters merged; rounding lost up to {lost:.2%} of a layer's change"

    def quantised(self, bits: int, *, live: bool) -> tuple[nn.Module, str]:
        """Its weights rounded; with `live` those of the frozen base alone."""
        model, before = self.live() if live else self.merged()
        done = quantise_weights(model, bits, group_size=self.group_size, quantiser=self.quantiser)
        return model, f"{before}; {done}"

    def finetuned(self) -> tuple[nn.Module, str]:
        """One epoch on what was kept."""
        return self._trained("finetuned", self.retain, 1, "fine-tuning on D_r")

    def relearnt(self, epochs: int) -> tuple[nn.Module, str]:
        """Some epochs on a part of what was forgotten."""
        return self._trained("relearnt", self.shown, epochs, f"relearning on {len(self.shown)} items of D_f")

    def _trained(self, state: str, data: Any, epochs: int, label: str) -> tuple[nn.Module, str]:
        model, before = self.merged()
        result = train(
            model, data, epochs=epochs, seed=derive_seed(self.seed, state), label=label, progress=self.bars,
            **self.train_options,
        )  # fmt: skip
        rate = result.history[-1]["lr"]
        return (
            model,
            f"{before}; {label}: {epochs} epochs, {len(result.history)} steps, learning rate {rate:g} at the end",
        )


class _Forget:
    """Accuracy on D_f, and on the part of it that relearning does not see."""

    def __init__(self, data: Any, shown: frozenset[int], batch: int) -> None:
        self.data, self.batch = data, batch
        self.unseen = [i for i in range(len(data)) if i not in shown]

    def figures(self, model: nn.Module) -> dict[str, float]:
        """One pass."""
        first = self.data[0]
        padded = isinstance(first, Mapping) and "attention_mask" in first
        found = predict(model, DataLoader(self.data, self.batch, collate_fn=collate_text if padded else collate))
        out = {"forget_accuracy": found.accuracy}
        right, labelled = found.tokens_right == found.tokens, found.tokens > 0
        kept = [i for i in self.unseen if labelled[i]]
        return out | ({"forget_unseen_accuracy": float(right[kept].mean())} if kept else {})


def _train_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(given or {})
    known = [name for name in inspect.signature(train).parameters if name not in ("model", "dataset", *_OURS)]
    for name in options:
        if name not in known:
            raise ValueError(f"train_options: got {name!r}, expected some of {', '.join(known)}")
    return options


def _size(subsets: Mapping[str, Any], name: str) -> int:
    if name not in subsets:
        raise ValueError(f"subsets: got {', '.join(subsets) or 'none'}, expected {name} among them")
    data = subsets[name]
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(f"subsets: got {type(data).__name__} as {name}, expected a map-style dataset")
    if len(data) == 0:
        raise ValueError(f"subsets: got no item in {name}, expected at least one")
    return len(data)


def _check_model(model: nn.Module, handle: RFA | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    patched = [name for name, module in model.named_modules() if isinstance(module, RFALayer)]
    if handle is None:
        if patched:
            raise ValueError(f"model: got one with live adapters ({patched[0]}) and no handle, expected handle=…")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model: got one whose parameters are all frozen, expected some with requires_grad")
    elif not isinstance(handle, RFA):
        raise TypeError(f"handle: got {type(handle).__name__}, expected the RFA of the model's adapters")
    elif handle.model is not model or not patched:
        raise ValueError("handle: got one of another model, or one that is merged; expected that of the live adapters")
