"""What can be known to be wrong before a run begins.

A wrong label found at step 3,000 has cost an hour, so labels are looked at first, where the data set
shows them; and the number of classes is asked of the model with a single sample, because a plain
module has no place where it is written down.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from rfa_fast.methods.base import Batch
from rfa_fast.metrics.passes import eval_mode, evaluating
from rfa_fast.names import unwrapped
from rfa_fast.objective import IGNORED_LABEL
from rfa_fast.targets import output_embeddings


def positive_integers(**values: int | None) -> None:
    """Each must be an integer >= 1, or `None` where that means "not given".

    Raises:
        TypeError, ValueError: it is not.

    Example:
        >>> positive_integers(epochs=0)
        Traceback (most recent call last):
        ...
        ValueError: epochs: got 0, expected an integer >= 1
    """
    for name, value in values.items():
        if value is None and name != "epochs":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an integer >= 1")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected an integer >= 1")


def numbers(*, lr: float, weight_decay: float, max_grad_norm: float | None, seed: int) -> None:
    """Ranges of the optimizer's numbers and of the seed.

    Raises:
        TypeError, ValueError: out of range.

    Example:
        >>> numbers(lr=-1, weight_decay=0.01, max_grad_norm=None, seed=0)
        Traceback (most recent call last):
        ...
        ValueError: lr: got -1, expected a finite number > 0
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm)):
        if value is None and name == "max_grad_norm":
            continue
        zero = name == "weight_decay"
        bound = ">= 0" if zero else "> 0"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: got {value!r}, expected a finite number {bound}")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError(f"{name}: got {value!r}, expected a finite number {bound}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {seed!r}, expected an integer")


def autocast_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, or the one of this name. Only bfloat16: float16 underflows without a loss scale.

    Raises:
        ValueError: another dtype.

    Example:
        >>> autocast_dtype("bfloat16")
        torch.bfloat16
    """
    if dtype in (None, torch.bfloat16, "bfloat16"):
        return None if dtype is None else torch.bfloat16
    raise ValueError(
        f"autocast: got {dtype!r}, expected torch.bfloat16 or None; gradients in float16 need a loss scale, which "
        "this loop has not"
    )


def callables(
    callbacks: Iterable[Callable[[dict[str, Any]], object]], **single: Callable[..., object] | None
) -> tuple[Callable[[dict[str, Any]], object], ...]:
    """The callbacks as a tuple.

    Raises:
        TypeError: one of them, or of `single`, cannot be called.
    """
    for name, value in single.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a callable or None")
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks: got {type(callbacks).__name__}, expected a list of callables")
    out = tuple(callbacks)
    for callback in out:
        if not callable(callback):
            raise TypeError(f"callbacks: got {type(callback).__name__} among them, expected callables")
    return out


def device_of(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device of the run: the one asked for, else that of the model's first parameter.

    Raises:
        ValueError: a model without parameters, or no such device.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("model: got one without parameters, expected something that can be unlearnt from")
    if device is None:
        return first.device
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {device!r}, which cannot be used here ({error})") from error
    if found.type == "meta":
        raise ValueError(f"device: got {device!r}, which holds no values, expected one to compute on")
    return found


def pad_token_id(model: nn.Module) -> int:
    """The model's own padding token, 0 when it names none; padded places are masked whatever it is."""
    value = getattr(getattr(unwrapped(model), "config", None), "pad_token_id", None)
    return value if isinstance(value, int) else 0


def class_count(model: nn.Module, example: tuple[Any, Tensor] | None) -> int | None:
    """Number of classes that a label may name; `None` when it cannot be known before the first batch.

    A transformers model has it in its configuration, or in the size of its language-model head.
    Another model is shown the example, in eval mode and without gradients.

    Args:
        model: the model.
        example: inputs and labels of a batch of one, `None` when there is none.

    Example:
        >>> class_count(nn.Linear(4, 3), (torch.zeros(1, 4), torch.zeros(1)))
        3
    """
    if example is None:
        return None
    inputs, labels = example
    config = getattr(unwrapped(model), "config", None)
    if config is not None:
        weight = getattr(output_embeddings(model), "weight", None) if labels.ndim > 1 else None
        value = weight.shape[0] if isinstance(weight, Tensor) else getattr(config, "num_labels", None)
        if isinstance(value, int):
            return value
    if labels.ndim != 1 or not isinstance(inputs, Tensor):
        return None
    with evaluating(model):
        output = model(inputs.to(next(model.parameters()).device))
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def dataset_labels(
    forget: Any, retain: Any, example: tuple[Any, Tensor] | None, classes: int | None, *, forget_too: bool
) -> None:
    """Every class label that the data sets show must name a class.

    Args:
        forget, retain: data sets with `labels` (or torchvision's `targets`), or `Subset`s of such.
        example: inputs and labels of a batch of one; labels per token make `.labels` mean something else.
        classes: their number; `None` checks nothing.
        forget_too: whether the method reads the labels of what it forgets.

    Raises:
        ValueError: a label out of range, with its position.
    """
    if classes is None or example is None or example[1].ndim != 1:
        return
    for name, data in (("retain", retain), *((("forget", forget),) if forget_too else ())):
        values = _labels_of(data)
        for position, label in enumerate(values or ()):
            if label != IGNORED_LABEL and not 0 <= label < classes:
                raise ValueError(
                    f"{name}: got label {label} at position {position}, expected 0 to {classes - 1}, the model's "
                    f"classes, or {IGNORED_LABEL} to leave a sample out of the task loss"
                )


def batch_labels(batch: Batch, classes: int | None, step: int, *, forget_too: bool) -> None:
    """The same for one batch, before it leaves the CPU.

    Raises:
        ValueError: a label out of range.
    """
    if classes is None or batch.labels.device.type != "cpu" or not batch.labels.numel():
        return
    labels = batch.labels if forget_too else batch.labels[~batch.forget]
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"labels: got {int(wrong[0])} at step {step}, expected 0 to {classes - 1}, the model's classes, or "
            f"{IGNORED_LABEL}"
        )


def figures(evaluate: Callable[[nn.Module], Mapping[str, float]], model: nn.Module) -> dict[str, float]:
    """What `evaluate` says of the model in eval mode; its train flags are as before afterwards.

    Raises:
        TypeError: it returns something else than named numbers.
    """
    with eval_mode(model):
        found = evaluate(model)
    if not isinstance(found, Mapping):
        raise TypeError(f"evaluate: got {type(found).__name__} from it, expected a mapping of names to numbers")
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate: got {dict(found)!r} from it, expected a mapping of names to numbers") from error


def add_note(error: BaseException, text: str) -> None:
    """Add a line to an error's traceback, where Python has the means (3.11 and later)."""
    if sys.version_info >= (3, 11):
        error.add_note(text)


def _labels_of(data: Any) -> Sequence[int] | None:
    """Class labels of a data set where it shows them (`labels`, torchvision's `targets`), seen through `Subset`."""
    if isinstance(data, Subset):
        parent = _labels_of(data.dataset)
        return None if parent is None else [parent[index] for index in data.indices]
    found = getattr(data, "labels", None)
    found = getattr(data, "targets", None) if found is None else found
    if isinstance(found, Tensor):
        found = found.tolist()
    if not isinstance(found, Sequence) or not all(isinstance(label, int) for label in found):
        return None
    return found
