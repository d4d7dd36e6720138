"""How well it forgot, how well it remembers, and what that cost (sections V-A5 and V-C of the paper).

Everything here reads a model and leaves it as it was. :func:`evaluate_split` is the usual way in;
the other functions give one figure each.
"""

from __future__ import annotations

from rfa_fast.metrics.accuracy import accuracy, per_class_accuracy
from rfa_fast.metrics.cost import Cost, measure
from rfa_fast.metrics.distance import activation_distance, feature_distance
from rfa_fast.metrics.evaluate import SplitResult, SubsetResult, evaluate_split
from rfa_fast.metrics.forecast import Forecast, forecast_step
from rfa_fast.metrics.language import answer_accuracy, generate_text, perplexity, token_accuracy
from rfa_fast.metrics.live_storage import LiveStorage, Storage, live_storage
from rfa_fast.metrics.membership import MembershipAttack, membership_attack, membership_auc, membership_inference
from rfa_fast.metrics.predictions import Predictions, predict

__all__ = [
    "Cost",
    "Forecast",
    "LiveStorage",
    "MembershipAttack",
    "Predictions",
    "SplitResult",
    "Storage",
    "SubsetResult",
    "accuracy",
    "activation_distance",
    "answer_accuracy",
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
    "token_accuracy",
]
