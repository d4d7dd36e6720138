"""`patch()` and the handle it returns: adapt a model in place, take its loss, merge or restore it.

Nothing is copied. The frozen weights stay the model's own parameters; teacher mode runs the same
weights with the adapters off. Everything `patch` changes (classes, `requires_grad`, train flags, a
tied head) is remembered in the handle and undone by `merge` and `remove`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfa_fast import checks
from rfa_fast import targets as targets_module
from rfa_fast.checkpointing import mark
from rfa_fast.config import RFAConfig
from rfa_fast.groups import Batch, GroupContext, LayerTerms, make_batch
from rfa_fast.layer_report import Report, describe
from rfa_fast.loss import (
    Evaluation,
    alignment,
    eval_behaviour,
    evaluate,
    finite_mean,
    keep,
    prepare,
    remembered,
    token_units,
)
from rfa_fast.merging import fold_into_weights, warn_of_rounding
from rfa_fast.modules import RFALayer
from rfa_fast.names import canonical_names, unwrapped
from rfa_fast.objective import RFALoss, combine
from rfa_fast.ops import backends
from rfa_fast.padding import Inputs
from rfa_fast.prefix import Prefix
from rfa_fast.ranks import fit_ranks
from rfa_fast.swap import adapt, restore
from rfa_fast.targets import Plan, Targets
from rfa_fast.teacher import Teacher, record_teacher
from rfa_fast.training_state import read_state, trained_parameters, write_state
from rfa_fast.undo import Undo


def patch(model: nn.Module, targets: Targets = "deep", **options: Any) -> RFA:
    """Freeze a model and put residual branches on the layers that `targets` selects, in place.

    Args:
        model: any module with Linear, Conv2d or transformers' Conv1D layers.
        targets: `"all"`; `"deep"`, `"middle"`, `"shallow"` (last, central, first half of the repeated
            blocks); a regex, matched in full; a list of names or dotted suffixes; or a callable
            `(name, module) -> bool`. The four words take the paper's placement: convolutions of
            residual blocks, feed-forward linears of transformer blocks, and (`"all"`, `"deep"`) the
            classification head.
        **options: the fields of :class:`rfa_fast.RFAConfig`: `rank=8, alpha=32, mode="residual",
            norm="mse", gamma=0.5, weights=(1, 1, 1, 1), adapter="lora", …`.

    Returns:
        The handle: losses, report, merge and restore.

    Raises:
        ValueError: no layer matched, a listed layer cannot be adapted, the model is patched already, sharded or
            wrapped for several processes, or an option is out of range. Nothing has been changed then.
        TypeError: quantised, integer or meta weights, or an option of the wrong type.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> rfa = patch(net, ["0"], rank=2)
        >>> rfa.names
        ('0',)
        >>> rfa.remove()
        >>> type(net[0]).__name__
        'Linear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    unknown = sorted(set(options) - set(RFAConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(RFAConfig.__dataclass_fields__)
        raise TypeError(f"patch: got unknown options {', '.join(unknown)}, expected some of {known}")
    checks.patchable(model)
    config = RFAConfig(**options)
    plan = targets_module.select(model, targets)
    checks.not_sharded(model, {t.name: model.get_submodule(t.name) for t in plan.adapted}, "patch first, then shard")
    config = fit_ranks(model, plan, config)
    head = targets_module.output_embeddings(model) if config.vocabulary_skip else None
    if head is not None and any(model.get_submodule(target.name) is head for target in plan.adapted):
        raise ValueError(
            f"vocabulary_skip: got {config.vocabulary_skip} for a model whose head is adapted, expected 0: "
            "the gradients of its adapters need every block of the vocabulary"
        )
    backends.select(config.backend, model.get_submodule(plan.adapted[0].name).weight)  # type: ignore[arg-type]
    return RFA(model, plan, config)


class RFA:
    """Handle of a patched model; made by :func:`patch`.

    Attributes:
        model: the patched model.
        config: its options.
        names: adapted layers, in the order of `model.named_modules()`; m of eq. 6 is their number.
        layers: name -> adapted layer.
    """

    def __init__(self, model: nn.Module, plan: Plan, config: RFAConfig) -> None:
        self.model, self.config, self.plan = model, config, plan
        self.names = tuple(target.name for target in plan.adapted)
        self._undo = Undo(model)
        self._context = GroupContext(config)
        self._live = True
        modules, plain = dict(model.named_modules()), canonical_names(model)
        for target in plan.adapted:
            if target.tied_to is not None:
                self._undo.untie(modules[target.name], target)
        model.requires_grad_(False)
        self.layers: dict[str, RFALayer] = {}
        try:
            for target in plan.adapted:
                ambiguous = targets_module.sequence_first(model, target.name)
                self.layers[target.name] = adapt(
                    modules[target.name], target, config, self._context, ambiguous=ambiguous,
                    plain_name=plain[target.name],
                )  # fmt: skip
        except BaseException:
            self.layers = {n: m for n, m in modules.items() if isinstance(m, RFALayer)}
            self._restore(keep_untied=False)
            raise
        self._undo.forbid_in_place()
        self._prefix = Prefix(model, plan.blocks, self.names)
        self._teacher = Teacher(model, plan.blocks, self._prefix.names)
        model.eval()

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, for an optimiser.

        Example:
            >>> rfa = patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
            >>> [tuple(p.shape) for p in rfa.parameters()]
            [(2, 4), (3, 2)]
        """
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name: `"layer4.0.conv1.lora_a"` and so on.

        Example:
            >>> list(patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2).named_parameters())
            ['0.lora_a', '0.lora_b']
        """
        self._check_live()
        return trained_parameters(self.layers)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything training changes, apart from the optimiser: adapters, and the last x̃ and ỹ.

        Returns:
            Detached tensors that share storage with the model's.

        Example:
            >>> list(patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2).state_tensors())
            ['0.lora_a', '0.lora_b']
        """
        self._check_live()
        return read_state(self.layers, self._context)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` gave; an x̃ or ỹ that it did not give is not known afterwards.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing has been changed then.

        Example:
            >>> rfa = patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
            >>> rfa.load_state_tensors(rfa.state_tensors())
        """
        self._check_live()
        write_state(self.layers, self._context, tensors, self._device())

    def loss(self, inputs: Inputs, labels: Tensor, forget: Tensor, valid: Tensor | None = None) -> RFALoss:
        """Run the model and return the loss of eq. 1-6.

        Args:
            inputs: a tensor, or a transformers model's keyword dict (without `labels`).
            labels: int64 `(B,)`, or `(B, T)` unshifted as in transformers; −100 is left out of the task
                terms. Labels of forget samples are otherwise unread.
            forget: bool `(B,)`.
            valid: bool `(B,)` or `(B, T)`, and-ed with the attention mask; false is in no term. Of an encoder-decoder
                T is the encoder's: labels of −100 leave out what the decoder writes.

        Raises:
            TypeError, ValueError: a mask or labels of the wrong dtype, shape, device or range, or an
                adapted layer that did not run exactly once.

        Example:
            >>> rfa = patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2, seed=0)
            >>> loss = rfa.loss(torch.ones(2, 4), torch.tensor([0, 1]), torch.tensor([False, True]))
            >>> loss.total.backward()
            >>> loss.retain_align.item()
            0.0
        """
        self._check_enabled()
        checks.warn_unaveraged(self.model, self.layers.values())
        batch = prepare(self.config, inputs, labels, forget, valid, self._device())
        inputs, labels, batch = self._teacher.retain_first(self._context, inputs, labels, batch)
        with self._one_batch(batch), self._prefix.shared(self._context):
            found = evaluate(
                self.model, self.names, self._context, inputs, labels, batch, remembered(self.layers),
                self._context.prediction_on(self._device()),
            )  # fmt: skip
        self._keep(found)
        return found.losses

    def _keep(self, found: Evaluation) -> None:
        rows = zip(self.names, found.terms.unbind(0), strict=True)
        keep(self.layers, self._context, found.means, {name: LayerTerms(*row.unbind(0)) for name, row in rows})
        if torch.is_grad_enabled():
            self._context.mean_prediction = found.mean_prediction

    @contextmanager
    def groups(self, forget: Tensor, valid: Tensor | None = None) -> Iterator[None]:
        """Context in which a forward of the model also records its alignment terms.

        Args:
            forget, valid: as :meth:`loss`; token inputs without `valid` count as all valid.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 3))
            >>> rfa = patch(net, ["0"], rank=2, gamma=1.0)
            >>> with rfa.groups(torch.tensor([False, True])):
            ...     logits = net(torch.ones(2, 4))
            ...     total = rfa.alignment_loss()
            >>> total.ndim
            0
        """
        self._check_enabled()
        tokens_by_input = getattr(unwrapped(self.model), "main_input_name", None) == "input_ids"
        by_token = token_units(self.config, tokens_by_input or (valid is not None and valid.ndim == 2))
        batch = make_batch(forget, valid, device=self._device(), token_units=by_token)
        with ExitStack() as stack:
            if self.config.mode == "teacher":
                hook = self.model.register_forward_pre_hook(self._before_student, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(self._one_batch(batch))
            stack.enter_context(self._prefix.shared(self._context))
            stack.callback(self._context.end)
            stack.push(lambda error, *_: self._context.clear() if error else None)
            self._context.begin(batch, remembered(self.layers))
            yield

    def alignment_loss(self) -> Tensor:
        """γ/m · eq. 4 of the forward that ran inside :meth:`groups`; a 0-dim tensor.

        Raises:
            ValueError: no forward ran, or an adapted layer did not run exactly once.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 3))
            >>> rfa = patch(net, ["0"], rank=2, seed=0)
            >>> with rfa.groups(torch.tensor([False, False])):
            ...     net(torch.ones(2, 4)).shape, rfa.alignment_loss().item()
            (torch.Size([2, 3]), 0.0)
        """
        self._check_live()
        retain, forget = alignment(self.names, self._context)
        means = {name: finite_mean(*found) for name, found in self._context.means.items()}
        keep(self.layers, self._context, means, self._context.terms)
        zero = torch.zeros_like(retain)
        terms = combine(
            retain, forget, zero, zero, layers=len(self.names), gamma=self.config.gamma, weights=self.config.weights
        )
        align = mark(terms, self.model, self._context).align
        self._context.clear()
        return self.config.gamma / len(self.names) * align

    def layer_losses(self) -> dict[str, LayerTerms]:
        """Retain and forget alignment of each adapted layer in the last loss: 0-dim tensors, detached.

        Example:
            >>> patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2).layer_losses()  # of no loss yet
            {}
        """
        return dict(self._context.losses)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the model is the original one, bit for bit.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 3))
            >>> x, before = torch.ones(1, 4), net(torch.ones(1, 4))
            >>> rfa = patch(net, ["0"], rank=2)
            >>> with rfa.disabled():
            ...     torch.equal(net(x), before)
            True
        """
        self._check_live()
        was, self._context.enabled = self._context.enabled, False
        try:
            yield
        finally:
            self._context.enabled = was

    def merge(self, dtype: torch.dtype | None = None) -> dict[str, float]:
        """Fold the adapters into the weights, `W' = W + sBA`, and give the layers their classes back.

        The sum is taken in fp32 (fp64 for fp64 weights) and cast once.

        Args:
            dtype: what the sum, and the whole model besides, is cast to; rounding into bf16 can undo the
                forgetting, `torch.float32` keeps it.

        Returns:
            Per layer `‖W' − (W + sBA)‖ / ‖sBA‖`, the share of the change lost to rounding (0 where
            the change is 0).

        Raises:
            FloatingPointError: an adapter holds NaN or infinity; nothing has been changed then.
            ValueError: a layer is sharded, pruned or parametrized by now; nothing has been changed then either.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 3))
            >>> patch(net, ["0"], rank=2).merge()
            {'0': 0.0}
        """
        self._check_live()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype")
        checks.restorable(self.model, self.layers)
        lost = fold_into_weights(self.layers, dtype)
        self._restore(keep_untied=True)
        if dtype is not None:
            self.model.to(dtype)
        warn_of_rounding(self.layers, lost)
        return lost

    def remove(self) -> None:
        """Take the adapters off: weights, classes, `requires_grad`, train flags as before; errors as :meth:`merge`.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 3))
            >>> patch(net, ["0"], rank=2).remove()
            >>> type(net[0]).__name__, net[0].weight.requires_grad
            ('Linear', True)
        """
        self._check_live()
        checks.restorable(self.model, self.layers)
        self._restore(keep_untied=False)

    def report(self) -> Report:
        """Adapted and skipped layers, with the reason for each; see :class:`rfa_fast.layer_report.Report`."""
        self._check_live()
        backend, why = backends.select(self.config.backend, next(iter(self.layers.values())).weight)
        return describe(self.model, self.plan, self.layers, f"{backend} ({why})")

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapters in PEFT's format; arguments, errors, example: :func:`rfa_fast.adapters.save_adapter`."""
        from rfa_fast.adapters import save_adapter

        self._check_live()
        return save_adapter(self, directory, overwrite=overwrite)

    def _before_student(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._context.enabled and not self._context.recording:
            record_teacher(self.model, self.names, self._context, args, kwargs)

    @contextmanager
    def _one_batch(self, batch: Batch) -> Iterator[None]:
        """Everything a batch runs in, but for the prefix, which may answer from a cache."""
        if self._context.batch is not None:
            raise ValueError("groups: got a second batch while one is under way, expected one at a time")
        with eval_behaviour(self.model), self._teacher.retain_alone(self._context, batch):
            yield

    def _check_enabled(self) -> None:
        self._check_live()
        if not self._context.enabled:
            raise ValueError("RFA: got a loss inside disabled(), where there are no adapters; leave that context first")
        checks.trainable(self.layers.values())

    def _restore(self, *, keep_untied: bool) -> None:
        for layer in self.layers.values():
            restore(layer)
        self._undo.restore(keep_untied=keep_untied)
        self._live = False

    def _device(self) -> torch.device:
        device: torch.device = next(iter(self.layers.values())).weight.device
        return device

    def _check_live(self) -> None:
        if not self._live:
            raise ValueError("RFA: got a handle whose adapters were merged or removed; call patch() again")

    def __repr__(self) -> str:
        state = f"{len(self.names)} layers" if self._live else "merged or removed"
        return f"RFA({type(self.model).__name__}, {state}, {self.config.adapter}, rank {self.config.rank})"
