"""What brings forgotten things back: rounding, fine-tuning, relearning; each on a copy."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import rfa_fast
from rfa_fast.experiments import persistence as module
from rfa_fast.experiments.persistence import Persistence, persistence
from rfa_fast.methods import train
from rfa_fast.metrics import accuracy


def head(rows: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.load_state_dict({"weight": torch.tensor(rows), "bias": torch.tensor(bias)})
    return layer


def ones(n: int) -> TensorDataset:
    """n times the input (1, 1), of class 0."""
    return TensorDataset(torch.ones(n, 2), torch.zeros(n, dtype=torch.long))


# Class 0 leads by the difference of the second weights, class 1 by half a step of the 4-bit grid.
ORIGINAL = ([[7.0, 4.0], [7.0, 3.0]], [0.0, 0.5])
FORGOT = ([[7.0, 3.6], [7.0, 3.4]], [0.0, 0.5])
FROZEN = {"lr": 1e-9}  # a training that changes nothing


def test_a_tiny_change_is_undone_by_four_bits_and_not_by_eight():
    data = {"D_r": ones(4), "D_f": ones(20)}
    assert accuracy(head(*ORIGINAL), DataLoader(data["D_f"], 20)) == 1.0
    found = persistence(head(*FORGOT), data, quantiser="simulated", train_options=FROZEN)
    assert list(found) == ["merged", "8-bit", "4-bit", "finetuned", "relearnt"]
    by_state = {state: row["forget_accuracy"] for state, row in found.items()}
    assert by_state == {"merged": 0.0, "8-bit": 0.0, "4-bit": 1.0, "finetuned": 0.0, "relearnt": 0.0}
    assert "by simulated and dequantised" in found.how["4-bit"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.flat()["4-bit/forget_accuracy"] == 1.0


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(6, 16), nn.Dropout(0.1), nn.Linear(16, 3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.body(x).relu()))


def samples(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, object]]:
    """Every call of the trainer, which runs all the same."""
    found: list[dict[str, object]] = []

    @functools.wraps(train)
    def spy(model, data, **options):
        found.append({"data": data, **options})
        return train(model, data, **options)

    monkeypatch.setattr(module, "train", spy)
    return found


# 0.1 × 30 is above 3 in floating point: no fourth item may slip in.
@pytest.mark.parametrize(("n", "share", "count"), [(30, 0.1, 3), (128, 0.1, 13), (4, 0.1, 1), (8, 0.5, 4), (3, 1, 3)])
def test_relearning_sees_exactly_its_share(calls, n, share, count):
    forget = samples(n, 1)
    options = {"bits": (), "relearn_share": share, "relearn_epochs": 2, "train_options": {"batch_size": 5}}
    found = persistence(Net(), {"D_r": samples(11, 2), "D_f": forget}, **options)
    finetuned, relearnt = calls
    assert (len(finetuned["data"]), finetuned["epochs"], len(relearnt["data"]), relearnt["epochs"]) == (11, 1, count, 2)
    shown = relearnt["data"].indices
    assert len(set(shown)) == count
    assert relearnt["data"].dataset is forget
    assert found.how["relearnt"].startswith(f"the model as given; relearning on {count} items of D_f: 2 epochs")
    unseen = [i for i in range(n) if i not in shown]
    assert all(("forget_unseen_accuracy" in row) == bool(unseen) for row in found.values())
    if unseen:
        expected = accuracy(Net(), DataLoader(Subset(forget, unseen), n))
        assert found["merged"]["forget_unseen_accuracy"] == pytest.approx(expected)
    others = persistence(Net(), {"D_r": samples(11, 2), "D_f": forget}, seed=1, **options)
    assert list(calls[3]["data"].indices) != list(shown) or n < 5
    assert others["merged"]["forget_accuracy"] == found["merged"]["forget_accuracy"]


def test_training_states_are_those_of_the_trainer(calls):
    data = {"D_r": samples(40, 2), "D_f": samples(30, 1)}
    options = {"lr": 0.02, "batch_size": 8}
    found = persistence(Net(), data, bits=(), seed=3, train_options=options)
    for state, call in zip(("finetuned", "relearnt"), calls, strict=True):
        again = Net()
        given = {key: value for key, value in call.items() if key != "data"}
        train(again, call["data"], **given)
        assert found[state]["forget_accuracy"] == accuracy(again, DataLoader(data["D_f"], 30))
        assert given["lr"] == 0.02
        assert not given["progress"]
    assert found["finetuned"] != found["merged"] != found["relearnt"]
    assert found == persistence(Net(), data, bits=(), seed=3, train_options=options)


def test_the_model_is_left_as_it_was():
    model = Net().train()
    model.drop.eval()
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    seen: list[nn.Module] = []

    def figures(changed: nn.Module) -> dict[str, float]:
        seen.append(changed)
        assert not any(m.training for m in changed.modules())
        with torch.no_grad():
            return {"norm": float(changed.head.weight.norm())}

    reported: list[tuple[str, int, int]] = []
    data = {"D_r": samples(9, 2), "D_f": samples(9, 1)}
    found = persistence(model, data, figures, train_options={"lr": 0.05}, progress=lambda *call: reported.append(call))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert len(seen) == 5
    assert all(changed is not model for changed in seen)
    assert found["merged"]["norm"] == float(state["head.weight"].norm())
    assert len({row["norm"] for row in found.values()}) == 5
    names = ["merged", "8-bit", "4-bit", "finetuned", "relearnt"]
    assert reported == [*((name, done, 5) for done, name in enumerate(names)), ("relearnt", 5, 5)]


def test_live_adapters_forget_where_merged_ones_are_rounded_away():
    """bf16 holds 8 bits: next to 256, a change of 0.6 is lost in a merge and kept beside it."""
    model = nn.Sequential(head([[256.0, 0.0], [256.0, 0.0]], [0.0, -0.5]).to(torch.bfloat16))
    rfa = rfa_fast.patch(model, ["0"], rank=1, alpha=1, seed=0)
    layer = rfa.layers["0"]
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[1.0, 0.0]]))
        layer.lora_b.copy_(torch.tensor([[0.0], [0.6]]))
        layer.bias.copy_(torch.tensor([-256.0, -256.5]))  # the outputs are small: bf16 shows their difference
    before = copy.deepcopy(model.state_dict())
    data = {
        "D_r": TensorDataset(torch.ones(4, 2, dtype=torch.bfloat16), torch.ones(4, dtype=torch.long)),
        "D_f": TensorDataset(torch.ones(4, 2, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long)),
    }
    with pytest.warns(UserWarning, match="rounding into torch.bfloat16 lost"):
        found = persistence(model, data, handle=rfa, quantiser="simulated", train_options=FROZEN)
    assert list(found) == ["merged", "live", "8-bit", "8-bit live", "4-bit", "4-bit live", "finetuned", "relearnt"]
    assert found["merged"]["forget_accuracy"] == 1.0
    assert found["live"]["forget_accuracy"] == found["4-bit live"]["forget_accuracy"] == 0.0
    assert found.how["merged"].startswith("adapters merged; rounding lost up to 100.00% of a layer's change")
    assert found.how["4-bit live"].startswith("adapters live, nothing merged; 4-bit weights")
    assert rfa.names == ("0",)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rfa.remove()


def test_fp32_adapters_are_the_same_live_and_merged():
    model = Net()
    data = {"D_r": samples(20, 2), "D_f": samples(30, 1)}
    rfa = rfa_fast.patch(model, ["body"], rank=2, seed=0)
    with torch.no_grad():
        rfa.layers["body"].lora_b.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    found = persistence(model, data, handle=rfa, bits=[8], train_options={"lr": 0.05})
    assert found["live"] == found["merged"]
    assert found["finetuned"] != found["merged"]  # what a merge gives can be trained
    with pytest.raises(ValueError, match=r"got one with live adapters \(body\) and no handle, expected handle=…"):
        persistence(model, data)


def texts(n: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(n)
    ids = [torch.randint(1, 37, (length - i % 3,), generator=generator) for i in range(n)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def test_language_models_of_uneven_texts():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=24, n_embd=16, n_layer=1, n_head=2))
    data = {"D_r": texts(6, 8), "D_f": texts(5, 7)}
    found = persistence(model, data, relearn_share=0.4, relearn_epochs=60, train_options={"lr": 0.02})
    assert found["merged"]["forget_accuracy"] == 0.0
    assert found["relearnt"]["forget_accuracy"] == pytest.approx(0.4)  # the two it was shown, whole
    assert found["relearnt"]["forget_unseen_accuracy"] == 0.0


DATA = {"D_r": ones(4), "D_f": ones(4)}
BAD = {
    "no forget": (({"D_r": ones(4)},), {}, ValueError, "subsets: got D_r, expected D_f among them"),
    "empty": (({**DATA, "D_f": Subset(ones(4), [])},), {}, ValueError, "subsets: got no item in D_f"),
    "loader": (({**DATA, "D_r": DataLoader(ones(4))},), {}, TypeError, "got DataLoader as D_r, expected a map-style"),
    "share": ((DATA,), {"relearn_share": 0}, ValueError, "relearn_share: got 0, expected a number above 0"),
    "epochs": ((DATA,), {"relearn_epochs": 0}, ValueError, "epochs: got 0, expected an integer >= 1"),
    "bits": ((DATA,), {"bits": [16]}, ValueError, "bits: got 16, expected an integer from 2 to 8"),
    "ours": ((DATA,), {"train_options": {"epochs": 3}}, ValueError, "train_options: got 'epochs', expected some of b"),
    "option": ((DATA,), {"train_options": {"rate": 3}}, ValueError, "train_options: got 'rate'"),
    "figures": ((DATA, 3), {}, TypeError, "figures: got int, expected a callable"),
    "clash": ((DATA, lambda model: {"forget_accuracy": 1}), {}, ValueError, "figures: got 'forget_accuracy'"),
    "handle": ((DATA,), {"handle": "rfa"}, TypeError, "handle: got str, expected the RFA"),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        persistence(head(*FORGOT), *arguments, **options)


def test_models_that_cannot_be_used():
    with pytest.raises(TypeError, match="model: got str"):
        persistence("model", DATA)
    with pytest.raises(ValueError, match="parameters are all frozen"):
        persistence(head(*FORGOT).requires_grad_(False), DATA)
    model = Net()
    rfa = rfa_fast.patch(model, ["body"], rank=2)
    with pytest.raises(ValueError, match="handle: got one of another model"):
        persistence(head(*FORGOT), DATA, handle=rfa)
    rfa.merge()
    with pytest.raises(ValueError, match="or one that is merged"):
        persistence(model, DATA, handle=rfa)
    assert Persistence().flat() == {}
