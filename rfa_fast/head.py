"""From a model's last hidden states, or its logits, to the task terms of eq. 3.

A causal language model's logits are the largest tensor of the step and are needed only inside two
sums. Here the model runs with its head standing aside, and the head's product is taken chunk by
chunk inside :func:`rfa_fast.functional.rfa_head_loss`. A model that does something of its own to the
logits after the head (a scale, a clamp) is noticed, and gets the plain path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.functional import rfa_head_loss
from rfa_fast.groups import Batch, GroupContext
from rfa_fast.modules import RFALayer
from rfa_fast.objective import IGNORED_LABEL, RETAIN, mean_prediction, task_sums
from rfa_fast.targets import output_embeddings


@dataclass(frozen=True)
class TaskTerms:
    """Mean cross-entropies of the two groups (eq. 3), 0-dim, and ỹ `(C,)`."""

    retain: Tensor
    forget: Tensor
    mean_prediction: Tensor


def predicts_next_token(model: nn.Module) -> bool:
    """Whether labels of shape (B, T) are shifted by one: causal language models, not encoder-decoders.

    Example:
        >>> predicts_next_token(nn.Linear(2, 2))
        False
    """
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return False
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def check_labels(labels: Tensor, size: int, device: torch.device) -> None:
    """Labels must be int64, one row per sample, where the model is.

    Raises:
        TypeError: another dtype. ValueError: another shape.

    Example:
        >>> check_labels(torch.tensor([0, 1]), 2, torch.device("cpu"))
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: got {got}, expected an int64 tensor")
    if labels.ndim not in (1, 2) or labels.shape[0] != size:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({size},) or ({size}, T)")
    if labels.device != device:
        raise ValueError(f"labels: got device {labels.device}, expected the model's device {device}")


def logits_and_task(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    labels: Tensor,
    batch: Batch,
    context: GroupContext,
) -> TaskTerms:
    """Run the model on a batch and return its task terms.

    Args:
        model: the patched model.
        inputs: a tensor, or keyword arguments.
        labels: int64 `(B,)` or `(B, T)`, unshifted.
        batch: the group codes.
        context: holds the ỹ of the batch before.

    Raises:
        ValueError: logits whose shape does not fit the labels, or a label out of range.
        TypeError: a model that returns no logits.
    """
    shift = context.config.shift_labels
    if shift is None:
        shift = labels.ndim == 2 and predicts_next_token(model)
    head = output_embeddings(model)
    bare = head if isinstance(head, nn.Linear) and not isinstance(head, RFALayer) else None
    if labels.ndim == 2 and bare is not None and context.head_stands_aside:
        with _standing_aside(bare) as captured:
            output = _logits(_run(model, inputs))
        if len(captured) == 1 and output is captured[0]:
            _check_length(labels, output)
            rows, codes = _token_rows(labels, batch, shift)
            _check_range(rows, codes, bare.weight.shape[0])
            sums = rfa_head_loss(
                output.flatten(0, 1), bare.weight, rows, codes, bare.bias,
                mean_prediction=context.mean_prediction, backend=context.config.backend,
            )  # fmt: skip
            return TaskTerms(
                sums.retain / sums.retain_count.clamp(min=1), sums.forget / sums.forget_count.clamp(min=1),
                sums.mean_prediction,
            )  # fmt: skip
        context.calls, context.terms, context.means, context.head_stands_aside = {}, {}, {}, False
    logits = _logits(_run(model, inputs))
    if labels.ndim == 2:
        _check_length(labels, logits)
        rows, codes = _token_rows(labels, batch, shift)
        logits = logits.flatten(0, 1)
    else:
        rows, codes = labels, batch.samples
        if logits.ndim != 2:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)} beside logits {tuple(logits.shape)}, expected (B, C)"
            )
    _check_range(rows, codes, logits.shape[1])
    fallback = context.mean_prediction
    soft_label, _ = mean_prediction(logits, rows, codes, fallback=fallback)
    terms = task_sums(logits, rows, codes, soft_label)
    return TaskTerms(
        terms.retain / terms.retain_count.clamp(min=1), terms.forget / terms.forget_count.clamp(min=1), soft_label
    )


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> object:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def _logits(output: object) -> Tensor:
    """The logits of whatever a model returns: a tensor, `.logits`, `["logits"]`, or the first of a tuple."""
    found: object = output
    if not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        if found is None and isinstance(output, tuple) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"model: got an output of {type(output).__name__}, expected logits: a tensor or an object with .logits"
        )
    return found


@contextmanager
def _standing_aside(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Let a head hand its input through, and note what it got."""
    captured: list[Tensor] = []

    def pass_through(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden

    object.__setattr__(head, "forward", pass_through)
    try:
        yield captured
    finally:
        object.__delattr__(head, "forward")


def _token_rows(labels: Tensor, batch: Batch, shift: bool) -> tuple[Tensor, Tensor]:
    """Labels and codes per logit row; a label on an invalid token counts as −100."""
    codes = batch.samples[:, None].expand(labels.shape) if batch.tokens is None else batch.tokens
    usable = torch.where(codes >= RETAIN, labels, IGNORED_LABEL)
    if shift:
        usable = torch.cat([usable[:, 1:], torch.full_like(usable[:, :1], IGNORED_LABEL)], 1)
    return usable.flatten(), codes.flatten()


def _check_length(labels: Tensor, logits: Tensor) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])} to fit the logits"
        )


def _check_range(labels: Tensor, codes: Tensor, classes: int) -> None:
    """Labels of retain rows must name a class; checked where that costs no device synchronisation."""
    read = (codes == RETAIN) & (labels != IGNORED_LABEL)
    fine = (~read | ((labels >= 0) & (labels < classes))).all()
    if labels.device.type != "cpu":
        torch._assert_async(fine, f"labels: expected values in [0, {classes}) or -100")
    elif not torch.compiler.is_compiling() and not bool(fine):
        bad = labels[read & ((labels < 0) | (labels >= classes))]
        raise ValueError(f"labels: got {int(bad[0])}, expected values in [0, {classes}), or -100 to leave a sample out")
