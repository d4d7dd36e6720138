"""Trained models on disk, found again by the settings that made them.

Training an Original and a Retrain per scenario is most of an experiment's time, and no unlearning
setting changes them. Each is therefore kept as a safetensors file whose name holds a digest of
everything that shaped it: data, recipe, seed, architecture. Other settings have another name, so that
a stale model is never taken for a fresh one; what is never done is deleting the old files. A file
that cannot be read is said to be so and made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.data import Dataset, Subset

from rfa_fast.data.resize import Resize
from rfa_fast.files import made_once, save_tensors

CACHE_VARIABLE = "RFA_FAST_CACHE"
FORMAT = "rfa-fast model 1"

Say = Callable[[str], object]

_FINGERPRINTS: WeakKeyDictionary[Dataset[Any], str] = WeakKeyDictionary()


@dataclass
class Trained:
    """A trained model and where it comes from.

    Attributes:
        model: in eval mode, on the CPU; shared with whoever asks again, so copy it before changing it.
        seconds: what its training took, on the machine that trained it.
        reused: whether it was read rather than trained.
        key: digest of its settings.
    """

    model: nn.Module
    seconds: float
    reused: bool
    key: str


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """`folder`, else `$RFA_FAST_CACHE`, else `~/.cache/rfa-fast`; not created yet.

    Example:
        >>> cache_folder("somewhere").name
        'somewhere'
    """
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rfa-fast")


def settings_key(settings: Mapping[str, Any]) -> str:
    """Sixteen hex digits that depend on the settings' content and not on their order.

    Raises:
        TypeError: a value that JSON cannot hold.

    Example:
        >>> settings_key({"lr": 0.1, "seed": 0}) == settings_key({"seed": 0, "lr": 0.1})
        True
    """
    return hashlib.sha256(canonical(settings).encode()).hexdigest()[:16]


def canonical(settings: Mapping[str, Any]) -> str:
    """The settings as JSON with sorted keys."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(dataset: Dataset[Any]) -> str:
    """Digest of a dataset's content: its tensors, labels and texts, and the indices of a `Subset`.

    It is taken once per object, because hundreds of megabytes are read for it and a table asks for it with every
    row: a dataset is not changed while experiments run on it.

    Raises:
        TypeError: a dataset without the attribute `labels`, whose content cannot be told cheaply.

    Example:
        >>> from rfa_fast.data import TextDataset
        >>> a, b = (TextDataset([text], [0], classes=("c",)) for text in ("x", "y"))
        >>> fingerprint(a) == fingerprint(b), fingerprint(a) == fingerprint(Subset(a, [0]))
        (False, False)
    """
    if dataset in _FINGERPRINTS:
        return _FINGERPRINTS[dataset]
    whole, digest = dataset, hashlib.sha256()
    while isinstance(dataset, Subset):
        digest.update(json.dumps([int(i) for i in dataset.indices]).encode())
        dataset = dataset.dataset
    if not hasattr(dataset, "labels"):
        raise TypeError(f"dataset: got {type(dataset).__name__} without labels, expected one of rfa_fast.data")
    for name in ("labels", "texts", "prompts", "channels"):
        digest.update(json.dumps([name, getattr(dataset, name, None)]).encode())
    if isinstance(transform := getattr(dataset, "transform", None), Resize):
        digest.update(f"size {transform.size}".encode())
    for name in ("images", "input_ids", "targets"):
        tensor = getattr(dataset, name, None)
        if tensor is not None:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    _FINGERPRINTS[whole] = digest.hexdigest()[:16]
    return _FINGERPRINTS[whole]


def labels_of(dataset: Dataset[Any]) -> list[int]:
    """The class index of every sample, through any number of `Subset`s.

    Raises:
        TypeError: a dataset without the attribute `labels`.

    Example:
        >>> from rfa_fast.data import TextDataset
        >>> labels_of(Subset(TextDataset(["x", "y"], [0, 1], classes=("a", "b")), [1]))
        [1]
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[i] for i in dataset.indices]
    found: Sequence[int] | None = getattr(dataset, "labels", None)
    if found is None:
        raise TypeError(f"dataset: got {type(dataset).__name__} without labels, expected one of rfa_fast.data")
    return list(found)


class ModelCache:
    """A folder of trained models.

    Args:
        folder: made when the first model is kept; `None` keeps models in memory, as long as this object lives.
        say: is told, in a sentence, what was read and what has to be trained.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, say: Say = print) -> None:
        self.folder = None if folder is None else Path(folder)
        self.say = say
        self._memory: dict[tuple[str, str], Trained] = {}

    def get(
        self,
        role: str,
        settings: Mapping[str, Any],
        build: Callable[[], nn.Module],
        fit: Callable[[nn.Module], float],
    ) -> Trained:
        """The model of these settings: read, or built, fitted and kept.

        Args:
            role: a word for people, `"original"` say; part of the file's name.
            settings: JSON-safe; everything that shapes the result.
            build: makes the untrained model.
            fit: trains it in place and returns the seconds that took.

        Raises:
            OSError: the folder cannot be written.

        Example:
            >>> import tempfile
            >>> cache = ModelCache(tempfile.mkdtemp(), say=lambda text: None)
            >>> make = lambda: cache.get("original", {"seed": 0}, lambda: nn.Linear(2, 2), lambda model: 1.5)
            >>> make().reused, make().reused
            (False, True)
        """
        key = settings_key(settings)
        if (role, key) in self._memory:
            return replace(self._memory[role, key], reused=True)

        path = None if self.folder is None else self.folder / f"{role}-{key}.safetensors"

        def make() -> Trained:
            model = build()
            seconds = fit(model)
            trained = Trained(model.eval(), seconds, reused=False, key=key)
            if path is None:
                self._memory[role, key] = trained
            else:
                self._write(path, settings, model, seconds)
            return trained

        if path is None:
            return make()
        return made_once(path, lambda: self._kept(role, path, settings, build), make, self.say)

    def _kept(
        self, role: str, path: Path, settings: Mapping[str, Any], build: Callable[[], nn.Module]
    ) -> Trained | None:
        """The model in this file, if it is one of these settings."""
        if path.is_file():
            model = build()
            seconds = self._read(path, settings, model)
            if seconds is None:
                return None
            self.say(f"{role}: read from {path}")
            return Trained(model.eval(), seconds, reused=True, key=settings_key(settings))
        if others := sorted(path.parent.glob(f"{role}-*.safetensors")):
            self.say(f"{role}: {len(others)} in {path.parent} were made by other settings; training one with these")
        return None

    def has(self, role: str, settings: Mapping[str, Any]) -> bool:
        """Whether :meth:`get` would find this model; a file that cannot be read is found out there.

        Example:
            >>> ModelCache(None).has("original", {"seed": 0})
            False
        """
        key = settings_key(settings)
        if self.folder is None:
            return (role, key) in self._memory
        return (self.folder / f"{role}-{key}.safetensors").is_file()

    def _read(self, path: Path, settings: Mapping[str, Any], model: nn.Module) -> float | None:
        """Fill the model from the file and return its training's seconds; `None`, and said why, when it is no good."""
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_model

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("settings") != canonical(settings):
                self.say(f"{path}: holds no model of these settings; training one")
                return None
            load_model(model, path)
            return float(metadata["seconds"])
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            self.say(f"{path}: cannot be read ({error}); training it again")
            return None

    def _write(self, path: Path, settings: Mapping[str, Any], model: nn.Module, seconds: float) -> None:
        """Whole or not at all. Tensors that modules share are stored once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(model, path, {"format": FORMAT, "settings": canonical(settings), "seconds": repr(seconds)})
