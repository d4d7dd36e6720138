"""The same cases on a GPU: `pytest -m gpu`, which says so and fails where there is none (tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch
from operator_cases import (
    CONVOLUTIONS,
    LINEAR_SHAPES,
    assert_error_rule,
    convolution_case,
    group_of,
    leaf,
    linear_case,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend

from rfa_fast.functional import rfa_conv2d, rfa_head_loss, rfa_linear

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "xpu"
REAL_SHAPES = [
    *LINEAR_SHAPES,
    pytest.param((2048, 768, 3072), 8, id="vit-b"),
    pytest.param((300, 2048, 1100), 16, id="wide"),
]
KINDS = ["mixed", "retain", "forget", "ignored"]


@pytest.fixture(autouse=True)
def exact_fp32():
    """TF32 is not what fp32 is judged by."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def moved(tensors, dtype):
    return {k: v.detach().to(DEVICE, dtype).requires_grad_(v.requires_grad) for k, v in tensors.items()}


def judge(operator, tensors, options, dtype):
    rounded = moved(tensors, dtype)
    exact = run(operator, moved(rounded, torch.float64), **options, backend="reference")
    ours = run(operator, rounded, **options, backend="auto")
    assert float(ours["grad lora_b"].float().norm()) > 0 or not bool((options["group"] >= 0).any())
    assert_error_rule(ours, run(operator, rounded, **options, backend="reference"), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", [False, True], ids=["residual", "teacher"])
@pytest.mark.parametrize(("shape", "rank"), REAL_SHAPES)
def test_linear(shape, rank, teacher, kind, norm, dtype):
    options = {"scale": 0.5, "group": group_of(shape[0], kind).to(DEVICE), "norm": norm}
    if teacher:
        options["target"] = leaf(shape[2], seed=6).detach().to(DEVICE)
        options["retain_target"] = leaf(shape[0], shape[2], seed=7).detach().to(DEVICE)
    judge(rfa_linear, linear_case(shape, rank, dtype), options, dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "kernel"), CONVOLUTIONS)
def test_convolution(options, kernel, kind, norm, layout):
    tensors = convolution_case(options, kernel)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
    options = {**options, "scale": 1.5, "group": group_of(5, kind).to(DEVICE), "norm": norm}
    judge(rfa_conv2d, tensors, options, torch.float32)


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows_per_chunk", [3, 1000])
def test_head(adapted, softcap, rows_per_chunk):
    rows, width, classes = 70, 33, 513
    tensors = {"hidden": leaf(rows, width), "weight": leaf(classes, width, seed=1).detach()}
    if adapted:
        tensors |= {"lora_a": leaf(2, width, seed=3), "lora_b": leaf(classes, 2, seed=4)}
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels[::7] = -100
    group = group_of(rows, "mixed").to(DEVICE)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "auto")):
        named = moved(moved(tensors, torch.float32), dtype)
        out = rfa_head_loss(
            named.pop("hidden"), named.pop("weight"), labels, group, **named, scale=0.5, softcap=softcap,
            chunk_bytes=4 * classes * rows_per_chunk, backend=backend,
        )  # fmt: skip
        total = out.retain + 0.4 * out.forget
        if adapted:
            total = total + 0.3 * out.retain_align + 0.2 * out.forget_align
        results.append({"total": total, "mean": out.mean_prediction})
    exact, same, ours = results
    assert_error_rule(ours, same, exact, torch.float32)


def test_the_automatic_choice_is_triton_and_compiles_twice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def step(x, weight, a, b, group):
        out = rfa_linear(x, weight, a, b, scale=0.5, group=group)
        return out.output.float().square().sum() + 0.3 * out.retain_loss + 0.7 * out.forget_loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    frames = []
    for rows in (96, 129, 200, 300):
        tensors = [
            leaf(*s, dtype=torch.float32, seed=i).detach().to(DEVICE)
            for i, s in enumerate(((rows, 64), (80, 64), (8, 64), (80, 8)))
        ]
        arguments = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
        group = group_of(rows, "mixed", rows).to(DEVICE)
        wanted = [arguments[0], arguments[2], arguments[3]]
        grads = [torch.autograd.grad(f(*arguments, group), wanted) for f in (compiled, step)]
        for ours, eager in zip(*grads, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-3)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]


def test_opcheck_on_the_device():
    a, b = torch.randn(2, 6, device=DEVICE, requires_grad=True), torch.randn(5, 2, device=DEVICE, requires_grad=True)
    x, weight = torch.randn(6, 6, device=DEVICE, requires_grad=True), torch.randn(5, 6, device=DEVICE)
    group = torch.tensor([0, 1, 0, -1, 1, 0], dtype=torch.int8, device=DEVICE)
    rfa_linear(x, weight, a, b, scale=0.5, group=group)  # registers the operators
    torch.library.opcheck(
        torch.ops.rfa_fast.linear_forward,
        (x, weight, None, a, b, group, None, 1, 1, None, 1, 1, None, None, 0.5, False, 1, False),
    )
