"""The commands when something is wrong: one line that says what, an exit code, and nothing lost."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import QUICK, nets, place, run, without_plots
from safetensors.torch import load_file, save_file

from rfa_fast.commands.measure import Measuring
from rfa_fast.data import load
from rfa_fast.methods import read_record
from rfa_fast.report import RunReport

__all__ = ["place", "without_plots"]


def figures(output: Path) -> dict[str, dict[str, float]]:
    report = RunReport.from_json(output / "report.json")
    return {row.method: row.metrics for row in report.scenarios[0].rows}


@pytest.mark.usefixtures("without_plots")
def test_ctrl_c_says_how_to_go_on_and_the_end_is_the_same(place: Path) -> None:
    name = nets(place)
    words = ["unlearn", f"{name}:build", "--data", "images.npz", "--forget-class", "1", "--batch-size", "8", "--rank",
             "2", "--targets", "all", "--epochs", "2", "--no-progress", "--no-distances", "--output"]  # fmt: skip
    start = f"import {name}; {name}.Net.interrupt_at = 3; from rfa_fast.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", start, *words, "my out"], capture_output=True, text=True, timeout=300, check=False,
        cwd=place,
    )  # fmt: skip
    assert ended.returncode == 130, ended.stderr
    assert "Interrupted after step 3" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (place / "my out" / "split.json").is_file()
    assert not (place / "my out" / "model").exists()
    command = next(line for line in ended.stderr.splitlines() if "--resume" in line)
    typed = shlex.split(command)
    assert typed == ["rfa-fast", *words, "my out", "--resume"]
    run(*typed[1:])
    run(*words, "straight")
    one, other = (load_file(place / out / "model" / "model.safetensors") for out in ("my out", "straight"))
    assert all(torch.equal(one[key], value) for key, value in other.items())
    assert figures(place / "my out") == figures(place / "straight")
    losses = [RunReport.from_json(place / o / "report.json").scenarios[0].losses for o in ("my out", "straight")]
    totals = [[step["total"] for step in steps] for steps in losses]
    assert totals[0] == totals[1]


FACTORY = ["{nets}:build", "--data", "images.npz", "--forget-class", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["nowhere", *FACTORY[1:]], "model: nowhere is no folder here", id="no model"),
        pytest.param(["torchvision:resnet18", *FACTORY[1:]], "expected --weights FILE.safetensors", id="no weights"),
        pytest.param(["torchvision:resnet", *FACTORY[1:], "--weights", "w.safetensors"], "did you mean", id="name"),
        pytest.param([*FACTORY, "--weights", "w.pt"], "a pickle, which runs code when it is read", id="pickle"),
        pytest.param([*FACTORY, "--weights", "cut.safetensors"], "is it cut short?", id="truncated weights"),
        pytest.param(["{nets}:needs", *FACTORY[1:]], "needs the arguments width", id="factory with arguments"),
        pytest.param(
            [FACTORY[0], "--data", "moons", "--forget-class", "1"],
            "got 'moons', expected one of digits",
            id="unknown data",
        ),
        pytest.param([FACTORY[0], "--data", "gone.npz", "--forget-class", "1"], "gone.npz", id="absent data"),
        pytest.param(
            [*FACTORY[:4], "7"],
            "got class '7', expected one of the training set's: 0 (0), 1 (1), 2 (2)",
            id="unknown class",
        ),
        pytest.param(FACTORY[:3], "nothing to forget, expected one of --forget-class", id="nothing to forget"),
        pytest.param([*FACTORY, "--forget-samples", "3"], "got --forget-class and --forget-samples", id="two requests"),
        pytest.param([*FACTORY[:3], "--forget-keyword", "cat"], "a set of images", id="keyword for images"),
        pytest.param(
            [*FACTORY[:3], "--forget-samples", "999"], "expected fewer than the 48 training samples", id="all"
        ),
        pytest.param([*FACTORY[:3], "--forget-ids", "bad.txt"], "1 of 2 are no training sample of images", id="ids"),
        pytest.param([*FACTORY[:3], "--split", "gone.json"], "gone.json does not exist", id="no split"),
        pytest.param(
            [*FACTORY, "--rank", "99", "--targets", "blocks.0"], "rank: got 99, expected at most 4", id="rank"
        ),
        pytest.param([*FACTORY, "--targets", "layer9"], "got 'layer9', which matched no layer", id="targets"),
        pytest.param([*FACTORY, "--mode", "pupil"], "mode: got 'pupil', expected one of 'residual'", id="mode"),
        pytest.param([*FACTORY, "--loss-weights", "1,2"], "weights: got (1.0, 2.0), expected four", id="loss weights"),
        pytest.param([*FACTORY, "--autocast", "float16"], "autocast: got 'float16', expected", id="autocast"),
        pytest.param([*FACTORY, "--dtype", "int8"], "dtype: got 'int8'", id="dtype"),
        pytest.param([*FACTORY, "--device", "cuda:9"], "device: got 'cuda:9'", id="device"),
        pytest.param([*FACTORY, "--device", "meta"], "device: got 'meta', which holds no values", id="meta"),
        pytest.param([*FACTORY, "--max-length", "64"], "--max-length: got a value with images, expected", id="length"),
        pytest.param([*FACTORY, "--data-option", "size"], "expected KEY=VALUE", id="data option"),
        pytest.param([*FACTORY, "--data-option", "colour=1"], "got option 'colour', expected some of", id="loader"),
        pytest.param(
            [*FACTORY, "--rank", "2", "--retrained", "nowhere"], "model: nowhere is no folder here", id="retrained"
        ),
        pytest.param(
            [*FACTORY, "--output", "images.npz"], "images.npz: got a file, expected a folder", id="output is a file"
        ),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(place: Path, words: list[str], message: str) -> None:
    (place / "w.pt").write_bytes(b"")
    save_file({"a": torch.zeros(1)}, place / "w.safetensors")
    (place / "cut.safetensors").write_bytes((place / "w.safetensors").read_bytes()[:20])
    (place / "bad.txt").write_text(f"{load(place / 'images.npz').train.ids[0]}\nnobody\n")
    before = sorted(place.rglob("*"))
    result = run("unlearn", *(word.format(nets=nets(place)) for word in words), "--no-progress", code=2)
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert sorted(file for file in place.rglob("*") if "__pycache__" not in file.parts) == before


@pytest.mark.parametrize(
    "words",
    [["--targets", "deep"], ["--rank", "8"], ["--adapter", "lora"], ["--classes", "3"], ["--weights", "w.safetensors"]],
    ids=lambda words: words[0],
)
def test_info_without_a_model_takes_no_flag_about_one(words: list[str]) -> None:
    refused = run("info", *words, code=2)
    assert f"{words[0]}: got a value without MODEL, expected MODEL" in refused.stderr
    assert refused.stdout == ""


def test_flags_that_nothing_reads_are_refused(place: Path) -> None:
    net = f"{nets(place)}:build"
    for command in (["info", net], ["bench", net, "--no-progress"]):
        assert (
            f"--classes: got a value with {net}, expected torchvision" in run(*command, "--classes", "3", code=2).stderr
        )
    words = ["evaluate", net, "--data", "images.npz", "--forget-class", "1", "--no-progress", "--max-length", "9"]
    assert "--max-length: got a value with images, expected --data of texts" in run(*words, code=2).stderr
    words = ["bench", net, "--no-progress", "--forecast-only", "--weights", "w.safetensors"]
    assert "--weights: got a value with --forecast-only, expected a step that is timed" in run(*words, code=2).stderr


@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
def test_a_prompt_for_a_model_that_classifies_is_refused_before_anything_is_measured(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))
    words = [f"{nets(place)}:build", "--data", "images.npz", "--forget-class", "1", "--no-progress"]
    refused = run(command, *words, "--prompt", "the", code=2)
    assert "--prompt: got 'the' for a model that classifies, expected none" in refused.stderr
    assert not (place / "runs").exists()


EARLY = [*FACTORY, "--retrained", FACTORY[0], "--no-progress", "--output", "out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--lr", "0"], "lr: got 0.0, expected a finite number > 0", id="lr"),
        pytest.param(["--weight-decay", "-1"], "weight_decay: got -1.0, expected a finite number >= 0", id="decay"),
        pytest.param(["--epochs", "0"], "epochs: got 0, expected an integer >= 1", id="epochs"),
        pytest.param(["--max-steps", "0"], "max_steps: got 0, expected an integer >= 1", id="steps"),
        pytest.param(["--max-grad-norm", "0"], "max_grad_norm: got 0.0, expected a finite number > 0", id="norm"),
        pytest.param(["--schedule", "step"], "schedule: got 'step', expected 'constant', 'linear' or", id="schedule"),
        pytest.param(["--checkpoint-every", "0"], "checkpoint_every: got 0, expected an integer", id="checkpoints"),
        pytest.param(["--batch-size", "0"], "batch_size: got 0, expected an integer >= 1", id="no batch"),
        pytest.param(["--rank", "2", "--batch-size", "1"], "batch_size: got 1, expected 2 or more", id="batch of one"),
        pytest.param(
            ["--rank", "2", "--batch-size", "8", "--forget-per-batch", "8"],
            "forget_per_batch: got 8, expected less than batch_size=8",
            id="forget alone",
        ),
        pytest.param(
            ["--rank", "2", "--forget-per-batch", "few"], "forget_per_batch: got 'few', expected 'auto'", id="per batch"
        ),
        pytest.param(["--targets", "blocks.0", "--rank", "99"], "rank: got 99, expected at most 4", id="rank"),
        pytest.param(["--targets", "layer9"], "got 'layer9', which matched no layer", id="targets"),
        pytest.param(["--method", "finetune", "--targets", "layer9"], "which matched no layer", id="of a method"),
    ],
)
def test_what_unlearn_would_refuse_is_found_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))
    refused = run("unlearn", *(word.format(nets=nets(place)) for word in EARLY), *words, code=2)
    assert message in refused.stderr
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["demo", "evaluate", "unlearn"])
def test_a_negative_seed_is_refused_by_name(command: str, place: Path) -> None:
    words = [] if command == "demo" else [f"{nets(place)}:build", *FACTORY[1:]]
    refused = run(command, *words, "--no-progress", "--seed", "-1", code=2)
    assert "Invalid value for '--seed': " in refused.stderr


def test_other_failures_keep_their_code_and_their_traceback(place: Path) -> None:
    rest = ["--data", "images.npz", "--forget-class", "1", *QUICK]
    nan = run("unlearn", f"{nets(place)}:build_nan", *rest, code=1)
    assert "NaN or infinite logits" in nan.stderr
    with pytest.raises(RuntimeError, match="a defect"):
        run("unlearn", f"{nets(place)}:broken", *rest)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("unlearn", "nowhere", *rest, "--debug")


@pytest.mark.usefixtures("without_plots")
def test_run_with_other_settings_is_not_resumed(place: Path) -> None:
    words = ["unlearn", f"{nets(place)}:build", "--data", "images.npz", "--forget-class", "1", "--batch-size", "8",
             "--output", "out", "--no-progress", "--max-steps", "1", "--rank", "2", "--no-distances"]  # fmt: skip
    run(*words)
    before = (place / "out" / "report.json").read_bytes()
    refused = run(*words, "--resume", "--gamma", "0.1", code=2)
    assert "gamma: 0.5 in the run, 0.1 now" in refused.stderr
    assert "output_dir" not in refused.stderr
    assert (place / "out" / "report.json").read_bytes() == before
    run(*words, "--resume")
    assert read_record(place / "out")["training"]["steps"] == 1


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--lr", "0.02"], "lr: 0.01 in the run, 0.02 now", id="lr"),
        pytest.param(["--batch-size", "9"], "batch_size: 8 in the run, 9 now", id="batch"),
        pytest.param(["--schedule", "linear"], "schedule: 'constant' in the run, 'linear' now", id="schedule"),
        pytest.param(["--autocast", "bfloat16"], "autocast: None in the run, 'torch.bfloat16' now", id="autocast"),
        pytest.param(["--loss-weights", "1,1,1,2"], "options.weights: [1.0, 1.0, 1.0, 1.0] in the run", id="weights"),
        pytest.param(["--keep-adapter"], "merge: True in the run, False now", id="merge"),
        pytest.param(["--forget-class", "2"], "forget_ids: ", id="data"),
        pytest.param(["--weights", "other.safetensors"], "model: ", id="model"),
    ],
)
def test_other_settings_are_found_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    start = [*into_out(place), "--batch-size", "8"]
    run(*start)
    other = load_file(place / "out" / "model" / "model.safetensors")
    save_file(other, place / "other.safetensors")
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))
    refused = run(*start, "--resume", *words, code=2)
    assert "--resume: the run in out has other settings than this call:\n" in refused.stderr
    assert f"\n  {message}" in refused.stderr
    assert refused.stderr.count(" in the run, ") == (2 if words[0] == "--forget-class" else 1)
    assert "expected the same ones; name another --output to begin a new run" in refused.stderr


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "words",
    [
        ["--rank", "2", "--adapter", "pissa", "--schedule", "linear"],
        ["--rank", "2", "--adapter", "dora", "--mode", "teacher", "--keep-adapter"],
        ["--method", "finetune", "--targets", "deep", "--autocast", "bfloat16", "--max-grad-norm", "1"],
        ["--method", "scrub", "--forget-per-batch", "natural", "--seed", "3"],
        ["--method", "retrain", "--weight-decay", "0"],
    ],
    ids=lambda words: words[1] if words[0] == "--method" else words[3],
)
def test_a_run_with_the_same_settings_is_resumed(place: Path, words: list[str]) -> None:
    start = ["unlearn", f"{nets(place)}:build", *FACTORY[1:], "--max-steps", "2", "--no-progress", "--no-distances"]
    run(*start, "--output", "out", *words)
    before = figures(place / "out")
    run(*start, "--output", "out", *words, "--resume")
    assert figures(place / "out") == before


def into_out(place: Path) -> list[str]:
    """A short run into the folder `out`."""
    rest = ["--data", "images.npz", "--forget-class", "1", "--output", "out"]
    return ["unlearn", f"{nets(place)}:build", *rest, *QUICK]


@pytest.mark.usefixtures("without_plots")
def test_resume_without_a_run_writes_over_nothing(place: Path) -> None:
    (place / "out" / "model").mkdir(parents=True)
    (place / "out" / "model" / "precious.txt").write_text("mine")
    refused = run(*into_out(place), "--resume", code=2)
    assert "holds no run to go on with, but model, which a new run would write over" in refused.stderr
    assert (place / "out" / "model" / "precious.txt").read_text() == "mine"


@pytest.mark.usefixtures("without_plots")
def test_a_report_is_written_before_it_is_printed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(RunReport, "print", closed)
    words = ["evaluate", f"{nets(place)}:build", "--data", "images.npz", "--forget-class", "1", "--no-progress"]
    run(*words, "--output", "out", code=1)
    assert (place / "out" / "report.json").is_file()
    assert (place / "out" / "report.html").is_file()


def test_a_full_disk_says_how_to_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfa_fast.commands.unlearn.save_model", full)
    ended = run(*into_out(place), code=1)
    assert "No space left" in ended.stderr
    assert "The state is in out; go on with" in ended.stderr
    assert "--resume" in ended.stderr


@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
def test_a_model_of_another_size_is_one_line(command: str, place: Path) -> None:
    words = [f"{nets(place)}:flat", "--data", "images.npz", "--forget-class", "1", "--no-progress"]
    refused = run(command, *words, code=2)
    assert "cannot take a sample of images (mat1 and mat2 shapes cannot be multiplied" in refused.stderr
    assert "--pad-to" in refused.stderr


@pytest.mark.usefixtures("without_plots")
def test_what_unlearn_wrote_can_be_compared_with(place: Path) -> None:
    words = [f"{nets(place)}:build", "--data", "images.npz", "--forget-class", "1"]
    run("unlearn", *words, "--output", "out", *QUICK)
    run("evaluate", *words, "--against", "out/model", "--output", "both", "--no-progress")
    assert set(figures(place / "both")) == {f"{nets(place)}:build", "out/model"}


COMMANDS = {
    "evaluate": ["evaluate", *FACTORY],
    "unlearn": ["unlearn", *FACTORY],
    "bench": ["bench", FACTORY[0], "--image-size", "10"],
    "demo": ["demo"],
    "experiment": ["experiment", "table1", "--data", "digits", "--quick"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_takes_no_results_is_found_before_anything_is_done(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word.format(nets=nets(place)) for word in COMMANDS[command]]
    (place / "file").write_text("")
    refused = run(*words, "--output", "file/deeper", "--no-progress", code=2)
    assert "--output: " in refused.stderr
    assert "got a file, expected a folder, or a name that is free" in refused.stderr
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).absolute() != place)
    refused = run(*words, "--output", "new/out", "--no-progress", code=1)
    assert f"--output: {place} cannot be written to, expected a folder that can" in refused.stderr.replace("\n", "")
    assert "measured" not in refused.stderr
    assert not refused.stdout


@pytest.mark.usefixtures("without_plots")
def test_a_table_is_printed_even_where_it_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunReport, "to_html", full)
    words = ["evaluate", f"{nets(place)}:build", "--data", "images.npz", "--forget-class", "1", "--no-progress"]
    ended = run(*words, "--output", "out", code=1)
    assert "No space left" in ended.stderr
    assert "Method" in ended.stdout
    assert "D_ft" in ended.stdout


def test_a_stream_that_knows_no_greek_gets_the_help_nevertheless() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "rfa_fast", "unlearn", "--help"], capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert b"--forget-class" in ended.stdout
