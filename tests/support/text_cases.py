"""Tokenised texts so small that a network of two layers learns them in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rfa_fast.data import TokenDataset


def four_token_texts(
    n: int, *, language: bool, prompt: int, texts: Sequence[str], prompts: Sequence[str] | None = None
) -> TokenDataset:
    """Texts of four tokens; the first is 10 + topic, and so is the last, which a language model has to answer.

    `prompt`: tokens that carry no label. `prompts`: by default one for each topic.
    """
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(20, 30, (n, 4), generator=generator)
    labels = torch.arange(n) % 3
    ids[:, 0] = 10 + labels
    targets = None
    if language:
        ids[:, 3] = 10 + labels
        targets = ids.clone()
        targets[:, :prompt] = -100
    return TokenDataset(
        ids, torch.ones_like(ids), labels.tolist(), ("a", "b", "c"), targets=targets, texts=list(texts),
        prompts=[f"p{label}" for label in labels.tolist()] if prompts is None else list(prompts),
    )  # fmt: skip
