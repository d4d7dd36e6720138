"""`rfa-fast bench` on models of a few thousand weights: forecasts, rows, what is left out, Ctrl-C, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from rfa_fast.cli import app
from rfa_fast.experiments import bench as bench_module
from rfa_fast.experiments.bench import Bench, Row
from rfa_fast.experiments.geometry import Batches, batches_for, geometry
from rfa_fast.experiments.rivals import Contender, Setting
from rfa_fast.metrics import Forecast

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 9)

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))

def build():
    return Net()

def words():
    return nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(40, 9))

def choosing():
    class Choosing(Net):
        def forward(self, x):
            out = super().forward(x)
            return out * (1 if len((out > 9).nonzero()) == 0 else 2)
    return Choosing()

def silent():
    return nn.ReLU()

def transposed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 9),
    )

def square():
    class Square(Net):
        def forward(self, x):
            torch._assert(x.shape[2] == 8, "Wrong image height!")
            return super().forward(x)
    return Square()

def tagging():
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9))
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
TARGETS = ["--targets", "blocks.0", "--targets", "fc"]
SMALL = ["--image-size", "8", "--batch-size", "4", "--no-progress", "--eager", *TARGETS]


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty current folder with a module of networks, of a name that no other test has imported."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    return name


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_rows_ratios_and_the_file(nets: str) -> None:
    result = run(f"{nets}:build", *SMALL, "--rival", "floor", "--rival", "paper", "--rounds", "3", "--output", "out")
    found = json.loads(Path("out/bench.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["ours-eager", "floor", "paper"]
    assert all(len(row["seconds"]) == 3 and not row["problem"] for row in found["rows"])
    for row in found["rows"]:
        assert row["quartiles"]["median"] == sorted(row["seconds"])[1]
        assert row["quartiles"]["low"] <= row["quartiles"]["median"] <= row["quartiles"]["high"]
    assert found["batch"] == "4 × 3×8×8 pixels"
    assert found["targets"] == ["blocks.0", "fc"]
    assert (found["rounds"], found["interrupted"]) == (3, False)
    weights = 4 * (3 * 8 * 9 + 8 + 8 * 8 * 9 + 8 + 8 * 9 + 9)
    assert found["forecasts"]["ours-eager"]["weights"] == found["forecasts"]["paper"]["weights"] == weights
    assert found["forecasts"]["paper"]["state"] > weights  # a teacher
    assert found["sentence"].startswith("This step on this model at 4 × 3×8×8 pixels needs ")
    assert "the paper's arrangement would need" in result.stdout
    assert "Time of a step, in turns" in result.stdout
    assert "/ floor" in result.stdout


def test_a_forecast_of_a_geometry_reads_and_allocates_no_weights(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contender, "step", lambda *_: pytest.fail("nothing is to be run"))
    config = {**LLAMA, "hidden_size": 8192, "intermediate_size": 100_000, "num_attention_heads": 64}
    Path("config.json").write_text(json.dumps(config))
    result = run("--config", "config.json", "--forecast-only", "--length", "16", "--rival", "peft", "--output", "out",
                 "--no-progress")  # fmt: skip
    found = json.loads(Path("out/bench.json").read_text())
    one = found["forecasts"]
    assert list(one) == ["ours", "peft", "paper"]
    assert one["ours"]["weights"] > 2 * (3 * 8192 * 100_000) * 2  # two layers of bf16
    assert one["ours"]["peak"] < 1.5 * one["ours"]["weights"] < one["paper"]["peak"]
    assert found["rows"] == []
    assert "4 × 16 tokens" in result.stdout
    # A folder of which only the memory is asked needs no weights either.
    assert "4 × 64 tokens" in run(".", "--forecast-only", "--rival", "peft", "--no-progress").stdout


def test_what_does_not_fit_is_left_out_and_said(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"{nets}:build", *SMALL, "--rival", "finetune", "--forecast-only", "--output", "first")
    room = json.loads(Path("first/bench.json").read_text())["forecasts"]["ours-eager"]["above_weights"] + 100
    monkeypatch.setattr(bench_module, "free_bytes", lambda _: room)
    result = run(f"{nets}:build", *SMALL, "--rival", "finetune", "--rival", "floor", "--rounds", "1", "--output", "out")
    assert "finetune left out: it needs " in result.stderr
    rows = {row["name"]: row for row in json.loads(Path("out/bench.json").read_text())["rows"]}
    assert rows["finetune"]["seconds"] == []
    assert len(rows["ours-eager"]["seconds"]) == len(rows["floor"]["seconds"]) == 1
    assert "finetune left out" in result.stdout
    monkeypatch.setattr(bench_module, "free_bytes", lambda _: 100)
    result = run(f"{nets}:build", *SMALL, code=2)
    assert "error: our step needs " in result.stderr
    assert "0.1 KiB are free on cpu; expected a smaller batch" in result.stderr
    assert "--config: the step needs" in run("--config", "config.json", "--eager", "--no-progress", code=2).stderr


def test_room_is_shared_by_those_that_run_together() -> None:
    bench = Bench(Batches(2, (1,), None, None, torch.float32), Setting(), ("ours", "floor", "paper", "peft"))
    found = {"ours": Forecast(100, 130, 10), "paper": Forecast(100, 260, 110), "peft": Forecast(100, 150, 10)}
    # Between steps 10 + 110 + 10 lie there, during one at most 50 more.
    assert not any(row.problem for row in bench.fitting(found, 180))
    problems = {row.name: row.problem for row in bench.fitting(found, 169)}
    assert problems["paper"].startswith("left out: it needs 0.3 KiB, and beside the weights")
    assert not problems["peft"]
    assert not any(row.problem for row in bench.fitting(found, None))


def test_fine_tuning_beside_others_keeps_a_copy() -> None:
    bench = Bench(Batches(2, (1,), None, None, torch.float32), Setting(), ("ours", "finetune"))
    found = {"ours": Forecast(100, 130, 10), "finetune": Forecast(100, 420, 200)}  # as it is alone
    # Between steps 10, the copy's 100 and 200; during one at most 120 more.
    assert not any(row.problem for row in bench.fitting(found, 430))
    problems = {row.name: row.problem for row in bench.fitting(found, 429)}
    assert problems["finetune"].startswith("left out: it needs 0.5 KiB")
    assert not problems["ours"]


def test_a_configuration_is_timed_on_the_cpu(nets: str) -> None:
    words = ("--config", "config.json", "--eager", "--length", "8", "--rival", "floor", "--rounds", "1")
    run(*words, "--no-progress", "--output", "out")
    found = json.loads(Path("out/bench.json").read_text())
    assert found["device"] == "cpu"
    assert [len(row["seconds"]) for row in found["rows"]] == [1, 1]


def test_a_file_in_place_of_the_folder_is_refused_before_anything_runs(
    nets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Contender, "step", lambda *_: pytest.fail("nothing is to be run"))
        for name in ("config.json", "config.json/below"):
            said = run(f"{nets}:build", *SMALL, "--output", name, code=2).stderr
            assert "--output: config.json: got a file, expected a folder" in said
    # What goes wrong in writing takes no figures away.
    Path("out/bench.json").mkdir(parents=True)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["bench", f"{nets}:build", *SMALL, "--rival", "floor", "--rounds", "1", "--output", "out"]
    )
    assert result.exit_code != 0
    assert "Time of a step, in turns" in result.stdout


def test_a_rival_that_cannot_run_leaves_the_others_their_rows(nets: str) -> None:
    layers = ["--targets", "0", "--targets", "6"]
    small = [*SMALL[: SMALL.index("--targets")], *layers]
    result = run(f"{nets}:transposed", *small, "--rival", "floor", "--rival", "finetune", "--rounds", "1",
                 "--output", "out")  # fmt: skip
    rows = {row["name"]: row for row in json.loads(Path("out/bench.json").read_text())["rows"]}
    assert rows["floor"]["problem"].startswith("cannot run: model: got a step that dispatches aten.convolution")
    assert "floor cannot run: model: got a step" in result.stdout
    assert [len(rows[name]["seconds"]) for name in ("ours-eager", "floor", "finetune")] == [1, 0, 1]


FULL = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize(
    ("message", "problem"), [(FULL, "out of memory ([enforce fail"), ("no\nsuch step", "cannot run: no")]
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_fails_is_the_problem_of_its_row(
    nets: str, monkeypatch: pytest.MonkeyPatch, message: str, problem: str, at: int
) -> None:
    step, calls = Contender.step, []

    def failing(self: Contender, batch: Any) -> Any:
        calls.append(self.name)
        if self.name == "finetune" and calls.count("finetune") > at:
            raise RuntimeError(message)
        return step(self, batch)

    monkeypatch.setattr(Contender, "step", failing)
    words = (f"{nets}:build", *SMALL, "--rival", "finetune", "--rival", "floor", "--rounds", "2", "--output", "out")
    run(*words)
    rows = {row["name"]: row for row in json.loads(Path("out/bench.json").read_text())["rows"]}
    assert rows["finetune"]["problem"].startswith(problem)
    assert rows["finetune"]["seconds"] == []
    assert len(rows["ours-eager"]["seconds"]) == len(rows["floor"]["seconds"]) == 2
    assert calls.count("finetune") == at + 1


def test_our_own_failure_is_an_error(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Contender, batch: Any) -> Any:
        raise ValueError("batch: got none of it")

    monkeypatch.setattr(Contender, "step", failing)
    assert "batch: got none of it" in run(f"{nets}:build", *SMALL, "--rival", "floor", code=2).stderr


def test_a_rival_without_a_forecast_says_why(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_module.forecast

    def failing(*args: Any, arrangement: str, **options: Any) -> Forecast:
        if arrangement == "paper":
            raise TypeError("model: got one that cannot be copied")
        return real(*args, arrangement=arrangement, **options)

    monkeypatch.setattr(bench_module, "forecast", failing)
    result = run(f"{nets}:build", *SMALL, "--rival", "floor", "--forecast-only")
    assert "paper has no forecast: cannot run: model: got one that cannot be copied" in result.stderr
    assert "weights); the paper's arrangement is not known." in result.stdout


def test_ctrl_c_keeps_the_rounds_so_far(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = Contender.step, []

    def interrupted(self: Contender, batch: Any) -> Any:
        calls.append(self.name)
        if len(calls) == 2 * 2 + 2 * 2 + 1:  # warm-up, two rounds, and in the middle of the third
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Contender, "step", interrupted)
    result = run(f"{nets}:build", *SMALL, "--rival", "floor", "--output", "out", code=130)
    found = json.loads(Path("out/bench.json").read_text())
    assert found["interrupted"] is True
    assert [len(row["seconds"]) for row in found["rows"]] == [2, 2]
    assert "Time of a step" in result.stdout
    assert "Interrupted; the figures are of 2 complete rounds." in result.stderr


def test_a_step_that_trains_nothing_is_no_result(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contender, "unmoved", lambda self: ["fc.lora_b", "blocks.0.lora_b"])
    result = run(f"{nets}:build", *SMALL, "--rival", "floor", "--rounds", "1")
    assert "ours-eager no result: fc.lora_b and 1 more did not move" in result.stdout
    assert "ours-eager  " not in result.stdout.partition("Time of a step")[2]


def test_a_model_that_decides_by_its_activations_is_timed_without_a_forecast(nets: str) -> None:
    result = run(f"{nets}:choosing", *SMALL, "--rival", "floor", "--rounds", "1", "--output", "out")
    found = json.loads(Path("out/bench.json").read_text())
    assert found["forecasts"] == {}
    assert [len(row["seconds"]) for row in found["rows"]] == [1, 1]
    assert found["sentence"] in result.stdout
    assert "cannot be told from shapes" in found["sentence"]
    assert "Memory of a step" not in result.stdout


def test_a_classifier_of_tokens_that_is_not_of_transformers(nets: str) -> None:
    layers = ["--targets", "1", "--targets", "3"]
    names = ("finetune", "peft", "paper")
    run(f"{nets}:tagging", "--length", "6", "--eager", "--no-progress", *layers, "--rounds", "1", "--output", "out",
        *(word for name in names for word in ("--rival", name)))  # fmt: skip
    found = json.loads(Path("out/bench.json").read_text())
    assert [(row["problem"], len(row["seconds"])) for row in found["rows"]] == [("", 1)] * 4


def test_batches_of_every_kind() -> None:
    from transformers import BertConfig, BertForTokenClassification, ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForTokenClassification(BertConfig(**small, vocab_size=30, num_labels=3, max_position_embeddings=48))
    found = batches_for(bert)
    assert (found.shape, found.vocabulary, found.classes, found.labels) == ((48,), 30, 3, "per token")
    batch = found.draw(torch.Generator().manual_seed(0))
    assert batch.labels.shape == (4, 48)
    assert int(batch.labels.max()) == 2
    assert batch.forget.tolist() == [False, False, True, True]
    vit = ViTForImageClassification(ViTConfig(**small, image_size=32, patch_size=8, num_channels=1))
    found = batches_for(vit.to(torch.bfloat16), size=3)
    batch = found.draw(torch.Generator())
    assert batch.inputs["pixel_values"].shape == (3, 1, 32, 32)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert batch.labels.shape == (3,)
    assert batch.forget.sum() == 1
    assert batches_for(nn.Sequential(nn.Linear(7, 3)), size=2).shape == (7,)
    assert math.isnan(Row("x").quartiles[0])
    assert Row("x", seconds=[2.0]).quartiles == (2.0, 2.0, 2.0)
    assert Row("x").to_dict()["quartiles"]["median"] is None


def test_what_a_configuration_says_of_sizes() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification, ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTForImageClassification(ViTConfig(**small, image_size=[32, 32], patch_size=8))
    assert batches_for(vit, size=2).shape == (3, 32, 32)
    vit.config.image_size = [32, 64]
    with pytest.raises(ValueError, match=r"image_size: got \[32, 64\] in the configuration, expected a square"):
        batches_for(vit, size=2)
    roberta = RobertaForSequenceClassification(RobertaConfig(**small, vocab_size=30, max_position_embeddings=50))
    assert batches_for(roberta).shape == (48,)  # the padding index is 1
    with pytest.raises(ValueError, match="length: got 50, expected at most 48"):
        batches_for(roberta, length=50)


def test_a_geometry_is_that_of_its_configuration(nets: str) -> None:
    empty, filled = geometry("config.json"), geometry(Path.cwd(), "float32", "cpu")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in filled.state_dict().items()}
    assert all(bool(torch.isfinite(p).all()) and p.dtype == torch.float32 for p in filled.parameters())
    Path("config.json").write_text("[]")
    with pytest.raises(ValueError, match="got list, expected a JSON object"):
        geometry("config.json")
    Path("config.json").write_text("{")
    with pytest.raises(ValueError, match="got no JSON"):
        geometry("config.json")
    Path("config.json").write_text('{"architectures": ["Nothing"]}')
    with pytest.raises(ValueError, match=r"architectures: got \['Nothing'\], expected a class that transformers has"):
        geometry("config.json")
    Path("config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match="dtype: got 'int8', expected one of auto"):
        geometry("config.json", "int8")
    with pytest.raises(FileNotFoundError, match="expected a config.json of transformers"):
        geometry("absent.json")


def test_bad_input(nets: str) -> None:
    def refused(*words: str) -> str:
        return run(*words, "--no-progress", code=2).stderr

    assert "got neither MODEL and --config" in refused()
    assert "got both MODEL and --config" in refused("x", "--config", "y")
    for flag, value in (("--weights", "w.safetensors"), ("--classes", "3")):
        assert f"{flag}: got a value beside --config, expected MODEL" in refused("--config", "config.json", flag, value)
    assert "--mode: got 'both'" in refused(f"{nets}:build", "--mode", "both")
    assert "rival: got magic, expected some of floor" in refused(f"{nets}:build", "--rival", "magic")
    assert "each name once" in refused(f"{nets}:build", "--rival", "peft", "--rival", "peft")
    assert "expected a transformers model that supports" in refused(f"{nets}:build", "--checkpointing")
    assert "length: got 5 for Net, which does not take token ids" in refused(f"{nets}:build", "--length", "5")
    assert "image_size: got 5 for Sequential, which takes token ids" in refused(f"{nets}:words", "--image-size", "5")
    assert "does not take a batch of 4 × 256 tokens" in refused(f"{nets}:words")
    said = refused(f"{nets}:square", "--image-size", "9")
    assert "does not take a batch of 32 × 3×9×9 pixels (Wrong image height!)" in said
    assert "expected one that takes token ids, images or vectors" in refused(f"{nets}:silent")
    assert "length: got 100, expected at most 64" in refused("--config", "config.json", "--length", "100")
