"""What the commands take from a model's folder, and what they refuse before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import QUICK, nets, place, run, without_plots
from PIL import Image
from safetensors.torch import load_file, save_file

from rfa_fast.commands.inputs import load_data
from rfa_fast.commands.measure import Measuring
from rfa_fast.report import RunReport

__all__ = ["place", "without_plots"]

HALF = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
TOPICS = ("neg", "neu", "pos")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring fails the test."""
    monkeypatch.setattr(Measuring, "__call__", lambda *_: pytest.fail("measured"))


def pictures(folder: Path, size: int = 8) -> Path:
    """Grey squares of two brightnesses, one folder each."""
    generator = np.random.default_rng(0)
    for name, (low, high) in {"dark": (0, 40), "dim": (60, 100)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(10):
            value = int(generator.integers(low, high))
            Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def vit(folder: Path, **file: Any) -> Path:
    """A classifier that is right on `pictures` in its own normalisation, which `file` says, and in no other."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
        patch_size=4, num_labels=2, id2label={0: "dark", 1: "dim"}, label2id={"dark": 0, "dim": 1},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    values = torch.tensor([0, 10, 20, 30, 40, 60, 70, 80, 90, 100]) / 255
    inputs, labels = ((values - 0.5) / 0.5)[:, None, None, None].expand(-1, 3, 8, 8), (values > 50 / 255).long()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        loss = model(pixel_values=inputs, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    if file:
        preprocessing(folder, **file)
    return folder


def preprocessing(folder: Path, **values: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def bert(folder: Path, names: tuple[str, ...] = TOPICS, seed: int = 1) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=len(names), id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "gold": 2, "iron": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def llama(folder: Path, like: Path) -> Path:
    """A language model with the tokenizer of `like`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, max_position_embeddings=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def table(path: Path, labels: tuple[Any, ...] = TOPICS, count: int = 30) -> Path:
    rows = [f"{'gold' if i % 2 else 'iron'} iron,{labels[i % len(labels)]}" for i in range(count)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def rows_of(output: str) -> dict[str, dict[str, float]]:
    return {row.method: row.metrics for row in RunReport.from_json(Path(output) / "report.json").scenarios[0].rows}


def notes_of(output: str) -> list[str]:
    return RunReport.from_json(Path(output) / "report.json").scenarios[0].notes


@pytest.mark.usefixtures("without_plots")
def test_images_are_shown_as_the_model_s_own_file_says(place: Path) -> None:
    pictures(place / "lum")
    vit(place / "vit", size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=True,
        do_rescale=True, rescale_factor=1 / 255, resample=2)  # fmt: skip
    words = ["--data", "lum", "--forget-class", "dim", "--no-progress"]
    result = run("evaluate", "vit", *words, "--output", "own")
    row = rows_of("own")["vit"]
    assert [row[name] for name in ("D_r", "D_f", "D_rt", "D_ft")] == [1.0] * 4
    said = [note for note in notes_of("own") if "preprocessor_config.json" in note]
    assert said == [
        f"size=8 and normalise={HALF} taken from {Path('vit/preprocessor_config.json')}; --data-option size=… and "
        "normalise=… say otherwise; images that are not square are cut, not stretched as there"
    ]
    assert said[0] in result.stderr

    run("evaluate", "vit", *words, "--data-option", "normalise=none", "--output", "typed")
    assert any(note.startswith("size=8 taken from") for note in notes_of("typed"))
    row = rows_of("typed")["vit"]
    assert min(row["D_r"], row["D_f"]) < 1

    run("unlearn", "vit", *words, "--output", "out", *QUICK)
    assert rows_of("out")["Before"]["D_r"] == 1.0
    assert said[0] in notes_of("out")
    # What was written is measured as the run measured it.
    run("evaluate", "out/model", *words, "--output", "again", "--against", "vit")
    again, out = rows_of("again"), rows_of("out")
    assert again["out/model"] == out["After"]
    assert again["vit"] == out["Before"]


def shown(*options: str, model: str | None = "m", others: tuple[tuple[str, str], ...] = ()) -> Any:
    return load_data("lum", options, pad_to=None, channels=None, model=model, others=others)


def test_a_preprocessing_file_is_read_in_all_its_forms(place: Path) -> None:
    pictures(place / "lum")
    (place / "m").mkdir()
    (place / "m" / "config.json").write_text(json.dumps({"image_size": 12}))

    def taken(*options: str, **file: Any) -> tuple[int, list[float], list[float], str]:
        preprocessing(place / "m", **file)
        data = shown(*options)
        said = next((note for note in data.notes if "taken from" in note), "")
        return data.train.size, data.train.mean.tolist(), data.train.std.tolist(), said

    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    for size, wanted in (
        (6, 6), ({"shortest_edge": 6}, 6), ({"height": 6, "width": 6}, 6), ({"longest_edge": 9}, 12), (None, 12),
    ):  # fmt: skip
        got = taken(**half, **({} if size is None else {"size": size}))
        assert got[:3] == (wanted, [0.5] * 3, [0.25] * 3)
    # As they are in the configuration of a model whose file says nothing of the size.
    assert "size=12 taken from" in got[3]
    assert str(Path("m/config.json")) in got[3]
    for crop in (4, {"height": 4, "width": 4}):
        got = taken(**half, size={"shortest_edge": 6}, crop_size=crop, do_center_crop=True)
        assert got[0] == 4
        assert "not followed: size=6 before the cut" in got[3]
    assert taken(**half, size=6, crop_size=4, do_center_crop=False)[0] == 6
    assert taken(size=6, do_normalize=False, **half)[1:3] == ([0.0] * 3, [1.0] * 3)
    assert taken(size=6, image_mean=0.5, image_std=0.25)[1:3] == ([0.5] * 3, [0.25] * 3)
    # Images of 0 to 255 that are divided by another number, or by none.
    mean, std = taken(size=6, rescale_factor=2 / 255, **half)[1:3]
    assert (mean, std) == (pytest.approx([0.25] * 3), pytest.approx([0.125] * 3))
    mean, std = taken(size=6, do_rescale=False, image_mean=[127.5] * 3, image_std=[51.0] * 3)[1:3]
    assert (mean, std) == (pytest.approx([0.5] * 3), pytest.approx([0.2] * 3))
    assert "not followed: do_flip_channel_order=true, resample=3" in taken(
        size=6, do_flip_channel_order=True, resample=3, **half
    )[3]  # fmt: skip
    assert taken("size=5", "normalise=none", size=6, **half) == (5, [0.0] * 3, [1.0] * 3, "")
    assert taken("size=5", **{**half, "size": {"height": 6, "width": 4}})[0] == 5

    for file, said in (
        ({"size": {"height": 6, "width": 4}}, "size: got 6 × 4 pixels, expected a square"),
        ({"image_mean": [0.5], "image_std": [0.5] * 3}, "image_mean: got [0.5], expected three"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]}, "image_std: got [0.5, 0.5, 0], expected three"),
        ({"image_mean": [0.5] * 3}, "image_std: got None, expected three"),
        ({"size": {"height": 0, "width": 0}}, "size: got 0, expected"),
        ({"size": "large"}, "size: got 'large', expected"),
        ({"rescale_factor": 0, **half}, "rescale_factor: got 0, expected"),
    ):
        preprocessing(place / "m", **file)
        with pytest.raises(ValueError, match="preprocessor_config.json: ") as refused:
            shown()
        assert said in str(refused.value)
        assert "--data-option" in str(refused.value)
    (place / "m" / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: got list, expected a JSON object"):
        shown()
    (place / "m" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: got no JSON"):
        shown()
    (place / "m" / "preprocessor_config.json").unlink()
    assert shown().train.size == 12
    for image_size, wanted in (([10, 10], 10), ("x", 224), ([10, 8], 224)):
        (place / "m" / "config.json").write_text(json.dumps({"image_size": image_size}))
        assert shown().train.size == wanted
    (place / "m" / "config.json").write_text("{}")
    assert shown("size=3").train.size == 3
    assert shown("size=3", model=None).notes == shown("size=3", model="torchvision:resnet18").notes


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
def test_a_second_model_with_another_preprocessing_is_refused(command: str, place: Path) -> None:
    pictures(place / "lum")
    for name, mean in (("one", 0.5), ("two", 0.4)):
        vit(place / name, size=8, image_mean=[mean] * 3, image_std=[0.5] * 3)
    words = ["--data", "lum", "--forget-class", "dim", "--no-progress", "--retrained", "two"]
    refused = run(command, "one", *words, code=2).stderr
    assert f"--retrained: got two, made for normalise={[[0.4] * 3, [0.5] * 3]}, expected {HALF}, as one" in refused
    assert not list(place.rglob("report.json"))


@pytest.mark.usefixtures("unmeasured")
def test_a_second_model_that_cannot_take_the_data_is_refused_before_anything_is_measured(place: Path) -> None:
    module = place / f"{nets(place)}.py"
    module.write_text(
        module.read_text()
        + "\n\ndef wide():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(4, 3))\n\n\ndef two():\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))\n"
    )
    words = ["--data", "images.npz", "--forget-class", "1", "--no-progress"]
    for command, flag in (("evaluate", "--against"), ("evaluate", "--retrained"), ("unlearn", "--retrained")):
        start = [command, f"{nets(place)}:build", *words, flag]
        refused = run(*start, f"{nets(place)}:wide", code=2).stderr
        assert f"{flag}: {nets(place)}:wide: cannot take a sample of images (" in refused
        refused = run(*start, f"{nets(place)}:two", code=2).stderr
        assert f"{flag}: {nets(place)}:two: has 2 classes, expected 3, those of images" in refused
    assert not list(place.rglob("report.json"))


@pytest.mark.usefixtures("unmeasured")
def test_a_second_model_of_another_task_or_with_fewer_classes_is_refused(place: Path) -> None:
    first, data = bert(place / "bert"), table(place / "t.csv")
    other, small = llama(place / "llama", first), bert(place / "small", ("LABEL_0", "LABEL_1"))
    words = ["--data", str(data), "--forget-class", "neu", "--max-length", "8", "--no-progress"]
    for command, flag in (("evaluate", "--against"), ("evaluate", "--retrained"), ("unlearn", "--retrained")):
        refused = run(command, "bert", *words, flag, str(other), code=2).stderr
        assert f"{flag}: got {other}, a model of language, expected one of text, as bert" in refused
        refused = run(command, "bert", *words, flag, str(small), code=2).stderr
        assert f"{flag}: {small}: has 2 classes, expected 3, those of t" in refused
        refused = run(command, "bert", *words, flag, "nothing-here", code=2).stderr
        assert f"{flag}: model: nothing-here is no folder here" in refused
    assert not list(place.rglob("report.json"))


@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
def test_images_of_a_size_that_a_model_does_not_take_name_what_their_loader_has(command: str, place: Path) -> None:
    pictures(place / "lum")
    vit(place / "vit", size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    words = ["vit", "--forget-class", "1", "--no-progress", "--data"]
    refused = run(command, *words, "lum", "--data-option", "size=16", code=2).stderr
    assert "vit: cannot take a sample of lum (" in refused
    assert "--data-option size=PIXELS" in refused
    assert "--pad-to" not in refused
    assert "--channels" not in refused
    np.savez("two.npz", x=np.zeros((20, 6, 6), np.uint8), y=np.arange(20) % 2)
    refused = run(command, *words, "two.npz", code=2).stderr
    assert "vit: cannot take a sample of two (" in refused
    assert "see --pad-to and --channels" in refused
    assert "size=" not in refused


@pytest.mark.usefixtures("unmeasured")
def test_two_spellings_of_a_class_are_not_merged(place: Path) -> None:
    bert(place / "bert")
    table(place / "t.csv", ("Pos", "pos", "neg"))
    refused = run("evaluate", "bert", "--data", "t.csv", "--forget-class", "pos", "--max-length", "8", "--no-progress",
                  code=2).stderr  # fmt: skip
    assert "--data: got the classes 'Pos' and 'pos' in t, both 'pos' in bert" in refused
    assert "rename" in refused


@pytest.mark.usefixtures("without_plots")
def test_a_note_on_the_numbering_is_of_the_numbering_in_use(place: Path) -> None:
    bert(place / "bert", ("neu", "pos", "neg"))
    table(place / "t.csv")
    run("evaluate", "bert", "--data", "t.csv", "--forget-class", "pos", "--max-length", "8", "--no-progress",
        "--output", "out")  # fmt: skip
    notes = notes_of("out")
    assert "labels renumbered in the order of the model's class names" in notes
    assert not [note for note in notes if "alphabetically" in note]


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("flag", ["--against", "--retrained"])
def test_a_file_of_weights_fills_a_transformers_folder(flag: str, place: Path) -> None:
    bert(place / "bert")
    other = bert(place / "other", seed=5)
    table(place / "t.csv")
    file = "other/model.safetensors"
    words = ["evaluate", "bert", "--data", "t.csv", "--forget-class", "neu", "--max-length", "8", "--no-progress"]
    run(*words, flag, file, "--output", "file")
    run(*words, flag, str(other), "--output", "folder")
    assert list(rows_of("file").values()) == list(rows_of("folder").values())
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "classifier.bias"}, "short.safetensors")
    refused = run(*words, flag, "short.safetensors", code=2).stderr
    assert (
        f"{flag}: short.safetensors does not fill BertForSequenceClassification (it lacks classifier.bias)" in refused
    )
    refused = run(*words, flag, "none.safetensors", code=2).stderr
    assert f"{flag}: none.safetensors does not exist" in refused
    if flag == "--retrained":
        run("unlearn", *words[1:], flag, file, "--output", "out", *QUICK)
        assert rows_of("out")["Retrain"] == rows_of("file")["Retrain"]


def test_labels_from_one_name_the_remedy(place: Path) -> None:
    bert(place / "bert", ("LABEL_0", "LABEL_1", "LABEL_2"))
    table(place / "t.csv", (1, 2, 3))
    words = ["evaluate", "bert", "--data", "t.csv", "--forget-class", "2", "--max-length", "8", "--no-progress"]
    refused = run(*words, code=2).stderr
    assert "bert: has 3 classes, expected 4, those of t" in refused
    assert "--data-option classes=[1,2,3]" in refused
    run(*words, "--data-option", "classes=[1,2,3]")


def test_a_known_set_says_what_the_model_s_file_asks_for(place: Path) -> None:
    (place / "model").mkdir()
    preprocessing(place / "model", image_mean=[0.5] * 3, image_std=[0.25] * 3)
    (note, *_) = load_data("digits", [], pad_to=None, channels=None, model="model").notes
    assert "preprocessor_config.json asks for normalise=[[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]" in note
    assert "digits is normalised by its own" in note
    typed = load_data("digits", ["normalise=[[0.5],[0.25]]"], pad_to=None, channels=None, model="model")
    assert not any("asks for" in note for note in typed.notes)
    assert not load_data("digits", [], pad_to=None, channels=None, model=None).notes[0].startswith("model")
