"""Membership inference: would an attacker, seeing only the outputs, say the forget set was trained on?

The attack of the paper (section V-C, after Chundawat et al., AAAI 2023): one number per item, the
entropy of its output, and a classifier trained to tell retained training items (members) from test
items (non-members). It is then asked about the forget set, and the share it calls "member" is the
figure. A well-forgotten set comes out like the retrained model's, which is not always low: an attack
that hardly beats chance on its own training items says little either way, so its accuracy there is
reported beside the share, and :func:`membership_auc` needs no threshold at all.

Language models are attacked by their loss as well (Yeom et al. 2018, arXiv 1709.01604) and by Min-K %
(:mod:`rfa_fast.metrics.min_k`): other features, the same attacker. All features are low for a member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from rfa_fast.config import check_choice
from rfa_fast.metrics.min_k import MIN_K_DEFAULT
from rfa_fast.metrics.predictions import Predictions

Classifier = Literal["logistic", "svm"]
Feature = Literal["entropy", "loss", "min_k"]
Scores: TypeAlias = Predictions | npt.NDArray[np.floating] | Sequence[float]

MAX_SAMPLES = 2000
"""Default cap per class of the attacker's training set: an SVM's cost grows with its square."""


@dataclass(frozen=True)
class MembershipAttack:
    """One attack and what it found.

    Attributes:
        forget_share: share in [0, 1] of the forget set called "member": the paper's MIA value.
        attack_accuracy: share of its own training items the attacker gets right; near 0.5 with balanced
            classes, `forget_share` means nothing.
        auc: area under the ROC curve of forget items against the non-members, all of them; 0.5 means
            indistinguishable, above it the forget set looks more like training data.
        members, nonmembers, forgotten: items used of each kind.
        classifier, feature: as asked for.
    """

    forget_share: float
    attack_accuracy: float
    auc: float
    members: int
    nonmembers: int
    forgotten: int
    classifier: Classifier
    feature: Feature


def membership_attack(
    member: Scores,
    nonmember: Scores,
    forget: Scores,
    *,
    classifier: Classifier = "logistic",
    feature: Feature = "entropy",
    seed: int = 0,
    balanced: bool = True,
    max_samples: int | None = MAX_SAMPLES,
    min_k: int = MIN_K_DEFAULT,
) -> MembershipAttack:
    """Train the attacker on members and non-members, and ask it about the forget set.

    Args:
        member: predictions for retained training items, D_r, or the feature itself `(n,)`.
        nonmember: the same for items the model never saw (D_rt; the whole test set for sample unlearning).
        forget: the same for the forget set, D_f.
        classifier: `"logistic"` regression or `"svm"` (RBF kernel), scikit-learn's defaults on the
            standardised feature.
        feature: `"entropy"` of the output, the paper's (of a text the top ten tokens'); `"loss"`, −log p of
            the true label, of a text the mean over its tokens; `"min_k"`, the same over its least likely ones.
        seed: of the subsampling, the only randomness here.
        balanced: train on equally many of both kinds, subsampling the larger; else in the proportion given.
        max_samples: at most so many of each kind in training (2,000), both thinned by one factor where they
            are to stay unequal; `None` for no limit. The forget set is never subsampled.
        min_k: the k of `"min_k"` in percent, one of :data:`~rfa_fast.metrics.min_k.MIN_K_PERCENTS`.

    Raises:
        ValueError: an empty set, an unknown option, a feature that is not finite (a text without a
            label has no entropy), or Min-K % of a classification.

    Example:
        >>> attack = membership_attack([0.1, 0.2, 0.1], [0.9, 1.0, 0.8], [0.15, 0.95, 0.85, 0.9])
        >>> attack.forget_share, attack.attack_accuracy
        (0.25, 1.0)
    """
    check_choice("classifier", classifier, get_args(Classifier))
    check_choice("feature", feature, get_args(Feature))
    _check_limit(max_samples)
    inside, outside = _feature("member", member, feature, min_k), _feature("nonmember", nonmember, feature, min_k)
    asked = _feature("forget", forget, feature, min_k)
    auc = _auc(asked, outside)

    larger = max(len(inside), len(outside))
    limit = larger if max_samples is None else min(larger, max_samples)
    if balanced:
        wanted = [min(limit, len(inside), len(outside))] * 2
    else:
        wanted = [max(1, round(len(values) * limit / larger)) for values in (inside, outside)]
    generator = np.random.default_rng(seed)
    inside, outside = _subsample(inside, wanted[0], generator), _subsample(outside, wanted[1], generator)

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    attacker = make_pipeline(StandardScaler(), LogisticRegression() if classifier == "logistic" else SVC(kernel="rbf"))
    x = np.concatenate([inside, outside])[:, None]
    is_member = np.repeat([1, 0], [len(inside), len(outside)])
    attacker.fit(x, is_member)
    return MembershipAttack(
        forget_share=float((attacker.predict(asked[:, None]) == 1).mean()),
        attack_accuracy=float((attacker.predict(x) == is_member).mean()),
        auc=auc,
        members=len(inside),
        nonmembers=len(outside),
        forgotten=len(asked),
        classifier=classifier,
        feature=feature,
    )


def membership_inference(
    member: Scores,
    nonmember: Scores,
    forget: Scores,
    *,
    classifier: Classifier = "logistic",
    feature: Feature = "entropy",
    seed: int = 0,
    balanced: bool = True,
    max_samples: int | None = MAX_SAMPLES,
    min_k: int = MIN_K_DEFAULT,
) -> float:
    """Share in [0, 1] of the forget set that :func:`membership_attack` calls "member" (Tables X and XI).

    Args and errors as there.

    Example:
        >>> membership_inference([0.1, 0.2, 0.1], [0.9, 1.0, 0.8], [0.15, 0.95, 0.85, 0.9], classifier="svm")
        0.25
    """
    return membership_attack(
        member,
        nonmember,
        forget,
        classifier=classifier,
        feature=feature,
        seed=seed,
        balanced=balanced,
        max_samples=max_samples,
        min_k=min_k,
    ).forget_share


def membership_auc(forget: Scores, test: Scores, *, feature: Feature = "entropy", min_k: int = MIN_K_DEFAULT) -> float:
    """Area under the ROC curve of "forget" against "test", a low feature counting as "member".

    0.5 means that the two sets cannot be told apart, 1 that every forget item looks more like training
    data than every test item, 0 the reverse (which gives the forget set away as surely).

    Raises:
        ValueError: an empty set, an unknown feature, a feature that is not finite.

    Example:
        >>> membership_auc([0.1, 0.5], [0.4, 0.9])
        0.75
    """
    check_choice("feature", feature, get_args(Feature))
    return _auc(_feature("forget", forget, feature, min_k), _feature("test", test, feature, min_k))


def _auc(forget: npt.NDArray[np.float64], test: npt.NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_auc_score

    is_forget = np.repeat([1, 0], [len(forget), len(test)])
    return float(roc_auc_score(is_forget, -np.concatenate([forget, test])))


def _feature(name: str, scores: Scores, feature: Feature, min_k: int) -> npt.NDArray[np.float64]:
    if isinstance(scores, Predictions):
        found = {"entropy": scores.entropy, "loss": scores.nll}.get(feature)
        values = np.asarray(scores.min_k_loss(min_k) if found is None else found, dtype=np.float64)
    else:
        values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: got shape {values.shape}, expected (n,) with n >= 1")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{name}: got {bad} of {len(values)} items whose {feature} is not finite, expected none; "
            "leave out items without a label"
        )
    return values


def _subsample(values: npt.NDArray[np.float64], limit: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    if len(values) <= limit:
        return values
    return cast("npt.NDArray[np.float64]", generator.choice(values, size=limit, replace=False))


def _check_limit(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"max_samples: got {value!r}, expected an integer >= 1 or None")
