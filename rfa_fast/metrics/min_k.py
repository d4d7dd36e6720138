"""Min-K %: how surprising the least expected tokens of a text are to a language model.

Shi et al., "Detecting Pretraining Data from Large Language Models" (ICLR 2024, arXiv 2310.16789)::

    Min-K %(x) = 1/|E| Σ_{t ∈ E} log p(x_t | x_<t)        E: the k % of the tokens with the lowest p

A text that was trained on has few tokens that surprise the model, so its mean over E is high. Here
the sign is turned (a loss, low for members), as everywhere in the membership metrics. E has
`⌊k · T / 100⌋` tokens and at least one. All percentages come out of one sort of the batch's tokens;
nothing per token outlives the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_K_PERCENTS = (5, 10, 20, 40)
"""The k of Min-K % that every pass over texts takes."""
MIN_K_DEFAULT = 20
"""The k that the paper recommends."""


def least_likely(nll: Tensor, item: Tensor, n: int, percents: Sequence[int] = MIN_K_PERCENTS) -> Tensor:
    """Mean −log p of the least likely k % of each text's tokens.

    Args:
        nll: floating `(rows,)`, −log p of each labelled token.
        item: int64 `(rows,)`, the text that the token belongs to, 0 to n − 1.
        n: number of texts.
        percents: the k, each 1 to 100.

    Returns:
        `(n, len(percents))` in the dtype of `nll`; NaN for a text without a token.

    Example:
        >>> nll, item = torch.tensor([1.0, 4.0, 2.0, 3.0, 7.0]), torch.tensor([0, 0, 0, 0, 1])
        >>> least_likely(nll, item, 3, (20, 50)).tolist()
        [[4.0, 3.5], [7.0, 7.0], [nan, nan]]
    """
    tokens = torch.bincount(item, minlength=n)
    order = torch.argsort(nll, descending=True)
    order = order[torch.argsort(item[order], stable=True)]  # text by text, the least likely token first
    values, texts = nll[order], item[order]
    rank = torch.arange(len(order), device=nll.device) - (tokens.cumsum(0) - tokens)[texts]
    columns = []
    for percent in percents:
        kept = (tokens * percent // 100).clamp(min=1)
        chosen = rank < kept[texts]
        total = nll.new_zeros(n).index_add_(0, texts[chosen], values[chosen])
        columns.append(torch.where(tokens > 0, total / kept, math.nan))
    return torch.stack(columns, 1)
