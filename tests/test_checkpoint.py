"""The files of a run: complete at every instant, whatever stops the process that writes them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rfa_fast.methods.checkpoint import RunFolder, RunState, differences


def test_killed_between_the_two_files_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.save(RunState(step=1), {"a": torch.ones(2)})
    replace = os.replace

    def fails(source: Any, target: Any) -> None:
        if Path(target).name == "state.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        folder.save(RunState(step=2), {"a": torch.zeros(2)})
    monkeypatch.undo()
    assert folder.read_state().step == 1
    assert torch.equal(folder.read_tensors()["a"], torch.ones(2))
    folder.save(RunState(step=3), {"a": torch.zeros(2)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-00000003.safetensors", "state.json"]


def test_remains_of_a_killed_write_are_cleared(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("state-00000009.safetensors", "state-00000009.safetensors.partial"):
        (tmp_path / name).write_bytes(b"half a")
    folder.save(RunState(step=1), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-00000001.safetensors", "state.json"]
    folder.save(RunState(step=1, stopped="finished"), {})
    assert folder.read_state().stopped == "finished"
    assert folder.read_tensors() == {}
    assert len(list(tmp_path.iterdir())) == 2


def test_folder_whose_state_cannot_be_read_is_still_another_run(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(FileExistsError, match="already holds a run whose state cannot be read"):
        RunFolder(tmp_path).refuse_other_run()


def test_history_shorter_than_the_state_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder.truncate_history(2) == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "history.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.warns(UserWarning, match="2 of the 5 steps"):
        folder.truncate_history(5)


def test_differences_of_nested_settings() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == ["a.c: 2 in the run, 3 now"]
    assert differences({"a": 1}, {"a": {"b": 1}}) == ["a: 1 in the run, {'b': 1} now"]
