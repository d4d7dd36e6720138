"""Batches of forget and retain samples: counts, balance, determinism, resuming."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rfa_fast.data import ForgetRetainBatchSampler, ImageDataset, MixedDataset, collate_mixed

sizes = {
    "n_forget": st.integers(0, 40),
    "n_retain": st.integers(0, 60),
    "batch_size": st.integers(2, 24),
    "seed": st.integers(-3, 2**40),
    "epoch": st.integers(0, 5),
}


def build(n_forget: int, n_retain: int, batch_size: int, **options) -> ForgetRetainBatchSampler:
    return ForgetRetainBatchSampler(n_forget, n_retain, batch_size, **options)


def by_hand(n_forget: int, n_retain: int, batch_size: int) -> int:
    """Forget samples per batch under "auto", in exact arithmetic."""
    share = math.ceil(Fraction(batch_size * n_forget, n_forget + n_retain))
    return max(1, min(share, batch_size - 1, n_forget))


@settings(deadline=None)
@given(**sizes, mode=st.sampled_from(["auto", "natural"]))
def test_every_retained_sample_once_and_the_length_exact(
    n_forget: int, n_retain: int, batch_size: int, seed: int, epoch: int, mode: str
) -> None:
    if n_forget + n_retain == 0:
        with pytest.raises(ValueError, match="expected at least one sample"):
            build(n_forget, n_retain, batch_size)
        return
    sampler = build(n_forget, n_retain, batch_size, seed=seed, epoch=epoch, forget_per_batch=mode)
    batches = list(sampler)
    assert len(sampler) == len(batches) == sampler.batches
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    retained = [index for batch in batches for index in batch if index < n_retain]
    assert sorted(retained) == list(range(n_retain))
    seen = Counter(index - n_retain for batch in batches for index in batch if index >= n_retain)
    assert set(seen) <= set(range(n_forget))
    if mode == "natural" or not n_retain:
        assert seen == Counter(range(n_forget))
    elif n_forget <= n_retain * (batch_size - 1):
        assert set(seen) == set(range(n_forget))


@settings(deadline=None)
@given(n_forget=st.integers(1, 40), n_retain=st.integers(1, 60), batch_size=st.integers(2, 24), seed=st.integers(0, 99))
def test_auto_puts_their_share_into_every_batch(n_forget: int, n_retain: int, batch_size: int, seed: int) -> None:
    each = by_hand(n_forget, n_retain, batch_size)
    batches = list(build(n_forget, n_retain, batch_size, seed=seed))
    assert [sum(index >= n_retain for index in batch) for batch in batches] == [each] * len(batches)
    assert len(batches) == -(-n_retain // (batch_size - each))
    assert all(any(index < n_retain for index in batch) for batch in batches)
    assert all(len(set(batch)) == len(batch) for batch in batches)
    seen = Counter(index for batch in batches for index in batch if index >= n_retain)
    counts = [seen[n_retain + i] for i in range(n_forget)]
    assert max(counts) - min(counts) <= 1


@settings(deadline=None)
@given(n_forget=st.integers(1, 12), n_retain=st.integers(1, 60), batch_size=st.integers(2, 24), data=st.data())
def test_a_number_is_that_many(n_forget: int, n_retain: int, batch_size: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(1, batch_size - 1))
    batches = list(build(n_forget, n_retain, batch_size, forget_per_batch=each))
    assert [sum(index >= n_retain for index in batch) for batch in batches] == [each] * len(batches)
    seen = Counter(index for batch in batches for index in batch if index >= n_retain)
    counts = [seen[n_retain + i] for i in range(n_forget)]
    assert max(counts) - min(counts) <= 1
    if each <= n_forget:
        assert all(len(set(batch)) == len(batch) for batch in batches)


@settings(deadline=None)
@given(**sizes, mode=st.sampled_from(["auto", "natural", 1]), data=st.data())
def test_going_on_at_a_batch_gives_the_rest_of_the_epoch(
    n_forget: int, n_retain: int, batch_size: int, seed: int, epoch: int, mode: str | int, data: st.DataObject
) -> None:
    n_forget, n_retain = n_forget + 1, n_retain + 1
    options = {"seed": seed, "epoch": epoch, "forget_per_batch": mode}
    whole = list(build(n_forget, n_retain, batch_size, **options))
    start = data.draw(st.integers(0, len(whole)))
    rest = build(n_forget, n_retain, batch_size, start=start, **options)
    assert len(rest) == len(whole) - start
    assert list(rest) == whole[start:]
    assert list(rest) == whole[start:]
    again = build(n_forget, n_retain, batch_size, seed=seed, forget_per_batch=mode)
    again.set_epoch(epoch, start=start)
    assert list(again) == whole[start:]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(build(10, 50, 8, seed=seed, epoch=epoch))

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    # Seed 0, epoch 1 is not seed 1, epoch 0: two seeds do not share all but one epoch.
    orders = [[i for batch in order(seed, epoch) for i in batch] for seed in range(3) for epoch in range(3)]
    for group in ([[i for i in each if i < 50] for each in orders], [[i for i in each if i >= 50] for each in orders]):
        assert all(a != b for i, a in enumerate(group) for b in group[:i])


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    list(build(10, 50, 8))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["auto", "natural"])
def test_every_order_is_as_likely(mode: str) -> None:
    first = Counter(next(iter(build(2, 4, 3, seed=seed, forget_per_batch=mode)))[0] for seed in range(600))
    expected = 600 / (4 if mode == "auto" else 6)
    assert all(abs(first[i] - expected) < 5 * expected**0.5 for i in range(4 if mode == "auto" else 6))


def test_the_papers_sample_scenario() -> None:
    # 128 of 50,000 at batch size 128: one per batch instead of none in about 72 % of them.
    auto = list(build(128, 49_872, 128))
    assert len(auto) == -(-49_872 // 127)
    assert all(sum(index >= 49_872 for index in batch) == 1 for batch in auto)
    natural = list(build(128, 49_872, 128, forget_per_batch="natural"))
    assert len(natural) == 391
    without = sum(all(index < 49_872 for index in batch) for batch in natural) / len(natural)
    assert 0.64 < without < 0.80


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_forget": 0, "n_retain": 0}, ValueError, "got 0 and 0, expected at least one sample"),
        ({"n_forget": -1}, ValueError, "n_forget: got -1"),
        ({"n_retain": 2.0}, TypeError, "n_retain: got 2.0, expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"batch_size": True}, TypeError, "batch_size: got True"),
        ({"batch_size": 1}, ValueError, "batch_size: got 1, expected 2 or more"),
        ({"forget_per_batch": "all"}, ValueError, "forget_per_batch: got 'all', expected 'auto', 'natural'"),
        ({"forget_per_batch": 0}, ValueError, "forget_per_batch: got 0"),
        ({"forget_per_batch": 8}, ValueError, "forget_per_batch: got 8, expected less than batch_size=8"),
        ({"forget_per_batch": 2, "n_forget": 0}, ValueError, "n_forget: got 0 with forget_per_batch=2"),
        ({"forget_per_batch": 2, "n_retain": 0}, ValueError, "n_retain: got 0 with forget_per_batch=2"),
        ({"start": 4}, ValueError, "start: got 4, expected at most the 3 batches"),
        ({"start": -1}, ValueError, "start: got -1"),
        ({"epoch": -1}, ValueError, "epoch: got -1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"n_forget": 4, "n_retain": 16, "batch_size": 8}
    with pytest.raises(error, match=message):
        ForgetRetainBatchSampler(**{**arguments, **options})  # type: ignore[arg-type]


def test_another_epoch_out_of_range_changes_nothing() -> None:
    sampler = build(4, 16, 8)
    before = list(sampler)
    with pytest.raises(ValueError, match="start: got 9"):
        sampler.set_epoch(1, start=9)
    assert list(sampler) == before


def test_through_a_data_loader() -> None:
    images = torch.arange(20.0).reshape(20, 1, 1, 1)
    retain = ImageDataset(images[:16], [0] * 16, classes=("a", "b"), channels=3)
    forget = ImageDataset(images[16:], [1] * 4, classes=("a", "b"), channels=3)
    sampler = build(4, 16, 8, seed=3)
    loader = DataLoader(MixedDataset(retain, forget), batch_sampler=sampler, collate_fn=collate_mixed)
    assert len(loader) == 3
    for (inputs, labels, is_forget), indices in zip(loader, sampler, strict=True):
        assert inputs.shape == (len(indices), 3, 1, 1)
        assert inputs[:, 2, 0, 0].tolist() == indices
        assert is_forget.dtype == torch.bool
        assert is_forget.tolist() == [index >= 16 for index in indices]
        assert labels.tolist() == is_forget.long().tolist()
