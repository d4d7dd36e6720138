"""Checkpoints of torchvision and transformers by name: small files of the same formats, from this machine alone."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rfa_fast
from rfa_fast.experiments.models import (
    DISTILBERT,
    DISTILGPT2,
    QWEN,
    distilbert,
    language_model,
    pretrained_vision,
    published_weights,
    small_vit,
    text_classifier,
)
from rfa_fast.models import open_model
from rfa_fast.targets import select
from rfa_fast.weights import fill, read_state

SMALL = "shufflenet_v2_x0_5"  # the smallest classifier of torchvision, 1.4 million weights


class Evil:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of the hub and of torch.hub with nothing in them; returns the place of torch's checkpoints."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.delenv("RFA_FAST_DATA", raising=False)
    return tmp_path / "torch" / "checkpoints"


def cache(tmp_path: Path, folder: Path, name: str) -> Path:
    """Put a folder into the hub's cache under a model's name."""
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("b" * 40)
    shutil.copytree(folder, place / "snapshots" / ("b" * 40))
    return place / "snapshots" / ("b" * 40)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state dict as torchvision publishes it: 1,000 classes, and no step counters, as of old."""
    torch.manual_seed(1)
    state = open_model(f"torchvision:{SMALL}").model.state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def test_published_weights_are_found_by_name(
    published: dict[str, torch.Tensor], empty_caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        pretrained_vision("resnet18", 0)
    address = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert f"`curl -L --create-dirs -o {empty_caches}/resnet18-f37072fd.pth {address}`" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"vit_b_16-\w+\.pth is not in .*, or give a file with weights="):
        pretrained_vision("vit_b_16", 0)
    with pytest.raises(FileNotFoundError) as caught:
        published_weights(SMALL)
    file = Path(str(caught.value).split()[1])
    empty_caches.mkdir(parents=True)
    torch.save(OrderedDict(published), empty_caches / file)
    before = torch.random.get_rng_state()
    model = pretrained_vision(SMALL, seed=3, classes=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in published.items() if not key.startswith("fc."))
    assert state["fc.weight"].shape == (7, 1024)
    assert torch.equal(state["fc.weight"], pretrained_vision(SMALL, seed=3, classes=7).state_dict()["fc.weight"])
    assert not torch.equal(state["fc.weight"], pretrained_vision(SMALL, seed=4, classes=7).state_dict()["fc.weight"])
    assert torch.equal(pretrained_vision(SMALL, seed=3, classes=1000).fc.weight, published["fc.weight"])  # type: ignore
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    (tmp_path / "torchvision").mkdir()
    changed = {key: value + 1 for key, value in published.items()}
    save_file(changed, tmp_path / "torchvision" / file.with_suffix(".safetensors"))
    assert torch.equal(pretrained_vision(SMALL, 0, 7).state_dict()["conv1.0.weight"], changed["conv1.0.weight"])
    with pytest.raises(ValueError, match="got 'resnet81', expected an image classifier of torchvision"):
        pretrained_vision("resnet81", 0)


def test_weights_of_another_model_are_no_new_head(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    for change, message in (
        ({"fc.weight": torch.ones(1000, 3)}, r"has fc\.weight of shape \(1000, 3\), expected \(7, 1024\)"),
        ({"conv1.0.weight": torch.ones(24, 1, 3, 3)}, r"has (fc|conv1\.0)\.\w+ of shape"),
        ({"more": torch.ones(1)}, "has more, which ShuffleNetV2 has not"),
    ):
        torch.save({**published, **change}, file)
        with pytest.raises(ValueError, match=message):
            pretrained_vision(SMALL, 0, 7, weights=file)
    torch.save({key: value for key, value in published.items() if key != "conv1.0.weight"}, file)
    with pytest.raises(ValueError, match=r"does not fill ShuffleNetV2 \(it lacks conv1\.0\.weight"):
        pretrained_vision(SMALL, 0, 7, weights=file)


def test_a_pth_file_opens_by_name_and_runs_no_code(tmp_path: Path) -> None:
    file = tmp_path / "linear.pth"
    state = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    for content in (state, {"state_dict": state, "epoch": 3}, {"model": state}):
        torch.save(content, file)
        assert {key: value.tolist() for key, value in read_state(file).items()} == {
            key: value.tolist() for key, value in state.items()
        }
    for content, message in (
        ({"weight": Evil(tmp_path / "was-run")}, "cannot be read as tensors alone"),
        (nn.Linear(2, 3), "cannot be read as tensors alone"),
        ([torch.ones(1)], "holds list, expected a state dict"),
        ({"epoch": 3}, "holds epoch, expected a state dict"),
        ({}, "holds nothing, expected a state dict"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            read_state(file)
    assert not (tmp_path / "was-run").exists()
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"linear\.pth cannot be read .*is it cut short"):
        read_state(file)
    with pytest.raises(ValueError, match=r"w\.pt, a pickle.*expected a \.safetensors or \.pth file"):
        read_state(tmp_path / "w.pt")
    torch.manual_seed(0)
    model = open_model(f"torchvision:{SMALL}", classes=3).model
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    again = open_model(f"torchvision:{SMALL}", classes=3, weights=tmp_path / "mine.pth").model
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_a_state_that_does_not_fit_leaves_the_model_alone() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    for state, message in (
        ({"weight": torch.ones(2, 2)}, "lacks bias"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, r"bias of shape \(3,\)"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2), "scale": torch.ones(1)}, "has scale"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(layer, state, "w.pth")
        assert torch.equal(layer.weight, before)
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    fill(tied, {"0.weight": torch.ones(2, 2)}, "w.pth")
    assert torch.equal(tied[1].weight, torch.ones(2, 2))


def test_small_vit() -> None:
    model = small_vit(5, classes=4)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    # Patches 192 × 3 × 16 + 192, class token and 65 positions, 6 blocks of 12 · 192² + 13 · 192, norm, head.
    assert sum(p.numel() for p in model.parameters()) == (
        192 * 48 + 192 + 192 + 65 * 192 + 6 * (12 * 192**2 + 13 * 192) + 2 * 192 + 4 * 192 + 4
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_vit(5, 4).parameters(), strict=True))
    assert not torch.equal(model.conv_proj.weight, small_vit(6, 4).conv_proj.weight)  # type: ignore[union-attr, arg-type]
    mlps = [f"encoder.layers.encoder_layer_{block}.mlp.{layer}" for block in range(6) for layer in (0, 3)]
    assert [target.name for target in select(model, "all").adapted] == [*mlps, "heads.head"]
    assert select(model, "all").adapted[-1].is_head
    rfa = rfa_fast.patch(model, "deep")
    assert rfa.names == (*mlps[6:], "heads.head")
    loss = rfa.loss(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, False, True]))
    loss.total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in rfa.parameters())


def distil(folder: Path) -> Path:
    """A small DistilBERT as it is published: without a classification head."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=12, dim=8, n_layers=2, n_heads=2, hidden_dim=8, max_position_embeddings=16)
    DistilBertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_distilbert_from_the_hubs_cache_gets_a_new_head(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"Get it with `hf download distilbert/distilbert-base-uncased`, or put"
    ):
        distilbert(0)
    snapshot = cache(tmp_path, distil(tmp_path / "distil"), DISTILBERT.hub)
    capfd.readouterr()
    model = distilbert(seed=1, classes=3)
    assert "Loading weights" not in capfd.readouterr().err  # bars are the commands' to show
    stored = load_file(snapshot / "model.safetensors")
    state = model.state_dict()
    inner = [key for key in stored if key.startswith("distilbert.")]
    assert len(inner) > 10
    assert all(torch.equal(state[key], stored[key]) for key in inner)
    assert state["classifier.weight"].shape == (3, 8)
    assert torch.equal(state["classifier.weight"], distilbert(seed=1, classes=3).state_dict()["classifier.weight"])
    assert not torch.equal(state["classifier.weight"], distilbert(2, 3).state_dict()["classifier.weight"])
    name = "distilbert.transformer.layer.1.ffn.lin1.weight"
    save_file({key: value for key, value in stored.items() if key != name}, snapshot / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"its weights lack {name}; expected a pretrained model with all but its head"
    ):
        distilbert(0)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle"):
        text_classifier(DISTILBERT, 0, 2)


def test_language_models_by_name_from_the_cache_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        FileNotFoundError, match=r"is no folder here, and nothing is downloaded.*`hf download me/gpt2` has"
    ):
        open_model("me/gpt2")
    cache(tmp_path, tmp_path / "gpt2", "me/gpt2")
    cache(tmp_path, tmp_path / "gpt2", DISTILGPT2.hub)
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        for model in (open_model("me/gpt2").model, language_model(DISTILGPT2), language_model(QWEN, tmp_path / "gpt2")):
            assert torch.equal(model(tokens).logits, gpt2.eval()(tokens).logits)
    assert open_model("me/gpt2").task == "language"
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    (tmp_path / "gpt2").rename(tmp_path / "Qwen2.5-3B")
    assert torch.equal(language_model(QWEN).transformer.wte.weight, gpt2.transformer.wte.weight)  # type: ignore
    cache(tmp_path, distil(tmp_path / "distil"), "me/distil")
    with pytest.raises(ValueError, match="architectures: got .'DistilBertForMaskedLM'"):
        open_model("me/distil")
