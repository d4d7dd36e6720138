"""What the methods share that train the model's own weights instead of adapters.

They keep one copy of everything they may change: without it the model could not be put back. The same
copy is the frozen reference of the methods that need one (SCRUB, NPO, RMU and the competent teacher of
BadT): the live model runs once more with the copied tensors in place of its own, so a reference costs a
forward pass and nothing in memory, nor in a checkpoint, since a resumed run begins with the original
weights. What it costs against RFA is the optimizer's state: 8 bytes per trained parameter in fp32.

The paper's baselines train in train mode, with dropout and batch statistics; so do these, unless
`train_mode=False`. Each group of samples that a formula speaks of goes through the model alone wherever
the formula has only that group.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rfa_fast.files import save_tensors
from rfa_fast.forwards import running_statistics
from rfa_fast.head import is_encoder_decoder, logits_of, predicts_next_token
from rfa_fast.loss import eval_behaviour
from rfa_fast.methods.base import Batch, Method
from rfa_fast.methods.buffers import Buffers, copy_tensors
from rfa_fast.methods.losses import Rows, labelled_rows
from rfa_fast.methods.options import Option, complete, flag, placement
from rfa_fast.methods.placement import check_trainable, parameters_of
from rfa_fast.methods.start import named_state
from rfa_fast.padding import real_labels
from rfa_fast.undo import Undo

WEIGHTS_FILE = "weights.safetensors"
_ROUNDING = 0.1  # share of the change that a cast may lose without a word


class WeightsMethod(Method):
    """A method that trains weights; a subclass is its loss.

    Options of every such method:
        targets: `None` trains every parameter; otherwise the layers that :func:`rfa_fast.targets.select` takes
            (`"all"`, `"deep"`, …, a regex, a list of names), or `"head"`, the layer that gives the logits.
        train_mode: dropout and batch statistics while it trains. A batch norm that sees one sample alone
            keeps to its running statistics.
        shift_labels: a label `(B, T)` belongs to the position before it; `None`: for causal language models.

    Attributes:
        model: the model under way.
        options: complete.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "targets": Option(None, placement),
        "train_mode": Option(True, flag()),
        "shift_labels": Option(None, flag(optional=True)),
    }

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The complete options; see :meth:`rfa_fast.methods.base.Method.settings`."""
        return complete(cls.name, cls.OPTIONS, options)

    def __init__(self, model: nn.Module, *, seed: int, **options: Any) -> None:
        self.model, self.seed, self.options = model, seed, self.settings(options)
        names = self._trained()
        check_trainable(model, names)
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name] for name in names}
        self._held = Buffers(model, [name for name in named_state(model) if name not in parameters])
        self._originals = {name: t.detach().clone() for name, t in (self._parameters | self._buffers).items()}
        self._undo = Undo(model)
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        self._caching = {id(c): c for c in found if getattr(c, "use_cache", None) is True}
        model.requires_grad_(False)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        for config in self._caching.values():
            config.use_cache = False
        model.train(self.options["train_mode"])
        self.handle = self

    def _trained(self) -> list[str]:
        """Names of the parameters to train, before anything has been changed.

        Raises:
            ValueError, TypeError: as :func:`rfa_fast.targets.select`.
        """
        return parameters_of(self.model, self.options["targets"])

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that are there now."""
        return self._held.live()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, in the model's order."""
        return dict(self._parameters)

    def state_tensors(self) -> dict[str, Tensor]:
        """The trained parameters, and the buffers, which train mode changes."""
        return {name: t.detach() for name, t in (self._parameters | self._buffers).items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` returned.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing has been changed then.
        """
        current = {name: t.detach() for name, t in (self._parameters | self._buffers).items()}
        missing, unknown = sorted(set(current) - set(tensors)), sorted(set(tensors) - set(current))
        if missing or unknown:
            raise ValueError(f"tensors: missing {missing[:3]}, unknown {unknown[:3]}; expected those of this method")
        for name, tensor in current.items():
            if tensors[name].shape != tensor.shape:
                got, expected = tuple(tensors[name].shape), tuple(tensor.shape)
                raise ValueError(f"{name}: got shape {got}, expected {expected}")
        copy_tensors(current, tensors)

    def volatile_tensors(self) -> dict[str, Tensor]:
        """The buffers: batch norms note their statistics in every forward of train mode."""
        return {name: t.detach() for name, t in self._buffers.items()} if self.options["train_mode"] else {}

    def hand_over(self) -> None:
        """What is handed over at the end is in eval mode, merged or not."""
        self.model.eval()

    def layers(self) -> list[str]:
        """The modules whose parameters are trained, or whose statistics train mode moves.

        A parameter of the model itself goes by its own name.
        """
        trained, batch_statistics = self._trained_layers(), self.options["train_mode"]
        modules = dict(self.model.named_modules())
        norms = {n for n, m in modules.items() if getattr(m, "running_mean", None) is not None}
        changed = {*trained, *norms} if batch_statistics else {*trained}
        return [*(name for name in trained if name not in modules), *(name for name in modules if name in changed)]

    def _trained_layers(self) -> list[str]:
        return list(dict.fromkeys(name.rpartition(".")[0] or name for name in self._parameters))

    def save(self, folder: Path) -> None:
        """Write the trained parameters and the buffers as `weights.safetensors`, under their names in the model.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True)
        tensors = WeightsMethod.state_tensors(self)
        plain = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        save_tensors(plain, folder / WEIGHTS_FILE, {"method": self.name})

    def merge(self, dtype: torch.dtype | None = None) -> dict[str, float]:
        """Leave the weights in the model, cast to `dtype`, and give it its flags back.

        Returns:
            Per layer the share of its change that the cast has lost, `‖cast(W') − W'‖ / ‖W' − W‖`.
        """
        self._check_live()
        wide = torch.float64
        lost, size = (dict.fromkeys(self._trained_layers(), 0.0) for _ in range(2))
        if dtype is not None:
            for name, parameter in self._parameters.items():
                layer, now = name.rpartition(".")[0] or name, parameter.detach().to(wide)
                lost[layer] += float((now.to(dtype).to(wide) - now).square().sum())
                size[layer] += float((now - self._originals[name].to(wide)).square().sum())
        shares = {layer: (lost[layer] / size[layer]) ** 0.5 if size[layer] else 0.0 for layer in lost}
        self._restore()
        if dtype is not None:
            self.model.to(dtype)
        worst = max(shares, key=lambda name: shares[name])
        if shares[worst] > _ROUNDING:
            warnings.warn(
                f"merge: rounding into {dtype} lost {shares[worst]:.0%} of the change of {worst!r}, which can undo the "
                "forgetting; merge(dtype=torch.float32) keeps it",
                stacklevel=2,
            )
        return shares

    def remove(self) -> None:
        """Put every weight and buffer back, bit for bit."""
        self._check_live()
        copy_tensors(self._parameters, self._originals)
        self._held.restore(self._originals)
        self._restore()

    def _restore(self) -> None:
        self._undo.restore(keep_untied=False)
        for parameter in self._parameters.values():
            parameter.grad = None
        for config in self._caching.values():
            config.use_cache = True
        self._caching, self._originals, self.handle = {}, {}, None

    def _check_live(self) -> None:
        if self.handle is None:
            raise ValueError(f"{self.name}: got a method whose weights were merged or removed, expected a live one")

    def _part(self, batch: Batch, chosen: Tensor) -> Batch | None:
        """The chosen samples of a batch, `None` when there are none."""
        if bool(chosen.all()):
            return batch
        if not bool(chosen.any()):
            return None
        inputs = batch.inputs
        part = {k: v[chosen] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[chosen]
        return Batch(part, batch.labels[chosen], batch.forget[chosen])

    def _rows(self, batch: Batch) -> Rows:
        """What the model under training says of a batch."""
        with running_statistics(self.model) if len(batch.forget) == 1 else nullcontext():
            output = call(self.model, batch.inputs)
        return self._labelled(output, batch)

    @torch.no_grad()
    def _reference_rows(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Rows:
        """What the original model says of a batch, or the model with other weights."""
        return self._labelled(self._reference(batch, weights), batch)

    @torch.no_grad()
    def _reference(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> object:
        """The output of the original model (or of other weights), in eval behaviour."""
        tensors, inputs = dict(self._originals if weights is None else weights), batch.inputs
        with eval_behaviour(self.model):
            if isinstance(inputs, dict):
                return functional_call(self.model, tensors, (), inputs)
            return functional_call(self.model, tensors, (inputs,))

    def _labelled(self, output: object, batch: Batch) -> Rows:
        shift = self.options["shift_labels"]
        shift = predicts_next_token(self.model) if shift is None else shift
        another = is_encoder_decoder(self.model)
        labels = real_labels(batch.inputs, batch.labels, shift=shift, encoder_decoder=another)
        return labelled_rows(logits_of(output), labels, batch.forget, shift=shift)

    def _no_step(self, batch: Batch, *names: str) -> dict[str, Tensor]:
        """The loss of a batch without the samples that it is about: exact zeros that reach no parameter."""
        zero = torch.zeros((), device=batch.labels.device)
        return {"total": zero.clone().requires_grad_(True), **dict.fromkeys(names, zero)}


def call(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> object:
    """The model's output on a tensor, or on keyword arguments.

    Example:
        >>> call(nn.Identity(), torch.ones(2))
        tensor([1., 1.])
    """
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
