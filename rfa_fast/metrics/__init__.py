"""How well it forgot, how well it remembers, and what that cost (sections V-A5 and V-C of the paper).

Everything here reads a model and leaves it as it was. :func:`evaluate_split` is the usual way in;
the other functions give one figure each.
"""

from __future__ import annotations

from rfa_fast.metrics.accuracy import accuracy, per_class_accuracy
from rfa_fast.metrics.cost import Cost, measure
from rfa_fast.metrics.distance import activation_distance, feature_distance, zero_retrain_forgetting
from rfa_fast.metrics.evaluate import SplitResult, SubsetResult, evaluate_split
from rfa_fast.metrics.forecast import Forecast, forecast_step
from rfa_fast.metrics.kept import KeptOutputs
from rfa_fast.metrics.language import answer_accuracy, generate_text, perplexity, token_accuracy
from rfa_fast.metrics.live_storage import LiveStorage, Storage, live_storage
from rfa_fast.metrics.membership import MembershipAttack, membership_attack, membership_auc, membership_inference
from rfa_fast.metrics.min_k import MIN_K_DEFAULT, MIN_K_PERCENTS
from rfa_fast.metrics.predictions import Predictions, predict
from rfa_fast.metrics.references import Distances, References
from rfa_fast.metrics.registry import METRICS, Metric, check_metrics, read_metrics

__all__ = [
    "METRICS",
    "MIN_K_DEFAULT",
    "MIN_K_PERCENTS",
    "Cost",
    "Distances",
    "Forecast",
    "KeptOutputs",
    "LiveStorage",
    "MembershipAttack",
    "Metric",
    "Predictions",
    "References",
    "SplitResult",
    "Storage",
    "SubsetResult",
    "accuracy",
    "activation_distance",
    "answer_accuracy",
    "check_metrics",
    "evaluate_split",
    "feature_distance",
    "forecast_step",
    "generate_text",
    "live_storage",
    "measure",
    "membership_attack",
    "membership_auc",
    "membership_inference",
    "per_class_accuracy",
    "perplexity",
    "predict",
    "read_metrics",
    "token_accuracy",
    "zero_retrain_forgetting",
]
