"""Activation and feature distances against values by hand, float64 numpy and transformers' hidden states."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import rfa_fast
from rfa_fast import metrics


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return layer


def pairs(inputs: torch.Tensor, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(inputs, torch.zeros(len(inputs), dtype=torch.long)), batch_size=batch_size)


def tiny_gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=24, n_embd=16, n_layer=2, n_head=2)).eval()


def padded_texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 4, 1])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_feature_distance_of_two_linear_models_by_hand():
    a = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), linear([[1.0, 1.0]], [0.0]))
    b = nn.Sequential(linear([[4.0, 0.0], [0.0, 5.0]], [0.0, 0.0]), linear([[1.0, 1.0]], [2.0]))
    inputs = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    found = metrics.feature_distance(a, b, pairs(inputs), ["1", "0"])
    # Layer 0 differs by (3, 4), (6, 0), (0, 0); layer 1 by 3 + 4 + 2, 6 + 2, 2.
    assert found == pytest.approx({"0": (5 + 6 + 0) / 3, "1": (9 + 8 + 2) / 3})
    assert list(found) == ["1", "0"]
    assert hooks_of(a) == hooks_of(b) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_feature_distance_of_convolutions_equals_float64(dtype):
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.Flatten()).to(dtype) for _ in range(2))
    inputs = torch.randn(7, 3, 9, 11).to(dtype)
    found = metrics.feature_distance(a, b, pairs(inputs, 3), ["0", "1"])
    with torch.no_grad():
        for name, depth in (("0", 1), ("1", 2)):
            # Batch by batch, as the metric sees it: a bf16 convolution may round otherwise for another batch size.
            left, right = (torch.cat([m[:depth](part) for part in inputs.split(3)]).double().numpy() for m in (a, b))
            expected = np.linalg.norm((left - right).reshape(7, -1), axis=1).mean()
            assert found[name] == pytest.approx(expected, rel=1e-6)


def test_feature_distance_leaves_padding_out_and_takes_the_state_of_a_tuple():
    a, b, batch = tiny_gpt2(0), tiny_gpt2(1), padded_texts()
    found = metrics.feature_distance(a, b, [batch], ["transformer.h.0", "transformer.h.1.mlp"])
    with torch.no_grad():
        states = [m(**batch, output_hidden_states=True).hidden_states[1].double() for m in (a, b)]
    squares = (states[0] - states[1]).square().sum(-1) * batch["attention_mask"]
    assert found["transformer.h.0"] == pytest.approx(squares.sum(1).sqrt().mean().item(), rel=1e-5)
    assert found["transformer.h.1.mlp"] > 0


class Rows(nn.Module):
    """Flattens tokens to rows before its layer, as OPT does, and pools to as many features as tokens."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.rows, self.pooled = nn.Identity(), nn.Identity()
        self.scale = scale

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.rows((self.scale * x).flatten(0, 1))
        return self.pooled(self.scale * x.sum(2))  # (B, T) by chance of shape: no token axis


def test_padding_is_left_out_of_flattened_rows_but_not_of_pooled_features():
    batch = {
        "x": torch.ones(2, 3, 4),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "labels": torch.tensor([0, 1]),
    }
    found = metrics.feature_distance(Rows(1.0), Rows(2.0), [batch], ["rows", "pooled"])
    assert found["rows"] == pytest.approx((math.sqrt(2 * 4) + math.sqrt(4)) / 2)
    assert found["pooled"] == pytest.approx(math.sqrt(3 * 16))


def test_a_layer_called_twice_counts_with_both_calls():
    class Twice(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.layer = linear([[weight]], [0.0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.layer(2 * x)

    found = metrics.feature_distance(Twice(1.0), Twice(2.0), pairs(torch.tensor([[3.0]])), ["layer"])
    assert found["layer"] == pytest.approx(math.hypot(3, 6))


def test_one_model_is_at_no_distance_from_itself():
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9), nn.Linear(3, 2)).train()
    loader = pairs(torch.randn(5, 2))
    assert metrics.feature_distance(model, model, loader, ["0", "2"]) == {"0": 0.0, "2": 0.0}
    assert metrics.activation_distance(model, model, loader) == 0.0
    assert all(module.training for module in model.modules())


def test_a_feature_is_the_layers_own_whatever_is_written_into_it_next():
    """An activation in place behind a layer: outputs (-1, -1) and (-5, -5) are 4√2 apart, though ReLU makes both 0."""
    a, b = (
        nn.Sequential(linear([[0.0, 0.0], [0.0, 0.0]], [bias, bias]), nn.ReLU(inplace=True)) for bias in (-1.0, -5.0)
    )
    inputs = torch.randn(3, 2)
    assert metrics.feature_distance(a, b, pairs(inputs), ["0"]) == pytest.approx({"0": 4 * math.sqrt(2)})
    plain = nn.Sequential(linear([[-1.0, 0.0], [0.0, 2.0]], [0.5, -1.0]), nn.ReLU(inplace=True))
    patched = copy.deepcopy(plain)
    rfa_fast.patch(patched, ["0"], rank=1)  # which keeps activations from writing into what the layers keep
    assert metrics.feature_distance(plain, patched, pairs(inputs), ["0"]) == {"0": 0.0}


def test_unknown_layers_get_near_misses():
    a = nn.ModuleDict({"layer4": nn.Sequential(nn.Linear(1, 1))})
    b = nn.ModuleDict({"layer3": nn.Sequential(nn.Linear(1, 1))})
    loader = pairs(torch.ones(1, 1))
    with pytest.raises(
        ValueError, match=r"got 'layer4.O', expected a module of model_a \(ModuleDict\); did you mean 'l"
    ):
        metrics.feature_distance(a, b, loader, ["layer4.O"])
    with pytest.raises(ValueError, match=r"got 'layer4.0', expected a module of model_b"):
        metrics.feature_distance(a, b, loader, ["layer4.0"])
    with pytest.raises(ValueError, match="it has 'layer4', 'layer4.0'"):
        metrics.feature_distance(a, b, loader, ["zzz"])
    with pytest.raises(ValueError, match="names: got no layer"):
        metrics.feature_distance(a, b, loader, [])
    with pytest.raises(TypeError, match=r"got the string 'layer4'.*\['layer4'\] for one"):
        metrics.feature_distance(a, b, loader, "layer4")


class Odd(nn.Module):
    """One layer per way in which a feature cannot be compared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.idle, self.named, self.turned = nn.Identity(), AsDict(), nn.Identity()
        self.wide, self.broken, self.nan = nn.Linear(2, width), Broken(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.named(x)
        self.turned(x.T)
        self.wide(x)
        self.nan(x / 0)
        return self.broken(x)


class AsDict(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x}


class Broken(nn.Module):
    fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("broken")
        return x


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("idle", ValueError, "'idle' of model_a was never called in the forward of batch 0"),
        ("named", TypeError, "'named' returned dict, expected a tensor"),
        ("turned", ValueError, r"shape \(2, 3\) for 3 items, expected the batch first"),
        ("wide", ValueError, r"'wide' gives features \[\(3, 5\)\] in model_b, expected \[\(3, 4\)\]"),
        ("nan", FloatingPointError, "'nan' is not finite in batch 0"),
        ("broken", RuntimeError, "broken"),
    ],
)
def test_features_that_cannot_be_compared(name, error, message):
    a, b = Odd(4), Odd(5)
    b.broken.fail = name == "broken"
    with pytest.raises(error, match=message):
        metrics.feature_distance(a, b, pairs(torch.zeros(3, 2), 3), [name])
    assert hooks_of(a) == hooks_of(b) == 0
    assert all(module.training for module in [*a.modules(), *b.modules()])


def test_empty_loaders():
    model = nn.Sequential(nn.Linear(1, 2))
    with pytest.raises(ValueError, match="loader: got no batch"):
        metrics.feature_distance(model, model, [], ["0"])
    with pytest.raises(ValueError, match="loader: got no batch"):
        metrics.activation_distance(model, model, [])


class Fixed(nn.Module):
    """Ignores its inputs: row i of the batch gets row i of the given probabilities."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[x.long().flatten()]


def test_activation_distance_by_hand():
    a, b = Fixed([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]]), Fixed([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    loader = pairs(torch.arange(3.0)[:, None])
    third = math.hypot(0.3, 0.3)
    assert metrics.activation_distance(a, b, loader) == pytest.approx((math.sqrt(2) + third) / 3, rel=1e-6)
    assert metrics.activation_distance(a, b, loader, squared=True) == pytest.approx((2 + third**2) / 3, rel=1e-6)


def test_activation_distance_of_texts_is_over_the_labelled_tokens():
    a, b, batch = tiny_gpt2(0), tiny_gpt2(1), padded_texts()
    batch["labels"][0, 2] = -100
    with torch.no_grad():
        p = [torch.softmax(m(**batch).logits.double(), -1)[:, :-1] for m in (a, b)]
    counted = ((batch["labels"] != -100) & (batch["attention_mask"] == 1))[:, 1:]
    expected = (p[0] - p[1]).square().sum(-1).sqrt()[counted].mean().item()
    assert metrics.activation_distance(a, b, [batch]) == pytest.approx(expected, rel=1e-4)
    calls: list[tuple[int, int]] = []
    metrics.activation_distance(a, b, [batch, batch], progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_activation_distance_refuses_what_has_none():
    with pytest.raises(ValueError, match="model_b: got 3 outputs, expected 2 as in model_a"):
        metrics.activation_distance(nn.Linear(1, 2), nn.Linear(1, 3), pairs(torch.ones(2, 1)))
    with pytest.raises(FloatingPointError, match="batch 0"):
        metrics.activation_distance(nn.Identity(), nn.Identity(), [(torch.tensor([[math.nan]]), torch.tensor([0]))])
    nothing = [(torch.zeros(1, 2, 3), torch.full((1, 2), -100))]
    with pytest.raises(ValueError, match="got no labelled token"):
        metrics.activation_distance(nn.Identity(), nn.Identity(), nothing)
