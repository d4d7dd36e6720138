"""The fused linear operator: all outputs and gradients in the interpreter against float64, and under torch.compile."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, few_programs, launches, poison_allocations
from operator_cases import LINEAR_SHAPES, assert_error_rule, group_of, leaf, linear_case, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from rfa_fast.functional import rfa_linear
from rfa_fast.ops import linear as fused
from rfa_fast.ops.linear_torch import Linear, add_product

KINDS = ["mixed", "retain", "forget", "ignored"]

__all__ = ["few_programs"]

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    if "compile" not in request.node.name:
        poison_allocations(monkeypatch)


def constants(shape, target, teacher, dtype, seed=0):
    """x̃ in fp32 and x'_t in the layer's dtype, or neither."""
    m, _, n = shape
    made = {}
    if target:
        made["target"] = leaf(n, seed=seed + 6).detach().float()
    if teacher:
        made["retain_target"] = leaf(m, n, seed=seed + 7).detach().to(dtype)
    return made


def compare(tensors, options, dtype):
    """The three runs the error rule needs."""
    rounded = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in tensors.items()}
    widened = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in rounded.items()}
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = run(rfa_linear, widened, **wide, backend="reference")
    with launches() as seen:
        ours = run(rfa_linear, rounded, **options, backend="triton")
    assert {"linear_forward_kernel", "linear_gradient_kernel", "linear_input_gradient_kernel"} <= set(seen)
    return ours, run(rfa_linear, rounded, **options, backend="reference"), exact


def stacked(runs):
    """Results of several draws as one: torch's error of a single number can be 0 by luck."""
    return {name: torch.stack([r[name] for r in runs]) for name in runs[0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", [False, True], ids=["residual", "teacher"])
@pytest.mark.parametrize(("shape", "rank"), LINEAR_SHAPES[1:])
def test_under_the_error_rule(shape, rank, teacher, kind, norm, dtype):
    given_target = teacher or (norm == "l2" and shape[0] == 33)
    options = {"scale": 0.5, "group": group_of(shape[0], kind), "norm": norm}
    options |= constants(shape, given_target, teacher, dtype)
    assert_error_rule(*compare(linear_case(shape, rank, dtype), options, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("kind", ["retain", "forget"])
def test_one_row_one_input_one_output(kind, norm, dtype):
    runs = []
    for seed in range(6):
        tensors = {
            "x": leaf(1, 1, seed=5 * seed), "weight": leaf(1, 1, seed=5 * seed + 1).detach(),
            "lora_a": leaf(1, 1, seed=5 * seed + 2), "lora_b": leaf(1, 1, seed=5 * seed + 3),
        }  # fmt: skip
        options = {"scale": 0.5, "group": group_of(1, kind, seed), "norm": norm}
        runs.append(compare(tensors, options | constants((1, 1, 1), True, False, dtype, seed), dtype))
    assert_error_rule(*map(stacked, zip(*runs, strict=True)), dtype)


@pytest.mark.parametrize("unit", ["row", "sample"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_gradients_equal_autograd_through_the_reference(start, norm, unit):
    """Three axes, a target per position, groups per token; B = 0 has a gradient and no NaN."""
    tensors = {
        "x": leaf(3, 4, 21, seed=1), "weight": leaf(18, 21, seed=2).detach(), "lora_a": leaf(5, 21, seed=3),
        "lora_b": leaf(18, 5, seed=4) if start == "random" else torch.zeros(18, 5).requires_grad_(),
    }  # fmt: skip
    group = torch.tensor([[0, 0, -1, 0], [1, 1, 1, -1], [0, 1, -1, 0]], dtype=torch.int8)
    for extra in ({}, {"target": leaf(4, 18, seed=8).detach()}, {"retain_target": leaf(3, 1, 18, seed=9).detach()}):
        options = {"scale": 2.0, "group": group, "norm": norm, "unit": unit} | extra
        ours, same, exact = compare(
            tensors, {k: v.float() if k in extra else v for k, v in options.items()}, torch.float32
        )
        assert_error_rule(ours, same, exact, torch.float32)
        assert float(ours["grad lora_b"].abs().sum()) > 0


def test_strided_inputs_a_gradient_that_is_expanded_and_a_residual_with_a_gradient():
    x = leaf(6, 9, 20, dtype=torch.float32).transpose(0, 1)
    weight, a = leaf(20, 12, dtype=torch.float32).detach().t(), leaf(20, 6, dtype=torch.float32, seed=1).t()
    b, group = leaf(12, 6, dtype=torch.float32, seed=2), group_of(9, "mixed", 1)
    results = []
    for backend in ("reference", "triton"):
        out = rfa_linear(x, weight, a, b, scale=0.3, group=group, emit_residual=True, backend=backend)
        total = out.output.sum() + out.retain_loss + out.forget_loss + (out.residual**2).sum()
        results.append((out.output, out.residual, *torch.autograd.grad(total, [x, a, b])))
    for truth, ours in zip(*results, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_is_computed():
    x, weight = torch.randn(20, 16), torch.randn(24, 16)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    with launches() as seen:
        out = rfa_linear(x, weight, a, b, scale=1.0, group=group_of(20, "mixed"), backend="triton")
        torch.autograd.grad(out.forget_loss, [a, b])
    assert "linear_input_gradient_kernel" not in seen  # x needs no gradient


def test_a_loss_nobody_differentiates_and_a_plain_layer():
    tensors = {k: v.detach().float() for k, v in linear_case((20, 16, 24), 4, torch.float64).items()}
    out = rfa_linear(**tensors, scale=0.5, backend="triton")
    assert (out.retain_loss, out.forget_loss, out.residual) == (None, None, None)
    plain = rfa_linear(**tensors, scale=0.5, backend="reference").output
    assert torch.allclose(out.output, plain, rtol=1e-5, atol=1e-4)


def test_no_row_is_a_correct_empty_result_with_gradients():
    tensors = {k: v.float() for k, v in linear_case((0, 4, 3), 2, torch.float64).items()}
    a = tensors["lora_a"].detach().requires_grad_()
    out = rfa_linear(**tensors | {"lora_a": a}, scale=1.0, group=torch.zeros(0, dtype=torch.int8), backend="triton")
    assert out.output.shape == (0, 3)
    (out.retain_loss + out.forget_loss + out.output.sum()).backward()
    assert float(a.grad.abs().sum()) == 0.0


def test_autocast_takes_the_products_in_its_dtype():
    tensors = {k: v.detach().float() for k, v in linear_case((20, 16, 24), 4, torch.float64).items()}
    group = group_of(20, "mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rfa_linear(**tensors, scale=0.5, group=group, backend="triton")
        torch_out = rfa_linear(**tensors, scale=0.5, group=group, backend="torch")
    assert out.output.dtype == torch_out.output.dtype == torch.bfloat16
    assert torch.allclose(out.output.float(), torch_out.output.float(), rtol=0.05, atol=0.05)
    assert float(out.forget_loss) == pytest.approx(float(torch_out.forget_loss), rel=0.02)


def test_a_second_derivative_is_refused_not_wrong():
    tensors = linear_case((20, 16, 24), 4, torch.float64)
    out = rfa_linear(**tensors, scale=0.5, group=group_of(20, "mixed"), backend="torch")
    (first,) = torch.autograd.grad(out.output.square().sum(), tensors["lora_b"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again; backend='reference' can"):
        first.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_retain_loss_is_fp32_under_autocast(compiled):
    """Products in bf16, sums in fp32: the retain loss is that of the rounded h, to fp32's accuracy."""
    tensors = {k: v.detach().float() for k, v in linear_case((20, 16, 24), 4, torch.float64).items()}
    group = group_of(20, "mixed")

    def run():
        return rfa_linear(**tensors, scale=0.5, group=group, backend="torch").retain_loss

    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (torch.compile(run, fullgraph=True) if compiled else run)()
        hidden = torch.nn.functional.linear(tensors["x"], tensors["lora_a"])
    residual = 0.5 * hidden.double() @ tensors["lora_b"].double().mT
    assert loss.item() == pytest.approx(residual[group == 0].square().sum().item(), rel=1e-5)


@given(
    m=st.integers(1, 30), k=st.integers(1, 20), n=st.integers(1, 30), rank=st.integers(1, 9), seed=st.integers(0, 99),
    norm=st.sampled_from(["mse", "l2"]), target=st.booleans(), teacher=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_drawn_shapes_in_fp32(m, k, n, rank, seed, norm, target, teacher):
    tensors = {
        "x": leaf(m, k, seed=seed), "weight": leaf(n, k, seed=seed + 1).detach(),
        "lora_a": leaf(rank, k, seed=seed + 2), "lora_b": leaf(n, rank, seed=seed + 3),
    }  # fmt: skip
    options = {"scale": 0.3, "group": group_of(m, "mixed", seed), "norm": norm}
    options |= constants((m, k, n), target, teacher, torch.float32, seed)
    ours, _, exact = compare(tensors, options, torch.float32)
    for name, truth in exact.items():
        size = max(1.0, float(truth.detach().abs().max())) * 10
        assert torch.allclose(ours[name].double(), truth, rtol=1e-4, atol=1e-5 * size), name


def sample_arguments(l2, target):
    a, b = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    group = torch.tensor([0, 1, 0, -1, 1, 0], dtype=torch.int8)
    return (
        torch.randn(6, 6, requires_grad=True), torch.randn(5, 6), None, a, b, group,
        torch.randn(1, 5) if target else None, 1, 1, None, 1, 1, None, None, 0.5, l2, 2 if l2 else 1, False,
    )  # fmt: skip


@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["kernels", "host"])
@pytest.mark.parametrize(("l2", "target"), list(itertools.product([False, True], [False, True])))
def test_opcheck_compile_rules(monkeypatch, interpreted, l2, target):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    arguments = sample_arguments(l2, target)
    torch.library.opcheck(torch.ops.rfa_fast.linear_forward, arguments)
    x, w, _, a, b, group = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments[:6])
    out = Linear(
        *torch.ops.rfa_fast.linear_forward(*(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments))
    )
    goal = arguments[6] if target else out.mean[None]
    one = torch.ones(())
    backward = (
        torch.randn(6, 5), None, one, one, x, w, a, b, group, goal, 1, 1, target, None, None, 1, 1, out.hidden,
        out.output, out.retain_norms, out.forget_norms, 0.5, l2, 2 if l2 else 1, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rfa_fast.linear_backward, backward)


@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_the_host_implementation_equals_the_kernels(monkeypatch, norm):
    tensors = {k: v.float() for k, v in linear_case((14, 9, 11), 3, torch.float64).items()}
    results = []
    for interpreted in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        operator = torch.ops.rfa_fast.linear_forward
        x, a, b = (tensors[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b"))
        out = Linear(*operator(
            x, tensors["weight"], tensors["bias"], a, b, group_of(14, "mixed"), None, 1, 1, None, 1, 1, None, None, 0.5,
            norm == "l2", 2, True,
        ))  # fmt: skip
        total = out.output.square().sum() + out.residual.sum() + out.retain_loss + out.forget_loss
        results.append([*out, *torch.autograd.grad(total, [x, a, b])])
    for kernels, host in zip(*results, strict=True):
        assert torch.allclose(kernels, host, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_frame_and_one_dynamic_one(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def step(x, weight, a, b, group):
        out = rfa_linear(x, weight, a, b, scale=0.5, group=group, backend="triton")
        return out.output.square().sum() + 0.3 * out.retain_loss + 0.7 * out.forget_loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    frames = []
    for rows in (6, 9, 12, 20, 70):
        x, weight = torch.randn(rows, 6, requires_grad=True), torch.randn(5, 6)
        a, b = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
        arguments = (x, weight, a, b, group_of(rows, "mixed", rows))
        grads = [torch.autograd.grad(f(*arguments), [x, a, b]) for f in (compiled, step)]
        for ours, eager in zip(*grads, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2, 2]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that appears while it is on, by address."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
        return result

    def largest(self, but):
        return max(size for address, size in self.sizes.items() if address not in but)


def test_the_retain_loss_allocates_nothing_of_the_outputs_size():
    """Residual mode: besides y, no storage comes near M × N, forward or backward; the reference's Δ does.

    The launchers are called themselves: inside a custom operator a dispatch mode sees nothing.
    """
    m, k, n, rank = 512, 16, 512, 4
    x, weight, upstream, one = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n), torch.ones(())
    a, b, group = torch.randn(rank, k), torch.randn(n, rank), group_of(m, "retain")
    with Allocations() as seen:
        out = fused._forward_launchers(
            x, weight, None, a, b, group, None, 1, 1, None, 1, 1, None, None, 0.5, False, 1, False
        )
        kept = (out.hidden, out.output, out.retain_norms, out.forget_norms)
        fused._backward_launchers(
            upstream, None, one, None, x, weight, a, b, group, out.mean[None], 1, 1, False, None, None, 1, 1, *kept,
            0.5, False, 1, True,
        )  # fmt: skip
    own = {tensor.data_ptr() for tensor in (out.output, upstream)}
    assert seen.largest(but=own) < m * n * 4 / 2
    with Allocations() as seen:
        out = rfa_linear(x, weight, a, b, scale=0.5, group=group, backend="reference")
    assert seen.largest(but={out.output.data_ptr()}) >= m * n * 4


GPU_GRAPH = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
import rfa_fast.ops.linear

def layer(x, w, a, b, g):
    forward, backward = torch.ops.rfa_fast.linear_forward, torch.ops.rfa_fast.linear_backward
    o = forward(x, w, None, a, b, g, None, 1, 1, None, 1, 1, None, None, 0.5, False, 1, False)
    kept = (o[2], o[0], o[4], o[5])
    return backward(
        o[0], None, o[6], o[7], x, w, a, b, g, o[3][None], 1, 1, False, None, None, 1, 1, *kept, 0.5, False, 1, True
    )

fakes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
with fakes:
    half = dict(device="cuda", dtype=torch.bfloat16)
    x, w = torch.empty(480, 64, **half), torch.empty(80, 64, **half)
    a, b = torch.empty(8, 64, device="cuda"), torch.empty(80, 8, device="cuda")
    g = torch.empty(480, device="cuda", dtype=torch.int8)
    for mode in ("fake", "symbolic"):
        trace = make_fx(dispatch_functionalize(layer), tracing_mode=mode, _allow_non_fake_inputs=True)
        names = [str(node.target) for node in trace(x, w, a, b, g).graph.nodes]
        print(sum("triton_kernel_wrapper" in name for name in names), any("rfa_fast" in name for name in names))
"""


def test_compile_sees_the_kernels_on_a_gpu():
    """On (fake) CUDA tensors the operators decompose into their six kernels, with any number of rows."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", GPU_GRAPH], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["6", "False", "6", "False"], done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_added_in_place(dtype):
    generator = torch.Generator().manual_seed(0)
    base, left, right = (torch.randn(s, generator=generator).to(dtype) for s in ((5, 7), (5, 3), (3, 7)))
    wanted = (base.double() + left.double() @ right.double()).to(dtype)
    torch.library.opcheck(torch.ops.rfa_fast.add_product_, (base.clone(), left, right))
    counter = CompileCounterWithBackend("eager")
    for add in (add_product, torch.compile(add_product, backend=counter, fullgraph=True)):
        mine = base.clone()
        found = add(mine, left, right)
        assert found.data_ptr() == mine.data_ptr()
        assert torch.allclose(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert any("add_product" in str(node.target) for node in counter.graphs[0].graph.nodes)
