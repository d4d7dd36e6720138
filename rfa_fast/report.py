"""What a run found, as one object: a table on the screen, a JSON file, one HTML page.

A report holds numbers, never rendered text: accuracies are fractions, times are seconds, and every
gap to the retrained model is computed when it is shown. The JSON is therefore the report, and the
table and the page are two views of it. The price is that a scenario lists the meaning of its
columns (:class:`Metric`) beside its rows; in return a language model's perplexities need no code.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rfa_fast.files import write_atomically
from rfa_fast.report_chart import Chart
from rfa_fast.report_data import Example, MethodRow, Metric, Scenario, standard_metric
from rfa_fast.report_values import as_list, as_mapping, as_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Chart",
    "Example",
    "MethodRow",
    "Metric",
    "RunReport",
    "Scenario",
    "installed_versions",
    "standard_metric",
    "write_atomically",
]

SCHEMA = "rfa-fast/report"
SCHEMA_VERSION = 1

_PACKAGES = ("rfa-fast", "torch", "torchvision", "transformers", "peft", "numpy", "scikit-learn")
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

T = TypeVar("T")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, without importing any of them.

    Example:
        >>> "torch" in installed_versions()
        True
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # optional, or a bare checkout: absent from the list
            continue
    return versions


@dataclass(eq=False)
class RunReport:
    """Everything a run reports. Two reports are equal when they would write the same JSON.

    Attributes:
        title: the heading.
        scenarios: in the order shown.
        seed: of the run, or `None`.
        command: what to type to get the same figures.
        summary: a paragraph below the heading.
        created: ISO 8601 time; now, in UTC, unless given.
        versions: package -> version; those installed, unless given.
        machine: for instance `"2 cores, no GPU"`.
        notes: sentences about the whole run.

    Example:
        >>> report = RunReport("digits", [Scenario("forget 3", [MethodRow("RFA", {"D_f": 0.0}, 1.5)])], seed=0)
        >>> RunReport.from_dict(report.to_dict()) == report
        True
    """

    title: str
    scenarios: list[Scenario] = field(default_factory=list)
    seed: int | None = None
    command: str = ""
    summary: str = ""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=installed_versions)
    machine: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("title", "command", "summary", "created", "machine"):
            as_text(name, getattr(self, name))
        self.scenarios = as_list("scenarios", self.scenarios, Scenario)
        self.notes = as_list("notes", self.notes, str)
        self.versions = {
            as_text("versions", k): as_text("versions", v) for k, v in as_mapping("versions", self.versions).items()
        }
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed: got {self.seed!r}, expected an integer or None")

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, RunReport) else NotImplemented

    def print(self, console: Console | None = None) -> None:
        """Print one table per scenario, at most as wide as the console (80 columns where that is unknown).

        Beside each figure, dimmed, its difference from Retrain; below it where the line would not fit.

        Example:
            >>> from rich.console import Console
            >>> RunReport("digits").print(Console(width=80))
            digits
        """
        from rfa_fast.report_table import print_report

        print_report(self, console)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, with the schema's name and version.

        A number that is not finite becomes `None`, and `not_finite` maps its place (a JSON pointer,
        RFC 6901) to `"nan"`, `"inf"` or `"-inf"`.
        """
        body = asdict(self)
        not_finite = dict(_replace_not_finite(body, ""))
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **body, "not_finite": not_finite}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunReport:
        """The report from what :meth:`to_dict` gave.

        Raises:
            ValueError: another schema or version, an unknown or missing key.
            TypeError: a value of the wrong type.
        """
        found = (values.get("schema"), values.get("schema_version")) if isinstance(values, Mapping) else (None, None)
        if found != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"schema: got {found[0]!r} v{found[1]!r}, expected {SCHEMA!r} v{SCHEMA_VERSION}")
        body = json.loads(json.dumps(values))  # a deep copy in which everything is a plain JSON value
        del body["schema"], body["schema_version"]
        for pointer, name in body.pop("not_finite", {}).items():
            _restore(body, pointer, name)
        for scenario in body.get("scenarios", []):
            for key, kind in (("rows", MethodRow), ("metrics", Metric), ("examples", Example), ("charts", Chart)):
                if isinstance(scenario, dict) and isinstance(scenario.get(key), list):
                    scenario[key] = [_build(kind, item, key) for item in scenario[key]]
        body["scenarios"] = [_build(Scenario, item, "scenarios") for item in body.get("scenarios", [])]
        return _build(cls, body, "report")

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all, and return the path; parent folders are made.

        Raises:
            IsADirectoryError: `path` is a folder.
            OSError: the file cannot be written; what was there before is untouched.

        Example:
            >>> import tempfile
            >>> report = RunReport("digits", seed=0)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RunReport.from_json(report.to_json(Path(folder) / "report.json")) == report
            True
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        # One line per list of numbers. A JSON string holds no bare line break, so none can match.
        text = re.sub(r'\[\n[^\[\]{}"]*\n\s*\]', lambda m: re.sub(r"\s+", " ", m[0]), text)
        return write_atomically(path, text + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RunReport:
        """Read a report that :meth:`to_json` wrote; it equals the one that was written.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a report of this schema version.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: expected a report written by rfa-fast, but {error}") from error

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page that needs no other file, whole or not at all; see :meth:`to_json`.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RunReport("digits").to_html(Path(folder) / "report.html").name
            'report.html'
        """
        from rfa_fast.report_page import render

        return write_atomically(path, render(self))


def _replace_not_finite(node: Any, pointer: str) -> Iterator[tuple[str, str]]:
    """Put `None` for every number that is not finite, in place; yield (JSON pointer, its name)."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        place = f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"
        if isinstance(value, dict | list):
            yield from _replace_not_finite(value, place)
        elif isinstance(value, float) and not math.isfinite(value):
            node[key] = None
            yield place, "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _restore(body: Any, pointer: str, name: str) -> None:
    """Undo one replacement of :func:`_replace_not_finite`."""
    *parents, last = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
    node = body
    try:
        for step in parents:
            node = node[int(step) if isinstance(node, list) else step]
        node[int(last) if isinstance(node, list) else last] = _SPECIAL[name]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"not_finite: {pointer!r} -> {name!r} names no number of the report") from error


def _build(kind: type[T], values: Any, where: str) -> T:
    """The dataclass from a dict that has every field without a default and no unknown one."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(as_mapping(where, values)) - set(known))
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if unknown or missing:
        raise ValueError(f"{where}: got unknown keys {unknown} and no {missing}, expected {sorted(known)}")
    return kind(**values)
