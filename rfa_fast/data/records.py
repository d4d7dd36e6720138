"""The user's own texts: .jsonl and .csv files with a text and a label per record.

Labels are class indices when they are integers, else class names, numbered in alphabetical order. A
file that mixes the two is refused rather than guessed at, until the caller lists the classes: one
slip of the pen would turn the indices of a whole file into names. Every error names the line, which
is what one needs in a file of a million records.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import TextDataset
from rfa_fast.data.own import class_names, encodes, held_out, largest_index, named_in_unicode, spelled
from rfa_fast.data.sources import read_text
from rfa_fast.data.splits import stratified_split
from rfa_fast.data.tables import json_lines
from rfa_fast.names import some

_OTHERS = "other names are given with text= and label= (--data-option text=…)"

# A .csv knows texts only.
INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")  # 01 is a name
# What pandas makes of an integer column with a gap. As a name, 10.0 would be numbered before 2.0.
WHOLE = re.compile(r"[+-]?[0-9]+\.0+")


class Record(NamedTuple):
    """A text with its label, as they stand in `line` of a file."""

    text: str
    label: int | str
    line: int


def load_records(
    path: str | os.PathLike[str],
    *,
    test: str | os.PathLike[str] | None = None,
    text: str = "text",
    label: str = "label",
    classes: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """A .jsonl or .csv file with a text and a label in each record.

    Args:
        path: the file. A .jsonl has a JSON object per line; a .csv a header line.
        test: a file of the same kind with the test set; else a share of each class becomes one.
        text, label: names of the two fields; others are ignored. An integer is the name that it spells.
        classes: class names by index; a label is then one of them, or an index. `None`: as above.
        test_fraction, seed: the share, and what it is drawn with.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `classes` is no list of names, or another option no name.
        ValueError: a line that is no JSON object, a row with too many or too few fields, a field missing, an
            empty text or half of a character, a label of another kind, unknown, written as 10.0, or too large to
            be a class index (:func:`~rfa_fast.data.own.largest_index`); names the line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mail.csv"
        >>> _ = file.write_text("text,label\\nbuy now,spam\\nlunch?,ham\\nwin,spam\\nhello,ham\\n")
        >>> data = load_records(file, test_fraction=0.5)
        >>> data.classes, sorted(data.train.texts + data.test.texts)
        (('ham', 'spam'), ['buy now', 'hello', 'lunch?', 'win'])
    """
    path = named_in_unicode(Path(path))
    text, label = (spelled(name, value, "the name of a field") for name, value in (("text", text), ("label", label)))
    known = None if classes is None else class_names("classes", classes)
    files = [path]
    if test is not None:
        given = test if isinstance(test, os.PathLike) else spelled("test", test, "a file")
        files.append(named_in_unicode(Path(given)))
    parts = [(file, read_records(file, text, label, mixed=known is not None)) for file in files]
    records = parts[0][1]
    names = _classes(path, records, label) if known is None else known
    notes: list[str] = []
    if known is None and isinstance(records[0].label, str):
        notes.append(f"labels numbered alphabetically: {some([f'{name} {i}' for i, name in enumerate(names)], 5)}")
    index = {name: i for i, name in reversed([*enumerate(names)])}
    datasets: list[TextDataset] = []
    for file, part in parts:
        labels = [_label(file, record, index, names, label, indices=known is not None) for record in part]
        datasets.append(TextDataset([record.text for record in part], labels, names, ids=[r.line for r in part]))
    if test is None:
        whole = datasets.pop()
        try:
            sides = stratified_split(whole.labels, test_fraction, seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; or give a file of its own with test=") from error
        for side in sides:
            datasets.append(
                TextDataset(
                    [whole.texts[i] for i in side],
                    [whole.labels[i] for i in side],
                    names,
                    ids=[records[i].line for i in side],
                )
            )
        instead = "name a file as the test set with test= (--data-option test=FILE)"
        notes.append(held_out(len(sides[1]), len(records), "records", instead))
    return DataBundle(path.stem, datasets[0], datasets[1], names, "text", str(path), "the user's own", tuple(notes))


def read_records(path: Path, text: str = "text", label: str = "label", *, mixed: bool = False) -> list[Record]:
    """The records of a .jsonl or .csv file; `mixed` allows integer labels beside names.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_records`.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mail.jsonl"
        >>> _ = file.write_text('{"text": "hello", "label": 0}\\n')
        >>> read_records(file)
        [Record(text='hello', label=0, line=1)]
    """
    content = read_text(path)
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: got suffix {suffix!r}, expected .jsonl or .csv")
    records = (_jsonl if suffix == ".jsonl" else _csv)(path, content, text, label)
    if not records:
        raise ValueError(f"{path}: got no record, expected at least one with {text!r} and {label!r}")
    first = records[0]
    for record in records:
        if not record.text.strip():
            raise ValueError(f"{path}, line {record.line}: {text}: got an empty text, expected one to learn from")
        for field, value in ((text, record.text), (label, record.label)):
            if isinstance(value, str) and not encodes(value):
                raise ValueError(
                    f"{path}, line {record.line}: {field}: got half of a character (one of \\ud800 to \\udfff "
                    "alone), expected Unicode text; mend or drop the line"
                )
        if not mixed and isinstance(record.label, str) and WHOLE.fullmatch(record.label):
            raise ValueError(
                f"{path}, line {record.line}: {label}: got {record.label!r}, expected an integer or a name; write "
                "integers (in pandas: .astype('Int64')), or list the names with classes="
            )
        if not mixed and type(record.label) is not type(first.label):
            kind = "a name" if isinstance(first.label, str) else "an integer"
            raise ValueError(
                f"{path}, line {record.line}: {label}: got {record.label!r}, expected {kind} as in line {first.line}; "
                "if both are names, list them with classes="
            )
    return records


def _jsonl(path: Path, content: str, text: str, label: str) -> list[Record]:
    records: list[Record] = []
    for number, values in json_lines(path, content):
        for name in (text, label):
            if name not in values:
                got = ", ".join(values)
                raise ValueError(f"{path}, line {number}: got fields {got}, expected {name!r} among them; {_OTHERS}")
        if not isinstance(values[text], str):
            raise ValueError(f"{path}, line {number}: {text}: got {values[text]!r}, expected a string")
        if isinstance(values[label], bool) or not isinstance(values[label], int | str):
            raise ValueError(f"{path}, line {number}: {label}: got {values[label]!r}, expected an integer or a string")
        records.append(Record(values[text], values[label], number))
    return records


def _csv(path: Path, content: str, text: str, label: str) -> list[Record]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # Python's own is 128 KiB a field
    rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for row in reader:
            if row:
                rows.append((begin, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin}: got {error}, expected comma-separated values") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{path}: got no line, expected a header with {text!r} and {label!r}")
    header = [name.strip() for name in rows[0][1]]
    for name in (text, label):
        if header.count(name) != 1:
            got = ", ".join(header)
            raise ValueError(f"{path}, line {rows[0][0]}: got columns {got}, expected one {name!r}; {_OTHERS}")
    at_text, at_label = header.index(text), header.index(label)
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: got {len(row)} values, expected {len(header)}, as in the header")
        if not row[at_label].strip():
            raise ValueError(f"{path}, line {line}: {label}: got nothing, expected a class")
    records: list[Record] = []
    for line, row in rows[1:]:
        value = row[at_label].strip()
        records.append(Record(row[at_text], int(value) if INTEGER.fullmatch(value) else value, line))
    return records


def _classes(path: Path, records: Sequence[Record], field: str) -> tuple[str, ...]:
    """The classes where nobody listed them: 0 to the largest label, or the names in alphabetical order."""
    if isinstance(records[0].label, str):
        return tuple(sorted({str(record.label) for record in records}))
    last, most = max(records, key=lambda record: int(record.label)), largest_index(len(records))
    if int(last.label) > most:
        raise ValueError(
            f"{path}, line {last.line}: {field}: got {last.label}, expected a class index, at most {most} among "
            f"{len(records)} records; list the labels with classes=, or name another field with label="
        )
    return tuple(str(index) for index in range(max(0, int(last.label)) + 1))


def _label(
    file: Path, record: Record, index: Mapping[str, int], classes: Sequence[str], field: str, *, indices: bool
) -> int:
    """The class index of a record, whose label is a class or, with `indices`, the index of one."""
    label = record.label
    if str(label) in index:
        return index[str(label)]
    if indices and isinstance(label, int) and 0 <= label < len(classes):
        return label
    expected = f"one of {some(classes, 20)}" + (f", or 0 to {len(classes) - 1}" if indices else "")
    raise ValueError(f"{file}, line {record.line}: {field}: got {label!r}, expected {expected}")
