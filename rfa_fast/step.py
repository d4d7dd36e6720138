"""`compile_step`: forward, loss, backward and optimizer step of a patched model, as one function.

Forward and loss are one graph (`fullgraph=True`), and its backward is another; what depends on values (checks,
clipping that waits for a norm, the optimizer's own rule) stays outside, where it costs nothing to change. Groups are
masks, so one graph serves every number of forget samples. The first shape compiles with its sizes written in; the
second compiles once more, with batch and length left open; no later one compiles.

What one batch leaves for the next (x̃ of every layer, ỹ) goes in and comes out as arguments. Their shapes have to be
there before the first call, so the first batch runs once without gradient and uncompiled; that also finds a model
that does something of its own to its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rfa_fast.checks import warn_unaveraged
from rfa_fast.compiler import compiler_settings, one_graph
from rfa_fast.forwards import batch_statistics
from rfa_fast.groups import Batch, WholeBatch
from rfa_fast.head import head_aside, labelled_rows, standing_aside, trying_aside
from rfa_fast.loss import Evaluation, evaluate, prepare, remembered
from rfa_fast.objective import FORGET, RETAIN, RFALoss
from rfa_fast.padding import Inputs
from rfa_fast.patching import RFA
from rfa_fast.prefix_cache import PrefixCache, sample_keys

Memory = dict[str, tuple[Tensor, Tensor]]


class Scheduler(Protocol):
    """A learning-rate schedule of torch: `step()` after every optimizer step."""

    def step(self) -> None: ...


def compile_step(
    rfa: RFA,
    optimizer: torch.optim.Optimizer,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    scheduler: Scheduler | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    nonfinite: Literal["raise", "skip"] = "raise",
    cache_prefix: PrefixCache | bool = False,
    compile: bool = True,
    backend: Any = "inductor",
) -> Step:
    """One training step of a patched model as a function of a batch.

    Args:
        rfa: the handle that :func:`rfa_fast.patch` returned.
        optimizer: over `rfa.parameters()`.
        accumulate: parts that a batch is cut into, one after the other on the device. Each group's terms are
            normalised by its count over the whole batch; x̃ and ỹ are those of each part, or of the part before where
            it has no retain samples.
        max_norm: clip the gradient to this L2 norm.
        scheduler: stepped after every optimizer step.
        scaler: loss scaling for fp16 autocast; one that is disabled counts as none. It skips steps that are not finite
            by itself, whatever `nonfinite` says; they are counted.
        autocast: dtype that products are taken in, `torch.bfloat16` or `torch.float16`.
        nonfinite: what happens to a step whose gradient is NaN or infinite: the optimizer does not see it, and then
            `"raise"` a FloatingPointError that names the step and the layers, or `"skip"` it and count it. On an
            accelerator the error comes with the next call, because asking at once would wait for the device.
        cache_prefix: keep what the frozen prefix (all blocks before the first adapted one) returns for a sample, for
            the next epoch: a :class:`rfa_fast.prefix_cache.PrefixCache` with its budget, in memory or on disk, or
            `True` for 1 GiB of memory. For inputs that come again as they were; augmented ones are refused, and
            so is a model that reads the output of an earlier block itself.
        compile: `False` runs the same step uncompiled, which is what to look at when in doubt.
        backend: of :func:`torch.compile`.

    Returns:
        :class:`Step`; call it with `inputs, labels, forget, valid=None` as :meth:`RFA.loss`.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.

    Example:
        >>> import rfa_fast
        >>> rfa = rfa_fast.patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2, seed=0)
        >>> step = compile_step(rfa, torch.optim.AdamW(rfa.parameters(), lr=0.1), compile=False)
        >>> forget = torch.tensor([False, True])
        >>> losses = [step(torch.eye(4)[:2], torch.tensor([0, 1]), forget).total.item() for _ in range(20)]
        >>> losses[-1] < losses[0], step.steps
        (True, 20)
    """
    if not isinstance(rfa, RFA):
        raise TypeError(f"rfa: got {type(rfa).__name__}, expected the handle that patch() returned")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate: got {accumulate!r}, expected an integer >= 1")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm!r}, expected a number > 0, or None")
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"nonfinite: got {nonfinite!r}, expected 'raise' or 'skip'")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast: got {autocast}, expected torch.bfloat16, torch.float16 or None")
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in rfa.named_parameters().items() if id(p) not in owned]
    if left_out:
        raise ValueError(
            f"optimizer: got one without {left_out[0]!r} ({len(left_out)} left out), expected all of rfa.parameters(); "
            "an optimizer made before patch() trains nothing"
        )
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    cache = PrefixCache() if cache_prefix is True else cache_prefix or None
    if cache is not None:
        if not isinstance(cache, PrefixCache):
            raise TypeError(f"cache_prefix: got {type(cache).__name__}, expected a PrefixCache, True or False")
        if not rfa._prefix.names:
            raise ValueError(
                "cache_prefix: got True for a model whose first block is adapted, expected targets such as 'deep', "
                "which leave a frozen prefix"
            )
        if (norm := batch_statistics(rfa.model)) is not None:
            raise ValueError(
                f"cache_prefix: got a model whose batch norm {norm!r} takes its statistics from the batch, expected "
                "outputs of a sample that do not depend on the others"
            )
        cache.open(rfa.model, rfa._prefix.names, autocast)
    options = (accumulate, max_norm, scheduler, scaler, autocast, nonfinite, cache, compile, backend)
    return Step(rfa, optimizer, *options)


class Step:
    """What :func:`compile_step` returns.

    Attributes:
        steps: optimizer steps asked for so far.
        skipped: how many of them had a gradient that was not finite.
        grad_norm: L2 norm of the last gradient, before clipping, 0-dim on the device.
    """

    def __init__(
        self,
        rfa: RFA,
        optimizer: torch.optim.Optimizer,
        accumulate: int,
        max_norm: float | None,
        scheduler: Scheduler | None,
        scaler: torch.amp.GradScaler | None,
        autocast: torch.dtype | None,
        nonfinite: str,
        cache: PrefixCache | None,
        compile: bool,
        backend: Any,
    ) -> None:
        self.rfa, self.optimizer, self.accumulate, self.max_norm = rfa, optimizer, accumulate, max_norm
        self.scheduler, self.scaler, self.autocast, self.nonfinite = scheduler, scaler, autocast, nonfinite
        self.cache = cache
        self.steps = self.skipped = 0
        self.grad_norm: Tensor | None = None
        self._compiled: Callable[..., Evaluation] | None = None
        if compile:
            self._compiled = torch.compile(self._evaluate, fullgraph=True, backend=backend)
        self._shapes: dict[Any, tuple[Memory, Tensor]] = {}
        self._first_shape: Any = None
        self._unasked: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, inputs: Inputs, labels: Tensor, forget: Tensor, valid: Tensor | None = None) -> RFALoss:
        """Make one step; arguments as :meth:`RFA.loss`.

        Returns:
            The losses before the step, detached.

        Raises:
            FloatingPointError: a gradient that is not finite, of this step or (on an accelerator) of the one before.
            RuntimeError: a model that does not compile into one graph.
        """
        rfa, context = self.rfa, self.rfa._context
        rfa._check_enabled()
        warn_unaveraged(rfa.model, rfa.layers.values())
        self._ask()
        device = rfa._device()
        batch = prepare(rfa.config, inputs, labels, forget, valid, device)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(_split(inputs, labels, batch, self.accumulate))
        if self.accumulate > 1:
            labelled = torch.stack([labelled_rows(y, b, rfa.model, context) for _, y, b in parts]).sum(0)
            whole = WholeBatch(
                _counts(batch.samples), _counts(batch.samples if batch.tokens is None else batch.tokens), labelled
            )
            for _, _, part in parts:
                part.whole = whole
        losses, terms = [], torch.zeros((), device=device)
        for mine in parts:
            found = self._part(*mine)
            terms = terms + found.terms
            rfa._keep(found._replace(terms=terms))  # a part without retain samples falls back on the part before
            losses.append(RFALoss(*(field.detach() for field in found.losses)))
        self._update(terms)
        return (
            losses[0]
            if len(losses) == 1
            else RFALoss(*(torch.stack(field).sum(0) for field in zip(*losses, strict=True)))
        )

    def _part(self, inputs: Inputs, labels: Tensor, batch: Batch) -> Evaluation:
        """Forward and backward of one part."""
        rfa, context = self.rfa, self.rfa._context
        inputs, labels, batch = rfa._teacher.retain_first(
            context, inputs, labels, batch, anew=self._compiled is not None
        )
        with ExitStack() as stack:
            stack.enter_context(rfa._one_batch(batch))
            stack.enter_context(self._autocast())
            output = self._prefix_output(inputs, labels, batch.size)
            if output is not None:
                stack.enter_context(rfa._prefix.answered(context))
            else:
                stack.enter_context(rfa._prefix.shared(context))
            if self._compiled is None:
                memory, prediction = remembered(rfa.layers), context.prediction_on(rfa._device())
                found = self._evaluate(inputs, labels, batch, memory, prediction, output)
            else:
                memory, prediction = self._known(inputs, labels, batch, output)
                head = head_aside(rfa.model, labels, context)
                if head is not None:
                    stack.enter_context(standing_aside(head))
                    stack.enter_context(_aside(context))
                self._open(inputs, labels, batch, output)
                context.note_retain(batch)
                stack.enter_context(compiler_settings())
                with one_graph():
                    found = self._compiled(inputs, labels, batch, memory, prediction, output)
        total = found.losses.total if self.scaler is None else self.scaler.scale(found.losses.total)
        with nullcontext() if self._compiled is None else compiler_settings():
            total.backward()  # type: ignore[no-untyped-call]
        return found

    def _evaluate(
        self, inputs: Inputs, labels: Tensor, batch: Batch, memory: Memory, prediction: Tensor | None,
        prefix_output: Tensor | None,
    ) -> Evaluation:  # fmt: skip
        rfa = self.rfa
        return evaluate(rfa.model, rfa.names, rfa._context, inputs, labels, batch, memory, prediction, prefix_output)

    def _prefix_output(self, inputs: Inputs, labels: Tensor, size: int) -> Tensor | None:
        """What the prefix returns for a batch, from the cache or from a run of its own; `None` without a cache."""
        if self.cache is None:
            return None
        self.rfa._prefix.check_frozen(inputs)
        keys = sample_keys(inputs, size)
        output = self.cache.get(keys, self.rfa._device())
        if output is None:
            head = head_aside(self.rfa.model, labels, self.rfa._context)
            run = partial(self._run_prefix, inputs, labels)
            output = trying_aside(run, head, self.rfa._context)
            self.cache.put(keys, output)
        return output

    def _run_prefix(self, inputs: Inputs, labels: Tensor) -> Tensor:
        head = head_aside(self.rfa.model, labels, self.rfa._context)
        aside = nullcontext if head is None else partial(standing_aside, head)
        return self.rfa._prefix.run(self.rfa.model, inputs, aside)

    def _autocast(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast(self.rfa._device().type, self.autocast)

    def _known(self, inputs: Inputs, labels: Tensor, batch: Batch, output: Tensor | None) -> tuple[Memory, Tensor]:
        """x̃ and ỹ of the batch before in the shapes of this one: zeros that are not known yet where there are none."""
        rfa, context = self.rfa, self.rfa._context
        # Means over tokens are one vector, whatever the length.
        key = "tokens" if batch.token_units else _shape_of(inputs, labels, batch)[1:]
        if key not in self._shapes:
            with torch.no_grad():
                known = context.prediction_on(rfa._device())
                found = self._evaluate(inputs, labels, batch, remembered(rfa.layers), known, output)
            blank = {
                name: (torch.zeros_like(mean), torch.zeros_like(known)) for name, (mean, known) in found.means.items()
            }
            self._shapes[key] = blank, torch.zeros_like(found.mean_prediction)
        blank, nothing = self._shapes[key]
        memory = dict(blank)
        for name, (mean, known) in remembered(rfa.layers).items():
            if name in blank and mean.shape == blank[name][0].shape and known.shape == blank[name][1].shape:
                memory[name] = mean, known
            else:
                context.note_other_shape(name, batch)
        known = context.prediction_on(rfa._device())
        return memory, nothing if known is None else known

    def _open(self, inputs: Inputs, labels: Tensor, batch: Batch, output: Tensor | None) -> None:
        """From the second shape on, leave batch and length open, both at once."""
        shape = _shape_of(inputs, labels, batch)
        if self._first_shape is None:
            self._first_shape = shape
        if shape == self._first_shape:
            return
        by_length = batch.length is not None
        tensors = [inputs] if isinstance(inputs, Tensor) else [v for v in inputs.values() if isinstance(v, Tensor)]
        rest = [tensor for tensor in (labels, batch.samples, batch.tokens, batch.decoder, output) if tensor is not None]
        for tensor in [*tensors, *rest]:
            for axis in range(min(tensor.ndim, 2 if by_length else 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def _update(self, terms: Tensor) -> None:
        """Clip, step, schedule; a gradient that is not finite reaches no parameter."""
        parameters = self.rfa.parameters()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        self.grad_norm, self.steps = norm.detach(), self.steps + 1
        self._unasked = self.steps, self.grad_norm, terms
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._unasked = None  # the scaler expects such steps, and skips them itself
            self.skipped += not math.isfinite(norm.item())  # it has asked the device as well
        elif norm.device.type != "cpu" and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        elif math.isfinite(norm.item()):
            self.optimizer.step()
        else:
            self._ask()
        if self.scheduler is not None:
            self.scheduler.step()

    def _ask(self) -> None:
        """Whether the last step's gradient was finite."""
        if self._unasked is None:
            return
        (step, norm, terms), self._unasked = self._unasked, None
        if math.isfinite(norm.item()):
            return
        self.skipped += 1
        if self.nonfinite == "skip":
            return
        rows = torch.isfinite(terms).all(1).tolist()
        layers = [name for name, fine in zip(self.rfa.names, rows, strict=True) if not fine]
        gradients = {name: p.grad for name, p in self.rfa.named_parameters().items()}
        bad = [name for name, g in gradients.items() if g is not None and not bool(torch.isfinite(g).all())]
        if layers:
            where = f"the alignment of layer {layers[0]!r}" + (f" and {len(layers) - 1} more" if layers[1:] else "")
        elif bad:
            where = f"the gradient of {bad[0]!r}" + (f" and {len(bad) - 1} more" if bad[1:] else "")
        else:
            where = "the gradient"
        raise FloatingPointError(
            f"step {step}: got NaN or infinity in {where}, expected finite numbers; the optimizer has not seen it. "
            "Look at the batch and the learning rate, or pass nonfinite='skip' to compile_step()"
        )


def _counts(codes: Tensor) -> Tensor:
    return torch.stack([(codes == RETAIN).sum(), (codes == FORGET).sum()])


def _split(inputs: Inputs, labels: Tensor, batch: Batch, parts: int) -> Iterator[tuple[Inputs, Tensor, Batch]]:
    """The batch in parts, along axis 0; what of the inputs has no batch axis goes to every part."""
    if parts == 1:
        yield inputs, labels, batch
        return
    size = batch.size
    if size < parts:
        raise ValueError(f"accumulate: got {parts} parts for a batch of {size}, expected at most one per sample")
    each = math.ceil(size / parts)
    for start in range(0, size, each):
        part = slice(start, start + each)
        if isinstance(inputs, Tensor):
            mine: Inputs = inputs[part]
        else:
            mine = {
                k: v[part] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in inputs.items()
            }
        yield mine, labels[part], batch.of(part)


def _shape_of(inputs: Inputs, labels: Tensor, batch: Batch) -> tuple[Any, ...]:
    """What tells one shape from another: the batch size first, then the rest."""
    named: Mapping[str, Any] = {"": inputs} if isinstance(inputs, Tensor) else inputs
    rest = tuple((k, tuple(v.shape[1:]) if isinstance(v, Tensor) else None) for k, v in sorted(named.items()))
    return batch.size, rest, labels.ndim, batch.token_units, batch.whole is None


@contextmanager
def _aside(context: Any) -> Iterator[None]:
    context.head_is_aside = True
    try:
        yield
    finally:
        context.head_is_aside = False
