"""Plain supervised training: the Original, and Retrain, the gold standard of unlearning.

Retrain is the model trained from scratch on the retained data alone; what unlearning aims at is to
behave like it. Both come from one function, so that they differ in their data and in nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from rfa_fast.data.collate import collate, collate_text
from rfa_fast.data.datasets import size_of
from rfa_fast.forwards import running_statistics
from rfa_fast.head import is_encoder_decoder, predicts_next_token
from rfa_fast.methods import checks
from rfa_fast.methods.base import NonFiniteError, StepRecord
from rfa_fast.methods.batches import IMAGE_BATCH, TEXT_BATCH
from rfa_fast.methods.buffers import Buffers
from rfa_fast.methods.loop import gradient_norm
from rfa_fast.methods.parts import Parts, parts
from rfa_fast.methods.progress import ProgressReport
from rfa_fast.methods.schedule import Schedule, check_schedule, learning_rates, steps_in_all
from rfa_fast.methods.seeding import derive_seed, isolated_generators, seed_generators
from rfa_fast.names import some
from rfa_fast.objective import IGNORED_LABEL
from rfa_fast.padding import real_labels


@dataclass
class TrainResult:
    """What :func:`train` returns.

    Attributes:
        model: the model given, trained in place; its train flags are as before.
        history: one record per step: `step`, `epoch`, `total`, `grad_norm`, `lr`, `samples`, `seconds`.
        seconds: time spent in steps.
    """

    model: nn.Module
    history: list[StepRecord]
    seconds: float


def train(
    model: nn.Module,
    dataset: Any,
    *,
    epochs: int = 1,
    batch_size: int | None = None,
    lr: float = 5e-5,
    weight_decay: float = 0.01,
    warmup_steps: int = 0,
    schedule: Schedule = "constant",
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    max_steps: int | None = None,
    max_grad_norm: float | None = None,
    autocast: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    callbacks: Iterable[Callable[[StepRecord], object]] = (),
    progress: bool = True,
    label: str = "train",
) -> TrainResult:
    """Train a model on labelled data with AdamW, in place.

    The paper's recipes (section V-A6): ResNet18 20 epochs with 500 warm-up steps, ViT 10 with 250, AdamW 5e-5.

    Args:
        model: in train mode while it learns, its train flags put back afterwards. A transformers model
            that returns a `loss` for its `labels` is trained on that; any other on the cross-entropy
            of its logits `(B, C)`.
        dataset: a map-style dataset of `(input, label)` or of dicts with `labels`, or a DataLoader.
        epochs: passes over it.
        batch_size: at most that many samples per batch (128, for text 32). A last batch would be smaller
            than the others, down to one sample, for which BatchNorm has no variance; so an epoch is
            cut into equal batches, give or take one sample, and no sample is left out.
        lr, weight_decay: of AdamW.
        warmup_steps: steps in which the rate rises linearly from 0 to `lr`.
        schedule: afterwards `"constant"`, or falling to 0 behind the last step, linearly or as a cosine.
        seed: of order, augmentation and dropout; the caller's random generators are left as they were. A DataLoader's
            own `generator` is the caller's: it gives its order and moves on; a sampler with `set_epoch` is told each
            further epoch, counted from its own.
        collate_fn: makes a batch of items; by default tensors are stacked and texts padded.
        max_steps: stop after that many steps.
        max_grad_norm: clip the gradient to this norm.
        autocast: `torch.bfloat16`, or its name, computes in it where autocast does.
        device: move the model there first.
        callbacks: each is called with every step's record.
        progress: show loss, rate and remaining time on standard error, under the name `label`.

    Raises:
        ValueError, TypeError: something given is wrong.
        NonFiniteError: a loss or gradient is NaN or infinite; weights and buffers are those of the step before.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(64, 2)
        >>> net = nn.Linear(2, 2)
        >>> result = train(net, TensorDataset(x, (x[:, 0] > 0).long()), epochs=20, lr=0.1, progress=False)
        >>> result.history[-1]["total"] < result.history[0]["total"]
        True
    """
    checks.positive_integers(epochs=epochs, batch_size=batch_size, max_steps=max_steps)
    checks.numbers(lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed)
    autocast = checks.autocast_dtype(autocast)
    calls = checks.callables(callbacks)
    check_schedule(schedule, warmup_steps=warmup_steps)
    place = checks.device_of(model, device)
    with isolated_generators(place):
        data = _Epochs(dataset, batch_size, collate_fn, checks.pad_token_id(model), seed, place)
        total = steps_in_all(None if data.steps is None else data.steps * epochs, max_steps)
        rate = learning_rates(lr, schedule, warmup_steps=warmup_steps, total=total)
        example = data.example()
        classes = checks.class_count(model, example)
        checks.dataset_labels(dataset, dataset, example, classes, forget_too=False)
        if device is not None:
            model.to(place)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("model: got one whose parameters are all frozen, expected some with requires_grad")
        loop = _Steps(model, trainable, torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay), rate, place)
        modes = [(module, module.training) for module in model.modules()]
        model.train()
        try:
            with ProgressReport(label, total, enabled=progress) as report:
                for epoch, (inputs, labels) in data.batches(epochs, max_steps):
                    record = loop.step(epoch, inputs, labels, max_grad_norm, autocast)
                    report.step(record["step"], loss=record["total"], samples=record["samples"])
                    for callback in calls:
                        callback(dict(record))
                    loop.begun = time.perf_counter()
        finally:
            for module, training in modes:
                module.training = training
    if not loop.history:
        raise ValueError("dataset: got no batch, expected at least one")
    return TrainResult(model, loop.history, loop.seconds)


class _Steps:
    """Optimizer steps, one after the other, and what they took."""

    def __init__(
        self,
        model: nn.Module,
        trainable: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        device: torch.device,
    ) -> None:
        self.model, self.trainable, self.optimizer = model, trainable, optimizer
        self.rate, self.device = rate, device
        self.buffers = Buffers(model, [name for name, _ in model.named_buffers()])
        self.history: list[StepRecord] = []
        self.begun, self.seconds = time.perf_counter(), 0.0

    def step(
        self,
        epoch: int,
        inputs: Tensor | dict[str, Tensor],
        labels: Tensor,
        max_norm: float | None,
        autocast: torch.dtype | None,
    ) -> StepRecord:
        """One step.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
        """
        number = len(self.history) + 1
        lr = self.rate(number - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        before = {name: buffer.clone() for name, buffer in self.buffers.live().items()}
        try:
            total, grad_norm = self._gradient(inputs, labels, autocast)
            _check_finite(total, grad_norm, self.model, self.trainable, number, self.history)
        except BaseException:  # the forward has moved the statistics of batch norms
            self.buffers.restore(before)
            self.optimizer.zero_grad(set_to_none=True)
            raise
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.trainable, max_norm)
        self.optimizer.step()
        self.seconds += time.perf_counter() - self.begun
        record: StepRecord = {"step": number, "epoch": epoch + 1, "total": total, "grad_norm": grad_norm, "lr": lr}
        record |= {"samples": len(labels), "seconds": round(self.seconds, 6)}
        self.history.append(record)
        return record

    def _gradient(
        self, inputs: Tensor | dict[str, Tensor], labels: Tensor, autocast: torch.dtype | None
    ) -> tuple[float, float]:
        """The loss, and the norm of its gradient, which is in the parameters."""
        alone = running_statistics(self.model) if len(labels) == 1 else nullcontext()
        with alone, nullcontext() if autocast is None else torch.autocast(self.device.type, autocast):
            loss = _loss(self.model, inputs, labels, self.device)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = gradient_norm(self.trainable)
        total, grad_norm = torch.stack([loss.detach().float(), norm.to(loss.device)]).tolist()
        return total, grad_norm


class _Epochs:
    """Batches of a dataset or a loader, epoch after epoch."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None,
        collate_fn: Callable[[list[Any]], Any] | None,
        pad: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.seed, self.device, self.loader = seed, device, dataset if isinstance(dataset, DataLoader) else None
        self.dataset = dataset
        if self.loader is not None:
            if batch_size is not None or collate_fn is not None:
                raise ValueError("batch_size, collate_fn: got a value beside a DataLoader, which decides it")
            self.steps = len(self.loader) if hasattr(self.loader.dataset, "__len__") else None
            both: tuple[Any, ...] = (self.loader.sampler, self.loader.batch_sampler)
            self.samplers = [(s, getattr(s, "epoch", 0)) for s in both if callable(getattr(s, "set_epoch", None))]
            return
        if not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping | str):
            raise TypeError(f"dataset: got {type(dataset).__name__}, expected a map-style dataset or a DataLoader")
        self.size = size_of(dataset)
        if not self.size:
            raise ValueError("dataset: got one without samples, expected at least one")
        first = dataset[0]
        text = isinstance(first, Mapping) and "input_ids" in first
        padded = text and "attention_mask" in first
        self.collate = collate_fn or (partial(collate_text, pad_token_id=pad) if padded else collate)
        self.steps = math.ceil(self.size / (batch_size or (TEXT_BATCH if text else IMAGE_BATCH)))

    def example(self) -> Parts | None:
        """A batch of one sample; of a loader none, because taking it would draw from it."""
        return None if self.loader is not None else parts("collate_fn", self.collate([self.dataset[0]]))

    def batches(self, epochs: int, max_steps: int | None) -> Iterator[tuple[int, Parts]]:
        """`(epoch, (inputs, labels))`, each drawn under a seed of its step."""
        step = 0
        for epoch in range(epochs):
            seed_generators(derive_seed(self.seed, "epoch", epoch), self.device)
            batches = self._of_epoch(epoch)
            while True:
                if max_steps is not None and step >= max_steps:
                    return
                seed_generators(derive_seed(self.seed, "step", step), self.device)
                batch = next(batches, None)
                if batch is None:
                    break
                yield epoch, parts("dataset", batch)
                step += 1

    def _of_epoch(self, epoch: int) -> Iterator[Any]:
        if self.loader is not None:
            for sampler, begun in self.samplers if epoch else ():
                sampler.set_epoch(begun + epoch)
            yield from self.loader
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        order = torch.randperm(self.size, generator=generator)
        for indices in torch.tensor_split(order, self.steps or 1):
            yield self.collate([self.dataset[i] for i in indices.tolist()])


def _loss(model: nn.Module, inputs: Tensor | dict[str, Tensor], labels: Tensor, device: torch.device) -> Tensor:
    shift = predicts_next_token(model) and labels.ndim == 2
    given = labels = real_labels(inputs, labels, shift=shift, encoder_decoder=is_encoder_decoder(model))
    counted = bool((given[:, 1:] if shift else given).ne(IGNORED_LABEL).any())
    labels = labels.to(device)
    if isinstance(inputs, Mapping):
        moved = {k: v.to(device) for k, v in inputs.items()}
        # A wrapper's parts may each have a loss: the one of all of them is taken from what it gathers.
        if hasattr(model, "config"):
            output = model(**moved, labels=labels)
            loss = getattr(output, "loss", None)
            if isinstance(loss, Tensor) and counted:
                return loss
        else:
            output = model(**moved)
    else:
        output = model(inputs.to(device))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != labels.ndim + 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"model: got an output of {got} for labels {tuple(labels.shape)}, expected logits (B, C)")
    if given.device.type == "cpu":
        wrong = given[(given != IGNORED_LABEL) & ((given < 0) | (given >= logits.shape[-1]))]
        if len(wrong):
            raise ValueError(f"labels: got {int(wrong[0])}, expected 0 to {logits.shape[-1] - 1}, or {IGNORED_LABEL}")
    if not counted:  # the mean over nothing is 0/0
        return 0 * logits.float().sum()
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED_LABEL)


def _check_finite(
    total: float, norm: float, model: nn.Module, trainable: list[nn.Parameter], step: int, history: list[StepRecord]
) -> None:
    if math.isfinite(total) and math.isfinite(norm):
        return
    own = {id(parameter) for parameter in trainable}
    named = ((n, p.grad) for n, p in model.named_parameters() if id(p) in own)
    bad = [n for n, grad in named if grad is not None and not bool(torch.isfinite(grad).all())]
    what = f"gradient norm {norm}" if math.isfinite(total) else f"loss {total}"
    raise NonFiniteError(
        f"step {step}: {what}, expected a finite number; gradients that are not: {some(bad) or 'none'}; "
        "the weights are those of the step before",
        step=step, layers=bad, history=history,
    )  # fmt: skip
