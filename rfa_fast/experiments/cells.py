"""Finished rows of a table, each a small JSON file that is read instead of computed again.

A row is identified by what it is called and trusted only if the settings it was made by are those
asked for now. The settings are in the file, in full: who wonders where a figure comes from reads them
there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from rfa_fast.experiments.cache import Say, canonical, settings_key
from rfa_fast.files import made_once, write_atomically

FORMAT = "rfa-fast row 1"

Content = TypeVar("Content")
Holds = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


def slug(text: str) -> str:
    """The text as a file's name.

    Example:
        >>> slug("RFA teacher, lr 5e-04"), slug("class T-shirt/top")
        ('rfa-teacher-lr-5e-04', 'class-t-shirt-top')
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


class CellStore:
    """A folder of finished rows.

    Args:
        folder: made when the first row is kept; `None` keeps nothing.
        say: is told which rows are read, and which are not trusted and why.
        keyed: rows of one name and several settings lie beside each other, as trained models do, and none is
            replaced by another. Without it a folder has one row of a name.
        holds: of the settings of a row that lies there and those asked for: whether it is the same row, with more
            measured than is asked for. `None`: only equal settings will do.

    Attributes:
        computed: whether the last row was computed here, rather than read.
    """

    def __init__(
        self, folder: Path | None, say: Say = print, *, keyed: bool = False, holds: Holds | None = None
    ) -> None:
        self.folder, self.say, self.keyed, self.holds = folder, say, keyed, holds
        self.computed = False

    def get(
        self, name: str, settings: Mapping[str, Any], kind: Callable[..., Content], compute: Callable[[], Content]
    ) -> Content:
        """The row of this name and these settings: read, or computed and kept.

        Args:
            name: becomes the file's name.
            settings: JSON-safe.
            kind: a dataclass of JSON-safe fields.
            compute: makes it.

        Raises:
            OSError: the folder cannot be written.
        """
        path, self.computed = self.path(name, settings), False

        def make() -> Content:
            row, self.computed = compute(), True
            if path is not None:
                content = {"format": FORMAT, "settings": dict(settings), "row": asdict(row)}  # type: ignore[call-overload]
                write_atomically(path, json.dumps(content, indent=1) + "\n")
            return row

        if path is None:
            return make()
        return made_once(path, lambda: self._finished(name, path, settings, kind), make, self.say)

    def _finished(
        self, name: str, path: Path, settings: Mapping[str, Any], kind: Callable[..., Content]
    ) -> Content | None:
        """The row in this file, if it is one of these settings."""
        if path.is_file():
            found = self._read(path, settings, kind)
            if found is not None:
                self.say(f"{name}: finished before, read from {path}")
            return found
        if (more := self._with_more(name, path, settings, kind)) is not None:
            self.say(f"{name}: finished before with more measured, read from {more[0]}")
            return more[1]
        if others := self._others(name, path):
            self.say(f"{name}: {len(others)} in {path.parent} are of other settings or seeds; computing this one")
        return None

    def has(self, name: str, settings: Mapping[str, Any], kind: Callable[..., Any]) -> bool:
        """Whether the row is there, and need not be computed; a file that turns out to be broken is found later."""
        path = self.path(name, settings)
        return path is not None and (path.is_file() or self._with_more(name, path, settings, kind) is not None)

    def _others(self, name: str, path: Path) -> list[Path]:
        """Rows of this name with other settings."""
        return sorted(path.parent.glob(f"{slug(name)}-????????.json")) if self.keyed else []

    def _with_more(
        self, name: str, path: Path, settings: Mapping[str, Any], kind: Callable[..., Content]
    ) -> tuple[Path, Content] | None:
        """A row of this name of which more was measured than these settings ask for, and its file."""
        if self.holds is None:
            return None
        for other in self._others(name, path):
            content, _ = self._content(other, kind)
            if content is not None and self.holds(content["settings"], settings):
                return other, kind(**content["row"])
        return None

    def path(self, name: str, settings: Mapping[str, Any]) -> Path | None:
        """Where the row of this name and these settings is or would be; `None` where nothing is kept."""
        if self.folder is None:
            return None
        return self.folder / (f"{slug(name)}-{settings_key(settings)[:8]}.json" if self.keyed else f"{slug(name)}.json")

    def _content(self, path: Path, kind: Callable[..., Any]) -> tuple[dict[str, Any] | None, str]:
        """Settings and figures in this file if it is a row of this version, else why not."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            return None, f"cannot be read ({error})"
        names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return None, "is no row of this version"
        row, settings = content.get("row"), content.get("settings")
        if not isinstance(row, dict) or set(row) != names or not isinstance(settings, dict):
            return None, "is no row of this version"
        return content, ""

    def _read(self, path: Path, settings: Mapping[str, Any], kind: Callable[..., Content]) -> Content | None:
        content, why = self._content(path, kind)
        if content is None:
            self.say(f"{path}: {why}; computing it again")
            return None
        if canonical(content["settings"]) != canonical(settings):
            self.say(f"{path}: was made by other settings; computing it again")
            return None
        return kind(**content["row"])
