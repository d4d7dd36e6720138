"""Whether another model can stand in the same table: it is measured on what was prepared for the first.

Labels are numbered in the first model's order and texts are split by its tokenizer. A model with the same
classes in another order, or with other tokens, would answer another question and still give figures, so it
is refused; who wants its figures measures it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rfa_fast.models import OpenedModel


def without_weights(opened: OpenedModel) -> OpenedModel:
    """What is known about a model, without the model, so that its memory is free again.

    Example:
        >>> without_weights(OpenedModel(nn.Linear(2, 2), "m", "factory", "unknown")).model
        Identity()
    """
    return replace(opened, model=nn.Identity())


def check_alike(flag: str, other: OpenedModel, first: OpenedModel, classes: Sequence[str]) -> None:
    """Check that `other` takes the labels and the tokens that were prepared for `first`.

    Args:
        flag: of the command line that named `other`.
        other: the model to compare with.
        first: the one that the data were prepared for.
        classes: of the prepared data, by index.

    Raises:
        ValueError: both name their classes and do so in another order, or both have a tokenizer and these have
            other vocabularies. Where `first` names none, the data's names are its order, if `other` has them all.

    Example:
        >>> cats, dogs = (OpenedModel(nn.Identity(), name, "factory", "image", labels)
        ...               for name, labels in (("a", ("cat", "dog")), ("b", ("dog", "cat"))))
        >>> check_alike("--against", dogs, cats, ["cat", "dog"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: --against: got b with 'dog' as class 0, expected 'cat', as in a; it cannot be measured on ...
    """
    known = first.labels or tuple(classes)
    ours, theirs = ([name.casefold() for name in labels] for labels in (known, other.labels))
    if not first.labels:
        theirs = theirs[: len(ours)] if set(ours) <= set(theirs) else []
    if theirs and ours != theirs and first.task != "language":
        at = next(i for i in range(max(len(ours), len(theirs))) if ours[i : i + 1] != theirs[i : i + 1])
        raise ValueError(
            f"{flag}: got {other.name} with {_named(other.labels, at)} as class {at}, expected {_named(known, at)}, as "
            f"in {first.name}; it cannot be measured on labels of another order, evaluate it by itself"
        )
    if first.tokenizer is None or other.tokenizer is None:
        return
    own, foreign = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if own != foreign:
        apart = min(word for word in own.keys() | foreign.keys() if own.get(word) != foreign.get(word))
        raise ValueError(
            f"{flag}: got {other.name}, whose tokenizer has {apart!r} as token {foreign.get(apart)}, expected "
            f"{own.get(apart)}, as in {first.name}; it cannot be measured on tokens of another vocabulary, evaluate it "
            "by itself"
        )


def _named(labels: Sequence[str], at: int) -> str:
    return repr(labels[at]) if at < len(labels) else "none"
