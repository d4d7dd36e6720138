"""Whether what a pair needs is on this machine, and the command that brings it."""

from __future__ import annotations

from pathlib import Path

from rfa_fast.data.sources import Source
from rfa_fast.experiments.tables.pairs import Pair


def missing(need: str, folder: Path | None = None) -> str | None:
    """The command that brings what is needed, `None` where it is there.

    Args:
        need: `"data:NAME"` of :func:`rfa_fast.data.available`; `"model:NAME"`, a source of
            :mod:`rfa_fast.experiments.models`; `"weights:NAME"` of torchvision's published ones.
        folder: of the data, in place of where they are looked for; it is taken as there.

    Raises:
        ValueError: another word.

    Example:
        >>> missing("data:digits") is None
        True
    """
    kind, _, name = need.partition(":")
    if kind == "data":
        return _missing_data(name) if folder is None else None
    if kind == "model":
        source = _source(name)
        return None if source.find() is not None else source.get
    if kind == "weights":
        return _missing_weights(name)
    raise ValueError(f"need: got {need!r}, expected data:NAME, model:NAME or weights:NAME")


def all_missing(pair: Pair, folder: Path | None = None) -> dict[str, str]:
    """What a pair needs and is not there -> the command that brings it; `folder` as for :func:`missing`.

    Example:
        >>> from rfa_fast.experiments.tables.pairs import PAIRS
        >>> all_missing(PAIRS["digits/digits-net"])
        {}
    """
    return {need: command for need in pair.needs if (command := missing(need, folder)) is not None}


def _missing_data(name: str) -> str | None:
    from rfa_fast.data import available

    for info in available():
        if info.name == name:
            return None if info.found is not None else info.get
    raise ValueError(f"need: got data {name!r}, expected one of {', '.join(info.name for info in available())}")


def _source(name: str) -> Source:
    from rfa_fast.experiments import models

    sources = (models.MINILM, models.SMOLLM2, models.DISTILBERT, models.DISTILGPT2, models.QWEN)
    for source in sources:
        if source.name == name:
            return source
    raise ValueError(f"need: got model {name!r}, expected one of {', '.join(source.name for source in sources)}")


def _missing_weights(name: str) -> str | None:
    from rfa_fast.experiments.models import published_weights

    try:
        published_weights(name)
    except FileNotFoundError as error:
        return str(error).partition("Get it with `")[2].partition("`")[0]
    return None
