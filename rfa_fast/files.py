"""Files that are whole or not there, made by one process at a time, and read with their name in every error."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import Tensor, nn

Content = TypeVar("Content")


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` to `path`, a text in UTF-8, so that a reader, a crash or a full disk never sees half a file.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the file cannot be written; the previous file, if any, is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "a.txt", "hello").read_text()
        'hello'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: got a folder, expected a file to write, such as {path / 'report'}")
    target = Path(os.path.realpath(path))  # through a link, so that the link stays one
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        kept = "the file that was there is untouched" if path.exists() else "nothing was written"
        message = f"cannot write ({error.strerror or error}); {kept}; free space there or choose another folder"
        raise OSError(error.errno, message, str(path)) from error
    return path


def save_tensors(
    tensors: Mapping[str, Tensor] | nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors to `path` as safetensors; a reader, a crash or a full disk never sees half a file.

    A full disk is no `OSError` to safetensors; here it is one, so that whoever rescues a run sees it for what it is.
    The bytes are not forced to the disk.

    Args:
        tensors: by name, contiguous and none sharing memory; or a module, of which shared tensors are stored once.
        path: the file, in a folder that is there.
        metadata: of the file.

    Raises:
        OSError: the file cannot be written; the previous file, if any, is untouched.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_file(save_tensors({"a": torch.ones(2)}, Path(folder) / "a.safetensors"))
        {'a': tensor([1., 1.])}
    """
    from safetensors.torch import save_file, save_model

    path, given = Path(path), None if metadata is None else dict(metadata)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # what anybody's file has here; safetensors may take 0600
        with full_disk_as_os_error(path):
            if isinstance(tensors, Mapping):
                save_file(dict(tensors), partial, metadata=given)
            else:
                save_model(tensors, str(partial), metadata=given)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def full_disk_as_os_error(path: Path) -> Iterator[None]:
    """Context in which what safetensors cannot write to `path` is an `OSError`, as for everybody else.

    Example:
        >>> from safetensors import SafetensorError
        >>> with full_disk_as_os_error(Path("a")):
        ...     raise SafetensorError("No space left on device")
        Traceback (most recent call last):
        OSError: a: cannot be written (No space left on device); free space there or choose another folder
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}); free space there or choose another folder") from error


def made_once(
    path: str | os.PathLike[str],
    read: Callable[[], Content | None],
    make: Callable[[], Content],
    say: Callable[[str], object] = print,
) -> Content:
    """What a file holds: read, or made by one process, for which others that want it wait.

    Args:
        path: the file.
        read: what it holds; `None` where it is not there or no good.
        make: makes that, and writes the file.
        say: is told that another process is at it.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "row.txt"
        ...     made_once(path, lambda: path.read_text() if path.is_file() else None, lambda: "made"), path.is_file()
        ('made', False)
    """
    version = _version(path)
    found = read()
    if found is not None:
        return found
    with _one_at_a_time(Path(path), say):
        # Somebody may have made it meanwhile.
        found = None if _version(path) == version else read()
        return make() if found is None else found


@contextmanager
def _one_at_a_time(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Context in which no other process makes the same file.

    What locks is an empty file beside it, whose name begins with a dot and which stays, for all users of the
    folder; a process that is killed lets go of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), thread_local=False, mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{path.name}: another process is making it; waiting for that")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _version(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells one content of a file from another: when it was written, in ns, and its size; `None` for no file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def read_object(file: Path, expected: str, prefix: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        expected: what it is, for a message.
        prefix: of a message.

    Raises:
        ValueError: no JSON, or no object.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = file.write_text('{"a": 1}')
        >>> read_object(file, "a model's configuration")
        {'a': 1}
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{prefix}{file}: got no JSON ({error}), expected {expected}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{prefix}{file}: got {type(values).__name__}, expected a JSON object")
    return values
