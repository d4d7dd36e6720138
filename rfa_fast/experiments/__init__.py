"""Runnable comparisons with Retrain: the demo, Fashion-MNIST, BBC News, SmolLM2.

Each is data, a model and a recipe (:class:`~rfa_fast.experiments.common.Experiment`); scenarios, rows, the
cache of trained models and the report are shared.
"""
