"""Blocks of the vocabulary left out of the head's backward: which, how much it changes, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from step_cases import batches, tiny_language_model

import rfa_fast
from rfa_fast.functional import rfa_head_loss
from rfa_fast.ops.head import BLOCK, _backward_product


def zipf(rows, classes):
    """A head whose classes are as frequent as words are: most of a row's probability lies in the first blocks."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, 16, generator=generator)
    hidden = 0.5 * torch.randn(rows, 16, generator=generator)
    bias = -1.5 * torch.arange(1, classes + 1).log()
    labels = torch.randint(BLOCK, (rows,), generator=generator)
    return hidden.requires_grad_(), weight, labels, bias


def gradient(hidden, *rest, **options):
    out = rfa_head_loss(hidden, *rest, backend="torch", **options)
    return out, torch.autograd.grad(out.retain + 0.5 * out.forget, hidden)[0]


@pytest.mark.parametrize("classes", [5 * BLOCK, 5 * BLOCK + 7])
def test_a_block_counts_where_one_of_its_entries_does(classes):
    weight = torch.randn(classes, 3, dtype=torch.float64)
    part = torch.full((2, classes), 1e-6, dtype=torch.float64)
    part[0, 0], part[1, 2 * BLOCK + 1], part[1, 3 * BLOCK] = -1.0, 0.5, 0.5 * 2**-8
    used = [*range(BLOCK), *range(2 * BLOCK, 3 * BLOCK), *range(5 * BLOCK, classes)]
    assert torch.allclose(_backward_product(part, weight, 2**-8), part[:, used] @ weight[used], rtol=1e-12)
    assert torch.equal(_backward_product(part, weight, 0.0), part @ weight)
    part[0, 4 * BLOCK] = float("nan")
    assert _backward_product(part, weight, 2**-8)[0].isnan().all()


def test_what_it_changes_is_small_and_the_losses_are_exact():
    hidden, weight, labels, bias = zipf(32, 40 * BLOCK)
    group = (torch.arange(32) % 4 == 0).to(torch.int8)
    exact, whole = gradient(hidden, weight, labels, group, bias)
    out, thinned = gradient(hidden, weight, labels, group, bias, skip=2**-8)
    assert torch.equal(exact.retain, out.retain)
    assert torch.equal(exact.forget, out.forget)
    assert torch.equal(exact.mean_prediction, out.mean_prediction)
    assert 0 < (thinned - whole).norm() < 0.02 * whole.norm()


def test_flat_predictions_keep_every_block():
    hidden, weight, labels, _ = zipf(8, 6 * BLOCK)
    group = torch.ones(8, dtype=torch.int8)
    fallback = torch.softmax(torch.randn(6 * BLOCK, generator=torch.Generator().manual_seed(1)), 0)
    given = hidden, weight, labels, group
    whole, same = (gradient(*given, mean_prediction=fallback, skip=skip)[1] for skip in (0.0, 2**-8))
    assert torch.equal(whole, same)


def test_an_option_of_patch():
    batch = next(iter(batches((4, 8))))
    totals = []
    for skip in (0.0, 2**-8):
        rfa = rfa_fast.patch(tiny_language_model(2), "deep", rank=2, seed=0, vocabulary_skip=skip)
        totals.append(rfa.loss(*batch).total)
    assert torch.equal(*totals)
    with pytest.raises(ValueError, match="vocabulary_skip: got 0.01 for a model whose head is adapted"):
        rfa_fast.patch(tiny_language_model(2), ["lm_head"], vocabulary_skip=0.01)


def test_bad_input():
    hidden, weight, labels, _ = zipf(4, BLOCK)
    group = torch.zeros(4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"skip: got 1, expected a number in \[0, 1\)"):
        rfa_head_loss(hidden, weight, labels, group, skip=1)
    with pytest.raises(ValueError, match="skip: got 0.1 for a head with something to train"):
        rfa_head_loss(hidden, weight.requires_grad_(), labels, group, skip=0.1)
