"""`unlearn()`: from a model, what to forget and what to keep, to a model that has forgotten, and its record.

A transaction as far as one is possible. Everything that can be checked is checked before the model
is touched; a run that fails or is interrupted has its state in `output_dir` and the model back as it
was, or, without a folder and after Ctrl-C or a NaN, its adapters still on the model and in the
error. What a merge has put into the model stays there, should the `evaluate` after it fail; the error
says so. What it costs is a hash of the weights before and after, a second per few gigabytes.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import nn

from rfa_fast.config import check_choice
from rfa_fast.data.sampler import PerBatch
from rfa_fast.methods import checks
from rfa_fast.methods.badt import BadT
from rfa_fast.methods.base import Method, StepRecord
from rfa_fast.methods.batches import Collate, open_source, order_digest
from rfa_fast.methods.checkpoint import RunFolder
from rfa_fast.methods.finetune import Finetune
from rfa_fast.methods.from_scratch import Retrain
from rfa_fast.methods.graddiff import GradDiff
from rfa_fast.methods.loop import LoopOptions, Save
from rfa_fast.methods.neggrad import NegGrad
from rfa_fast.methods.npo import NPO
from rfa_fast.methods.rfa import RFAMethod
from rfa_fast.methods.rmu import RMU
from rfa_fast.methods.run import Run, UnlearnResult, earlier_run
from rfa_fast.methods.salun import SalUn
from rfa_fast.methods.schedule import Schedule, check_schedule, learning_rates, steps_in_all
from rfa_fast.methods.scrub import SCRUB
from rfa_fast.methods.seeding import isolated_generators
from rfa_fast.methods.simnpo import SimNPO

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        RFAMethod, Retrain, NegGrad, Finetune, BadT, SCRUB, SalUn, GradDiff, NPO, SimNPO, RMU,
    )
}  # fmt: skip
"""The methods that `unlearn(method=…)` knows."""

Evaluate = Callable[[nn.Module], Mapping[str, float]]
Until = Callable[[Mapping[str, float]], bool]


def _kind(method: str) -> type[Method]:
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    return METHODS[method]


def method_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's own settings among the keyword arguments of a call of :func:`unlearn`, its defaults filled in.

    Args:
        options: `method`, options of the loop such as `lr`, and those of the method.

    Returns:
        JSON-safe values; `revision` besides where the method once computed something else by the same options.

    Raises:
        ValueError, TypeError: an option or value that :func:`unlearn` would refuse.

    Example:
        >>> method_settings({"method": "simnpo", "lr": 1e-4})["revision"], method_settings({"rank": 2})["alpha"]
        (1, 32)
    """
    loop = {name: p.default for name, p in inspect.signature(unlearn).parameters.items() if p.kind is p.KEYWORD_ONLY}
    given = {**loop, **options}
    checks.positive_integers(**{name: given[name] for name in ("epochs", "batch_size", "max_steps")})
    checks.numbers(**{name: given[name] for name in ("lr", "weight_decay", "max_grad_norm", "seed")})
    checks.autocast_dtype(given["autocast"])
    check_schedule(given["schedule"])
    kind = _kind(given["method"])
    found = kind.settings({name: value for name, value in options.items() if name not in loop})
    return found if kind.revision == 0 else {**found, "revision": kind.revision}


def unlearn(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    method: str = "rfa",
    epochs: int = 1,
    batch_size: int | None = None,
    lr: float = 5e-5,
    weight_decay: float = 0.01,
    schedule: Schedule = "constant",
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save: Save = "all",
    forget_per_batch: PerBatch = "auto",
    collate_fn: Collate | None = None,
    max_steps: int | None = None,
    max_grad_norm: float | None = None,
    checkpoint_every: int | None = None,
    evaluate: Evaluate | None = None,
    until: Until | None = None,
    until_every: int | None = None,
    callbacks: Iterable[Callable[[StepRecord], object]] = (),
    progress: bool = True,
    autocast: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    merge: bool | torch.dtype = True,
    **options: Any,
) -> UnlearnResult:
    """Make a trained model forget some of its samples, and keep what it knows about the others.

    The defaults are the paper's (section V-A): AdamW with lr 5e-5 and no warm-up, rank 8, alpha 32, one epoch,
    128 images or 32 texts per batch.

    Args:
        model: the trained model; changed in place.
        forget: the samples to forget: a map-style dataset of `(input, label)` or of dicts with
            `labels`, or a DataLoader of such batches. Names of the samples are taken from its
            attribute `ids`, else from the indices of a `Subset`, else they are positions.
        retain: the samples to keep, of the same kind as `forget`. Of two loaders each step takes a batch
            of both; the epoch ends with the retain loader.
        method: one of :data:`METHODS`: `"rfa"` trains adapters; `"retrain"`, `"neggrad"`, `"finetune"`, `"badt"`,
            `"scrub"`, `"salun"`, and for language models `"graddiff"`, `"npo"`, `"simnpo"` and `"rmu"`, the weights
            themselves.
        epochs: passes over `retain` (`"scrub"` makes one over `forget` before the first).
        batch_size: samples per batch, retained and forget together; 128, for text 32.
        lr, weight_decay: of AdamW.
        schedule: the rate stays `"constant"`, or falls to 0 at the end of the last epoch, or of `max_steps` where
            that comes first, linearly or as a cosine (`"linear"`, `"cosine"`). `until` may end the run before.
            A loader without length needs `max_steps` for it.
        seed: of adapters, order, augmentation and dropout. Two runs with one seed end bit-equal on a
            CPU; the caller's random generators are left as they were.
        output_dir: folder for checkpoints, history, adapter and deletion record.
        resume: go on with the run in `output_dir`; the end is bit-equal to that of an uninterrupted run. A
            folder without a run starts one, and says so.
        save: `"checkpoints"` writes only what a run needs to be resumed, the first of it after a minute or
            `checkpoint_every` steps and nothing at the end: for a run whose result the caller keeps.
        forget_per_batch: see :class:`rfa_fast.data.ForgetRetainBatchSampler`.
        collate_fn: makes a batch of items; by default tensors are stacked and texts padded.
        max_steps: stop after that many steps in all.
        max_grad_norm: clip the gradient to this norm.
        checkpoint_every: steps between checkpoints; by default about a minute lies between two.
        evaluate: `evaluate(model)` gives named figures; called before and after, and for `until`.
        until: `until(figures)` true ends the run; asked every `until_every` steps.
        until_every: by default a tenth of the run.
        callbacks: each is called with every step's record.
        progress: show loss, rate and remaining time on standard error.
        autocast: `torch.bfloat16`, or its name, computes in it where autocast does.
        device: move the model there first.
        merge: fold the result into the weights; a dtype casts the model to it first, because rounding into
            bf16 can undo the forgetting. `False`: the adapters stay live in `result.rfa` (which for a method
            without adapters is its :class:`Method`, whose `remove()` puts the weights back).
        **options: of the method; for RFA those of :func:`rfa_fast.patch`, with `targets="all"`; for the others
            `METHODS[method].settings({})` shows them with their defaults.

    Returns:
        The model, the history and the deletion record.

    Raises:
        ValueError, TypeError: something given is wrong; the model is as before.
        FileExistsError: `output_dir` holds another run.
        UnlearnInterrupted: Ctrl-C once the steps have begun; a `KeyboardInterrupt` that says where the state is.
        NonFiniteError: a loss or gradient is NaN or infinite; a `FloatingPointError` with the layers.

    Any other error in the middle (of a callback, a loader, a full disk) leaves the model as before the
    call, and the state in `output_dir` if one was given. One after the merge (of the last `evaluate`, of writing
    the record) leaves the result in the model, and a note on the error says so; with `output_dir` the same call
    with `resume=True`, given the model from before, writes the record.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
        >>> keep = torch.utils.data.Subset(data, [i for i in range(12) if i % 3])
        >>> gone = torch.utils.data.Subset(data, [0, 3, 6, 9])
        >>> result = unlearn(net, gone, keep, targets=["0"], rank=2, batch_size=6, progress=False)
        >>> result.stopped, len(result.history), result.record["forget"]["count"]
        ('finished', 2, 4)
    """
    numbers = {"epochs": epochs, "batch_size": batch_size, "max_steps": max_steps}
    checks.positive_integers(**numbers, checkpoint_every=checkpoint_every, until_every=until_every)
    checks.numbers(lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed)
    autocast = checks.autocast_dtype(autocast)
    if not isinstance(merge, bool | torch.dtype) or (isinstance(merge, torch.dtype) and not merge.is_floating_point):
        raise TypeError(f"merge: got {merge!r}, expected True, False or a floating dtype")
    calls = checks.callables(evaluate=evaluate, until=until, callbacks=callbacks)
    if until is not None and evaluate is None:
        raise ValueError("until: got a condition without evaluate, expected evaluate=… to give it its figures")
    if resume and output_dir is None:
        raise ValueError("resume: got True without output_dir, expected output_dir=… of the run to go on with")
    check_schedule(schedule)
    check_choice("save", save, get_args(Save))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    kind = _kind(method)
    if until is not None and options.get("rewind") is not None:
        raise ValueError("until: got a condition beside rewind, which goes back to weights that it did not stop at")
    place = checks.device_of(model, device)
    with isolated_generators(place):
        method_settings = kind.settings(options)
        passes = kind.passes(method_settings, epochs)
        source = open_source(
            forget, retain, batch_size=batch_size, forget_per_batch=forget_per_batch, collate_fn=collate_fn,
            pad_token_id=checks.pad_token_id(model), seed=seed, device=place,
            forget_epochs=kind.forget_passes(method_settings, epochs),
        )  # fmt: skip
        steps = source.total_steps(passes)
        rate = learning_rates(lr, schedule, total=steps_in_all(steps, max_steps))
        every = until_every or max(1, (steps or 500 * passes) // 10)
        given = {**numbers, **source.settings, "forget_count": len(source.forget_ids)}
        given |= {"lr": lr, "weight_decay": weight_decay, "seed": seed}
        if schedule != "constant":  # a run of before there was a choice goes on
            given["schedule"] = schedule
        given |= {
            "max_grad_norm": max_grad_norm,
            "autocast": None if autocast is None else str(autocast),
            "merge": merge if isinstance(merge, bool) else str(merge),
        }
        given |= {"until_every": every if until else None, "forget_ids": order_digest(source.forget_ids)}
        given["retain_ids"] = None if source.retain_ids is None else order_digest(source.retain_ids)
        settings = json.loads(json.dumps({"method": method, **given, "options": method_settings}))
        folder = None if output_dir is None else RunFolder(output_dir)
        earlier = None if folder is None else earlier_run(folder, settings, resume=resume)
        classes = checks.class_count(model, source.example())
        checks.dataset_labels(forget, retain, source.example(), classes, forget_too=kind.reads_forget_labels)
        if device is not None:
            model.to(place)
        loop_options = LoopOptions(
            epochs=passes, seed=seed, max_steps=max_steps, max_grad_norm=max_grad_norm, autocast=autocast,
            checkpoint_every=checkpoint_every, until=until, until_every=every,
            evaluate=None if evaluate is None else lambda: checks.figures(evaluate, model), callbacks=calls,
            classes=classes, rate=rate, save=save,
        )  # fmt: skip
        run = Run(model, kind, options, source, folder, settings, loop_options, lr, weight_decay, place, merge=merge)
        return run.execute(earlier, progress=progress)
