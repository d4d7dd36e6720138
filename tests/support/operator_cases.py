"""Cases for the operators, and the rule they are judged by; imported by the tests of every backend."""

from __future__ import annotations

import pytest
import torch

LINEAR_SHAPES = [
    pytest.param((1, 1, 1), 1, id="all-one"),
    pytest.param((7, 13, 5), 3, id="odd"),
    pytest.param((33, 64, 65), 8, id="rank-8"),
    pytest.param((5, 130, 127), 64, id="rank-64"),
]


def leaf(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def group_of(n, kind, seed=0):
    if kind == "mixed":
        return torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return torch.full((n,), {"retain": 0, "forget": 1, "ignored": -1}[kind], dtype=torch.int8)


def run(operator, tensors, weights=(0.7, 0.3), **options):
    """Outputs and gradients of a scalar that mixes the output with both losses."""
    tensors = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in tensors.items()}
    out = operator(**tensors, **options)
    total = (out.output.double() * torch.linspace(-1, 1, out.output.numel()).reshape(out.output.shape)).sum()
    total = total + weights[0] * out.retain_loss + weights[1] * out.forget_loss
    wanted = {k: v for k, v in tensors.items() if k in ("x", "lora_a", "lora_b")}
    grads = torch.autograd.grad(total, list(wanted.values()))
    results = {"output": out.output, "retain": out.retain_loss, "forget": out.forget_loss}
    return {**results, **{f"grad {k}": g for k, g in zip(wanted, grads, strict=True)}}


def assert_error_rule(ours, same_dtype, exact, working):
    """err(ours, fp64) ≤ 2 · err(torch in the same dtype, fp64) + tiny, in maximum and RMS.

    `tiny` is half a unit in the last place of the working dtype (eight of fp32, the sums' own) at the
    size of the truth: the rival's error of a scalar can be 0 by luck, not by right.
    """
    for name, truth in exact.items():
        value, rival = ours[name].double(), same_dtype[name].double()
        assert value.shape == truth.shape
        assert bool(torch.isfinite(value).all()), name
        tiny = max(torch.finfo(working).eps / 2, 8 * torch.finfo(torch.float32).eps) * float(truth.detach().abs().max())
        for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            mine, theirs = (float(measure((v - truth).detach())) for v in (value, rival))
            assert mine <= 2 * theirs + tiny, (name, mine, theirs, tiny)


def linear_case(shape, rank, dtype):
    m, k, n = shape
    return {
        "x": leaf(m, k, seed=1), "weight": leaf(n, k, seed=2).detach(), "lora_a": leaf(rank, k, seed=3),
        "lora_b": leaf(n, rank, seed=4), "bias": leaf(n, seed=5).detach(),
    }  # fmt: skip


CONVOLUTIONS = [
    pytest.param({}, (3, 3), id="plain"),
    pytest.param({"stride": 2, "padding": 1}, (3, 3), id="stride"),
    pytest.param({"padding": "same"}, (2, 4), id="same-even-kernel"),
    pytest.param({"padding": (2, 1), "dilation": (2, 1)}, (3, 3), id="dilation"),
    pytest.param({"groups": 2, "padding": 1}, (3, 3), id="groups"),
    pytest.param({"groups": 4}, (1, 1), id="depthwise-1x1"),
    pytest.param({}, (1, 1), id="1x1"),
]


def convolution_case(options, kernel, channels=4, outputs=8, rank=3):
    groups = options.get("groups", 1)
    return {
        "x": leaf(5, channels, 7, 6, seed=1), "weight": leaf(outputs, channels // groups, *kernel, seed=2).detach(),
        "lora_a": leaf(groups * rank, channels // groups, *kernel, seed=3), "lora_b": leaf(outputs, rank, 1, 1, seed=4),
        "bias": leaf(outputs, seed=5).detach(),
    }  # fmt: skip
