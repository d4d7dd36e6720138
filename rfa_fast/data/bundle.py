"""What every loader returns: a training and a test set with the same classes, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DataBundle:
    """A data set, loaded.

    Attributes:
        name: as :func:`rfa_fast.data.load` knows it, or the file's.
        train, test: :class:`~rfa_fast.data.ImageDataset` or :class:`~rfa_fast.data.TextDataset` or a dataset
            like them: `labels`, a class index for each sample, `classes`, `ids`, and of texts `texts`.
        classes: class names by index, of both.
        kind: `"image"` or `"text"`.
        source: the file, folder or package that was read.
        licence: of the data.
        notes: what was left out or done to it, a sentence each.

    Example:
        >>> from rfa_fast.data import load
        >>> data = load("digits")
        >>> data.kind, data.licence, data.classes[:3]
        ('image', 'BSD-3-Clause', ('0', '1', '2'))
    """

    name: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    kind: Literal["image", "text"]
    source: str
    licence: str
    notes: tuple[str, ...] = ()
