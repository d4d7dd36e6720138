"""Where data lies on this machine, and what to say when it does not.

Nothing is downloaded. A data set comes from a package that the user installs with the tool of their
system (apt, pip), from the local cache of the Hugging Face hub, or from a folder below
`$RFA_FAST_DATA`; all are looked for each time, so that a variable set in a running session counts. The
price is one command by hand; the gain is that a run never depends on a server, and that the licence
is met where the data is installed.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rfa_fast.hub import hub_folder

DATA_VARIABLE = "RFA_FAST_DATA"


@dataclass(frozen=True)
class Source:
    """The places of one data set, in the order in which they are tried.

    Attributes:
        name: the data set's name.
        get: the command that installs it.
        folders: fixed places (an absolute path), as a distribution's package leaves them.
        package: an importable package that carries the files; it is found but never imported.
        inside: the path of the files below the package.
        aliases: other names that its folder may have below `$RFA_FAST_DATA`, as an archive unpacks.
        hub: its name on the Hugging Face hub, see :func:`rfa_fast.hub.hub_folder`.
        put: what goes into the folder below `$RFA_FAST_DATA`, in words.
    """

    name: str
    get: str
    folders: tuple[str, ...] = ()
    package: str = ""
    inside: str = ""
    aliases: tuple[str, ...] = ()
    hub: str = ""
    put: str = "it"

    def places(self) -> list[Path]:
        """Every place that is looked at on this machine, the user's own first."""
        places: list[Path] = []
        if root := os.environ.get(DATA_VARIABLE):
            places.extend(Path(root) / name for name in (self.name, *self.aliases))
            if self.package:
                places.append(Path(root) / self.package / self.inside)
        if self.package:
            spec = find_spec(self.package)
            roots = spec.submodule_search_locations if spec is not None else None
            places.extend(Path(location) / self.inside for location in roots or ())
        places.extend(Path(folder) for folder in self.folders)
        if self.hub and (cached := hub_folder(self.hub)) is not None:
            places.append(cached)
        return places

    def find(self) -> Path | None:
        """The first place that exists, or `None`."""
        return next((place for place in self.places() if place.exists()), None)

    def require(self, root: str | os.PathLike[str] | None = None) -> Path:
        """The place to read from: `root` when given, else the first that exists.

        Raises:
            FileNotFoundError: there is none; the message holds the command that installs it.
        """
        place = Path(root) if root is not None else self.find()
        if place is None or not place.exists():
            raise FileNotFoundError(self.missing(str(place) if place is not None else None))
        return place

    def missing(self, what: str | None) -> str:
        """The message for a file or folder `what` of this data set that is not there."""
        subject = f"{what} does not exist" if what else f"not found; looked in {self._looked()}"
        unset = "" if os.environ.get(DATA_VARIABLE) else f" ({DATA_VARIABLE}: a folder of your choice; it is not set)"
        return (
            f"{self.name}: {subject}. Get it with `{self.get}`, or put {self.put} into "
            f"${DATA_VARIABLE}/{self.name}{unset}"
        )

    def _looked(self) -> str:
        """Where it was looked for, in words."""
        words = [str(place) for place in self.places()]
        if self.package and not words:
            words.append(f"the installed packages (no {self.package!r} among them)")
        if self.hub and hub_folder(self.hub) is None:
            words.append(f"the hub's local cache (no {self.hub!r} in it)")
        return ", ".join(words) or f"no folder, as {DATA_VARIABLE} is not set"


def read_bytes(path: Path, source: Source | None = None) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: it is not there; with the command that installs it when `source` is given.
    """
    if not path.is_file():
        raise FileNotFoundError(source.missing(str(path)) if source else f"{path} does not exist, expected a file")
    return path.read_bytes()


def read_text(path: Path, source: Source | None = None) -> str:
    """The content of a UTF-8 file, with a byte-order mark dropped.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not UTF-8.
    """
    return decode_text(path, read_bytes(path, source))


def gunzip(path: Path, content: bytes) -> bytes:
    """The bytes that the gzip file `content` of `path` holds.

    Raises:
        ValueError: it is no gzip file, or is cut short.
    """
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: got {error}, expected a whole gzip file; fetch it again") from error


def decode_text(path: Path, content: bytes) -> str:
    """`content` of `path` as UTF-8.

    Raises:
        ValueError: it is not UTF-8; names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: got the byte 0x{content[error.start]:02x} that is not UTF-8, expected UTF-8 text"
        ) from error
