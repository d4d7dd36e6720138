"""Files that are whole or not there, and made by one process at a time."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


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


@contextmanager
def one_at_a_time(path: str | os.PathLike[str], say: Callable[[str], object] = print) -> Iterator[None]:
    """Context in which no other process makes the same file; a second one waits, and looks whether it is there now.

    What locks is an empty file beside it, whose name begins with a dot and which stays, for all users of the
    folder; a process that is killed lets go of it.

    Args:
        path: the file that is about to be made.
        say: is told that somebody else is at it.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, one_at_a_time(Path(folder) / "row.json"):
        ...     write_atomically(Path(folder) / "row.json", "{}").name
        'row.json'
    """
    path = Path(path)
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


def version_of(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells one content of a file from another: when it was written, in ns, and its size; `None` for no file.

    Example:
        >>> version_of("no such file") is None
        True
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
