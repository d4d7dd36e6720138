"""`rfa_fast::head_loss`: eq. 3 from hidden states, without ever holding all the logits.

A frozen head is walked once. Its labelled rows are compacted with the retain rows in front, so that ỹ is
complete when the first forget row is reached, and each chunk's gradient is taken while its logits are
there: written over them, and multiplied with the weight at once. What remains for autograd is the
gradient of the hidden states, which the backward scales row by row. Against keeping the batch's order and
taking ỹ's share out of every forget row at the end (p W − ỹW), this subtracts before the gradient is
rounded to 16 bits, which is what counts once p is near ỹ; and a softcap needs no second pass.

A head with parameters to train, adapters or its own, needs the gradient of its logits in the backward: its
chunks are walked under checkpoint, once without gradient for ỹ and once for the sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rfa_fast.config import Norm
from rfa_fast.objective import IGNORE, RETAIN, group_mean
from rfa_fast.ops.gradients import differentiable_once, trained
from rfa_fast.ops.linear import linear
from rfa_fast.ops.plain import HeadResult
from rfa_fast.ops.registration import register
from rfa_fast.ops.rows import autocast
from rfa_fast.ops.task import HOST, LAUNCHERS, PROBABILITY_SUMS, TASK_SUMS, Rowwise, roles, row_weights

# A vocabulary's probabilities lie below what fp16 resolves, where torch would have the loss scale on them already.
# A row's gradient is at most twice the largest weight, so there is room.
FP16_LIFT = 256.0
BLOCK = 128  # of the vocabulary, skipped or not as a whole


class Head(NamedTuple):
    """The results of the operator.

    Attributes:
        retain, forget: cross-entropy sums, 0-dim fp32.
        retain_count, forget_count: labelled rows, 0-dim int64.
        soft_label: ỹ `(V,)` fp32.
        hidden_gradient: `(rows, K)`, each row's own loss differentiated, times :func:`_lift`; empty if not asked for.
    """

    retain: Tensor
    forget: Tensor
    retain_count: Tensor
    forget_count: Tensor
    soft_label: Tensor
    hidden_gradient: Tensor


def _lift(dtype: torch.dtype) -> float:
    return FP16_LIFT if dtype == torch.float16 else 1.0


def _rows_per_chunk(chunk_bytes: int, classes: int, dtype: torch.dtype) -> int:
    """As many as fit; of more than 64 a multiple of it, which is what matrix products like."""
    rows = max(1, chunk_bytes // (dtype.itemsize * classes))
    return rows - rows % 64 if rows > 64 else rows


def _walk(
    rowwise: Rowwise, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, group: Tensor,
    fallback: Tensor | None, softcap: float | None, chunk_bytes: int, skip: float, needs_gradient: bool,
) -> Head:  # fmt: skip
    """One pass over the labelled rows, the retain rows first; only compacting them waits for the device."""
    kept, forgotten = roles(labels, group)
    kept_rows, forgotten_rows = kept.nonzero().squeeze(1), forgotten.nonzero().squeeze(1)
    rows, retained = torch.cat([kept_rows, forgotten_rows]), kept_rows.shape[0]
    size = _rows_per_chunk(chunk_bytes, weight.shape[0], hidden.dtype)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    retain, forget, shares = torch.zeros((), **fp32), torch.zeros((), **fp32), torch.zeros(weight.shape[0], **fp32)
    gradient = torch.zeros_like(hidden) if needs_gradient else hidden.new_empty(0)
    lift = _lift(hidden.dtype)

    def score(logits: Tensor, part: Tensor, soft_label: Tensor | None) -> Tensor:
        """Sum of the rows' losses; leaves their gradient in the logits, and those without ỹ their share in it."""
        codes, counts_for_mean = (labels[part], group[part]), soft_label is None
        if needs_gradient:
            loss, sums = rowwise.scored(logits, *codes, soft_label, lift, softcap, counts_for_mean)
        else:
            lse, loss = rowwise.stats(logits, *codes, soft_label, softcap)
            sums = rowwise.sums(logits, lse, *codes, softcap) if counts_for_mean else None
        if sums is not None:
            shares.add_(sums)
        return loss.sum()

    soft_label = None
    buffer = hidden.new_empty(min(size, rows.shape[0]), weight.shape[0])  # of every chunk's logits
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        split = min(max(retained - start, 0), part.shape[0])
        logits = buffer[: part.shape[0]]
        if bias is None:
            torch.mm(hidden[part], weight.mT, out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.mT, out=logits)
        if split:
            retain += score(logits[:split], part[:split], None)
        if split < part.shape[0]:
            soft_label = _mean(shares, retained, fallback) if soft_label is None else soft_label
            forget += score(logits[split:], part[split:], soft_label)
        if needs_gradient:
            gradient.index_copy_(0, part, _backward_product(logits, weight, skip))
    soft_label = _mean(shares, retained, fallback) if soft_label is None else soft_label
    return Head(retain, forget, kept.sum(), forgotten.sum(), soft_label, gradient)


def _backward_product(gradient: Tensor, weight: Tensor, skip: float) -> Tensor:
    """dX = dZ · W `(m, K)`; with `skip`, without the blocks of the vocabulary where dZ is next to nothing."""
    whole = weight.shape[0] // BLOCK * BLOCK
    if not skip or not whole or not gradient.shape[0]:
        return gradient @ weight
    blocks, rest = gradient[:, :whole].view(gradient.shape[0], -1, BLOCK), gradient[:, whole:]
    used = _used(blocks, rest, skip)
    if used.shape[0] == blocks.shape[1]:
        return gradient @ weight
    kept = weight[:whole].reshape(-1, BLOCK, weight.shape[1])[used].flatten(0, 1)
    product = blocks[:, used].flatten(1) @ kept
    return product.addmm_(rest, weight[whole:]) if rest.shape[1] else product


def _used(blocks: Tensor, rest: Tensor, skip: float) -> Tensor:
    """Which blocks `(m, blocks, BLOCK)` of dZ are not next to nothing, `(used,)`; `rest` is behind the last of them.

    Next to nothing is at most `skip` times the largest entry of its row, in every row; a NaN is not.
    """
    low, high = blocks.aminmax(dim=2)
    size = torch.maximum(-low, high)
    largest = size.amax(1, keepdim=True)
    if rest.shape[1]:
        largest = torch.maximum(largest, rest.abs().amax(1, keepdim=True))
    return (~(size <= skip * largest)).any(0).nonzero().squeeze(1)


def _mean(shares: Tensor, retained: int, fallback: Tensor | None) -> Tensor:
    """ỹ; zeros, and with them an exact 0 for every forget row, where nothing is known."""
    if retained or fallback is None:
        return shares / max(1, retained)
    return fallback.to(torch.float32, copy=True)


def _launchers(*args: Any) -> Head:
    # Nothing traces an opaque operator's inside, and a launch through wrap_triton costs about a millisecond.
    with set_wrap_triton_enabled(False):
        return _walk(LAUNCHERS, *args)


def _host(*args: Any) -> Head:
    return _walk(HOST, *args)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, group: Tensor, fallback: Tensor | None,
    softcap: float | None, chunk_bytes: int, skip: float, needs_gradient: bool,
) -> Head:  # fmt: skip
    sums = [torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(2)]
    counts = [torch.empty((), dtype=torch.int64, device=hidden.device) for _ in range(2)]
    soft_label = torch.empty(weight.shape[0], dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden) if needs_gradient else hidden.new_empty(0)
    return Head(sums[0], sums[1], counts[0], counts[1], soft_label, gradient)


_HEAD = register(
    "head_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor group, Tensor? fallback, float? softcap, "
    "int chunk_bytes, float skip, bool needs_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launchers=_launchers,
    host=_host,
    fake=_fake,
    opaque=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out = Head(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.soft_label, out.hidden_gradient)
    ctx.save_for_backward(out.hidden_gradient, inputs[3], inputs[4])


@differentiable_once
def _backward(ctx: Any, retain: Tensor | None, forget: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    gradient, labels, group = ctx.saved_tensors
    weights = row_weights(retain, forget, labels, group) / _lift(gradient.dtype)
    return (gradient * weights[:, None]).to(gradient.dtype), *([None] * 9)


_HEAD.register_autograd(_backward, setup_context=_setup_context)

_HEAD_IN_TORCH = register(
    "head_loss_torch",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor group, Tensor? fallback, float? softcap, "
    "int chunk_bytes, float skip, bool needs_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launchers=_host,
    host=_host,
    fake=_fake,
    opaque=True,
)
_HEAD_IN_TORCH.register_autograd(_backward, setup_context=_setup_context)


def frozen_head_loss(
    backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, group: Tensor, bias: Tensor | None,
    softcap: float | None, fallback: Tensor | None, chunk_bytes: int, skip: float,
) -> HeadResult:  # fmt: skip
    """The loss of a head that only passes gradients on, in one walk; arguments are taken as checked."""
    fallback = None if fallback is None else fallback.detach()
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    operator = _HEAD if backend == "triton" else _HEAD_IN_TORCH
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    out = Head(*operator(hidden, weight, bias, labels, group, fallback, softcap, chunk_bytes, skip, needs_gradient))
    return out.retain, out.forget, out.retain_count, out.forget_count, out.soft_label, None, None


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    softcap: float | None,
    fallback: Tensor | None,
    target: Tensor | None,
    norm: Norm,
    chunk_bytes: int,
    *,
    skip: float,
) -> HeadResult:
    """The loss of :func:`rfa_fast.functional.rfa_head_loss` on fused kernels; arguments are taken as checked."""
    if lora_a is None and not trained(weight, bias):
        return frozen_head_loss("triton", hidden, weight, labels, group, bias, softcap, fallback, chunk_bytes, skip)
    fallback = None if fallback is None else fallback.detach()
    return _trained_head(
        hidden, weight, labels, group, bias, lora_a, lora_b, scale, softcap, fallback, target, norm, chunk_bytes
    )


def _trained_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: Tensor, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scale: float, softcap: float | None, fallback: Tensor | None, target: Tensor | None,
    norm: Norm, chunk_bytes: int,
) -> HeadResult:  # fmt: skip
    size = _rows_per_chunk(chunk_bytes, weight.shape[0], hidden.dtype)
    single, aligned = hidden.shape[0] <= size, group
    if lora_a is not None and target is None and not single:
        mean, usable = group_mean(hidden, group, (0,))
        with torch.no_grad():
            target = F.linear(mean.to(weight.dtype), weight, bias)
        aligned = torch.where(usable | (group == RETAIN), group, IGNORE)

    def logits_of(part: slice, codes: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = hidden[part]
        if lora_a is None or lora_b is None:
            return F.linear(x, weight, bias), None, None
        logits, _, retain, forget = linear(
            x, weight, lora_a, lora_b, bias, scale, codes, target, None, norm, False, False
        )
        return logits, retain, forget

    def sums_of(part: slice, soft_label: Tensor) -> tuple[Tensor, ...]:
        logits, *alignment = logits_of(part, aligned[part])
        retain, forget, _ = TASK_SUMS(logits, labels[part], group[part], soft_label, softcap)
        return retain, forget, *(term for term in alignment if term is not None)

    kept, forgotten = roles(labels, group)
    count, forgotten_count = kept.sum(), forgotten.sum()

    def soft_label_of(shares: Tensor) -> Tensor:
        other = torch.zeros_like(shares) if fallback is None else fallback.to(shares)
        return torch.where(count > 0, shares / count.clamp(min=1), other)

    if single:
        logits, retain_align, forget_align = logits_of(slice(None), aligned)
        soft_label = soft_label_of(PROBABILITY_SUMS(logits.detach(), labels, group, softcap))
        retain, forget, _ = TASK_SUMS(logits, labels, group, soft_label, softcap)
        return retain, forget, count, forgotten_count, soft_label, retain_align, forget_align
    # Counted first: a range that steps to the number of rows would fix that number under torch.compile.
    parts = [slice(i * size, (i + 1) * size) for i in range((hidden.shape[0] + size - 1) // size)]
    with torch.no_grad():
        shares = [PROBABILITY_SUMS(logits_of(p, None)[0], labels[p], group[p], softcap) for p in parts]
        soft_label = soft_label_of(torch.stack(shares).sum(0))
    walked = [checkpoint(sums_of, p, soft_label, use_reentrant=False) for p in parts]
    retain, forget, *alignment = (torch.stack(column).sum() for column in zip(*walked, strict=True))
    retain_align, forget_align = alignment or (None, None)
    return retain, forget, count, forgotten_count, soft_label, retain_align, forget_align
