"""The operators: every backend against the float64 reference, under the error rule of CONTRIBUTING.md."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from rfa_fast.functional import rfa_conv2d, rfa_head_loss, rfa_linear
from rfa_fast.ops import backends, select


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("kind", ["mixed", "retain", "forget", "ignored"])
@pytest.mark.parametrize(("shape", "rank"), LINEAR_SHAPES)
def test_linear_under_the_error_rule(shape, rank, kind, norm, dtype):
    exact_in = linear_case(shape, rank, torch.float64)
    rounded = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in exact_in.items()}
    options = {"scale": 0.5, "group": group_of(shape[0], kind), "norm": norm}
    widened = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in rounded.items()}
    exact = run(rfa_linear, widened, **options, backend="reference")
    ours = run(rfa_linear, rounded, **options, backend="torch")
    same_dtype = run(rfa_linear, rounded, **options, backend="reference")
    assert ours["output"].dtype == dtype
    assert ours["retain"].dtype == torch.float32
    assert_error_rule(ours, same_dtype, exact, dtype)


@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("kind", ["mixed", "retain", "forget", "ignored"])
@pytest.mark.parametrize(("options", "kernel"), CONVOLUTIONS)
def test_convolution_equals_the_reference(options, kernel, kind, norm):
    tensors = convolution_case(options, kernel)
    options = {**options, "scale": 1.5, "group": group_of(5, kind), "norm": norm}
    exact = run(rfa_conv2d, tensors, **options, backend="reference")
    ours = run(rfa_conv2d, tensors, **options, backend="torch")
    for name, truth in exact.items():
        assert torch.allclose(ours[name], truth, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize(("options", "kernel"), CONVOLUTIONS)
def test_convolution_output_equals_a_dense_convolution(options, kernel):
    tensors = convolution_case(options, kernel)
    out = rfa_conv2d(**tensors, **options, scale=1.5).output
    groups = options.get("groups", 1)
    rows = []
    for g in range(groups):
        a = tensors["lora_a"].chunk(groups)[g].flatten(1)
        b = tensors["lora_b"].chunk(groups)[g].flatten(1)
        rows.append((b @ a).reshape(-1, *tensors["weight"].shape[1:]))
    dense = tensors["weight"] + 1.5 * torch.cat(rows)
    assert torch.allclose(out, torch.nn.functional.conv2d(tensors["x"], dense, tensors["bias"], **options), rtol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("unit", ["row", "sample"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_gradcheck_at_b_zero_and_random(backend, unit, norm):
    group = torch.tensor([[0, -1, 0], [1, 1, -1]], dtype=torch.int8)
    weight, target = leaf(4, 5, seed=2).detach(), leaf(4, seed=9).detach()

    def losses(x, a, b):
        out = rfa_linear(x, weight, a, b, scale=2.0, group=group, target=target, norm=norm, unit=unit, backend=backend)
        return out.output, out.retain_loss, out.forget_loss

    assert torch.autograd.gradcheck(losses, [leaf(2, 3, 5), leaf(2, 5, seed=1), leaf(4, 2, seed=3)])
    zero = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    out = losses(leaf(2, 3, 5), leaf(2, 5, seed=1), zero)
    grad = torch.autograd.grad(out[1] + out[2], zero)[0]
    assert bool(torch.isfinite(grad).all())
    assert float(grad.abs().sum()) > 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_zero_row_batch_is_a_correct_empty_result(backend):
    tensors = linear_case((0, 4, 3), 2, torch.float64)
    out = rfa_linear(**tensors, scale=1.0, group=torch.zeros(0, dtype=torch.int8), backend=backend)
    assert out.output.shape == (0, 3)
    assert (float(out.retain_loss.detach()), float(out.forget_loss.detach())) == (0.0, 0.0)


def test_non_contiguous_inputs_and_a_group_over_the_first_axis():
    x = leaf(4, 6, 3).transpose(1, 2)
    a, b, w = leaf(2, 6, seed=1), leaf(5, 2, seed=2), leaf(5, 6, seed=3).detach()
    group = torch.tensor([0, 1, 0, -1], dtype=torch.int8)
    out = rfa_linear(x, w, a, b, scale=1.0, group=group, emit_residual=True)
    full = rfa_linear(x.contiguous(), w, a, b, scale=1.0, group=group[:, None].expand(4, 3).contiguous())
    assert torch.allclose(out.residual, (x @ a.T) @ b.T)
    assert float(out.retain_loss) == pytest.approx(float(full.retain_loss))
    assert float(out.forget_loss) == pytest.approx(float(full.forget_loss))


@given(m=st.integers(0, 9), k=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_backends_agree_on_drawn_shapes(m, k, n, rank, seed):
    x, w = leaf(m, k, seed=seed), leaf(n, k, seed=seed + 1).detach()
    a, b = leaf(rank, k, seed=seed + 2), leaf(n, rank, seed=seed + 3)
    group = group_of(m, "mixed", seed)
    results = [
        run(rfa_linear, {"x": x, "weight": w, "lora_a": a, "lora_b": b}, scale=0.3, group=group, backend=backend)
        for backend in ("reference", "torch")
    ]
    for name, truth in results[0].items():
        assert torch.allclose(results[1][name], truth, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_the_chunked_head_equals_all_the_logits(adapted, softcap, rows_per_chunk):
    hidden, weight, bias = leaf(11, 5), leaf(7, 5, seed=1).detach(), leaf(7, seed=2).detach()
    adapters = {"lora_a": leaf(2, 5, seed=3), "lora_b": leaf(7, 2, seed=4)} if adapted else {}
    labels = torch.tensor([0, 6, -100, 3, 2, -100, 1, 5, 4, 0, 2])
    group = torch.tensor([0, 1, 1, 0, -1, 0, 1, 0, 1, 0, 0], dtype=torch.int8)
    results = []
    for options in ({"backend": "reference"}, {"backend": "torch", "chunk_bytes": 4 * 7 * rows_per_chunk}):
        out = rfa_head_loss(hidden, weight, labels, group, bias, **adapters, scale=0.5, softcap=softcap, **options)
        total = out.retain + 0.4 * out.forget
        if adapted:
            total = total + 0.3 * out.retain_align + 0.2 * out.forget_align
        results.append([total, out.mean_prediction, *torch.autograd.grad(total, [hidden, *adapters.values()])])
    for ours, truth in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, truth, rtol=1e-10, atol=1e-12)
    logits = hidden @ weight.T + bias
    if adapted:
        logits = logits + 0.5 * (hidden @ adapters["lora_a"].T) @ adapters["lora_b"].T
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    kept = (group == 0) & (labels != -100)
    expected = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
    assert float(out.retain.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def valid_arguments():
    return {
        "x": torch.zeros(4, 6), "weight": torch.zeros(5, 6), "lora_a": torch.zeros(2, 6), "lora_b": torch.zeros(5, 2),
        "scale": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(4, 7)}, ValueError, ["x", "(4, 7)", "6"]),
        ({"x": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, ["x", "int32", "floating"]),
        ({"weight": torch.zeros(5)}, ValueError, ["weight", "1 axes", "2"]),
        ({"lora_a": torch.zeros(3, 6)}, ValueError, ["lora_a", "(3, 6)"]),
        ({"bias": torch.zeros(4)}, ValueError, ["bias", "(4,)", "(5,)"]),
        ({"lora_b": torch.zeros(5, 2, device="meta")}, ValueError, ["lora_b", "meta", "cpu"]),
        ({"group": torch.zeros(4)}, TypeError, ["group", "float32", "int8"]),
        ({"group": torch.zeros(3, dtype=torch.int8)}, ValueError, ["group", "(3,)", "(4,)"]),
        (
            {"group": torch.zeros(4, dtype=torch.int8), "target": torch.zeros(4)},
            ValueError,
            ["target", "(4,)", "(4, 5)"],
        ),
        ({"target": torch.zeros(5, dtype=torch.float64)}, TypeError, ["target", "float64", "at most torch.float32"]),
        ({"retain_target": torch.zeros(5, dtype=torch.int64)}, TypeError, ["retain_target", "int64", "floating"]),
        ({"retain_target": torch.zeros(5, device="meta")}, ValueError, ["retain_target", "meta", "cpu"]),
        ({"norm": "l1"}, ValueError, ["norm", "'l1'", "'l2'"]),
        ({"unit": "token"}, ValueError, ["unit", "'token'", "'row'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'torch'"]),
    ],
)
def test_wrong_arguments_are_named(changes, error, words):
    with pytest.raises(error) as caught:
        rfa_linear(**{**valid_arguments(), **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_triton_that_cannot_run_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: got 'triton' for a tensor on cpu.*TRITON_INTERPRET=1.*'torch'"):
        rfa_linear(**valid_arguments(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in valid_arguments().items()}
    with pytest.raises(TypeError, match="x: got torch.float64, expected one of .*bfloat16.* for backend='triton'"):
        rfa_linear(**wide, backend="triton")


def test_the_automatic_choice_is_torch_on_a_cpu_whatever_the_interpreter_says():
    assert select("auto", torch.zeros(1))[0] == "torch"
    assert select("auto", torch.zeros(1, device="meta")) == ("torch", "automatic choice for a tensor on meta")


def test_wrong_arguments_of_the_convolution_and_the_head():
    x, w = torch.zeros(2, 4, 5, 5), torch.zeros(6, 2, 3, 3)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4, 5, 5\), expected \(B, 2, H, W\)"):
        rfa_conv2d(x, w, torch.zeros(3, 2, 3, 3), torch.zeros(6, 3, 1, 1), scale=1.0)
    with pytest.raises(ValueError, match=r"lora_a, lora_b.*expected \(6, 2, 3, 3\)"):
        rfa_conv2d(x, w, torch.zeros(3, 2, 3, 3), torch.zeros(6, 3, 1, 1), scale=1.0, groups=2)
    with pytest.raises(ValueError, match="group: got shape"):
        rfa_conv2d(
            x, w, torch.zeros(6, 2, 3, 3), torch.zeros(6, 3, 1, 1), scale=1.0, groups=2,
            group=torch.zeros(2, 1, dtype=torch.int8),
        )  # fmt: skip
    for name in ("target", "retain_target"):  # the image is 3 × 2 there, not 3 × 3
        with pytest.raises(ValueError, match=rf"^{name}: got shape \(1, 6, 3, 2\), expected .* \(2, 6, 3, 3\)"):
            rfa_conv2d(
                x, w, torch.zeros(6, 2, 3, 3), torch.zeros(6, 3, 1, 1), scale=1.0, groups=2,
                group=torch.zeros(2, dtype=torch.int8), **{name: torch.zeros(1, 6, 3, 2)},
            )  # fmt: skip
    with pytest.raises(
        TypeError, match=r"^target: got torch.float64 beside x in torch.bfloat16, expected at most torch.f"
    ):
        rfa_conv2d(
            x.bfloat16(), w.bfloat16(), torch.zeros(6, 2, 3, 3), torch.zeros(6, 3, 1, 1), scale=1.0, groups=2,
            target=torch.zeros(1, dtype=torch.float64),
        )  # fmt: skip
    hidden, head, group = torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"^target: got torch.float64 beside x in torch.float32"):
        rfa_head_loss(hidden, head, torch.zeros(3, dtype=torch.int64), group, target=torch.zeros(9).double())
    with pytest.raises(TypeError, match="labels: got torch.int32"):
        rfa_head_loss(hidden, head, torch.zeros(3, dtype=torch.int32), group)
    with pytest.raises(ValueError, match=r"labels: got shape \(2,\)"):
        rfa_head_loss(hidden, head, torch.zeros(2, dtype=torch.int64), group)
    with pytest.raises(ValueError, match="expected both or neither"):
        rfa_head_loss(hidden, head, torch.zeros(3, dtype=torch.int64), group, lora_a=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="chunk_bytes: got 0"):
        rfa_head_loss(hidden, head, torch.zeros(3, dtype=torch.int64), group, chunk_bytes=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_head_refuses_what_it_would_read_beyond_its_classes(backend):
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    labels, group = torch.tensor([4, 0, 1]), torch.tensor([0, 1, 0], dtype=torch.int8)
    for shape in ((4,), (1,), (1, 5)):
        with pytest.raises(ValueError, match=r"mean_prediction: got shape .*, expected \(5,\)"):
            rfa_head_loss(hidden, weight, labels, group, mean_prediction=torch.zeros(shape), backend=backend)
    with pytest.raises(TypeError, match="mean_prediction: got torch.int64"):
        rfa_head_loss(hidden, weight, labels, group, mean_prediction=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels: got 5, expected values in \[0, 5\)"):
        rfa_head_loss(hidden, weight, labels + 1, group, backend=backend)
    rfa_head_loss(hidden, weight, torch.tensor([4, 9, -100]), group, backend=backend)  # unread where it forgets


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora_a": torch.zeros(2, 3), "lora_b": torch.zeros(8, 4)}, ValueError, r"lora_a, lora_b: .*\(R, 3\)"),
        ({"lora_a": torch.zeros(2, 2), "lora_b": torch.zeros(8, 2)}, ValueError, r"lora_a, lora_b: .*\(R, 3\)"),
        ({"lora_a": torch.zeros(2, 3), "lora_b": torch.zeros(5, 2)}, ValueError, r"and \(8, R\)"),
        ({"norm": "L2"}, ValueError, "norm: got 'L2'"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0, expected a number above 0"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias: got shape \(1,\), expected \(8,\)"),
        ({"weight": torch.zeros(8, 3).bfloat16()}, TypeError, "weight: got torch.bfloat16 beside an input in torch.f"),
    ],
)  # fmt: skip
def test_the_head_refuses_what_does_not_fit_before_it_computes(changes, error, words):
    """On Triton these read memory of others, and gave a number."""
    given = {"hidden": torch.ones(6, 3), "weight": torch.ones(8, 3), "labels": torch.zeros(6, dtype=torch.int64)}
    given |= {"group": torch.tensor([0, 0, 1, 1, 0, -1], dtype=torch.int8)} | changes
    for backend in ("reference", "torch"):
        with pytest.raises(error, match=words):
            rfa_head_loss(**given, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_output_that_nothing_is_compared_with_is_the_callers_own(backend):
    """Not kept for the backward, so that it may be added to in place, and a plain forward needs no memory for it."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 5), torch.randn(6, 5)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = rfa_linear(x, w, a, b, scale=0.5, backend=backend).output
    assert (4, 6) not in kept
    y += 1
    y.square().sum().backward()
    y = torch.nn.functional.linear(x, w + 0.5 * b @ a) + 1
    expected = torch.autograd.grad(y.square().sum(), (a, b))
    torch.testing.assert_close((a.grad, b.grad), expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_the_head_is_not_taken_for_a_constant():
    """Its second derivative was wrong without a word; the reference has it."""
    torch.manual_seed(0)
    w, labels = torch.randn(5, 3), torch.tensor([1, 2, 4])
    group = torch.tensor([0, 1, 0], dtype=torch.int8)
    for power in (1, 2):  # of a loss itself, what comes in requires no gradient
        hidden = torch.randn(3, 3, requires_grad=True)
        out = rfa_head_loss(hidden, w, labels, group, backend="torch")
        (slope,) = torch.autograd.grad((out.retain + out.forget) ** power, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again; backend='reference' can"):
            (slope.square().sum() + hidden.sum()).backward()
    out = rfa_head_loss(hidden, w, labels, group, backend="reference")
    (slope,) = torch.autograd.grad(out.retain, hidden, create_graph=True)
    slope.square().sum().backward()


def test_layers_without_outputs_and_tensors_without_storage():
    group = torch.tensor([0, 1], dtype=torch.int8)
    empty = rfa_linear(torch.ones(2, 3), torch.ones(0, 3), torch.ones(1, 3), torch.ones(0, 1), scale=1.0, group=group)
    assert empty.output.shape == (2, 0)
    assert empty.retain_loss.item() == 0
    with torch.device("meta"):
        shapes = rfa_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), scale=1.0)
    assert shapes.output.shape == (2, 4)
    with pytest.raises(ValueError, match="group: got one for a single row"):
        rfa_linear(torch.ones(3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), scale=1.0, group=group[:1])


def test_a_gpu_without_tensor_cores_in_triton_takes_torch(monkeypatch):
    monkeypatch.setattr(backends, "_status", lambda kind, interpreted: (True, "usable"))
    monkeypatch.setattr(torch.version, "hip", None)
    there = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    for capability, expected in (((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert backends.select("auto", there)[0] == expected
        assert backends.select("triton", there)[0] == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0" in backends.select("auto", there)[1]
