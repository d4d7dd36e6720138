"""The tables of texts and language models on models of two layers: every method, both placements, every metric.

And what is said of a table of another kind: a sweep, a run whose epochs are cut short, names that are markup.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_cases import four_token_texts

from rfa_fast.data import TokenDataset, split_by_sample
from rfa_fast.experiments.common import Experiment, Row
from rfa_fast.experiments.comparison import Request
from rfa_fast.experiments.models import seeded
from rfa_fast.experiments.tables.experiment import run
from rfa_fast.experiments.tables.outputs import _md
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.plan import Choice, blocks_of
from rfa_fast.experiments.tables.results import BlockResult, block_result
from rfa_fast.experiments.tables.runner import Found, Place
from rfa_fast.experiments.tables.scenarios import block_scenario
from rfa_fast.report import RunReport

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 8,
}  # fmt: skip
STEPS = {"max_steps": 1, "batch_size": 12, "epochs": 1}


def tokens(n: int, *, language: bool) -> TokenDataset:
    """With a word to forget in every ninth text."""
    texts = ["a film" if i % 9 == 0 else "news" for i in range(n)]
    return four_token_texts(n, language=language, prompt=2, texts=texts, prompts=["p"] * n)


def language_model(request: Request) -> Experiment:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    return Experiment(
        "llama", lambda: seeded(request.seed, lambda: LlamaForCausalLM(config)), f"tiny Llama {request.seed}",
        tokens(60, language=True), tokens(30, language=True), ("a", "b", "c"),
        request.recipe({"epochs": 2, "batch_size": 12, "lr": 5e-3}), kind="language",
    )  # fmt: skip


def classifier(request: Request) -> Experiment:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**SMALL, num_labels=3)
    return Experiment(
        "bert", lambda: seeded(request.seed, lambda: BertForSequenceClassification(config)), f"BERT {request.seed}",
        tokens(60, language=False), tokens(30, language=False), ("a", "b", "c"),
        request.recipe({"epochs": 2, "batch_size": 12, "lr": 5e-3}),
    )  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore:unlearn. .* forget samples", "ignore:lm_head. its weight is tied")


def computed(table: str, pair: str, folder: Path, *scenarios: str, **changes: Any) -> RunReport:
    methods = ("neggrad", "finetune", "badt", "scrub", "salun", "graddiff", "npo", "simnpo", "rmu", "rfa")
    choice = Choice(
        (table,), (pair,), scenarios, seeds=1, overrides=dict.fromkeys(methods, STEPS), cache=folder / "cache",
        **changes,
    )  # fmt: skip
    return run(choice, folder / table, say=lambda text: None, progress=False)[0]


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in (("trivia/smollm2", language_model), ("bbc-news/minilm", classifier)):
        monkeypatch.setitem(vars(PAIRS[name]), "make", make)
    monkeypatch.setattr("rfa_fast.report_page.draw_plots", lambda scenario, anchor: [])


def test_the_tables_of_text_generation_share_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ("neggrad", "finetune", "badt", "badt-5x", "npo", "rmu", "rfa-residual")
    report = computed("table4", "trivia/smollm2", tmp_path, "class:b", methods=methods)
    rows = {row.method: row for row in report.scenarios[0].rows}
    assert len(rows) == 2 + len(methods)
    assert rows["BadT, D_f × 5"].metrics != rows["BadT"].metrics
    for name, row in rows.items():
        assert set(row.metrics) == {f"{subset}/perplexity" for subset in ("D_r", "D_f", "D_rt", "D_ft")}, name
        assert min(row.metrics.values()) > 1
    assert rows["RFA residual"].published["D_f/perplexity"] == 33.96
    assert math.isinf(rows["NegGrad"].published["D_r/perplexity"])
    assert rows["Finetune"].metrics != rows["Original"].metrics
    assert rows["Original"].metrics["D_f/perplexity"] < rows["Retrain"].metrics["D_f/perplexity"]
    monkeypatch.setattr("rfa_fast.experiments.common.unlearn", lambda *a, **k: pytest.fail("unlearnt again"))
    for table, column in (("table7", "D_ft/activation_distance"), ("table9", "D_ft/feature_distance_2")):
        shown = computed(table, "trivia/smollm2", tmp_path, "class:b", methods=methods).scenarios[0]
        assert {row.method: row.metrics for row in shown.rows}["Finetune"][column] > 0


def test_a_larger_language_model_is_adapted_in_its_head_or_its_latter_half(tmp_path: Path) -> None:
    report = computed(
        "table5",
        "trivia/smollm2",
        tmp_path,
        "class:b",
        methods=("rfa-head", "rfa-teacher-head", "rfa-deep", "finetune"),
    )
    rows = {row.method: row for row in report.scenarios[0].rows}
    heads = {name: rows[name].metrics["D_f/perplexity"] for name in ("RFA residual, head", "RFA residual, latter half")}
    assert len(set(heads.values())) == 2
    assert rows["RFA residual, head"].published == {
        "D_r/perplexity": 2.05, "D_f/perplexity": 2.37, "D_rt/perplexity": 2.10, "D_ft/perplexity": 2.29, "mia_svm": 1.0
    }  # fmt: skip
    settings = report.scenarios[0].settings["methods"]
    assert settings['rfa mode="residual" head']["targets"] == ["lm_head"]


def test_text_classification_forgets_a_keyword_beside_the_papers_class(tmp_path: Path) -> None:
    changes = {"metrics": ("accuracy", "zrf"), "methods": ("scrub", "rfa-teacher")}
    report = computed("table3", "bbc-news/minilm", tmp_path, "keyword:film", "sample:12", **changes)
    keyword, sample = report.scenarios[:2]
    rows = {row.method: row for row in keyword.rows}
    assert rows["RFA teacher"].published["D_ft/accuracy"] == 0.5093
    assert "D_f/accuracy" not in rows["Retrain"].published
    assert {"D_f/zrf", "D_ft/zrf"} <= set(rows["SCRUB"].metrics)
    assert [column.key for column in sample.metrics][:3] == ["D_r/accuracy", "D_f/accuracy", "D_t/accuracy"]
    assert keyword.settings["samples"] == {"D_r": 53, "D_f": 7, "D_rt": 26, "D_ft": 4}


def test_times_stand_beside_their_quotient_to_finetune(tmp_path: Path) -> None:
    report = computed("table12", "bbc-news/minilm", tmp_path, "class:b", methods=("finetune", "rfa-residual"))
    rows = {row.method: row for row in report.scenarios[0].rows}
    ours = rows["RFA residual"].metrics
    assert ours["seconds/finetune"] == pytest.approx(ours["seconds"] / rows["Finetune"].metrics["seconds"])
    assert rows["RFA residual"].published["seconds/finetune"] == pytest.approx(1.849, abs=1e-3)
    assert ours["peak_mib"] > 0
    assert all("Mean absolute gap" not in scenario.title for scenario in report.scenarios)


def test_whether_it_stays_forgotten_is_a_table_with_states_for_columns(tmp_path: Path) -> None:
    report = computed("persistence", "bbc-news/minilm", tmp_path, "class:b", methods=("scrub", "rfa-residual"))
    shown = report.scenarios[0]
    labels = ["merged", "live", "8-bit", "8-bit live", "4-bit", "4-bit live", "finetuned", "relearnt"]
    assert [column.label for column in shown.metrics] == labels
    rows = {row.method: row.metrics for row in shown.rows}
    live = {"live/forget_accuracy", "8-bit live/forget_accuracy", "4-bit live/forget_accuracy"}
    assert set(rows["RFA residual"]) - set(rows["SCRUB"]) == live
    assert rows["RFA residual"]["live/forget_accuracy"] == rows["RFA residual"]["merged/forget_accuracy"]
    assert 0 <= rows["Retrain"]["relearnt/forget_unseen_accuracy"] <= 1
    assert report.scenarios[1].title == "Mean absolute gap to Retrain"


def figures_of(choice: Choice, most_epochs: int | None = None) -> BlockResult:
    """The first block of a plan for the digits with figures of two seeds, invented."""
    block = blocks_of(choice)[0]
    founds = {}
    for seed in range(2):
        rows = {}
        for at, name in enumerate(["Original", "Retrain", *(row.key for row in block.rows)]):
            figures = {f"{subset}/accuracy": 0.9 - at / 50 + seed / 50 for subset in ("D_r", "D_f", "D_t")}
            rows[name] = Row(1.0, figures, {}, {"forget": [0.5], "test": [0.5]})
        options = {
            row.key: row.options(block.pair, block.kind, 64, seed, most_epochs=most_epochs) for row in block.rows
        }
        sizes, recipe = {"D_r": 936, "D_f": 64, "D_t": 20}, {"epochs": 6, "lr": 1.0, "batch_size": 1}
        found = Found(rows, {}, split_by_sample(1000, 20, 64), sizes, sizes, recipe, options)
        founds[Place(block.pair.name, seed, block.scenario)] = found
    return block_result(block, founds)


def test_a_sweep_shows_its_last_row_and_says_what_is_within_retrains_range() -> None:
    choice = Choice(("fig6",), ("digits/digits-net",), ("sample:64",), metrics=("accuracy",))
    scenario = block_scenario(figures_of(choice))
    assert any(note.startswith("The plots show γ = 0.9, seed 0") for note in scenario.notes)
    told = next(note for note in scenario.notes if note.startswith("Retrain over 2 seeds, D_f: 88.00 to 90.00 %"))
    assert "γ = 0.1 87.00 is not within" in told


def test_a_sweep_with_repeated_samples_is_not_called_after_its_first_value() -> None:
    choice = Choice(("fig6",), ("digits/digits-net",), ("sample:64",), metrics=("accuracy",), repeat=2)
    assert [chart.title for chart in block_scenario(figures_of(choice)).charts] == ["Accuracy, D_f × 2"]
    several = replace(choice, methods=("rfa-residual", "rfa-deep"), repeat=1)
    titles = [chart.title for chart in block_scenario(figures_of(several)).charts]
    assert titles == ["Accuracy, RFA residual", "Accuracy, RFA residual, latter half"]


def test_twice_the_epochs_are_only_claimed_where_there_are_so_many() -> None:
    choice = Choice(("table2",), ("digits/digits-net",), ("sample:64",))
    note = "Twice as many epochs of unlearning as in Table I."
    assert note in figures_of(choice).notes()
    assert note not in figures_of(choice, most_epochs=1).notes()


def test_a_name_that_markdown_would_read_as_markup_is_escaped() -> None:
    assert _md("keyword:__init__ on D_f") == r"keyword:\_\_init\_\_ on D_f"
    assert _md("[a](http://evil) ~~b~~") == r"\[a\](http://evil) \~\~b\~\~"
    assert _md("a\\|b <i> `c` *d*") == r"a\\\|b &lt;i&gt; \`c\` \*d\*"
