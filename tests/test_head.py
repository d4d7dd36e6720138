"""The language-model head that stands aside does so only where its product is all there is to the logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from step_cases import tiny_language_model
from torch import Tensor, nn

import rfa_fast
from rfa_fast.functional import rfa_head_loss
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


def bart(mode_of: str) -> nn.Module:
    """Models that add a bias as long as the vocabulary to what their head gives."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        EsmConfig,
        EsmForMaskedLM,
        MarianConfig,
        MarianMTModel,
    )

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "vocab_size": 64,
             "max_position_embeddings": 32, "pad_token_id": 0, "dropout": 0.0}  # fmt: skip
    if mode_of == "bart":
        return BartForConditionalGeneration(BartConfig(**sizes)).eval()
    if mode_of == "marian":
        return MarianMTModel(MarianConfig(**sizes, decoder_start_token_id=0)).eval()
    config = EsmConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
                       max_position_embeddings=40, pad_token_id=1, mask_token_id=2)  # fmt: skip
    return EsmForMaskedLM(config).eval()


@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("kind", ["bart", "marian", "esm"])
def test_a_head_stays_where_the_model_needs_its_logits(kind: str, mode: str) -> None:
    model = bart(kind)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if kind != "esm":
        inputs |= {"decoder_input_ids": IDS.roll(1, 1), "decoder_attention_mask": torch.ones_like(IDS)}
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = nn.functional.cross_entropy(logits[:2].flatten(0, 1), IDS[:2].flatten())
    rfa = rfa_fast.patch(model, ["fc2"] if kind != "esm" else ["output.dense"], rank=2, seed=0, mode=mode)
    found = rfa.loss(inputs, IDS, FORGET)
    assert found.retain_task.item() == pytest.approx(expected.item(), rel=1e-5)
    assert rfa._context.head_stands_aside is False
    again = rfa_fast.compile_step(rfa, torch.optim.SGD(rfa.parameters(), 0.0), backend="eager")(inputs, IDS, FORGET)
    assert again.retain_task.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_prefix_is_cached_where_the_model_needs_its_logits() -> None:
    model = bart("esm")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    rfa = rfa_fast.patch(model, [r"esm.encoder.layer.1.output.dense"], rank=2, seed=0)
    assert rfa._prefix.names == ("esm.encoder.layer.0",)
    step = rfa_fast.compile_step(rfa, torch.optim.SGD(rfa.parameters(), 0.0), cache_prefix=True, compile=False)
    first, second = (step(inputs, IDS, FORGET) for _ in range(2))
    assert first.total.item() == pytest.approx(second.total.item(), rel=1e-6)
    assert first.total.item() == pytest.approx(rfa.loss(inputs, IDS, FORGET).total.item(), rel=1e-6)


def test_an_error_of_the_models_own_is_raised_and_the_head_stands_aside_as_before() -> None:
    model = tiny_language_model()
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0)
    inner, calls = model.model.forward, []

    def broken(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("no such file")

    model.model.forward = broken
    with pytest.raises(RuntimeError, match="no such file"):
        rfa.loss({"input_ids": IDS}, IDS, FORGET)
    assert (len(calls), rfa._context.head_stands_aside) == (2, True)
    model.model.forward = inner
    assert rfa.loss({"input_ids": IDS}, IDS, FORGET).total.isfinite()


@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("feature_mean", ["token", "sample"])
def test_an_adapted_head_takes_the_features_it_is_asked_for(feature_mean: str, norm: str) -> None:
    """The chunked head, and the plain one that a model with something of its own after it has."""
    losses = []
    for change in (lambda model: None, lambda model: setattr(model.lm_head, "forward", model.lm_head.forward)):
        model = tiny_language_model(2, tied=False)
        rfa = rfa_fast.patch(model, ["lm_head"], rank=2, seed=0, norm=norm, feature_mean=feature_mean)
        with torch.no_grad():
            rfa.layers["lm_head"].lora_b.normal_(generator=torch.Generator().manual_seed(1))
        if losses:
            rfa._context.head_stands_aside = False
        change(model)
        losses.append(rfa.loss({"input_ids": IDS}, IDS, FORGET))
    for one, other in zip(*losses, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_class_that_the_model_rules_out_adds_nothing(backend: str) -> None:
    hidden, weight = torch.randn(6, 5), torch.randn(9, 5)
    labels, group = torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int8)
    bias = torch.zeros(9)
    bias[8] = -float("inf")
    found = rfa_head_loss(hidden, weight, labels, group, bias, backend=backend)
    log_p = (hidden @ weight[:8].T).double().log_softmax(1)
    soft = log_p[:3].exp().mean(0)
    assert found.forget.item() == pytest.approx(-(log_p[3:] @ soft).sum().item(), rel=1e-5)
    assert found.retain.item() == pytest.approx(-log_p[torch.arange(3), labels[:3]].sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "error", "got"),
    [
        (torch.zeros(2, 3), TypeError, "labels: got torch.float32"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), ValueError, r"labels: got shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"labels: got shape \(2, 3\), expected"),
    ],
    ids=["targets of a regression", "a label per pixel", "a label per column"],
)
def test_labels_of_another_task_are_shown_the_way(labels, error, got):
    rfa = rfa_fast.patch(nn.Sequential(nn.Linear(5, 3)), ["0"], rank=1)
    with pytest.raises(error, match=rf"{got}.*inside `with rfa\.groups\(forget\):` and add rfa\.alignment_loss\(\)"):
        rfa.loss(torch.randn(2, 5), labels, torch.tensor([True, False]))
