"""The experiments: figures against values worked out by hand, the cache, and small runs of the real thing."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_cases import four_token_texts
from torch import nn
from torch.utils.data import Subset

from rfa_fast.data import ImageDataset, TextDataset, TokenDataset, split_by_class, split_by_sample
from rfa_fast.experiments import demo, fashion_mnist
from rfa_fast.experiments.cache import ModelCache, labels_of
from rfa_fast.experiments.cells import CellStore
from rfa_fast.experiments.common import Experiment, Method, Row, ScenarioRun
from rfa_fast.experiments.comparison import Request, compare, methods, scenario_split
from rfa_fast.experiments.measuring import Measures, accuracy_by_class
from rfa_fast.experiments.models import DigitsNet, digits_net, resnet18, seeded
from rfa_fast.methods.checkpoint import RunFolder
from rfa_fast.metrics import evaluate_split
from rfa_fast.report import RunReport


def silent(text: str) -> None:
    """Say nothing."""


class Heard(list[str]):
    """What an experiment said."""

    def __call__(self, text: str) -> None:
        self.append(text)


def points(n: int, seed: int) -> ImageDataset:
    """Images of one pixel per class: the brightest pixel is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = 0.3 * torch.randn(n, 1, 1, 3, generator=generator) + nn.functional.one_hot(labels, 3).view(n, 1, 1, 3)
    return ImageDataset(images, labels.tolist(), ("a", "b", "c"))


class Linear(nn.Module):
    """A flattening classifier; by default its output is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


def tiny(**changes: Any) -> Experiment:
    made = Experiment(
        "tiny", Linear, "Linear(3, 3)", points(60, 0), points(30, 1), ("a", "b", "c"),
        {"epochs": 4, "batch_size": 12, "lr": 0.05, "seed": 0},
    )  # fmt: skip
    return replace(made, **changes)


def scenario_run(experiment: Experiment, scenario: str, **options: Any) -> ScenarioRun:
    settings = {"cache": ModelCache(None, silent), "say": silent, "progress": False, **options}
    return ScenarioRun(experiment, scenario_split(experiment, scenario), **settings)


@pytest.fixture(scope="module")
def trained() -> ModelCache:
    """Original and Retrain of the digits, trained once for all tests that need them."""
    return ModelCache(None, silent)


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_the_demo_forgets_a_digit_and_keeps_the_others(
    mode: str, tmp_path: Path, trained: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ModelCache", lambda folder: trained)
    report = demo.run(mode=mode, samples=0, output=tmp_path, say=silent, progress=False)  # type: ignore[arg-type]
    rows = {row.method: row.metrics for row in report.scenarios[0].rows}
    assert rows["RFA"]["D_f"] <= 0.01
    assert rows["RFA"]["D_ft"] <= 0.01
    assert abs(rows["RFA"]["D_rt"] - rows["Retrain"]["D_rt"]) <= 0.01
    assert rows["Original"]["D_f"] > 0.97
    assert rows["Original"]["D_rt"] > 0.95
    assert rows["Original"]["MIA"] - rows["RFA"]["MIA"] > 0.5
    assert RunReport.from_json(tmp_path / "report.json") == report
    page = (tmp_path / "report.html").read_text()
    for plot in ("Accuracy per class", "Confidence on forget and test samples", "Feature distance per layer", "Loss"):
        assert plot in page
    assert "this run" not in page
    assert "D_rt" in (tmp_path / "table.txt").read_text()


def test_the_demos_second_half_forgets_random_samples_without_harm(trained: ModelCache) -> None:
    run = scenario_run(demo.experiment(0), "sample:64", cache=trained)
    original, retrain = run.baseline("Original").figures, run.baseline("Retrain").figures
    ours = run.unlearned(Method("RFA", {"seed": 0, **demo.SETTINGS["sample"], **demo.STEPS["sample"]})).figures
    assert list(ours) == ["D_r", "D_f", "D_t", "MIA"]
    assert abs(ours["D_t"] - retrain["D_t"]) <= 0.02
    assert abs(ours["D_r"] - retrain["D_r"]) <= 0.01
    assert original["D_f"] > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"forget_class": "11"}, "class '11'"), ({"samples": 5000}, "5000"), ({"mode": "both"}, "'both'")],
)
def test_a_demo_of_what_is_not_there_is_refused_before_training(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rfa_fast.experiments.common.train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        demo.run(output=tmp_path, say=silent, progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_figures_are_those_worked_out_by_hand() -> None:
    """An identity, hardly trained: the class is the brightest pixel, so every figure follows from the data."""
    experiment = tiny(recipe={"epochs": 1, "lr": 1e-9, "weight_decay": 0.0, "seed": 0})
    run = scenario_run(experiment, "class:b")
    row = run.baseline("Original")
    for name, data, forgotten in (("D_r", experiment.train, False), ("D_f", experiment.train, True),
                                  ("D_rt", experiment.test, False), ("D_ft", experiment.test, True)):  # fmt: skip
        chosen = [i for i, label in enumerate(labels_of(data)) if (label == 1) is forgotten]
        right = [int(data[i][0].flatten().argmax()) == data[i][1] for i in chosen]
        assert row.figures[name] == pytest.approx(sum(right) / len(right))
    test = experiment.test
    for label, name in enumerate(experiment.classes):
        hits = [int(test[i][0].flatten().argmax()) == label for i, y in enumerate(labels_of(test)) if y == label]
        assert row.per_class[name] == pytest.approx(sum(hits) / len(hits))
    logits = torch.stack([test[i][0].flatten() for i, y in enumerate(labels_of(test)) if y == 1])
    assert row.confidence["test"] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)


def test_retrain_never_sees_the_forgotten_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    from rfa_fast.experiments import common

    def watched(model: nn.Module, dataset: Any, **options: Any) -> Any:
        seen[options["label"]] = set(labels_of(dataset))
        return original(model, dataset, **options)

    original = common.train
    monkeypatch.setattr(common, "train", watched)
    run = scenario_run(tiny(), "class:b")
    assert run.baseline("Original").figures["D_f"] > run.baseline("Retrain").figures["D_f"]
    assert seen == {"train original": {0, 1, 2}, "train retrain-class-b": {0, 2}}


def test_an_unlearned_row_is_that_of_unlearn_itself_and_leaves_the_original_alone() -> None:
    import copy

    from rfa_fast import unlearn

    run = scenario_run(tiny(), "class:b")
    before = copy.deepcopy(run.original.model)
    options = {"lr": 0.05, "epochs": 5, "batch_size": 12, "rank": 2, "targets": ["fc"], "seed": 3}
    row = run.unlearned(Method("RFA", options))
    assert torch.equal(before.fc.weight, run.original.model.fc.weight)
    result = unlearn(before, run.subsets["D_f"], run.subsets["D_r"], progress=False, **options)
    hits = [int(before(image[None]).argmax()) == label for image, label in run.subsets["D_f"]]
    assert row.figures["D_f"] == pytest.approx(sum(hits) / len(hits))
    assert [step["total"] for step in row.losses] == [step["total"] for step in result.history]
    delta = (before.fc.weight - run.original.model.fc.weight).detach()
    expected = torch.stack([(delta @ image.flatten()).norm() for image, _ in run.subsets["D_f"]]).mean()
    assert row.distance["D_f"]["fc"] == pytest.approx(float(expected), rel=1e-4)


def test_a_scenario_holds_rows_plots_and_settings() -> None:
    run = scenario_run(tiny(), "class:b")
    ways = [Method(f"RFA {m}", {"mode": m, "targets": ["fc"], "rank": 1, "seed": 0}) for m in ("residual", "teacher")]
    scenario = run.scenario("forget b", ways, shown="RFA teacher")
    assert [row.method for row in scenario.rows] == ["Original", "Retrain", "RFA residual", "RFA teacher"]
    assert scenario.forgotten == ["b"]
    assert scenario.settings["samples"] == {"D_r": 40, "D_f": 20, "D_rt": 20, "D_ft": 10}
    assert scenario.settings["methods"]["RFA teacher"]["mode"] == "teacher"
    assert set(scenario.feature_distance) == {"RFA teacher, D_r", "RFA teacher, D_f"}
    assert len(scenario.confidence["forget before"]) == 20
    with pytest.raises(ValueError, match="'RFA l2'"):
        run.scenario("forget b", ways, shown="RFA l2")


def test_a_row_whose_run_cannot_go_on_is_begun_anew(tmp_path: Path) -> None:
    heard = Heard()
    method = Method("RFA", {"targets": ["fc"], "rank": 1, "lr": 1e-3, "seed": 0})
    run = scenario_run(tiny(), "class:b", output=tmp_path, say=heard)
    first = run.unlearned(method)
    (row,) = tmp_path.rglob("*class-b-rfa*.json")
    row.unlink()
    (folder,) = (tmp_path / "runs").iterdir()
    (state,) = folder.glob("state-*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    again = scenario_run(tiny(), "class:b", output=tmp_path, say=heard).unlearned(method)
    assert again.figures == first.figures
    assert any("begun anew" in text and "SHA-256" in text for text in heard)


def test_what_a_row_of_a_shared_folder_was_resumed_from_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = RunFolder.save
    monkeypatch.setattr("rfa_fast.methods.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(
        RunFolder, "save", lambda folder, state, tensors: (saved.append(1), save(folder, state, tensors))
    )
    run = scenario_run(tiny(), "class:b", output=tmp_path, shared=True)
    run.unlearned(Method("RFA", {"targets": ["fc"], "rank": 1, "lr": 1e-3, "batch_size": 12, "seed": 0}))
    assert saved
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_peak_of_a_run_that_was_over_before_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("RFA", {"targets": ["fc"], "rank": 1, "lr": 1e-3, "seed": 0})
    measures = Measures(("accuracy", "peak_mib"), None)
    with monkeypatch.context() as patched:
        patched.setattr(ScenarioRun, "_measured", lambda *_: sys.exit("killed while it was measured"))
        with pytest.raises(SystemExit):
            scenario_run(tiny(), "class:b", output=tmp_path, measures=measures).unlearned(method)
    again = scenario_run(tiny(), "class:b", output=tmp_path, measures=measures).unlearned(method)
    assert math.isnan(again.figures["peak_mib"])
    (row,) = tmp_path.rglob("*class-b-rfa*.json")
    row.unlink()
    shutil.rmtree(tmp_path / "runs")
    whole = scenario_run(tiny(), "class:b", output=tmp_path, measures=measures).unlearned(method)
    assert whole.figures["peak_mib"] > 0
    assert whole.figures["D_f/accuracy"] == again.figures["D_f/accuracy"]


def test_a_row_that_was_finished_before_the_lock_was_had_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    from rfa_fast import files

    store, row = CellStore(tmp_path, Heard()), Row(1.0, {"D_f": 0.5}, {}, {})
    lock = files._one_at_a_time

    @contextmanager
    def late(path, say):
        monkeypatch.setattr(files, "_one_at_a_time", lock)
        CellStore(tmp_path, Heard()).get("class-rfa", {"seed": 0}, Row, lambda: row)
        with lock(path, say):
            yield

    monkeypatch.setattr(files, "_one_at_a_time", late)
    assert store.get("class-rfa", {"seed": 0}, Row, lambda: pytest.fail("computed again")) == row
    assert not store.computed


def test_two_commands_at_one_row_compute_it_once(tmp_path: Path) -> None:
    import threading

    heard, begun, go_on = Heard(), threading.Event(), threading.Event()
    calls: list[int] = []

    def compute() -> Row:
        calls.append(1)
        begun.set()
        assert go_on.wait(30)
        return Row(1.0, {"D_f": 0.5}, {}, {})

    def get() -> Row:
        return CellStore(tmp_path, heard).get("class-rfa", {"seed": 0}, Row, compute)

    rows: list[Row] = []
    threads = [threading.Thread(target=lambda: rows.append(get())) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    while not any("waiting" in text for text in heard):
        assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1
    assert rows[0] == rows[1]


def test_finished_rows_are_skipped_and_others_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    options = {"targets": ["fc"], "rank": 1, "lr": 1e-3, "seed": 0}
    make = lambda: scenario_run(tiny(), "class:b", output=tmp_path, say=heard)  # noqa: E731
    first = make().unlearned(Method("RFA", options))
    assert (tmp_path / "runs").is_dir()
    calls: list[float] = []
    from rfa_fast.experiments import common

    original = common.unlearn
    monkeypatch.setattr(common, "unlearn", lambda *a, **k: calls.append(k["lr"]) or original(*a, **k))
    assert make().unlearned(Method("RFA", options)) == first
    assert calls == []
    other = make().unlearned(Method("RFA", {**options, "lr": 2e-3}))
    assert calls == [2e-3]
    assert other.losses != first.losses
    assert any("other settings" in text for text in heard)


def test_rows_are_not_those_of_another_test_set(tmp_path: Path) -> None:
    """The split holds positions alone: the same ones of other images."""
    sample = Method("RFA", {"targets": ["fc"], "rank": 1, "lr": 1e-3, "seed": 0})
    flipped = points(30, 1)
    flipped = ImageDataset(flipped.images, [(label + 1) % 3 for label in flipped.labels], flipped.classes)
    found = []
    for test in (points(30, 1), flipped):
        run = scenario_run(tiny(test=test), "sample:6", output=tmp_path)
        found.append((run.baseline("Original").figures, run.unlearned(sample).figures))
    for first, second in zip(*found, strict=True):
        assert first["D_f"] == second["D_f"] > 0.9
        assert first["D_t"] > 0.9
        assert second["D_t"] < 0.1


def test_scenarios_are_read_from_their_words() -> None:
    experiment = tiny()
    labels, test_labels = labels_of(experiment.train), labels_of(experiment.test)
    assert scenario_split(experiment, "class:b") == split_by_class(labels, test_labels, 1, experiment.classes)
    assert scenario_split(experiment, "sample:4", seed=2) == split_by_sample(60, 30, 4, seed=2)
    for wrong in ("class", "class:", "sample:x", "b", "keyword:"):
        with pytest.raises(ValueError, match="expected class:NAME"):
            scenario_split(experiment, wrong)
    with pytest.raises(ValueError, match="without texts"):
        scenario_split(experiment, "keyword:film")
    with pytest.raises(ValueError, match="class 'd'"):
        scenario_split(experiment, "class:d")


def test_settings_to_try_are_multiplied_out() -> None:
    found = methods({"residual": {"lr": 1.0, "rank": 4}}, 7, ["lr=1e-4,1e-3", "norm=l2"])
    assert [dict(method.options) for method in found] == [
        {"mode": "residual", "seed": 7, "lr": lr, "rank": 4, "norm": "l2"} for lr in (1e-4, 1e-3)
    ]
    for wrong in ("lr", "lr=", "=1", "a b=1"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            methods({"residual": {}}, 0, [wrong])
    found = methods({"residual": {}}, 0, ["weights=[1,0.1,1,0.1]", 'targets=["fc"],["fc","body"]'])
    assert [method.options["weights"] for method in found] == [[1, 0.1, 1, 0.1]] * 2
    assert [method.options["targets"] for method in found] == [["fc"], ["fc", "body"]]


@pytest.mark.parametrize(
    ("tried", "message"),
    [("lr=1e-4,-1", "lr: got -1"), ("rank=0,8", "rank: got 0"), ("speed=1", "speed"), ("norm=l2,l3", "l3")],
)
def test_a_setting_to_try_that_is_wrong_is_refused_before_training(
    tried: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfa_fast.experiments.common.train", lambda *a, **k: pytest.fail("trained"))
    request = Request(tried=(tried,), say=silent, progress=False)
    with pytest.raises((ValueError, TypeError), match=message):
        compare(tiny(), {"class": {"targets": ["fc"]}}, request, title="t", scenarios=("class:b",))


def test_validation_never_touches_the_test_set() -> None:
    experiment = tiny()
    held = experiment.on_validation(0.2)
    assert isinstance(held.train, Subset)
    assert isinstance(held.test, Subset)
    assert held.test.dataset is experiment.train
    assert sorted([*held.train.indices, *held.test.indices]) == list(range(60))
    assert len(held.test.indices) == 12
    assert held.name != experiment.name


def test_comparing_writes_report_page_and_table(tmp_path: Path) -> None:
    settings = {"class": {"targets": ["fc"], "rank": 2, "lr": 0.05, "epochs": 6}}
    request = Request(output=tmp_path / "out", cache=tmp_path / "cache", say=silent, progress=False, validation=True)
    report = compare(tiny(), settings, request, title="Tiny", scenarios=["class:a", "class:c"])
    assert RunReport.from_json(tmp_path / "out" / "report.json") == report
    assert [scenario.forgotten for scenario in report.scenarios] == [["a"], ["c"]]
    for scenario in report.scenarios:
        rows = {row.method: row.metrics for row in scenario.rows}
        assert rows["Original"]["D_f"] > 0.9
        assert rows["RFA residual"]["D_f"] < 0.5
        assert rows["RFA residual"]["D_rt"] >= rows["Retrain"]["D_rt"] - 0.1
    assert "held-out" in report.notes[0]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3  # one Original, two Retrain
    with pytest.raises(ValueError, match="expected some of residual, teacher"):
        compare(tiny(), settings, replace(request, modes=("l2",)), title="Tiny", scenarios=["class:a"])
    with pytest.raises(ValueError, match="limit"):
        compare(tiny(), settings, replace(request, limit=1), title="Tiny", scenarios=["class:a"])


def test_fashion_mnist_runs_on_a_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path on 160 made-up images in Fashion-MNIST's own format."""
    import gzip
    import struct

    import numpy as np

    generator = np.random.default_rng(0)
    for part, n in (("train", 160), ("t10k", 40)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = generator.integers(0, 40, (n, 28, 28)).astype(np.uint8)
        for i, label in enumerate(labels):  # a bright bar whose row is the class
            images[i, 2 + 2 * label : 4 + 2 * label] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    monkeypatch.setitem(fashion_mnist.SETTINGS, "class", {"lr": 2e-3, "epochs": 4, "batch_size": 32})
    monkeypatch.setattr(fashion_mnist, "RECIPE", {"epochs": 4, "batch_size": 32, "lr": 1e-3})
    request = Request(
        scenarios=["class:6"], modes=["residual"], data=tmp_path, cache=tmp_path / "cache", say=silent, progress=False
    )
    report = fashion_mnist.run(request)
    rows = {row.method: row.metrics for row in report.scenarios[0].rows}
    assert report.scenarios[0].forgotten == ["Shirt"]
    assert rows["Original"]["D_f"] > 0.9
    assert rows["Retrain"]["D_f"] == 0.0
    assert rows["RFA residual"]["D_f"] <= 0.1
    assert rows["RFA residual"]["D_r"] >= 0.9
    assert (
        len(report.scenarios[0].feature_distance["RFA residual, D_f"]) == 20
    )  # 19 convolutions in blocks and the head


def token_data(n: int, *, language: bool) -> TokenDataset:
    """The answer alone carries a label."""
    return four_token_texts(n, language=language, prompt=3, texts=["t"] * n)


def test_a_two_layer_bert_forgets_a_topic(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=8,
    )  # fmt: skip
    experiment = Experiment(
        "bert", lambda: seeded(0, lambda: BertForSequenceClassification(config)), "tiny BERT",
        token_data(120, language=False), token_data(60, language=False), ("a", "b", "c"),
        {"epochs": 4, "batch_size": 24, "lr": 2e-3, "seed": 0},
    )  # fmt: skip
    run = scenario_run(experiment, "class:b", output=tmp_path)
    row = run.unlearned(Method("RFA", {"lr": 5e-3, "epochs": 6, "batch_size": 24, "seed": 0}))
    assert run.baseline("Original").figures["D_f"] == 1.0
    assert run.baseline("Retrain").figures["D_ft"] == 0.0
    assert row.figures["D_f"] <= 0.05
    assert row.figures["D_rt"] >= 0.95
    assert len(row.distance["D_f"]) == 5  # two feed-forward linears in each of two layers, and the head


def test_a_two_layer_llama_forgets_answers_and_its_perplexity_is_reported() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=8, tie_word_embeddings=True,
    )  # fmt: skip
    experiment = Experiment(
        "llama", lambda: seeded(0, lambda: LlamaForCausalLM(config)), "tiny Llama",
        token_data(120, language=True), token_data(60, language=True), ("a", "b", "c"),
        {"epochs": 6, "batch_size": 24, "lr": 5e-3, "seed": 0}, kind="language",
        write=lambda model: {"p": f"{sum(float(p.detach().abs().sum()) for p in model.parameters()):.3f}"},
    )  # fmt: skip
    run = scenario_run(experiment, "class:b")
    before = run.baseline("Original")
    row = run.unlearned(Method("RFA", {"lr": 5e-3, "epochs": 6, "batch_size": 24, "seed": 0}))
    assert before.figures["D_f/accuracy"] == 1.0
    data, model = run.subsets["D_f"], run.original.model
    with torch.no_grad():
        logits = model(input_ids=torch.stack([item["input_ids"] for item in data])).logits[:, 2]
    losses = nn.functional.cross_entropy(logits, torch.stack([item["labels"][3] for item in data]))
    assert before.figures["D_f/perplexity"] == pytest.approx(math.exp(losses), rel=1e-4)
    assert before.per_class == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert row.figures["D_f/accuracy"] <= 0.1
    assert row.figures["D_r/accuracy"] >= 0.95
    scenario = run.scenario("forget b", [Method("RFA", {"lr": 5e-3, "epochs": 6, "batch_size": 24, "seed": 0})])
    assert scenario.examples[0].before == before.texts["p"] != scenario.examples[0].after == row.texts["p"]


def test_models_depend_on_their_seed_and_on_nothing_else() -> None:
    state = torch.get_rng_state()
    for make in (digits_net, resnet18):
        torch.manual_seed(5)
        one, two, three = make(0), make(0), make(1)
        weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, two, three)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    digits_net(3)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(state)


def test_the_digits_network_is_adapted_in_every_block() -> None:
    import rfa_fast

    rfa = rfa_fast.patch(DigitsNet(10), "all")
    assert set(rfa.names) == {
        "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0",
        "layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0", "fc",
    }  # fmt: skip


def test_each_experiment_explains_itself_on_the_command_line() -> None:
    import subprocess
    import sys

    shown = subprocess.run(
        [sys.executable, "-m", "rfa_fast.experiments.smollm2", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("--output", "--scenario", "--validation", "--try", "--seed", "--cache", "class:starwars"):
        assert option in shown


def test_a_text_without_a_label_is_not_counted_as_right() -> None:
    data = TextDataset(["x", "y", "z"], [0, 1, 1], classes=("a", "b"))
    logits, labels = torch.eye(3), torch.tensor([0, 2, -100])  # one right, one wrong, one without
    found = evaluate_split(nn.Identity(), {name: [(logits, labels)] for name in ("D_r", "D_f", "D_t")})
    subsets = {"D_t": Subset(data, range(3))}
    assert accuracy_by_class(found, subsets, data.classes, language=False) == {"a": 1.0, "b": 0.0}
