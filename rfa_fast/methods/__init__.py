"""Unlearning methods, the loop they share, and the record each run leaves.

One file per method; everything that has to do with data, steps, interruption and proof is common to
all of them, so that a method is its loss and little else.
"""

from __future__ import annotations

from rfa_fast.methods.base import Batch, Method, NonFiniteError, StepRecord, UnlearnInterrupted
from rfa_fast.methods.record import hash_model, read_record, verify_record
from rfa_fast.methods.retrain import TrainResult, train
from rfa_fast.methods.run import UnlearnResult
from rfa_fast.methods.unlearn import METHODS, method_settings, unlearn

__all__ = [
    "METHODS",
    "Batch",
    "Method",
    "NonFiniteError",
    "StepRecord",
    "TrainResult",
    "UnlearnInterrupted",
    "UnlearnResult",
    "hash_model",
    "method_settings",
    "read_record",
    "train",
    "unlearn",
    "verify_record",
]
