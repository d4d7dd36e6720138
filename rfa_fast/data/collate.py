"""How items become a batch: stacked, padded, or mixed with the flag that says which are to be forgotten.

Texts are padded when they are tokenised, to one length, and stacked here: a step that always sees
one shape is compiled once. :func:`collate_text` pads to the batch's longest text instead, for loops
that are not compiled and would rather not multiply padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from rfa_fast.data.draws import integer
from rfa_fast.objective import IGNORED_LABEL

# What stands beyond a row's end; input_ids take the tokenizer's own padding token.
PADDING = {"labels": IGNORED_LABEL}


def collate(items: Sequence[Any]) -> Any:
    """A batch of items of one shape: `(inputs, labels)` or a dict of tensors, each stacked along dimension 0.

    Raises:
        ValueError: no item, or items of different shapes; texts of different lengths go through
            :func:`collate_text`.

    Example:
        >>> inputs, labels = collate([(torch.zeros(3, 8, 8), 1), (torch.ones(3, 8, 8), 0)])
        >>> inputs.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """
    if not items:
        raise ValueError("items: got none, expected at least one")
    for name, values in _columns(items).items():
        shapes = {tuple(value.shape) for value in values if isinstance(value, Tensor)}
        if len(shapes) > 1:
            a, b = sorted(shapes)[:2]
            raise ValueError(f"{name}: got shapes {a} and {b} in one batch, expected one shape; resize or pad the data")
    return default_collate(list(items))


def collate_text(
    items: Sequence[Mapping[str, Tensor]], *, pad_token_id: int = 0, length: int | None = None
) -> dict[str, Tensor]:
    """A batch of tokenised texts, padded on the right to a common length.

    Args:
        items: dicts with `input_ids` (T,) and `attention_mask` (T,), T of each text its own; `labels`
            a class index () or one per token (T,); any other tensor of length T.
        pad_token_id: what stands beyond the end of `input_ids`. Labels get −100, everything else 0.
        length: T of the batch. `None`: the batch's longest attended text, which also cuts off padding
            that the items carry already. A fixed length is the better choice under torch.compile,
            where every new shape costs a compilation; then plain :func:`collate` serves as well.

    Returns:
        The same keys, stacked: (B, T), class labels (B,).

    Raises:
        ValueError: no item, an item without `input_ids` and `attention_mask`, or one longer than `length`.

    Example:
        >>> items = [
        ...     {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids)), "labels": torch.tensor(0)}
        ...     for ids in ([5, 6, 7], [8])
        ... ]
        >>> collate_text(items, pad_token_id=9)["input_ids"]
        tensor([[5, 6, 7],
                [8, 9, 9]])
    """
    if not items:
        raise ValueError("items: got none, expected at least one")
    for item in items:
        if missing := [key for key in ("input_ids", "attention_mask") if key not in item]:
            raise ValueError(f"items: got one with the keys {sorted(item)}, expected {missing[0]!r} among them")
    ends = [int(item["attention_mask"].nonzero().max()) + 1 if item["attention_mask"].any() else 1 for item in items]
    width = max(ends) if length is None else integer("length", length, 1)
    if max(ends) > width:
        raise ValueError(f"length: got {width}, expected at least {max(ends)}, the longest text of the batch")
    batch: dict[str, list[Tensor]] = {}
    for item in items:
        tokens = len(item["input_ids"])
        for key, value in item.items():
            if value.dim() and len(value) == tokens:
                fill = pad_token_id if key == "input_ids" else PADDING.get(key, 0)
                value = F.pad(value[:width], (0, max(0, width - tokens)), value=fill)
            batch.setdefault(key, []).append(value)
    return {key: torch.stack(values) for key, values in batch.items()}


def collate_mixed(
    batch: Sequence[tuple[Any, bool]], collate_fn: Callable[[list[Any]], Any] = collate
) -> tuple[Any, Tensor, Tensor]:
    """A batch of :class:`MixedDataset` items as `(inputs, labels, forget)`.

    Args:
        batch: `(item, is_forget)` pairs.
        collate_fn: makes `(inputs, labels)`, or a dict with `labels`, of the items.

    Returns:
        inputs as `collate_fn` made them (a dict loses its `labels`), labels, and forget, bool (B,).

    Raises:
        TypeError: what `collate_fn` made is neither of the two.

    Example:
        >>> inputs, labels, forget = collate_mixed([((torch.zeros(2), 3), False), ((torch.ones(2), 4), True)])
        >>> labels, forget
        (tensor([3, 4]), tensor([False,  True]))
    """
    if not batch:
        raise ValueError("batch: got no item, expected at least one")
    collated = collate_fn([item for item, _ in batch])
    forget = torch.tensor([bool(is_forget) for _, is_forget in batch])
    if isinstance(collated, Mapping) and "labels" in collated:
        return {key: value for key, value in collated.items() if key != "labels"}, collated["labels"], forget
    if isinstance(collated, tuple | list) and len(collated) == 2:
        return collated[0], collated[1], forget
    got = f"a dict with {sorted(collated)}" if isinstance(collated, Mapping) else f"a {type(collated).__name__}"
    raise TypeError(f"collate_fn: got {got}, expected (inputs, labels) or a dict with 'labels'")


def _columns(items: Sequence[Any]) -> dict[str, list[Any]]:
    """The items' values by key or place; none when the items are of another kind or differ in kind."""
    first = items[0]
    if isinstance(first, Mapping):
        return {key: [item[key] for item in items if isinstance(item, Mapping) and key in item] for key in first}
    if isinstance(first, tuple) and len(first) == 2:
        return {name: [item[place] for item in items] for place, name in enumerate(("inputs", "labels"))}
    return {}
