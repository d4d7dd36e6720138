"""The adapted convolution in plain torch, its derivative by hand: against the reference in float64; what it keeps."""

from __future__ import annotations

import pytest
import torch
from operator_cases import assert_error_rule, convolution_case, leaf, run

from rfa_fast.functional import rfa_conv2d
from rfa_fast.ops import conv2d_torch

FORGET_COUNTS = [pytest.param(1, id="few"), pytest.param(4, id="most")]


def codes(forgotten: int) -> torch.Tensor:
    return torch.tensor([1] * forgotten + [0] * (5 - forgotten), dtype=torch.int8)


def laid_out(tensors: dict, layout: torch.memory_format) -> dict:
    x = tensors["x"].detach().to(memory_format=layout).requires_grad_()
    return {**tensors, "x": x}


@pytest.fixture(params=[True, False], ids=["picked", "masked"])
def picked(request, monkeypatch):
    """Samples of a group are picked on a CPU, and masked on a device that would wait for their number."""
    monkeypatch.setattr(conv2d_torch, "picks", lambda rows: request.param)


@pytest.mark.usefixtures("picked")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "padding": 1, "stride": 2}], ids=["plain", "groups"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("forgotten", FORGET_COUNTS)
@pytest.mark.parametrize("taught", [False, True], ids=["residual", "teacher"])
def test_it_equals_the_reference_whichever_group_is_larger(taught, forgotten, norm, options, layout) -> None:
    tensors = laid_out(convolution_case(options, (3, 3)), layout)
    feature = rfa_conv2d(**tensors, **options, scale=0.0).output.detach()
    given = {"target": feature[0] + leaf(*feature.shape[1:], seed=8).detach()}
    if taught:
        given["retain_target"] = feature + 0.5
    options = {**options, **given, "scale": 1.5, "group": codes(forgotten), "norm": norm}
    exact = run(rfa_conv2d, tensors, **options, backend="reference")
    ours = run(rfa_conv2d, tensors, **options, backend="torch")
    for name, truth in exact.items():
        assert torch.allclose(ours[name], truth, rtol=1e-10, atol=1e-10), name
    assert ours["output"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("forgotten", FORGET_COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_near_to_float64_as_autograd_through_the_reference(dtype, forgotten) -> None:
    tensors = convolution_case({"padding": 1}, (3, 3))
    rounded = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in tensors.items()}
    widened = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in rounded.items()}
    options = {"padding": 1, "scale": 1.5, "group": codes(forgotten)}
    exact = run(rfa_conv2d, widened, **options, backend="reference")
    same = run(rfa_conv2d, rounded, **options, backend="reference")
    assert_error_rule(run(rfa_conv2d, rounded, **options, backend="torch"), same, exact, dtype)


@pytest.mark.usefixtures("picked")
@pytest.mark.parametrize("forgotten", FORGET_COUNTS)
@pytest.mark.parametrize("taught", [False, True], ids=["residual", "teacher"])
def test_an_ignored_sample_full_of_nan_reaches_no_loss(taught, forgotten) -> None:
    tensors = convolution_case({}, (3, 3))
    feature = rfa_conv2d(**tensors, scale=0.0).output.detach()
    given = {"target": feature[0], **({"retain_target": feature + 0.5} if taught else {})}
    group = codes(forgotten)
    group[2] = -1
    spoilt = tensors["x"].detach().clone()
    spoilt[2] = torch.nan
    out = rfa_conv2d(**{**tensors, "x": spoilt}, **given, scale=1.5, group=group)
    clean = rfa_conv2d(**tensors, **given, scale=1.5, group=group)
    assert out.retain_loss.item() == pytest.approx(clean.retain_loss.item(), rel=1e-12)
    assert out.forget_loss.item() == pytest.approx(clean.forget_loss.item(), rel=1e-12)


def test_neither_the_frozen_feature_nor_the_residual_is_kept_for_the_backward() -> None:
    """Of the input's size autograd holds x; of the output's the sample to forget; all else is thin (h) or constant."""
    x = torch.randn(8, 16, 12, 12, requires_grad=True)
    weight, a = torch.randn(32, 16, 3, 3), torch.randn(2, 16, 3, 3, requires_grad=True)
    b = torch.randn(32, 2, 1, 1, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    group = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = rfa_conv2d(x, weight, a, b, scale=2.0, padding=1, group=group, backend="torch")
    images = 4 * (8 * 16 * 144 + 1 * 32 * 144 + 8 * 2 * 144 + 32 * 144)  # x, one y, h, x̃
    parameters = 4 * sum(p.numel() for p in (weight, a, b))
    assert images < sum(kept.values()) <= images + parameters + 1024
    assert out.output.shape == (8, 32, 12, 12)


def test_the_output_may_be_added_to_in_place() -> None:
    """A skip connection written `y += x`; with a teacher y is needed later, and autograd says so."""
    tensors = convolution_case({"padding": 1}, (3, 3))

    def total(*, in_place: bool) -> tuple[torch.Tensor, ...]:
        out = rfa_conv2d(**tensors, padding=1, scale=1.5, group=codes(2))
        y = out.output
        y = y.add_(1.0) if in_place else y + 1.0
        return torch.autograd.grad(y.square().sum() + out.forget_loss, (tensors["lora_a"], tensors["lora_b"]))

    for ours, truth in zip(total(in_place=True), total(in_place=False), strict=True):
        assert torch.allclose(ours, truth, rtol=1e-12)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    tensors = convolution_case({}, (3, 3))
    out = rfa_conv2d(**tensors, scale=1.5, group=codes(2))
    (first,) = torch.autograd.grad(out.output.square().sum(), tensors["lora_b"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again; backend='reference' can"):
        first.sum().backward()


@pytest.mark.parametrize("forgotten", FORGET_COUNTS)
def test_the_losses_are_fp32_under_autocast(forgotten) -> None:
    """Products in bf16, sums in fp32: the retain loss is that of the rounded h, to fp32's accuracy."""
    tensors = {k: v.detach().float() for k, v in convolution_case({}, (3, 3)).items()}
    group = codes(forgotten)
    with torch.autocast("cpu", torch.bfloat16):
        out = rfa_conv2d(**tensors, scale=1.5, group=group)
        down = torch.nn.functional.conv2d(tensors["x"], tensors["lora_a"])
    residual = 1.5 * torch.einsum("brhw,nr->bnhw", down.double(), tensors["lora_b"].double()[:, :, 0, 0])
    assert out.retain_loss.item() == pytest.approx(residual[group == 0].square().sum().item(), rel=1e-5)
