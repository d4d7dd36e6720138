"""What of a batch of texts is padding: which tokens count, and which labels there is something to predict from.

The attention mask is of the tokens that a model reads. An encoder-decoder's labels are of the tokens it writes, another
text of another length; their padding is −100 in the labels, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rfa_fast.objective import IGNORED_LABEL

Inputs = Tensor | Mapping[str, Any]


def batch_of(inputs: Inputs) -> tuple[int, int | None, Tensor | None]:
    """B, T (token inputs only) and the attention mask of a model's inputs.

    Args:
        inputs: a tensor, or a transformers model's keyword dict.

    Raises:
        ValueError: no tensor among the inputs, or an attention mask that is not `(B, T)`.

    Example:
        >>> batch_of({"input_ids": torch.ones(2, 5, dtype=torch.int64)})
        (2, 5, None)
    """
    if isinstance(inputs, Tensor):
        if not inputs.ndim:
            raise ValueError("inputs: got shape (), expected a batch axis in front: (B, ...)")
        return inputs.shape[0], None, None
    first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise ValueError(f"inputs: got keys {sorted(inputs)}, expected at least one tensor with a batch axis")
    tokens = _tokens(inputs, "input_ids", "inputs_embeds")
    if tokens is None:
        return first.shape[0], None, None
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask: got {type(mask).__name__}, expected a tensor of shape {tuple(tokens.shape[:2])}"
        )
    if mask is not None and tuple(mask.shape) != tuple(tokens.shape[:2]):
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected {tuple(tokens.shape[:2])}; "
            "pass the padding mask as `valid` where the model wants another attention mask"
        )
    return tokens.shape[0], tokens.shape[1], None if mask is None else mask.bool()


def decoder_inputs(inputs: Inputs) -> Tensor | None:
    """What an encoder-decoder's decoder reads, `(B, T)` or `(B, T, K)`; `None` in other models' inputs.

    Example:
        >>> ids = torch.ones(2, 5, dtype=torch.int64)
        >>> decoder_inputs({"input_ids": ids}) is None
        True
        >>> decoder_inputs({"input_ids": ids, "decoder_input_ids": ids[:, :3]}).shape
        torch.Size([2, 3])
    """
    return None if isinstance(inputs, Tensor) else _tokens(inputs, "decoder_input_ids", "decoder_inputs_embeds")


def real_labels(inputs: Inputs, labels: Tensor, *, shift: bool, encoder_decoder: bool = False) -> Tensor:
    """Labels with −100 on padding, as far as the inputs say what that is.

    Args:
        inputs: what the model is called with.
        labels: integers `(B,)` or `(B, T)`, unshifted.
        shift: position t of a text predicts the label of t + 1; see :func:`without_padding`.
        encoder_decoder: the labels are of another text than the attention mask.

    Example:
        >>> ids = torch.tensor([[3, 4, 0]])
        >>> real_labels({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]])}, ids, shift=True)
        tensor([[   3,    4, -100]])
    """
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    another = encoder_decoder or decoder_inputs(inputs) is not None
    if not isinstance(mask, Tensor) or mask.shape != labels.shape or another:
        return labels
    return without_padding(labels, mask.to(labels.device) != 0, shift=shift)


def without_padding(labels: Tensor, real: Tensor, *, shift: bool) -> Tensor:
    """Labels with −100 where there is nothing to predict, or nothing to predict it from.

    Args:
        labels: integers `(B, T)`, unshifted.
        real: bool `(B, T)`, false on padding.
        shift: position t predicts the label of t + 1, so that the first token behind padding has none to come from.

    Example:
        >>> real = torch.tensor([[False, True, True, False]])
        >>> [without_padding(torch.tensor([[0, 3, 4, 0]]), real, shift=shift).tolist() for shift in (False, True)]
        [[[-100, 3, 4, -100]], [[-100, -100, 4, -100]]]
    """
    if shift:
        # The first position has no label to predict in any case; its own stays what it is.
        real = torch.cat([real[:, :1], real[:, 1:] & real[:, :-1]], 1)
    return torch.where(real, labels, IGNORED_LABEL)


def _tokens(inputs: Mapping[str, Any], *names: str) -> Tensor | None:
    """The first of these that is there, if it is a tensor `(B, T, …)`."""
    found = (inputs.get(name) for name in names)
    return next((value for value in found if isinstance(value, Tensor) and value.ndim > 1), None)
