"""Metrics by name: what is known, what is refused, and that each name reads the figure it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rfa_fast import metrics


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def subsets(per_token: bool) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def loader(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = (n, 6) if per_token else (n,)
        inputs = torch.randn(*shape, 4, generator=generator)
        return [(inputs, torch.randint(0, 3, shape, generator=generator))]

    return {name: loader(n) for name, n in (("D_r", 40), ("D_f", 9), ("D_rt", 25), ("D_ft", 8))}


def measured(per_token: bool) -> metrics.SplitResult:
    references = metrics.References(Net(1), original=Net(2), incompetent=Net(3), layers=["body", "head"])
    return metrics.evaluate_split(Net(0), subsets(per_token), references=references)


@pytest.mark.parametrize("kind", ["classification", "language"])
def test_every_metric_can_be_read(kind):
    result, cost = measured(kind == "language"), metrics.Cost(3.5, 7 << 20)
    names = [name for name, metric in metrics.METRICS.items() if kind in metric.kinds]
    found = metrics.read_metrics(result, names, cost=cost)
    assert all(np.isfinite(value) for value in found.values())
    assert {key.rpartition("/")[2] for key in found} == set(names)
    assert found["D_rt/accuracy"] == result["D_rt"].accuracy
    assert found["D_ft/feature_distance_2"] == sum(result["D_ft"].distances.to_retrained.values())
    assert "D_r/zrf" not in found
    assert (found["seconds"], found["peak_mib"]) == (3.5, 7.0)
    sets = [result[name].predictions for name in ("D_r", "D_rt", "D_f")]
    attacks = {
        "mia_svm": {"classifier": "svm"},
        "mia_logistic": {"classifier": "logistic"},
        "mia_svm_unbalanced": {"classifier": "svm", "balanced": False},
        "mia_logistic_unbalanced": {"balanced": False},
        "mia_loss": {"feature": "loss"},
        "mia_min_k": {"feature": "min_k"},
    }
    for name, options in attacks.items():
        if name in names:
            assert found[name] == metrics.membership_inference(*sets, **options), name
    forget, test = (result[name].predictions for name in ("D_f", "D_ft"))
    for name, feature in (("mia_auc", "entropy"), ("mia_loss_auc", "loss"), ("mia_min_k_auc", "min_k")):
        if name in names:
            assert found[name] == metrics.membership_auc(forget, test, feature=feature), name
    assert ("perplexity" in names, "mia_min_k" in names) == ((kind == "language"),) * 2


def test_unseen_items_of_the_same_kind_are_the_ones_to_be_told_from():
    result = measured(False)
    by_name = {name: item.predictions for name, item in result.items()}
    without = metrics.SplitResult({name: item for name, item in result.items() if name != "D_ft"})
    assert result.auc(test="D_rt") == without.auc() == metrics.membership_auc(by_name["D_f"], by_name["D_rt"])
    with pytest.raises(ValueError, match="auc: got subsets D_r, D_f, D_rt, expected D_ft among them"):
        without.auc(test="D_ft")


def test_unknown_metrics_are_refused_with_the_list():
    with pytest.raises(ValueError, match="got 'acuracy', expected some of accuracy, token_accuracy, perplexity"):
        metrics.check_metrics(["loss", "acuracy"])
    with pytest.raises(TypeError, match=r"got the string 'loss'.*\['loss'\]"):
        metrics.check_metrics("loss")
    with pytest.raises(ValueError, match="got 'perplexity' for a classification task"):
        metrics.check_metrics(["perplexity"], kind="classification")
    with pytest.raises(ValueError, match="got 'feature_distance_1' without original and layers"):
        metrics.check_metrics(["feature_distance_1"], available=["retrained", "test"])
    assert metrics.check_metrics(["zrf", "loss", "zrf"], available=["incompetent"]) == ["zrf", "loss"]


def test_figures_that_were_not_measured_are_missed():
    result = metrics.evaluate_split(Net(0), {"D_f": subsets(False)["D_f"]})
    for name, message in (
        ("activation_distance", "got 'activation_distance' of a split measured without it, expected references with r"),
        ("perplexity", "expected labels of the other kind"),
        ("seconds", "got 'seconds' without the cost of the run"),
        ("mia_svm", "membership: got subsets D_f, expected D_r among them"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.read_metrics(result, [name])


def test_descriptions_are_short_and_names_cannot_be_changed():
    assert all(0 < len(metric.description) < 80 for metric in metrics.METRICS.values())
    with pytest.raises(TypeError):
        metrics.METRICS["accuracy"] = metrics.METRICS["loss"]
