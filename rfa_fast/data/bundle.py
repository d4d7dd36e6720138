"""What every loader returns: a training and a test set with the same classes, and where they come from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from rfa_fast.data.datasets import ids_of


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

    def digest(self) -> str:
        """SHA-256 over names, classes and texts of all samples in their order: what the indices of a split mean.

        Pixels are left out, which a padding or another scale changes and not the sample: images without a name are
        known by their classes alone. So are the order and the case of the classes' names, which are the model's.

        Example:
            >>> from rfa_fast.data import load
            >>> load("digits").digest() == load("digits").digest()
            True
        """
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            texts = getattr(part, "texts", None)
            named = [self.classes[label].casefold() for label in part.labels]
            digest.update(json.dumps([ids_of(part), named, None if texts is None else list(texts)]).encode())
        return digest.hexdigest()
