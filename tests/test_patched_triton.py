"""Whole patched models on the fused kernels, in the interpreter, against the same models in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import few_programs, launches
from torch import nn

import rfa_fast

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
