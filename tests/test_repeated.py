"""D_f several times over: seen that often, named and recorded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from rfa_fast import unlearn
from rfa_fast.data import ForgetRetainBatchSampler, ImageDataset, MixedDataset, Repeated, TextDataset, ids_of
from rfa_fast.experiments.cache import fingerprint, labels_of
from rfa_fast.methods.record import hash_ids, read_record, verify_record


def test_every_sample_comes_as_often_lap_after_lap() -> None:
    texts = TextDataset(["a", "b", "c"], [0, 1, 0], ("x", "y"), ids=["p", "q", "r"])
    forget = Subset(texts, [2, 0])
    five = Repeated(forget, 5)
    assert len(five) == 10
    assert [five[i] for i in range(10)] == [("c", 0), ("a", 0)] * 5
    assert ids_of(five) == ["r", "p"] * 5
    assert labels_of(five) == [0] * 10
    assert fingerprint(five) != fingerprint(forget)
    assert ids_of(MixedDataset(Subset(texts, [1]), five)) == ["q"] + ["r", "p"] * 5
    assert list(Repeated(["only"], 1)) == ["only"]


def test_a_natural_shuffle_draws_each_five_times() -> None:
    retain, five = list(range(7)), Repeated([10, 11], 5)
    sampler = ForgetRetainBatchSampler(len(five), len(retain), 4, forget_per_batch="natural", seed=3)
    mixed = MixedDataset(retain, five)
    drawn = [mixed[i][0] for batch in sampler for i in batch]
    assert [drawn.count(value) for value in (10, 11, *retain)] == [5, 5] + [1] * 7


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [(0, ValueError, "times: got 0, expected an integer >= 1"), (1.5, TypeError, "times: got 1.5"),
     (True, TypeError, "times: got True")],
    ids=["none", "no-integer", "bool"],
)  # fmt: skip
def test_times_out_of_range(times: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Repeated(["a"], times)
    with pytest.raises(TypeError, match="without a length"):
        Repeated(iter("a"), 2)  # type: ignore[arg-type]


def test_the_deletion_record_counts_each_sample_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = ImageDataset(
        torch.randn(12, 1, 2, 2, generator=generator), [i % 3 for i in range(12)], ("a", "b", "c"),
        ids=[f"photo {i}" for i in range(12)],
    )  # fmt: skip
    gone = [1, 4]
    kept = [i for i in range(12) if i not in gone]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    result = unlearn(
        model, Repeated(Subset(data, gone), 5), Subset(data, kept), targets="all", rank=2, batch_size=5,
        forget_per_batch="natural", output_dir=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert sum(step["forget"] for step in result.history) == 10
    names = ["photo 1", "photo 4"]
    assert result.record["forget"]["count"] == 2
    assert (result.record["forget"]["sha256"], result.record["forget"]["digest"]) == hash_ids(names)
    assert verify_record(read_record(tmp_path / "run"), result.model, names) == []
    with pytest.raises(ValueError, match="1 samples that are in forget too"):
        unlearn(model, Repeated(Subset(data, gone), 5), Subset(data, [1, *kept]), targets="all", rank=2, progress=False)
