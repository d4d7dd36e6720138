"""Files of a report are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfa_fast.files import save_tensors
from rfa_fast.report import RunReport, write_atomically


def fail_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after eight characters."""
    real = Path.open

    def opened(self: Path, *args: Any, **options: Any) -> Any:
        file = real(self, *args, **options)
        write = file.write

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, text: str) -> None:
                write(text[:8])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    monkeypatch.setattr(Path, "open", opened)


def fail_at(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, name, full)

    return install


@pytest.mark.parametrize(
    "fail", [fail_half_written, fail_at("fsync"), fail_at("replace")], ids=["write", "fsync", "replace"]
)
@pytest.mark.parametrize("method", ["to_json", "to_html"])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None], method: str
) -> None:
    path = tmp_path / "report"
    report = RunReport("new")
    path.write_text("old")
    with monkeypatch.context() as patched:
        fail(patched)
        with pytest.raises(OSError, match="untouched") as caught:
            getattr(report, method)(path)
        with pytest.raises(OSError, match="nothing was written"):
            getattr(report, method)(tmp_path / "first")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert os.listdir(tmp_path) == ["report"]
    assert path.read_text() == "old"
    getattr(report, method)(path)
    assert "new" in path.read_text()
    assert os.listdir(tmp_path) == ["report"]


def test_an_interrupt_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == []


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="folder"):
        RunReport("digits").to_json(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="nothing was written"):
        write_atomically(tmp_path / "file" / "report", "text")
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "through"


def test_tensors_may_be_read_by_whom_the_umask_lets_read(tmp_path: Path) -> None:
    """As every other file; a cache of trained models is for all users of its folder."""
    before = os.umask(0o022)
    try:
        saved = save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        assert saved.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
