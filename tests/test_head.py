"""The language-model head that stands aside does so only where its product is all there is to the logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from step_cases import tiny_language_model
from torch import Tensor, nn

import rfa_fast
from rfa_fast.head import output_layer
from rfa_fast.methods.retrain import _loss

IDS = torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(3))
FORGET = torch.tensor([False, False, True, True])


class Scaled(nn.Linear):
    """A head that does more than its product."""

    def forward(self, x: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(x) / 3)


def subclass(model: nn.Module) -> None:
    head = model.lm_head
    model.lm_head = Scaled(head.in_features, head.out_features, bias=False)
    model.lm_head.weight = head.weight


def replaced(model: nn.Module) -> None:
    head, plain = model.lm_head, model.lm_head.forward
    head.forward = lambda x: 7 * plain(x)


def in_place(model: nn.Module) -> None:
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits.div_(0.01).tanh_().mul_(5)
        return output

    model.forward = forward


@pytest.mark.parametrize("change", [lambda model: None, subclass, replaced, in_place],
                         ids=["plain", "subclass", "replaced", "in place"])  # fmt: skip
def test_the_task_loss_is_of_the_models_own_logits(change: Callable[[nn.Module], None]) -> None:
    model = tiny_language_model()
    change(model)
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    expected = nn.functional.cross_entropy(logits[:2, :-1].flatten(0, 1), IDS[:2, 1:].flatten())
    found = rfa.loss({"input_ids": IDS}, IDS, FORGET)
    assert found.retain_task.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_in_inference_mode_leaves_the_next_step_alone() -> None:
    model = tiny_language_model()
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0)
    with torch.inference_mode():
        before = rfa.loss({"input_ids": IDS}, IDS, FORGET).total.item()
    found = rfa.loss({"input_ids": IDS}, IDS, FORGET)
    found.total.backward()
    assert found.total.item() == pytest.approx(before, rel=1e-6)
    only = rfa.loss({"input_ids": IDS[2:]}, IDS[2:], FORGET[2:])  # x̃ is that of the batch before
    only.total.backward()


def test_a_refused_batch_within_another_leaves_the_outer_one() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, ["0"], rank=2, seed=0)
    with rfa.groups(torch.tensor([False, True])):
        with pytest.raises(ValueError, match="groups"), rfa.groups(torch.tensor([False, True])):
            pass
        net(torch.ones(2, 4))
        assert rfa.alignment_loss().ndim == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel],
                         ids=["DataParallel", "AveragedModel"])  # fmt: skip
def test_a_wrapped_language_model_is_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A wrapper hides the configuration: its labels were not shifted, and whole logits were taken."""
    plain = rfa_fast.patch(tiny_language_model(), "deep", rank=2, seed=0).loss({"input_ids": IDS}, IDS, FORGET)
    wrapped = wrap(tiny_language_model())
    before = evaluate(wrapped)
    assert before == pytest.approx(evaluate(tiny_language_model()), rel=1e-6)
    rfa = rfa_fast.patch(wrapped, "deep", rank=2, seed=0)
    found = rfa.loss({"input_ids": IDS}, IDS, FORGET)
    for name in ("total", "retain_task", "forget_task", "forget_align"):
        assert getattr(found, name).item() == pytest.approx(getattr(plain, name).item(), rel=1e-6), name
    with rfa.groups(FORGET):
        wrapped(input_ids=IDS)
        assert rfa.alignment_loss().item() == pytest.approx(rfa.config.gamma / len(rfa.names) * plain.align.item())
    assert output_layer(wrapped, rfa._context) is not None


def evaluate(model: nn.Module) -> float:
    batches = [{"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}]
    return rfa_fast.metrics.perplexity(model, batches)


def test_a_wrapped_language_model_is_trained_as_one() -> None:
    ids, inputs = IDS[:2], {"input_ids": IDS[:2], "attention_mask": torch.ones_like(IDS[:2])}
    losses = [
        _loss(model, inputs, ids, torch.device("cpu")).item()
        for model in (tiny_language_model().eval(), nn.DataParallel(tiny_language_model()).eval())
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(
        _loss(Gathering(tiny_language_model()).eval(), inputs, ids, torch.device("cpu")).item(), rel=1e-6
    )


class Gathering(nn.DataParallel):
    """What DataParallel does on two devices: halves of the batch, whose losses it gathers as a vector."""

    def forward(self, **inputs):
        halves = [self.module(**{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(2)]
        gathered = {"logits": torch.cat([half.logits for half in halves])}
        if "labels" in inputs:
            gathered["loss"] = torch.stack([half.loss for half in halves])
        return SimpleNamespace(**gathered)
