"""The folder of a run: its state, from which it can go on, and its history.

    state.json                 step, epoch, settings; names the tensor file that belongs to it
    state-00000120.safetensors adapters, optimizer, method state after step 120
    history.jsonl              one line per step
    adapter/                   the trained adapter, once the run is finished
    deletion_record.json       the deletion record, once the run is finished

A checkpoint is two files, and a run can be killed between them. So the tensors get a new name each
time, `state.json` is swapped in one rename, and only then the old tensors go: at every instant there
is one complete checkpoint. The history is appended step by step and may run ahead of it; resuming
cuts it back. No pickle is read or written.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfa_fast.files import save_tensors, write_atomically
from rfa_fast.methods.base import StepRecord
from rfa_fast.methods.record import RECORD_FILE, hash_file, read_record, write_json

STATE_FILE = "state.json"
HISTORY_FILE = "history.jsonl"
ADAPTER_FOLDER = "adapter"
SCHEMA = "rfa-fast/run-state"
SCHEMA_VERSION = 1
_ELSEWHERE = "begin a new run in another folder"
_CONTIGUOUS = torch.contiguous_format


@dataclass
class RunState:
    """Where a run stands, without its tensors; JSON-safe.

    Attributes:
        step: optimizer steps done.
        epoch: epoch under way, from 0.
        epoch_step: steps done in that epoch.
        seconds: time spent in steps so far, over all processes that worked on the run.
        settings: everything the outcome depends on; a resumed run has to be given the same.
        metrics_before: figures of the model before unlearning, `None` without `evaluate`.
        stopped: why the run is over, `None` while it is not.
        last_batch: digest of the last batch, to notice other data, or a loader that does not repeat its order.
        versions: package versions that wrote the state.
        asked: the last step of which it is known whether the run ends with it; `None` in a state of before this was
            noted. An error in `until` leaves a step that has yet to be asked about.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    metrics_before: dict[str, float | None] | None = None
    stopped: str | None = None
    last_batch: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    asked: int | None = 0


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made when the first checkpoint is written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     folder = RunFolder(path)
        ...     folder.save(RunState(step=2), {})
        ...     (folder.found(), folder.read_state().step)
        (['state.json', 'state-00000002.safetensors'], 2)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def found(self) -> list[str]:
        """Names of the run files that the folder holds; empty for a folder that holds no run.

        Raises:
            FileExistsError: the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output_dir: {self.path} is a file, expected a folder or a new name")
        names = [STATE_FILE, HISTORY_FILE, RECORD_FILE, ADAPTER_FOLDER]
        present = [name for name in names if (self.path / name).exists()]
        return present + [p.name for p in self._tensor_files()]

    def refuse_other_run(self) -> None:
        """Raise unless the folder holds no run.

        Raises:
            FileExistsError: it holds one; the message says what was found and how to go on.
        """
        found = self.found()
        if not found:
            return
        what = "a run"
        state = None
        if STATE_FILE in found:
            try:
                state = self.read_state()
            except ValueError as error:
                what = f"a run whose state cannot be read ({error})"
        if state is not None:
            what = f"the run of {state.settings.get('method', 'a method')} that " + (
                f"ended after step {state.step} ({state.stopped})" if state.stopped else f"stands at step {state.step}"
            )
        raise FileExistsError(
            f"output_dir: {self.path} already holds {what} (found {', '.join(found)}); "
            "expected an empty or new folder. Pass resume=True to go on with that run, or name another folder"
        )

    def why_broken(self) -> str | None:
        """Why no run can go on from what the folder holds; `None` where one can, and where it holds no run.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as path:
            ...     folder = RunFolder(path)
            ...     folder.save(RunState(step=2), {})
            ...     before = folder.why_broken()
            ...     _ = (Path(path) / "state-00000002.safetensors").write_bytes(b"")
            ...     (before, "SHA-256" in folder.why_broken())
            (None, True)
        """
        found = self.found()
        if not found:
            return None
        if STATE_FILE not in found:
            return f"{self.path}: holds {', '.join(found)} but no {STATE_FILE}"
        try:
            self.read_state()
            self.read_tensors()
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return None

    def read_state(self) -> RunState:
        """The state of the run, without its tensors.

        Raises:
            FileNotFoundError: no state in the folder.
            ValueError: `state.json` is no state, or that of a later version.
        """
        file = self.path / STATE_FILE
        values = self._read_json(file)
        known = set(RunState.__dataclass_fields__)
        state = values.get("state")
        if not isinstance(state, dict) or {*state, "asked"} != known:
            raise ValueError(f"{file}: got JSON without the fields {', '.join(sorted(known))}; {_ELSEWHERE}")
        return RunState(**{"asked": None, **state})

    def read_tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to :meth:`read_state`, on the CPU.

        Raises:
            FileNotFoundError: the tensor file is missing.
            ValueError: it is truncated or altered.
        """
        from safetensors.torch import load_file

        values = self._read_json(self.path / STATE_FILE)
        file = self.path / str(values.get("tensors"))
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, expected the tensors that {STATE_FILE} names; {_ELSEWHERE}")
        if hash_file(file) != values.get("sha256"):
            raise ValueError(f"{file}: truncated or altered, its SHA-256 is not the one in {STATE_FILE}; {_ELSEWHERE}")
        return load_file(file)

    def save(self, state: RunState, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint; until it is complete the previous one stays the valid one.

        Raises:
            OSError: no space or no permission; the previous checkpoint is still there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        old = {p.name for p in self._tensor_files()}
        name = f"state-{state.step:08}.safetensors"
        if name == self._current():  # a second checkpoint of one step, when the reason for stopping is added
            name = f"state-{state.step:08}b.safetensors"
        copied = {k: v.detach().cpu().clone(memory_format=_CONTIGUOUS) for k, v in tensors.items()}
        file = save_tensors(copied, self.path / name)
        _force_to_disk(file)
        values = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "tensors": name, "sha256": hash_file(file)}
        if (self.path / HISTORY_FILE).exists():
            _force_to_disk(self.path / HISTORY_FILE)
        write_json(self.path / STATE_FILE, {**values, "state": asdict(state)})
        for stale in [self.path / n for n in old - {name}] + list(self.path.glob("state-*.partial")):
            stale.unlink(missing_ok=True)

    def append(self, record: StepRecord) -> None:
        """Add one step to the history."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / HISTORY_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def truncate_history(self, step: int) -> list[StepRecord]:
        """Cut the history back to `step` and return what is left, oldest first."""
        file = self.path / HISTORY_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept: list[StepRecord] = []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that a kill cut short; what follows cannot be older
            if record["step"] > step:
                break
            kept.append(record)
        if len(kept) < step:
            warnings.warn(f"{file}: holds {len(kept)} of the {step} steps done; the others are lost", stacklevel=2)
        if kept or lines:
            text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
            write_atomically(file, text)
        return kept

    def read_record(self) -> dict[str, Any] | None:
        """The deletion record, `None` when the run has none yet."""
        return read_record(self.path) if (self.path / RECORD_FILE).exists() else None

    def replace_adapter(self, save: Callable[[Path], None]) -> dict[str, str]:
        """Let `save(folder)` write the adapter, put it in place, return file name -> SHA-256."""
        target, partial = self.path / ADAPTER_FOLDER, self.path / (ADAPTER_FOLDER + ".partial")
        for stale in (partial, target):
            if stale.exists():
                shutil.rmtree(stale)
        save(partial)
        os.replace(partial, target)
        files = sorted(p for p in target.rglob("*") if p.is_file())
        return {p.relative_to(self.path).as_posix(): hash_file(p) for p in files}

    def _current(self) -> str | None:
        file = self.path / STATE_FILE
        return str(self._read_json(file).get("tensors")) if file.exists() else None

    def _tensor_files(self) -> list[Path]:
        return sorted(self.path.glob("state-*.safetensors"))

    def _read_json(self, file: Path) -> dict[str, Any]:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}: no such file, expected the state of a run") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: got no JSON ({error}), expected the state of a run; {_ELSEWHERE}") from error
        found = (values.get("schema"), values.get("schema_version")) if isinstance(values, dict) else None
        if not isinstance(values, dict) or found != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"{file}: expected schema {SCHEMA!r} version {SCHEMA_VERSION}, got {found}; {_ELSEWHERE}")
        return values


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two settings, one line each, nested settings by dotted name.

    Example:
        >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
        ['lr: 0.1 in the run, 0.2 now']
    """
    out = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            out.append(f"{prefix}{key}: {old!r} in the run, {new!r} now")
    return out


def _force_to_disk(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
