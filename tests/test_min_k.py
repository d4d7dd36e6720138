"""Min-K % and loss-based attacks on language models, against a plain loop and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rfa_fast import metrics
from rfa_fast.metrics import predictions
from rfa_fast.metrics.min_k import MIN_K_PERCENTS, least_likely


def by_loop(values: list[float], percent: int) -> float:
    """The definition, one text at a time."""
    kept = max(1, len(values) * percent // 100)
    return sum(sorted(values)[-kept:]) / kept


@pytest.mark.parametrize("lengths", [(1,), (20, 5, 4), (7, 0, 30, 1)], ids=str)
def test_equals_the_definition_text_by_text(lengths):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    nll, item = torch.cat(texts), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mixed = torch.randperm(len(nll), generator=generator)  # the rows of a text need not lie together
    found = least_likely(nll[mixed], item[mixed], len(lengths), (1, 20, 50, 100))
    for row, text in zip(found, texts, strict=True):
        expected = [by_loop(text.tolist(), percent) if len(text) else math.nan for percent in (1, 20, 50, 100)]
        np.testing.assert_allclose(row, expected, rtol=1e-12)


def test_every_token_is_one_hundred_percent_and_ties_count_once():
    assert least_likely(
        torch.tensor([2.0, 2.0, 2.0, 1.0]), torch.zeros(4, dtype=torch.long), 1, (50, 100)
    ).tolist() == [[2.0, 1.75]]


def test_of_a_model_over_batches_with_padding():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=24, n_embd=16, n_layer=1, n_head=2)).eval()
    ids, real = torch.randint(0, 37, (5, 21)), torch.tensor([21, 13, 2, 21, 6])
    mask = (torch.arange(21) < real[:, None]).long()
    loader = [{"input_ids": ids[r], "attention_mask": mask[r], "labels": ids[r]} for r in (slice(0, 2), slice(2, 5))]
    with torch.no_grad():
        log_p = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    nll = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    found = metrics.predict(model, loader)
    assert found.min_k.dtype == np.float32
    assert found.min_k.shape == (5, len(MIN_K_PERCENTS))
    for percent in MIN_K_PERCENTS:
        expected = [by_loop(row[: n - 1].tolist(), percent) for row, n in zip(nll, real.tolist(), strict=True)]
        np.testing.assert_allclose(found.min_k_loss(percent), expected, rtol=1e-4)
    np.testing.assert_array_equal(found.min_k_loss(), found.min_k_loss(20))


def test_nothing_per_token_is_kept(monkeypatch):
    logits, labels = torch.randn(3, 50, 8), torch.randint(0, 8, (3, 50))
    whole = metrics.predict(nn.Identity(), [(logits, labels)], shift_labels=False)
    assert all(value.shape[0] == 3 and value.size <= 3 * 4 for value in vars(whole).values() if value is not None)
    monkeypatch.setattr(predictions, "_CHUNK_BYTES", 4 * 8 * 7)
    pieces = metrics.predict(nn.Identity(), [(logits, labels)], shift_labels=False)
    np.testing.assert_allclose(pieces.min_k, whole.min_k, rtol=1e-6)


def texts(nll: np.ndarray, hardest: np.ndarray) -> metrics.Predictions:
    """Texts whose entropies say nothing."""
    n = len(nll)
    flat, ones = np.full(n, 0.5, np.float32), np.ones(n, np.int64)
    min_k = np.stack([hardest + i for i in range(len(MIN_K_PERCENTS))], 1).astype(np.float32)
    return metrics.Predictions(flat, flat, nll.astype(np.float32), ones, ones, min_k=min_k)


def drawn(mean: float, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.3, n)


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
@pytest.mark.parametrize("feature", ["loss", "min_k"])
@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "unbalanced"])
def test_attacks_equal_a_pipeline_built_apart(classifier, feature, balanced):
    sizes = (60, 60) if balanced else (60, 25)
    sets = [texts(drawn(m, n, s), drawn(m + 2, n, s + 9)) for m, n, s in zip((1.0, 1.4), sizes, (1, 2), strict=True)]
    asked = texts(drawn(1.2, 200, 3), drawn(3.2, 200, 4))
    member, other, forget = (np.float64(p.nll if feature == "loss" else p.min_k[:, 2]) for p in (*sets, asked))
    x = np.concatenate([member, other])
    reference = (LogisticRegression() if classifier == "logistic" else SVC()).fit(
        ((x - x.mean()) / x.std())[:, None], np.r_[np.ones(sizes[0]), np.zeros(sizes[1])]
    )
    expected = reference.predict(((forget - x.mean()) / x.std())[:, None]).mean()
    attack = metrics.membership_attack(*sets, asked, classifier=classifier, feature=feature, balanced=balanced)
    assert 0.02 < expected < 0.98
    assert attack.forget_share == pytest.approx(expected)
    area = roc_auc_score(np.r_[np.ones(200), np.zeros(sizes[1])], -np.r_[forget, other])
    assert attack.auc == pytest.approx(area)
    assert metrics.membership_auc(asked, sets[1], feature=feature) == pytest.approx(area)


def test_the_percentage_can_be_chosen():
    low, high = np.zeros(10), np.ones(10)
    a, b = texts(low, low), texts(high, high)
    assert metrics.membership_auc(a, b, feature="min_k", min_k=5) == 1.0
    assert metrics.membership_inference(a, b, b, feature="min_k", min_k=40) == 0.0
    with pytest.raises(ValueError, match="min_k: got 30, expected one of 5, 10, 20, 40"):
        metrics.membership_auc(a, b, feature="min_k", min_k=30)


def test_a_classification_has_none():
    items = metrics.predict(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match="min_k: got one label per item"):
        metrics.membership_auc(items, items, feature="min_k")


def test_unequal_sets_are_thinned_in_proportion():
    attack = metrics.membership_attack(drawn(1.0, 900, 1), drawn(1.4, 300, 2), [1.0], balanced=False, max_samples=90)
    assert (attack.members, attack.nonmembers) == (90, 30)
