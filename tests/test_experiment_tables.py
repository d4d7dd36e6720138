"""The paper's tables: its figures, what is averaged from ours, and what is written, against values by hand."""

from __future__ import annotations

import csv
import inspect
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Subset

from rfa_fast.data import split_by_class, split_by_sample
from rfa_fast.experiments import smollm2
from rfa_fast.experiments.common import Row
from rfa_fast.experiments.comparison import settings_of
from rfa_fast.experiments.measuring import FEATURE_ITEMS, Measures
from rfa_fast.experiments.tables import runner
from rfa_fast.experiments.tables.aggregate import gaps, mean_absolute_gap, ranks, summarise
from rfa_fast.experiments.tables.catalogue import TABLES, find_tables
from rfa_fast.experiments.tables.columns import measured_metrics
from rfa_fast.experiments.tables.outputs import as_csv, as_latex, as_markdown
from rfa_fast.experiments.tables.pairs import PAIRS, find_pairs, recipe_words
from rfa_fast.experiments.tables.paper_figures import paper_figures
from rfa_fast.experiments.tables.plan import Block, Choice, PlannedRow, Sizes, blocks_of, left_out, units_of
from rfa_fast.experiments.tables.presence import missing
from rfa_fast.experiments.tables.results import block_result, gap_summaries
from rfa_fast.experiments.tables.rows import ROWS
from rfa_fast.experiments.tables.runner import Found, Place
from rfa_fast.experiments.tables.scenarios import block_scenario, summary_scenario
from rfa_fast.methods import METHODS, unlearn
from rfa_fast.report import RunReport

DIGITS = "digits/digits-net"


@pytest.mark.parametrize(
    ("table", "data", "model", "kind", "row", "column", "figure"),
    [
        ("I", "cifar-10", "resnet18", "class", "SCRUB", "D_ft/accuracy", 0.624),
        ("I", "fashion-mnist", "vit", "sample", "Retrain", "D_f/accuracy", 0.9609),
        ("II", "cifar-10", "resnet18", "sample", "BadT", "D_f/accuracy", 0.5469),
        ("III", "imdb", "distilbert", "keyword", "Ours", "D_ft/accuracy", 0.5093),
        ("IV", "eli5-category", "distilgpt2", "class", "NegGrad", "D_r/perplexity", math.inf),
        ("IV", "eli5-category", "distilgpt2", "sample", "BadT, D_f × 5", "D_f/perplexity", 43.10),
        ("V", "wmdp", "qwen2.5-3b", "class", "BadT", "D_f/perplexity", 46.18),
        ("V", "wmdp", "qwen2.5-3b", "class", "Ours", "mia_svm", 1.00),
        ("VI", "fashion-mnist", "resnet18", "class", "Finetune", "D_f/activation_distance_squared", 1.70),
        ("VII", "eli5-category", "distilgpt2", "class", "NegGrad", "D_f/activation_distance", 1.4227),
        ("VIII", "fashion-mnist", "resnet18", "sample", "Retrain", "D_f/feature_distance_1", 22.70),
        ("IX", "eli5-category", "distilgpt2", "class", "Ours", "D_ft/feature_distance_2", 0.42),
        ("X", "fashion-mnist", "vit", "class", "Retrain", "mia_svm", 0.74),
        ("XI", "eli5-category", "distilgpt2", "sample", "BadT", "mia_svm", 0.52),
        ("XII", "cifar-10", "vit", "class", "Ours", "seconds", 295.89),
        ("XII", "imdb", "distilbert", "sample", "Ours", "seconds/finetune", 1.7322),
        ("XIII", "cifar-10", "resnet18", "class", "DoRA", "D_rt/feature_distance_2", 3.71),
        ("XIV", "cifar-10", "resnet18", "class", "1e-4", "D_f/accuracy", 0.0016),
    ],
)
def test_the_papers_figures_are_those_of_the_paper(
    table: str, data: str, model: str, kind: str, row: str, column: str, figure: float
) -> None:
    found = paper_figures(table, data, model, kind)
    assert found is not None
    assert found[row][column] == pytest.approx(figure)


def test_what_the_paper_leaves_open_is_absent() -> None:
    assert "D_f/accuracy" not in paper_figures("III", "imdb", "distilbert", "class")["Retrain"]  # type: ignore[index]
    assert paper_figures("II", "cifar-10", "resnet18", "class") is None
    assert {row for table in TABLES.values() for row in table.rows} <= set(ROWS)
    for name, table in TABLES.items():
        assert not table.number or any(
            paper_figures(table.number, *stands, kind)
            for pair in table.pairs
            for stands in PAIRS[pair].stands_for
            for kind in table.kinds
        ), name


@pytest.mark.parametrize("name", list(TABLES))
def test_every_row_of_every_table_is_a_run_that_its_method_accepts(name: str) -> None:
    loop = {name for name, each in inspect.signature(unlearn).parameters.items() if each.kind is each.KEYWORD_ONLY}
    loop |= {"method"}
    for pair in TABLES[name].pairs:
        choice = Choice((name,), (pair,), seeds=1)
        for unit in units_of(blocks_of(choice), choice):
            for scenario, rows in unit.scenarios.items():
                for row in rows.values():
                    options = row.spec.keywords(PAIRS[pair], scenario.partition(":")[0], 128, 0, row.epochs)
                    METHODS[options["method"]].settings({k: v for k, v in options.items() if k not in loop})
    for need in {need for pair in TABLES[name].pairs for need in PAIRS[pair].needs}:
        assert missing(need) != ""


def test_rows_carry_the_pairs_settings_and_their_own() -> None:
    pair = PAIRS["fashion-mnist/resnet18"]
    ours = ROWS["rfa-teacher"].keywords(pair, "class", 6000, seed=2)
    assert ours == {"method": "rfa", "lr": 1e-3, "weights": [1.0, 0.1, 1.0, 0.1], "mode": "teacher", "seed": 2}
    once = ROWS["neggrad"].keywords(pair, "class", 6000, seed=0)
    # At most 127 of a batch's 128 are to be forgotten: ⌈6000 / 127⌉ = 48 steps, and 6000 / 48 = 125 in each.
    assert (once["forget_per_batch"], once["max_steps"]) == (125, 48)
    for forgotten, each, steps in ((127, 127, 1), (128, 64, 2), (129, 65, 2), (1, 1, 1)):  # 65 · 2: one comes twice
        once = ROWS["neggrad"].keywords(pair, "sample", forgotten, seed=0)
        assert (once["forget_per_batch"], once["max_steps"]) == (each, steps), forgotten
    few = ROWS["neggrad"].keywords(pair, "sample", 100, seed=0, epochs=2)
    assert (few["forget_per_batch"], few["max_steps"]) == (100, 2)
    trivia = PAIRS["trivia/smollm2"]  # six epochs; each mode has a rate of its own
    names = ("rfa-residual", "rfa-dora", "rfa-teacher")
    rates = {name: ROWS[name].keywords(trivia, "class", 9, 0)["lr"] for name in names}
    assert rates == {"rfa-residual": 1e-3, "rfa-dora": 1e-3, "rfa-teacher": 5e-4}
    assert settings_of(smollm2.SETTINGS, "keyword", "residual") == {
        "epochs": 6, "batch_size": 16, "lr": 1e-3, "weights": [1.0, 0.03, 1.0, 0.03],
    }  # fmt: skip
    for most, passes in ((None, 6), (2, 2), (1, 1)):
        capped = PlannedRow(ROWS["neggrad"]).options(trivia, "sample", 128, 0, most_epochs=most)
        assert capped["max_steps"] * capped["forget_per_batch"] == pytest.approx(128 * passes, abs=9 * passes), most
        assert PlannedRow(ROWS["finetune"]).options(trivia, "sample", 128, 0, most_epochs=most)["epochs"] == passes
    head = ROWS["rfa-head"].keywords(PAIRS["wmdp/qwen2.5-3b"], "class", 9, 0)
    assert head["targets"] == ["lm_head"]
    rate = ROWS["rfa-residual"].with_option("lr", 1e-5, "lr = 1e-05")
    assert rate.keywords(pair, "class", 9, 0, chosen={"lr": 7.0, "rank": 4})["lr"] == 1e-5
    assert rate.keywords(pair, "class", 9, 0, chosen={"lr": 7.0, "rank": 4})["rank"] == 4
    table2 = blocks_of(Choice(("table2",), (DIGITS,)))[0].rows[0]
    assert table2.spec.keywords(PAIRS[DIGITS], "sample", 64, 0, table2.epochs)["epochs"] == 4


def test_two_tables_share_the_runs_that_they_have_in_common() -> None:
    choice = Choice(("table1", "table10", "fig6"), (DIGITS,), seeds=2, retrain_seeds=3)
    units = units_of(blocks_of(choice), choice)
    assert [(unit.seed, unit.retrain_only) for unit in units] == [(0, False), (1, False), (2, True)]
    rows = units[0].scenarios["class:3"]
    assert len(rows) == 7 + 4  # γ = 0.5 is RFA residual as it is
    assert 'rfa mode="residual"' in rows
    assert set(measured_metrics("image")) == set(units[0].metrics)
    assert not {"feature_distance_1", "activation_distance"} & set(units[2].metrics)
    named = replace(choice, tables=("table1",), metrics=("mia_auc", "seconds/finetune"))
    assert [unit.metrics for unit in units_of(blocks_of(named), named)] == [("mia_auc", "seconds")] * 3


def test_of_several_tables_a_quick_plan_takes_each_on_one_pair() -> None:
    pairs = (DIGITS, "bbc-news/minilm", "trivia/smollm2")
    choice = Choice(("table1", "table4", "table11"), pairs)
    whole = {(block.table.name, block.pair.name) for block in blocks_of(choice)}
    quick = {(block.table.name, block.pair.name) for block in blocks_of(replace(choice, quick=True))}
    assert whole - quick == {("table11", "trivia/smollm2")}
    assert quick == {("table1", DIGITS), ("table4", "trivia/smollm2"), ("table11", "bbc-news/minilm")}
    alone = replace(choice, tables=("table11",), pairs=pairs[1:], quick=True)
    assert {block.pair.name for block in blocks_of(alone)} == set(pairs[1:])


def test_a_quick_plan_has_one_scenario_of_a_kind_and_forgets_no_more_than_a_quarter() -> None:
    pair = "bbc-news/minilm"
    choice = Choice(("table3",), (pair,), sizes={pair: Sizes(96, 1, 48)}, quick=True)
    assert [block.scenario for block in blocks_of(choice)] == ["sample:24", "class:sports"]
    whole = [block.scenario for block in blocks_of(replace(choice, sizes={}, quick=False))]
    assert whole == ["sample:128", "class:sports", "keyword:election"]


def test_means_intervals_gaps_and_ranks_by_hand() -> None:
    short = summarise([0.90, 0.92, 0.97])
    assert short.mean == pytest.approx(0.93)
    # s² = (0.03² + 0.01² + 0.04²) / 2 = 0.0013; t(0.975, 2) = 4.302653
    assert short.half == pytest.approx(4.302653 * math.sqrt(0.0013 / 3), rel=1e-6)
    assert (short.low, short.high, short.n) == (0.90, 0.97, 3)
    assert summarise([1.0, 3.0]).half == pytest.approx(12.7062047, rel=1e-6)  # t(0.975, 1) · √2 / √2
    assert math.isnan(summarise([1.0]).half)
    assert (summarise([1.0, math.inf]).mean, math.isnan(summarise([1.0, math.inf]).half)) == (math.inf, True)
    # Perplexities of 10¹⁴⁷ and more, whose squares float64 does not hold; by Python's exact integers.
    large = summarise([1e200, 2e200, 6e200])
    assert (large.mean, large.half) == (pytest.approx(3e200), pytest.approx(4.302653 * math.sqrt(7 / 3) * 1e200))
    assert summarise([1.7e308, 1.6e308]).mean == pytest.approx(1.65e308)
    assert math.isnan(summarise([math.inf, -math.inf]).mean)
    assert mean_absolute_gap([[1.7e308, 1.7e308], [-1.7e308]]) == pytest.approx(1.7e308)
    assert math.isnan(mean_absolute_gap([[math.inf, -math.inf]]))
    assert gaps({0: 0.5, 1: 0.7, 2: 0.1}, {1: 0.6, 0: 0.6}) == [pytest.approx(-0.1), pytest.approx(0.1)]
    assert mean_absolute_gap([[-0.02, 0.01], [0.03]]) == pytest.approx((0.005 + 0.03) / 2)
    assert math.isnan(mean_absolute_gap([[0.1], [math.nan]]))
    assert ranks({"a": 2.0, "b": 1.0, "c": 2.0, "d": 5.0}) == {"a": 2, "b": 1, "c": 2, "d": 4}
    for wrong in (lambda: summarise([]), lambda: summarise([1.0], confidence=1.0)):
        with pytest.raises(ValueError, match="got"):
            wrong()


def row(seconds: float, **figures: float) -> Row:
    return Row(seconds, {k.replace("__", "/"): v for k, v in figures.items()}, {}, {"forget": [0.5], "test": [0.5]})


def accuracy(seconds: float, r: float, f: float, t: float) -> Row:
    return row(seconds, D_r__accuracy=r, D_f__accuracy=f, D_t__accuracy=t)


@pytest.fixture
def two_seeds() -> tuple[Block, dict[Place, Found]]:
    """A block with Finetune, SCRUB without figures in the second seed, RFA; and Retrain in a third seed alone."""
    names = ("finetune", "scrub", "rfa-teacher")
    rows = tuple(PlannedRow(ROWS[name]) for name in names)
    block = Block(TABLES["table1"], PAIRS[DIGITS], "sample:4", rows, ("accuracy", "seconds", "seconds/finetune"))
    rfa = 'rfa mode="teacher"'
    first = {"Original": accuracy(9, 1.0, 1.0, 0.9), "Retrain": accuracy(8, 1.0, 0.90, 0.90),
             "finetune": accuracy(2, 1.0, 1.0, 0.91), "scrub": accuracy(3, 0.98, 0.96, 0.88),
             rfa: accuracy(1, 1.0, 0.94, 0.90)}  # fmt: skip
    second = {"Original": accuracy(9, 1.0, 1.0, 0.9), "Retrain": accuracy(8, 1.0, 0.94, 0.92),
              "finetune": accuracy(4, 1.0, 1.0, 0.93), rfa: accuracy(1, 1.0, 0.90, 0.90)}  # fmt: skip
    third = {"Retrain": accuracy(8, 1.0, 0.98, 0.91)}
    given = [(first, {}), (second, {"scrub": "step 3: the loss is inf"}), (third, {})]
    sizes = {"D_r": 96, "D_f": 4, "D_t": 20}
    recipe = {"epochs": 2, "lr": 1e-3, "batch_size": 32}
    split = split_by_sample(100, 20, 4)
    return block, {
        Place(DIGITS, seed, "sample:4"): Found(
            found, failed, split, sizes, {**sizes, "D_r": 50}, recipe, {}, "forget 4"
        )
        for seed, (found, failed) in enumerate(given)
    }


def test_a_block_is_averaged_over_its_seeds_and_compared_seed_by_seed(two_seeds: Any) -> None:
    result = block_result(*two_seeds)
    finetune, scrub, rfa = result.rows
    assert rfa.figures["D_f/accuracy"].mean == pytest.approx(0.92)
    assert rfa.gaps["D_f/accuracy"].mean == pytest.approx(0.0)  # +0.04 and −0.04
    assert rfa.gaps["D_f/accuracy"].half == pytest.approx(12.7062047 * 0.04, rel=1e-6)
    assert rfa.figures["seconds/finetune"].mean == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert finetune.gaps["D_t/accuracy"].mean == pytest.approx(0.01)
    assert result.retrain.figures["D_f/accuracy"].n == 3
    assert scrub.figures["D_f/accuracy"].n == 1
    assert rfa.paper["D_f/accuracy"] == 0.9766  # Fashion-MNIST, ResNet18, which the digits stand in for
    assert "seconds" not in rfa.gaps
    summary = gap_summaries([result])[0]
    assert summary.gaps["RFA teacher"] == pytest.approx((0 + 0 + 0.01) / 3)
    assert summary.gaps["Finetune"] == pytest.approx((0 + 0.08 + 0.01) / 3)
    assert summary.gaps["SCRUB"] == pytest.approx((0.02 + 0.06 + 0.02) / 3)
    assert summary.ranks == {"RFA teacher": 1, "Finetune": 2, "SCRUB": 3}
    notes = " ".join(result.notes())
    assert "SCRUB has no figures for seed 1: step 3: the loss is inf." in notes
    assert "50 of D_r" in notes
    assert "Retrain over 3 seeds, D_f: 90.00 to 98.00 %; RFA teacher 92.00 is within." in notes


def test_the_plots_compare_a_row_with_the_original_of_its_own_seed() -> None:
    block = Block(TABLES["table1"], PAIRS[DIGITS], "class:3", (PlannedRow(ROWS["rfa-teacher"]),), ("accuracy",))
    key, founds = block.rows[0].key, {}
    for seed in (0, 1):
        before, after = (
            replace(row(1, D_f__accuracy=0.5), per_class={"3": share}, confidence={"forget": [share], "test": [0.5]})
            for share in (0.9 + seed / 100, 0.1 + seed / 100)
        )
        rows = {"Original": before, "Retrain": after} | ({key: after} if seed else {})
        failed = {} if seed else {key: "step 3: the loss is inf"}
        sizes = {"D_r": 1, "D_f": 1, "D_rt": 1, "D_ft": 1}
        split = split_by_class([3, 4], [3, 4], "3", tuple("0123456789"))
        recipe = {"epochs": 1, "lr": 1.0, "batch_size": 1}
        founds[Place(DIGITS, seed, "class:3")] = Found(rows, failed, split, sizes, sizes, recipe)
    scenario = block_scenario(block_result(block, founds))
    assert (scenario.per_class_before, scenario.per_class_after) == ({"3": 0.91}, {"3": 0.11})
    assert scenario.confidence == {"forget before": [0.91], "forget after": [0.11], "test": [0.5]}
    assert scenario.forgotten == ["3"]
    assert "The plots show RFA teacher, seed 1; distances are to the Original." in scenario.notes


def test_finetunes_time_is_that_of_its_row_here_however_often_the_samples_come(two_seeds: Any) -> None:
    block, computed = two_seeds
    repeated = {at: replace(found, rows={"finetune x5" if k == "finetune" else k: v for k, v in found.rows.items()})
                for at, found in computed.items()}  # fmt: skip
    rows = [
        replace(row, spec=replace(row.spec, repeat=5)) if row.spec.name == "finetune" else row for row in block.rows
    ]
    result = block_result(replace(block, rows=tuple(rows)), repeated)
    assert result.rows[-1].figures["seconds/finetune"].mean == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_the_same_figures_stand_in_every_file(two_seeds: Any, tmp_path: Path) -> None:
    result = block_result(*two_seeds)
    summaries = gap_summaries([result])
    lines = list(csv.DictReader(io.StringIO(as_csv([result]))))
    ours = next(line for line in lines if line["method"] == "RFA teacher" and line["column"] == "D_f/accuracy")
    assert float(ours["mean"]) == pytest.approx(0.92)
    assert (ours["n"], ours["subset"], ours["paper"]) == ("2", "D_f", "0.9766")
    assert ours["values"] == "0:0.94 1:0.9"
    text = as_markdown("A | <b>", [result], summaries)
    assert "# A \\| &lt;b&gt;" in text
    assert "| RFA teacher | 100.00 ± 0.00 | 100.00 | 92.00 ± 25.41 | 97.66 |" in text
    assert "| RFA teacher | 0.33 points | 1 |" in text
    assert "shortened recipe" in text
    latex = as_latex("50 % & more", [result], summaries)
    assert "92.00 $\\pm$ 25.41 & 97.66" in latex
    assert "$\\mathcal{D}_{f}$ (\\%)" in latex
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 2
    scenario, gap = block_scenario(result), summary_scenario(summaries)
    assert gap is not None
    assert scenario.rows[-1].spread["D_f/accuracy"] == pytest.approx(0.2541, abs=1e-4)
    assert "(2 epochs, shortened recipe)" in scenario.title
    report = RunReport("t", [scenario, gap])
    assert RunReport.from_json(report.to_json(tmp_path / "r.json")) == report


def test_a_distance_to_retrain_is_its_own_gap() -> None:
    rows = (PlannedRow(ROWS["finetune"]),)
    block = Block(TABLES["table6"], PAIRS[DIGITS], "sample:4", rows, ("activation_distance_squared",))
    found = {"Retrain": row(1, D_f__activation_distance_squared=0.0),
             "finetune": row(1, D_f__activation_distance_squared=0.3)}  # fmt: skip
    split = split_by_sample(100, 20, 4)
    sizes, recipe = {"D_r": 1, "D_f": 1, "D_t": 1}, {"epochs": 1, "lr": 1.0, "batch_size": 1}
    result = block_result(block, {Place(DIGITS, 0, "sample:4"): Found(found, {}, split, sizes, sizes, recipe)})
    assert result.rows[0].gaps["D_f/activation_distance_squared"].mean == 0.3
    assert result.rows[0].paper["D_f/activation_distance_squared"] == 0.04


def test_sweeps_are_drawn_over_their_values() -> None:
    block = blocks_of(Choice(("fig6",), (DIGITS,)))[0]
    found = {planned.key: accuracy(1, 1.0, 0.9 - i / 10, 0.9) for i, planned in enumerate(block.rows)}
    found["Retrain"] = accuracy(1, 1, 0.5, 0.9)
    sizes, recipe = {"D_r": 1, "D_f": 1, "D_t": 1}, {"epochs": 1, "lr": 1.0, "batch_size": 1}
    split = split_by_sample(100, 20, 4)
    result = block_result(block, {Place(DIGITS, 0, block.scenario): Found(found, {}, split, sizes, sizes, recipe)})
    chart = block_scenario(result).charts[0]
    assert chart.x == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert chart.series["D_f"] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert chart.levels["Retrain D_f"] == 0.5


def test_what_is_measured_is_spaced_and_begins_with_the_samples_of_feature_distance() -> None:
    measures = Measures(("accuracy",), samples=1024)
    chosen = list(measures.subset(Subset(list(range(4096)), range(4096))).indices)
    assert sorted(chosen) == list(range(0, 4096, 4))
    assert chosen[:FEATURE_ITEMS] == list(range(0, 4096, 8))
    assert sorted(Measures(("accuracy",)).subset(Subset([0] * 700, range(700))).indices) == list(range(700))
    with pytest.raises(ValueError, match="'speed'"):
        Measures(("speed",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("scrub", "magic")}, "'magic', expected some of neggrad"),
        ({"methods": ("npo",)}, "npo for digits/digits-net"),
        ({"metrics": ("speed",)}, "'speed', expected some of accuracy"),
        ({"metrics": ("perplexity",)}, "'perplexity' for a classification"),
        ({"scenarios": ("class",)}, "expected class:NAME"),
        ({"pairs": ()}, "got none"),
        ({"tables": ("table4",)}, "perplexity"),
        (
            {"tables": ("fig5",), "methods": ("rfa-head",)},
            "rfa-head for fig5, expected rows whose targets it may choose: neggrad",
        ),
        ({"tables": ("fig6",), "methods": ("finetune",)}, "finetune for fig6, expected rows whose gamma it may choose"),
        ({"tables": ("fig6",), "methods": ("scrub",)}, "scrub for fig6, expected rows whose gamma it may choose"),
        ({"tables": ("table1", "fig6"), "methods": ("npo",)}, "got npo for digits/digits-net, expected rows"),
        ({"methods": ("npo", "rfa-residual")}, "got npo for digits/digits-net, expected rows for such data"),
    ],
    ids=[
        "method",
        "language method",
        "metric",
        "language metric",
        "scenario",
        "no pair",
        "wrong data",
        "layers",
        "option",
        "another gamma",
        "no table",
        "one of two",
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks_of(replace(Choice(("table1",), (DIGITS,)), **changes))


def test_of_several_tables_each_takes_the_methods_that_it_can() -> None:
    pairs = (DIGITS, "trivia/smollm2")
    choice = Choice(("table1", "table4", "table14", "fig6"), pairs, methods=("finetune", "npo", "rfa-teacher"))
    blocks = blocks_of(choice)
    rows: dict[str, set[str]] = {}
    for block in blocks:
        rows.setdefault(block.table.name, set()).update(row.spec.base or row.spec.name for row in block.rows)
    assert rows == {
        "table1": {"finetune", "rfa-teacher"},
        "table4": {"finetune", "npo", "rfa-teacher"},
        "table14": {"finetune", "rfa-teacher"},
        "fig6": {"rfa-teacher"},
    }
    assert left_out(blocks, choice) == []
    alone = replace(choice, methods=("finetune",))
    assert left_out(blocks_of(alone), alone) == ["fig6"]
    everything = replace(choice, methods=None)
    assert left_out(blocks_of(everything), everything) == []


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected all or one of table1, table2"):
        find_tables("table15")
    with pytest.raises(ValueError, match="'mnist', expected one of digits, fashion-mnist"):
        find_pairs("mnist", None)
    with pytest.raises(ValueError, match="'gpt' with bbc-news, expected one of minilm"):
        find_pairs("bbc-news", "gpt")
    paper = {"epochs": 10, "batch_size": 128, "lr": 5e-5, "warmup_steps": 250}
    assert "the paper's recipe" in recipe_words(paper, PAIRS["cifar-10/vit"])
    assert "shortened recipe" in recipe_words({**paper, "epochs": 3}, PAIRS["cifar-10/vit"])


def options_of(choice: Choice) -> dict[str, dict[str, Any]]:
    """Label -> options of every run on the class."""
    (unit,) = units_of(blocks_of(choice), choice)
    rows = unit.scenarios["class:3"].values()
    return {row.spec.label: row.options(PAIRS[DIGITS], "class", 100, 0) for row in rows}


def test_a_setting_of_the_user_keeps_rows_apart_that_say_nothing_and_reaches_those_that_vary() -> None:
    choice = Choice(("table1", "rank"), (DIGITS,), seeds=1, overrides={"rfa-residual": {"rank": 4}})
    ranks = [options.get("rank") for options in options_of(choice).values()]
    assert sorted(rank for rank in ranks if rank is not None) == [1, 2, 4, 8, 16]  # 4 is the row that says nothing
    rated = replace(choice, overrides={"rfa-residual": {"lr": 0.5}})
    rates = {label: options["lr"] for label, options in options_of(rated).items()}
    assert rates["rank 1"] == rates["RFA residual"] == 0.5 != rates["RFA teacher"]


@pytest.mark.parametrize(
    ("table", "methods", "overrides", "message"),
    [
        ("table1", None, {"rfa": {"mode": "teacher"}}, "rfa.mode = 'teacher', .*rfa-residual: .* mode to 'residual'"),
        ("table1", ("rfa-l2",), {"rfa-l2": {"norm": "mse"}}, "rfa-l2.norm = 'mse', .* fixes norm to 'l2'"),
        ("table1", ("rfa", "rfa-deep"), {"rfa": {"targets": "all"}}, "rfa.targets .* rfa-deep: .* targets to 'deep'"),
        ("table1", ("rfa-head",), {"rfa": {"targets": "all"}}, r"rfa.targets .* fixes targets to \['fc'\]"),
        ("table1", None, {"neggrad": {"forget_per_batch": 3}}, "neggrad.forget_per_batch .* one pass over D_f"),
        ("fig6", None, {"rfa-residual": {"mode": "teacher"}}, "rfa-residual.mode .* that row fixes mode to 'residual'"),
        ("rank", None, {"rfa": {"rank": 4}}, r"rfa.rank = 4, .*: rank varies rank itself \(1, 2, 4, 8, 16\)"),
    ],
    ids=["mode", "norm", "targets", "head", "neggrad", "base of a sweep", "sweep"],
)
def test_a_setting_that_a_row_does_not_leave_open_is_refused(
    table: str, methods: tuple[str, ...] | None, overrides: dict[str, dict[str, Any]], message: str
) -> None:
    choice = Choice((table,), (DIGITS,), methods=methods, seeds=1, overrides=overrides)
    with pytest.raises(ValueError, match=f"set: got {message}"):
        blocks_of(choice)


def test_a_setting_of_a_method_reaches_all_its_rows_and_leaves_sweeps_their_values() -> None:
    choice = Choice(("table1", "table14", "rank"), (DIGITS,), seeds=1, overrides={"rfa": {"lr": 0.5, "rank": 2}})
    runs = {label: o for label, o in options_of(choice).items() if o["method"] == "rfa"}
    assert {label: (options["lr"], options["rank"]) for label, options in runs.items()} == {
        "RFA residual": (0.5, 2), "RFA teacher": (0.5, 2),
        **{f"lr = {rate}": (rate, 2) for rate in (1e-5, 5e-5, 1e-4, 5e-4, 1e-3)},
        **{f"rank {rank}": (0.5, rank) for rank in (1, 2, 4, 8, 16)},
    }  # fmt: skip
    assert options_of(choice)["SCRUB"]["lr"] != 0.5


def test_a_precision_set_for_one_method_is_its_own(tmp_path: Path) -> None:
    choice = Choice(
        ("table1",), (DIGITS,), scenarios=("class:3",), methods=("finetune", "scrub"), seeds=1, cache=tmp_path,
        autocast="bfloat16", overrides={"scrub": {"autocast": None}},
    )  # fmt: skip
    (unit,) = units_of(blocks_of(choice), choice)
    shop = runner.Workshop(choice, say=lambda text: None, progress=False)
    methods = shop.methods(unit, "class:3", shop.scenario(unit, "class:3"))
    assert [method.options["autocast"] for method in methods.values()] == ["bfloat16", None]
