"""What :func:`rfa_fast.unlearn` would refuse, before the commands measure anything.

A pass over the data of a large model takes hours, and `unlearn` comes after one: of the retrained model, or, on
`--resume`, of the original. So what it checks itself is asked for here as well, by the same functions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfa_fast import patch
from rfa_fast.methods import checks, hash_model, method_settings
from rfa_fast.methods.batches import BatchSource, open_source, order_digest
from rfa_fast.methods.checkpoint import STATE_FILE, RunFolder
from rfa_fast.methods.placement import parameters_of
from rfa_fast.methods.run import same_settings

_PLAIN = ("method", "epochs", "max_steps", "lr", "weight_decay", "schedule", "seed", "max_grad_norm")


def check_settings(settings: Mapping[str, Any], checkpoint_every: int | None) -> None:
    """What needs neither data nor model.

    Args:
        settings: keyword arguments of :func:`rfa_fast.unlearn`.
        checkpoint_every: as there.

    Raises:
        ValueError, TypeError: an option out of range, or one that the method does not have.

    Example:
        >>> check_settings({"method": "rfa", "lr": 1e-4}, checkpoint_every=0)
        Traceback (most recent call last):
        ...
        ValueError: checkpoint_every: got 0, expected an integer >= 1
    """
    method_settings(settings)
    checks.positive_integers(epochs=settings.get("epochs", 1), checkpoint_every=checkpoint_every)


def check_run(model: nn.Module, subsets: Mapping[str, Any], settings: Mapping[str, Any]) -> BatchSource:
    """The batches that a run would take, once its layers are found in the model, which is left as it was.

    Args:
        model: the model.
        subsets: `D_f` and `D_r`.
        settings: keyword arguments of :func:`rfa_fast.unlearn`, all that the command has.

    Raises:
        ValueError, TypeError: targets or a rank that the model cannot take, or a batch without room for both subsets.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run warns
        if settings["method"] == "rfa":
            patch(model, settings["targets"], rank=settings["rank"]).remove()
        elif settings.get("targets") is not None:
            parameters_of(model, settings["targets"])
    return open_source(
        subsets["D_f"], subsets["D_r"], batch_size=settings["batch_size"],
        forget_per_batch=settings["forget_per_batch"], collate_fn=None, pad_token_id=checks.pad_token_id(model),
        seed=settings["seed"], device=torch.device("cpu"),
    )  # fmt: skip


def refuse_other_settings(
    output: Path, model: nn.Module, source: BatchSource, settings: Mapping[str, Any], *, merge: bool
) -> None:
    """Raise unless the run in a folder, if there is one, was begun with these settings, on this model and data.

    Args:
        output: the folder.
        model: the model, as it is before.
        source: what :func:`check_run` returned.
        settings: as there.
        merge: keyword argument of :func:`rfa_fast.unlearn`.

    Raises:
        ValueError: other settings, or a state that cannot be read.
    """
    folder = RunFolder(output)
    if STATE_FILE not in folder.found():
        return
    there = {"schedule": "constant", **folder.read_state().settings}  # where it is constant, a run does not write it
    options = {name: value for name, value in method_settings(settings).items() if name != "revision"}
    here = {name: settings[name] for name in _PLAIN} | source.settings
    here |= {
        "autocast": None if settings["autocast"] is None else str(settings["autocast"]), "merge": merge,
        "options": options, "model": hash_model(model), "forget_ids": order_digest(source.forget_ids),
        "retain_ids": None if source.retain_ids is None else order_digest(source.retain_ids),
    }  # fmt: skip
    here = json.loads(json.dumps(here))
    same_settings(output, {name: there.get(name) for name in here}, here, resume="--resume", output="--output")
