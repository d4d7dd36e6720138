"""The fused convolution: all outputs and gradients in the interpreter against float64, and under torch.compile."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import DTYPES, drawn, few_programs, launches, poison_allocations
from operator_cases import CONVOLUTIONS, assert_error_rule, convolution_case, group_of, leaf, run
from rfa_fast.kernels import tuning
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rfa_fast.functional import rfa_conv2d
from rfa_fast.ops import conv2d as fused
from rfa_fast.ops.conv2d_torch import Convolution

__all__ = ["few_programs"]

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    if "compile" not in request.node.name:
        poison_allocations(monkeypatch)


@pytest.fixture(params=["fused", "vendor", "split"])
def route(request, monkeypatch):
    """The ways a convolution can be taken; small and NCHW layers take the implicit one here as well."""
    monkeypatch.setattr(fused, "implicit_pays", lambda *layer: True)
    for kernel in ("conv2d_forward", "conv2d_input_gradient"):
        small = replace(tuning.TABLES[kernel][tuning.GENERIC][0], route=request.param)
        monkeypatch.setitem(tuning.TABLES, kernel, {tuning.GENERIC: (small,)})
    return request.param


def compare(tensors, options, dtype):
    rounded = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in tensors.items()}
    widened = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in rounded.items()}
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = run(rfa_conv2d, widened, **wide, backend="reference")
    with launches() as seen:
        ours = run(rfa_conv2d, rounded, **options, backend="triton")
    assert {"conv2d_gradient_kernel", "conv2d_retain_gradient_kernel"} <= set(seen)
    return ours, run(rfa_conv2d, rounded, **options, backend="reference"), exact, seen


def layers_in_every_group():
    """Every layer with both groups; the other kinds of batch on one of the layers, and on all in the long suite."""
    for norm, kind in (("mse", "mixed"), ("l2", "mixed"), ("mse", "retain"), ("mse", "forget"), ("mse", "ignored")):
        for layer in CONVOLUTIONS:
            always = (norm, kind) == ("mse", "mixed") or layer.id == "plain"
            marks = () if always else pytest.mark.long
            yield pytest.param(*layer.values, norm, kind, id=f"{layer.id}-{norm}-{kind}", marks=marks)


@pytest.mark.parametrize(("options", "kernel", "norm", "kind"), layers_in_every_group())
def test_under_the_error_rule(options, kernel, kind, norm, route):
    tensors = convolution_case(options, kernel)
    options = {**options, "scale": 1.5, "group": group_of(5, kind), "norm": norm}
    ours, same, exact, seen = compare(tensors, options, torch.float32)
    assert_error_rule(ours, same, exact, torch.float32)
    assert ("conv2d_epilogue_kernel" in seen) == (route != "fused")
    assert ("conv2d_forward_kernel" in seen) == (route != "vendor" or norm == "l2")
    assert ("conv2d_input_gradient_kernel" in seen) == (route == "fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("teacher", [False, True], ids=["target", "teacher"])
def test_given_constants_in_every_dtype_and_layout(teacher, layout, dtype, route):
    options = {"padding": 1, "stride": (2, 1)}
    tensors = convolution_case(options, (3, 3), channels=18, outputs=20, rank=8)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
    shape = rfa_conv2d(**tensors, **options, scale=1.0).output.shape
    options |= {"scale": 0.5, "group": group_of(5, "mixed"), "target": leaf(*shape[1:], seed=8).detach().to(dtype)}
    if teacher:
        options["retain_target"] = leaf(*shape, seed=9).detach().to(dtype)
    ours, same, exact, _ = compare(tensors, options, dtype)
    assert_error_rule(ours, same, exact, dtype)
    assert ours["output"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("rank", "start"), [(1, "random"), (1, "zero"), (64, "random"), (70, "random")])
def test_ranks_and_b_at_zero(rank, start):
    tensors = convolution_case({}, (3, 3), rank=rank)
    if start == "zero":
        tensors["lora_b"] = torch.zeros_like(tensors["lora_b"]).requires_grad_()
    options = {"padding": 1, "scale": 1.5, "group": group_of(5, "mixed")}
    ours, same, exact, _ = compare(tensors, options, torch.float32)
    assert_error_rule(ours, same, exact, torch.float32)
    assert float(ours["grad lora_b"].abs().sum()) > 0


def test_a_padded_input_as_a_reflecting_layer_hands_it_over():
    tensors = {k: v.float() for k, v in convolution_case({}, (3, 3)).items()}
    leaves = {k: tensors[k].detach().requires_grad_() for k in ("x", "lora_a", "lora_b")}
    results = []
    for backend in ("reference", "triton"):
        padded = F.pad(leaves["x"], (1, 1, 1, 1), mode="reflect")
        out = rfa_conv2d(
            padded, tensors["weight"], leaves["lora_a"], leaves["lora_b"], scale=0.5, group=group_of(5, "mixed"),
            emit_residual=True, backend=backend,
        )  # fmt: skip
        total = out.output.square().sum() + out.retain_loss + out.forget_loss + out.residual.square().sum()
        results.append([out.output, out.residual, *torch.autograd.grad(total, list(leaves.values()))])
    for truth, ours in zip(*results, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-4, atol=1e-3)


def check_drawn(case):
    b, c, n, side, kernel, groups, seed = (case[k] for k in ("b", "c", "n", "side", "kernel", "groups", "seed"))
    options = {"groups": groups, "padding": case["padding"], "stride": case["stride"], "dilation": case["dilation"]}
    tensors = {
        "x": leaf(b, c * groups, side + 4, side + 5, seed=seed), "lora_a": leaf(3 * groups, c, *kernel, seed=2),
        "weight": leaf(n * groups, c, *kernel, seed=1).detach(), "lora_b": leaf(n * groups, 3, 1, 1, seed=3),
    }  # fmt: skip
    options |= {"scale": 0.5, "group": group_of(b, "mixed", seed), "norm": case["norm"]}
    ours, _, exact, _ = compare(tensors, options, torch.float32)
    for name, truth in exact.items():
        size = max(1.0, float(truth.detach().abs().max())) * 10
        assert torch.allclose(ours[name].double(), truth, rtol=1e-4, atol=1e-5 * size), name


drawn_cases = st.fixed_dictionaries(
    {
        "b": st.integers(1, 6), "c": st.integers(1, 9), "n": st.integers(1, 9), "side": st.integers(1, 6),
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)), "groups": st.sampled_from([1, 1, 2, 3]),
        "padding": st.integers(0, 2), "stride": st.integers(1, 3), "dilation": st.integers(1, 2),
        "norm": st.sampled_from(["mse", "l2"]), "seed": st.integers(0, 99),
    }
)  # fmt: skip


@drawn(drawn_cases, 10)
def test_drawn_cases(case):
    check_drawn(case)


@pytest.mark.long
@pytest.mark.parametrize("chosen", ["fused", "vendor"])
@drawn(drawn_cases, 300)
def test_many_drawn_cases(chosen, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "implicit_pays", lambda *layer: True)
        for kernel in ("conv2d_forward", "conv2d_input_gradient"):
            small = replace(tuning.TABLES[kernel][tuning.GENERIC][0], route=chosen)
            patch.setitem(tuning.TABLES, kernel, {tuning.GENERIC: (small,)})
        check_drawn(case)


def sample_arguments(l2, target):
    x, a = torch.randn(4, 4, 5, 6, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    b, group = torch.randn(6, 2, 1, 1, requires_grad=True), torch.tensor([0, 1, 0, -1], dtype=torch.int8)
    goal = torch.randn(6, 5, 6).expand(4, 6, 5, 6) if target else None
    windows = ([1, 1], [1, 1, 1, 1], [1, 1], 2)
    return x, torch.randn(6, 2, 3, 3), torch.randn(6), a, b, *windows, group, goal, None, 0.5, l2, False


@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["kernels", "host"])
@pytest.mark.parametrize(("l2", "target"), list(itertools.product([False, True], [False, True])))
def test_opcheck_compile_rules(monkeypatch, interpreted, l2, target):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    arguments = sample_arguments(l2, target)
    torch.library.opcheck(torch.ops.rfa_fast.conv2d_forward, arguments)
    constant = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    x, weight, _, a, b, *windows = constant[:9]
    out = Convolution(*torch.ops.rfa_fast.conv2d_forward(*constant))
    goal = constant[10] if target else out.mean.expand(out.output.shape)
    one = torch.ones(())
    backward = (
        torch.randn(out.output.shape), None, one, one, x, weight, a, b, *windows, constant[9], goal, target, None,
        out.hidden, out.output, out.retain_norms, out.forget_norms, 0.5, l2, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rfa_fast.conv2d_backward, backward)


@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_the_host_implementation_equals_the_kernels(monkeypatch, norm):
    results = []
    torch.manual_seed(0)
    arguments = list(sample_arguments(norm == "l2", False))
    arguments[-1] = True
    for interpreted in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        out = Convolution(*torch.ops.rfa_fast.conv2d_forward(*arguments))
        total = out.output.square().sum() + out.residual.sum() + out.retain_loss + out.forget_loss
        results.append([*out, *torch.autograd.grad(total, [arguments[0], arguments[3], arguments[4]])])
    for kernels, host in zip(*results, strict=True):
        assert torch.allclose(kernels, host, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_frame_and_one_dynamic_one(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def step(x, weight, a, b, group):
        out = rfa_conv2d(x, weight, a, b, scale=0.5, padding=1, group=group, backend="triton")
        return out.output.square().sum() + 0.3 * out.retain_loss + 0.7 * out.forget_loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    frames = []
    for samples in (3, 4, 6, 9):
        x, weight = torch.randn(samples, 4, 5, 6, requires_grad=True), torch.randn(6, 4, 3, 3)
        a, b = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(6, 2, 1, 1, requires_grad=True)
        arguments = (x, weight, a, b, group_of(samples, "mixed", samples))
        grads = [torch.autograd.grad(f(*arguments), [x, a, b]) for f in (compiled, step)]
        for ours, eager in zip(*grads, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]


class Largest(TorchDispatchMode):
    """Bytes of the largest storage any operation returned."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


def test_no_im2col_buffer(route):
    """Nine taps: an im2col buffer would be nine times x; the launchers never hold more than twice x or y."""
    x, weight, bias = torch.randn(8, 32, 12, 12), torch.randn(32, 32, 3, 3), torch.randn(32)
    a, b, group = torch.randn(4, 32, 3, 3), torch.randn(32, 4, 1, 1), group_of(8, "mixed")
    windows, one = ([1, 1], [1, 1, 1, 1], [1, 1], 1), torch.ones(())
    with Largest() as seen:
        out = fused._forward_launchers(x, weight, bias, a, b, *windows, group, None, None, 0.5, False, False)
        goal = out.mean.expand(out.output.shape)
        fused._backward_launchers(
            torch.randn(out.output.shape), None, one, one, x, weight, a, b, *windows, group, goal, False, None,
            out.hidden, out.output, out.retain_norms, out.forget_norms, 0.5, False, True,
        )  # fmt: skip
    assert seen.size <= 2 * x.nbytes


@pytest.mark.parametrize(
    ("layout", "channels", "groups"),
    [(torch.contiguous_format, 16, 1), (torch.channels_last, 16, 1), (torch.channels_last, 8, 4)],
    ids=["nchw", "channels-last", "narrow-groups"],
)
def test_the_vendor_takes_what_does_not_suit_an_implicit_product(layout, channels, groups):
    options = {"padding": 1, "groups": groups}
    tensors = convolution_case(options, (3, 3), channels=channels, outputs=16)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
    options |= {"scale": 0.5, "group": group_of(5, "mixed")}
    ours, same, exact, seen = compare(tensors, options, torch.float32)
    assert_error_rule(ours, same, exact, torch.float32)
    implicit = {"conv2d_forward_kernel", "conv2d_input_gradient_kernel", "conv2d_lora_a_gradient_kernel"}
    assert implicit & set(seen) == (implicit if layout == torch.channels_last and groups == 1 else set())


GPU_GRAPH = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
import rfa_fast.ops.conv2d

def layer(x, w, a, b, g):
    forward, backward = torch.ops.rfa_fast.conv2d_forward, torch.ops.rfa_fast.conv2d_backward
    where = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    o = forward(x, w, None, a, b, *where, g, None, None, 0.5, False, False)
    kept = (o[2], o[0], o[4], o[5])
    goal = o[3].expand(o[0].shape)
    return backward(o[0], None, o[6], o[7], x, w, a, b, *where, g, goal, False, None, *kept, 0.5, False, True)

fakes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
with fakes:
    for layout in (torch.channels_last, torch.contiguous_format):
        half = dict(device="cuda", dtype=torch.bfloat16)
        x = torch.empty(48, 32, 14, 14, **half).contiguous(memory_format=layout)
        w = torch.empty(64, 32, 3, 3, **half).contiguous(memory_format=layout)
        a, b = torch.empty(8, 32, 3, 3, device="cuda"), torch.empty(64, 8, 1, 1, device="cuda")
        g = torch.empty(48, device="cuda", dtype=torch.int8)
        for mode in ("fake", "symbolic"):
            trace = make_fx(dispatch_functionalize(layer), tracing_mode=mode, _allow_non_fake_inputs=True)
            names = [str(node.target) for node in trace(x, w, a, b, g).graph.nodes]
            print(sum("triton_kernel_wrapper" in name for name in names), any("rfa_fast" in name for name in names))
"""


def test_compile_sees_the_kernels_on_a_gpu():
    """On (fake) CUDA tensors: eight kernels where the product is implicit, five around the vendor's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", GPU_GRAPH], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["8", "False"] * 2 + ["5", "False"] * 2, done.stderr[-2000:]


def test_wrong_windows_are_named():
    tensors = {k: v.float() for k, v in convolution_case({}, (3, 3)).items()}
    for wrong, words in (
        ({"stride": 0}, "stride: got"),
        ({"padding": "reflect"}, "padding: got 'reflect'"),
        ({"dilation": 9}, "x: got an image"),
        ({"stride": (1, 2, 3)}, "stride: got"),
    ):
        with pytest.raises(ValueError, match=words):
            rfa_conv2d(**tensors, scale=1.0, **wrong, backend="triton")
