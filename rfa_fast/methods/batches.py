"""Where the batches of a run come from, addressed by step.

A resumed run has to see the batches it would have seen. From datasets that costs the last batch, drawn once
more: the order is a function of (seed, epoch), and the sampler starts anywhere. A DataLoader's order is its own:
it is drawn through again up to the step in question, under the same seeds. Either way the last batch is compared
with what the checkpoint remembers; data that changed, or a loader that does not repeat itself, is reported, not
trusted.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset

from rfa_fast.data.collate import collate, collate_mixed, collate_text
from rfa_fast.data.datasets import MixedDataset, ids_of, size_of
from rfa_fast.data.sampler import ForgetRetainBatchSampler, PerBatch
from rfa_fast.methods.base import Batch
from rfa_fast.methods.forget_pass import ForgetPass
from rfa_fast.methods.parts import Parts, parts
from rfa_fast.methods.seeding import derive_seed, seed_generators
from rfa_fast.objective import IGNORED_LABEL

Collate = Callable[[list[Any]], Any]
IMAGE_BATCH, TEXT_BATCH = 128, 32


class Drawn(NamedTuple):
    """A batch, where its loader put it, and the place in the data after it."""

    epoch: int
    epoch_step: int
    batch: Batch


class BatchSource(ABC):
    """Batches of retained and forget samples.

    Attributes:
        forget_ids: names of the samples to forget.
        retain_ids: of those to keep, `None` when they cannot be counted.
        steps_per_epoch: of a pass over the retained data; `None` when it cannot be known.
        forget_epochs: the epochs (from 0) that go over the samples to forget alone.
        settings: what the order depends on, JSON-safe.
        forget_pass: what is to be forgotten, once and in its own order, whatever the order of the batches.
    """

    forget_ids: list[str]
    retain_ids: list[str] | None
    steps_per_epoch: int | None
    forget_epochs: frozenset[int]
    settings: dict[str, Any]
    forget_pass: ForgetPass

    @abstractmethod
    def batches(
        self, epochs: int, step: int, epoch: int, epoch_step: int, last_batch: str | None
    ) -> Generator[Drawn, None, None]:
        """The batches that follow step `step`, which was number `epoch_step` of epoch `epoch`.

        Raises:
            ValueError: no batch, other data than in the run's first part, or a loader that does not repeat its order.
        """

    def total_steps(self, epochs: int) -> int | None:
        """Steps of so many epochs, `None` when it cannot be known."""
        alone = sum(epoch in self.forget_epochs for epoch in range(epochs))
        if self.steps_per_epoch is None:
            return None
        return alone * len(self.forget_pass) + (epochs - alone) * self.steps_per_epoch

    def fingerprint(self, batch: Batch) -> str:
        """SHA-256 over the tensors of a batch: a run that is resumed begins by drawing its last batch once more."""
        digest, inputs = hashlib.sha256(), batch.inputs
        named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        for name, value in sorted({**named, "labels": batch.labels}.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def example(self) -> Parts | None:
        """A batch of one sample, `None` when there is none to take without drawing from a loader."""
        return None


class DatasetSource(BatchSource):
    """Mixed batches of two map-style datasets."""

    def __init__(
        self,
        forget: Any,
        retain: Any,
        *,
        batch_size: int | None,
        forget_per_batch: PerBatch,
        collate_fn: Collate | None,
        pad_token_id: int,
        seed: int,
        device: torch.device,
        forget_epochs: frozenset[int] = frozenset(),
    ) -> None:
        for name, data in (("forget", forget), ("retain", retain)):
            if not size_of(data):
                raise ValueError(f"{name}: got a data set without samples, expected at least one")
        self.mixed = MixedDataset(retain, forget)
        self.forget_ids, self.retain_ids = ids_of(forget), ids_of(retain)
        _refuse_overlap(forget, retain, self.forget_ids, self.retain_ids)
        self._first = forget[0]
        text = isinstance(self._first, Mapping) and "input_ids" in self._first
        size = (TEXT_BATCH if text else IMAGE_BATCH) if batch_size is None else batch_size
        if collate_fn is None:
            padded = isinstance(self._first, Mapping) and {"input_ids", "attention_mask"} <= set(self._first)
            collate_fn = partial(collate_text, pad_token_id=pad_token_id) if padded else collate
        self._collate, self._seed, self._device = collate_fn, seed, device
        self.forget_pass = ForgetPass(forget, collate_fn, size, seed, device)
        self._sampler = ForgetRetainBatchSampler(
            len(self.forget_ids), len(self.retain_ids), size, forget_per_batch=forget_per_batch, seed=seed
        )
        self.steps_per_epoch = self._sampler.batches
        self.forget_epochs = forget_epochs
        self.settings = {"data": "datasets", "batch_size": size, "forget_per_batch": forget_per_batch}

    def batches(
        self, epochs: int, step: int, epoch: int, epoch_step: int, last_batch: str | None
    ) -> Generator[Drawn, None, None]:
        """See :meth:`BatchSource.batches`."""
        if last_batch is not None and epoch_step:
            self._check_last(next(iter(self._order(epoch, epoch_step - 1))), step, last_batch)
        for at in range(epoch, epochs):
            start = epoch_step if at == epoch else 0
            for number, indices in enumerate(self._order(at, start), start + 1):
                yield Drawn(at, number, self._batch(indices, step))
                step += 1

    def _check_last(self, indices: list[int], step: int, last_batch: str) -> None:
        """The last batch of the run's first part, drawn once more, is the same."""
        first = self.fingerprint(self._batch(indices, step - 1))
        if first == last_batch:
            return
        if first == self.fingerprint(self._batch(indices, step - 1)):
            raise ValueError(
                f"resume: the data sets gave another batch at step {step} than in the run; expected the same "
                "samples, read and tokenised as they were. Name another output_dir to begin a new run with these"
            )
        warnings.warn(
            "resume: the data sets give another batch whenever one is drawn, from a generator that torch, numpy.random "
            "and random do not seed; the run goes on, but may end differently from an uninterrupted one",
            stacklevel=2,
        )

    def _batch(self, indices: list[int], step: int) -> Batch:
        seed_generators(derive_seed(self._seed, "draw", step), self._device)
        inputs, labels, forget = collate_mixed([self.mixed[i] for i in indices], self._collate)
        return Batch(dict(inputs) if isinstance(inputs, Mapping) else inputs, labels, forget)

    def _order(self, epoch: int, start: int) -> Iterable[list[int]]:
        """Indices into the mixed data of an epoch's batches, from batch `start` on."""
        if epoch not in self.forget_epochs:
            self._sampler.set_epoch(epoch, start)
            return self._sampler
        first, count, size = len(self.mixed) - len(self.forget_ids), len(self.forget_ids), self._sampler.batch_size
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "forget epoch", epoch))
        order = (torch.randperm(count, generator=generator) + first).tolist()
        return [order[i : i + size] for i in range(start * size, count, size)]

    def example(self) -> Parts | None:
        """The first sample to forget."""
        return parts("collate_fn", self._collate([self._first]))


class LoaderSource(BatchSource):
    """A batch of each of two DataLoaders per step; the retain loader's end is the epoch's end.

    The forget loader is gone through again and again, without regard to epochs, so that a long one
    is seen to its end; an epoch over the samples to forget alone reads them beside it, in their own order. Shuffling
    loaders are seeded for the run, their own generators included.
    """

    def __init__(
        self,
        forget: DataLoader[Any],
        retain: DataLoader[Any],
        *,
        pad_token_id: int,
        seed: int,
        device: torch.device,
        forget_epochs: frozenset[int] = frozenset(),
    ) -> None:
        if forget.drop_last or getattr(forget.batch_sampler, "drop_last", False):
            raise ValueError(
                "forget: got a DataLoader with drop_last=True, which leaves samples out that the deletion record "
                "would list; expected drop_last=False"
            )
        if isinstance(forget.sampler, Sized) and not isinstance(forget.sampler, DistributedSampler):
            drawn, there = len(forget.sampler), len(forget.dataset) if isinstance(forget.dataset, Sized) else 0
            if drawn < there:
                raise ValueError(
                    f"forget: got a DataLoader whose sampler gives {drawn} of the {there} samples, all of which the "
                    "deletion record would list; expected all of them: give it a Subset of those to forget"
                )
        try:
            self.forget_ids = ids_of(forget.dataset)
        except TypeError as error:
            raise ValueError(
                "forget: got a DataLoader over a dataset without length; expected one whose samples can be named: "
                "give the dataset a length, or a sequence `ids` and a length"
            ) from error
        self.retain_ids = ids_of(retain.dataset) if hasattr(retain.dataset, "__len__") else None
        if self.retain_ids is not None:
            _refuse_overlap(forget.dataset, retain.dataset, self.forget_ids, self.retain_ids)
        self.steps_per_epoch = len(retain) if hasattr(retain.dataset, "__len__") else None
        self._forget, self._retain, self._pad = forget, retain, pad_token_id
        self._seed, self._device = seed, device
        self.forget_pass = ForgetPass.of_loader(forget, seed, device)
        self.forget_epochs = forget_epochs
        self.settings = {"data": "loaders", "batch_size": None, "forget_per_batch": None}

    def batches(
        self, epochs: int, step: int, epoch: int, epoch_step: int, last_batch: str | None
    ) -> Generator[Drawn, None, None]:
        """See :meth:`BatchSource.batches`."""
        with self._generators_restored():
            forget = self._forget_batches()
            at = step - epoch_step - len(self.forget_pass) * sum(past < epoch for past in self.forget_epochs)
            for past in range(at):
                self._seeded("forget", past)
                next(forget)
            for now in range(epoch, epochs):
                replayed = epoch_step if now == epoch else 0
                if now in self.forget_epochs:
                    for number, batch in enumerate(self.forget_pass, 1):
                        if number > replayed:
                            yield Drawn(now, number, batch)
                    continue
                retain, number = self._iterator(self._retain, "retain", now), 0
                while True:
                    self._seeded("retain", at)
                    kept = next(retain, None)
                    if kept is None:
                        break
                    self._seeded("forget", at)
                    batch = _joined(parts("retain", kept), parts("forget", next(forget)), self._pad)
                    at, number = at + 1, number + 1
                    if number > replayed:
                        yield Drawn(now, number, batch)
                    elif number == replayed and last_batch != self.fingerprint(batch):
                        raise ValueError(
                            f"resume: the loaders gave another batch at step {at} than in the run; expected the same "
                            "samples in the same order. Pass datasets, or a loader whose order depends on torch's seed"
                        )
                if number < max(replayed, 1):
                    raise ValueError(f"retain: the loader gave {number} batches, expected at least {max(replayed, 1)}")

    def _forget_batches(self) -> Iterator[Any]:
        lap = 0
        while True:
            given = 0
            for batch in self._iterator(self._forget, "forget", lap):
                given += 1
                yield batch
            if not given:
                raise ValueError("forget: the loader gave no batch, expected at least one")
            lap += 1

    def _iterator(self, loader: DataLoader[Any], role: str, lap: int) -> Iterator[Any]:
        for generator in _generators(loader):
            generator.manual_seed(derive_seed(self._seed, role, "lap", lap))
        for sampler in (loader.sampler, loader.batch_sampler):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(lap)
        seed_generators(derive_seed(self._seed, role, "lap", lap), self._device)
        yield from loader

    def _seeded(self, role: str, step: int) -> None:
        seed_generators(derive_seed(self._seed, "draw", role, step), self._device)

    @contextmanager
    def _generators_restored(self) -> Iterator[None]:
        own = [*_generators(self._forget), *_generators(self._retain)]
        states = [generator.get_state() for generator in own]
        try:
            yield
        finally:
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)


def open_source(
    forget: Any,
    retain: Any,
    *,
    batch_size: int | None,
    forget_per_batch: PerBatch,
    collate_fn: Collate | None,
    pad_token_id: int,
    seed: int,
    device: torch.device,
    forget_epochs: frozenset[int] = frozenset(),
) -> BatchSource:
    """The batches of two datasets, or of two loaders; those of `forget_epochs` hold samples to forget alone.

    Raises:
        TypeError: one of each, or neither.
        ValueError: an empty data set; samples that are in both; an option that a loader decides itself.
    """
    loaders = [isinstance(data, DataLoader) for data in (forget, retain)]
    if all(loaders):
        given = {"batch_size": batch_size is not None, "collate_fn": collate_fn is not None}
        given["forget_per_batch"] = forget_per_batch != "auto"
        if odd := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{', '.join(odd)}: got a value beside DataLoaders, expected none: they decide it")
        return LoaderSource(
            forget, retain, pad_token_id=pad_token_id, seed=seed, device=device, forget_epochs=forget_epochs
        )
    for name, data, is_loader in zip(("forget", "retain"), (forget, retain), loaders, strict=True):
        indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping | str)
        if any(loaders) or not indexed:
            got = "a DataLoader beside a dataset" if is_loader else type(data).__name__
            raise TypeError(f"{name}: got {got}, expected both sets as map-style datasets, or both as DataLoaders")
    return DatasetSource(
        forget, retain, batch_size=batch_size, forget_per_batch=forget_per_batch, collate_fn=collate_fn,
        pad_token_id=pad_token_id, seed=seed, device=device, forget_epochs=forget_epochs,
    )  # fmt: skip


def order_digest(ids: Sequence[str]) -> str:
    """SHA-256 over ids in their order.

    Example:
        >>> order_digest(["a", "b"]) == order_digest(["b", "a"])
        False
    """
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def _joined(retain: Parts, forget: Parts, pad: int) -> Batch:
    (kept, kept_labels), (gone, gone_labels) = retain, forget
    mask = torch.cat([torch.zeros(len(kept_labels), dtype=torch.bool), torch.ones(len(gone_labels), dtype=torch.bool)])
    if isinstance(kept, Mapping) and isinstance(gone, Mapping) and set(kept) == set(gone):
        inputs: Tensor | dict[str, Tensor] = {k: torch.cat(_aligned(k, kept, gone, pad)) for k in kept}
        labels = torch.cat(_aligned("labels", {**kept, "labels": kept_labels}, {**gone, "labels": gone_labels}, pad))
        return Batch(inputs, labels, mask)
    if isinstance(kept, Tensor) and isinstance(gone, Tensor) and kept.shape[1:] == gone.shape[1:]:
        return Batch(torch.cat([kept, gone]), torch.cat([kept_labels, gone_labels]), mask)
    shown = [sorted(x) if isinstance(x, Mapping) else tuple(x.shape) for x in (kept, gone)]
    raise ValueError(f"forget: the loader gave inputs {shown[1]}, expected those of retain, {shown[0]}")


def _aligned(key: str, kept: Mapping[str, Tensor], gone: Mapping[str, Tensor], pad: int) -> list[Tensor]:
    """Two tensors of one key, the shorter token axis padded, on the left where the batch is padded there."""
    a, b = kept[key], gone[key]
    if a.shape[1:] == b.shape[1:]:
        return [a, b]
    lengths = [x["input_ids"].shape[1] if "input_ids" in x else -1 for x in (kept, gone)]
    if "attention_mask" not in kept or [a.shape[1:], b.shape[1:]] != [torch.Size([n]) for n in lengths]:
        raise ValueError(
            f"{key}: got {tuple(a.shape)} from retain and {tuple(b.shape)} from forget, expected one length, or "
            "(B, T) tensors with an attention_mask to pad them"
        )
    fill = {"input_ids": pad, "labels": IGNORED_LABEL}.get(key, 0)
    left = any(not bool(x["attention_mask"][:, 0].all()) for x in (kept, gone))
    width = max(lengths)
    sides = [((width - n, 0) if left else (0, width - n)) for n in lengths]
    return [F.pad(x, side, value=fill) for x, side in zip((a, b), sides, strict=True)]


def _refuse_overlap(forget: Any, retain: Any, forget_ids: list[str], retain_ids: list[str]) -> None:
    """Ids can be compared when both sets are views of one dataset; positions of two datasets cannot."""
    if _root(forget) is not _root(retain):
        return
    both = sorted(set(forget_ids) & set(retain_ids))
    if both:
        shown = ", ".join(both[:5]) + (", …" if len(both) > 5 else "")
        raise ValueError(f"retain: got {len(both)} samples that are in forget too ({shown}), expected none")


def _root(dataset: Any) -> Any:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    owners = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
