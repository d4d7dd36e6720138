"""`rfa-fast experiment` on a hundred digits: what is written, resumed, refused and interrupted."""

from __future__ import annotations

import csv
import errno
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rfa_fast.cli import app
from rfa_fast.commands.experiment import read_settings
from rfa_fast.data import Split
from rfa_fast.experiments import cache as cache_module
from rfa_fast.experiments import common
from rfa_fast.experiments.tables import presence
from rfa_fast.experiments.tables.catalogue import TABLES
from rfa_fast.experiments.tables.experiment import choose_pairs
from rfa_fast.methods import NonFiniteError, unlearn
from rfa_fast.plots import Plot
from rfa_fast.report import RunReport

TINY = ["--data", "digits", "--limit", "120", "--epochs", "1", "--no-progress", "--threads", "1"]
STEPS = ["--set", "rfa.max_steps=2", "--set", "rfa.epochs=1", "--set", "scrub.max_steps=2", "--set", "badt.max_steps=2"]


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["experiment", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def plain(text: str) -> str:
    """The output without line breaks that a narrow console put in."""
    return re.sub(r"\s+", " ", text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A table of two seeds, two scenarios and two methods, and what the command said."""
    place = tmp_path_factory.mktemp("tiny")
    words = ["--methods", "scrub,rfa-residual", "--seeds", "2", "--scenario", "class:3", "--scenario", "sample:20"]
    result = run("table1", *TINY, *STEPS, *words, "--cache", str(place / "cache"), "--output", str(place / "out"))
    return place, result


@pytest.fixture(autouse=True)
def without_plots(finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """One page with its plots is enough."""
    monkeypatch.setattr("rfa_fast.report_page.draw_plots", lambda scenario, anchor: [])
    monkeypatch.setattr("rfa_fast.report_page.chart_plot", lambda chart, anchor: Plot(chart.title, missing="not drawn"))


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_is_computed_and_written_in_every_form(finished: tuple[Path, Result]) -> None:
    place, result = finished
    out = place / "out"
    said = plain(result.stderr)
    forecast = re.search(r"Forecast: .* for 16 rows and 6 trained models, from a probe of 3 steps\.", said)
    assert forecast is not None
    assert forecast.start() < said.index("Class unlearning: forget 3")
    assert "digits/digits-net: at most 120 training samples, 1 epoch of Original and Retrain." in said
    lines = lines_of(out)
    assert {line["method"] for line in lines} == {"Original", "Retrain", "SCRUB", "RFA residual"}
    ours = next(n for n in lines if (n["method"], n["column"], n["scenario"]) == ("SCRUB", "D_f/accuracy", "class:3"))
    values = [float(part.partition(":")[2]) for part in ours["values"].split()]
    assert float(ours["mean"]) == pytest.approx(sum(values) / 2)
    assert float(ours["half_width_95"]) == pytest.approx(12.7062047 * abs(values[0] - values[1]) / 2, abs=1e-9)
    assert (ours["n"], ours["paper"]) == ("2", "0.0675")
    report = RunReport.from_json(out / "report.json")
    assert [scenario.title.partition(": ")[0] for scenario in report.scenarios[:2]] == [
        "digits/digits-net, class:3",
        "digits/digits-net, sample:20",
    ]
    assert report.scenarios[2].title == "Mean absolute gap to Retrain"
    assert "shortened recipe" in report.summary
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "paper</span>" in page
    assert "Gap to Retrain: digits/digits-net, accuracy" in page
    for name in ("table.md", "table.tex", "table.txt"):
        assert "SCRUB" in (out / name).read_text(encoding="utf-8")
    assert "Mean absolute gap to Retrain" in result.stdout
    splits = sorted((out / "splits").glob("*.json"))
    assert len(splits) == 4
    assert [len(Split.load(path).forget) for path in splits] == [10, 10, 20, 20]
    assert len(list((place / "cache").glob("*.safetensors"))) == 6
    assert not (place / "cache" / "rows" / "digits-digits-net" / "runs").exists()  # nothing runs for a minute here


def test_the_same_command_and_another_table_compute_nothing_again(
    finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, _ = finished
    monkeypatch.setattr(common, "unlearn", lambda *a, **k: pytest.fail("unlearnt again"))
    monkeypatch.setattr(common, "train", lambda *a, **k: pytest.fail("trained again"))
    words = ["--methods", "scrub,rfa-residual", "--seeds", "2", "--scenario", "class:3", "--scenario", "sample:20"]
    keep = ["--cache", str(place / "cache"), "--output", str(tmp_path)]
    again = run("table1", *TINY, *STEPS, *words, *keep)
    assert "0 rows and 0 trained models, from the times of earlier rows; 16 rows are finished." in plain(again.stderr)
    assert lines_of(tmp_path) == lines_of(place / "out")
    other = run("table6", *TINY, *STEPS, *words, *keep)
    assert "Activation distance" in other.stdout
    assert any(line["paper"] == "0.42" for line in lines_of(tmp_path))


def test_other_settings_are_computed_anew_and_said(
    finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, _ = finished
    monkeypatch.setattr(common, "train", lambda *a, **k: pytest.fail("trained again"))
    words = ["--methods", "rfa-residual", "--seeds", "1", "--scenario", "class:3", "--set", "rfa.lr=1e-5"]
    keep = ["--cache", str(place / "cache"), "--output", str(tmp_path)]
    result = run("table1", *TINY, *STEPS, *words, *keep)
    assert "for 1 rows and 0 trained models" in plain(result.stderr)
    assert "1 in" in result.stderr
    assert "are of other settings or seeds" in result.stderr


def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, done = common.unlearn, []

    def stop_at_the_second(*arguments: Any, **options: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(options["method"])
        return original(*arguments, **options)

    monkeypatch.setattr(common, "unlearn", stop_at_the_second)
    words = ["--methods", "badt,scrub", "--seeds", "1", "--scenario", "class:3"]
    keep = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    stopped = run("table1", *TINY, *STEPS, *words, *keep, code=130)
    assert "the same command goes on" in stopped.stderr
    assert not (tmp_path / "out" / "table.csv").exists()
    monkeypatch.setattr(common, "unlearn", lambda *a, **k: done.append(k["method"]) or original(*a, **k))
    run("table1", *TINY, *STEPS, *words, *keep)
    assert done == ["badt", "scrub"]


def test_a_run_that_diverges_is_a_row_without_figures(
    finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = finished
    original = common.unlearn

    def diverge(*arguments: Any, **options: Any) -> Any:
        if options["method"] == "neggrad":
            raise NonFiniteError("step 2: the loss is not finite", step=2, layers=[])
        return original(*arguments, **options)

    monkeypatch.setattr(common, "unlearn", diverge)
    words = ["--methods", "neggrad,scrub", "--seeds", "1", "--scenario", "class:3"]
    keep = ["--cache", str(place / "cache"), "--output", str(tmp_path)]
    result = run("table1", *TINY, *STEPS, *words, *keep)
    assert "NegGrad has no figures for seed 0: step 2: the loss is not finite." in plain(result.stdout)
    negated = [line for line in lines_of(tmp_path) if line["method"] == "NegGrad"]
    assert {line["mean"] for line in negated} == {""}
    assert {line["paper"] for line in negated} == {"0.8351", "0.0987", "0.8187", "0.097"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table99"], "expected all or one of table1"),
        ([], "expected a table or figure, or --list"),
        (["table1", *TINY, "--methods", "magic"], "'magic', expected some of neggrad"),
        (["table1", *TINY, "--metrics", "speed"], "'speed', expected some of accuracy"),
        (["table1", *TINY, "--scenario", "class:11"], "class '11', expected one of the training set's"),
        (["table1", *TINY, "--scenario", "keyword:film"], "for data without texts"),
        (["table1", *TINY, "--scenario", "sample:120"], "expected fewer than the 120 training samples"),
        (["table1", "--data", "mnist"], "'mnist', expected one of digits"),
        (["table1", "--data", "cifar-10"], "is on this machine"),
        (["table1", *TINY, "--set", "scrub"], "expected METHOD.KEY=VALUE"),
        (["table1", *TINY, "--set", "magic.lr=1"], "'magic', expected one of neggrad"),
        (["table1", *TINY, "--set", "scrub.speed=1"], "speed"),
        (["table1", *TINY, "--set", "finetune.method=npo"], "method is chosen by --methods"),
        (["table1", *TINY, "--set", "rfa.seed=5"], "seed is chosen by --seeds"),
        (["table1", *TINY, "--set", "rfa.mode=teacher"], "that row fixes mode to 'residual'"),
        (["table1", *TINY, "--budget", "soon"], "such as 3h"),
        (["table1", *TINY, "--budget", "0.01s", "--methods", "rfa"], "or more for this plan at its smallest"),
        (["table1", *TINY, "--methods", ","], "expected names with commas"),
        (["table1", *TINY, "--autocast", "float16"], "'float16', expected torch.bfloat16"),
    ],
    ids=["table", "no table", "method", "metric", "class", "keyword", "empty", "data", "absent", "set", "set method",
         "set option", "set method of a row", "set seed", "set fixed", "time", "budget", "no method", "autocast"],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_trained(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path / "none"))
    keep = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    result = run(*words, *keep, code=2)
    assert message in plain(result.stderr)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "table.csv").exists()


def test_a_setting_gives_nothing_that_the_experiment_gives_itself() -> None:
    taken = {
        "method": "by --methods", "seed": "by --seeds", "progress": "by --no-progress", "output_dir": "--output",
        "resume": "the same command resumes", "save": "--cache", "evaluate": "cannot be typed",
        "until": "cannot be typed", "callbacks": "cannot be typed", "collate_fn": "cannot be typed",
    }  # fmt: skip
    for key, words in taken.items():
        with pytest.raises(ValueError, match=rf"^--set: got rfa\.{key}, expected .*{words}"):
            read_settings(["scrub.lr=1", f"rfa.{key}=1"])
    own = {name for name, each in inspect.signature(unlearn).parameters.items() if each.kind is each.KEYWORD_ONLY}
    assert set(taken) < own
    assert read_settings([f"rfa.{key}=1" for key in own - set(taken)])["rfa"] == dict.fromkeys(own - set(taken), 1)


def test_in_another_precision_nothing_is_shared(finished: tuple[Path, Result], tmp_path: Path) -> None:
    place, _ = finished
    words = ["--methods", "scrub,rfa-residual", "--seeds", "1", "--scenario", "class:3", "--autocast", "bfloat16"]
    result = run("table1", *TINY, *STEPS, *words, "--cache", str(place / "cache"), "--output", str(tmp_path / "out"))
    assert "for 4 rows and 2 trained models, from a probe of 3 steps" in plain(result.stderr)
    assert "warm-up steps, cosine schedule, products in bfloat16 (" in plain(result.stdout)
    files = place.glob("cache/rows/*/cells/*rfa*.json")
    rows = [json.loads(path.read_text(encoding="utf-8"))["settings"] for path in files]
    found = [row["options"].get("autocast") for row in rows]
    assert found.count("bfloat16") == 1
    assert found.count(None) >= 4


def test_data_that_lie_in_a_folder_of_the_users_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_missing_data", lambda name: f"get {name}")
    tables = [TABLES["table1"]]
    with pytest.raises(FileNotFoundError, match="needs data:fashion-mnist: get fashion-mnist"):
        choose_pairs(tables, "fashion-mnist", "resnet18", quick=False)
    found = choose_pairs(tables, "fashion-mnist", "resnet18", quick=False, folder=tmp_path)
    assert [pair.name for pair in found] == ["fashion-mnist/resnet18"]


@pytest.mark.parametrize(
    ("words", "folder", "message"),
    [
        (["--data", "digits"], "", "for digits, expected none"),
        (["--data", "digits"], "none", "for digits, expected none"),
        ([], "", "expected one data set: choose it with --data, one of fashion-mnist, cifar-10"),
        (["--data", "fashion-mnist", "--model", "resnet18"], "none", "does not exist, expected the folder of"),
    ],
    ids=["digits", "digits, no such folder", "several", "no such folder"],
)  # fmt: skip
def test_a_folder_that_no_data_would_be_read_from_is_refused(
    words: list[str], folder: str, message: str, tmp_path: Path
) -> None:
    keep = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--no-progress", "--forecast-only"]
    result = run("table1", *words, "--data-folder", str(tmp_path / folder), *keep, code=2)
    assert message in plain(result.stderr)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    words = ["--methods", "scrub", "--seeds", "1", "--scenario", "class:3"]
    keep = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    result = run("table1", *TINY, *STEPS, *words, *keep, code=1)
    assert "No space left on device" in result.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".safetensors", ".partial")]

    def no_room(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    place, _ = finished
    monkeypatch.setattr("rfa_fast.report.os.fsync", no_room)
    keep = ["--cache", str(place / "cache"), "--output", str(tmp_path / "out")]
    result = run("table1", *TINY, *STEPS, *words, *keep, code=1)
    assert "No space left on device" in result.stderr
    assert not list((tmp_path / "out").glob("table*"))


def test_a_forecast_alone_trains_nothing_and_a_budget_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "train", lambda *a, **k: pytest.fail("trained"))
    keep = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--no-progress"]
    words = ["table1", "--data", "digits", "--methods", "rfa", "--forecast-only", "--budget", "5h"]
    first = run(*words, *keep)
    assert "Forecast: " in first.stderr
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())["sizes"]["digits/digits-net"]
    assert kept["limit"] is None or kept["limit"] >= 256
    again = run(*words, *keep)
    assert "as chosen earlier for this budget" in again.stderr


def test_the_list_names_everything_and_how_to_get_what_is_missing() -> None:
    result = run("--list")
    for word in ("table1", "table14", "fig5", "fig6", "digits", "wmdp", "rfa-teacher", "mia_svm", "hf download"):
        assert word in plain(result.stdout)


@pytest.mark.long
def test_several_processes_give_the_same_figures(tmp_path: Path) -> None:
    words = ["--methods", "scrub,rfa-residual", "--seeds", "2", "--scenario", "class:3"]
    for jobs in ("1", "2"):
        keep = ["--cache", str(tmp_path / f"cache{jobs}"), "--output", str(tmp_path / f"out{jobs}")]
        said = run("table1", *TINY, *STEPS, *words, *keep, "--jobs", jobs).stderr
        assert "finished before" not in said
    assert lines_of(tmp_path / "out1") == lines_of(tmp_path / "out2")


def test_a_models_fingerprint_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rfa_fast.data import TextDataset

    data = TextDataset(["x"], [0], classes=("c",))
    first = cache_module.fingerprint(data)
    monkeypatch.setattr("rfa_fast.experiments.cache.hashlib.sha256", lambda *a: pytest.fail("read again"))
    assert cache_module.fingerprint(data) == first
