"""Membership inference against thresholds worked out by hand and a scikit-learn pipeline built apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from torch import nn

from rfa_fast import metrics


def entropies(mean: float, n: int, seed: int, spread: float = 0.2) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).normal(mean, spread, n))


def items(entropy: np.ndarray, nll: np.ndarray | None = None) -> metrics.Predictions:
    n = len(entropy)
    ones = np.ones(n, dtype=np.int64)
    values = entropy.astype(np.float32)
    return metrics.Predictions(values, values, values if nll is None else nll.astype(np.float32), ones, ones)


MEMBERS, OTHERS = np.linspace(0.0, 0.2, 50), np.linspace(0.8, 1.0, 50)


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
@pytest.mark.parametrize(
    ("forget", "share"),
    [([0.05, 0.1, 0.15], 1.0), ([0.85, 0.9, 0.95], 0.0), ([0.1, 0.9, 0.91, 0.92], 0.25), ([0.1], 1.0)],
    ids=["like members", "like others", "a quarter", "one item"],
)
def test_separable_sets_leave_no_doubt(classifier, forget, share):
    attack = metrics.membership_attack(MEMBERS, OTHERS, forget, classifier=classifier)
    assert attack.forget_share == share
    assert attack.attack_accuracy == 1.0
    assert metrics.membership_inference(MEMBERS, OTHERS, forget, classifier=classifier) == share


def test_logistic_threshold_is_half_way_between_mirrored_sets():
    below, above = np.linspace(0.45, 0.499, 20), np.linspace(0.501, 0.55, 30)
    assert metrics.membership_inference(MEMBERS, OTHERS, np.concatenate([below, above])) == 20 / 50


@pytest.mark.parametrize(("classifier", "reference"), [("logistic", LogisticRegression), ("svm", SVC)])
@pytest.mark.parametrize("sizes", [(40, 40), (7, 7), (200, 90)], ids=str)
def test_equals_a_pipeline_built_apart(classifier, reference, sizes):
    member, other = entropies(0.4, sizes[0], 1), entropies(0.6, sizes[1], 2)
    forget = entropies(0.5, 333, 3)
    x = np.concatenate([member, other])
    mean, deviation = x.mean(), x.std()
    model = reference().fit(((x - mean) / deviation)[:, None], np.r_[np.ones(sizes[0]), np.zeros(sizes[1])])
    expected = model.predict(((forget - mean) / deviation)[:, None]).mean()
    attack = metrics.membership_attack(member, other, forget, classifier=classifier, balanced=False)
    assert 0.02 < expected < 0.98  # a share that a broken attack would not hit by chance
    assert attack.forget_share == pytest.approx(expected)
    assert (attack.members, attack.nonmembers, attack.forgotten) == (*sizes, 333)


def test_balance_is_the_default_and_matters():
    member, other, forget = entropies(0.4, 900, 1), entropies(0.6, 60, 2), entropies(0.5, 400, 3)
    balanced = metrics.membership_attack(member, other, forget)
    lopsided = metrics.membership_attack(member, other, forget, balanced=False)
    assert (balanced.members, balanced.nonmembers) == (60, 60)
    assert (lopsided.members, lopsided.nonmembers) == (900, 60)
    # With 15 members to 1, calling nearly everything a member is right most of the time.
    assert lopsided.forget_share > 0.9
    assert 0.3 < balanced.forget_share < 0.7


def test_cap_and_seed_govern_the_subsample():
    member, other, forget = entropies(0.4, 3000, 1), entropies(0.6, 2500, 2), entropies(0.5, 100, 3)
    capped = metrics.membership_attack(member, other, forget)
    assert (capped.members, capped.nonmembers, capped.forgotten) == (2000, 2000, 100)
    assert metrics.membership_attack(member, other, forget, max_samples=None).members == 2500
    assert metrics.membership_attack(member, other, forget, max_samples=None, balanced=False).members == 3000
    few = [metrics.membership_attack(member, other, forget, max_samples=5, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert few[0] == few[1]
    assert len({attack.forget_share for attack in few}) > 1


def test_arguments_are_not_changed():
    member, other, forget = entropies(0.4, 30, 1), entropies(0.6, 20, 2), entropies(0.5, 10, 3)
    copies = [values.copy() for values in (member, other, forget)]
    metrics.membership_attack(member, other, forget)
    for values, copy in zip((member, other, forget), copies, strict=True):
        np.testing.assert_array_equal(values, copy)


def test_feature_is_the_entropy_unless_the_loss_is_asked_for():
    low, high = np.full(20, 0.1), np.full(20, 0.9)
    member, other = items(low, nll=high), items(high, nll=low)
    forget = items(low, nll=low)
    assert metrics.membership_inference(member, other, forget) == 1.0
    assert metrics.membership_inference(member, other, forget, feature="loss") == 0.0
    assert metrics.membership_auc(forget, other) == 1.0
    assert metrics.membership_auc(forget, other, feature="loss") == 0.5


def test_auc_by_hand_and_by_sklearn():
    assert metrics.membership_auc([0.1, 0.5], [0.4, 0.9]) == 0.75  # 3 of the 4 pairs are in order
    assert metrics.membership_auc([0.5], [0.5]) == 0.5
    assert metrics.membership_auc([0.9], [0.1, 0.2]) == 0.0
    forget, test = entropies(0.45, 70, 1), entropies(0.6, 31, 2)
    expected = roc_auc_score(np.r_[np.ones(70), np.zeros(31)], np.r_[-forget, -test])
    assert metrics.membership_auc(forget, test) == pytest.approx(expected)
    assert metrics.membership_attack(entropies(0.4, 50, 3), test, forget).auc == pytest.approx(expected)


def test_from_a_model_to_the_attack():
    """Scaled one-hot inputs: sure about members, unsure about the rest, the forget set in between by thirds."""

    def loader(scales: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.tensor(scales)[:, None] * torch.eye(3)[0], torch.zeros(len(scales), dtype=torch.long))]

    subsets = {"D_r": loader([6.0, 7, 8, 6.5]), "D_f": loader([7.0, 0.1, 0.2]), "D_t": loader([0.1, 0.2, 0.3, 0.15])}
    result = metrics.evaluate_split(nn.Identity(), subsets)
    for classifier in ("logistic", "svm"):
        assert result.membership(classifier=classifier).forget_share == pytest.approx(1 / 3)
    assert result.membership(nonmember="D_t", forget="D_r").forget_share == 1.0
    both = metrics.evaluate_split(nn.Identity(), {**subsets, "D_rt": loader([0.5, 0.5, 0.4])})
    assert both.membership().nonmembers == 3
    with pytest.raises(ValueError, match="got subsets D_r, D_f, D_t, expected D_ft among them"):
        result.membership(forget="D_ft")


BAD = {
    "classifier": ({"classifier": "forest"}, "classifier: got 'forest', expected one of 'logistic', 'svm'"),
    "feature": ({"feature": "margin"}, "feature: got 'margin', expected one of 'entropy', 'loss'"),
    "cap": ({"max_samples": 0}, "max_samples: got 0, expected an integer >= 1 or None"),
    "cap kind": ({"max_samples": 2.5}, "max_samples: got 2.5"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.membership_inference(MEMBERS, OTHERS, [0.5], **options)


def test_sets_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match=r"forget: got shape \(0,\)"):
        metrics.membership_inference(MEMBERS, OTHERS, [])
    with pytest.raises(ValueError, match=r"member: got shape \(50, 1\)"):
        metrics.membership_inference(MEMBERS[:, None], OTHERS, [0.5])
    with pytest.raises(ValueError, match="nonmember: got 1 of 2 items whose entropy is not finite"):
        metrics.membership_inference(MEMBERS, [0.1, math.nan], [0.5])
    with pytest.raises(ValueError, match="test: got 1 of 1 items whose loss is not finite"):
        metrics.membership_auc([0.5], [math.inf], feature="loss")
    with pytest.raises(ValueError, match="feature: got 'margin'"):
        metrics.membership_auc([0.5], [0.1], feature="margin")
