"""Every option: its default is the paper's, its bounds are checked where it is given, and it survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from rfa_fast import RFAConfig


def test_defaults_are_the_papers() -> None:
    config = RFAConfig()
    assert (config.rank, config.alpha, config.scale_of("any")) == (8, 32, 4.0)
    assert (config.mode, config.norm, config.gamma, config.weights) == ("residual", "mse", 0.5, (1.0, 1.0, 1.0, 1.0))
    assert (config.adapter, config.rslora, config.adapter_dtype) == ("lora", False, torch.float32)
    assert (config.feature_mean, config.rows, config.shift_labels) == ("auto", "auto", None)
    assert (config.backend, config.seed, config.rank_pattern, config.alpha_pattern) == ("auto", None, {}, {})


def test_scales() -> None:
    config = RFAConfig(rank=4, alpha=6, rank_pattern={"a": 9}, alpha_pattern={"a": 3.0, "b": 10})
    assert {name: config.scale_of(name) for name in "abc"} == {"a": 3 / 9, "b": 10 / 4, "c": 6 / 4}
    assert {name: config.rank_of(name) for name in "abc"} == {"a": 9, "b": 4, "c": 4}
    stabilised = dataclasses.replace(config, rslora=True)
    assert {n: stabilised.scale_of(n) for n in "abc"} == pytest.approx({"a": 1.0, "b": 5.0, "c": 3.0}, rel=1e-15)


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "rank 0": ({"rank": 0}, ValueError, ("rank: got 0", "an integer >= 1")),
    "rank negative": ({"rank": -3}, ValueError, ("rank: got -3",)),
    "rank float": ({"rank": 8.0}, ValueError, ("rank: got 8.0", "an integer")),
    "rank bool": ({"rank": True}, ValueError, ("rank: got True", "an integer")),
    "rank text": ({"rank": "8"}, ValueError, ("rank: got '8'", "an integer")),
    "alpha 0": ({"alpha": 0}, ValueError, ("alpha: got 0", "> 0")),
    "alpha negative": ({"alpha": -1.0}, ValueError, ("alpha: got -1.0", "> 0")),
    "alpha NaN": ({"alpha": math.nan}, TypeError, ("alpha: got nan", "finite")),
    "alpha text": ({"alpha": "32"}, TypeError, ("alpha: got '32'", "number")),
    "gamma low": ({"gamma": -0.1}, ValueError, ("gamma: got -0.1", ">= 0", "<= 1")),
    "gamma high": ({"gamma": 1.5}, ValueError, ("gamma: got 1.5", ">= 0", "<= 1")),
    "gamma None": ({"gamma": None}, TypeError, ("gamma: got None", "number")),
    "mode": ({"mode": "student"}, ValueError, ("mode: got 'student'", "'residual', 'teacher'")),
    "norm": ({"norm": "l1"}, ValueError, ("norm: got 'l1'", "'mse', 'l2'")),
    "adapter": ({"adapter": "loha"}, ValueError, ("adapter: got 'loha'", "'lora', 'pissa', 'dora'")),
    "feature_mean": ({"feature_mean": "row"}, ValueError, ("feature_mean: got 'row'", "'auto', 'sample', 'token'")),
    "backend": ({"backend": "cuda"}, ValueError, ("backend: got 'cuda'", "'reference'", "'triton'")),
    "rows": ({"rows": "column"}, ValueError, ("rows: got 'column'", "'batch', 'flat', 'sequence_first'")),
    "rows of a layer": ({"rows": {"fc": "column"}}, ValueError, ("rows['fc']: got 'column'", "'flat'")),
    "rows list": ({"rows": ["flat"]}, ValueError, ("rows: got ['flat']", "'flat'")),
    "weights three": ({"weights": (1, 1, 1)}, ValueError, ("weights: got (1, 1, 1)", "four numbers")),
    "weights number": ({"weights": 1.0}, ValueError, ("weights: got 1.0", "four numbers")),
    "weights text": ({"weights": "1111"}, ValueError, ("weights: got '1111'", "four numbers")),
    "weights negative": ({"weights": (1, 1, -1, 1)}, ValueError, ("weights (lambda): got -1", ">= 0")),
    "weights infinite": ({"weights": (1, math.inf, 1, 1)}, TypeError, ("weights (beta): got inf", "finite")),
    "rslora": ({"rslora": "yes"}, TypeError, ("rslora: got 'yes'", "True or False")),
    "shift_labels": ({"shift_labels": "auto"}, TypeError, ("shift_labels: got 'auto'", "True, False or None")),
    "adapter_dtype int": ({"adapter_dtype": torch.int8}, TypeError, ("adapter_dtype: got torch.int8", "torch.float32")),
    "adapter_dtype text": ({"adapter_dtype": "float32"}, TypeError, ("adapter_dtype: got 'float32'", "torch.float32")),
    "vocabulary_skip": ({"vocabulary_skip": 2.0}, ValueError, ("vocabulary_skip: got 2.0", ">= 0 and <= 0.5")),
    "seed float": ({"seed": 1.0}, TypeError, ("seed: got 1.0", "an integer or None")),
    "seed bool": ({"seed": True}, TypeError, ("seed: got True", "an integer or None")),
    "rank_pattern list": ({"rank_pattern": ["fc"]}, TypeError, ("rank_pattern: got ['fc']", "dict of layer name")),
    "rank_pattern 0": ({"rank_pattern": {"fc": 0}}, ValueError, ("rank_pattern['fc']: got 0", "an integer >= 1")),
    "alpha_pattern": ({"alpha_pattern": {"fc": -2}}, ValueError, ("alpha_pattern['fc']: got -2", "> 0")),
}


@pytest.mark.parametrize("entry", REJECTED)
def test_rejected(entry: str) -> None:
    options, error, words = REJECTED[entry]
    with pytest.raises(error) as caught:
        RFAConfig(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bounds_are_accepted() -> None:
    for options in ({"gamma": 0}, {"gamma": 1}, {"rank": 1}, {"alpha": 1e-3}, {"weights": [0, 0, 0, 0]}, {"seed": -5}):
        config = RFAConfig(**options)
        assert all(getattr(config, name) == (tuple(v) if name == "weights" else v) for name, v in options.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_survives_json(dtype: torch.dtype) -> None:
    config = RFAConfig(
        rank=3, alpha=5.5, mode="teacher", norm="l2", gamma=0.25, weights=(1, 2, 3, 4), adapter="dora", rslora=True,
        adapter_dtype=dtype, feature_mean="token", rank_pattern={"a": 2}, alpha_pattern={"a": 1.5},
        rows={"b": "flat"}, shift_labels=False, vocabulary_skip=0.25,
        backend="reference", seed=7,
    )  # fmt: skip
    written = json.loads(json.dumps(config.to_dict()))
    assert RFAConfig.from_dict(written) == config
    assert set(written) == {field.name for field in dataclasses.fields(config)}
    assert RFAConfig.from_dict({}) == RFAConfig()


def test_from_dict_rejects_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="options: got unknown rnak, expected some of adapter, adapter_dtype, alpha"):
        RFAConfig.from_dict({"rnak": 8})
    with pytest.raises(ValueError, match="adapter_dtype: got 'float8', expected one of float32, float64, bfloat16"):
        RFAConfig.from_dict({"adapter_dtype": "float8"})
    with pytest.raises(ValueError, match="rank: got 0"):
        RFAConfig.from_dict({"rank": 0})


def test_frozen_against_the_outside() -> None:
    """Neither the dict that was passed nor the one that is handed out reaches into the options."""
    pattern = {"a": 2}
    config = RFAConfig(rank_pattern=pattern)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]
    pattern["a"] = 7
    config.to_dict()["rank_pattern"]["a"] = 9
    assert config.rank_of("a") == 2
