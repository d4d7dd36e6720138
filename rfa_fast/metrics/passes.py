"""One read-only pass of a model over a loader: the part that every metric shares.

A metric must leave no trace in the model it measures. So the train flag of every module is put back
one by one (a frozen BatchNorm inside a training model stays frozen), and gradients are off through
`no_grad` rather than `inference_mode`: a module that caches a tensor during an inference-mode pass
(rotary tables, say) could not be trained afterwards. The price of `no_grad` is a few version
counters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from rfa_fast.head import logits_of, predicts_next_token
from rfa_fast.objective import IGNORED_LABEL
from rfa_fast.padding import real_labels

Loader: TypeAlias = Iterable[Any]
Progress: TypeAlias = Callable[[int, int], None]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        index: position in the loader, from 0; error messages name it.
        inputs: a tensor, or the keyword arguments of the model without `labels`.
        labels: integers `(B,)` or `(B, T)`, on the CPU; padding is already −100.
        mask: bool `(B, T)` on the CPU, where the attention mask is set; `None` without one.
    """

    index: int
    inputs: Tensor | dict[str, Any]
    labels: Tensor
    mask: Tensor | None


class Observer(Protocol):
    """What may look on while :func:`~rfa_fast.metrics.predictions.predict` runs a model over a loader."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """Further models that it runs; put in eval mode with the first."""

    def layers(self) -> Sequence[str]:
        """Modules of the model whose outputs it wants of the next batch."""

    def see(self, batch: Batch, logits: Tensor, features: dict[str, list[Tensor]], shift: bool) -> None:
        """One batch: the model's logits, and the outputs of those modules, one tensor per call."""


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own train flag is restored, also after an error.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
        >>> with eval_mode(model):
        ...     model[0].training
        False
        >>> model[0].training
        True
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, as :func:`eval_mode`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with evaluating(model):
        ...     model.training, torch.is_grad_enabled()
        (False, False)
    """
    with eval_mode(*models), torch.no_grad():
        yield


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter, else of its first buffer, else the CPU.

    Example:
        >>> device_of(nn.ReLU())
        device(type='cpu')
    """
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def batches(
    loader: Loader, progress: Progress | None = None, *, shift: bool = False, encoder_decoder: bool = False
) -> Iterator[Batch]:
    """The loader's batches in one form, still on the CPU; see :func:`forward` for the move.

    Args:
        loader: yields `(inputs, labels)`, inputs a tensor or a keyword dict, or dicts with `labels`.
        progress: called with (batches done, batches in all) after each; 0 in all when unknown.
        shift: see :func:`shifts_labels`; then a text's first token behind padding has no label either.
        encoder_decoder: labels are of another text than the attention mask.

    Raises:
        ValueError: the loader yields nothing.
        TypeError: a batch of another form, or labels that are not integers.

    Example:
        >>> [batch.labels.tolist() for batch in batches([(torch.zeros(2, 3), torch.tensor([0, 1]))])]
        [[0, 1]]
    """
    total = length(loader)
    index = -1
    for index, item in enumerate(loader):
        yield _batch(index, item, shift=shift, encoder_decoder=encoder_decoder)
        if progress is not None:
            progress(index + 1, total)
    if index < 0:
        raise ValueError("loader: got no batch, expected at least one; check the subset that it reads is not empty")


def length(loader: Loader) -> int:
    """Number of batches, 0 where the loader does not know.

    Example:
        >>> length([1, 2]), length(x for x in [1, 2])
        (2, 0)
    """
    return operator.length_hint(loader, 0)


def forward(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The model's logits of one batch; see :func:`rfa_fast.head.logits_of`.

    Raises:
        TypeError: the model returns none.
        ValueError: shapes or label values that do not fit the logits.

    Example:
        >>> batch = next(batches([(torch.ones(2, 3), torch.tensor([0, 1]))]))
        >>> forward(nn.Linear(3, 5), batch, torch.device("cpu")).shape
        torch.Size([2, 5])
    """
    logits = logits_of(run(model, batch, device))
    _check_labels(batch, logits)
    return logits


def run(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """The model's raw output on one batch, moved to `device`.

    Example:
        >>> batch = next(batches([(torch.ones(2, 3), torch.tensor([0, 1]))]))
        >>> run(nn.Identity(), batch, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    if isinstance(batch.inputs, Tensor):
        return model(batch.inputs.to(device))
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.inputs.items()})


def shifts_labels(model: nn.Module, option: bool | None) -> bool:
    """Whether position t predicts the label of t + 1, for labels `(B, T)`; `None` decides as training does.

    Example:
        >>> shifts_labels(nn.Linear(1, 1), None), shifts_labels(nn.Linear(1, 1), True)
        (False, True)
    """
    return predicts_next_token(model) if option is None else option


def labelled_rows(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What is to be predicted, as rows.

    Args:
        logits: `(B, C)` or `(B, T, V)`.
        labels: `(B,)` or `(B, T)`, on the CPU.
        shift: see :func:`shifts_labels`; unread for `(B,)`.

    Returns:
        Logits `(rows, C)` in their own dtype, labels `(rows,)` and item `(rows,)`, both on the CPU. A
        classification has one row per item, labelled or not; a text one row per labelled token.

    Example:
        >>> logits, labels, item = labelled_rows(torch.zeros(1, 3, 7), torch.tensor([[4, -100, 6]]), shift=True)
        >>> logits.shape, labels.tolist(), item.tolist()
        (torch.Size([1, 7]), [6], [0])
    """
    if labels.ndim == 1:
        return logits, labels, torch.arange(len(labels))
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    item, position = torch.nonzero(labels != IGNORED_LABEL, as_tuple=True)
    return logits[item.to(logits.device), position.to(logits.device)], labels[item, position], item


@contextmanager
def named_subset(name: str) -> Iterator[None]:
    """Put a subset's name in front of an error raised while it is measured.

    Example:
        >>> with named_subset("D_f"):
        ...     raise ValueError("loader: got no batch")
        Traceback (most recent call last):
        ...
        ValueError: D_f: loader: got no batch
    """
    try:
        yield
    except (ValueError, TypeError, FloatingPointError) as error:
        # A subclass may want other arguments (UnicodeDecodeError takes five): raise the plain kind.
        kind = next(kind for kind in (FloatingPointError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"{name}: {error}") from error


@contextmanager
def captured(model: nn.Module, names: Iterable[str], store: dict[str, list[Tensor]]) -> Iterator[None]:
    """Append the named modules' outputs to `store[name]`, one tensor per call; hooks go away also after an error.

    Example:
        >>> model, seen = nn.Sequential(nn.Linear(2, 3)), {"0": []}
        >>> with captured(model, ["0"], seen):
        ...     _ = model(torch.ones(1, 2))
        >>> seen["0"][0].shape, len(model[0]._forward_hooks)
        (torch.Size([1, 3]), 0)
    """
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(_recorder(name, store[name]))
            stack.callback(handle.remove)
        yield


def _recorder(name: str, calls: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
    def record(module: nn.Module, args: object, output: object) -> None:
        # Transformer blocks return a tuple whose first element is the hidden state.
        value = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(value, Tensor):
            raise TypeError(f"names: {name!r} returned {type(output).__name__}, expected a tensor or a tuple of them")
        calls.append(value.detach().clone())  # the next module may write into it

    return record


def _batch(index: int, item: Any, **which: bool) -> Batch:
    inputs: Any
    if isinstance(item, Mapping):
        if "labels" not in item:
            raise TypeError(f"loader: batch {index} is a dict with keys {sorted(item)}, expected `labels` among them")
        inputs, labels = {k: v for k, v in item.items() if k != "labels"}, item["labels"]
    elif isinstance(item, tuple | list) and len(item) == 2:
        inputs, labels = item
    else:
        kind = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
        raise TypeError(f"loader: batch {index} is a {kind}, expected (inputs, labels) or a dict with `labels`")
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    elif not isinstance(inputs, Tensor):
        raise TypeError(f"loader: inputs of batch {index} are {type(inputs).__name__}, expected a tensor or a dict")
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: batch {index} has {got}, expected a tensor of class or token indices")
    labels = labels.detach().cpu().long()
    if labels.ndim not in (1, 2) or len(labels) == 0:
        raise ValueError(f"labels: batch {index} has shape {tuple(labels.shape)}, expected (B,) or (B, T), B >= 1")
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    mask = mask.detach().cpu() != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return Batch(index, inputs, real_labels(inputs, labels, **which), mask)


def _check_labels(batch: Batch, logits: Tensor) -> None:
    labels, where = batch.labels, f"labels: batch {batch.index}"
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{where} has shape {tuple(labels.shape)} against logits {tuple(logits.shape)}, "
            "expected (B,) against (B, C) or (B, T) against (B, T, V)"
        )
    classes = logits.shape[-1]
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"{where} has label {int(wrong[0])}, expected 0 to {classes - 1} (the model has {classes} outputs) "
            f"or {IGNORED_LABEL} for none"
        )
