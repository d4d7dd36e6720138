"""The reference objective against the paper's equations written out with loops, and against gradcheck."""

from __future__ import annotations

import math

import pytest
import torch

from rfa_fast.objective import (
    FORGET,
    RETAIN,
    alignment_sums,
    combine,
    dora_residual_weight,
    group_mean,
    masked_norm_sum,
    mean_prediction,
    task_sums,
    units_and_elements,
)

GROUPS = {
    "mixed": [0, 1, 0, -1, 1, 0],
    "all-retain": [0] * 6,
    "all-forget": [1] * 6,
    "all-ignored": [-1] * 6,
    "one-retain": [1, 1, 1, 0, -1, 1],
}


def codes(name: str) -> torch.Tensor:
    return torch.tensor(GROUPS[name], dtype=torch.int8)


def by_hand(frozen, residual, group, norm, target=None, retain_target=None):
    """Eq. 1 and 2, sample by sample; the mean is taken over whole retained samples."""
    kept = [i for i, g in enumerate(group.tolist()) if g == 0]
    forgotten = [i for i, g in enumerate(group.tolist()) if g == 1]
    if target is None:
        target = sum(frozen[i] for i in kept) / len(kept) if kept else None
    measure = (lambda e: float((e**2).sum())) if norm == "mse" else (lambda e: math.sqrt(float((e**2).sum())))
    output = frozen + residual
    retain = sum(measure(residual[i] if retain_target is None else output[i] - retain_target[i]) for i in kept)
    forget = 0.0 if target is None else sum(measure(output[i] - target) for i in forgotten)
    return retain, forget


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("teacher", [False, True], ids=["residual", "teacher"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4, 2)], ids=["rows", "maps"])
def test_alignment_equals_the_equations(name, norm, teacher, shape):
    generator = torch.Generator().manual_seed(3)
    frozen, residual, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    retain_target = other if teacher else None
    sums = alignment_sums(
        frozen, residual, codes(name), retain_target=retain_target, norm=norm, per_sample=len(shape) > 2
    )
    retain, forget = by_hand(frozen, residual, codes(name), norm, retain_target=retain_target)
    assert float(sums.retain) == pytest.approx(retain, rel=1e-13, abs=1e-13)
    assert float(sums.forget) == pytest.approx(forget, rel=1e-13, abs=1e-13)


def test_a_given_target_is_used_and_is_a_constant():
    frozen = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.full((3,), 4.0, dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 1], dtype=torch.int8)
    sums = alignment_sums(frozen, torch.zeros_like(frozen), group, target=target)
    assert float(sums.forget.detach()) == 27.0
    sums.forget.backward()
    assert target.grad is None
    assert frozen.grad.tolist() == [[0.0] * 3, [-6.0] * 3]


def test_the_computed_mean_is_a_constant():
    frozen = torch.tensor([[1.0], [5.0]], dtype=torch.float64, requires_grad=True)
    sums = alignment_sums(frozen, torch.zeros_like(frozen), torch.tensor([0, 1], dtype=torch.int8))
    sums.forget.backward()
    assert frozen.grad.tolist() == [[0.0], [8.0]]  # 2 · (5 − 1), and nothing through the mean


@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
@pytest.mark.parametrize("teacher", [False, True], ids=["residual", "teacher"])
def test_gradcheck(norm, per_sample, teacher):
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([[0, 0, -1], [1, 1, 1], [0, -1, -1]], dtype=torch.int8)
    target, other = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4,), (3, 3, 4)))

    def loss(frozen, residual):
        sums = alignment_sums(
            frozen, residual, group, target=target, retain_target=other if teacher else None, norm=norm,
            per_sample=per_sample,
        )  # fmt: skip
        return sums.retain, sums.forget

    args = [torch.randn(3, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, args)


def test_gradcheck_of_the_task_terms():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels, group = torch.tensor([1, -100, 3, 0, 2]), torch.tensor([0, 0, 1, 0, 1], dtype=torch.int8)
    soft, _ = mean_prediction(logits, labels, group)
    assert torch.autograd.gradcheck(lambda z: task_sums(z, labels, group, soft)[:2], [logits])


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_unsquared_norm_has_gradient_zero_at_zero(per_sample):
    error = torch.zeros(3, 4, requires_grad=True)
    masked_norm_sum(error, torch.tensor([True, True, False]), norm="l2", per_sample=per_sample).backward()
    assert torch.equal(error.grad, torch.zeros(3, 4))


def test_ignored_rows_may_hold_anything():
    error = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]], requires_grad=True)
    total = masked_norm_sum(error, torch.tensor([True, False]), norm="mse", per_sample=False)
    total.backward()
    assert float(total.detach()) == 5.0
    assert error.grad.tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_mean_per_position_leaves_positions_without_a_retained_token_out():
    values = torch.tensor([[[1.0], [9.0]], [[3.0], [9.0]], [[7.0], [7.0]]])
    group = torch.tensor([[0, -1], [0, -1], [1, 1]], dtype=torch.int8)
    mean, known = group_mean(values, group, (0,))
    assert mean.tolist() == [[2.0], [0.0]]
    assert known.tolist() == [[True], [False]]
    sums = alignment_sums(values, torch.zeros_like(values), group, mean_dims=(0,))
    assert float(sums.forget) == 25.0  # (7 − 2)² at position 0; position 1 has no target


def test_mean_over_all_tokens():
    values = torch.tensor([[[1.0], [9.0]], [[3.0], [9.0]], [[7.0], [7.0]]])
    group = torch.tensor([[0, -1], [0, 0], [1, 1]], dtype=torch.int8)
    mean, known = group_mean(values, group, (0, 1))
    assert mean.tolist() == pytest.approx([13 / 3])
    assert known.tolist() == [True]


@pytest.mark.parametrize(
    ("group", "shape", "norm", "per_sample", "retain", "forget"),
    [
        ([0, 0, 1], (3, 4, 5, 6), "mse", True, 240, 120),
        ([0, 0, 1], (3, 4, 5, 6), "l2", True, 2, 1),
        ([0, 0, 1], (3, 7, 5), "mse", False, 70, 35),
        ([0, 0, 1], (3, 7, 5), "l2", False, 14, 7),
        ([[0, -1], [0, 0], [1, -1]], (3, 2, 5), "mse", False, 15, 5),
        ([[0, -1], [0, 0], [1, -1]], (3, 2, 5), "l2", False, 3, 1),
        ([[0, -1], [0, 0], [1, -1]], (3, 2, 5), "l2", True, 2, 1),
        ([-1, -1, -1], (3, 5), "mse", False, 1, 1),
    ],
)
def test_what_a_sum_is_divided_by(group, shape, norm, per_sample, retain, forget):
    group = torch.tensor(group, dtype=torch.int8)
    assert int(units_and_elements(group, shape, RETAIN, norm=norm, per_sample=per_sample)) == retain
    assert int(units_and_elements(group, shape, FORGET, norm=norm, per_sample=per_sample)) == forget


def test_task_terms_equal_torch_cross_entropy():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([4, -100, 2, 0, -100, 1])
    group = torch.tensor([0, 0, 1, 0, 1, -1], dtype=torch.int8)
    soft, count = mean_prediction(logits, labels, group)
    sums = task_sums(logits, labels, group, soft)
    expected_soft = logits[[0, 3]].softmax(-1).mean(0)
    cross_entropy = torch.nn.functional.cross_entropy
    assert torch.allclose(soft, expected_soft, rtol=1e-14)
    assert float(sums.retain) == pytest.approx(float(cross_entropy(logits[[0, 3]], labels[[0, 3]], reduction="sum")))
    assert float(sums.forget) == pytest.approx(float(cross_entropy(logits[[2]], expected_soft[None], reduction="sum")))
    assert (int(count), int(sums.retain_count), int(sums.forget_count)) == (2, 2, 1)


def test_without_a_labelled_retain_row_the_fallback_or_nothing():
    logits, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    group = torch.tensor([1, 1], dtype=torch.int8)
    nothing, _ = mean_prediction(logits, labels, group)
    assert float(task_sums(logits, labels, group, nothing).forget) == 0.0
    kept, _ = mean_prediction(logits, labels, group, fallback=torch.tensor([1.0, 0, 0, 0]))
    assert float(task_sums(logits, labels, group, kept).forget) == pytest.approx(2 * math.log(4))


def test_the_terms_are_combined_as_in_eq_4_to_6():
    terms = [torch.tensor(v, dtype=torch.float64) for v in (2.0, 3.0, 5.0, 7.0)]
    loss = combine(*terms, layers=4, gamma=0.25, weights=(1.5, 0.5, 2.0, 0.1))
    align, task = 1.5 * 2 + 0.5 * 3, 2.0 * 5 + 0.1 * 7
    assert float(loss.align) == pytest.approx(align)
    assert float(loss.task) == pytest.approx(task)
    assert float(loss.total) == pytest.approx(0.25 / 4 * align + 0.75 * task)


def test_sums_of_half_precision_features_are_taken_in_fp32():
    frozen = torch.full((2, 4096), 0.1, dtype=torch.bfloat16)
    sums = alignment_sums(frozen, frozen, torch.tensor([0, 1], dtype=torch.int8))
    exact = 4096 * float(frozen[0, 0]) ** 2
    assert sums.retain.dtype == torch.float32
    assert float(sums.retain) == pytest.approx(exact, rel=1e-5)


def test_dora_change_equals_its_formula():
    generator = torch.Generator().manual_seed(5)
    weight, product = (torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    magnitude = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    change = dora_residual_weight(weight, product, magnitude)
    for i in range(3):
        row = (weight + product)[i]
        expected = magnitude[i] * row / row.pow(2).sum().sqrt() - weight[i]
        assert torch.allclose(change[i], expected, rtol=1e-13)
