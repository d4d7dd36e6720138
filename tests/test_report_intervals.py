"""Figures with an interval and with what was published beside them, and the charts of a report."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rfa_fast.plots_chart import chart_plot
from rfa_fast.report import Chart, MethodRow, RunReport, Scenario
from rfa_fast.report_page import render


def scenario(**changes: Any) -> Scenario:
    rows = [
        MethodRow("Retrain", {"D_f": 0.0, "D_rt": 0.914}, 400.0, spread={"D_rt": 0.004}, published={"D_rt": 0.9633}),
        MethodRow("SCRUB", {"D_f": 0.1204, "D_rt": 0.87}, 40.0, spread={"D_f": 0.0303, "D_rt": 0.011}),
        MethodRow("RFA", {"D_f": 0.0012}, 30.0, published={"D_f": 0.0063, "D_rt": 0.9594}),
    ]
    chart = Chart("Accuracy over γ", ["0.1", "0.9"], {"D_f": [0.3, 0.1]}, {"D_f": [0.02, math.nan]}, unit="%")
    return Scenario("forget 3", rows, charts=[chart], source="Table I <b>", **changes)


def test_the_screen_shows_intervals_and_a_row_of_published_figures() -> None:
    console = Console(file=io.StringIO(), width=100)
    RunReport("t", [scenario()]).print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "SCRUB 12.0±3.0 +12.0 87.0±1.1 -4.4 40.0 s" in lines
    assert "RFA 0.1 +0.1 30.0 s" in lines
    at = lines.index("RFA 0.1 +0.1 30.0 s")
    assert lines[at + 1] == "paper 0.6 95.9"
    assert any("±: half a 95 % interval" in line and "paper: Table I <b>" in line for line in lines)
    dots = [line.index(".") for line in text.splitlines() if line.startswith(("SCRUB", "RFA", "  paper    0"))]
    assert len(set(dots)) == 1  # figures and published figures stand below each other


def test_the_page_shows_both_beside_the_figure_and_escapes_the_source() -> None:
    page = render(RunReport("t", [scenario()], created="2026-01-01T00:00:00+00:00"))
    assert re.search(r'12\.04\s*<small class="spread"> ± 3\.03</small>', page)
    assert re.search(r'0\.12\s*<span class="published">0\.63</span>', page)
    assert "Table I &lt;b&gt;" in page
    assert "Table I <b>" not in page.split('<script type="application/json"')[0]
    assert "Accuracy over γ" in page
    assert "D<sub" not in page.split("<style>")[1].split("</style>")[0]


def test_a_report_without_any_of_it_looks_as_it_did() -> None:
    page = render(RunReport("t", [Scenario("s", [MethodRow("Retrain", {"D_f": 0.0}), MethodRow("RFA", {"D_f": 0.1})])]))
    assert 'class="spread"' not in page
    assert 'class="published"' not in page


def test_intervals_and_charts_come_back_from_json_and_an_older_file_is_still_read(tmp_path: Path) -> None:
    report = RunReport("t", [scenario()])
    assert RunReport.from_json(report.to_json(tmp_path / "r.json")) == report
    old = report.to_dict()
    del old["scenarios"][0]["charts"], old["scenarios"][0]["source"], old["not_finite"]
    for row in old["scenarios"][0]["rows"]:
        del row["spread"], row["published"]
    assert RunReport.from_dict(old).scenarios[0].rows[0].spread == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"series": {"a": [1.0]}}, "got 1 figures, expected 2"),
        ({"spread": {"b": [1.0, 2.0]}}, r"got \['b'\]"),
        ({"kind": "pie"}, "'pie'"),
        ({"unit": "s"}, "'s'"),
        ({"x": ["1", 2]}, "list of str"),
    ],
    ids=["length", "spread", "kind", "unit", "label"],
)
def test_a_chart_that_cannot_be_drawn_is_refused(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"title": "c", "x": ["1", "2"], "series": {"a": [1.0, 2.0]}}
    with pytest.raises((ValueError, TypeError), match=message):
        Chart(**(values | changes))


def test_charts_name_what_they_show_and_say_so_when_there_is_nothing() -> None:
    line = chart_plot(scenario().charts[0], "x")
    assert line.caption == "D_f 30 % at 0.1, 10 % at 0.9."
    assert "0.9" in line.svg
    assert line.svg == chart_plot(scenario().charts[0], "x").svg
    bars = chart_plot(Chart("Gap", ["NegGrad", "RFA <i>"], {"gap": [3.0, 0.5]}, kind="bar"), "y")
    assert bars.caption == "Least: RFA <i>, 0.5."
    assert "RFA &lt;i&gt;" in bars.svg
    assert chart_plot(Chart("Gap", ["a"], {"gap": [math.nan]})).missing
