"""`unlearn` against a loop written out by hand: steps, seeds, loaders, texts, stopping, figures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from unlearn_cases import LAYERS, LOADED, OPTIONS, data, net, unseen

from rfa_fast import patch, unlearn
from rfa_fast.data import ForgetRetainBatchSampler
from rfa_fast.methods import METHODS, StepRecord, hash_model


def test_equals_a_loop_by_hand() -> None:
    everything, forget, retain = data()
    ours = net()
    result = unlearn(ours, forget, retain, epochs=2, seed=7, weight_decay=0.1, **OPTIONS)
    theirs = net()
    rfa = patch(theirs, LAYERS, rank=2, seed=7)
    optimizer = torch.optim.AdamW(rfa.parameters(), lr=1e-2, weight_decay=0.1)
    totals = []
    for epoch in range(2):
        for batch in ForgetRetainBatchSampler(len(forget), len(retain), 10, forget_per_batch=4, seed=7, epoch=epoch):
            gone = [index >= len(retain) for index in batch]
            places = [
                forget.indices[i - len(retain)] if g else retain.indices[i] for i, g in zip(batch, gone, strict=True)
            ]
            labels = torch.tensor([everything.labels[i] for i in places])
            loss = rfa.loss(everything.images[places], labels, torch.tensor(gone)).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.append(loss.item())
    rfa.merge()
    assert hash_model(ours) == hash_model(theirs)
    assert [record["total"] for record in result.history] == totals
    assert [record["step"] for record in result.history] == list(range(1, len(totals) + 1))
    assert (result.stopped, result.rfa, result.model) == ("finished", None, ours)
    first = result.history[0]
    assert first["align"] == pytest.approx(first["retain_align"] + first["forget_align"])
    assert first["total"] == pytest.approx(0.5 / 3 * first["align"] + 0.5 * first["task"])
    assert (first["retain"] + first["forget"], first["lr"], first["epoch"]) == (10, 1e-2, 1)


@unseen
def test_gradient_clipping_by_hand() -> None:
    _, forget, retain = data()
    free = unlearn(net(), forget, retain, max_steps=1, merge=False, **OPTIONS)
    clipped = unlearn(net(), forget, retain, max_steps=1, merge=False, max_grad_norm=1e-3, **OPTIONS)
    ratio = 1e-3 / free.history[0]["grad_norm"]
    assert ratio < 0.1
    assert clipped.history[0]["grad_norm"] == free.history[0]["grad_norm"]
    for name, p in clipped.rfa.named_parameters().items():
        whole = free.rfa.named_parameters()[name].grad
        torch.testing.assert_close(p.grad, whole * ratio, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("method", ["rfa", "scrub"])
def test_the_rate_falls_to_the_end_of_the_run(method: str, tmp_path: Path) -> None:
    """Against torch's own schedule; and a run that stops and is resumed has the rates it would have had."""
    _, forget, retain = data()
    options = {**OPTIONS, "schedule": "cosine", "method": method}
    if method != "rfa":
        options = {k: v for k, v in options.items() if k not in ("targets", "rank")}
    found = [record["lr"] for record in unlearn(net(), forget, retain, **options).history]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options["lr"])
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(found))
    for rate in found:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()

    def stop(record: StepRecord) -> None:
        if record["step"] == 2:
            raise RuntimeError("stop here")

    options |= {"output_dir": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(RuntimeError, match="stop here"):
        unlearn(net(), forget, retain, callbacks=[stop], **options)
    resumed = unlearn(net(), forget, retain, resume=True, **options)
    assert [record["lr"] for record in resumed.history] == found
    options.pop("output_dir")
    short = unlearn(net(), forget, retain, **{**options, "max_steps": 2}).history
    assert [record["lr"] for record in short] == pytest.approx([options["lr"], options["lr"] / 2])


def test_defaults_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, forget, retain = data()
    settings = unlearn(net(), forget, retain, progress=False, targets=LAYERS, rank=2).record["settings"]
    wanted = {"epochs": 1, "batch_size": 128, "lr": 5e-5, "max_steps": None, "method": "rfa"}
    assert {k: settings[k] for k in wanted} == wanted
    options = METHODS["rfa"].settings({})
    wanted = {"targets": "all", "rank": 8, "alpha": 32, "gamma": 0.5, "mode": "residual", "weights": [1.0] * 4}
    assert {k: options[k] for k in wanted} == wanted


@unseen
@pytest.mark.parametrize("merge", [True, False])
def test_same_seed_same_bits_and_callers_generators_untouched(merge: bool) -> None:
    def augment(image: Tensor) -> Tensor:
        return image + 0.1 * torch.randn(image.shape) + random.random() + float(np.random.rand())

    everything, forget, retain = data()
    everything.transform = augment
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed * 31 + len(results))
        model = net()
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        results.append(unlearn(model, forget, retain, seed=seed, merge=merge, **OPTIONS))
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert (states[2] == np.random.get_state()[1]).all()
    hashes = [hash_model(r.model, adapters=True) for r in results]
    assert hashes[0] == hashes[1] != hashes[2]


def test_merge_now_or_later_is_the_same() -> None:
    _, forget, retain = data()
    now = unlearn(net(), forget, retain, **OPTIONS)
    later = unlearn(net(), forget, retain, merge=False, **OPTIONS)
    assert later.record["model"]["merged"] is False
    assert set(later.rfa.names) == set(LAYERS)
    later.rfa.merge()
    assert hash_model(now.model) == hash_model(later.model)
    assert now.record["merge_rounding"].keys() == set(LAYERS)


def test_merge_into_another_dtype() -> None:
    _, forget, retain = data()
    result = unlearn(
        net().to(torch.bfloat16), *(cast(part) for part in (forget, retain)), merge=torch.float32, **OPTIONS
    )
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.record["merge_rounding"] == dict.fromkeys(LAYERS, 0.0)
    assert result.record["settings"]["merge"] == "torch.float32"
    with pytest.warns(UserWarning, match="rounding into torch.bfloat16 lost"):
        unlearn(net().to(torch.bfloat16), *(cast(part) for part in (forget, retain)), **{**OPTIONS, "lr": 1e-5})


def cast(part: Subset[Any]) -> list[Any]:
    return [(image.to(torch.bfloat16), label) for image, label in (part[i] for i in range(len(part)))]


def test_loaders_end_with_retain_and_cycle_forget() -> None:
    _, forget, retain = data()
    seen: list[Tensor] = []

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x)  # type: ignore[no-any-return]

    model = Watched(*net())
    result = unlearn(model, DataLoader(forget, 5), DataLoader(retain, 8), epochs=2, **LOADED)
    assert [(r["epoch"], r["retain"], r["forget"]) for r in result.history] == [
        (1, 8, 5), (1, 8, 5), (1, 8, 4), (1, 3, 5), (2, 8, 5), (2, 8, 4), (2, 8, 5), (2, 3, 5)
    ]  # fmt: skip
    images = torch.stack([forget[i][0] for i in range(len(forget))])
    assert torch.equal(seen[2][8:], images[10:14])
    assert torch.equal(seen[3][3:], images[:5])
    assert result.record["forget"]["count"] == 14
    assert result.record["settings"]["data"] == "loaders"


def texts(lengths: list[int], label: int, masked: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(label)
    items = []
    for length in lengths:
        ids = torch.randint(1, 20, (length,), generator=generator)
        item = {"input_ids": ids, "labels": torch.tensor(label)}
        items.append({**item, "attention_mask": torch.ones_like(ids)} if masked else item)
    return items


class Words(nn.Module):
    """A classifier of token ids; its mean leaves padding out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.widths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.widths.append(input_ids.shape[1])
        mask = attention_mask[..., None].float()
        hidden = self.hidden(self.embed(input_ids)).relu() * mask
        logits: Tensor = self.out(hidden.sum(1) / mask.sum(1))
        return logits


def test_texts_of_different_lengths() -> None:
    keep, gone = texts([3, 5, 4] * 11, 0), texts([6, 2], 1)
    model = Words()
    result = unlearn(model, gone, keep, targets=["hidden", "out"], rank=2, progress=False)
    assert result.record["settings"]["batch_size"] == 32
    assert len(result.history) == 2
    assert all(2 <= width <= 6 for width in model.widths)
    assert all(record["forget"] for record in result.history)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_loaders_of_texts_are_padded_on_their_side(left: bool) -> None:
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        batch: dict[str, Tensor] = {"labels": torch.stack([item["labels"] for item in items])}
        for key in ("input_ids", "attention_mask"):
            rows = [
                nn.functional.pad(i[key], (width - len(i[key]), 0) if left else (0, width - len(i[key]))) for i in items
            ]
            batch[key] = torch.stack(rows)
        return batch

    seen: list[Tensor] = []

    class Watched(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            seen.append(attention_mask)
            return super().forward(input_ids, attention_mask)

    keep, gone = texts([3, 7], 0), texts([2, 4], 1)
    loaders = [DataLoader(part, 2, collate_fn=collate) for part in (gone, keep)]
    unlearn(Watched(), *loaders, targets=["hidden", "out"], rank=2, progress=False)
    rows = [row.tolist() for row in seen[0]]
    lengths = [3, 7, 2, 4]
    assert rows == [[0] * (7 - n) + [1] * n if left else [1] * n + [0] * (7 - n) for n in lengths]


@unseen
def test_figures_are_of_the_original_then_of_the_adapted_then_of_the_merged_model() -> None:
    everything, forget, retain = data()
    outputs: list[Tensor] = []
    adapters: list[list[bool]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        adapters.append([m.rfa_context.enabled for m in model.modules() if hasattr(m, "rfa_context")])
        with torch.no_grad():
            outputs.append(model.eval()(everything.images))
        return {}

    evaluate(net())
    extra = {"evaluate": evaluate, "until": lambda figures: False, "until_every": 2, "max_steps": 2}
    unlearn(net(), forget, retain, **extra, **OPTIONS)
    assert adapters == [[], [False] * 3, [True] * 3, []]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[1], outputs[2])


@unseen
def test_stops_and_evaluates() -> None:
    everything, forget, retain = data()

    def evaluate(model: nn.Module) -> dict[str, Any]:
        model.train()
        with torch.no_grad():
            model.eval()
            found = model(everything.images).argmax(1)
        model.train()
        return {"accuracy": (found == torch.tensor(everything.labels)).float().mean(), "odd": float("nan")}

    model = net().eval()
    model[0].train()
    before = evaluate(model)["accuracy"].item()
    model.eval()
    model[0].train()
    asked: list[float] = []

    def until(figures: Any) -> bool:
        asked.append(figures["accuracy"])
        return len(asked) == 2

    records: list[dict[str, Any]] = []
    result = unlearn(
        model,
        forget,
        retain,
        evaluate=evaluate,
        until=until,
        until_every=3,
        epochs=9,
        callbacks=[records.append],
        **OPTIONS,
    )
    assert (result.stopped, len(result.history), len(asked)) == ("until", 6, 2)
    assert records == result.history
    assert [m.training for m in model] == [True] + [False] * 6
    assert result.record["metrics"]["before"] == {"accuracy": before, "odd": None}
    assert result.record["metrics"]["after"]["accuracy"] == evaluate(model)["accuracy"].item()
    assert result.record["training"]["stopped"] == "until"
    capped = unlearn(net(), forget, retain, max_steps=4, epochs=9, **OPTIONS)
    assert (capped.stopped, len(capped.history)) == ("max_steps", 4)
    assert unlearn(net(), forget, retain, max_steps=5, **OPTIONS).stopped == "finished"


def test_until_is_asked_by_itself() -> None:
    _, forget, retain = data()
    asked: list[int] = []
    unlearn(
        net(), forget, retain, epochs=9, evaluate=lambda m: {"x": 0.0}, until=lambda f: bool(asked.append(1)), **OPTIONS
    )
    assert len(asked) == 11  # 45 steps, every tenth part of them: 4


def test_forget_samples_never_seen_are_counted() -> None:
    _, forget, retain = data()
    with pytest.warns(UserWarning, match="3 forget samples were drawn, fewer than the 14"):
        result = unlearn(net(), forget, retain, **{**OPTIONS, "forget_per_batch": 1})
    assert result.record["training"]["forget_samples_drawn"] == 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from [(torch.zeros(1, 6, 6), 0)] * 4


EVERYTHING, FORGET, RETAIN = data()


def test_stream_of_retained_samples() -> None:
    result = unlearn(net(), DataLoader(FORGET, 7), DataLoader(Stream(), 2), **LOADED)
    assert (result.stopped, len(result.history)) == ("finished", 2)
    assert result.record["retain"] == {"count": None, "digest": None}
    capped = unlearn(net(), DataLoader(FORGET, 14), DataLoader(Stream(), 2), max_steps=1, **LOADED)
    assert capped.stopped == "max_steps"


def test_autocast_computes_in_bf16_and_keeps_adapters_in_fp32() -> None:
    seen: set[torch.dtype] = set()

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            seen.add(y.dtype)
            return y

    model = Watched(*net())
    result = unlearn(model, FORGET, RETAIN, autocast=torch.bfloat16, merge=False, **OPTIONS)
    assert torch.bfloat16 in seen
    assert {p.dtype for p in result.rfa.parameters()} == {torch.float32}


def test_progress_false_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    unlearn(net(), FORGET, RETAIN, **OPTIONS)
    assert capfd.readouterr() == ("", "")
    unlearn(net(), FORGET, RETAIN, **{**OPTIONS, "progress": True})
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("unlearn (rfa): step 5/5, loss ")
