"""Figures of texts: perplexity, answers and generation, against values by hand and transformers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import rfa_fast
from rfa_fast import metrics
from rfa_fast.metrics import predictions


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=24, n_embd=16, n_layer=2, n_head=2)).eval()


def tiny_distilbert() -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=37, dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=3)
    return DistilBertForSequenceClassification(config).eval()


def texts(rows: int = 5, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Right-padded token ids with their mask; labels are the ids, padding included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 37, (rows, length), generator=generator)
    real = torch.tensor([length - row % 4 for row in range(rows)])
    mask = (torch.arange(length) < real[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


@pytest.mark.parametrize("vocabulary", [1, 7, 50])
def test_uniform_logits_have_the_vocabulary_as_perplexity(vocabulary):
    labels = torch.randint(0, vocabulary, (3, 5), generator=torch.Generator().manual_seed(0))
    loader = [(torch.zeros(3, 5, vocabulary), labels)]
    assert metrics.perplexity(nn.Identity(), loader, shift_labels=True) == pytest.approx(vocabulary, rel=1e-6)


def test_perplexity_weighs_tokens_not_texts_or_batches():
    half, eighth = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.125, 0.875]]).log()
    one = (torch.stack([half, half]).reshape(1, 2, 2), torch.tensor([[0, -100]]))
    three = (eighth.expand(3, 2).reshape(1, 3, 2), torch.tensor([[0, 0, 0]]))
    value = metrics.perplexity(nn.Identity(), [one, three], shift_labels=False)
    assert value == pytest.approx(2 ** ((1 + 3 * 3) / 4), rel=1e-6)  # -log2 p: 1, 3, 3, 3


def test_perplexity_beyond_float64_is_inf_not_an_overflow():
    logits = torch.tensor([[[0.0, 2000.0]]])
    assert metrics.perplexity(nn.Identity(), [(logits, torch.tensor([[0]]))]) == math.inf


def test_causal_model_agrees_with_its_own_loss():
    model, batch = tiny_gpt2(), texts()
    masked = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = model(**{**batch, "labels": masked}).loss.item()
    # Padding is given with its ids as labels: the attention mask alone must leave it out.
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    assert metrics.perplexity(model, halves) == pytest.approx(math.exp(loss), rel=1e-5)
    pairs = [({k: v for k, v in half.items() if k != "labels"}, half["labels"]) for half in halves]
    assert metrics.perplexity(model, pairs) == pytest.approx(math.exp(loss), rel=1e-5)


def test_masked_language_model_is_not_shifted():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model, batch = BertForMaskedLM(config).eval(), texts(3)
    batch["labels"] = batch["labels"].masked_fill(torch.rand(3, 9) < 0.7, -100)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert metrics.predict(model, [batch]).loss == pytest.approx(loss, rel=1e-5)


def test_text_classifier_agrees_with_its_own_loss():
    model, batch = tiny_distilbert(), texts(7)
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    with torch.no_grad():
        truth = model(**batch)
    items = metrics.predict(model, [batch])
    assert items.loss == pytest.approx(truth.loss.item(), rel=1e-5)
    assert items.accuracy == (truth.logits.argmax(1) == batch["labels"]).sum().item() / 7


def test_answer_accuracy_wants_every_token_right():
    next_tokens = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0], [9, 2, 3, 0], [4, 4, 4, 4]])
    logits = torch.eye(10)[next_tokens]
    labels = torch.tensor([[7, 1, 2, 3], [-100, 1, 2, 3], [-100, -100, 2, 3], [5, -100, -100, -100]])
    loader = [(logits, labels)]
    items = metrics.predict(nn.Identity(), loader, shift_labels=True)
    assert items.tokens.tolist() == [3, 3, 2, 0]  # the first label of a row is nobody's to predict
    assert items.tokens_right.tolist() == [3, 2, 2, 0]
    assert items.unlabelled == 1
    assert math.isnan(items.entropy[3])
    assert metrics.answer_accuracy(nn.Identity(), loader, shift_labels=True) == pytest.approx(2 / 3)
    assert metrics.token_accuracy(nn.Identity(), loader, shift_labels=True) == pytest.approx(7 / 8)


def test_language_entropy_is_of_the_ten_most_probable_tokens():
    generator = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(2, 4, 30, generator=generator), torch.tensor([[1, 2, 3, -100], [4, -100, -100, 5]])
    items = metrics.predict(nn.Identity(), [(logits, labels)], shift_labels=False)
    p = np.sort(torch.softmax(logits.double(), -1).numpy(), -1)
    per_token = -(p[..., -10:] * np.log(p[..., -10:])).sum(-1)
    expected = [per_token[0, :3].mean(), per_token[1, [0, 3]].mean()]
    np.testing.assert_allclose(items.entropy, expected, rtol=1e-5)
    np.testing.assert_allclose(items.confidence, [p[0, :3, -1].mean(), p[1, [0, 3], -1].mean()], rtol=1e-5)
    assert items.probabilities is None
    assert items.labels is None


def test_pieces_change_nothing(monkeypatch):
    model, loader = tiny_gpt2(), [texts()]
    whole = metrics.predict(model, loader)
    monkeypatch.setattr(predictions, "_CHUNK_BYTES", 4 * 37 * 3)
    pieces = metrics.predict(model, loader)
    np.testing.assert_allclose(pieces.entropy, whole.entropy, rtol=1e-6)
    np.testing.assert_allclose(pieces.nll, whole.nll, rtol=1e-6)
    assert pieces.tokens_right.tolist() == whole.tokens_right.tolist()


class DigitTokenizer:
    """Characters as tokens; what a transformers tokenizer does, as far as generate_text asks for it."""

    eos_token_id = 36

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(c, 36) for c in text]])}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_generated_text_is_transformers_own_greedy_search(seed):
    model = tiny_gpt2(seed).train()
    ids = DigitTokenizer()("3a7", "pt")["input_ids"]
    written = metrics.generate_text(model, DigitTokenizer(), "3a7", 12)
    assert model.training
    truth = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=36, pad_token_id=36
    )[0, 3:]
    assert written == " ".join(str(int(i)) for i in truth if i != 36)


@pytest.mark.parametrize("patched", [False, True])
def test_generation_reads_every_token_once_and_writes_what_reading_all_of_them_would(patched):
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    if patched:
        handle = rfa_fast.patch(model, targets="all", rank=2)
        for name, parameter in handle.named_parameters().items():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.3)

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))
    cached = metrics.generate_text(model, DigitTokenizer(), "3a7", 9)
    assert read == [3] + [1] * 8
    assert cached == metrics.generate_text(Forgetful(), DigitTokenizer(), "3a7", 9)
    assert read[9:] == list(range(3, 12))


def test_generation_stops_at_any_end_token_of_the_model():
    class Counts(nn.Module):
        generation_config = GPT2Config(eos_token_id=[30, 8])

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.eye(37)[input_ids + 1]

    assert metrics.generate_text(Counts(), DigitTokenizer(), "5", 20) == "6 7"
    assert metrics.generate_text(Counts(), DigitTokenizer(), "5", 1) == "6"


def test_generation_names_the_token_whose_logits_are_nan():
    class Breaks(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.eye(37)[input_ids] / (input_ids.shape[1] < 3)

    with pytest.raises(FloatingPointError, match="logits at new token 2"):
        metrics.generate_text(Breaks(), DigitTokenizer(), "5", 20)


@pytest.mark.parametrize(("prompt", "count", "message"), [("", 3, "prompt: got ''"), ("1", 0, "max_new_tokens: got 0")])
def test_generation_refuses_what_it_cannot_do(prompt, count, message):
    with pytest.raises(ValueError, match=message):
        metrics.generate_text(nn.Identity(), DigitTokenizer(), prompt, count)


def test_evaluate_split_of_texts_has_perplexity():
    model = tiny_gpt2()
    result = metrics.evaluate_split(model, {"D_f": [texts()]})
    assert result["D_f"].is_text_generation
    assert result.figures()["D_f/perplexity"] == pytest.approx(metrics.perplexity(model, [texts()]))
    assert result.figures()["D_f/token_accuracy"] == metrics.token_accuracy(model, [texts()])
