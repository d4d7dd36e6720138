"""The report: figures on the screen, JSON that reads back equal, files written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rfa_fast.report import (
    Example,
    MethodRow,
    Metric,
    RunReport,
    Scenario,
    installed_versions,
    standard_metric,
)
from rfa_fast.report_table import duration, table_cells, verdict


def class_scenario(**changes: Any) -> Scenario:
    values: dict[str, Any] = {
        "title": "forget class 3",
        "rows": [
            MethodRow("Original", {"D_r": 0.9283, "D_f": 0.942, "D_rt": 0.907, "D_ft": 0.92, "MIA": 0.93}, 400.0),
            MethodRow("Retrain", {"D_r": 0.934, "D_f": 0.0, "D_rt": 0.914, "D_ft": 0.0, "MIA": 0.33}, 402.0),
            MethodRow("RFA", {"D_r": 0.932, "D_f": 0.031, "D_rt": 0.8917, "D_ft": 0.0, "MIA": 0.3}, 31.0),
        ],
        "forgotten": ["3"],
        "per_class_before": {"1": 0.9, "2": 0.8, "3": 0.95},
        "per_class_after": {"1": 0.91, "2": 0.75, "3": 0.0},
        "feature_distance": {"D_r": {"layer1.conv": 0.1, "fc": 0.2}, "D_f": {"layer1.conv": 0.5, "fc": 1.5}},
        "confidence": {"forget before": [0.9, 0.95], "forget after": [0.2, 0.4], "test": [0.8, 0.9, 0.7]},
        "losses": [{"step": 1, "total": 2.5, "retain_task": 0.1}, {"step": 2, "total": 1.5, "retain_task": 0.2}],
        "notes": ["a note"],
        "settings": {"lr": 5e-5, "weights": (1, 1), "dtype": torch.float32, "path": Path("runs") / "a"},
    }
    return Scenario(**(values | changes))


def text_scenario() -> Scenario:
    subsets = ("D_r", "D_f", "D_t")
    figures = [f"{subset}/{kind}" for kind in ("perplexity", "accuracy") for subset in subsets]
    rows = [
        MethodRow(method, dict(zip(figures, values, strict=True)), seconds)
        for method, values, seconds in (
            ("Original", (3.41, 3.22, 19.72, 0.931, 0.944, 0.06), 412.0),
            ("Retrain", (3.44, 21.3, 19.81, 0.928, 0.056, 0.06), 398.0),
            ("RFA teacher, deep", (3.52, 16.2, 20.4, 0.917, 0.042, 0.05), 61.0),
        )
    ]
    return Scenario("forget a topic", rows, examples=[Example("Q: who?", "she", "nobody")])


def make_report(*scenarios: Scenario, **changes: Any) -> RunReport:
    values: dict[str, Any] = {"seed": 7, "command": "rfa-fast demo", "created": "2026-01-02T03:04:05+00:00"}
    return RunReport("Digits", list(scenarios or (class_scenario(),)), **(values | changes))


def printed(report: RunReport, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    report.print(console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def line_of(lines: list[str], method: str) -> list[str]:
    return next(line.split() for line in lines if line.strip().startswith(method + " ") and re.search(r"\d", line))


def test_screen_shows_the_figures_as_percentages_and_the_gaps_beside_them() -> None:
    lines = printed(make_report())
    assert line_of(lines, "Original") == ["Original", "92.8", "94.2", "90.7", "92.0", "93.0", "400", "s"]
    assert line_of(lines, "Retrain") == ["Retrain", "93.4", "0.0", "91.4", "0.0", "33.0", "402", "s"]
    rfa = ["93.2", "-0.2", "3.1", "+3.1", "89.2", "-2.2", "0.0", "0.0", "30.0", "-3.0", "31.0", "s"]
    assert line_of(lines, "RFA") == ["RFA", *rfa]
    assert "Method D_r D_f D_rt D_ft MIA Time" in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("width", [80, 60, 120])
@pytest.mark.parametrize("name", ["RFA", "RFA with a teacher and pissa adapters"])
def test_screen_keeps_every_figure_at_any_width(name: str, width: int) -> None:
    rows = [*class_scenario().rows[:2], MethodRow(name, class_scenario().rows[2].metrics, 31.0)]
    text = "\n".join(lines := printed(make_report(class_scenario(rows=rows), text_scenario()), width))
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for figure in ("92.8", "91.4", "89.2", "-2.2", "+3.1", "30.0", "-3.0", "402 s", "16.2", "-5.1", "4.2", "-1.4"):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", text), figure


def test_gaps_and_the_closest_method_are_as_computed_by_hand() -> None:
    rows = [
        MethodRow("Original", {"D_rt": 0.95, "D_f": 1.0, "MIA": 0.9}),
        MethodRow("Retrain", {"D_rt": 0.90, "D_f": 0.10, "MIA": 0.5}),
        MethodRow("above", {"D_rt": 0.96, "D_f": 0.12, "MIA": 0.5}),  # more kept is no fault; 2 points off on D_f
        MethodRow("below", {"D_rt": 0.88, "D_f": 0.05, "MIA": 0.5}),
    ]
    original, retrain, above, below = table_cells(Scenario("s", rows))
    assert [cell.gap for cell in original + retrain] == [""] * 6
    assert [(c.text, c.gap, c.level, c.best) for c in above] == [
        ("96.0", "+6.0", "close", True),
        ("12.0", "+2.0", "near", True),
        ("50.0", "0.0", "close", False),  # a tie is nobody's best
    ]
    assert [(c.text, c.gap, c.level, c.best) for c in below] == [
        ("88.0", "-2.0", "near", False),
        ("5.0", "-5.0", "far", False),
        ("50.0", "0.0", "close", False),
    ]
    sentence = verdict(Scenario("s", rows))
    assert sentence == "above is close to Retrain in 2 of 3 columns, furthest on D_f: 12.00 % against 10.00 %."


def test_a_gap_over_other_runs_than_the_reference_has_is_taken_as_given() -> None:
    rows = [
        MethodRow("Retrain", {"MIA": 0.60, "seconds": 9.0}),
        # Retrain's mean is over three seeds, this row's over one, whose own Retrain has 0.75.
        MethodRow("RFA", {"MIA": 0.70, "seconds": 3.0}, gaps={"MIA": -0.05, "seconds": math.nan}),
        MethodRow("SCRUB", {"MIA": 0.66, "seconds": 3.0}),
    ]
    compared = Scenario("t", rows, [Metric("MIA", unit="%", tolerance=0.05), Metric("seconds")])
    mia, seconds = table_cells(compared)[1]
    assert (mia.gap, mia.level, mia.best) == ("-5.0", "close", True)  # SCRUB's is 6 points
    assert (seconds.text, seconds.gap, seconds.level) == ("3.0", "", "")
    assert verdict(compared).startswith("RFA is close to Retrain in every column")
    again = RunReport.from_dict(json.loads(json.dumps(RunReport("r", [compared]).to_dict())))
    assert again.scenarios[0].rows[1].gaps["MIA"] == -0.05
    assert math.isnan(again.scenarios[0].rows[1].gaps["seconds"])


def test_a_gap_of_exactly_the_tolerance_is_close() -> None:
    rows = [MethodRow("Retrain", {"D_rt": 0.914}), MethodRow("RFA", {"D_rt": 0.904})]
    assert table_cells(Scenario("s", rows))[1][0].level == "close"


@pytest.mark.parametrize(
    ("metric", "value", "reference", "expected"),
    [
        (Metric("a", unit="%"), 0.88, 0.90, 2.0),
        (Metric("a", unit="%", better="higher"), 0.95, 0.90, 0.0),
        (Metric("a", unit="%", better="lower"), 0.95, 0.90, 5.0),
        (Metric("a", tolerance=0.5), 4.0, 3.0, 2.0),
        (Metric("a"), 22.0, 20.0, 2.0),  # 5 % of Retrain's figure
        (Metric("a", better="lower"), 18.0, 20.0, 0.0),
        (Metric("a"), 0.0, 0.0, 0.0),
        (Metric("a"), 0.1, 0.0, math.inf),
    ],
)
def test_shortfall_is_the_gap_in_tolerances(metric: Metric, value: float, reference: float, expected: float) -> None:
    assert metric.shortfall(value, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "extra", "signed", "expected"),
    [
        (0.9949, 0, False, "99.5"),
        (0.9949, 1, False, "99.49"),
        (-0.0001, 0, True, "0.0"),
        (0.0001, 0, True, "0.0"),
        (-0.25, 0, False, "-25.0"),
        (0.25, 0, True, "+25.0"),
        (math.nan, 0, True, "n/a"),
        (-math.inf, 0, False, "-inf"),
    ],
)
def test_figures_are_rounded_and_zero_has_no_sign(value: float, extra: int, signed: bool, expected: str) -> None:
    assert Metric("D_r", unit="%").format(value, extra, signed=signed) == expected


def test_no_reference_row_means_no_gaps() -> None:
    scenario = class_scenario(rows=[r for r in class_scenario().rows if r.method != "Retrain"])
    assert {cell.gap for row in table_cells(scenario) for cell in row} == {""}
    assert verdict(scenario) == ""
    assert "difference" not in "\n".join(printed(make_report(scenario)))


def test_the_sentence_and_the_times_of_a_scenario() -> None:
    rows = [MethodRow("Retrain", {"D_rt": 0.9}, 10.0), MethodRow("RFA", {"D_rt": 0.9}, 20.0), MethodRow("none")]
    expected = "RFA is close to Retrain in every column. It took 20.0 s against 10.0 s: 2.0 times as slow."
    assert verdict(Scenario("s", rows)) == expected
    equal = [rows[0], MethodRow("RFA", {"D_rt": 0.9}, 10.3)]
    assert verdict(Scenario("s", equal)).endswith("It took 10.3 s against 10.0 s: as long.")
    assert verdict(Scenario("s", [rows[0], rows[2]])) == ""
    assert [cell.text for cell in table_cells(Scenario("s", rows))[2]] == [""]
    times = [9.96, 99.96, 3599.0, 3630.0, math.nan]
    assert [duration(seconds) for seconds in times] == ["10.0 s", "100 s", "3599 s", "1 h 0 min", "n/a"]


def test_notes_and_a_wide_table_reach_a_narrow_screen() -> None:
    figures = {f"figure {i}": i + 0.125 for i in range(12)}
    scenario = Scenario("s", [MethodRow("Retrain", figures), MethodRow("RFA", figures)], notes=["of it"])
    lines = printed(RunReport("r", [scenario], summary="in short", notes=["of all"]), 50)
    assert max(map(len, lines)) <= 50
    assert [
        figure for figure in ("0.125", "11.125", "in short", "of it", "of all") if figure not in "\n".join(lines)
    ] == []


def test_markup_in_a_title_is_printed_as_it_is() -> None:
    assert "[bold]x[/bold]" in printed(RunReport("[bold]x[/bold]"))[0]


def test_json_reads_back_equal_and_keeps_its_keys(tmp_path: Path) -> None:
    report = make_report(class_scenario(), text_scenario())
    path = report.to_json(tmp_path / "new" / "report.json")
    assert RunReport.from_json(path) == report
    assert RunReport.from_json(path) != make_report(class_scenario())
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert (raw["schema"], raw["schema_version"], raw["not_finite"]) == ("rfa-fast/report", 1, {})
    assert set(raw) == {
        *("schema", "schema_version", "title", "scenarios", "seed", "command", "summary", "created"),
        *("versions", "machine", "notes", "not_finite"),
    }
    scenario = raw["scenarios"][0]
    assert set(scenario) == {
        *("title", "rows", "metrics", "original", "reference", "forgotten", "per_class_before", "per_class_after"),
        *("feature_distance", "confidence", "losses", "examples", "notes", "settings", "charts", "source"),
    }
    assert scenario["rows"][2] == {
        "method": "RFA",
        "metrics": {"D_r": 0.932, "D_f": 0.031, "D_rt": 0.8917, "D_ft": 0.0, "MIA": 0.3},
        "seconds": 31.0,
        "spread": {},
        "published": {},
        "gaps": {},
    }
    assert scenario["settings"] == {
        "lr": 5e-5,
        "weights": [1, 1],
        "dtype": "float32",
        "path": os.path.join("runs", "a"),
    }
    assert "[ 0.9, 0.95 ]" in path.read_text(encoding="utf-8")


def test_numbers_that_are_not_finite_are_null_and_come_back(tmp_path: Path) -> None:
    rows = [MethodRow("RFA", {"a/b~c": math.inf, "D_f": -math.inf}, None), MethodRow("Retrain", {"D_f": math.nan})]
    report = make_report(class_scenario(rows=rows, losses=[{"step": 1, "total": math.nan}]))
    path = report.to_json(tmp_path / "r.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw["scenarios"][0]["rows"][0]["metrics"] == {"a/b~c": None, "D_f": None}
    assert raw["not_finite"] == {
        "/scenarios/0/rows/0/metrics/a~1b~0c": "inf",
        "/scenarios/0/rows/0/metrics/D_f": "-inf",
        "/scenarios/0/rows/1/metrics/D_f": "nan",
        "/scenarios/0/losses/0/total": "nan",
    }
    back = RunReport.from_json(path)
    assert back == report
    assert back.scenarios[0].rows[0].metrics["a/b~c"] == math.inf
    assert math.isnan(back.scenarios[0].losses[0]["total"])


texts = st.text(max_size=8)
numbers = st.floats() | st.integers(-9, 9)


@settings(max_examples=40, deadline=None)
@given(
    title=texts,
    metrics=st.dictionaries(st.text(min_size=1), numbers, max_size=4),
    layers=st.dictionaries(texts, numbers),
)
def test_any_report_survives_json(title: str, metrics: dict[str, float], layers: dict[str, float]) -> None:
    scenario = Scenario(title, [MethodRow(title, metrics)], feature_distance={title: layers}, losses=[layers])
    report = RunReport(title, [scenario], versions={})
    assert RunReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_numpy_and_torch_numbers_become_plain_ones() -> None:
    row = MethodRow("RFA", {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": 3, "d": None})  # type: ignore[dict-item]
    assert {key: type(value) for key, value in row.metrics.items()} == {"a": float, "b": float, "c": int, "d": float}
    assert math.isnan(row.metrics["d"])
    scenario = Scenario("s", confidence={"test": np.array([0.123456789], dtype=np.float64)})  # type: ignore[dict-item]
    assert scenario.confidence == {"test": [0.12346]}
    assert Scenario("s", losses=[{"total": 0.123456789}]).losses == [{"total": 0.1234568}]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MethodRow("RFA", {"D_f": "0.1"}), TypeError, ("D_f", "'0.1'", "number")),
        (lambda: MethodRow("RFA", {"D_f": True}), TypeError, ("D_f", "True")),
        (lambda: MethodRow(3), TypeError, ("method", "3", "string")),
        (lambda: MethodRow("RFA", [0.1]), TypeError, ("metrics of RFA", "list", "dict")),
        (lambda: Metric(""), ValueError, ("key", "empty")),
        (lambda: Metric("a", unit="pt"), ValueError, ("unit of a", "'pt'")),
        (lambda: Metric("a", better="more"), ValueError, ("better of a", "'more'", "higher")),
        (lambda: Metric("a", digits=-1), ValueError, ("digits of a", "-1")),
        (lambda: Metric("a", tolerance=0), ValueError, ("tolerance of a", "0")),
        (lambda: Scenario("s", [MethodRow("A"), MethodRow("A")]), ValueError, ("method", "'A'", "more than once")),
        (lambda: Scenario("s", metrics=[Metric("a"), Metric("a")]), ValueError, ("metric", "'a'")),
        (lambda: Scenario("s", [MethodRow("A", {"x": 1})], [Metric("y")]), ValueError, ("'x'", "'y'")),
        (lambda: Scenario("s", [{"method": "A"}]), TypeError, ("rows", "MethodRow")),
        (lambda: Scenario("s", notes="one"), TypeError, ("notes", "str", "list")),
        (lambda: class_scenario(per_class_after={"1": 0.9}), ValueError, ("per_class_after", "'2'", "'3'")),
        (lambda: class_scenario(forgotten=["9"]), ValueError, ("forgotten", "9")),
        (lambda: class_scenario(confidence={"test": "abc"}), TypeError, ("confidence['test']", "str")),
        (lambda: class_scenario(settings={"f": len}), TypeError, ("settings['f']", "JSON")),
        (lambda: class_scenario(losses=[{"total": "x"}]), TypeError, ("losses", "'x'")),
        (lambda: RunReport("r", seed="0"), TypeError, ("seed", "'0'")),
        (lambda: RunReport("r", [None]), TypeError, ("scenarios", "Scenario")),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_given(
    make: Callable[[], object], error: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, ("schema", "v2", "v1")),
        ({"schema": "other"}, ("schema", "'other'")),
        ({"surprise": 1}, ("unknown", "surprise")),
        ({"scenarios": [{"rows": []}]}, ("scenarios", "title")),
        ({"scenarios": [3]}, ("scenarios", "int", "dict")),
        ({"not_finite": {"/scenarios/9/title": "nan"}}, ("not_finite", "/scenarios/9/title")),
        ({"title": 3}, ("title", "3")),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(make_report().to_dict() | change))
    with pytest.raises(ValueError, match=r"r\.json") as caught:
        RunReport.from_json(path)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        RunReport.from_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(ValueError, match=r"half\.json"):
        RunReport.from_json(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json"):
        RunReport.from_json(tmp_path / "list.json")


def test_standard_columns_and_versions() -> None:
    assert [standard_metric(key).label for key in ("D_rt", "D_f/perplexity", "MIA", "x/y")] == [
        "D_rt",
        "D_f",
        "MIA",
        "x/y",
    ]
    assert (standard_metric("D_f/perplexity").unit, standard_metric("D_f/token_accuracy").unit) == ("", "%")
    assert (standard_metric("D_rt").better, standard_metric("D_ft").better) == ("higher", "closer to Retrain")
    assert installed_versions()["torch"].startswith(torch.__version__.split("+")[0])
