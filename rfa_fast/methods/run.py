"""The part of an unlearning run that changes things: prepare, run, finish, or put everything back.

Everything before this was checking. From here on the model is patched, so every way out leads through one of
three doors: `_finish`; `_keep`, which saves what was trained and restores the model; or, once the result is merged
and there is nothing left to restore, an error that says so.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfa_fast.methods import checks
from rfa_fast.methods.base import Method, NonFiniteError, StepRecord, UnlearnInterrupted
from rfa_fast.methods.batches import BatchSource
from rfa_fast.methods.checkpoint import STATE_FILE, RunFolder, RunState, differences
from rfa_fast.methods.loop import Loop, LoopOptions, StopSignal
from rfa_fast.methods.progress import ProgressReport
from rfa_fast.methods.record import (
    RECORD_FILE,
    build_record,
    finite_or_none,
    hash_ids,
    hash_model,
    versions,
    write_json,
)
from rfa_fast.methods.schedule import steps_in_all
from rfa_fast.methods.seeding import derive_seed, seed_generators

_LATER = ("layers", "model")  # settings that are known only once the method is prepared


@dataclass
class UnlearnResult:
    """What :func:`unlearn` returns.

    Attributes:
        model: the model given, changed in place.
        rfa: the live handle when nothing was merged, else `None`.
        history: one record per step.
        record: the deletion record.
        output_dir: where the run's files are, `None` where none were written.
        stopped: `"finished"`, `"until"` or `"max_steps"`.
    """

    model: nn.Module
    rfa: Any
    history: list[StepRecord]
    record: dict[str, Any]
    output_dir: Path | None
    stopped: str


def earlier_run(folder: RunFolder, settings: Mapping[str, Any], *, resume: bool) -> RunState | None:
    """The run in `folder` that is to be resumed, `None` when a new one begins there.

    Raises:
        FileExistsError: the folder holds a run and `resume` is false.
        ValueError: that run has other settings, or its state cannot be read.
    """
    if not resume:
        folder.refuse_other_run()
        return None
    found = folder.found()
    if STATE_FILE not in found:
        if found:
            raise FileExistsError(
                f"output_dir: {folder.path} holds {', '.join(found)} but no {STATE_FILE}, so no state to go on "
                "from; expected a folder of a run, or an empty one"
            )
        warnings.warn(f"resume: no run in {folder.path}; a new one begins there", stacklevel=3)
        return None
    state = folder.read_state()
    if wrong := differences(state.versions, versions()):
        warnings.warn(
            f"resume: the run in {folder.path} was begun with other versions ({'; '.join(wrong)}); it goes on, but may "
            "end differently from an uninterrupted run in the last bits",
            stacklevel=3,
        )
    same_settings(folder.path, {k: v for k, v in state.settings.items() if k not in _LATER}, settings)
    return state


def same_settings(
    path: Path, there: Mapping[str, Any], here: Mapping[str, Any], *, resume: str = "resume", output: str = "output_dir"
) -> None:
    """Raise unless a run that is to be resumed has these settings.

    Args:
        path: of the run.
        there, here: its settings, and those of this call.
        resume, output: what the caller's user calls the two options.

    Raises:
        ValueError: it has others; names each.

    Example:
        >>> same_settings(Path("run"), {"lr": 0.1}, {"lr": 0.1})
    """
    if wrong := differences(there, here):
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"{resume}: the run in {path} has other settings than this call:\n  {lines}\n"
            f"expected the same ones; name another {output} to begin a new run"
        )


class Run:
    """One call of :func:`rfa_fast.unlearn`, whose arguments these are, checked."""

    def __init__(
        self,
        model: nn.Module,
        kind: type[Method],
        method_options: Mapping[str, Any],
        source: BatchSource,
        folder: RunFolder | None,
        settings: dict[str, Any],
        options: LoopOptions,
        lr: float,
        weight_decay: float,
        device: torch.device,
        *,
        merge: bool | torch.dtype,
    ) -> None:
        self.model, self.kind, self.method_options, self.source = model, kind, method_options, source
        self.folder, self.settings, self.options = folder, settings, options
        self.lr, self.weight_decay, self.device, self.merge = lr, weight_decay, device, merge

    def execute(self, earlier: RunState | None, *, progress: bool) -> UnlearnResult:
        """Prepare, run, finish."""
        method = self.kind(self.model, seed=self.options.seed, **self.method_options)
        try:
            loop = self._prepare(method, earlier)
        except BaseException:
            method.remove()
            raise
        total = steps_in_all(self.source.total_steps(self.options.epochs), self.options.max_steps)
        report = ProgressReport(f"unlearn ({method.name})", total, start=loop.state.step, enabled=progress)
        with StopSignal(report.say) as stop:
            try:
                with report:
                    loop.run(stop, report)
                stop.closing = True
                layers = method.layers()
                whole = self.folder if self.options.writes_all else None
                files = {} if whole is None else whole.replace_adapter(method.save)
                rounding = method.merge(None if self.merge is True else self.merge) if self.merge else None
            except NonFiniteError as error:
                kept, rfa = self._keep(loop, stays=True)
                raise NonFiniteError(
                    f"{error}; {kept}", step=error.step, layers=error.layers, output_dir=self._path(), rfa=rfa,
                    history=loop.history,
                ) from None  # fmt: skip
            except KeyboardInterrupt:
                kept, rfa = self._keep(loop, stays=True)
                raise UnlearnInterrupted(
                    f"interrupted after step {loop.state.step}; {kept}",
                    step=loop.state.step, output_dir=self._path(), rfa=rfa, history=loop.history,
                ) from None  # fmt: skip
            except BaseException as error:
                kept, _ = self._keep(loop, stays=False)
                checks.add_note(error, f"unlearn: after step {loop.state.step}; {kept}")
                raise
            try:
                return self._finish(loop, stop, layers, files, rounding)
            except KeyboardInterrupt:
                kept, rfa = self._left(loop, stays=True)
                raise UnlearnInterrupted(
                    f"interrupted after the last step, {loop.state.step}; {kept}",
                    step=loop.state.step, output_dir=self._path(), rfa=rfa, history=loop.history,
                    merged=bool(self.merge),
                ) from None  # fmt: skip
            except BaseException as error:
                kept, _ = self._left(loop, stays=False)
                checks.add_note(error, f"unlearn: after the last step, {loop.state.step}; {kept}")
                raise

    def _prepare(self, method: Method, earlier: RunState | None) -> Loop:
        """Optimizer, hash and figures of the untouched model; the state of an earlier run put back."""
        with method.original():
            before = hash_model(self.model)
        settings = {**self.settings, "layers": method.layers(), "model": before}
        if earlier is not None and self.folder is not None:
            same_settings(self.folder.path, earlier.settings, settings)
        parameters = list(method.named_parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        state = earlier or RunState(settings=settings, versions=versions())
        history = [] if self.folder is None else self.folder.truncate_history(state.step)
        loop = Loop(method, optimizer, self.source, self.folder, state, history, self.device, self.options)
        if earlier is not None and self.folder is not None:
            loop.load(self.folder.read_tensors())
            return loop
        if self.options.evaluate is not None:
            with method.original():
                state.metrics_before = finite_or_none(self._evaluate())
        loop.prepare()
        if self.options.writes_all:
            loop.save()
        return loop

    def _finish(
        self,
        loop: Loop,
        stop: StopSignal,
        layers: Sequence[str],
        files: Mapping[str, str],
        rounding: Mapping[str, float] | None,
    ) -> UnlearnResult:
        state, method = loop.state, loop.method
        stop.at_once = True
        try:
            after = self._evaluate() if self.options.evaluate is not None else None
        finally:
            stop.at_once = False
        options = self.settings["options"]
        using = {epoch for epoch in range(self.options.epochs) if method.uses_forget(options, epoch)}
        draws = Counter[int]()
        for step in loop.history:
            draws[step["epoch"] - 1] += step["forget"]
        drawn, count = sum(draws[epoch] for epoch in using), len(self.source.forget_ids)
        known = bool(using) and len(loop.history) == state.step
        if known and drawn < count:
            warnings.warn(
                f"unlearn: {drawn} forget samples were drawn, fewer than the {count} to forget: "
                "some were never seen; raise epochs or forget_per_batch",
                stacklevel=4,
            )
        elif known and self.settings["data"] != "loaders" and (most := max(draws[epoch] for epoch in using)) < count:
            warnings.warn(  # each epoch draws in an order of its own
                f"unlearn: at most {most} of the {count} samples to forget were drawn in an epoch, anew in each: some "
                "may never have been seen; raise forget_per_batch",
                stacklevel=4,
            )
        ids = self.source.retain_ids
        record = build_record(
            method=method.name,
            settings={k: v for k, v in self.settings.items() if k not in ("forget_ids", "retain_ids")},
            seed=self.options.seed,
            layers=layers,
            forget_ids=self.source.forget_ids,
            retain={"count": None, "digest": None} if ids is None else {"count": len(ids), "digest": hash_ids(ids)[1]},
            model=self.model,
            before=state.settings["model"],
            merged=bool(self.merge),
            metrics_before=state.metrics_before,
            metrics_after=after,
            training={
                "steps": state.step, "epochs": state.epoch + 1, "seconds": round(state.seconds, 3),
                "stopped": state.stopped, "forget_samples_drawn": drawn,
            },
            merge_rounding=rounding,
            files=files,
        )  # fmt: skip
        if self.options.writes_all:
            record = self._write(record)
        there = None if loop.saved_step is None else self._path()
        return UnlearnResult(self.model, method.handle, loop.history, record, there, str(state.stopped))

    def _write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the record, unless this run has left one: it is a document and keeps its date."""
        if self.folder is None:
            return record
        there = self.folder.read_record()
        if there is None:
            write_json(self.folder.path / RECORD_FILE, record)
            return record
        if there["model"]["after"] != record["model"]["after"]:
            warnings.warn(
                f"{self.folder.path / RECORD_FILE}: is of a model with another hash than this one; it was written with "
                f"{there['versions']}. It is left as it is; name another output_dir for a record of this model",
                stacklevel=5,
            )
            return record
        return there

    def _evaluate(self) -> dict[str, float]:
        seed_generators(derive_seed(self.options.seed, "evaluate"), self.device)
        return {} if self.options.evaluate is None else self.options.evaluate()

    def _keep(self, loop: Loop, *, stays: bool) -> tuple[str, Any]:
        """Save what there is, or leave it on the model: a clause that says which, and the live handle."""
        step, handle = loop.state.step, loop.method.handle
        trained = f"the {loop.method.trains} of step {step}"
        on_model = f"{trained} stay on the model, as .rfa of this error; merge() or remove() them"
        if self.folder is None:
            if stays and loop.whole:
                return f"nothing was saved, for want of output_dir; {on_model}", handle
            loop.method.remove()
            return "nothing was saved, for want of output_dir; the model is as before", None
        lost = ""
        if loop.whole and not loop.saved:
            try:
                loop.save()
            except OSError as error:
                if loop.saved_step != step:  # otherwise no step is lost, and the run asks about this one again
                    lost = f"the state of step {step} could not be saved ({error}); "
                    if stays:
                        return lost + on_model, handle
            except BaseException:
                loop.method.remove()
                raise
        loop.method.remove()
        if loop.saved_step is None:
            return f"{lost}nothing was saved yet; the model is as before", None
        return (
            f"{lost}the state of step {loop.saved_step} is in {self.folder.path} and the model is as before; "
            "the same call with resume=True goes on from there"
        ), None

    def _left(self, loop: Loop, *, stays: bool) -> tuple[str, Any]:
        """What an error after the last step leaves behind, as :meth:`_keep`; merged, the result stays."""
        if not self.merge:
            return self._keep(loop, stays=stays)
        held = "the unlearning itself is finished, and its result merged into the model"
        if self.folder is None or not self.options.writes_all:
            return f"{held}; there is no deletion record of it", None
        return (
            f"{held}; the same call with resume=True, given the model from before, writes the deletion record to "
            f"{self.folder.path}"
        ), None

    def _path(self) -> Path | None:
        return None if self.folder is None else self.folder.path
