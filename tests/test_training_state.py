"""What training changes in a patched model: read, put back, and refused where it is another model's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rfa_fast

X, LABELS, FORGET = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.tensor([False, False, True, True])
PICTURES = torch.randn(4, 2, 6, 6)


def linear():
    return rfa_fast.patch(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), ["0", "2"], rank=2, seed=0), X


def convolution():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return rfa_fast.patch(net, ["0"], rank=2, seed=0), PICTURES


def snapshot(rfa):
    return {name: tensor.clone() for name, tensor in rfa.state_tensors().items()}


@pytest.mark.parametrize("made", [linear, convolution])
def test_what_was_read_is_put_back_and_no_more(made):
    rfa, x = made()
    before = snapshot(rfa)
    rfa.loss(x, LABELS, FORGET).total.backward()
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter.add_(1)
    after = snapshot(rfa)
    assert set(after) - set(before) >= {"0.feature_mean", "0.feature_mean_known", "mean_prediction"}
    rfa.load_state_tensors(before)  # of before the first batch: what that one left is not known any more
    found = rfa.state_tensors()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    rfa.load_state_tensors(after)
    found = rfa.state_tensors()
    assert found.keys() == after.keys()
    assert all(torch.equal(found[name], value) for name, value in after.items())


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        (linear, {"0.lora_a": torch.zeros(3, 5)}, r"0.lora_a: got shape \(3, 5\), expected \(2, 5\)"),
        (linear, {"0.feature_mean": torch.zeros(5)}, r"0.feature_mean: got torch.float32 \(5,\).*\(\.\.\., 6\)"),
        (linear, {"0.feature_mean": torch.zeros(6, dtype=torch.int64)}, "0.feature_mean: got torch.int64"),
        (linear, {"0.feature_mean": None}, "0.feature_mean, 0.feature_mean_known: got one of them"),
        (linear, {"0.feature_mean_known": None}, "0.feature_mean, 0.feature_mean_known: got one of them"),
        (linear, {"0.feature_mean_known": torch.tensor(1.0)}, "0.feature_mean_known: got torch.float32"),
        (linear, {"0.feature_mean_known": torch.ones(4, dtype=torch.bool)}, "0.feature_mean_known: got torch.bool"),
        (linear, {"mean_prediction": torch.zeros(4)}, r"mean_prediction: got torch.float32 \(4,\).*\(3,\)"),
        (linear, {"mean_prediction": torch.zeros(1)}, r"mean_prediction: got torch.float32 \(1,\)"),
        (linear, {"mean_prediction": torch.zeros(1, 3)}, "mean_prediction: got torch.float32"),
        (convolution, {"0.feature_mean": torch.zeros(3, 4, 4)}, r"0.feature_mean: .*\(4, H, W\)"),
        (convolution, {"0.feature_mean": torch.zeros(4, 4)}, r"0.feature_mean: .*\(4, H, W\)"),
    ],
)
def test_tensors_of_another_model_change_nothing(made, change, message):
    rfa, x = made()
    rfa.loss(x, LABELS, FORGET)
    before = snapshot(rfa)
    given = {name: value + 1 if value.is_floating_point() else value for name, value in copy.deepcopy(before).items()}
    given = {name: value for name, value in {**given, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        rfa.load_state_tensors(given)
    after = rfa.state_tensors()
    assert all(torch.equal(after[name], value) for name, value in before.items())
