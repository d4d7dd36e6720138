"""The page and its plots: nothing fetched, nothing unescaped, and the drawn lengths are the numbers."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from rfa_fast.plots import Plot, confidence_plot, draw_plots, feature_distance_plot, loss_plot, per_class_plot
from rfa_fast.plots_chart import chart_plot
from rfa_fast.report import Chart, Example, MethodRow, Metric, RunReport, Scenario
from rfa_fast.report_page import render

EVIL = """<script>alert("1")</script> & </text> 'q' {{ 7*7 }} $x^$ id="a" #010203"""
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of each element by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def scenario(**changes: Any) -> Scenario:
    values: dict[str, Any] = {
        "title": "forget class 3",
        "rows": [
            MethodRow("Original", {"D_rt": 0.907, "D_f": 0.942}, 400.0),
            MethodRow("Retrain", {"D_rt": 0.9141, "D_f": 0.0}, 402.0),
            MethodRow("residual", {"D_rt": 0.8917, "D_f": 0.031}, 31.0),
            MethodRow("teacher", {"D_rt": 0.9118, "D_f": 0.0}, 804.0),
        ],
        "forgotten": ["3"],
        "per_class_before": {"1": 0.9, "2": 0.6, "3": 0.75},
        "per_class_after": {"1": 0.8, "2": 0.65, "3": 0.3},
        "feature_distance": {"D_r": {"a.b.conv": 0.25, "a.b.fc": 0.5}, "D_f": {"a.b.conv": 0.5, "a.b.fc": 1.0}},
        "confidence": {"forget before": [0.91, 0.99, 0.99, 0.99], "forget after": [0.5], "test": [0.01, 0.99]},
        "losses": [{"step": i, "total": 2.0 / (i + 1), "forget_task": 3.0} for i in range(5)],
    }
    return Scenario(**(values | changes))


def report(*scenarios: Scenario, **changes: Any) -> RunReport:
    values: dict[str, Any] = {"seed": 7, "command": "rfa-fast demo", "created": "2026-01-02T03:04:05+00:00"}
    return RunReport("Digits", list(scenarios or (scenario(),)), **(values | changes))


def text_scenario() -> Scenario:
    columns = [Metric("ppl", "D_f", group="Perplexity"), Metric("answers", "D_f", "%", group="Answers")]
    rows = [MethodRow("Retrain", {"ppl": 20.0, "answers": 0.06}), MethodRow("RFA", {"ppl": 16.0, "answers": 0.05})]
    return Scenario("forget a topic", rows, columns, examples=[Example("Q: who?", "she", "nobody")])


def test_page_needs_no_other_file_and_is_well_formed() -> None:
    text = render(report(scenario(), text_scenario()))
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "poster", "background"} & set(attributes), tag
        for name in ("href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith("#") or target == "data:,", (tag, target)
    assert not {name for name, _ in page.tags} & {"iframe", "img", "object", "embed", "base"}
    assert re.findall(r"url\((?!#)|@import|https?:|//[a-z]", text) == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', text))
    assert targets <= set(ids)


def test_page_holds_the_four_plots_with_words_for_those_who_do_not_see_them() -> None:
    page = Page(render(report()))
    images = [a for a in page.all("div") if a.get("role") == "img"]
    assert len(images) == len(page.all("figure")) == 4
    words = [image["aria-label"] or "" for image in images]
    assert [word.split()[0] for word in words] == ["Grouped", "Histograms", "Lines", "Lines"]
    assert "3 75.0 % to 30.0 %" in words[0]
    assert [text for tag, text in page.texts if tag == "h3"] == [
        *("Accuracy per class", "Confidence on forget and test samples", "Feature distance per layer", "Loss")
    ]
    headers = [a for a in page.all("th") if not a.get("scope")]
    assert headers == []
    assert len(page.all("caption")) == len(page.all("table"))
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert "prefers-color-scheme: dark" in render(report())
    assert "@media print" in render(report())


def test_the_table_of_the_page_has_the_figures_with_two_decimals() -> None:
    text = render(report())
    rows = re.findall(r'<tr role="row" class="(original|reference|method)">(.*?)</tr>', text, flags=re.DOTALL)
    figures = [re.findall(r'class="figure">([^<]*)<', body) for _, body in rows]
    assert [kind for kind, _ in rows] == ["original", "reference", "method", "method"]
    assert figures == [
        ["90.70", "94.20", "400 s"],
        ["91.41", "0.00", "402 s"],
        ["89.17", "3.10", "31.0 s"],
        ["91.18", "0.00", "804 s"],
    ]
    gaps = [re.findall(r'class="gap ?(\w*)">([^<]*)<', body) for _, body in rows]
    assert gaps[:2] == [[], []]
    assert gaps[2] == [("near", "−2.24"), ("far", "+3.10"), ("", "13.0× as fast")]
    assert gaps[3] == [("close", "−0.23"), ("close", "0.00"), ("", "2.0× as slow")]
    assert [body.count('class="best"') for _, body in rows] == [0, 0, 0, 2]
    assert "D</i><sub>rt</sub>" in text


def test_published_figures_have_a_column_of_their_own_width_and_gaps_stay_below_ours() -> None:
    rows = [
        MethodRow("Retrain", {"D_rt": 0.9, "D_f": 0.0}, published={"D_rt": 1.0}),
        MethodRow("RFA", {"D_rt": 0.9, "D_f": 0.0}, published={"D_rt": 0.9712}),
    ]
    page = Page(render(report(Scenario("forget 3", rows, source="Table I"))))
    widths = [a.get("style") for tag, a in page.tags if tag in ("th", "td") and a.get("role") != "rowheader"]
    # "100.00" has six characters; heading, two rows. D_f has no published figures.
    assert [width for width in widths if width] == ["--paper: 6ch"] * 3
    css = re.sub(r"\s+", " ", render(report()))
    assert "[style] > .gap { margin-right: calc(var(--paper) + 1em)" in css
    narrow = [MethodRow("RFA", {"D_f": 0.0}, published={"D_f": 0.0})]
    assert 'style="--paper: 5ch"' in render(report(Scenario("forget 3", narrow)))  # "paper" itself


def test_notes_and_names_set_the_subsets_as_the_headings_do() -> None:
    text = render(report(scenario(notes=["Samples: D_rt 12 & D_f 3."])))
    assert ">BadT, <i>D</i><sub>f</sub> × 5</th>" in render(report(Scenario("t", [MethodRow("BadT, D_f × 5")])))
    assert '<p class="note">Samples: <i>D</i><sub>rt</sub> 12 &amp; <i>D</i><sub>f</sub> 3.</p>' in text


def test_a_table_that_compares_with_nothing_has_neither_times_nor_an_excuse() -> None:
    columns = [Metric("gap", unit="%", digits=2), Metric("rank", digits=0)]
    rows = [MethodRow("NegGrad", {"gap": 0.25, "rank": 7.0}), MethodRow("RFA", {"gap": 0.01, "rank": 1.0})]
    ranks = report(Scenario("Gaps", rows, columns, original="", reference=""))
    text = render(ranks)
    assert re.findall(r'class="figure">([^<]*)<', text) == ["25.000", "7", "1.000", "1"]
    heads = [text for tag, text in Page(text).texts if tag == "th"]
    assert "Time" not in heads
    assert "No row to compare" not in text
    assert "No row to compare" in render(report(Scenario("Gaps", rows, columns)))
    console = Console(width=80, record=True, file=io.StringIO())
    ranks.print(console)
    assert "Time" not in console.export_text()


def test_levels_of_a_chart_are_named_beside_it_and_close_ones_share_a_label() -> None:
    levels = {"Retrain D_f": 0.1, "Retrain D_rt": 0.98, "Retrain D_t": 0.97, "$5$": 0.5}
    plot = chart_plot(Chart("Accuracy", ["deep", "all"], {"D_f": [0.0, 1.0]}, levels=levels, unit="%"))
    texts = re.findall(r"<text[^>]*>(.*?)</text>", plot.svg, flags=re.DOTALL)
    words = [re.sub(r"<[^>]+>|\s+", "", text) for text in texts]
    assert [word for word in words if "Retrain" in word or "$" in word] == [
        "RetrainDf",
        "$5$",
        "RetrainDrt",
        "RetrainDt",
    ]
    # On axes from 0 to 100 % the two high levels are a point apart, less than a line of text.
    near = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)\">Retrain", plot.svg)]
    assert len(near) == 2
    assert near[1] - near[0] > 7
    assert "D_f" in plot.caption  # which the page sets
    longer = chart_plot(Chart("Gap", ["D_f × 5", "D_block1"], {"gap": [1.0, 2.0]}))
    assert 'D<tspan dy=".25em" font-size="72%">f</tspan><tspan dy="-.18em"> × 5</tspan>' in longer.svg
    assert "D_block1" in longer.svg  # no subset


@pytest.mark.parametrize("place", ["report", "scenario", "names", "series"])
def test_what_a_user_wrote_is_never_markup(place: str) -> None:
    plain = render(report(scenario(examples=[Example("p", "b", "a")], notes=["n"], settings={"k": "v"}), notes=["n"]))
    if place == "report":
        shown = report(summary=EVIL, machine=EVIL, notes=[EVIL], command=EVIL, versions={EVIL: EVIL}, created=EVIL)
        shown.title = EVIL
    elif place == "scenario":
        example, other = Example(EVIL, EVIL, EVIL), {EVIL: {EVIL: [EVIL]}}
        shown = report(scenario(title=EVIL, notes=[EVIL], settings=other, examples=[example]))
    elif place == "names":
        rows = [MethodRow(EVIL, {"k": 0.5}), MethodRow("Retrain", {"k": 0.4})]
        column = Metric("k", EVIL, group=EVIL, about=EVIL)
        classes = {EVIL: 0.5, EVIL + "2": 0.6}
        shown = report(
            scenario(rows=rows, metrics=[column], per_class_before=classes, per_class_after=classes, forgotten=[EVIL])
        )
    else:
        layers = {EVIL: 0.5, EVIL + "2": 0.5}
        shown = report(scenario(feature_distance={EVIL: layers}, confidence={EVIL: [0.5]}))
    text = render(shown)
    page = Page(text)
    assert [a.get("type") for a in page.all("script")] == ["application/json", None]
    assert 'alert("1")' not in text.replace(r"alert(\"1\")", "")
    assert "{{ 7*7 }}" in text
    assert {name for name, _ in page.tags} <= {name for name, _ in Page(plain).tags}
    assert json.loads(next(t for tag, t in page.texts if tag == "script")) == shown.to_dict()
    own = {name for _, attributes in Page(plain).tags for name in attributes} | {"colspan"}
    assert {name for _, attributes in page.tags for name in attributes} <= own


def test_text_in_a_plot_stays_as_written() -> None:
    svg = per_class_plot(scenario(per_class_before={'id="a" #010203': 0.5}, per_class_after={}, forgotten=[]), "s").svg
    assert '>id="a" #010203</text>' in svg


def test_raw_numbers_are_embedded_and_not_finite_ones_are_null() -> None:
    shown = report(scenario(rows=[MethodRow("RFA", {"D_f": math.nan, "D_rt": math.inf})]))
    text = render(shown)
    raw = json.loads(re.search(r'id="raw">(.*?)</script>', text, flags=re.DOTALL)[1])  # type: ignore[index]
    assert raw == shown.to_dict()
    assert re.findall(r'class="figure">([^<]*)<', text) == ["n/a", "inf"]
    assert "No row to compare with" in text


def test_missing_pieces_are_left_out_with_the_reason() -> None:
    text = render(report(text_scenario()))
    assert Page(text).all("figure") == []
    assert "Not drawn: accuracy per class (this run has no accuracies per class)" in text
    assert [
        w for w in ("no confidences", "no feature distances", "no losses", "nobody", "Perplexity") if w not in text
    ] == []
    one = render(report(replace(text_scenario(), losses=[{"total": 1.0}])))
    assert len(Page(one).all("figure")) == 1
    assert "Not drawn: this run has no accuracies per class." in one
    nothing = {"1": math.nan}
    hollow = scenario(
        per_class_before=nothing,
        per_class_after=nothing,
        forgotten=[],
        feature_distance={"D_f": nothing},
        confidence={"test": []},
        losses=[{"step": 1, "total": math.inf}],
    )
    assert [plot.svg for plot in draw_plots(hollow)] == [""] * 4
    assert Page(render(RunReport("empty"))).all("table") != []
    assert "no scenario" in render(RunReport("empty"))


def paths(svg: str, colour: str, kind: str) -> list[list[tuple[float, float]]]:
    """Points of every path drawn in a colour; `kind` is `"fill"` or `"stroke"`."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*{kind}: var\(--{colour}\)', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", d)] for d in found]


def ticks(svg: str) -> dict[str, float]:
    """x of every horizontal tick label."""
    return {t: float(x) for x, t in re.findall(r'text-anchor: middle[^>]*? x="([\d.]+)"[^>]*>([\d.]+)</text>', svg)}


def test_bars_are_as_long_as_the_accuracies() -> None:
    plot = per_class_plot(scenario(), "s")
    at = ticks(plot.svg)
    unit = (at["100"] - at["0"]) / 100

    def lengths(colour: str) -> list[float]:
        return [(max(x for x, _ in p) - min(x for x, _ in p)) / unit for p in paths(plot.svg, colour, "fill")]

    assert lengths("before") == pytest.approx([90, 60, 75], abs=1e-3)
    assert lengths("retain") == pytest.approx([80, 65], abs=1e-3)
    assert lengths("forget") == pytest.approx([30], abs=1e-3)
    assert len(paths(plot.svg, "band", "fill")) == 1
    assert ">75.0</text>" in plot.svg
    assert ">30.0</text>" in plot.svg
    assert plot.caption == "The kept class that moved most is 1: −10.0 points."
    assert [key.label for key in plot.legend] == ["before", "after", "forgotten, after"]
    still = scenario()
    still.per_class_after = {**still.per_class_before, still.forgotten[0]: 0.0}
    assert per_class_plot(still, "s").caption == "No kept class moved."


def test_lines_of_the_layers_are_where_the_distances_are() -> None:
    plot = feature_distance_plot(scenario(), "s")
    at = ticks(plot.svg)
    unit = at["1.0"] - at["0.0"]
    for colour, expected in (("retain", [0.25, 0.5]), ("forget", [0.5, 1.0])):
        (points,) = (p for p in paths(plot.svg, colour, "stroke") if len(p) == 2)
        assert [(x - at["0.0"]) / unit for x, _ in points] == pytest.approx(expected, abs=1e-4)
        assert points[0][1] < points[1][1]  # the first layer is on top
    assert ">conv</text>" in plot.svg
    assert "Largest: 1 (D_f, a.b.fc). Names without “a.b.”." in plot.caption


def test_histograms_are_shares_of_their_samples() -> None:
    plot = confidence_plot(scenario(), "s")
    (before,) = (p for p in paths(plot.svg, "forget", "stroke") if len({y for _, y in p}) == 3)
    low, middle, high = sorted({y for _, y in before}, reverse=True)
    assert (low - middle) / (low - high) == pytest.approx(1 / 3, abs=1e-3)  # one sample of four, three of four
    assert [key.label for key in plot.legend] == ["forget before (4)", "forget after (1)", "test (2)"]
    assert "forget before 0.97, forget after 0.50, test 0.50" in plot.caption


def test_steps_are_whole_numbers_where_there_is_only_one() -> None:
    plot = loss_plot(scenario(losses=[{"step": 1, "total": 42.0}]))
    ticks = re.findall(r"text-anchor: middle[^>]*>([^<]*)<", plot.svg)
    assert "1" in ticks
    assert not [tick for tick in ticks if "." in tick]


def test_losses_get_a_logarithmic_scale_beyond_two_decades() -> None:
    near = loss_plot(Scenario("s", losses=[{"step": 1, "total": 1.0}, {"step": 2, "total": 0.011}]))
    far = loss_plot(Scenario("s", losses=[{"step": 1, "total": 1.0}, {"step": 2, "total": 0.009}]))
    assert ("Logarithmic" in near.caption, "Logarithmic" in far.caption) == (False, True)
    (line,) = (p for p in paths(far.svg, "ink", "stroke") if len(p) == 2)
    assert line[1][1] > line[0][1]
    noisy = [{"step": i, "total": float(i % 2), "forget_align": 0.0, "lr": 1e-4} for i in range(1000)]
    plot = loss_plot(Scenario("s", losses=noisy))
    assert "Means of 25 steps each." in plot.caption
    assert len(paths(plot.svg, "ink", "stroke")[0]) <= 41
    assert [key.label for key in plot.legend] == ["total", "alignment, forget"]


def test_many_classes_keep_the_forgotten_and_those_that_moved_most() -> None:
    before = {f"class {i}": 0.9 for i in range(100)}
    after = before | {"class 97": 0.2, "class 50": 0.0}
    plot = per_class_plot(Scenario("s", per_class_before=before, per_class_after=after, forgotten=["class 50"]))
    assert len(paths(plot.svg, "before", "fill")) == 20
    assert ">class 97</text>" in plot.svg
    assert ">class 50</text>" in plot.svg
    assert "Drawn: the 20 of 100 classes that moved most." in plot.caption
    layers = {f"model.layers.{i}.mlp.down_proj": 1.0 + i for i in range(90)}
    deep = feature_distance_plot(Scenario("s", feature_distance={"D_f": layers, "RFA": layers, "Retrain D_r": layers}))
    assert 10 <= deep.svg.count("mlp.down_proj</text>") <= 24
    assert [key.mark for key in deep.legend] == ["solid", "solid", "dashed"]


def test_every_series_of_the_layers_looks_different() -> None:
    names = [f"RFA, {subset}" for subset in ("D_r", "D_f", "D_rt", "D_ft")] + ["Retrain, D_f", "SCRUB, D_f", "SCRUB"]
    legend = feature_distance_plot(Scenario("s", feature_distance={name: {"fc": 1.0} for name in names})).legend
    assert [(key.colour, key.mark) for key in legend] == [
        *(("retain", "solid"), ("forget", "solid"), ("retain", "dotted"), ("forget", "dotted")),
        *(("forget", "dashed"), ("third", "solid"), ("ink", "solid")),
    ]


def test_the_same_numbers_give_the_same_page() -> None:
    assert render(report()) == render(report())


def test_drawing_leaves_matplotlib_as_it_was_and_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = matplotlib.rcParams.copy()
    strange = {"猫": 0.9, "_hidden": 0.5, "$x^$": 0.4, "": 0.3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots: list[Plot] = draw_plots(scenario(per_class_before=strange, per_class_after=strange, forgotten=["猫"]))
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules
    assert [name for name in ("猫", "_hidden", "$x^$") if f">{name}</text>" not in plots[0].svg] == []
