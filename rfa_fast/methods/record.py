"""The deletion record: what was forgotten, by which means, from which weights to which weights.

Whoever must show later that a deletion took place has the record, the model and the list of deleted
ids, and nothing else. So the record holds hashes that :func:`verify_record` can work out again from
those two, never the ids or the samples themselves. A hash of an id hides it only as well as the id
is hard to guess: ids that are counted through (0, 1, 2, …) can be tried one by one, and the record
of such a run should be kept as carefully as the ids.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast.files import write_atomically

SCHEMA = "rfa-fast/deletion-record"
SCHEMA_VERSION = 1
RECORD_FILE = "deletion_record.json"
_CHUNK = 1 << 26  # bytes brought to the CPU at a time
_PACKAGES = ("torch", "torchvision", "transformers", "peft", "safetensors", "numpy")


def hash_id(sample_id: str | int) -> str:
    """SHA-256 of a sample's id, as text in UTF-8; the integer 5 and the text "5" are one id.

    Example:
        >>> hash_id(5) == hash_id("5")
        True
    """
    return hashlib.sha256(str(sample_id).encode()).hexdigest()


def hash_ids(ids: Iterable[str | int]) -> tuple[list[str], str]:
    """The sorted hashes of `ids`, and one digest over that list; neither order nor repetition plays a part.

    Example:
        >>> hash_ids([1, 2]) == hash_ids(["2", "1"])
        True
    """
    hashes = sorted({hash_id(i) for i in ids})
    return hashes, _digest_of(hashes)


def hash_model(model: nn.Module, *, adapters: bool = False) -> str:
    """SHA-256 over the state dict of `model`: sorted by name, each with dtype, shape and bytes.

    Tensors come to the CPU one chunk at a time, whatever their dtype. The prefix that `torch.compile`
    puts before names is left out, so a compiled model has the hash of the plain one.

    Args:
        model: any module; sparse tensors are not supported.
        adapters: include the adapter tensors of a patched model. Without them a patched model has
            the hash of the model it was made from.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = hash_model(layer)
        >>> layer.weight.data[0, 0] += 1
        >>> before == hash_model(layer)
        False
    """
    extra = set() if adapters else _adapter_keys(model)
    digest = hashlib.sha256()
    tensors = {k.replace("_orig_mod.", ""): v for k, v in _entries(model).items() if k not in extra}
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue  # named by `unhashed_entries`, and so in the record
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        flat = tensor.detach().reshape(-1)
        rows = max(1, _CHUNK // max(1, flat.element_size()))
        for start in range(0, flat.numel(), rows):
            digest.update(flat[start : start + rows].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unhashed_entries(model: nn.Module) -> list[str]:
    """Names of state-dict entries that are no tensors (a module's extra state) and so in no hash.

    Example:
        >>> unhashed_entries(nn.Linear(2, 2))
        []
    """
    return sorted(k for k, v in _entries(model).items() if not isinstance(v, Tensor))


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        FileNotFoundError: no such file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that a result depends on; neither host name nor paths.

    Example:
        >>> sorted(versions())[:2]
        ['machine', 'numpy']
    """
    found = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    from rfa_fast import __version__

    found["rfa_fast"] = __version__
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def build_record(
    *,
    method: str,
    settings: Mapping[str, Any],
    seed: int,
    layers: Sequence[str],
    forget_ids: Iterable[str | int],
    retain: Mapping[str, Any],
    model: nn.Module,
    before: str,
    merged: bool,
    metrics_before: Mapping[str, float | None] | None,
    metrics_after: Mapping[str, float | None] | None,
    training: Mapping[str, Any],
    merge_rounding: Mapping[str, float] | None,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The deletion record of a finished run, as JSON-safe values.

    Args:
        model: the model as it is handed back; its hash, adapters included, becomes `model.after`.
        before: :func:`hash_model` of the model before anything was done.
        retain: count and digest of the retained ids.
        training: steps, epochs, seconds and the reason for stopping.
        files: name -> SHA-256 of the files the run left.

    A figure that is not finite is written as `null`: JSON has no NaN.
    """
    hashes, digest = hash_ids(forget_ids)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "method": method,
        "settings": dict(settings),
        "seed": seed,
        "layers": list(layers),
        "forget": {"count": len(hashes), "digest": digest, "sha256": hashes},
        "retain": dict(retain),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "before": before,
            "after": hash_model(model, adapters=True),
            "merged": merged,
            "not_hashed": unhashed_entries(model),
        },
        "metrics": {"before": finite_or_none(metrics_before), "after": finite_or_none(metrics_after)},
        "training": dict(training),
        "merge_rounding": finite_or_none(merge_rounding),
        "versions": versions(),
        "files": dict(files),
    }


def finite_or_none(values: Mapping[str, float | None] | None) -> dict[str, float | None] | None:
    """The figures with `None` for NaN and infinity, which JSON has not."""
    if values is None:
        return None
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path` so that a reader sees the old file or the new one, never half of one.

    Raises:
        OSError: the file cannot be written (no space, no permission); what was there is untouched.
    """
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A deletion record from its file, or from the folder of the run.

    Raises:
        FileNotFoundError: no record there.
        ValueError: the file is no deletion record, or one of a later schema.
    """
    file = Path(path)
    file = file / RECORD_FILE if file.is_dir() else file
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: got no JSON ({error}), expected a deletion record") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{file}: got JSON without schema {SCHEMA!r}, expected a deletion record")
    if record.get("schema_version") != SCHEMA_VERSION:
        got = record.get("schema_version")
        raise ValueError(f"{file}: got schema version {got!r}, expected {SCHEMA_VERSION}; upgrade rfa-fast to read it")
    return record


def verify_record(
    record: Mapping[str, Any] | str | os.PathLike[str],
    model: nn.Module | None = None,
    forget_ids: Iterable[str | int] | None = None,
) -> list[str]:
    """What of `record` does not hold for this model and these ids; empty when everything does.

    Args:
        record: the record, its file, or the folder of the run.
        model: the model that is said to have forgotten; left out, it is not checked.
        forget_ids: the ids that were to be forgotten, in any order; left out, they are not checked.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_record`.
        ValueError: neither model nor ids given.
    """
    if model is None and forget_ids is None:
        raise ValueError("verify_record: got neither model nor forget_ids, expected at least one to check against")
    values = read_record(record) if isinstance(record, str | os.PathLike) else record
    wrong = []
    listed = values["forget"]["sha256"]
    if _digest_of(sorted(listed)) != values["forget"]["digest"] or len(listed) != values["forget"]["count"]:
        wrong.append("forget: the digest or the count does not belong to the listed hashes; the record was altered")
    if forget_ids is not None:
        hashes, _ = hash_ids(forget_ids)
        missing, surplus = _less(hashes, listed), _less(listed, hashes)
        if missing:
            wrong.append(f"forget ids: {missing} of the {len(hashes)} given are not in the record")
        if surplus:
            wrong.append(f"forget ids: {surplus} of the {len(listed)} in the record are not among those given")
    if model is not None:
        found, of = hash_model(model, adapters=True), values["model"]
        if found != of["after"]:
            what = "the model from before unlearning" if found == of["before"] else f"SHA-256 {found}"
            wrong.append(f"model: got {what}, expected {of['after']}")
    return wrong


def _digest_of(hashes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _less(left: Sequence[str], right: Sequence[str]) -> int:
    known = set(right)
    return sum(h not in known for h in left)


def _entries(model: nn.Module) -> dict[str, object]:
    return dict(model.state_dict())


def _adapter_keys(model: nn.Module) -> set[str]:
    own = {"weight", "bias"}
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if hasattr(module, "rfa_name")
        for key in module.state_dict()
        if key not in own
    }
