"""The layers that `patch` puts in: the frozen layer itself, with A, B and the alignment terms beside it.

A layer is adapted by the class it is given (:mod:`rfa_fast.swap`). No mathematics happens here: operators come from
:mod:`rfa_fast.functional`, group codes from :mod:`rfa_fast.groups`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_fast import functional
from rfa_fast.checkpointing import note_region, replayed, runs_again
from rfa_fast.groups import GroupContext, LayerTerms, flat_rows
from rfa_fast.objective import (
    FORGET,
    IGNORE,
    RETAIN,
    accumulation_dtype,
    alignment_sums,
    dora_residual_weight,
    group_mean,
    units_and_elements,
    weight_norms,
)
from rfa_fast.ops.retain_rows import original_output


class RFALayer(nn.Module):
    """What the adapted layers have in common.

    Attributes:
        weight, bias: the frozen layer's own.
        lora_a: A `(R, K)`, or `(groups·R, C/groups, kh, kw)`; trainable.
        lora_b: B `(N, R)`, or `(N, R, 1, 1)`; trainable.
        magnitude: DoRA's g `(N,)`; trainable.
        initial_a, initial_b: PiSSA's A₀ and B₀; buffers.
        rfa_name, rank, alpha, scale, adapter: plain attributes.
    """

    weight: Any
    bias: Any
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter
    initial_a: Tensor
    initial_b: Tensor
    feature_mean: Tensor | None
    feature_mean_known: Tensor | None
    rfa_name: str
    rank: int
    alpha: float
    scale: float
    adapter: str
    rfa_original_class: type[nn.Module]
    rfa_context: GroupContext
    rfa_ambiguous: bool

    def forward(self, x: Tensor) -> Tensor:
        """y = x' + Δ; with a batch under way, also hand the alignment terms to the context."""
        context = self.rfa_context
        if context.recording:
            feature = self._original(x, context)
            context.calls[self.rfa_name] = context.calls.get(self.rfa_name, 0) + 1
            context.teacher[self.rfa_name] = feature
            return feature
        if not context.enabled:
            plain: Tensor = self.rfa_original_class.forward(self, x)
            return plain
        if context.batch is not None:
            if not torch.compiler.is_compiling():
                note_region(context, self.rfa_name)
            return self._aligned(x, context)
        if not torch.compiler.is_compiling() and runs_again(context):
            with replayed(context):
                return self._aligned(x, context)
        return self._operate(x, None, None, None, per_sample=False).output

    def _aligned(self, x: Tensor, context: GroupContext) -> Tensor:
        batch, name = context.batch, self.rfa_name
        if batch is None:
            raise ValueError(f"layer {name!r}: no batch is under way")
        leading = x.shape[:1] if self._is_convolution() else x.shape[:-1]
        layout = context.layout(name, tuple(leading), ambiguous=self.rfa_ambiguous)
        size, codes = batch.size, layout.group
        if layout.view == "flat" and self._is_convolution():
            codes = flat_rows(size, x.shape[0], codes)
        batch_first = self._batch_first(x, layout.view, size)
        per_sample = not batch.token_units or self._is_convolution()
        frozen_feature = self._teacher_feature(context)
        if frozen_feature is not None:
            frozen_feature = self._batch_first(frozen_feature, layout.view, size)
        inside = batch.token_units and frozen_feature is None
        found = self._with_own_mean(batch_first, codes, per_sample) if inside else None
        if found is not None:
            out, known = found
            aimed = torch.where(known | (codes == RETAIN), codes, IGNORE)
        else:
            target, known = self._target(batch_first, frozen_feature, codes, batch.token_units)
            if known.ndim and codes.ndim == 1:
                codes = codes[:, None].expand(-1, known.shape[0])
            aimed = torch.where(known | (codes == RETAIN), codes, IGNORE)
            out = self._operate(batch_first, aimed, target, frozen_feature, per_sample=per_sample)
        if out.retain_loss is None or out.forget_loss is None:
            raise ValueError(f"layer {name!r}: the operator returned no loss for its group")
        self.report(
            out.retain_loss, out.forget_loss, codes, aimed, out.output.shape, by_token=layout.by_token,
            per_sample=per_sample,
        )  # fmt: skip
        return self._restored(out.output, layout.view, x)

    def _teacher_feature(self, context: GroupContext) -> Tensor | None:
        """x'_t of teacher mode; it is let go unless a checkpointed block will ask for it again.

        Raises:
            ValueError: the original model did not run for this forward.
        """
        if context.config.mode != "teacher":
            return None
        if torch.compiler.is_compiling() or context.checkpointed or context.silent:
            feature = context.teacher.get(self.rfa_name)
        else:
            feature = context.teacher.pop(self.rfa_name, None)
        if feature is None:
            raise ValueError(
                f"layer {self.rfa_name!r}: got a forward without the original model's before it, which teacher mode "
                "aligns with; expected the patched model itself to be called inside groups(), not its forward() or a "
                "part of it"
            )
        return feature

    def report(
        self, retain: Tensor, forget: Tensor, codes: Tensor, aimed: Tensor, shape: Sequence[int], *, by_token: bool,
        per_sample: bool = False,
    ) -> None:  # fmt: skip
        """Hand the sums over each group to the context, as means.

        Args:
            codes, aimed: of the retain and of the forget sum.
            shape: of the feature.
            by_token: the codes are those of tokens.
        """
        context, norm = self.rfa_context, self.rfa_context.config.norm
        retain = retain / units_and_elements(codes, shape, RETAIN, norm=norm, per_sample=per_sample)
        forget = forget / units_and_elements(aimed, shape, FORGET, norm=norm, per_sample=per_sample)
        if context.batch is not None and context.batch.whole is not None:
            whole = context.batch.whole
            tokens = by_token and not (per_sample and norm == "l2")
            counts, own = (whole.tokens, codes) if tokens else (whole.samples, context.batch.samples)
            retain = retain * whole.share(counts, own, RETAIN, retain.dtype)
            forget = forget * whole.share(counts, own, FORGET, forget.dtype)
        context.report(self.rfa_name, LayerTerms(retain, forget))

    def target(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """x̃ `(N,)` of rows `(rows, K)`, of this batch or of one before, and whether it is known, 0-dim."""
        return self._target(hidden, None, codes, True)

    def _target(self, x: Tensor, teacher: Tensor | None, codes: Tensor, token_units: bool) -> tuple[Tensor, Tensor]:
        """x̃ of this batch, or of the most recent one that had retain rows; and for which codes it is known."""
        with torch.no_grad():
            source = x if teacher is None else teacher
            spatial = self._is_convolution()
            dims = (0,) if spatial or not token_units else tuple(range(x.ndim - 1))
            fresh, usable = group_mean(source, codes, dims)
            if teacher is None:
                fresh = self._frozen(fresh.to(x.dtype)[None] if spatial else fresh.to(x.dtype))
                fresh = fresh[0] if spatial else fresh
            if spatial and token_units:
                fresh = fresh.mean((-2, -1), keepdim=True)
            stored, stored_known = self.rfa_context.memory.get(self.rfa_name, (None, None))
            if stored is not None and stored_known is not None and stored.shape == fresh.shape:
                target, known = torch.where(usable, fresh, stored.to(fresh)), usable | stored_known
            else:
                target, known = torch.where(usable, fresh, 0), usable
                if stored is not None and self.rfa_context.expects_gradient and not torch.compiler.is_compiling():
                    self.rfa_context.note_other_shape(self.rfa_name, self.rfa_context.batch)
            self.rfa_context.means[self.rfa_name] = (target, known)
            return target, known.reshape(known.shape[:1]) if known.numel() > 1 else known.reshape(())

    def _operate(
        self, x: Tensor, group: Tensor | None, target: Tensor | None, teacher: Tensor | None, *, per_sample: bool
    ) -> functional.RFAOutput:
        """Run the layer's operator on a batch-first input.

        LoRA has a fused operator. PiSSA and DoRA form Δ itself, for which there is no r × r shortcut.
        PiSSA's `BA − B₀A₀` is taken as `(B − B₀)A + B₀(A − A₀)`: an exact 0 at the start, and nothing
        cancels in the dtype of x.
        """
        if self.adapter == "lora":
            return self._fused(x, group, target, teacher, per_sample)
        frozen = self._frozen(x)
        if self.adapter == "dora":
            residual = self._product(x, self.delta_weight().to(x.dtype))
        else:
            wide = torch.promote_types(accumulation_dtype(x.dtype), self.lora_a.dtype)
            a, b = self.lora_a.to(wide), self.lora_b.to(wide)
            a0, b0 = self.initial_a.to(wide), self.initial_b.to(wide)
            moved_b = self._pair(x, a.to(x.dtype), (b - b0).to(x.dtype))
            residual = self.scale * (moved_b + self._pair(x, (a - a0).to(x.dtype), b0.to(x.dtype)))
        if group is None:
            return functional.RFAOutput(frozen + residual, None, None, None)
        sums = alignment_sums(
            frozen, residual, group, target=target, retain_target=teacher, norm=self.rfa_context.config.norm,
            per_sample=per_sample,
        )  # fmt: skip
        return functional.RFAOutput(frozen + residual, None, *sums)

    def effective_adapters(self) -> tuple[Tensor, Tensor]:
        """A and B as one low-rank pair: with PiSSA `[A; A₀]` and `[B, −B₀]`, of rank 2r."""
        if self.adapter != "pissa":
            return self.lora_a, self.lora_b
        groups = self._groups()
        a = torch.stack([t.reshape(groups, -1, *t.shape[1:]) for t in (self.lora_a, self.initial_a)], 1)
        return a.flatten(1, 2).flatten(0, 1), torch.cat([self.lora_b, -self.initial_b], 1)

    def delta_weight(self) -> Tensor:
        """The change of the weight, `sBA` or its PiSSA or DoRA form.

        Returns:
            Tensor in the layout of `weight`, in fp32 (fp64 when the weight or the adapters are fp64);
            differentiable with respect to the adapters.
        """
        wide = torch.promote_types(accumulation_dtype(self.weight.dtype), self.lora_a.dtype)
        a, b = self.lora_a.to(wide), self.lora_b.to(wide)
        if self.adapter == "pissa":
            a0, b0 = self.initial_a.to(wide), self.initial_b.to(wide)
            product = self._dense(a, b - b0) + self._dense(a - a0, b0)
        else:
            product = self._dense(a, b)
        if self.adapter == "dora":
            product = dora_residual_weight(self._rows_weight().to(wide), product, self.magnitude.to(wide))
        return self._from_rows(product)

    def _dense(self, a: Tensor, b: Tensor) -> Tensor:
        """sBA with outputs first, group by group."""
        down = a.reshape(self._groups(), -1, a[0].numel())
        up = b.reshape(self._groups(), -1, b.shape[1])
        return (self.scale * (up @ down)).reshape(self._rows_weight().shape)

    def initialise_adapters(self, generator: torch.Generator | None, dtype: torch.dtype) -> None:
        """Create A and B (and what PiSSA and DoRA add), so that Δ starts at exactly 0.

        LoRA draws A from the Kaiming-uniform distribution with `a = √5` and sets B to 0
        (arXiv 2106.09685); PiSSA takes the principal singular vectors of W for both and subtracts
        their start (arXiv 2404.02948).
        """
        rows = self._rows_weight().detach()
        groups, fan_in = self._groups(), rows[0].numel()
        shape_a = (groups * self.rank, *rows.shape[1:])
        shape_b = (rows.shape[0], self.rank, *((1, 1) if rows.ndim == 4 else ()))
        if self.adapter == "pissa":
            wide = rows.to(accumulation_dtype(rows.dtype)).reshape(groups, -1, fan_in)
            u, s, vt = torch.linalg.svd(wide, full_matrices=False)
            root = (s[:, : self.rank] / self.scale).sqrt()
            a = (root[:, :, None] * vt[:, : self.rank]).reshape(shape_a).to(dtype)
            b = (u[:, :, : self.rank] * root[:, None]).reshape(shape_b).to(dtype)
            self.register_buffer("initial_a", a.clone())
            self.register_buffer("initial_b", b.clone())
        else:
            bound = 1.0 / math.sqrt(fan_in)
            a = (
                (torch.rand(shape_a, generator=generator, dtype=torch.float32) * 2 - 1)
                .mul_(bound)
                .to(rows.device, dtype)
            )
            b = torch.zeros(shape_b, device=rows.device, dtype=dtype)
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        if self.adapter == "dora":
            wide_dtype = torch.promote_types(accumulation_dtype(rows.dtype), dtype)
            self.magnitude = nn.Parameter(weight_norms(rows.to(wide_dtype)).to(wide_dtype))

    def _is_convolution(self) -> bool:
        return False

    def _groups(self) -> int:
        return 1

    def _rows_weight(self) -> Tensor:
        """The weight with outputs first: `(N, K)` or `(N, C/groups, kh, kw)`."""
        weight: Tensor = self.weight
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def _original(self, x: Tensor, context: GroupContext) -> Tensor:
        """x'_t: on a CPU, of a plain linear layer, as far as there are samples to retain."""
        batch = context.batch
        if self.rfa_original_class is nn.Linear and not self.rfa_ambiguous and batch is not None:
            output = original_output(x, self.weight, self.bias, batch.needed)
            if output is not None:
                return output
        return self._frozen(x)

    def _frozen(self, x: Tensor) -> Tensor:
        frozen: Tensor = self.rfa_original_class.forward(self, x)
        return frozen

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with another weight (in the layout of `weight`) and no bias."""
        return F.linear(x, weight)

    def _pair(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B·A·x without the scale."""
        return F.linear(F.linear(x, a), b)

    def _fused(
        self, x: Tensor, group: Tensor | None, target: Tensor | None, teacher: Tensor | None, per_sample: bool
    ) -> functional.RFAOutput:
        config = self.rfa_context.config
        return functional.rfa_linear(
            x, self._rows_weight(), self.lora_a, self.lora_b, self.bias, scale=self.scale, group=group, target=target,
            retain_target=teacher, norm=config.norm, unit="sample" if per_sample else "row", backend=config.backend,
        )  # fmt: skip

    def _with_own_mean(self, x: Tensor, codes: Tensor, per_sample: bool) -> tuple[functional.RFAOutput, Tensor] | None:
        if self._is_convolution() or self.adapter != "lora":
            return None
        config, (stored, known) = self.rfa_context.config, self.rfa_context.memory.get(self.rfa_name, (None, None))
        remembered = stored is not None and known is not None and stored.shape == self._rows_weight().shape[:1]
        found = functional.rfa_linear_and_mean(
            x, self._rows_weight(), self.lora_a, self.lora_b, self.bias, scale=self.scale, group=codes,
            fallback=stored if remembered else None, fallback_known=known if remembered else None, norm=config.norm,
            unit="sample" if per_sample else "row", backend=config.backend,
        )  # fmt: skip
        if found is None:
            return None
        usable = (codes == RETAIN).any()
        usable = usable | known.reshape(()) if remembered and known is not None else usable
        # A tensor of its own: torch.compile hands no result of an autograd function out of a checkpointed block.
        self.rfa_context.means[self.rfa_name] = (found[1].clone(), usable)
        return found[0], usable

    def _batch_first(self, x: Tensor, view: str, size: int) -> Tensor:
        if view == "sequence_first":
            return x.transpose(0, 1)
        if view == "flat" and not self._is_convolution():
            return x.reshape(size, -1, *x.shape[1:])
        return x

    def _restored(self, y: Tensor, view: str, x: Tensor) -> Tensor:
        if view == "sequence_first":
            return y.transpose(0, 1)
        return y.flatten(0, 1) if y.ndim > x.ndim else y


class RFALinear(RFALayer, nn.Linear):
    """An adapted :class:`torch.nn.Linear`."""


class RFAConv1D(RFALayer):
    """An adapted `transformers.pytorch_utils.Conv1D` (GPT-2's linear, its weight stored as `(K, N)`)."""

    def _rows_weight(self) -> Tensor:
        transposed: Tensor = self.weight.t()
        return transposed

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t()

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class RFAConv2d(RFALayer, nn.Conv2d):
    """An adapted :class:`torch.nn.Conv2d`, ungrouped or adapted group by group; an image alone is a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim != 3 else super().forward(x[None])[0]

    def _is_convolution(self) -> bool:
        return True

    def _groups(self) -> int:
        return self.groups

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        padded, padding = self._padded(x)
        return F.conv2d(padded, weight, None, self.stride, padding, self.dilation, self.groups)

    def _pair(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(self._product(x, a), b, groups=self.groups)

    def _fused(
        self, x: Tensor, group: Tensor | None, target: Tensor | None, teacher: Tensor | None, per_sample: bool
    ) -> functional.RFAOutput:
        padded, padding = self._padded(x)
        config = self.rfa_context.config
        return functional.rfa_conv2d(
            padded, self.weight, self.lora_a, self.lora_b, self.bias, scale=self.scale, stride=self.stride,
            padding=padding, dilation=self.dilation, groups=self.groups, group=group, target=target,
            retain_target=teacher, norm=config.norm, backend=config.backend,
        )  # fmt: skip
