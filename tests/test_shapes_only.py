"""Runs on shapes: what stays real, what is refused, and that a model's copy is one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from rfa_fast.metrics.live_storage import live_storage
from rfa_fast.metrics.shapes_only import DependsOnValues, fake_copy, shapes_only


def test_matrices_are_fake_and_what_decisions_are_made_from_is_real() -> None:
    with shapes_only():
        x = torch.randn(4, 10**9)
        group = torch.tensor([0, 1, 1, -1], dtype=torch.int8)
        rows = (group == 1).nonzero().squeeze(1)
        assert isinstance(x, FakeTensor)
        assert rows.tolist() == [1, 2]
        assert x[rows].shape == (2, 10**9)
        assert x[group == 0].shape == (1, 10**9)  # a known mask selects a known number of rows
        x[group == 0] = 0.0
        row_loss = x.square().sum(1)
        weights = torch.where(group == 1, row_loss, 0)
        assert weights.nonzero().squeeze(1).tolist() == [1, 2]


def test_a_step_is_taken_for_a_healthy_one() -> None:
    with shapes_only():
        loss = torch.randn(1000, 1000).square().mean()
        assert bool(torch.isfinite(loss))
        assert loss.item() == 1.0
        assert not bool(torch.isnan(torch.randn(1000, 1000)).any())
        assert bool((torch.randn(1000, 1000) == 0).all())


def test_what_depends_on_a_matrix_is_refused() -> None:
    with shapes_only():
        scores = torch.randn(1000, 1000)
        with pytest.raises(
            DependsOnValues, match=r"got aten\.nonzero\.default of \(1000, 1000\), whose result depends"
        ):
            scores.nonzero()
        with pytest.raises(ValueError, match="expected a step whose course depends on its masks"):
            scores[scores > 0]


def test_writing_into_a_real_tensor_keeps_it() -> None:
    with shapes_only():
        total = torch.zeros(())
        same = total.add_(torch.randn(30, 30).sum())
        assert same is total
        assert not isinstance(total, FakeTensor)
        buffer = torch.zeros(5)
        torch.sum(torch.randn(5, 7), 1, out=buffer)
        buffer += torch.randn(5, 7).sum(1)
        assert buffer.shape == (5,)


def test_large_masks_become_shapes_too() -> None:
    with shapes_only():
        mask = torch.ones(3000, 3000, dtype=torch.bool)
        assert isinstance(mask, FakeTensor)
        ids = torch.arange(3000)
        assert isinstance(ids[:, None].float() @ ids[None].float(), FakeTensor)
        assert isinstance(F.one_hot(ids, 10_000), FakeTensor)
        mean = torch.ones(20_000)[None]
        assert isinstance(mean[ids % 1], FakeTensor)
        assert mean[torch.tensor([True])].shape == (1, 20_000)


def test_a_reduced_loss_keeps_its_elements_as_torch_does() -> None:
    sizes = {}
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss", "l1_loss", "binary_cross_entropy"):
        loss = getattr(F, name)
        real = loss(torch.rand(3, 50), torch.rand(3, 50))
        with shapes_only():
            sizes[name] = loss(torch.rand(3, 50), torch.rand(3, 50)).untyped_storage().nbytes()
        assert sizes[name] == real.untyped_storage().nbytes(), name
    assert sizes["mse_loss"] == 600


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_copy_on_shapes_leaves_the_model_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    net[2].requires_grad_(False)
    net[2].weight.requires_grad_(True)
    net[1].running_mean += 3
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with shapes_only():
        twin = fake_copy(net)
        assert isinstance(twin[0].weight, FakeTensor)
        assert twin[0].weight is twin[2].weight
        assert not twin[2].bias.requires_grad
        assert twin[1].running_mean.tolist() == [3.0] * 8  # small vectors keep their values
        twin[1].running_mean.zero_()
        twin(torch.randn(5, 8)).sum().backward()
        twin.zero_grad()
        twin.to("cpu")  # what PEFT does with every layer it wraps
        again = copy.deepcopy(twin)
        with live_storage(again) as live:
            again(torch.randn(5, 8))
            assert live.existing == 256 + 4 * 32 + 2 * 32 + 8  # once 8 × 8, four vectors, statistics and their count
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_model_without_weights_is_enough() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with shapes_only():
        twin = fake_copy(net)
        assert twin[0].weight.device.type == "cpu"
        assert twin(torch.randn(5, 8)).shape == (5, 8)


def test_a_model_that_cannot_be_copied_is_named() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> Stubborn:
            raise TypeError("no")

    with shapes_only(), pytest.raises(TypeError, match=r"model: got a Stubborn that cannot be copied \(no\)"):
        fake_copy(Stubborn(2, 2))


def test_writing_changes_no_shape_and_resizing_does() -> None:
    with shapes_only():
        x = torch.randn(30, 40)
        assert x.mul_(2).add_(torch.randn(40)) is x
        assert x.t_().shape == (40, 30)
        with live_storage(x) as live:
            assert x.resize_(80, 30).shape == (80, 30)
            x.exp_()
            assert live.current == 80 * 30 * 4
        leaf = torch.randn(30, 40, requires_grad=True)
        (leaf * 2).exp_().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == (30, 40)
