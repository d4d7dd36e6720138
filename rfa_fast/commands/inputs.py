"""From what was typed to a model and the four subsets it is measured on.

The model decides how the data is shown to it: a causal language model gets tokens with a label each, a
network whose first convolution takes three channels gets grey images as three, a classifier that
knows its classes by name gets the data's labels in its own order. Each such adjustment is kept as a
note and printed; none changes which samples there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from rfa_fast.commands.alike import check_alike
from rfa_fast.commands.fitting import fitting, in_model_order, too_few, with_channels
from rfa_fast.commands.texts import cut_notes, tokens_of
from rfa_fast.data import (
    DataBundle,
    Split,
    collate,
    collate_text,
    ids_of,
    load,
    split_by_class,
    split_by_keyword,
    split_by_sample,
)
from rfa_fast.data.preprocessing import shown_to
from rfa_fast.data.sources import read_text
from rfa_fast.experiments.common import thinned
from rfa_fast.experiments.comparison import json_or_text
from rfa_fast.methods import checks
from rfa_fast.metrics import predict
from rfa_fast.models import OpenedModel, open_model
from rfa_fast.weights import check_weights_file, fill, read_state

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

    def open_other(self, flag: str, name: str, classes: int | None) -> OpenedModel:
        """Another model to compare with: weights or an adapter for this one's architecture, or a model of its own.

        Raises:
            ValueError, TypeError, FileNotFoundError: as :meth:`open`, under the flag that named it.
        """
        try:
            return replace(self._other(name, classes), name=name)
        except (ValueError, TypeError, FileNotFoundError) as error:
            # A subclass may want other arguments (UnicodeDecodeError takes five): raise the plain kind.
            kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
            raise kind(f"{flag}: {str(error).removeprefix('weights: ')}") from error

    def _other(self, name: str, classes: int | None) -> OpenedModel:
        path = Path(name)
        if path.suffix == ".safetensors":
            return self._filled(path, classes)
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            from rfa_fast.adapters import load as load_adapter

            opened = self.open(classes)
            load_adapter(opened.model, path)
            return opened
        alone = path / "model.safetensors"  # as unlearn writes a model that has no configuration
        if alone.is_file() and not (path / "config.json").is_file():
            return self._filled(alone, classes)
        return replace(self, name=name, weights=None).open(classes)

    def _filled(self, file: Path, classes: int | None) -> OpenedModel:
        """This model with the weights of a file in the place of its own; torchvision's has none without a file."""
        check_weights_file(file)
        if self.name.startswith("torchvision:"):
            return replace(self, weights=file).open(classes)
        opened = self.open(classes)
        fill(opened.model, read_state(file), str(file))
        return opened


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


def load_data(
    name: str,
    options: Sequence[str],
    *,
    pad_to: int | None,
    channels: int | None,
    model: str | None = None,
    others: Sequence[tuple[str, str]] = (),
) -> DataBundle:
    """The data, with the options as they were typed; a folder of images otherwise as its model's folder says.

    Args:
        name: as :func:`rfa_fast.data.load` takes it.
        options: `KEY=VALUE`.
        pad_to, channels: as typed, `None` when not.
        model: the word that the model is opened by.
        others: flag and word of the models to compare with, as :func:`rfa_fast.data.preprocessing.shown_to`.

    Raises:
        FileNotFoundError: a path that does not exist, or a known set that is not installed.
        ValueError, TypeError: an option that is no KEY=VALUE or that the loader does not have; what the model's folder
            says cannot be followed.
    """
    given: dict[str, Any] = {"pad_to": pad_to, "channels": channels}
    given = {key: value for key, value in given.items() if value is not None}
    for option in options:
        key, value = key_and_value("--data-option", option)
        given[key] = value
    asked, notes = ({}, []) if model is None else shown_to(name, model, given, others)
    bundle = load(name, **given, **asked)
    return replace(bundle, notes=(*notes, *bundle.notes))


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
    data = in_model_order(data, opened, notes)
    _check_classes(data, opened)
    split = request.make(data)
    shown: list[Dataset[Any]] = []
    for part in (data.train, data.test):
        if not text:
            shown.append(with_channels(part, opened.model, channels))
            continue
        tokens = tokens_of(part, opened, max_length, data.name)
        shown.append(tokens)
        notes += cut_notes(part, tokens, opened, "training" if part is data.train else "test")
    language = text and opened.task == "language"
    prepared = Prepared(data, split, split.named(shown[0], shown[1]), language, text, notes)
    _check_takes(opened, prepared)
    return prepared


def check_other(flag: str, other: OpenedModel, first: OpenedModel, prepared: Prepared) -> None:
    """Check that a model to compare with takes what was prepared for the first; it is run on a sample.

    Args:
        flag: of the command line that named `other`.
        other: the model to compare with.
        first: what is known about the one that the data were prepared for.
        prepared: the data.

    Raises:
        ValueError: another task, labels or tokens in another order, fewer classes, or it cannot be run on a sample.
    """
    if "unknown" not in (first.task, other.task) and other.task != first.task:
        raise ValueError(
            f"{flag}: got {other.name}, a model of {other.task}, expected one of {first.task}, as {first.name}; it "
            "cannot be measured on the same labels, evaluate it by itself"
        )
    check_alike(flag, other, first, prepared.data.classes)
    named = replace(other, name=f"{flag}: {other.name}")
    _check_classes(prepared.data, named)
    _check_takes(named, prepared)


def _check_takes(opened: OpenedModel, prepared: Prepared) -> None:
    """The model can be run on a sample of the data, of texts the longest, and has a class for each label."""
    one = next(iter(prepared.measured(1).values()))
    if prepared.text:
        shown: list[Any] = [subset.dataset for subset in prepared.subsets.values()]
        longest = max(shown, key=lambda tokens: int(tokens.attention_mask.sum(1).max()))
        one = Subset(longest, [int(longest.attention_mask.sum(1).argmax())])
    batch: Any = (collate_text if prepared.text else collate)([one[0]])
    if prepared.text and not prepared.language:
        batch["labels"] = torch.zeros_like(batch["labels"])  # a class that it lacks is told from a failure below
    elif not prepared.text:
        batch = (batch[0], torch.zeros_like(batch[1]))
    try:
        found = predict(opened.model, [batch]).probabilities
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, IndexError, ValueError, TypeError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{opened.name}: cannot take a sample of {prepared.data.name} ({why}); expected {fitting(prepared.data)}"
        ) from error
    data = prepared.data
    if found is not None and found.shape[1] <= max(max(part.labels) for part in (data.train, data.test)):
        raise too_few(opened, found.shape[1], data)


def _check_classes(data: DataBundle, opened: OpenedModel) -> None:
    known = getattr(getattr(opened.model, "config", None), "num_labels", None)
    if opened.task in ("text", "image") and isinstance(known, int) and known < len(data.classes):
        raise too_few(opened, known, data)


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
