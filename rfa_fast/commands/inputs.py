"""From what was typed to a model and the four subsets it is measured on.

The model decides how the data is shown to it: a causal language model gets tokens with a label each, a
network whose first convolution takes three channels gets grey images as three, a classifier that
knows its classes by name gets the data's labels in its own order. Each such adjustment is kept as a
note and printed; none changes which samples there are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from rfa_fast.commands.texts import cut_notes, tokens_of
from rfa_fast.data import (
    DataBundle,
    ImageDataset,
    Split,
    collate,
    collate_text,
    ids_of,
    load,
    split_by_class,
    split_by_keyword,
    split_by_sample,
)
from rfa_fast.data.sources import read_text
from rfa_fast.experiments.common import thinned
from rfa_fast.experiments.comparison import json_or_text
from rfa_fast.methods import checks
from rfa_fast.metrics import predict
from rfa_fast.models import OpenedModel, open_model

IMAGE_BATCH, TEXT_BATCH = 256, 32
_WITH_TEST = (".jsonl", ".csv")  # read by loaders with the option test


@dataclass(frozen=True)
class ModelRequest:
    """Which model, and where it is to be."""

    name: str
    weights: Path | None = None
    tokenizer: Path | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    device: str | None = None

    def open(self, classes: int | None) -> OpenedModel:
        """The model, on its device.

        Raises:
            ValueError: a torchvision model without weights, which knows nothing that it could forget; and what
                :func:`rfa_fast.models.open_model` raises.
        """
        if self.name.startswith("torchvision:") and self.weights is None:
            raise ValueError(f"{self.name}: got no weights, expected --weights FILE.safetensors of the trained model")
        opened = open_model(
            self.name, weights=self.weights, classes=classes, tokenizer=self.tokenizer, dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
        if self.device is not None:
            opened.model.to(checks.device_of(opened.model, self.device))
        return opened

    def open_other(self, name: str, classes: int | None) -> OpenedModel:
        """Another model to compare with: weights or an adapter for this one's architecture, or a model of its own."""
        path = Path(name)
        if path.suffix == ".safetensors":
            return replace(self, weights=path).open(classes)
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            from rfa_fast.adapters import load as load_adapter

            opened = self.open(classes)
            load_adapter(opened.model, path)
            return opened
        alone = path / "model.safetensors"  # as unlearn writes a model that has no configuration
        if alone.is_file() and not (path / "config.json").is_file():
            return replace(self, weights=alone).open(classes)
        return replace(self, name=name, weights=None).open(classes)


@dataclass(frozen=True)
class ForgetRequest:
    """What is to be forgotten; exactly one field besides `seed`."""

    forget_class: str | None = None
    forget_samples: int | None = None
    forget_keyword: str | None = None
    forget_ids: Path | None = None
    split: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError unless exactly one thing is asked for."""
        named = {
            "--forget-class": self.forget_class, "--forget-samples": self.forget_samples,
            "--forget-keyword": self.forget_keyword, "--forget-ids": self.forget_ids, "--split": self.split,
        }  # fmt: skip
        given = [name for name, value in named.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'nothing to forget'}, expected one of {', '.join(named)}")

    def make(self, data: DataBundle) -> Split:
        """The split of this data.

        Raises:
            ValueError: an unknown class, a number out of range, a word that no text has, unknown ids, a
                split of other data.
            FileNotFoundError: no such file.
        """
        self.check()
        digest = data.digest()
        return replace(self._made(data, digest), data=digest)

    def _made(self, data: DataBundle, digest: str) -> Split:
        if self.forget_class is not None:
            return split_by_class(data.train.labels, data.test.labels, self.forget_class, data.classes)
        if self.forget_samples is not None:
            return split_by_sample(len(data.train), len(data.test), self.forget_samples, self.seed)
        if self.forget_keyword is not None:
            if data.kind != "text":
                raise ValueError(f"--forget-keyword: got {data.name}, a set of images; expected one of texts")
            return split_by_keyword(data.train.texts, data.test.texts, self.forget_keyword)
        if self.forget_ids is not None:
            return _split_by_ids(data, self.forget_ids)
        split = Split.load(_existing(self.split, "--split"))
        split.apply(data.train, data.test)
        if split.data not in (None, digest):
            raise ValueError(
                f"--split: {self.split} was made of other samples than those of {data.name} are now, in names, "
                "classes, texts or order; expected the same data with the same --data-option, or make a new split "
                "of these"
            )
        return split


def title_of(split: Split, data: DataBundle) -> str:
    """The heading of a table."""
    if split.scenario == "class":
        return f"{data.name}: forget class {split.target}"
    if split.scenario == "keyword":
        return f"{data.name}: forget texts with {split.target!r}"
    return f"{data.name}: forget {split.target}{' random samples' if split.target.isdecimal() else ''}"


@dataclass(frozen=True)
class Prepared:
    """Data as a model takes it.

    Attributes:
        data: as it was loaded, labels in the model's order.
        split: the request.
        subsets: `D_r`, `D_f`, `D_rt` and `D_ft`, or `D_t` where no test sample is forgotten.
        language: whether an item has a label per token.
        text: whether items are texts.
        notes: what was done to the data, a sentence each.
    """

    data: DataBundle
    split: Split
    subsets: dict[str, Subset[Any]]
    language: bool
    text: bool
    notes: list[str] = field(default_factory=list)

    def loaders(
        self, batch_size: int | None, limit: int | None, names: Sequence[str] = ()
    ) -> dict[str, DataLoader[Any]]:
        """Batches of each subset (or of those named), in order, of at most `limit` samples evenly spaced."""
        size = batch_size or (TEXT_BATCH if self.text else IMAGE_BATCH)
        join = collate_text if self.text else collate
        return {
            name: DataLoader(subset, size, collate_fn=join)
            for name, subset in self.measured(limit).items()
            if not names or name in names
        }

    def measured(self, limit: int | None) -> dict[str, Subset[Any]]:
        """The subsets, each thinned to at most `limit` samples."""
        if limit is None:
            return self.subsets
        return {n: Subset(s.dataset, thinned(list(s.indices), limit)) for n, s in self.subsets.items()}


def load_data(name: str, options: Sequence[str], *, pad_to: int | None, channels: int | None) -> DataBundle:
    """The data, with the options as they were typed.

    Raises:
        FileNotFoundError: a path that does not exist, or a known set that is not installed.
        ValueError, TypeError: an option that is no KEY=VALUE or that the loader does not have.
    """
    given: dict[str, Any] = {"pad_to": pad_to, "channels": channels}
    given = {key: value for key, value in given.items() if value is not None}
    for option in options:
        key, value = key_and_value("--data-option", option)
        given[key] = value
    return load(name, **given)


def prepare(
    data: DataBundle, request: ForgetRequest, opened: OpenedModel, *, max_length: int, channels: int | None
) -> Prepared:
    """Show the data to the model the way it takes it.

    Args:
        data: as loaded.
        request: what to forget.
        opened: the model.
        max_length: of a text, in tokens.
        channels: as typed; `None` adjusts grey images to the model.

    Raises:
        ValueError: images for a language model or the reverse, no tokenizer, more classes than the model has,
            texts longer than the model takes.
    """
    notes = list(data.notes)
    text = data.kind == "text"
    if (text and opened.task == "image") or (not text and opened.task in ("text", "language")):
        raise ValueError(f"--data: got {data.name}, a set of {data.kind}s, for {opened.name}, a model of {opened.task}")
    data = _in_model_order(data, opened, notes)
    _check_classes(data, opened)
    split = request.make(data)
    shown: list[Dataset[Any]] = []
    for part in (data.train, data.test):
        if not text:
            shown.append(_with_channels(part, opened.model, channels))
            continue
        tokens = tokens_of(part, opened, max_length, data.name)
        shown.append(tokens)
        notes += cut_notes(part, tokens, opened, "training" if part is data.train else "test")
    language = text and opened.task == "language"
    prepared = Prepared(data, split, split.named(shown[0], shown[1]), language, text, notes)
    _check_takes(opened, prepared)
    return prepared


def _check_takes(opened: OpenedModel, prepared: Prepared) -> None:
    """The model can be run on a sample of the data, of texts the longest."""
    one = next(iter(prepared.measured(1).values()))
    if prepared.text:
        shown: list[Any] = [subset.dataset for subset in prepared.subsets.values()]
        longest = max(shown, key=lambda tokens: int(tokens.attention_mask.sum(1).max()))
        one = Subset(longest, [int(longest.attention_mask.sum(1).argmax())])
    try:
        predict(opened.model, DataLoader(one, 1, collate_fn=collate_text if prepared.text else collate))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, IndexError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{opened.name}: cannot take a sample of {prepared.data.name} ({why}); expected data of the size and "
            "channels that it was made for, see --pad-to, --channels and --max-length"
        ) from error


def _with_channels(part: Dataset[Any], model: nn.Module, channels: int | None) -> Dataset[Any]:
    """Grey images as many channels as the model's first convolution takes, unless that was said."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or channels is not None or not isinstance(part, ImageDataset):
        return part
    if part.channels == first.in_channels or part.images.shape[1] != 1:
        return part
    changed = copy.copy(part)
    changed.channels = first.in_channels
    return changed


def _in_model_order(data: DataBundle, opened: OpenedModel, notes: list[str]) -> DataBundle:
    """The labels renumbered where the model has the same class names in another order."""
    if not opened.labels or opened.task == "language" or opened.labels == data.classes:
        return data
    theirs = {name.casefold(): index for index, name in enumerate(opened.labels)}
    if len(theirs) < len(opened.labels) or any(name.casefold() not in theirs for name in data.classes):
        if all(name.isdecimal() for name in data.classes):
            return data
        notes.append(
            f"the model's classes ({', '.join(opened.labels[:5])}, …) are not the data's; labels are taken by index"
        )
        return data
    order = [theirs[name.casefold()] for name in data.classes]
    if order == list(range(len(order))):
        return data
    notes.append("labels renumbered in the order of the model's class names")
    parts = []
    for part in (data.train, data.test):
        part = copy.copy(part)
        part.labels, part.classes = [order[label] for label in part.labels], opened.labels
        parts.append(part)
    return replace(data, train=parts[0], test=parts[1], classes=opened.labels)


def _check_classes(data: DataBundle, opened: OpenedModel) -> None:
    known = getattr(getattr(opened.model, "config", None), "num_labels", None)
    if opened.task in ("text", "image") and isinstance(known, int) and known < len(data.classes):
        raise ValueError(f"{opened.name}: has {known} classes, expected {len(data.classes)}, those of {data.name}")


def _split_by_ids(data: DataBundle, path: Path) -> Split:
    text = read_text(_existing(path, "--forget-ids"))
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    if not wanted:
        raise ValueError(f"--forget-ids: {path} holds no id, expected one per line")
    places: dict[str, list[int]] = {}
    for place, name in enumerate(ids_of(data.train)):
        places.setdefault(name, []).append(place)
    if unknown := [name for name in wanted if name not in places]:
        raise ValueError(
            f"--forget-ids: {path}: {len(unknown)} of {len(wanted)} are no training sample of {data.name}, the first "
            f"is {unknown[0]!r}{_held_out(data, unknown)}; expected ids such as {', '.join(list(places)[:3])}"
        )
    forget = sorted({place for name in wanted for place in places[name]})
    gone = set(forget)
    retain = tuple(place for place in range(len(data.train)) if place not in gone)
    return Split("sample", f"{len(forget)} listed samples", retain, tuple(forget), tuple(range(len(data.test))))


def _held_out(data: DataBundle, names: Sequence[str]) -> str:
    """How many of the names are of test samples, and what to do then, as a clause; empty where none is."""
    named = getattr(data.test, "ids", None) is not None  # else ids are positions, and say nothing
    there = set(ids_of(data.test)) if named else set()
    if not (count := sum(name in there for name in names)):
        return ""
    own = Path(data.source).suffix.lower() in _WITH_TEST
    advice = "name a test set of its own with --data-option test=FILE" if own else "leave them out"
    return f" ({count} are in the test set, which is held out of the training: {advice})"


def _existing(path: Path | None, option: str) -> Path:
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{option}: {path} does not exist, expected a file")
    return path


def key_and_value(flag: str, word: str) -> tuple[str, Any]:
    """The two sides of a KEY=VALUE, the value JSON or a text.

    Raises:
        ValueError: no = or no key.

    Example:
        >>> key_and_value("--data-option", "size=32")
        ('size', 32)
    """
    key, separator, value = word.partition("=")
    if not separator or not key:
        raise ValueError(f"{flag}: got {word!r}, expected KEY=VALUE")
    return key, json_or_text(value)


def settings_of(prepared: Prepared) -> Mapping[str, Any]:
    """The split and the sizes of its subsets, for a report."""
    split = prepared.split
    return {
        "data": {"name": prepared.data.name, "licence": prepared.data.licence},
        "split": {"scenario": split.scenario, "target": split.target, "seed": split.seed, "digest": split.digest()},
        "samples": {name: len(part) for name, part in prepared.subsets.items()},
    }
