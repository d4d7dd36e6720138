"""The folder an adapter is saved in: written so that it is whole or not there, read so that it is safe.

Three files: PEFT's `adapter_config.json` and `adapter_model.safetensors`, and `rfa_config.json` with RFA's own
options, which PEFT ignores. The last is also the seal: it is moved in after the other two and holds their
hashes, so that a save that was cut short between two files is found out when it is read. A swap of the whole
folder would be atomic, but would take away what else lies in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rfa_fast.base_weights import same_base
from rfa_fast.files import full_disk_as_os_error
from rfa_fast.peft_format import RFA_ONLY, LoraSettings, Pair, from_keys, read_json, read_settings, to_keys

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "rfa_config.json"
PICKLE = "adapter_model.bin"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Attributes:
        folder: where it was read from.
        settings: `adapter_config.json`.
        pairs: layer name -> tensors, on the CPU.
        record: `rfa_config.json`; `None` for an adapter that PEFT saved.
    """

    folder: Path
    settings: LoraSettings
    pairs: dict[str, Pair]
    record: dict[str, Any] | None

    @property
    def wide(self) -> bool:
        """Whether any tensor is fp64."""
        return any(torch.float64 in (pair.lora_a.dtype, pair.lora_b.dtype) for pair in self.pairs.values())


def write_folder(
    folder: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair], record: dict[str, Any], *, overwrite: bool
) -> None:
    """Write the three files; each is finished beside its place before any is moved there.

    Args:
        folder: created if need be; other files in it are left alone.
        config: `adapter_config.json`.
        pairs: layer name -> tensors.
        record: `rfa_config.json` without format and hashes; `record["base"]` tells adapters of other models apart.
        overwrite: replace the adapter of another base.

    Raises:
        FileExistsError: `folder` is a file, or holds an adapter of another base.
        OSError: a file cannot be written; what was there is untouched.
    """
    from safetensors.torch import save_file

    _check_free(folder, record["base"], overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        stage = Path(staging)
        tensors = {key: tensor.cpu().contiguous() for key, tensor in to_keys(pairs).items()}
        with full_disk_as_os_error(folder / WEIGHTS):
            save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        sealed = {"format": FORMAT, **record, "files": {name: _hash(stage / name) for name in (WEIGHTS, CONFIG)}}
        (stage / RECORD).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG, RECORD):
            with (stage / name).open("rb+") as file:
                os.fsync(file.fileno())
        for name in (WEIGHTS, CONFIG, RECORD):
            os.replace(stage / name, folder / name)


def read_folder(folder: Path) -> Saved:
    """Read and check a folder, without a model.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a pickle, a truncated or altered file, numbers that are not finite, or an adapter that is
            more than A, B and a magnitude per layer.
    """
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: got {got}, expected a folder with {CONFIG} and {WEIGHTS}")
    settings = read_settings(folder / CONFIG)
    tensors = _read_tensors(folder)
    record = _read_record(folder)
    if record is None and settings.peft_type == RFA_ONLY:
        raise FileNotFoundError(f"{folder / RECORD}: not found, but this adapter needs it: the folder is incomplete")
    return Saved(folder, settings, from_keys(folder / WEIGHTS, tensors, dora=settings.dora), record)


def _check_free(folder: Path, base: Mapping[str, Any], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: got a file, expected a folder or a new name")
    held = [name for name in (CONFIG, WEIGHTS, PICKLE, RECORD) if (folder / name).exists()]
    if not held or overwrite:
        return
    whose = "an adapter that another program wrote"
    if RECORD in held:
        other = read_json(folder / RECORD).get("base")
        if isinstance(other, dict) and same_base(other, base):
            return
        owner = other.get("class") if isinstance(other, dict) else "an unknown model"
        whose = f"an adapter of {owner} with other layers or other frozen weights"
    raise FileExistsError(f"{folder}: got a folder with {whose}; choose another folder or pass overwrite=True")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    danger = f"got a pickle, which can run code when it is read; expected {WEIGHTS}: save the adapter as safetensors"
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise ValueError(f"{folder / PICKLE}: {danger}")
        raise FileNotFoundError(f"{path}: not found beside {CONFIG}: the folder is incomplete")
    with path.open("rb") as file:
        start = file.read(9)
    # Of safetensors these are the header's length, which may well begin so, and then the header's brace.
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ValueError(f"{path}: {danger}")
    try:
        tensors = load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: got a truncated or damaged file ({error}); copy it or save it again") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key}: got {tensor.dtype}, expected a floating-point tensor")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {key}: got NaN or infinity, expected finite numbers")
    return tensors


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: format: got {record.get('format')!r}, expected {FORMAT}: another version wrote it")
    for key in ("options", "layers", "base", "files"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{path}: {key}: got {record.get(key)!r}, expected an object; save the adapter again")
    for name in (WEIGHTS, CONFIG):
        if _hash(folder / name) != record["files"].get(name):
            raise ValueError(
                f"{folder / name}: got another file than {RECORD} was written with (an interrupted save, or another "
                f"program changed it); save it again, or delete {RECORD} to read the folder as a plain PEFT adapter"
            )
    return record


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
