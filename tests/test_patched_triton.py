"""Whole patched models on the fused kernels, in the interpreter, against the same models in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import few_programs, launches
from torch import nn

import rfa_fast
from rfa_fast.functional import rfa_head_loss, rfa_linear

__all__ = ["few_programs"]

pytestmark = pytest.mark.usefixtures("few_programs")


class Tokens(nn.Module):
    """Blocks over tokens; causal enough for what is tested."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12, bias=False)}) for _ in range(2)
        )
        self.classifier = nn.Linear(12, 5)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.classifier(x.mean(1))


def losses_and_gradients(model, backend, batches, **options):
    torch.manual_seed(1)
    rfa = rfa_fast.patch(
        copy.deepcopy(model), targets=r".*(up|down|classifier|conv\d)", rank=3, backend=backend, **options
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in rfa.model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    results = []
    with launches() as seen:
        for inputs, labels, forget in batches:
            loss = rfa.loss(inputs, labels, forget)
            loss.total.backward()
            results += [*loss, *(p.grad.clone() for p in rfa.model.parameters() if p.requires_grad)]
            rfa.model.zero_grad()
    return results, seen


def text_batches():
    generator = torch.Generator().manual_seed(0)
    for forget in ([False, True, False], [True, True, True], [False, False, False]):
        ids = torch.randint(0, 11, (3, 4), generator=generator)
        yield {"input_ids": ids}, torch.tensor([0, 3, 2]), torch.tensor(forget)


@pytest.mark.parametrize("feature_mean", ["token", "sample"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_a_model_of_tokens(mode, norm, feature_mean):
    """The second batch has no retain sample, and takes the x̃ of the first."""
    torch.manual_seed(0)
    model, options = Tokens(), {"mode": mode, "norm": norm, "feature_mean": feature_mean}
    ours, seen = losses_and_gradients(model, "triton", text_batches(), **options)
    truth, none = losses_and_gradients(model, "torch", text_batches(), **options)
    assert seen["linear_forward_kernel"] == 3 * 5
    assert (seen["feature_mean_kernel"] > 0) == (mode == "residual" and feature_mean == "token")
    assert not none
    for one, other in zip(ours, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_it_says_which_backend_and_why():
    rfa = rfa_fast.patch(Tokens(), targets=r".*up", backend="triton")
    assert "backend: triton (forced by the backend argument: Triton" in str(rfa.report())
    assert "interprets" in str(rfa.report())
    assert "backend: torch (automatic choice for a tensor on cpu)" in str(
        rfa_fast.patch(Tokens(), targets=r".*up").report()
    )


def test_an_activation_in_place_after_a_layer_whose_output_is_kept():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    rfa = rfa_fast.patch(model, targets=["0"], rank=2, backend="triton")
    assert not model[1].inplace
    loss = rfa.loss(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, True, False]))
    loss.total.backward()
    assert float(model[0].lora_b.grad.abs().sum()) > 0
    rfa.remove()
    assert model[1].inplace


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_a_convolution_runs_under_autocast(mode):
    """Its Gram matrices were narrowed, which its kernels do not take."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    images, labels, forget = torch.randn(4, 3, 6, 6), torch.tensor([0, 3, 2, 1]), torch.arange(4) < 2
    losses = []
    for backend in ("torch", "triton"):
        rfa = rfa_fast.patch(copy.deepcopy(model), ["0", "3"], rank=2, seed=0, backend=backend, mode=mode)
        generator = torch.Generator().manual_seed(1)
        for layer in rfa.layers.values():
            layer.lora_b.data.normal_(generator=generator)
        optimizer = torch.optim.SGD(rfa.parameters(), 0.0)
        losses.append(
            rfa_fast.compile_step(rfa, optimizer, autocast=torch.bfloat16, compile=False)(images, labels, forget)
        )
    for one, other in zip(*losses, strict=True):
        assert torch.allclose(one, other, rtol=0.1)  # the interpreter truncates where a GPU rounds


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_narrows_no_sum_of_an_operator(backend):
    """Between operands of bf16 there is nothing for autocast to do, and fp32 sums are none of its affair."""
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*shape).bfloat16() for shape in ((24, 40), (16, 40), (4, 40), (16, 4)))
    labels, group = torch.arange(24) % 16, (torch.arange(24) % 2).to(torch.int8)
    target, soft = torch.randn(16), torch.rand(16).softmax(0)

    def figures():
        linear = rfa_linear(
            x, weight, a.float(), b.float(), scale=2.0, group=group, target=target, norm="l2", backend=backend
        )
        head = rfa_head_loss(x, weight, labels, group, mean_prediction=soft, backend=backend)
        return linear.retain_loss, linear.forget_loss, head.retain, head.forget, head.mean_prediction

    plain = figures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, other in zip(figures(), plain, strict=True):
            assert torch.equal(one, other)


def test_tf32_is_what_torch_s_switches_say(monkeypatch):
    from rfa_fast.kernels.common import precision

    matmul, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert precision(torch.float32, cuda) == "tf32"
        assert precision(torch.float32, torch.device("cpu")) == precision(torch.bfloat16, cuda) == "ieee"
        matmul.fp32_precision = "ieee"
        assert precision(torch.float32, cuda) == "ieee"
    finally:
        matmul.fp32_precision = was
