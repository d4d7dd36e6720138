"""What the experiments on real data are made of, on small files of the same formats; nothing is trained."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfa_fast.data import Split, load_trivia
from rfa_fast.experiments import bbc_news, fashion_mnist, fashion_mnist_vit, smollm2
from rfa_fast.experiments.cache import ModelCache
from rfa_fast.experiments.common import ScenarioRun
from rfa_fast.experiments.comparison import Request, scenario_split


def silent(text: str) -> None:
    """Say nothing."""


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder in the format of Fashion-MNIST: 20 training and 10 test images."""
    for part, n in (("train", 20), ("t10k", 10)):
        for kind, values in (
            ("images-idx3", np.arange(n * 784).reshape(n, 28, 28)),
            ("labels-idx1", np.arange(n) % 10),
        ):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            content = gzip.compress(header + values.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    return tmp_path


def test_the_small_vit_sees_the_resnets_images(fashion: Path) -> None:
    request = Request(data=fashion, seed=3, epochs=2)
    vit, resnet = fashion_mnist_vit.experiment(request), fashion_mnist.experiment(request)
    image, label = vit.train[3]
    assert torch.equal(image, resnet.train[3][0])
    assert label == 3
    model = vit.build()
    assert type(model).__name__ == "VisionTransformer"
    assert model(image[None]).shape == (1, 10)
    assert torch.equal(model.conv_proj.weight, vit.build().conv_proj.weight)  # type: ignore[union-attr, arg-type]
    assert vit.recipe == {**fashion_mnist_vit.RECIPE, "seed": 3, "epochs": 2}
    assert (vit.name, vit.architecture) != (resnet.name, resnet.architecture)
    for scenario in fashion_mnist_vit.SCENARIOS[:2]:
        assert len(scenario_split(vit, scenario).forget) == 2


def test_a_run_leaves_the_split_that_all_its_methods_share(fashion: Path, tmp_path: Path) -> None:
    experiment = fashion_mnist.experiment(Request(data=fashion))
    splits = [scenario_split(experiment, "sample:4", seed) for seed in (0, 1)]
    for split in (*splits, splits[0]):
        run = ScenarioRun(experiment, split, cache=ModelCache(None, silent), output=tmp_path / "out", say=silent)
    assert {name: len(part) for name, part in run.subsets.items()} == {"D_r": 16, "D_f": 4, "D_t": 10}
    files = sorted((tmp_path / "out" / "splits").iterdir())
    assert {Split.load(file) for file in files} == set(splits)
    assert all(file.name.startswith("sample-4-") for file in files)
    ScenarioRun(experiment, splits[0], cache=ModelCache(None, silent), say=silent)
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("scenarios", "sizes"),
    [(None, (96, 48)), (["class:starwars"], (96, 48)), (["sample:128"], (270, 90))],
    ids=["default", "topic", "samples"],
)
def test_random_samples_of_trivia_are_drawn_from_all_questions(
    scenarios: list[str] | None, sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for topic in smollm2.TOPICS:
        lines = "".join(f"{topic} {i}?:\n- answer {i}\n" for i in range(120))
        (tmp_path / f"{topic}.yaml").write_text(lines)
    seen: list[Any] = []
    monkeypatch.setattr(smollm2, "PER_TOPIC", 48)
    monkeypatch.setattr(smollm2, "load_trivia", lambda *a, **k: seen.append(load_trivia(*a, **k)) or seen[0])
    monkeypatch.setattr(smollm2, "smollm2", lambda cache: (_ for _ in ()).throw(FileNotFoundError("no model")))
    with pytest.raises(FileNotFoundError, match="no model"):
        smollm2.experiment(Request(data=tmp_path, scenarios=scenarios))
    assert (len(seen[0].train), len(seen[0].test)) == sizes


def test_topics_and_random_samples_of_trivia_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="scenarios: got class:starwars, sample:128, expected sample:… alone"):
        smollm2.experiment(Request(data="/nowhere", scenarios=["class:starwars", "sample:128"]))


def test_bbc_news_forgets_a_topic_and_a_keyword() -> None:
    assert [scenario.partition(":")[0] for scenario in bbc_news.SCENARIOS] == ["class", "keyword"]
