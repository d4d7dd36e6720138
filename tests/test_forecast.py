"""The forecast against the live storage of the real step, for ours and for the rivals."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from rfa_fast.experiments.forecast import forecast
from rfa_fast.experiments.rivals import Setting, StepBatch, contender
from rfa_fast.metrics.forecast import forecast_step
from rfa_fast.metrics.live_storage import live_storage
from rfa_fast.patching import patch
from rfa_fast.step import compile_step

Batch = tuple[Any, torch.Tensor, torch.Tensor]


def qwen(**changes: Any) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True}  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **changes})).to(torch.bfloat16).eval()


def texts(length: int = 24, vocabulary: int = 500) -> Batch:
    ids = torch.randint(0, vocabulary, (4, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask}, labels, torch.tensor([False, True, False, True])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(8, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def images() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (6,), generator=generator)
    return torch.randn(6, 3, 10, 10, generator=generator), labels, torch.arange(6) > 3


def ours(model: nn.Module, **options: Any) -> Any:
    rfa = patch(model, **options)
    return compile_step(rfa, torch.optim.AdamW(rfa.parameters()), compile=False)


def rival(name: str, model: nn.Module, batch: Batch, targets: Any) -> Any:
    made = contender(name, model, StepBatch(*batch), Setting(targets), in_place=True)
    loss, optimizer = made.loss, made.optimizer
    del made, model

    def step(*batch: Any) -> None:
        loss(StepBatch(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def counted(make: Any, model: nn.Module, batch: Batch) -> int:
    """Peak of the second real step."""
    with live_storage(model, *batch) as live:
        step = make(model)
        del model
        for _ in range(2):
            gc.collect()
            live.reset_peak()
            step(*batch)
        return live.peak


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_our_step_on_a_language_model(mode: str) -> None:
    batch = texts()
    told = forecast(qwen(), *batch, mode=mode)
    real = counted(lambda model: ours(model, targets="deep", mode=mode), qwen(), batch)
    assert told.peak == pytest.approx(real, rel=0.01)
    assert told.weights == sum(p.nbytes for p in qwen().parameters()) + 4 * 4  # and the rotary frequencies
    assert told.above_weights == told.peak - told.weights
    # A and B, their gradients and two moments, in fp32; what is left of the batch for the next is little.
    adapters = 3 * 8 * (32 + 80) * 4
    assert 3 * adapters <= told.state < 4.6 * adapters


@pytest.mark.parametrize("name", ["paper", "peft", "finetune"])
def test_rivals_on_a_language_model(name: str) -> None:
    batch = texts()
    told = forecast(qwen(), *batch, arrangement=name)
    real = counted(lambda model: rival(name, model, batch, "deep"), qwen(), batch)
    assert told.peak == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("name", ["ours", "paper", "finetune"])
def test_on_a_convolutional_network(name: str) -> None:
    batch, layers = images(), ["blocks.0", "blocks.3", "fc"]
    told = forecast(Net(), *batch, arrangement=name, targets=layers)

    def make(model: nn.Module) -> Any:
        return ours(model, targets=layers) if name == "ours" else rival(name, model, batch, layers)

    assert told.peak == pytest.approx(counted(make, Net(), batch), rel=0.02)


def test_copies_and_states_are_what_they_are_known_to_be() -> None:
    model, batch = qwen(vocab_size=4000), texts()
    told = {name: forecast(model, *batch, arrangement=name) for name in ("ours", "paper", "finetune")}
    weights = told["ours"].weights
    assert all(one.weights == weights for one in told.values())
    assert weights < told["paper"].state < 1.5 * weights  # the teacher
    assert 2 * weights * 0.95 < told["finetune"].state < 2 * weights * 1.05  # two moments, and no copy
    assert told["ours"].state < 0.5 * weights
    assert told["ours"].peak < told["paper"].peak < told["finetune"].peak


def test_the_head_s_chunk_is_in_it() -> None:
    """Logits of the rows, bounded by the chunk's budget, whoever computes them."""
    model, batch = qwen(vocab_size=20_000, num_hidden_layers=1, hidden_size=16), texts(100, 500)
    one = forecast(model, *batch)
    rows = int((batch[1][:, 1:] != -100).sum())
    assert one.above_weights > rows * 20_000 * 2


def test_checkpointing_keeps_less() -> None:
    # Attention and feed-forward of wide blocks on few words: activations are what there is.
    model, batch = qwen(intermediate_size=800, num_hidden_layers=4, vocab_size=50), texts(64, 50)
    for name in ("peft", "ours"):
        kept, recomputed = (
            forecast(model, *batch, arrangement=name, targets="all", checkpointing=switch) for switch in (False, True)
        )
        assert recomputed.above_weights < 0.8 * kept.above_weights, name
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_geometry_far_beyond_this_machine() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(100_000, 100_000, bias=False) for _ in range(4)))
    labels = torch.tensor([1, 2])
    told = forecast(model, torch.zeros(2, 100_000), labels, labels > 1, targets=["3"])
    assert told.weights == 4 * 4 * 10**10
    assert told.above_weights < 0.01 * told.weights


def test_bad_requests_are_refused() -> None:
    batch = images()
    with pytest.raises(ValueError, match="arrangement: got 'lora', expected one of ours, paper, peft, finetune"):
        forecast(Net(), *batch, arrangement="lora")
    with pytest.raises(TypeError, match="options: got mode for 'peft', expected them for 'ours' alone"):
        forecast(Net(), *batch, arrangement="peft", mode="teacher")
    with pytest.raises(ValueError, match="model: got Net, expected a transformers model that supports"):
        forecast(Net(), *batch, checkpointing=True)

    class Choosing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y[(y > 0).nonzero()[:, 0]]

    with pytest.raises(ValueError, match="whose result depends on values"):
        forecast_step(Choosing(), lambda model: lambda inputs, labels, forget: model(inputs), *batch)


def test_teacher_mode_is_forecast_where_several_blocks_are_frozen():
    """The frozen prefix hands its outputs on; the fake tensors of a forecast are handed on as they are."""
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    forget = torch.tensor([False, False, True, True])
    found = forecast(net, torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]), forget, mode="teacher").peak
    weights = sum(parameter.numel() for parameter in net.parameters()) * 4
    # Beside the weights three layers' adapters of 2 · 8 · 8 with gradient and Adam's two moments, and little more.
    assert weights + 3 * 4 * 128 * 4 < found < weights + 3 * 4 * 128 * 4 + 4096
