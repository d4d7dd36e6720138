"""What the frozen prefix returned for a sample, kept from one epoch to the next.

A sample is told by its content: the hash of its own rows of the inputs, and of whatever the batch shares. So there is
nothing to number and nothing to go stale; but inputs that are augmented never come again, and a cache of them would
only cost. It is refused as soon as that shows: more different samples than the data set has, or a full budget without
one hit. A full cache keeps what it has: the order of an epoch is a cycle, and throwing out the oldest would throw out
what comes next.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.files import save_tensors
from rfa_fast.modules import RFALayer
from rfa_fast.padding import Inputs

_MANIFEST = "prefix_cache.json"


class PrefixCache:
    """Outputs of the prefix by sample, within a budget.

    Args:
        budget: bytes it may take, in memory or on disk.
        folder: where to keep them; `None` for memory. A folder is used again by a later run of the same model with
            the same prefix.
        samples: how many different samples there are, if known.

    Attributes:
        hits, misses: samples found and not found so far.
        size: bytes taken.

    Raises:
        ValueError: a budget or a number of samples below 1.

    Example:
        >>> cache = PrefixCache(2**20)
        >>> key = sample_keys(torch.zeros(1, 3), 1)
        >>> cache.put(key, torch.ones(1, 2))
        >>> cache.get(key, torch.device("cpu")), cache.size
        (tensor([[1., 1.]]), 8)
    """

    def __init__(
        self, budget: int = 2**30, folder: str | os.PathLike[str] | None = None, *, samples: int | None = None
    ) -> None:
        for name, value in (("budget", budget), ("samples", samples)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        self.budget, self.samples = budget, samples
        self.folder = None if folder is None else Path(folder)
        self.hits = self.misses = self.size = 0
        self._rows: dict[str, Tensor] = {}
        self._full, self._count, self._owner = False, 0, ""

    def open(self, model: nn.Module, *what: object) -> None:
        """Make or read the folder; a cache in memory notes whose it is.

        Args:
            model: the patched one.
            what: besides its weights, what the outputs depend on: the prefix's blocks, the dtype of products.

        Raises:
            ValueError: the cache is of another model or another prefix, or the folder holds something else.
        """
        mine = fingerprint(model, *what)
        if self.folder is None:
            if self._owner not in ("", mine):
                raise ValueError(
                    "cache_prefix: got a cache of another model, prefix or dtype, expected a PrefixCache of its own"
                )
            self._owner = mine
            return
        manifest = self.folder / _MANIFEST
        if manifest.is_file():
            theirs = json.loads(manifest.read_text(encoding="utf-8")).get("model")
            if theirs != mine:
                raise ValueError(
                    f"folder: {self.folder} holds outputs of another model, prefix or dtype ({theirs}), expected "
                    f"{mine}; delete it, or name another"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"folder: {self.folder} holds no prefix cache, expected an empty or a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"model": mine}) + "\n", encoding="utf-8")
        self.size = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def get(self, keys: Sequence[str], device: torch.device) -> Tensor | None:
        """The rows of these samples as one tensor, or `None` if one of them is not there."""
        rows = [self._row(key) for key in keys]
        found = [row for row in rows if row is not None]
        self.hits += len(found)
        self.misses += len(rows) - len(found)
        if len(found) < len(rows) or len({row.shape for row in found}) > 1:
            return None
        return torch.stack(found).to(device)

    def put(self, keys: Sequence[str], output: Tensor) -> None:
        """Keep the rows of these samples, as far as the budget reaches.

        Raises:
            ValueError: inputs that do not come again.
            OSError: the folder cannot be written; nothing half-written is left.
        """
        for key, row in zip(keys, output.detach(), strict=True):
            if self._row(key) is not None:
                continue
            if self.size + row.nbytes > self.budget:
                self._say_full()
                return
            kept = row.to("cpu", copy=True)
            if self.folder is None:
                self._rows[key] = kept
                self.size += kept.nbytes
            else:
                self.size += self._write(key, kept)
            self._count += 1
            if self.samples is not None and self._count > self.samples:
                raise ValueError(
                    f"cache_prefix: got more different samples than the {self.samples} there are, expected the same "
                    "ones every epoch; are the inputs augmented? Take the cache off, or the augmentation"
                )

    def _say_full(self) -> None:
        if self._full:
            if not self.hits:
                raise ValueError(
                    f"cache_prefix: got no sample a second time before the budget of {self.budget} bytes was full, "
                    "expected inputs that come again; are they augmented? Take the cache off, or raise its budget"
                )
            return
        self._full = True
        warnings.warn(
            f"cache_prefix: the budget of {self.budget} bytes is full with {self._count} samples; the others are "
            "computed anew every epoch. Raise the budget, or give a folder",
            stacklevel=4,
        )

    def _row(self, key: str) -> Tensor | None:
        if self.folder is None:
            return self._rows.get(key)
        file = self.folder / f"{key}.safetensors"
        if not file.is_file():
            return None
        from safetensors.torch import load_file

        return load_file(file)["output"]

    def _write(self, key: str, row: Tensor) -> int:
        if self.folder is None:
            raise ValueError("folder: got None, expected one to write to")
        return save_tensors({"output": row.contiguous()}, self.folder / f"{key}.safetensors").stat().st_size


def sample_keys(inputs: Inputs, size: int) -> list[str]:
    """One key per sample: its rows, and what the batch shares, by content.

    Args:
        inputs: of the model.
        size: B; a tensor with another first axis is shared by all samples.

    Example:
        >>> a, b, c = sample_keys(torch.tensor([[1.0], [2.0], [1.0]]), 3)
        >>> a == c, a == b
        (True, False)
    """
    named = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    shared, rows = hashlib.sha256(), []
    for name, value in sorted(named.items()):
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == size:
            rows.append(value.detach().to("cpu").contiguous())
            shared.update(f"{name} {value.dtype} {tuple(value.shape[1:])};".encode())
        else:
            _update(shared, name, value)
    keys = []
    for index in range(size):
        own = shared.copy()
        for value in rows:
            own.update(_bytes(value[index]))
        keys.append(own.hexdigest()[:32])
    return keys


def _update(digest: Any, name: str, value: object) -> None:
    """Add a value by its content.

    Raises:
        TypeError: one whose content cannot be told.
    """
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode() + _bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"{name} {len(value)};".encode())
        for key, one in value.items():
            _update(digest, f"{name}.{key}", one)
    elif isinstance(value, list | tuple):
        digest.update(f"{name} {len(value)};".encode())
        for index, one in enumerate(value):
            _update(digest, f"{name}.{index}", one)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        digest.update(f"{name} {value!r};".encode())
    else:
        raise TypeError(
            f"cache_prefix: got {type(value).__name__} for {name!r}, expected tensors, numbers, texts, and lists or "
            "dictionaries of such: what the prefix returned is found again by its inputs; take the cache off"
        )


def fingerprint(model: nn.Module, *what: object) -> str:
    """A short name for what of a model stays: names, shapes, dtypes and sums of its frozen weights and of its buffers.

    Args:
        model: a patched one; what its adapted layers have for buffers is theirs and is left out.
        what: more that the name is to tell apart.

    Example:
        >>> layer = nn.Linear(2, 2).requires_grad_(False)
        >>> fingerprint(layer) == fingerprint(layer), fingerprint(layer) == fingerprint(layer, "bfloat16")
        (True, False)
    """
    whole = hashlib.sha256(repr(what).encode())
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for prefix, module in model.named_modules():
        if not isinstance(module, RFALayer):
            frozen |= dict(module.named_buffers(prefix, recurse=False))
    for name, value in frozen.items():
        total = value.detach().sum(dtype=torch.float64).item() if value.numel() else 0.0
        whole.update(f"{name} {value.dtype} {tuple(value.shape)} {total!r};".encode())
    return whole.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    return value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
