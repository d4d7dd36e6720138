"""The steps of an unlearning run, from wherever it stands to its end or its interruption.

One loop for every method, with the host reading one small tensor per step: the losses and the
gradient norm. Reading it costs a synchronisation, and buys that a NaN is seen before the optimizer
has spread it over the adapters and its own state, where nothing could take it out again.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from rfa_fast.methods import checks
from rfa_fast.methods.base import Batch, Method, NonFiniteError, StepRecord
from rfa_fast.methods.batches import BatchSource, Drawn
from rfa_fast.methods.checkpoint import RunFolder, RunState
from rfa_fast.methods.progress import ProgressReport
from rfa_fast.methods.seeding import derive_seed, seed_generators
from rfa_fast.names import some

CHECKPOINT_SECONDS = 60.0
_OPTIMIZER = "optimizer."
_METHOD = "method."

Save = Literal["all", "checkpoints"]
"""What a run writes to its folder: everything, or only what it needs to be resumed, and that not at once."""


@dataclass(frozen=True)
class LoopOptions:
    """What the loop needs to know; checked by :func:`rfa_fast.unlearn`. Its epochs are the method's passes.

    Attributes:
        rate: the learning rate of a step, by its number from 0 on.
    """

    epochs: int
    seed: int
    max_steps: int | None
    max_grad_norm: float | None
    autocast: torch.dtype | None
    checkpoint_every: int | None
    until: Callable[[Mapping[str, float]], bool] | None
    until_every: int
    evaluate: Callable[[], dict[str, float]] | None
    callbacks: Sequence[Callable[[StepRecord], object]]
    classes: int | None
    rate: Callable[[int], float]
    save: Save

    @property
    def writes_all(self) -> bool:
        """Whether a run leaves its record, its adapter and its last step, and not only what it is resumed from."""
        return self.save == "all"


class StopSignal:
    """Turns Ctrl-C into a flag, so that a step is never cut in two; a second one stops at once.

    Active between `with` and its end, in the main thread only, and not where Ctrl-C is ignored.

    Attributes:
        requested: Ctrl-C was pressed.
        closing: set once the steps are over; from then on Ctrl-C is answered and not obeyed.
        at_once: set while there is no step to finish first; Ctrl-C then stops what is under way.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self.closing = False
        self.at_once = False
        self._say = say
        self._previous: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> StopSignal:
        current = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and current not in (None, signal.SIG_IGN):
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            raise KeyboardInterrupt
        if self.closing:
            self._say("Ctrl-C: the steps are done; the result is being written, which cannot be cut in two")
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say("Ctrl-C: stopping after this step; press it again to stop at once")


class Loop:
    """One run: the method, its optimizer, where it stands, and the folder it saves to.

    Args:
        method: prepared on the model.
        optimizer: over the method's parameters.
        source: of batches.
        folder: `None` saves nothing.
        state, history: where the run stands.
        device: of the model.

    Attributes:
        state: updated after every step.
        whole: false only from the optimizer's first change of a parameter until the step is counted.
        saved_step: step of the last checkpoint, `None` before the first.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        source: BatchSource,
        folder: RunFolder | None,
        state: RunState,
        history: list[StepRecord],
        device: torch.device,
        options: LoopOptions,
    ) -> None:
        self.method, self.optimizer, self.source, self.folder = method, optimizer, source, folder
        self.state, self.history, self.device, self.options = state, history, device, options
        self.parameters = method.named_parameters()
        self.whole = True
        self.saved_step: int | None = None
        self._saved: tuple[int, int | None, str | None] | None = None
        self._written = 0
        self._last: Batch | None = None  # of the last complete step
        self._saved_at = time.monotonic()

    def run(self, stop: StopSignal, report: ProgressReport) -> None:
        """Go on until the run is over, and say why in `state.stopped`.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the step under way has been finished.
            NonFiniteError: a loss or gradient is NaN or infinite; no step was made with it.
        """
        if self.state.stopped is not None:
            self.method.hand_over()
            return
        options, state = self.options, self.state
        batches = self.source.batches(options.epochs, state.step, state.epoch, state.epoch_step, state.last_batch)
        entered = state.epoch if state.step else None
        if entered is not None:
            self.method.begin_epoch(entered, options.epochs)
        try:
            if state.step and state.asked != state.step:  # what ended the run's first part came before the answer
                self._settle(known=state.asked is not None)
            begun = time.perf_counter()
            while state.stopped is None and not stop.requested and (drawn := next(batches, None)) is not None:
                if drawn.epoch != entered:
                    if entered is not None:
                        self.method.end_epoch(self._forget_pass(), last=False)
                    self.method.begin_epoch(drawn.epoch, options.epochs)
                    entered = drawn.epoch
                record = self._step(drawn, begun)
                report.step(state.step, loss=record["total"], samples=record["retain"] + record["forget"])
                self._settle()
                if state.stopped is None and not stop.requested and self._due():
                    self.save()
                begun = time.perf_counter()
        finally:
            batches.close()
        if stop.requested:
            raise KeyboardInterrupt
        if state.stopped is None:
            self._end()
            state.stopped = "finished"
        if options.writes_all:
            self.save()

    def prepare(self) -> None:
        """What the method does before its first step; its time is part of the run's."""
        begun = time.perf_counter()
        seed_generators(derive_seed(self.options.seed, "prepare"), self.device)
        self.method.prepare(self._forget_pass())
        self.state.seconds += time.perf_counter() - begun

    def _settle(self, *, known: bool = True) -> None:
        """Ask whether the run is over after this step, then call the callbacks, unless nobody knows if they were."""
        state = self.state
        if stopped := self._stopped():
            self._end()
            state.stopped = stopped  # not before: a state that says so is never gone on from
        state.asked = state.step
        for record in self.history[-1:]:
            for callback in self.options.callbacks if known and record["step"] == state.step else ():
                callback(dict(record))

    def _end(self) -> None:
        begun = time.perf_counter()
        self.method.end_epoch(self._forget_pass(), last=True)
        self.method.hand_over()
        self.state.seconds += time.perf_counter() - begun

    def _forget_pass(self) -> Iterator[Batch]:
        """Everything that is to be forgotten, once, on the model's device; nothing is read before it is asked for."""
        return (_to_device(batch, self.device) for batch in self.source.forget_pass)

    def save(self) -> None:
        """Write a checkpoint, when there is a folder to write it to.

        Raises:
            OSError: it could not be written; the one before is still there.
        """
        if self.folder is None:
            return
        if self._last is not None:  # until a run that is gone on with has made a step, the digest it came with holds
            self.state.last_batch = self.source.fingerprint(self._last)
        tensors = {_METHOD + k: v for k, v in self.method.state_tensors().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}.{name}"] = value
        self._append()
        self.folder.save(self.state, tensors)
        self.saved_step, self._saved, self._saved_at = self.state.step, self._standing(), time.monotonic()

    @property
    def saved(self) -> bool:
        """Whether the last checkpoint holds all that is known: a step may be saved before it is asked about."""
        return self._saved == self._standing()

    def _standing(self) -> tuple[int, int | None, str | None]:
        return self.state.step, self.state.asked, self.state.stopped

    def _append(self) -> None:
        """Write the steps that are not yet in the history."""
        if self.folder is not None:
            for record in self.history[self._written :]:
                self.folder.append(record)
        self._written = len(self.history)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put method and optimizer where a checkpoint left them.

        Raises:
            ValueError: the checkpoint is of other layers.
        """
        method = {k.removeprefix(_METHOD): v for k, v in tensors.items() if k.startswith(_METHOD)}
        if missing := sorted(set(self.parameters) - set(method)):
            raise ValueError(f"resume: the saved state has no {missing[0]!r}, expected every parameter of the method")
        state: dict[int, dict[str, Tensor]] = {}
        indices = {name: index for index, name in enumerate(self.parameters)}
        for key, value in tensors.items():
            if key.startswith(_OPTIMIZER):
                field, _, name = key.removeprefix(_OPTIMIZER).partition(".")
                state.setdefault(indices[name], {})[field] = value
        self.saved_step, self._saved, self._written = self.state.step, self._standing(), len(self.history)
        self.method.load_state_tensors(method)
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _step(self, drawn: Drawn, begun: float) -> StepRecord:
        options, state = self.options, self.state
        volatile = {k: v.clone() for k, v in self.method.volatile_tensors().items()}
        forget_too = self.method.reads_forget_labels
        checks.batch_labels(drawn.batch, options.classes, state.step + 1, forget_too=forget_too)
        batch = _to_device(drawn.batch, self.device)
        try:
            values = self._gradients(batch)
            self._check_finite(values, drawn.batch)
            if options.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters.values(), options.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = options.rate(state.step)
            self.whole = False
        except BaseException:
            self._undo_forward(volatile)
            raise
        self.optimizer.step()
        self.method.end_step()
        forget = int(drawn.batch.forget.sum())
        state.step, state.epoch, state.epoch_step = state.step + 1, drawn.epoch, drawn.epoch_step
        state.seconds += time.perf_counter() - begun
        record: StepRecord = {"step": state.step, "epoch": drawn.epoch + 1, **values}
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "retain": len(drawn.batch.forget) - forget}
        record |= {"forget": forget, "seconds": round(state.seconds, 6)}
        self.history.append(record)
        self._last, self.whole = drawn.batch, True
        if self.saved_step is not None:  # before the first checkpoint there is no run to go on with
            self._append()
        return record

    def _gradients(self, batch: Batch) -> dict[str, float]:
        """Forward and backward of a batch on the device: the losses and the gradient norm, read at once."""
        dtype = self.options.autocast
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            losses = self.method.loss(batch)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        figures = [loss.detach().float() for loss in losses.values()] + [gradient_norm(self.parameters.values())]
        read = torch.stack([f.to(self.device) for f in figures]).tolist()
        return dict(zip([*losses, "grad_norm"], read, strict=True))

    def _undo_forward(self, volatile: Mapping[str, Tensor]) -> None:
        """Put back what the forward of a step that failed has changed; what it brought in anew goes."""
        self.optimizer.zero_grad(set_to_none=True)
        changed = self.method.volatile_tensors()
        if not changed and not volatile:
            return
        kept = {k: v for k, v in self.method.state_tensors().items() if k not in changed}
        self.method.load_state_tensors({**kept, **volatile})

    def _check_finite(self, values: Mapping[str, float], batch: Batch) -> None:
        bad_losses = [k for k, v in values.items() if k != "grad_norm" and not math.isfinite(v)]
        bad_gradients = [
            name
            for name, p in self.parameters.items()
            if not math.isfinite(values["grad_norm"]) and p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        if all(map(math.isfinite, values.values())):
            return
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in bad_gradients))
        if bad_losses:
            layers = self.method.not_finite()
            shown = ", ".join(f"{k} {values[k]}" for k in bad_losses)
            what = f"the loss is not finite ({shown})"
            if layers:
                what += f", first in layer {some(map(repr, layers))}"
            elif "align" in values:
                what += ", in the task's loss alone: every layer's alignment is finite"
        elif bad_gradients:
            what = f"the gradient is not finite, first in parameter {some(map(repr, bad_gradients))}"
        else:
            what = f"the gradient's norm is {values['grad_norm']}, beyond float32, with finite elements"
        tensors = batch.inputs.values() if isinstance(batch.inputs, Mapping) else [batch.inputs]
        if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
            what += "; the batch's inputs already hold NaN or infinite values"
        step = self.state.step + 1
        raise NonFiniteError(f"step {step}: {what}; the optimizer has not seen it", step=step, layers=layers)

    def _stopped(self) -> str | None:
        """Why the run is over after this step, `None` when it is not."""
        options, step = self.options, self.state.step
        if self._satisfied():
            return "until"
        if options.max_steps is None or step < options.max_steps:
            return None
        last = self.source.total_steps(options.epochs)
        return "finished" if last and step >= last else "max_steps"

    def _satisfied(self) -> bool:
        options = self.options
        if options.until is None or options.evaluate is None or self.state.step % options.until_every:
            return False
        seed_generators(derive_seed(options.seed, "evaluate"), self.device)
        return bool(options.until(options.evaluate()))

    def _due(self) -> bool:
        if self.options.checkpoint_every is not None:
            return self.state.step % self.options.checkpoint_every == 0
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS


def _to_device(batch: Batch, device: torch.device) -> Batch:
    inputs = batch.inputs
    # A plain dict of any mapping (transformers' BatchEncoding is no dict): that is what a method tells apart.
    moved = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device)
    return Batch(moved, batch.labels.to(device), batch.forget.to(device))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over the gradients of all parameters that have one, 0-dim fp32.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm([weight])
        tensor(5.)
    """
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
