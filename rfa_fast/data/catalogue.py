"""Data sets by name: what there is, whether this machine has it, and how to get it.

A name stands for one of the sets below; a path for the user's own file or folder, whose suffix says
how it is read.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfa_fast.data import cifar, eli5, folders, images, imdb, npz, records, texts, wmdp
from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.sources import Source


@dataclass(frozen=True)
class DataInfo:
    """A data set that :func:`load` knows.

    Attributes:
        name: what to give to :func:`load`.
        kind: `"image"` or `"text"`.
        what: what it is, in a line.
        found: where it was found on this machine; `None` if it is not there.
        get: the command that installs it; empty where nothing has to be installed.
        options: names of the options of its loader.

    Example:
        >>> available()[0].found
        'scikit-learn'
    """

    name: str
    kind: str
    what: str
    found: str | None
    get: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    kind: str
    what: str
    loader: Callable[..., DataBundle]
    source: Source | None = None


_ENTRIES = {
    "digits": _Entry("image", "1,797 handwritten digits, 8 × 8, 10 classes", images.load_digits),
    "fashion-mnist": _Entry(
        "image", "70,000 articles of clothing, 28 × 28, 10 classes", images.load_fashion_mnist, images.FASHION_MNIST
    ),
    "cifar-10": _Entry("image", "60,000 photographs, 3 × 32 × 32, 10 classes", cifar.load_cifar_10, cifar.CIFAR_10),
    "mnist-5k": _Entry("image", "5,000 handwritten digits, 28 × 28, 10 classes", images.load_mnist_5k, images.MNIST_5K),
    "bbc-news": _Entry("text", "2,113 news articles in 5 topics", texts.load_bbc_news, texts.BBC_NEWS),
    "imdb": _Entry("text", "50,000 film reviews, positive or negative", imdb.load_imdb, imdb.IMDB),
    "eli5-category": _Entry(
        "text",
        "105,004 questions with answers, 10,000 of them in 10 topics",
        eli5.load_eli5_category,
        eli5.ELI5_CATEGORY,
    ),
    "wmdp": _Entry("text", "3,668 multiple-choice questions in 3 topics", wmdp.load_wmdp, wmdp.WMDP),
    "wmdp-corpora": _Entry(
        "text", "texts that WMDP is unlearnt with, to forget and to keep", wmdp.load_wmdp_corpora, wmdp.WMDP_CORPORA
    ),
    "trivia": _Entry("text", "11,163 questions with answers in 27 topics", texts.load_trivia, texts.TRIVIA),
    "wordnet": _Entry("text", "117,659 glosses in 45 topics", texts.load_wordnet, texts.WORDNET),
}
_SUFFIXES: dict[str, Callable[..., DataBundle]] = {
    ".npz": npz.load_npz,
    ".jsonl": records.load_records,
    ".csv": records.load_records,
}


def load(name: str | os.PathLike[str], **options: Any) -> DataBundle:
    """A data set by name, or the user's own by path.

    Args:
        name: one of :func:`available`; or the path of a .npz file (:func:`~rfa_fast.data.load_npz`), of a
            .jsonl or .csv file (:func:`~rfa_fast.data.load_records`) or of a folder of images
            (:func:`~rfa_fast.data.load_image_folder`).
        options: those of the loader, such as `pad_to=32, channels=3` for images.

    Raises:
        FileNotFoundError: the data is not on this machine; the message holds the command that gets it.
        TypeError: an option that the loader does not have; the message lists those that it has.
        ValueError: an unknown name, an option out of range, or malformed data; names file, line, field.

    Example:
        >>> data = load("digits", channels=3)
        >>> data.kind, len(data.train), data.train[0][0].shape
        ('image', 1438, torch.Size([3, 8, 8]))
    """
    key = os.fspath(name)
    loader = loader_of(key)
    if loader is None:
        close = difflib.get_close_matches(key, _ENTRIES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"name: got {key!r}, expected one of {', '.join(_ENTRIES)}, a {', '.join(_SUFFIXES)} file or a folder of "
            f"images{hint}"
        )
    known = options_of(loader)
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"{key}: got option {unknown[0]!r}, expected some of {', '.join(known)}")
    return loader(**options) if key in _ENTRIES else loader(Path(key), **options)


def loader_of(name: str) -> Callable[..., DataBundle] | None:
    """What :func:`load` reads this name or path by; `None` for neither.

    Example:
        >>> loader_of("digits").__name__, loader_of("mail.csv").__name__
        ('load_digits', 'load_records')
    """
    path = Path(name)
    if name in _ENTRIES:
        return _ENTRIES[name].loader
    if path.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[path.suffix.lower()]
    return folders.load_image_folder if path.is_dir() else None


def available() -> list[DataInfo]:
    """The data sets that :func:`load` knows by name, and whether they are on this machine.

    Example:
        >>> [info.name for info in available() if info.kind == "image"]
        ['digits', 'fashion-mnist', 'cifar-10', 'mnist-5k']
    """
    infos: list[DataInfo] = []
    for name, entry in _ENTRIES.items():
        place = entry.source.find() if entry.source is not None else "scikit-learn"
        found = None if place is None else str(place)
        get = entry.source.get if entry.source is not None else ""
        infos.append(DataInfo(name, entry.kind, entry.what, found, get, options_of(entry.loader)))
    return infos


def options_of(loader: Callable[..., DataBundle]) -> tuple[str, ...]:
    """What a loader takes by name; of the sets known by name also the folder, `root`.

    Example:
        >>> options_of(folders.load_image_folder)
        ('size', 'normalise', 'test_fraction', 'seed')
    """
    parameters = inspect.signature(loader).parameters.values()
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    return tuple(p.name for p in parameters if p.name not in required)
