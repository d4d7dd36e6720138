"""What only a step can show: layers that did not run once, masks that fit no row, models without logits.

Each stops the step with an error that names the layer or the argument, before any gradient, and leaves
model and handle as they were. An empty batch is no error: it is an exact zero.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import rfa_fast

FORGET = torch.tensor([False, True, False])
LABELS = torch.tensor([0, 1, 2])
INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """`then` decides what the forward does with the middle layer."""

    def __init__(self, then: Callable[[Net, Tensor], Any] = lambda net, x: net.out(net.middle(x))) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.middle, self.out, self.then = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self, self.first(x))


STEPS: dict[str, tuple[Callable[[Net, Tensor], Any], type[Exception], tuple[str, ...]]] = {
    "weight read by a functional call": (
        lambda net, x: net.out(F.linear(x, net.middle.weight)), ValueError,
        ("layer 'middle'", "got no call", "expected one", "functional call", "leave it out of targets"),
    ),
    "branch not taken": (lambda net, x: net.out(x), ValueError, ("layer 'middle'", "got no call", "expected one")),
    "used twice": (
        lambda net, x: net.out(net.middle(net.middle(x))), ValueError,
        ("layer 'middle'", "got 2 calls", "expected one", "leave it out of targets"),
    ),
    "no logits": (
        lambda net, x: SimpleNamespace(hidden=net.out(net.middle(x))), TypeError, ("SimpleNamespace", "logits"),
    ),
    "logits of a sequence": (
        lambda net, x: net.out(net.middle(x))[:, None], ValueError, ("labels: got shape (3,)", "(3, 1, 3)", "(B, C)"),
    ),
    "other rows": (
        lambda net, x: net.out(net.middle(torch.cat([x, x, x[:1]]))[:3]), ValueError,
        ("layer 'middle'", "(7,)", "3 samples", "rows="),
    ),
}  # fmt: skip


def state(rfa: rfa_fast.RFA) -> dict[str, Any]:
    tensors = {**rfa.model.state_dict(), **{f"rfa {k}": v for k, v in rfa.state_tensors().items()}}
    return {
        "tensors": {name: value.detach().clone() for name, value in tensors.items()},
        "classes": [type(m) for m in rfa.model.modules()],
        "training": [m.training for m in rfa.model.modules()],
        "requires_grad": [p.requires_grad for p in rfa.model.parameters()],
        "gradients": [p.grad is None for p in rfa.model.parameters()],
        "hooks": [len(m._forward_pre_hooks) for m in rfa.model.modules()],
    }


def assert_unchanged(rfa: rfa_fast.RFA, before: dict[str, Any]) -> None:
    now = state(rfa)
    tensors, others = now.pop("tensors"), {k: v for k, v in before.items() if k != "tensors"}
    assert now == others
    assert list(tensors) == list(before["tensors"])
    assert all(torch.equal(tensors[name], value) for name, value in before["tensors"].items())


@pytest.mark.parametrize("entry", STEPS)
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_step_refuses(entry: str, mode: str) -> None:
    then, error, words = STEPS[entry]
    rfa = rfa_fast.patch(Net(then), ["first", "middle", "out"], rank=2, mode=mode)
    rfa.model.train()
    before = state(rfa)
    for _ in range(2):
        with pytest.raises(error) as caught:
            rfa.loss(INPUTS, LABELS, FORGET)
        missing = [word for word in words if word not in str(caught.value)]
        assert not missing, f"{caught.value!r} does not say {missing}"
        assert_unchanged(rfa, before)
    rfa.remove()
    assert type(rfa.model.middle) is nn.Linear


@pytest.mark.parametrize("entry", ["weight read by a functional call", "used twice"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_two_part_step_refuses(entry: str, mode: str) -> None:
    then, error, words = STEPS[entry]
    rfa = rfa_fast.patch(Net(then), ["first", "middle", "out"], rank=2, mode=mode)
    before = state(rfa)

    def step() -> None:
        with rfa.groups(FORGET):
            rfa.model(INPUTS)
            rfa.alignment_loss()

    with pytest.raises(error) as caught:
        step()
    assert all(word in str(caught.value) for word in words)
    assert_unchanged(rfa, before)


def test_groups_refuse_what_does_not_fit() -> None:
    rfa = rfa_fast.patch(Net(), ["first", "middle"], rank=2, mode="teacher")
    rfa.loss(INPUTS, LABELS, FORGET)
    before = state(rfa)
    with rfa.groups(FORGET), pytest.raises(ValueError, match="got a second batch while one is under way"):
        rfa.loss(INPUTS, LABELS, FORGET)
    with rfa.groups(FORGET), pytest.raises(ValueError, match="'first': got no call in this forward, expected one"):
        rfa.alignment_loss()
    with rfa.groups(FORGET[:2]), pytest.raises(ValueError, match=r"'first'.* \(3,\), the batch has 2 samples"):
        rfa.model(INPUTS)
    for forget, kind, words in (
        (FORGET.long(), TypeError, "forget: got torch.int64, expected a bool tensor"),
        (FORGET.to("meta"), ValueError, "forget: got device meta, expected the model's device cpu"),
        (FORGET[None], ValueError, r"forget: got shape \(1, 3\)"),
    ):
        with pytest.raises(kind, match=words), rfa.groups(forget):
            pass
    assert_unchanged(rfa, before)
    with rfa.groups(FORGET):
        rfa.model(INPUTS)
        assert rfa.alignment_loss().item() > 0


def test_loss_inside_disabled_says_so() -> None:
    rfa = rfa_fast.patch(Net(), ["first"], rank=2)
    with rfa.disabled(), pytest.raises(ValueError, match="disabled"):
        rfa.loss(INPUTS, LABELS, FORGET)
    assert rfa.loss(INPUTS, LABELS, FORGET).total.item() > 0


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(6, 4, 3, stride=2, padding_mode="reflect", padding=1),
        nn.Flatten(), nn.Linear(4 * 4, 3),
    )  # fmt: skip


OPTIONS: list[dict[str, Any]] = [
    {}, {"norm": "l2"}, {"mode": "teacher"}, {"adapter": "pissa"}, {"adapter": "dora"}, {"backend": "reference"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolution", "tokens"])
def test_empty_batch_is_an_exact_zero(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    none = torch.zeros(0, dtype=torch.int64)
    model: nn.Module
    inputs: Any
    if kind == "linear":
        model, names, inputs = Net(), ["first", "middle", "out"], torch.zeros(0, 4)
    elif kind == "convolution":
        model, names, inputs = image_net(), ["0", "1", "3"], torch.zeros(0, 4, 4, 4)
    else:
        model, names = Tokens(), ["inner", "head"]
        inputs = {"input_ids": none.reshape(0, 5), "attention_mask": none.reshape(0, 5)}
    rfa = rfa_fast.patch(model, names, rank=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = rfa.loss(inputs, none, torch.zeros(0, dtype=torch.bool))
    assert all(value.item() == 0.0 for value in loss)
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in rfa.parameters())


class Tokens(nn.Module):
    """Ids to a class, by the mean over the valid tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(self.embed(input_ids))) * attention_mask[..., None]
        return self.head(hidden.sum(1))


@pytest.fixture
def text() -> dict[str, Tensor]:
    ids = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=31, n_positions=16))


def test_token_batches_are_checked(text: dict[str, Tensor]) -> None:
    rfa = rfa_fast.patch(gpt2(), "all", rank=2)
    ids = text["input_ids"]
    good = rfa.loss(text, ids, FORGET)
    before = state(rfa)
    other = {**text, "input_ids": ids.flip(1)}
    high, low = ids.clone(), ids.clone()
    high[0, 3], low[2, 5] = 31, -7
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (other, ids[:, :5], None, ValueError, r"labels: got shape \(3, 5\), expected \(3, 6\)"),
        (other, high, None, ValueError, r"labels: got 31, expected values in \[0, 31\)"),
        (other, low, None, ValueError, r"labels: got -7, expected values in \[0, 31\)"),
        (other, ids, FORGET[:, None].expand(3, 5), ValueError, r"valid: got shape \(3, 5\), .*\(3, 6\)"),
        (other, LABELS, None, ValueError, r"labels: got shape \(3,\) beside logits \(3, 6, 31\)"),
        ({**other, "attention_mask": ids[:, :5]}, ids, None, ValueError, r"attention_mask: got shape \(3, 5\)"),
        ({**other, "attention_mask": [1, 1, 1]}, ids, None, TypeError, "attention_mask: got list"),
        ({**other, "labels": ids}, ids, None, ValueError, "inputs: got the key 'labels'"),
    ]  # fmt: skip
    for inputs, labels, valid, kind, words in cases:
        with pytest.raises(kind, match=words):
            rfa.loss(inputs, labels, FORGET, valid)
        assert_unchanged(rfa, before)
        assert "forward" not in rfa.model.lm_head.__dict__
    assert rfa.loss(text, ids, FORGET) == good


def test_labels_out_of_range_of_a_transformers_classifier(text: dict[str, Tensor]) -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=31, num_labels=2
    )
    rfa = rfa_fast.patch(BertForSequenceClassification(config), "deep", rank=2)
    before = state(rfa)
    with pytest.raises(ValueError, match=r"labels: got 2, expected values in \[0, 2\), or -100"):
        rfa.loss(text, LABELS, FORGET)
    assert_unchanged(rfa, before)


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_a_finished_step_keeps_no_feature_alive(mode: str) -> None:
    """Between steps only means are held: a layer's features would cost a batch of activations."""
    rfa = rfa_fast.patch(Net(), ["first", "middle"], rank=2, mode=mode)
    size = 1237  # no other tensor of the process has as many rows
    loss = rfa.loss(torch.randn(size, 4), torch.zeros(size, dtype=torch.int64), torch.arange(size) % 5 == 0)
    loss.total.backward()
    del loss
    gc.collect()
    alive = [t.shape for t in gc.get_objects() if type(t) is Tensor and t.shape[:1] == (size,) and t.ndim == 2]
    assert alive == []


def test_an_evaluated_step_keeps_no_graph_alive() -> None:
    """A loss that is read and dropped, without backward, must not keep its graph until the next step."""
    rfa = rfa_fast.patch(Net(), ["first", "middle"], rank=2)
    value = rfa.loss(INPUTS, LABELS, FORGET).align.item()
    terms = rfa.layer_losses()
    assert all(not t.requires_grad for term in terms.values() for t in term)
    assert sum((t.retain + t.forget).item() for t in terms.values()) == pytest.approx(value, rel=1e-6)
