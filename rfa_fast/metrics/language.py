"""Figures of causal language models: perplexity, token and answer accuracy, and what they write.

Answers are scored under teacher forcing: each token is predicted from the true ones before it. That
is one forward pass instead of one per token, and an item whose every token is the arg-max is exactly
an item that greedy decoding would reproduce.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.head import logits_of
from rfa_fast.metrics import passes
from rfa_fast.metrics.passes import Loader, Progress
from rfa_fast.metrics.predictions import Predictions, predict


def perplexity(
    model: nn.Module, loader: Loader, *, shift_labels: bool | None = None, progress: Progress | None = None
) -> float:
    """exp of the mean −log p over all labelled tokens of the loader (section V-B2).

    Long texts weigh more than short ones: the mean is over tokens, not over texts or batches.

    Args:
        model, loader, shift_labels, progress: as for :func:`~rfa_fast.metrics.predictions.predict`, which also
            lists the errors.

    Raises:
        ValueError: labels `(B,)`, or no labelled token.

    Example:
        >>> uniform = torch.zeros(2, 4, 50)  # (B, T, V): every token of 50 is as likely
        >>> round(perplexity(nn.Identity(), [(uniform, torch.randint(50, (2, 4)))]), 3)
        50.0
    """
    return predict(model, loader, shift_labels=shift_labels, progress=progress).perplexity


def answer_accuracy(
    model: nn.Module, loader: Loader, *, shift_labels: bool | None = None, progress: Progress | None = None
) -> float:
    """Share in [0, 1] of the texts whose every labelled token is the arg-max, given the true ones before it.

    Args:
        model, loader, shift_labels, progress: as for :func:`~rfa_fast.metrics.predictions.predict`. Label the
            answer only (−100 on the question) to have the answer scored.

    Raises:
        ValueError: labels `(B,)`, or no labelled token.

    Example:
        >>> logits = torch.eye(3)[torch.tensor([[1, 2, 0], [1, 1, 0]])]  # predict 1, 2 and 1, 1 next
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 1, 2]])
        >>> answer_accuracy(nn.Identity(), [(logits, labels)], shift_labels=True)
        0.5
    """
    return _texts(predict(model, loader, shift_labels=shift_labels, progress=progress)).accuracy


def token_accuracy(
    model: nn.Module, loader: Loader, *, shift_labels: bool | None = None, progress: Progress | None = None
) -> float:
    """Share in [0, 1] of the labelled tokens that are the arg-max, given the true ones before them.

    Raises:
        ValueError: labels `(B,)`, or no labelled token.

    Example:
        >>> logits = torch.eye(3)[torch.tensor([[1, 2, 0], [1, 1, 0]])]
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 1, 2]])
        >>> token_accuracy(nn.Identity(), [(logits, labels)], shift_labels=True)
        0.75
    """
    return _texts(predict(model, loader, shift_labels=shift_labels, progress=progress)).token_accuracy


def generate_text(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int = 40) -> str:
    """What the model writes after `prompt`, always the most probable token: the same text every time.

    The loop is ours, not `model.generate`: a model's own generation settings (repetition penalty,
    sampling) would make "before" and "after" differ by more than the weights. A model that takes
    a cache, as transformers' do, computes every token once; any other the whole text for each token.

    Args:
        model: a causal language model; takes `input_ids` and `attention_mask`.
        tokenizer: of transformers: callable with `return_tensors="pt"`, with `decode` and `eos_token_id`.
        prompt: text that yields at least one token.
        max_new_tokens: at least 1; fewer are written when the end-of-sequence token comes first.

    Returns:
        The new text alone, without special tokens.

    Raises:
        ValueError: `max_new_tokens` below 1, or a prompt without a token.
        TypeError: the model returns no logits.
        FloatingPointError: NaN or infinite logits; names the token.

    Example:
        >>> class Tokens:
        ...     eos_token_id = 9
        ...     def __call__(self, text, return_tensors): return {"input_ids": torch.tensor([[int(c) for c in text]])}
        ...     def decode(self, ids, skip_special_tokens): return "".join(str(int(i)) for i in ids)
        >>> class Counts(nn.Module):
        ...     def forward(self, input_ids, attention_mask): return torch.eye(10)[input_ids + 1]
        >>> generate_text(Counts(), Tokens(), "45")
        '678'
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected an integer >= 1")
    ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise ValueError(f"prompt: got {prompt!r} with no token in it, expected at least one")
    device, stops = passes.device_of(model), _end_tokens(model, tokenizer)
    ids = ids.long().to(device)
    begin, unread = ids.shape[1], ids
    name = _cache_name(model)
    cache = {} if name is None else {name: None, "use_cache": True}
    with passes.evaluating(model):
        for new in range(max_new_tokens):
            output = model(input_ids=unread, attention_mask=torch.ones_like(ids), **cache)
            last = logits_of(output)[:, -1].float()
            if not bool(last.logsumexp(-1).isfinite().all()):
                raise FloatingPointError(f"model: NaN or infinite logits at new token {new}, expected finite numbers")
            token = last.argmax(-1)
            if int(token) in stops:
                break
            ids = unread = torch.cat([ids, token[:, None]], dim=1)
            if name is not None and (past := getattr(output, name, None)) is not None:
                cache[name], unread = past, token[:, None]
    return str(tokenizer.decode(ids[0, begin:].cpu(), skip_special_tokens=True))


def _cache_name(model: nn.Module) -> str | None:
    """What a model calls its cache, given and returned: transformers renamed it with version 5.24."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if {name, "use_cache"} <= set(known)), None)


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """A model may end on several tokens (chat models do), its tokenizer names only one."""
    ends: set[int] = set()
    for holder in (tokenizer, getattr(model, "generation_config", None)):
        value = getattr(holder, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return {int(end) for end in ends}


def _texts(predictions: Predictions) -> Predictions:
    if predictions.labels is not None:
        raise ValueError("labels: got one per item (B,), expected one per token (B, T)")
    return predictions
