"""Predictions and what is read off them, against values worked out by hand and by numpy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rfa_fast import metrics
from rfa_fast.metrics import cost as cost_module
from rfa_fast.metrics import passes

LOG2 = math.log(2)


def logits_for(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def test_entropy_confidence_and_nll_of_known_distributions():
    rows = [[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.125, 0.125, 0.75]]
    items = metrics.predict(nn.Identity(), [(logits_for(rows), torch.tensor([1, 0, 2]))])
    expected = [1.5 * LOG2, math.log(3), 2 * 0.125 * 3 * LOG2 - 0.75 * math.log(0.75)]
    np.testing.assert_allclose(items.entropy, expected, rtol=1e-6)
    np.testing.assert_allclose(items.confidence, [0.5, 1 / 3, 0.75], rtol=1e-6)
    np.testing.assert_allclose(items.nll, [2 * LOG2, math.log(3), -math.log(0.75)], rtol=1e-6)
    np.testing.assert_allclose(items.probabilities, rows, rtol=1e-6)
    assert items.probabilities.dtype == items.entropy.dtype == np.float32
    assert items.labels.tolist() == [1, 0, 2]
    assert items.loss == pytest.approx((2 * LOG2 + math.log(3) - math.log(0.75)) / 3, rel=1e-6)


def test_a_certain_prediction_has_no_entropy():
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    items = metrics.predict(nn.Identity(), [(logits, torch.tensor([0]))])
    assert items.entropy.tolist() == [0.0]
    assert items.nll.tolist() == [0.0]


def test_accuracy_and_per_class_accuracy_by_hand():
    logits = torch.tensor([[3.0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 5, 4], [9, 0, 0, 0], [0, 1, 0, 0]])
    labels = torch.tensor([0, 1, 1, 1, 2])
    loader = DataLoader(TensorDataset(logits, labels), batch_size=2)  # 2, 2, 1
    assert metrics.accuracy(nn.Identity(), loader) == pytest.approx(2 / 5)
    per_class = metrics.per_class_accuracy(nn.Identity(), loader, 4)
    assert per_class[:3] == pytest.approx([1.0, 1 / 3, 0.0])
    assert math.isnan(per_class[3])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 3), (257, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_figures_equal_numpy_in_float64(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1], generator=generator)
    items = metrics.predict(nn.Identity(), DataLoader(TensorDataset(logits, labels), batch_size=100))
    wide = logits.double().numpy()
    p = np.exp(wide - wide.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(items.probabilities, p, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(items.entropy, -(p * np.log(p)).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(items.nll, -np.log(p[np.arange(len(p)), labels.numpy()]), rtol=1e-4, atol=1e-5)
    assert items.accuracy == (wide.argmax(1) == labels.numpy()).mean()


def test_unlabelled_items_are_in_no_average():
    logits = logits_for([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    items = metrics.predict(nn.Identity(), [(logits, torch.tensor([0, 0, -100]))])
    assert items.unlabelled == 1
    assert items.accuracy == items.token_accuracy == 0.5
    assert items.loss == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2, rel=1e-6)
    assert math.isnan(items.nll[2])
    assert items.entropy[2] == pytest.approx(LOG2)
    assert items.per_class_accuracy(2)[0] == 0.5


class Observed(nn.Module):
    """Notes the state it is run in, and fails on request."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.fail, self.seen = fail, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        training = any(module.training for module in self.modules())
        self.seen.append((training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        if self.fail:
            raise RuntimeError("broken")
        return self.body(x)


@pytest.mark.parametrize("fail", [False, True], ids=["runs", "fails"])
def test_model_is_left_as_it_was(fail):
    model = Observed(fail).train()
    model.body[1].eval()  # a frozen BatchNorm inside a training model
    flags, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    loader = [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))]
    if fail:
        with pytest.raises(RuntimeError, match="broken"):
            metrics.predict(model, loader)
    else:
        metrics.predict(model, loader)
    assert model.seen == [(False, False, False)]
    assert [m.training for m in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_tensor_cached_during_a_pass_can_be_trained_on_afterwards():
    class Caching(nn.Linear):
        table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.arange(3.0)
            return super().forward(x) * self.table

    model = Caching(2, 3)
    metrics.accuracy(model, [(torch.ones(1, 2), torch.tensor([0]))])
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad.abs().sum() > 0


def test_logits_are_found_in_a_mapping_and_a_tuple():
    class Wrapped(nn.Module):
        def __init__(self, wrap: object) -> None:
            super().__init__()
            self.wrap = wrap

        def forward(self, x: torch.Tensor) -> object:
            return self.wrap(x)

    loader = [(torch.eye(2), torch.tensor([0, 0]))]
    for wrap in (lambda x: {"logits": x}, lambda x: (x, None)):
        assert metrics.accuracy(Wrapped(wrap), loader) == 0.5
    with pytest.raises(TypeError, match="got an output of dict, expected logits"):
        metrics.accuracy(Wrapped(lambda x: {"hidden": x}), loader)


BAD_LOADERS = {
    "empty": ([], ValueError, "loader: got no batch, expected at least one"),
    "label too large": ([(torch.eye(3), torch.tensor([0, 3, 1]))], ValueError, "batch 0 has label 3, expected 0 to 2"),
    "label negative": ([(torch.eye(3), torch.tensor([0, -1, 1]))], ValueError, "batch 0 has label -1, expected 0 to 2"),
    "float labels": ([(torch.eye(3), torch.ones(3))], TypeError, "batch 0 has torch.float32, expected a tensor of"),
    "bool labels": ([(torch.eye(3), torch.ones(3).bool())], TypeError, "batch 0 has torch.bool"),
    "list of labels": ([(torch.eye(3), [0, 1, 2])], TypeError, "batch 0 has list"),
    "three parts": ([(torch.eye(3), torch.zeros(3), 1)], TypeError, "batch 0 is a tuple of 3, expected"),
    "no labels": ([{"x": torch.eye(3)}], TypeError, r"keys \['x'\], expected `labels`"),
    "no tensor": ([("text", torch.tensor([0]))], TypeError, "inputs of batch 0 are str"),
    "count": ([(torch.eye(3), torch.tensor([0, 1]))], ValueError, r"shape \(2,\) against logits \(3, 3\)"),
    "no token axis": ([(torch.eye(3), torch.zeros(3, 1).long())], ValueError, r"\(3, 1\) against logits \(3, 3\)"),
    "three axes": ([(torch.eye(3), torch.zeros(3, 1, 1).long())], ValueError, r"expected \(B,\) or \(B, T\)"),
    "no items": ([(torch.zeros(0, 3), torch.zeros(0).long())], ValueError, r"shape \(0,\)"),
    "both kinds": (
        [(torch.eye(3), torch.arange(3)), (torch.zeros(1, 2, 3), torch.zeros(1, 2).long())],
        ValueError,
        r"batch 1 mixes \(B,\) and \(B, T\)",
    ),
    "widths": (
        [(torch.eye(3), torch.arange(3)), (torch.eye(2), torch.arange(2))],
        ValueError,
        "2 and 3 classes, expected one number",
    ),
    "nan": (
        [(torch.eye(3), torch.arange(3)), (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), torch.tensor([0, 0]))],
        FloatingPointError,
        "NaN or infinite logits in batch 1",
    ),
    "inf": ([(torch.tensor([[0.0, math.inf]]), torch.tensor([0]))], FloatingPointError, "logits in batch 0"),
}


@pytest.mark.parametrize(("loader", "error", "message"), BAD_LOADERS.values(), ids=BAD_LOADERS.keys())
def test_bad_input_names_what_it_got(loader, error, message):
    with pytest.raises(error, match=message):
        metrics.predict(nn.Identity(), loader)


def test_nan_at_padding_is_not_an_error():
    logits = torch.zeros(1, 3, 4)
    logits[0, 2] = math.nan
    labels = torch.tensor([[1, 2, -100]])
    assert metrics.perplexity(nn.Identity(), [(logits, labels)]) == pytest.approx(4.0)


def test_figures_refuse_the_wrong_kind_of_labels():
    one, per_token = [(torch.eye(3), torch.arange(3))], [(torch.zeros(1, 2, 3), torch.zeros(1, 2).long())]
    with pytest.raises(ValueError, match="perplexity: got one label per item"):
        metrics.perplexity(nn.Identity(), one)
    with pytest.raises(ValueError, match="labels: got one per item"):
        metrics.answer_accuracy(nn.Identity(), one)
    with pytest.raises(ValueError, match="per_class_accuracy: got a label per token"):
        metrics.per_class_accuracy(nn.Identity(), per_token, 3)
    with pytest.raises(ValueError, match="n_classes: got 2 but an item of class 2"):
        metrics.per_class_accuracy(nn.Identity(), one, 2)
    with pytest.raises(ValueError, match="n_classes: got 0"):
        metrics.per_class_accuracy(nn.Identity(), one, 0)
    with pytest.raises(ValueError, match=r"got 1 items, none with a label \(all -100\)"):
        metrics.accuracy(nn.Identity(), [(torch.eye(3)[:1], torch.tensor([-100]))])


def test_progress_counts_batches_and_admits_not_knowing_how_many():
    pairs = [(torch.eye(3), torch.arange(3))] * 3
    calls: list[tuple[int, int]] = []
    metrics.accuracy(nn.Identity(), pairs, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    calls.clear()
    metrics.accuracy(nn.Identity(), (pair for pair in pairs), progress=lambda *call: calls.append(call))
    assert calls == [(1, 0), (2, 0), (3, 0)]


def test_evaluate_split_gathers_every_figure_in_one_pass_each():
    retain = [(logits_for([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 0]))]
    forget = [(logits_for([[0.75, 0.25]]), torch.tensor([1])), (logits_for([[0.25, 0.75]]), torch.tensor([1]))]
    counted = Counting()
    calls: list[tuple[int, int]] = []
    result = metrics.evaluate_split(counted, {"D_r": retain, "D_f": forget}, progress=lambda *call: calls.append(call))
    assert counted.calls == 3
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert list(result) == ["D_r", "D_f"]
    assert result["D_f"].accuracy_percent == 50.0
    assert result["D_r"].accuracy == 1.0
    figures = result.figures()
    assert figures["D_f/loss"] == pytest.approx((2 * LOG2 - math.log(0.75)) / 2, rel=1e-6)
    assert figures["D_r/confidence"] == pytest.approx(0.625)
    assert figures["D_r/entropy"] == pytest.approx((LOG2 + 0.5 * LOG2 - 0.75 * math.log(0.75)) / 2, rel=1e-6)
    assert figures["D_f/n"] == 2
    assert set(figures) == {f"{s}/{k}" for s in result for k in ("n", "accuracy", "loss", "entropy", "confidence")}
    assert result.seconds == sum(item.seconds for item in result.values())
    assert repr(result) == "SplitResult(D_r 100.00 %, D_f 50.00 %)"
    with pytest.raises(ValueError, match="one label per item"):
        _ = result["D_f"].perplexity


class Counting(nn.Module):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "^D_ft: loader: got no batch"),
        ([(torch.eye(3), torch.ones(3))], TypeError, "^D_ft: labels: batch 0 has torch.float32"),
        ([(torch.full((1, 2), math.nan), torch.tensor([0]))], FloatingPointError, "^D_ft: model: NaN"),
    ],
    ids=["empty", "labels", "nan"],
)
def test_evaluate_split_names_the_subset_at_fault(loader, error, message):
    good = [(torch.eye(3), torch.arange(3))]
    with pytest.raises(error, match=message):
        metrics.evaluate_split(nn.Identity(), {"D_r": good, "D_ft": loader})


def test_evaluate_split_wants_a_subset():
    with pytest.raises(ValueError, match="subsets: got none"):
        metrics.evaluate_split(nn.Identity(), {})


def test_device_is_that_of_the_model():
    model = nn.BatchNorm1d(3, affine=False).to("meta")  # buffers only
    assert passes.device_of(model).type == "meta"
    assert passes.device_of(nn.Linear(1, 1)).type == "cpu"
    batch = next(passes.batches([(torch.ones(2, 3), torch.tensor([0, 1]))]))
    assert passes.run(model.eval(), batch, passes.device_of(model)).device.type == "meta"


def test_cost_sees_the_memory_of_the_block_also_when_it_fails():
    with metrics.measure() as idle:
        pass
    costs: list[metrics.Cost] = []

    def work() -> None:
        with metrics.measure() as cost:
            costs.append(cost)
            block = torch.ones(64 << 20)  # 256 MiB, touched
            raise RuntimeError(f"enough: {block.numel()}")

    with pytest.raises(RuntimeError, match="enough"):
        work()
    (cost,) = costs
    assert cost.seconds > 0
    assert cost.peak_bytes - idle.peak_bytes > 200 << 20
    assert cost.peak_mib == cost.peak_bytes / 2**20
    assert math.isnan(metrics.Cost().peak_mib)


def test_cost_without_a_new_high_water_mark_takes_the_largest_sample(monkeypatch):
    # No sample falls inside the block: those at its two ends must do.
    monkeypatch.setattr(cost_module, "_SAMPLE_SECONDS", 3600)
    monkeypatch.setattr(cost_module, "_high_water", lambda: None)
    with metrics.measure() as idle:
        pass
    with metrics.measure() as cost:
        block = torch.ones(64 << 20)
    assert cost.source.startswith("resident memory, sampled")
    assert cost.peak_bytes - idle.peak_bytes > 200 << 20
    del block


def test_cost_says_when_the_platform_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(cost_module, "_STATM", tmp_path / "absent")
    monkeypatch.setattr(cost_module, "_high_water", lambda: None)
    with metrics.measure("cpu") as cost:
        assert math.isnan(cost.seconds)
    assert cost.peak_bytes is None
    assert cost.source.startswith("not available")


def test_cost_on_cuda_asks_its_allocator(monkeypatch):
    """No GPU here: the order of the calls is what can be checked."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"synchronize {device}"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("peak") or 3 << 20)
    with metrics.measure("cuda:0") as cost:
        calls.append("work")
    assert calls == ["synchronize cuda:0", "reset", "work", "synchronize cuda:0", "peak"]
    assert cost.peak_mib == 3.0
    assert cost.source == "allocator of cuda:0"
