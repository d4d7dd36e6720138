"""`train` against a loop written out by hand, and what progress reports say."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from step_cases import tiny_language_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rfa_fast.data import ImageDataset
from rfa_fast.methods import NonFiniteError, hash_model, train
from rfa_fast.methods.progress import ProgressReport


def texts(lengths: list[int], label: int, masked: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(label)
    items = []
    for length in lengths:
        ids = torch.randint(1, 20, (length,), generator=generator)
        item = {"input_ids": ids, "labels": torch.tensor(label)}
        items.append({**item, "attention_mask": torch.ones_like(ids)} if masked else item)
    return items


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from [(torch.zeros(1, 6, 6), 0)] * 4


def test_progress_lines_rate_and_remaining_time() -> None:
    times = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    out = io.StringIO()
    with ProgressReport("unlearn", 8, start=4, stream=out, every=10.0, clock=lambda: next(times)) as report:
        report.step(5, loss=0.5, samples=8)
        report.step(6, loss=0.25, samples=14)
        report.step(7, loss=0.125, samples=10)
        report.say("a word")
        report.step(8, loss=0.0625, samples=28)
    assert out.getvalue().splitlines() == [
        "unlearn: step 6/8, loss 0.25, 2 samples/s, 0:11 left",
        "a word",
        "unlearn: step 8/8, loss 0.0625, 2 samples/s, 0:00 left",
    ]


def test_where_color_is_forced_a_log_still_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with ProgressReport("unlearn", 2, stream=out) as report:
        report.step(1, loss=1.0, samples=1)
    assert out.getvalue().startswith("unlearn: step 1/2, loss 1, ")
    assert "\x1b" not in out.getvalue()


def test_progress_lines_thin_out() -> None:
    """A step a second for an hour: after 200 s the next line comes when a twentieth of the time has passed."""
    times = iter(range(3601))
    out = io.StringIO()
    with ProgressReport("train", 3600, stream=out, every=10.0, clock=lambda: float(next(times))) as report:
        for step in range(1, 3601):
            report.step(step, loss=1.0, samples=1)
    steps = [int(line.partition("step ")[2].partition("/")[0]) for line in out.getvalue().splitlines()]
    assert steps[:20] == list(range(10, 201, 10))
    assert steps[20:23] == [211, 223, 235]  # 210 / 20 = 10.5 s, 221 / 20 = 11.05, 232 / 20 = 11.6
    assert 19 * 3600 / 20 <= steps[-2] < 3600
    assert len(steps) < 90


def test_progress_of_unknown_length_silent_and_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = io.StringIO()
    with ProgressReport("unlearn", None, stream=out) as report:
        report.step(1, loss=1.0, samples=1)
    assert out.getvalue().startswith("unlearn: step 1, loss 1, ")
    assert "left" not in out.getvalue()
    out = io.StringIO()
    with ProgressReport("unlearn", 3, stream=out, enabled=False) as report:
        report.step(1, loss=1.0, samples=1)
        report.say("a word")
    assert out.getvalue() == ""
    terminal = Terminal()
    with ProgressReport("unlearn [1]", 3, stream=terminal) as report:
        report.step(2, loss=0.125, samples=1)
        report.say("a [word]")
    for text in ("unlearn [1]", "2/3", "loss 0.125", "samples/s", "left", "a [word]"):
        assert text in terminal.getvalue()


def test_train_equals_a_loop_by_hand() -> None:
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(11) % 2
    ours, theirs = (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    order: list[int] = []

    class Watched(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            order.append(index)
            return super().__getitem__(index)

    dataset = Watched(x, y)
    result = train(
        ours.eval(), dataset, epochs=2, batch_size=5, lr=1e-2, warmup_steps=2, max_grad_norm=0.5, progress=False
    )
    order = order[-22:]
    assert [sorted(order[:11]), sorted(order[11:])] == [list(range(11))] * 2
    assert order[:11] != order[11:]
    assert [r["samples"] for r in result.history] == [4, 4, 3] * 2  # 11 in batches of at most 5: none of one sample
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.01)
    places = iter(order)
    for step, size in enumerate([4, 4, 3] * 2):
        batch = [next(places) for _ in range(size)]
        optimizer.param_groups[0]["lr"] = [5e-3, 1e-2][min(step, 1)]
        loss = nn.functional.cross_entropy(theirs(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert result.history[step]["total"] == loss.item()
    assert hash_model(ours) == hash_model(theirs)
    assert not ours.training
    assert result.seconds > 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_train_schedules(schedule: Any, expected: list[float]) -> None:
    dataset = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    result = train(
        nn.Linear(4, 2), dataset, epochs=4, batch_size=4, lr=1.0, warmup_steps=4, schedule=schedule, progress=False
    )
    assert [r["lr"] for r in result.history] == pytest.approx(expected)


def test_train_uses_a_models_own_loss_and_texts_are_padded() -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=20, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=8, num_labels=2,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    model = DistilBertForSequenceClassification(config)
    items = texts([3, 5], 0) + texts([4], 1)
    loss = torch.stack([model(**{k: v[None] for k, v in item.items()}).loss for item in items]).mean()
    result = train(model, items, max_steps=1, progress=False)
    assert result.history[0]["total"] == pytest.approx(loss.item(), rel=1e-5)


def test_train_from_a_loader_and_by_seed() -> None:
    dataset = TensorDataset(torch.randn(9, 4), torch.arange(9) % 2)
    models = [nn.Linear(4, 2) for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    for model, seed in zip(models, (1, 1, 2), strict=True):
        state = torch.get_rng_state()
        result = train(model, DataLoader(dataset, 4, shuffle=True), epochs=2, lr=0.1, seed=seed, progress=False)
        assert torch.equal(state, torch.get_rng_state())
        assert [r["samples"] for r in result.history] == [4, 4, 1] * 2
    hashes = [hash_model(model) for model in models]
    assert hashes[0] == hashes[1] != hashes[2]


def test_train_bad_input() -> None:
    sound = TensorDataset(torch.randn(9, 4), torch.arange(9) % 2)
    for given, error, message in [
        ({"schedule": "step"}, ValueError, "schedule: got 'step'"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: got -1"),
        ({"dataset": {}}, TypeError, "dataset: got dict"),
        ({"dataset": []}, ValueError, "dataset: got one without samples"),
        ({"dataset": DataLoader(sound), "batch_size": 2}, ValueError, "batch_size, collate_fn: got a value beside"),
        ({"dataset": DataLoader(Stream()), "schedule": "linear"}, ValueError, "expected max_steps"),
        ({"dataset": ImageDataset(torch.zeros(2, 1, 2, 2), [0, 5], tuple("abcdef"))}, ValueError, "got label 5 at"),
    ]:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        before = hash_model(model)
        with pytest.raises(error, match=message):
            train(model, **{"dataset": sound, "progress": False, **given})
        assert hash_model(model) == before
    with pytest.raises(ValueError, match="labels: got 5, expected 0 to 1, or -100"):
        train(nn.Linear(4, 2), DataLoader(TensorDataset(torch.randn(2, 4), torch.tensor([0, 5]))), progress=False)
    with pytest.raises(ValueError, match="parameters are all frozen"):
        train(nn.Linear(4, 2).requires_grad_(False), sound, progress=False)
    with pytest.raises(ValueError, match="model: got an output of"):
        train(nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), DataLoader(sound), progress=False)
    model = nn.Linear(4, 2)
    x = torch.randn(8, 4)
    x[5] = float("inf")
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan.*not: weight"):
        train(model, TensorDataset(x, torch.zeros(8, dtype=torch.int64)), progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_batch_without_a_label_changes_nothing_but_the_count() -> None:
    """-100 leaves a sample out: of a batch with nothing else the mean over nothing was NaN."""
    torch.manual_seed(0)
    x, labels = torch.randn(4, 4), torch.tensor([0, -100, 1, -100])
    model = nn.Linear(4, 2)
    settings = {"lr": 0.1, "weight_decay": 0.0, "progress": False}
    found = train(model, DataLoader(TensorDataset(x, labels), batch_size=1), epochs=1, **settings)
    assert [step["total"] for step in found.history][1::2] == [0.0, 0.0]
    assert all(step["total"] > 0 for step in found.history[::2])

    ids = torch.randint(5, 60, (4, 6))
    taught = ids.clone()
    taught[:2, 1:] = -100  # no position predicts the first token
    texts = [
        {"input_ids": a, "attention_mask": torch.ones_like(a), "labels": b} for a, b in zip(ids, taught, strict=True)
    ]
    found = train(tiny_language_model(), DataLoader(texts, batch_size=2), epochs=1, **settings)
    assert found.history[0]["total"] == 0.0
    assert found.history[1]["total"] > 1.0
