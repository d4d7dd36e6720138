"""Cases for the head's loss, and what of a run is compared."""

from __future__ import annotations

import torch
from operator_cases import group_of, leaf

from rfa_fast.functional import rfa_head_loss

# What there is to train: nothing, adapters of the head, or the head itself.
HEADS = ["frozen", "adapted", "trained"]


def head_case(rows, k, v, *, head="frozen", bias=True, kind="mixed", seed=0):
    """Tensors in float64, and labels and group codes; a forget row's label is no class."""
    tensors = {"hidden": leaf(rows, k, seed=seed), "weight": leaf(v, k, seed=seed + 1)}
    if bias:
        tensors["bias"] = leaf(v, seed=seed + 2)
    for name in ("weight", "bias"):
        if name in tensors and head != "trained":
            tensors[name] = tensors[name].detach()
    if head == "adapted":
        tensors |= {"lora_a": leaf(3, k, seed=seed + 3), "lora_b": leaf(v, 3, seed=seed + 4)}
    generator = torch.Generator().manual_seed(seed + 5)
    group = group_of(rows, kind, seed)
    labels = torch.randint(0, v, (rows,), generator=generator)
    labels[(group == 1) & (torch.rand(rows, generator=generator) < 0.5)] = 10**9
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    return tensors, labels, group


def run_head(tensors, labels, group, **options):
    """Everything the operator returns, and the gradient of a mixture of its losses."""
    tensors = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in tensors.items()}
    out = rfa_head_loss(tensors["hidden"], tensors["weight"], labels, group, **others(tensors), **options)
    total = 0.7 * out.retain + 0.4 * out.forget
    results = out._asdict()
    if out.retain_align is not None:
        total = total + 0.01 * out.retain_align + 0.02 * out.forget_align
    wanted = {k: v for k, v in tensors.items() if v.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()))
    results |= {f"grad {k}": g for k, g in zip(wanted, grads, strict=True)}
    return {k: v for k, v in results.items() if v is not None}


def others(tensors):
    return {k: v for k, v in tensors.items() if k not in ("hidden", "weight")}
