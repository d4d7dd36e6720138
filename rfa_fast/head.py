"""From a model's last hidden states, or its logits, to the task terms of eq. 3.

A causal language model's logits are the largest tensor of the step and are needed only inside two
sums. Here the model runs with its head standing aside, and the head's product is taken chunk by
chunk inside :func:`rfa_fast.functional.rfa_head_loss`. A model that does something of its own to the
logits after the head (a scale, a clamp) is noticed, and gets the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rfa_fast.forwards import in_front
from rfa_fast.functional import HeadLoss, rfa_head_loss
from rfa_fast.groups import Batch, GroupContext
from rfa_fast.handed import version
from rfa_fast.modules import RFALayer
from rfa_fast.names import unwrapped
from rfa_fast.objective import FORGET, IGNORE, IGNORED_LABEL, RETAIN, TaskSums, check_range, mean_prediction, task_sums
from rfa_fast.padding import without_padding
from rfa_fast.targets import inherits_forward, output_embeddings

Result = TypeVar("Result")
_ANOTHER_TASK = "for a loss of your own, run the model inside `with rfa.groups(forget):` and add rfa.alignment_loss()"


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
    can_generate = getattr(unwrapped(model), "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return False
    return not is_encoder_decoder(model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model writes a text of its own beside the one it reads, so that labels are not of its inputs.

    Example:
        >>> is_encoder_decoder(nn.Linear(2, 2))
        False
    """
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def check_labels(labels: Tensor, size: int, device: torch.device) -> None:
    """Labels must be int64, one row per sample, where the model is.

    Raises:
        TypeError: another dtype. ValueError: another shape.

    Example:
        >>> check_labels(torch.tensor([0, 1]), 2, torch.device("cpu"))
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: got {got}, expected an int64 tensor of classes; {_ANOTHER_TASK}")
    if labels.ndim not in (1, 2) or labels.shape[0] != size:
        expected = f"({size},) or ({size}, T)"
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {expected}; {_ANOTHER_TASK}")
    if labels.device != device:
        raise ValueError(f"labels: got device {labels.device}, expected the model's device {device}")


def logits_and_task(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    labels: Tensor,
    batch: Batch,
    context: GroupContext,
    fallback: Tensor | None,
) -> TaskTerms | None:
    """Run the model on a batch and return its task terms.

    Args:
        model: the patched model.
        inputs: a tensor, or keyword arguments.
        labels: int64 `(B,)` or `(B, T)`, unshifted.
        batch: the group codes.
        context: the model's.
        fallback: ỹ of the batch before, for one without a labelled retain row.

    Returns:
        `None` where the head stood aside and the model did something of its own to its logits: from then on it does
        not stand aside, and the batch has to run once more.

    Raises:
        ValueError: logits whose shape does not fit the labels, or a label out of range.
        TypeError: a model that returns no logits.
    """
    shift = _shifts(labels, model, context)
    head = head_aside(model, labels, context)
    if head is not None:
        if context.head_is_aside:
            hidden: Tensor | None = logits_of(_run(model, inputs))
        else:
            with standing_aside(head) as seen:
                output = logits_of(_run(model, inputs))
            untouched = len(seen) == 1 and output is seen[0][0] and version(output) == seen[0][1]
            hidden = output if untouched else None
        if hidden is not None:
            return _fused(head, hidden, labels, batch, context, fallback, shift)
        context.head_stands_aside = False
        return None
    logits = logits_of(_run(model, inputs))
    if labels.ndim == 2:
        _check_length(labels, logits)
        rows, codes = _token_rows(labels, batch, shift)
        logits = logits.flatten(0, 1)
    else:
        rows, codes = labels, batch.samples
        if logits.ndim != 2:
            got = f"{tuple(labels.shape)} beside logits {tuple(logits.shape)}"
            raise ValueError(f"labels: got shape {got}, expected (B, C); {_ANOTHER_TASK}")
    check_range(rows, codes, logits.shape[1])
    soft_label, _ = mean_prediction(logits, rows, codes, fallback=fallback)
    return _terms(task_sums(logits, rows, codes, soft_label), soft_label, batch)


def output_layer(model: nn.Module, context: GroupContext) -> nn.Linear | None:
    """The language-model head whose product can be taken chunk by chunk, or `None`.

    An adapted one can be, too, unless teacher mode wants to know its original logits, or its features are samples'.

    Example:
        >>> from rfa_fast.config import RFAConfig
        >>> output_layer(nn.Linear(2, 2), GroupContext(RFAConfig())) is None
        True
    """
    head = output_embeddings(model)
    if not isinstance(head, nn.Linear):
        return None
    if not isinstance(head, RFALayer):
        plain = context.head_is_aside or (inherits_forward(type(head), nn.Linear) and "forward" not in head.__dict__)
        return head if plain else None
    config = context.config
    by_chunk = head.adapter == "lora" and config.mode == "residual" and config.feature_mean != "sample"
    return head if by_chunk and context.enabled else None


def head_aside(model: nn.Module, labels: Tensor, context: GroupContext) -> nn.Linear | None:
    """The head that stands aside in a forward for these labels, or `None`: token labels, in a model that allows it.

    Example:
        >>> from rfa_fast.config import RFAConfig
        >>> head_aside(nn.Linear(2, 2), torch.tensor([0]), GroupContext(RFAConfig())) is None
        True
    """
    return output_layer(model, context) if labels.ndim == 2 and context.head_stands_aside else None


def trying_aside(run: Callable[[], Result], head: nn.Linear | None, context: GroupContext) -> Result:
    """`run()`; where the model fails as it has no logits, once more with the head in its place, from then on.

    Some add a bias as long as the vocabulary to what the head gives, or take some of its columns.

    Args:
        run: forwards of the model.
        head: stands aside in them, or `None`.
        context: the model's.

    Example:
        >>> from rfa_fast.config import RFAConfig
        >>> trying_aside(lambda: 3, None, GroupContext(RFAConfig()))
        3
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError):
        if head is None or not context.head_stands_aside:
            raise
    context.head_stands_aside, done = False, False
    try:
        result = run()
        done = True
        return result
    finally:
        context.head_stands_aside = not done  # an error that the head has nothing to do with


def _fused(
    head: nn.Linear, hidden: Tensor, labels: Tensor, batch: Batch, context: GroupContext, fallback: Tensor | None,
    shift: bool,
) -> TaskTerms:  # fmt: skip
    """The terms from hidden states `(B, T, K)`; an adapted head reports its alignment as every layer does."""
    _check_length(labels, hidden)
    rows, codes = _token_rows(labels, batch, shift)
    config = context.config
    if not isinstance(head, RFALayer):
        sums = rfa_head_loss(
            hidden.flatten(0, 1), head.weight, rows, codes, head.bias, mean_prediction=fallback,
            skip=config.vocabulary_skip, backend=config.backend,
        )  # fmt: skip
        return _terms(sums, sums.mean_prediction, batch)
    target, known = head.target(hidden.flatten(0, 1), codes)
    aimed = torch.where(known | (codes == RETAIN), codes, IGNORE)
    # Rows without a target have none in the alignment; their cross-entropy against ỹ is the fallback's affair.
    sums = rfa_head_loss(
        hidden.flatten(0, 1), head.weight, rows, codes, head.bias, lora_a=head.lora_a, lora_b=head.lora_b,
        scale=head.scale, mean_prediction=fallback, target=target, norm=config.norm, backend=config.backend,
    )  # fmt: skip
    if sums.retain_align is None or sums.forget_align is None:
        raise ValueError(f"layer {head.rfa_name!r}: the operator returned no loss for its group")
    forget = torch.where(known, sums.forget_align, 0)
    head.report(
        sums.retain_align, forget, codes, aimed, (codes.shape[0], head.weight.shape[0]),
        by_token=batch.tokens is not None,
    )  # fmt: skip
    return _terms(sums, sums.mean_prediction, batch)


def _terms(sums: TaskSums | HeadLoss, soft_label: Tensor, batch: Batch) -> TaskTerms:
    """Sums over the labelled rows, divided by how many there are in the batch, or in the whole it is a part of."""
    retain, forget = sums.retain_count, sums.forget_count
    if batch.whole is not None:
        retain, forget = batch.whole.labels[RETAIN], batch.whole.labels[FORGET]
    return TaskTerms(sums.retain / retain.clamp(min=1), sums.forget / forget.clamp(min=1), soft_label)


def labelled_rows(labels: Tensor, batch: Batch, model: nn.Module, context: GroupContext) -> Tensor:
    """How many labelled rows each group has in a batch: int64 `(2,)`, retain and forget.

    Example:
        >>> from rfa_fast.config import RFAConfig
        >>> batch = Batch(torch.tensor([0, 1, 1], dtype=torch.int8), None, False)
        >>> labelled_rows(torch.tensor([3, 4, -100]), batch, nn.Linear(2, 2), GroupContext(RFAConfig()))
        tensor([1, 1])
    """
    shift = _shifts(labels, model, context)
    rows, codes = _token_rows(labels, batch, shift) if labels.ndim == 2 else (labels, batch.samples)
    used = rows != IGNORED_LABEL
    return torch.stack([(used & (codes == RETAIN)).sum(), (used & (codes == FORGET)).sum()])


def _shifts(labels: Tensor, model: nn.Module, context: GroupContext) -> bool:
    """Whether a label belongs to the row before it."""
    asked = context.config.shift_labels
    return asked if asked is not None else labels.ndim == 2 and predicts_next_token(model)


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> object:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def logits_of(output: object) -> Tensor:
    """The logits of whatever a model returns: a tensor, `.logits`, `["logits"]`, or the first of a tuple.

    Raises:
        TypeError: none of these.

    Example:
        >>> logits_of((torch.zeros(2, 3), "more")).shape
        torch.Size([2, 3])
    """
    found: object = output
    if not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        if found is None and isinstance(output, tuple) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"model: got an output of {type(output).__name__}, expected logits: a tensor or an object with .logits; "
            + _ANOTHER_TASK
        )
    return found


@contextmanager
def standing_aside(head: nn.Linear) -> Iterator[list[tuple[Tensor, int | None]]]:
    """Let a head hand its input through, and note what it got and in which version (but not under torch.compile).

    Example:
        >>> head = nn.Linear(3, 5)
        >>> with standing_aside(head) as seen:
        ...     head(torch.zeros(1, 3)).shape
        torch.Size([1, 3])
    """
    captured: list[tuple[Tensor, int | None]] = []

    def pass_through(hidden: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            captured.append((hidden, version(hidden)))
        return hidden

    with in_front([head], [pass_through]):
        yield captured


def _token_rows(labels: Tensor, batch: Batch, shift: bool) -> tuple[Tensor, Tensor]:
    """Labels and codes per logit row; a label on an invalid token counts as −100."""
    codes = batch.tokens if batch.decoder is None else batch.decoder
    if codes is None:
        codes = batch.samples[:, None].expand(labels.shape)
    usable = without_padding(labels, codes >= RETAIN, shift=shift)
    if shift:
        usable = torch.cat([usable[:, 1:], torch.full_like(usable[:, :1], IGNORED_LABEL)], 1)
    return usable.flatten(), codes.flatten()


def _check_length(labels: Tensor, logits: Tensor) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])} to fit the "
            f"logits; {_ANOTHER_TASK}"
        )
