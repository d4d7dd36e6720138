"""Files that are whole or not there: the one way a text or some bytes reach the disk."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


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
