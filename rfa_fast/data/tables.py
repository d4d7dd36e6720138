"""Rows of named fields from the files that data sets are published in: JSON, JSON lines, Parquet, Arrow.

JSON needs nothing besides Python. Parquet and Arrow (what `datasets` writes with `save_to_disk`) are read
by pyarrow, which comes with `datasets` and is not asked for otherwise: 55 MB for a data set that one
may not use. Reading the files ourselves, without `datasets`, keeps loading scripts from being run and
second copies from appearing in a cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfa_fast.data.sources import Source, decode_text, gunzip, read_bytes

# In the order in which they are preferred where a table is there more than once.
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")
# pyarrow before 14.0.1 unpickles what a file says of its types (CVE-2023-47248).
PYARROW = 15


@dataclass(frozen=True)
class Row:
    """One row, with its place for messages.

    Attributes:
        file: where it stands.
        place: "line 3" of lines, else "row 3", counted from 1.
        values: its fields.
    """

    file: Path
    place: str
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that is a text.

        Raises:
            ValueError: it is missing, or something else.

        Example:
            >>> Row(Path("a.jsonl"), "line 3", {"title": 7}).text("title")
            Traceback (most recent call last):
            ...
            ValueError: a.jsonl, line 3: title: got 7, expected a string
        """
        value = self._value(name)
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def texts(self, name: str, within: str | None = None) -> list[str]:
        """A field that is a list of texts; `within` names the field, a mapping, that it stands in."""
        value = self._list(name, within)
        if not all(isinstance(item, str) for item in value):
            raise self.error(name, value, "a list of strings")
        return value

    def integers(self, name: str, within: str | None = None) -> list[int]:
        """A field that is a list of integers, as :meth:`texts`."""
        value = self._list(name, within)
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            raise self.error(name, value, "a list of integers")
        return value

    def index(self, name: str, n: int) -> int:
        """A field that is an integer from 0 to `n` − 1.

        Raises:
            ValueError: it is missing, something else or out of range.
        """
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            raise self.error(name, value, f"an integer from 0 to {n - 1}")
        return value

    def error(self, name: str, value: object, expected: str) -> ValueError:
        """What is wrong with a field."""
        return ValueError(f"{self.file}, {self.place}: {name}: got {_short(value)}, expected {expected}")

    def _value(self, name: str, within: str | None = None) -> Any:
        values = self.values
        if within is not None:
            values = self._value(within)
            if not isinstance(values, Mapping):
                raise self.error(within, values, f"an object with {name!r}")
        if name not in values:
            raise ValueError(f"{self.file}, {self.place}: got fields {', '.join(values)}, expected {name!r} among them")
        return values[name]

    def _list(self, name: str, within: str | None) -> list[Any]:
        value = self._value(name, within)
        if not isinstance(value, list):
            raise self.error(name, value, "a list")
        return value


def read_rows(path: Path, fields: Sequence[str], source: Source | None = None) -> list[Row]:
    """The rows of a file, in order.

    Args:
        path: a file whose name ends as one of :data:`SUFFIXES`.
        fields: those that are needed; of Parquet and Arrow no other is read.
        source: says how to get the file when it is not there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, cut short, no row, a row that is no object; pyarrow is needed and
            not installed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = file.write_text('{"text": "x"}\\n')
        >>> [row.text("text") for row in read_rows(file, ["text"])]
        ['x']
    """
    kind = suffix_of(path)
    if kind is None:
        raise ValueError(f"{path}: got {path.suffix!r}, expected a file ending in {', '.join(SUFFIXES)}")
    content = read_bytes(path, source) if not path.is_file() or kind not in (".parquet", ".arrow") else b""
    if kind in (".parquet", ".arrow"):
        rows = [Row(path, f"row {i}", values) for i, values in enumerate(_columns(path, kind, fields), 1)]
    else:
        text = decode_text(path, gunzip(path, content) if kind.endswith(".gz") else content)
        # Files called .json hold either one list or an object per line.
        listed = text.lstrip().startswith("[")
        rows = _listed(path, text) if listed else [Row(path, f"line {i}", v) for i, v in json_lines(path, text)]
    if not rows:
        raise ValueError(f"{path}: got no row, expected at least one with {', '.join(fields)}")
    return rows


def json_lines(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not empty.

    Raises:
        ValueError: a line is no JSON object; names it.

    Example:
        >>> list(json_lines(Path("a.jsonl"), '{"a": 1}\\n\\n{"a": 2}'))
        [(1, {'a': 1}), (3, {'a': 2})]
    """
    # Not splitlines(): a JSON string may hold U+2028, which is no end of line here.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits is no JSONDecodeError
            raise ValueError(f"{path}, line {number}: got {error}, expected a JSON object") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}, line {number}: got {type(values).__name__}, expected a JSON object")
        yield number, values


def find_tables(folder: Path, *names: str) -> list[Path]:
    """The files of one table anywhere below a folder, sorted; of several formats, those of one.

    A table `train` is `train.jsonl`, `train-00000-of-00002.parquet` and its fellows, or the Parquet and
    Arrow files in a folder `train`.

    Args:
        folder: where to look.
        names: of the table; the first that is there counts.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "train.json").touch()
        >>> [file.name for file in find_tables(folder, "train")]
        ['train.json']
    """
    files = [(path, kind) for path in sorted(folder.rglob("*")) if (kind := suffix_of(path)) and path.is_file()]
    for name in names:
        shards = re.compile(rf"{re.escape(name)}(-\d+-of-\d+)?")
        for kind in SUFFIXES:
            # `cache-….arrow` is what an operation of `datasets` left beside the data.
            found = [
                path
                for path, its in files
                if its == kind
                and (
                    shards.fullmatch(path.name.removesuffix(kind))
                    or (
                        kind in (".parquet", ".arrow")
                        and name in path.relative_to(folder).parts[:-1]
                        and not path.name.startswith("cache-")
                    )
                )
            ]
            if found:
                _check_shards(found)
                return found
    return []


def _check_shards(files: Sequence[Path]) -> None:
    """Of files that say which of how many they are, none is missing."""
    numbered = [(path, match) for path in files if (match := re.search(r"-(\d+)-of-(\d+)", path.name))]
    for path, match in numbered:
        count = int(match[2])
        there = {int(m[1]) for p, m in numbered if m[2] == match[2] and p.parent == path.parent}
        if missing := sorted(set(range(count)) - there):
            raise ValueError(
                f"{path.parent}: got {len(there)} of {count} files like {path.name}, expected number {missing[0]:05d} "
                "too; fetch the data again"
            )


def suffix_of(path: Path) -> str | None:
    """Which of :data:`SUFFIXES` a file has.

    Example:
        >>> suffix_of(Path("train.json.gz")), suffix_of(Path("train.txt"))
        ('.json.gz', None)
    """
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _listed(path: Path, text: str) -> list[Row]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got {error}, expected a JSON list of objects; is the file cut short?") from error
    for i, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, row {i}: got {type(value).__name__}, expected a JSON object")
    return [Row(path, f"row {i}", value) for i, value in enumerate(values, 1)]


def _columns(path: Path, kind: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: is a {kind} file, which needs pyarrow: `pip install pyarrow` (`datasets` brings it as well)"
        ) from error
    if int(pyarrow.__version__.partition(".")[0]) < PYARROW:
        raise ValueError(
            f"pyarrow: got {pyarrow.__version__}, which can be made to unpickle; expected {PYARROW} or later"
        )
    try:
        if kind == ".parquet":
            table = parquet.ParquetFile(path).read()
        else:
            with pyarrow.memory_map(str(path)) as file:
                table = ipc.open_stream(file).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: got {error}, expected a whole {kind} file; fetch it again") from error
    if missing := [name for name in fields if name not in table.column_names]:
        raise ValueError(f"{path}: got fields {', '.join(table.column_names)}, expected {missing[0]!r} among them")
    rows: list[dict[str, Any]] = table.select(list(fields)).to_pylist()
    return rows


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
