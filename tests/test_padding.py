"""Padding on either side, and the two texts of an encoder-decoder: what is predicted, and from what."""

from __future__ import annotations

import math

import pytest
import torch
from step_cases import tiny_language_model
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import rfa_fast
from rfa_fast.methods import METHODS, Batch, train
from rfa_fast.metrics import predict
from rfa_fast.padding import batch_of
from rfa_fast.step import compile_step

IDS = torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(3))
FORGET = torch.tensor([False, False, True, True])
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])


def left_padded_losses(model: nn.Module) -> list[torch.Tensor]:
    """The losses of every token that a token of its own text stands before, by sample; counted by hand."""
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, attention_mask=LEFT).logits.double()
    return [
        torch.stack(
            [F.cross_entropy(logits[i, t - 1], IDS[i, t]) for t in range(1, 7) if LEFT[i, t - 1] and LEFT[i, t]]
        )
        for i in range(4)
    ]


def test_nothing_is_predicted_from_padding() -> None:
    model, inputs = tiny_language_model(), {"input_ids": IDS, "attention_mask": LEFT}
    losses = left_padded_losses(model)
    found = predict(model, [{**inputs, "labels": IDS}])
    assert found.tokens.tolist() == [len(each) for each in losses] == [3, 6, 5, 4]
    assert found.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0)
    step = rfa.loss(inputs, IDS, FORGET)
    assert step.retain_task.item() == pytest.approx(torch.cat(losses[:2]).mean().item(), rel=1e-5)


def test_training_leaves_padding_out() -> None:
    model = tiny_language_model()
    expected = torch.cat(left_padded_losses(model)).mean().item()
    items = [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(IDS, LEFT, strict=True)]
    seen: list[float] = []
    train(model, items, batch_size=4, seed=0, progress=False, callbacks=[lambda step: seen.append(step["total"])])
    assert seen == pytest.approx([expected], rel=1e-5)


def test_the_other_methods_leave_it_out_as_well() -> None:
    model = tiny_language_model()
    expected = torch.cat(left_padded_losses(model)[2:]).mean().item()
    method = METHODS["neggrad"](model, seed=0)
    loss = method.loss(Batch({"input_ids": IDS, "attention_mask": LEFT}, IDS, FORGET))["total"]
    assert loss.item() == pytest.approx(-expected, rel=1e-5)


def tiny_t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=61, decoder_start_token_id=0, dropout_rate=0.0
    )
    return T5ForConditionalGeneration(config).eval()


def translation(length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    labels = torch.randint(5, 60, (4, length), generator=generator)
    labels[0, -1:] = labels[3, -2:] = -100
    read = torch.cat([torch.zeros(4, 1, dtype=torch.int64), labels[:, :-1].clamp(min=0)], 1)
    return {"input_ids": IDS, "attention_mask": LEFT.flip(1), "decoder_input_ids": read}, labels


@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("length", [3, 7, 8])
def test_labels_of_an_encoder_decoder_have_a_padding_of_their_own(length: int, mode: str) -> None:
    model, (inputs, labels) = tiny_t5(), translation(length)
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)
    expected = losses[:2][labels[:2] != -100].mean().item()
    found = predict(model, [{**inputs, "labels": labels}])
    assert found.tokens.tolist() == (labels != -100).sum(1).tolist()
    assert found.perplexity == pytest.approx(math.exp(losses[labels != -100].mean()), rel=1e-5)
    rfa = rfa_fast.patch(model, r".*\.wo|.*SelfAttention\.v", rank=2, seed=0, mode=mode)
    assert {name.split(".")[0] for name in rfa.names} == {"encoder", "decoder"}
    loss = rfa.loss(inputs, labels, FORGET)
    assert loss.retain_task.item() == pytest.approx(expected, rel=1e-5)
    loss.total.backward()
    assert all(p.grad is not None for p in rfa.parameters())


def test_training_an_encoder_decoder_takes_its_labels_as_they_are() -> None:
    model, (inputs, labels) = tiny_t5(), translation(7)
    inputs.pop("decoder_input_ids")  # the model makes them from the labels
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss.item()
    items = [{key: value[i] for key, value in inputs.items()} | {"labels": labels[i]} for i in range(4)]
    seen: list[float] = []
    train(model, items, batch_size=4, seed=0, progress=False, callbacks=[lambda step: seen.append(step["total"])])
    assert seen == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("length", [3, 7])
def test_an_encoders_layers_are_aligned_by_token_whatever_is_written(length: int) -> None:
    model, (inputs, labels) = tiny_t5(), translation(length)
    name, real = "encoder.block.1.layer.1.DenseReluDense.wi", LEFT.flip(1).bool()
    features: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: features.append(args[2].detach().double()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    target = features[0][:2][real[:2]].mean(0)
    expected = (features[0][2:][real[2:]] - target).square().mean().item()
    rfa = rfa_fast.patch(model, [name], rank=2, seed=0)
    assert rfa.loss(inputs, labels, FORGET).forget_align.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [3, 7])
def test_a_decoders_layers_are_aligned_by_sample(length: int) -> None:
    model, (inputs, labels) = tiny_t5(), translation(length)
    name = "decoder.block.1.layer.2.DenseReluDense.wi"
    features: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: features.append(args[2].detach().double()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    target = features[0][:2].mean((0, 1))
    expected = (features[0][2:] - target).square().mean().item()
    rfa = rfa_fast.patch(model, [name], rank=2, seed=0)
    assert rfa.loss(inputs, labels, FORGET).forget_align.item() == pytest.approx(expected, rel=1e-5)


def test_a_step_of_an_encoder_decoder_in_parts_and_compiled() -> None:
    torch._dynamo.reset()
    losses = []
    for options in ({"compile": False}, {"compile": False, "accumulate": 2}, {"backend": "aot_eager"}):
        rfa = rfa_fast.patch(tiny_t5(), r"decoder.*\.wo", rank=2, seed=0)
        step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.5), **options)
        losses.append([float(step(*translation(length), FORGET).total) for length in (3, 3, 5, 5)])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.2)  # the parts have target means of their own
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_embeddings_beside_no_ids_have_a_length_and_a_mask() -> None:
    mask = torch.ones(2, 3)
    size, length, found = batch_of({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": mask})
    assert (size, length) == (2, 3)
    assert found is not None
    assert bool(found.all())
