"""How data are made to fit a model: its order of the classes, its channels, and what to type where they do not fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from rfa_fast.data import DataBundle, ImageDataset
from rfa_fast.data.folders import FolderDataset
from rfa_fast.models import OpenedModel

_NUMBERED = "labels numbered alphabetically"  # how the note on the order of a file's names begins


def in_model_order(data: DataBundle, opened: OpenedModel, notes: list[str]) -> DataBundle:
    """The labels renumbered where the model has the same class names in another order.

    Args:
        data: as loaded.
        opened: the model.
        notes: on the data; what is done is added, and what is no longer so taken out.

    Raises:
        ValueError: two classes of the data are one of the model's, but for their case.

    Example:
        >>> from rfa_fast.data import TextDataset
        >>> part = TextDataset(["x", "y"], [0, 1], ("bad", "good"))
        >>> data = DataBundle("mail", part, part, ("bad", "good"), "text", "", "")
        >>> in_model_order(data, OpenedModel(nn.Identity(), "m", "factory", "text", ("good", "bad")), []).train.labels
        [1, 0]
    """
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
    taken: dict[int, str] = {}
    for index, name in zip(order, data.classes, strict=True):
        if index in taken:
            raise ValueError(
                f"--data: got the classes {taken[index]!r} and {name!r} in {data.name}, both {opened.labels[index]!r} "
                f"in {opened.name}, expected one of the data's for each of the model's; rename them in the data: alike "
                "where they are one class, by other words where they are two"
            )
        taken[index] = name
    if order == list(range(len(order))):
        return data
    notes[:] = [note for note in notes if not note.startswith(_NUMBERED)]
    notes.append("labels renumbered in the order of the model's class names")
    parts = []
    for part in (data.train, data.test):
        part = copy.copy(part)
        part.labels, part.classes = [order[label] for label in part.labels], opened.labels
        parts.append(part)
    return replace(data, train=parts[0], test=parts[1], classes=opened.labels)


def with_channels(part: Dataset[Any], model: nn.Module, channels: int | None) -> Dataset[Any]:
    """Grey images as many channels as the model's first convolution takes, unless `channels` says that.

    Example:
        >>> import torch
        >>> grey = ImageDataset(torch.zeros(1, 1, 4, 4), [0], ("x",))
        >>> with_channels(grey, nn.Conv2d(3, 1, 1), None)[0][0].shape
        torch.Size([3, 4, 4])
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or channels is not None or not isinstance(part, ImageDataset):
        return part
    if part.channels == first.in_channels or part.images.shape[1] != 1:
        return part
    changed = copy.copy(part)
    changed.channels = first.in_channels
    return changed


def fitting(data: DataBundle) -> str:
    """What a model takes of this kind of data, and the options of the commands that make it so.

    Example:
        >>> from rfa_fast.data import load
        >>> fitting(load("digits"))
        'images of the size and channels that it was made for, see --pad-to and --channels'
    """
    if data.kind == "text":
        return "texts of the length that it was made for, see --max-length, in its own tokens, see --tokenizer"
    made = "images of the size and channels that it was made for"
    if isinstance(data.train, FolderDataset):
        return (
            f"{made}, see --data-option size=PIXELS; those of a folder have three channels, an .npz file holds others"
        )
    return f"{made}, see --pad-to and --channels"


def too_few(opened: OpenedModel, known: int, data: DataBundle) -> ValueError:
    """The error of a model with `known` classes, fewer than the data have; who counts them from 1 is told how.

    Example:
        >>> from rfa_fast.data import load
        >>> too_few(OpenedModel(nn.Identity(), "m", "factory", "unknown"), 9, load("digits"))
        ValueError('m: has 9 classes, expected 10, those of digits')
    """
    used = sorted({*data.train.labels, *data.test.labels})
    hint = ""
    if len(used) <= min(known, 20) and data.classes == tuple(str(index) for index in range(len(data.classes))):
        listed = f"[{','.join(map(str, used))}]"
        remedy = f"say --data-option classes={listed}" if data.kind == "text" else "number the classes from 0"
        hint = f"; its labels are {listed}: {remedy}, if they are the model's in this order"
    return ValueError(f"{opened.name}: has {known} classes, expected {len(data.classes)}, those of {data.name}{hint}")
