"""What a plan holds, what it is expected to take, and what fits into a given time, against sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from rfa_fast.data import TextDataset
from rfa_fast.experiments.common import Experiment
from rfa_fast.experiments.tables import experiment
from rfa_fast.experiments.tables.budget import fit, ladder, read_budget
from rfa_fast.experiments.tables.forecast import Extent, Forecaster
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.plan import Choice, PlannedRow, Sizes, blocks_of, units_of
from rfa_fast.experiments.tables.rates import Rates, passes_of
from rfa_fast.experiments.tables.rows import ROWS

DIGITS = "digits/digits-net"


class Counted(Forecaster):
    """A forecaster with rates and extents given."""

    def __init__(self, choice: Choice, train: int = 60_000, rates: dict[str, dict[str, float]] | None = None) -> None:
        self.choice, self.probed, self.experiments = choice, [], {}
        self.units = units_of(blocks_of(choice), choice)
        self.rates = rates or {choice.pairs[0]: {"train": 1e-3, "forward": 1e-4, "neggrad": 2e-3}}
        forgotten = {"sample:128": 128} | dict.fromkeys(("class:0", "class:3"), train // 10)
        self.extents = {(pair, ""): Extent(train, 10_000, forgotten, 5) for pair in self.rates}


@pytest.mark.parametrize(("jobs", "threads", "expected"), [(1, 1, 1), (2, 1, 2), (3, 1, 2), (3, 2, 1), (2, 4, 1)])
def test_jobs_beyond_the_cores_wait(jobs: int, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert experiment._abreast(jobs) == expected


def test_what_a_pair_costs_at_given_sizes_is_a_sum_by_hand() -> None:
    pair = "fashion-mnist/resnet18"
    forecaster = Counted(Choice(("table1",), (pair,), methods=("neggrad",), seeds=1))
    # Original 60,000 · 5, Retrain 59,872 · 5 and 54,000 · 5 at 1 ms; NegGrad 2 · 64 + 48 · 125 at 2 ms;
    # three rows measured on 60,000 + 10,000 in each scenario at 0.1 ms, on at most 512 of each subset by two more
    # models, and a second for each of the six.
    whole = 300 + 299.36 + 270 + 12.256 + 42 + 3 * 2 * (128 + 5 * 512) * 1e-4 + 6
    assert forecaster.cost(pair, Sizes()) == pytest.approx(whole, rel=1e-6)
    forecaster.rates[pair]["model"] = 4.0  # of a probe: a row's copy, hashes and texts
    assert forecaster.cost(pair, Sizes()) == pytest.approx(whole + 6 * 4, rel=1e-6)
    del forecaster.rates[pair]["model"]
    # Of 400 samples 100 are drawn to be forgotten, 40 are of the class: Original 400, Retrain 300 and 360, one epoch;
    # NegGrad 2 · 50 and 1 · 40; 50 + 50 + 50 and 40 + 50 + 50 measured, by three models.
    small = 0.4 + 0.3 + 0.36 + 0.28 + 3 * 3 * (150 + 140) * 1e-4 + 6
    assert forecaster.cost(pair, Sizes(limit=400, epochs=1, samples=50)) == pytest.approx(small, rel=1e-6)
    forecaster = Counted(replace(forecaster.choice, seeds=3, retrain_seeds=4))
    # Two of the four seeds train Retrain alone: its models and two rows of each.
    alone = 0.3 + 0.36 + 3 * (150 + 140) * 1e-4 + 2
    fewer = forecaster.cost(pair, Sizes(limit=400, epochs=1, samples=50, seeds=2))
    assert fewer == pytest.approx(2 * small + 2 * alone, rel=1e-6)


def test_a_budget_takes_sizes_that_fit_and_shrinks_what_takes_longest() -> None:
    pair, other = "fashion-mnist/resnet18", "fashion-mnist/small-vit"
    choice = Choice(("table1",), (pair,), methods=("neggrad",), seeds=3)
    forecaster = Counted(choice)
    sizes = ladder(forecaster, pair)
    costs = [forecaster.cost(pair, size) for size in sizes]
    assert costs == sorted(costs, reverse=True)
    assert sizes[0] == Sizes()
    assert sizes[-1].seeds == 1
    assert sizes.index(next(s for s in sizes if s.seeds)) > sizes.index(next(s for s in sizes if s.limit))
    assert fit(forecaster, 1e6) == {pair: Sizes()}
    for budget in (2000.0, 300.0, 60.0):
        found = fit(forecaster, budget)[pair]
        assert forecaster.cost(pair, found) <= 0.85 * budget < forecaster.cost(pair, sizes[sizes.index(found) - 1])
        assert fit(forecaster, budget / 2, abreast=2)[pair] == found
    with pytest.raises(ValueError, match="or more for this plan"):
        fit(forecaster, 0.5)
    rates = {pair: {"train": 1e-5, "forward": 1e-6}, other: {"train": 1e-3, "forward": 1e-4}}
    both = Counted(replace(choice, pairs=(pair, other)), rates=rates)
    found = fit(both, 300)
    assert found[pair] == Sizes()
    assert found[other].limit is not None
    asked = Counted(replace(choice, scenarios=("sample:128", "class:0")), train=1000)
    assert ladder(asked, pair)[-1].limit == 512  # what the user named keeps its count, and four times as many samples
    assert ladder(Counted(choice, train=1000), pair)[-1].limit == 24


def test_the_longest_pieces_of_a_shrunk_plan_come_first() -> None:
    pair, other = "fashion-mnist/resnet18", DIGITS
    rates = {pair: {"train": 1e-3, "forward": 1e-4}, other: {"train": 1e-8, "forward": 1e-8}}
    choice = Choice(("table1", "persistence"), (other, pair), seeds=2)
    small = replace(choice, sizes={pair: Sizes(limit=200, seeds=1)})
    forecaster = Counted(small, rates=rates)
    assert any("sample:50" in unit.scenarios for unit in forecaster.units)  # of 128
    ordered = [(unit.pair, unit.seed, unit.lasting) for unit in forecaster.longest_first()]
    assert ordered[0] == (pair, 0, True)
    assert sorted(ordered) == sorted((unit.pair, unit.seed, unit.lasting) for unit in forecaster.units)
    costs = [forecaster.unit_cost(unit, small.sizes_of(unit.pair)) for unit in forecaster.longest_first()]
    assert costs == sorted(costs, reverse=True)


def test_a_budget_leaves_no_keyword_without_a_text(tmp_path: Path) -> None:
    pair = "bbc-news/minilm"
    forecaster = Counted(Choice(("table3",), (pair,), seeds=1), rates={pair: {"train": 1.0, "forward": 1.0}})
    texts = TextDataset(
        ["a vote" if i in (7, 700) else "a text" for i in range(1000)], [0, 1] * 500, classes=("x", "y")
    )
    made = Experiment("texts", nn.Module, "none", texts, texts, ("x", "y"), {})
    forecaster.experiments = {(pair, ""): made}
    forecaster.extents = {(pair, ""): Extent(1000, 1000, {"class:x": 500, "keyword:vote": 2}, 1)}
    limits = {size.limit for size in ladder(forecaster, pair)}
    assert None in limits
    assert limits & {100, 50, 48, 24} == set()  # the texts left have no vote


@pytest.mark.parametrize("budget", ["soon", "3 weeks", "0h", "-1h"])
def test_a_budget_is_a_time(budget: str) -> None:
    with pytest.raises(ValueError, match="such as 3h"):
        read_budget(budget)


def test_rates_are_kept_by_thread_number_and_a_spoilt_file_is_no_error(tmp_path: Path) -> None:
    rates = Rates(tmp_path, DIGITS, threads=2)
    rates.note("train", 1.0, 100)
    rates.note("train", 3.0, 100)
    rates.note("scrub", math.nan, 100)
    rates.save()
    assert Rates(tmp_path, DIGITS, threads=2).get("train") == pytest.approx(0.02)
    assert Rates(tmp_path, DIGITS, threads=2).get("scrub") is None
    assert Rates(tmp_path, DIGITS, threads=4).get("train") is None
    rates.path.write_text('{"2": [1]}')
    assert Rates(tmp_path, DIGITS, threads=2).get("train") is None


def test_what_neggrad_goes_through_is_counted_by_its_steps() -> None:
    row = PlannedRow(ROWS["neggrad"], epochs=3)
    options = row.options(PAIRS[DIGITS], "class", 100, 0)
    assert passes_of(row, {"D_f": 100, "D_r": 900}, options) == options["max_steps"] * options["forget_per_batch"]
    assert passes_of(PlannedRow(ROWS["scrub"]), {"D_f": 100, "D_r": 900}, {"epochs": 2}) == 1800


def test_rates_of_two_processes_are_both_kept(tmp_path: Path) -> None:
    mine, other = (Rates(tmp_path, DIGITS, threads=1) for _ in range(2))
    mine.note("train", 2.0, 100)
    other.note("rfa", 4.0, 100)
    mine.save()
    other.save()
    found = Rates(tmp_path, DIGITS, threads=1)
    assert (found.get("train"), found.get("rfa"), found.get("forward")) == (0.02, 0.04, None)


def test_a_row_that_repeating_makes_the_papers_own_is_there_once() -> None:
    choice = Choice(("table1",), (DIGITS,), methods=("badt", "scrub", "badt-5x"), repeat=5)
    labels = [row.spec.label for row in blocks_of(choice)[0].rows]
    assert labels == ["SCRUB, D_f × 5", "BadT, D_f × 5"]
    assert [row.spec.name for row in blocks_of(choice)[0].rows] == ["scrub", "badt-5x"]
    thrice = [row.spec.label for row in blocks_of(replace(choice, repeat=3))[0].rows]
    assert thrice == ["BadT, D_f × 3", "SCRUB, D_f × 3", "BadT, D_f × 5"]
    rates = blocks_of(replace(choice, tables=("table14",), methods=("badt", "badt-5x")))[0].rows
    assert len({row.key for row in rates}) == len(rates) == 5


def test_rows_of_one_label_are_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(ROWS["scrub"]), "label", "BadT")
    with pytest.raises(ValueError, match="methods: got 'BadT' more than once for table1"):
        blocks_of(Choice(("table1",), (DIGITS,)))


def test_a_scenario_that_is_asked_for_twice_is_there_once() -> None:
    choice = Choice(("table1",), (DIGITS,), ("class:3", "sample:9", "class:3"))
    assert [block.scenario for block in blocks_of(choice)] == ["class:3", "sample:9"]


def test_epochs_that_the_user_set_are_not_cut_short() -> None:
    cut, typed = PlannedRow(ROWS["scrub"]), PlannedRow(ROWS["scrub"], of_method={"epochs": 5})
    found = [row.options(PAIRS[DIGITS], "class", 100, 0, most_epochs=1)["epochs"] for row in (cut, typed)]
    assert found == [1, 5]
