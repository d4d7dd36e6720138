"""IMDB: film reviews, positive or negative, from the authors' folder of texts or the hub's Parquet files.

Two classes are no target to forget a class of; the paper forgets the reviews with a keyword instead
(section V-A4): :func:`rfa_fast.data.split_by_keyword`, and :func:`rfa_fast.data.keyword_candidates` for a word
that stands in 5 to 10 % of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import TextDataset
from rfa_fast.data.sources import Source, read_text
from rfa_fast.data.tables import find_tables, read_rows
from rfa_fast.hub import fetch_command

HUB = "datasets/stanfordnlp/imdb"
IMDB = Source(
    "imdb",
    fetch_command(HUB),
    aliases=("aclImdb",),
    hub=HUB,
    put="the folder aclImdb of https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
)
IMDB_CLASSES = ("neg", "pos")
LINE_BREAK = re.compile(r"<br\s*/?>")


def load_imdb(root: str | os.PathLike[str] | None = None) -> DataBundle:
    """IMDB: 25,000 training and 25,000 test reviews of films in the classes `neg` and `pos`.

    Of equal reviews only the first is kept, and none in the test set that is in the training set, else
    a review to be forgotten would live on in its copy. The HTML line breaks become line breaks.

    Args:
        root: `aclImdb`, a folder with it, or one with `train` and `test` as Parquet, Arrow or JSON lines with
            `text` and `label` (0: neg, 1: pos); else the same as `$RFA_FAST_DATA/imdb`, else the hub's
            local cache.

    Raises:
        FileNotFoundError: not there; the message holds the command that gets it.
        ValueError: a folder or file without a review, an empty review, a label other than 0 and 1.

    Example:
        >>> load_imdb("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: imdb: /nowhere does not exist. Get it with `hf download stanfordnlp/imdb ...
    """
    folder = IMDB.require(root)
    tree = next((place for place in (folder, folder / "aclImdb") if (place / "train").is_dir()), None)
    unpacked = tree is not None and any((tree / "train" / name).is_dir() for name in IMDB_CLASSES)
    seen: set[str] = set()
    parts: list[TextDataset] = []
    copies = 0
    for part in ("train", "test"):
        reviews = _from_tree(tree, part) if tree is not None and unpacked else _from_tables(folder, part)
        kept: list[tuple[str, int, str]] = []
        for text, label, name in reviews:
            if text in seen:
                copies += 1
            else:
                seen.add(text)
                kept.append((text, label, name))
        if not kept:
            raise ValueError(f"{folder}: got no review in {part} that is not in train, expected at least one")
        texts, labels, ids = zip(*kept, strict=True)
        parts.append(TextDataset(texts, labels, IMDB_CLASSES, ids=ids))
    note = f"{copies} reviews left out as copies of others"
    licence = "not stated by its authors"
    return DataBundle("imdb", parts[0], parts[1], IMDB_CLASSES, "text", str(folder), licence, (note,))


def _from_tree(root: Path, part: str) -> Iterator[tuple[str, int, str]]:
    """Text, label and name of each review of `aclImdb`, class by class."""
    for label, sentiment in enumerate(IMDB_CLASSES):
        place = root / part / sentiment
        if not place.is_dir():
            raise FileNotFoundError(IMDB.missing(str(place)))
        files = sorted(place.glob("*.txt"))
        if not files:
            raise ValueError(f"{place}: got no review, expected .txt files")
        for file in files:
            yield _clean(read_text(file), str(file)), label, f"{part}/{sentiment}/{file.stem}"


def _from_tables(folder: Path, part: str) -> Iterable[tuple[str, int, str]]:
    """The same from files of rows, in their order."""
    files = find_tables(folder, part)
    if not files:
        raise FileNotFoundError(IMDB.missing(f"{folder}/{part}/pos or {folder}/{part}-….parquet"))
    number = 0
    for file in files:
        for row in read_rows(file, ("text", "label"), IMDB):
            text = _clean(row.text("text"), f"{file}, {row.place}")
            yield text, row.index("label", len(IMDB_CLASSES)), f"{part}/{number}"
            number += 1


def _clean(text: str, place: str) -> str:
    text = LINE_BREAK.sub("\n", text).strip()
    if not text:
        raise ValueError(f"{place}: got an empty review, expected a text")
    return text
