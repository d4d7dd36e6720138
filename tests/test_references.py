"""Figures that need a second model, from the one pass of `evaluate_split`, against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rfa_fast import metrics


class Fixed(nn.Module):
    """Ignores its inputs: entry i gets row i of the given probabilities; counts its calls."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.logits, self.inner, self.calls = torch.tensor(probabilities).log(), nn.Identity(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(self.logits[x.long()])


def entries(*batches: list[int], labels: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor(batch), torch.full((len(batch),), labels)) for batch in batches]


A = [[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]]
B = [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]
S = (2.0, 0.0, 2 * 0.3**2)  # squared distances of the rows


def entropy_bits(*p: float) -> float:
    return -sum(value * math.log2(value) for value in p if value)


def test_zrf_by_hand():
    js = [1.0, 0.0, entropy_bits(0.35, 0.65) - (entropy_bits(0.2, 0.8) + 1) / 2]
    for batches in ([[0, 1, 2]], [[0], [1, 2]]):
        found = metrics.zero_retrain_forgetting(Fixed(A), Fixed(B), entries(*batches))
        assert found == pytest.approx(1 - sum(js) / 3, rel=1e-6)
    assert metrics.zero_retrain_forgetting(Fixed(A), Fixed(A), entries([0, 1, 2])) == 1.0
    assert metrics.zero_retrain_forgetting(Fixed(A), Fixed(B), entries([0])) == pytest.approx(0.0, abs=1e-6)


# Tokens 0 and 2 in text 0, tokens 1, 1 and 2 in text 1.
TEXTS = [(torch.tensor([[0, 2, 0], [1, 1, 2]]), torch.tensor([[0, 0, -100], [0, 0, 0]]))]
R = [math.sqrt(s) for s in S]


@pytest.mark.parametrize(
    ("tokens", "plain", "squared"),
    [
        ("mean", (R[0] + 2 * R[2]) / 5, (S[0] + 2 * S[2]) / 5),
        ("text", ((R[0] + R[2]) / 2 + R[2] / 3) / 2, ((S[0] + S[2]) / 2 + S[2] / 3) / 2),
        ("sum", (R[0] + R[2] + R[2]) / 2, (S[0] + 2 * S[2]) / 2),
        ("norm", (math.sqrt(S[0] + S[2]) + R[2]) / 2, (S[0] + 2 * S[2]) / 2),
    ],
)
def test_token_reductions_by_hand(tokens, plain, squared):
    options = {"tokens": tokens, "shift_labels": False}
    assert metrics.activation_distance(Fixed(A), Fixed(B), TEXTS, **options) == pytest.approx(plain, rel=1e-6)
    assert metrics.activation_distance(Fixed(A), Fixed(B), TEXTS, True, **options) == pytest.approx(squared, rel=1e-6)
    # A text that has no label is in no mean over texts.
    nothing = (TEXTS[0][0][:1], torch.full((1, 3), -100))
    assert metrics.activation_distance(Fixed(A), Fixed(B), [*TEXTS, nothing], **options) == pytest.approx(plain)
    whole = metrics.activation_distance(Fixed(A), Fixed(B), entries([0, 1], [2]), tokens=tokens)
    assert whole == pytest.approx(sum(R) / 3, rel=1e-6)


def test_zrf_of_texts_is_over_tokens():
    js = entropy_bits(0.35, 0.65) - (entropy_bits(0.2, 0.8) + 1) / 2
    found = metrics.zero_retrain_forgetting(Fixed(A), Fixed(B), TEXTS, shift_labels=False)
    assert found == pytest.approx(1 - (1 + 2 * js) / 5, rel=1e-6)


def test_absolute_feature_distance_leaves_padding_out():
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.tokens, self.rows, self.pooled = nn.Identity(), nn.Identity(), nn.Identity()
            self.scale = scale

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            self.rows(self.tokens(self.scale * x).flatten(0, 1))
            return self.pooled(self.scale * x.sum(1))

    x = torch.tensor([[[1.0, -3.0], [5.0, 5.0]], [[2.0, 2.0], [-4.0, 0.0]]])
    batch = {"x": x, "attention_mask": torch.tensor([[1, 0], [1, 1]]), "labels": torch.tensor([0, 1])}
    found = metrics.feature_distance(Scaled(1.0), Scaled(2.0), [batch], ["tokens", "rows", "pooled"], norm="abs")
    assert found == pytest.approx({"tokens": (2 + 2) / 2, "rows": (2 + 2) / 2, "pooled": (4 + 2) / 2})
    with pytest.raises(ValueError, match="norm: got 'l1', expected one of 'l2', 'abs'"):
        metrics.feature_distance(Scaled(1.0), Scaled(2.0), [batch], ["rows"], norm="l1")


def test_one_pass_feeds_every_figure():
    model, retrained, original, untrained = Fixed(A), Fixed(B), Fixed([[0.5, 0.5]] * 3), Fixed([[0.9, 0.1]] * 3)
    subsets = {"D_r": entries([0, 1], [2]), "D_f": entries([2, 0])}
    references = metrics.References(retrained, original=original, incompetent=untrained, layers=["inner"], norm="abs")
    for each in (model, retrained, original, untrained):
        each.train()
        each.logits = each.logits.clamp(min=-20)  # features are the logits here: finite ones
    result = metrics.evaluate_split(model, subsets, references=references)
    assert (model.calls, retrained.calls, original.calls, untrained.calls) == (3, 3, 3, 1)
    assert all(each.training and not each.inner._forward_hooks for each in (model, retrained, original, untrained))
    plain = metrics.evaluate_split(model, subsets)
    for name, loader in subsets.items():
        found, figures = result[name].distances, result[name].figures()
        assert figures | plain[name].figures() == figures
        assert found.activation == pytest.approx(metrics.activation_distance(model, retrained, loader))
        assert found.activation_squared == pytest.approx(metrics.activation_distance(model, retrained, loader, True))
        for other, by_layer, key in (
            (original, found.to_original, "feature_distance_1"),
            (retrained, found.to_retrained, "feature_distance_2"),
        ):
            assert by_layer == metrics.feature_distance(model, other, loader, ["inner"], norm="abs")
            assert figures[key] == sum(by_layer.values())
    assert result["D_r"].distances.zrf is None
    expected = metrics.zero_retrain_forgetting(model, untrained, subsets["D_f"])
    assert result["D_f"].figures()["zrf"] == pytest.approx(expected)
    assert result.figures()["D_f/activation_distance"] == pytest.approx((R[0] + R[2]) / 2, rel=1e-6)


def test_a_reference_that_is_the_model_itself_is_not_run_again():
    model = Fixed([[0.5, 0.5], [0.25, 0.75]])
    result = metrics.evaluate_split(
        model, {"D_f": entries([0], [1])}, references=metrics.References(model, original=model, layers=["inner"])
    )
    assert model.calls == 2
    figures = result["D_f"].figures()
    assert figures["activation_distance"] == figures["feature_distance_1"] == figures["feature_distance_2"] == 0.0


def test_earlier_predictions_stand_in_for_the_retrained_model():
    model, retrained = Fixed(A), Fixed(B)
    subsets = {"D_r": entries([0, 1], [2]), "D_f": entries([2, 0])}
    before = metrics.evaluate_split(retrained, subsets)
    known = {name: item.predictions for name, item in before.items()}
    run = metrics.evaluate_split(model, subsets, references=metrics.References(retrained))
    retrained.calls = 0
    references = metrics.References(retrained, retrained_predictions={"D_r": known["D_r"]})
    read = metrics.evaluate_split(model, subsets, references=references)
    assert retrained.calls == 1  # D_f
    assert read.figures() == pytest.approx(run.figures())
    without = metrics.evaluate_split(model, subsets, references=metrics.References(retrained_predictions=known))
    assert without.figures() == pytest.approx(run.figures())
    other = metrics.References(retrained_predictions={"D_r": known["D_f"]})
    with pytest.raises(ValueError, match=r"^D_r: retrained_predictions: got \(2, 2\) probabilities or other labels"):
        metrics.evaluate_split(model, subsets, references=other)
    relabelled = {"D_f": entries([2, 0], labels=1)}
    with pytest.raises(ValueError, match="of the same items in the same order"):
        metrics.evaluate_split(model, relabelled, references=metrics.References(retrained_predictions=known))


def test_kept_outputs_spare_the_references_their_forward_for_the_next_model():
    retrained, original, untrained = Fixed(B), Fixed([[0.5, 0.5]] * 3), Fixed([[0.9, 0.1]] * 3)
    others = (retrained, original, untrained)
    text = (torch.tensor([[2, 0]]), torch.tensor([[0, 0]]))
    subsets = {"D_r": entries([0, 1], [2]), "D_f": [*TEXTS, text]}
    kept = metrics.KeptOutputs()

    def figures(model: Fixed, kept: metrics.KeptOutputs | None) -> tuple[dict[str, float], list[int]]:
        for each in (model, *others):
            each.logits, each.calls = each.logits.clamp(min=-20), 0
        references = metrics.References(
            retrained, original=original, incompetent=untrained, layers=["inner"], feature_items=2, kept=kept
        )
        found = metrics.evaluate_split(model, subsets, references=references, shift_labels=False).figures()
        return found, [each.calls for each in others]

    first = figures(Fixed(A), kept)
    # Features are of the first two items of a subset; ZRF of D_f alone.
    assert first == (figures(Fixed(A), None)[0], [4, 2, 2])
    second = Fixed([[0.3, 0.7], [0.6, 0.4], [0.1, 0.9]])
    assert figures(second, kept) == (figures(second, None)[0], [0, 0, 0])
    # Logits, of images (2, 2) and (1, 2), of tokens (5, 2) and (2, 2); features of each subset's first batch.
    rows, features = 8 * (2 + 1 + 5 + 2) + 8 * (5 + 2), 2 * (8 * 2 + 8 * 6)
    assert kept.nbytes == rows + features


def test_what_does_not_fit_is_run_again_and_a_reference_that_is_measured_is_kept_from_its_own_pass():
    retrained, subsets = Fixed(B), {"D_f": entries([0, 1], [2])}
    small = metrics.KeptOutputs(budget=16)
    for calls in (2, 1, 1):
        retrained.calls = 0
        found = metrics.evaluate_split(Fixed(A), subsets, references=metrics.References(retrained, kept=small))
        assert found["D_f"].distances.activation == pytest.approx(sum(R) / 3, rel=1e-6)
        assert (retrained.calls, small.nbytes) == (calls, 16)
    kept = metrics.KeptOutputs()
    for model, calls in ((retrained, 2), (Fixed(A), 0)):
        retrained.calls = 0
        metrics.evaluate_split(model, subsets, references=metrics.References(retrained, kept=kept))
        assert retrained.calls == calls
    # Other labels, and other items with the same ones, as a shuffled class has.
    for other in (entries([0, 1], [2], labels=1), entries([1, 0], [2])):
        with pytest.raises(ValueError, match=r"^D_f: kept: got other items in batch 0, expected the same"):
            metrics.evaluate_split(Fixed(A), {"D_f": other}, references=metrics.References(retrained, kept=kept))
    with pytest.raises(ValueError, match="budget: got -1, expected 0 bytes or more"):
        metrics.KeptOutputs(-1)


def test_features_of_the_first_items_only():
    model, original = Fixed([[0.5, 0.5]] * 3), Fixed([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]])
    references = metrics.References(original=original, layers=["inner"], feature_items=2)
    loader = entries([0], [1], [2])
    found = metrics.evaluate_split(model, {"D_r": loader}, references=references)["D_r"].distances
    assert original.calls == 2
    assert found.to_original == metrics.feature_distance(model, original, loader[:2], ["inner"])
    assert found.activation is None


def test_texts_of_a_language_model():
    def tiny(seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=24, n_embd=16, n_layer=1, n_head=2)).eval()

    model, retrained, untrained = tiny(0), tiny(1), tiny(2)
    ids = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 4, 2])[:, None]).long()
    loader = [{"input_ids": ids, "attention_mask": mask, "labels": ids}]
    layers = ["transformer.h.0.mlp"]
    references = metrics.References(retrained, incompetent=untrained, layers=layers, tokens="sum")
    found = metrics.evaluate_split(model, {"D_f": loader}, references=references)["D_f"]
    expected = metrics.activation_distance(model, retrained, loader, tokens="sum")
    assert found.figures()["activation_distance"] == pytest.approx(expected)
    assert found.distances.to_retrained == metrics.feature_distance(model, retrained, loader, layers)
    with torch.no_grad():
        p, q = (m(input_ids=ids, attention_mask=mask).logits[:, :-1].double().softmax(-1) for m in (model, untrained))
    m = (p + q) / 2
    js = ((p * (p / m).log2()).sum(-1) + (q * (q / m).log2()).sum(-1)) / 2
    assert found.distances.zrf == pytest.approx(1 - js[mask[:, 1:] == 1].mean().item(), rel=1e-4)
    np.testing.assert_array_equal(found.predictions.nll, metrics.predict(model, loader).nll)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (metrics.References(Fixed(A), layers=["iner"]), r"got 'iner', expected a module of model .*'inner'"),
        (metrics.References(nn.Sequential(Fixed(A)), layers=["inner"]), "expected a module of retrained"),
        (metrics.References(Fixed([[0.2, 0.3, 0.5]] * 3)), "D_f: model_b: got 3 outputs, expected 2"),
    ],
    ids=["no such layer", "not in the reference", "outputs"],
)
def test_references_that_do_not_fit(references, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate_split(Fixed(A), {"D_f": entries([0])}, references=references)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "max"}, "tokens: got 'max', expected one of 'mean', 'text', 'sum', 'norm'"),
        ({"norm": "l1"}, "norm: got 'l1'"),
        ({"feature_items": 0}, "feature_items: got 0, expected an integer >= 1 or None"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.References(**options)
