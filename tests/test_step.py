"""The compiled step: the losses and updates of the uncompiled one, in one graph, compiled twice and no more."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from step_cases import TinyBlocks, batches, tiny_language_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import rfa_fast
from rfa_fast.step import compile_step

SHAPES = ((4, 8), (4, 8), (3, 6), (5, 9), (2, 11))


def pair(
    model,
    targets="deep",
    *,
    backend="aot_eager",
    lr=1e-2,
    optimizer=torch.optim.AdamW,
    options=None,
    arithmetic="auto",
    **patch,
):
    """The same model twice: a step that is not compiled, one that is, and the count of its frames."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    rfas = [
        rfa_fast.patch(each, targets, seed=0, backend=arithmetic, **patch) for each in (model, copy.deepcopy(model))
    ]
    optimizers = [optimizer(rfa.parameters(), lr=lr) for rfa in rfas]
    plain = compile_step(rfas[0], optimizers[0], compile=False, **(options or {}))
    return plain, compile_step(rfas[1], optimizers[1], backend=counter, **(options or {})), counter


def assert_same(ours, theirs, *, rtol=1e-5):
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=1e-6), (name, a, b)
        assert not a.requires_grad


def parameters_of(step):
    return {name: p.detach().clone() for name, p in step.rfa.named_parameters().items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_two_compilations_whatever_comes(mode, checkpointing):
    plain, compiled, counter = pair(tiny_language_model(2), "all" if mode == "residual" else "deep", rank=2, mode=mode)
    if checkpointing:
        compiled.rfa.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    before, frames = parameters_of(compiled), []
    counters.clear()
    for batch in batches(*SHAPES):
        assert_same(compiled(*batch), plain(*batch))
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2]
    assert not counters["graph_break"]
    # One backward graph for each forward graph, and none besides.
    assert counters["aot_autograd"]["total"] == counters["aot_autograd"]["ok"] == 2
    for name, p in compiled.rfa.named_parameters().items():
        assert torch.allclose(p, plain.rfa.named_parameters()[name], rtol=1e-3, atol=1e-5), name
        assert not torch.equal(p, before[name]), name


def test_under_inductor_and_autocast():
    """bf16 products, clipping and a schedule: nothing of it compiles again."""
    options = {"autocast": torch.bfloat16, "max_norm": 0.5}
    plain, compiled, counter = pair(tiny_language_model(2), rank=2, backend="inductor", options=options)
    for step in (plain, compiled):
        step.scheduler = torch.optim.lr_scheduler.LinearLR(step.optimizer, total_iters=4)
    exact = rfa_fast.patch(tiny_language_model(2).double(), "deep", rank=2, seed=0, backend="reference")
    frames = []
    for index, batch in enumerate(batches(*SHAPES[:4])):
        ours, theirs = compiled(*batch), plain(*batch)
        if not index:
            truth = exact.loss(*batch)
            for name, a, b, c in zip(ours._fields, ours, theirs, truth, strict=True):
                mine, rival = (abs(float(v) - float(c)) for v in (a, b))
                assert mine <= 2 * rival + torch.finfo(torch.bfloat16).eps / 2 * abs(float(c)), name
        assert torch.allclose(ours.total, theirs.total, rtol=2e-2)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2]
    assert compiled.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"] == 1e-2
    assert torch.allclose(compiled.grad_norm, plain.grad_norm, rtol=5e-2)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, "auto"), (torch.float32, "reference")])
def test_the_head_that_is_not_fused_compiles_too(dtype, backend):
    """Its ignored tokens are in the graph: their number is no shape of it."""
    plain, compiled, counter = pair(tiny_language_model(2).to(dtype), rank=2, arithmetic=backend)
    frames = []
    for batch in batches(*SHAPES):
        assert_same(compiled(*batch), plain(*batch))
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2]


def test_an_image_model():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    plain, compiled, counter = pair(resnet18(num_classes=5), r"layer4\.1\..*|fc", rank=2)
    generator = torch.Generator().manual_seed(0)
    frames = []
    for size, forgotten in ((4, 2), (4, 0), (4, 4), (3, 1), (6, 5)):
        x = torch.randn(size, 3, 32, 32, generator=generator)
        batch = x, torch.randint(0, 5, (size,), generator=generator), torch.arange(size) < forgotten
        assert_same(compiled(*batch), plain(*batch), rtol=1e-4)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 2, 2]


def test_an_adapted_head():
    with pytest.warns(UserWarning, match="copy of its own"):
        plain, compiled, counter = pair(tiny_language_model(2), ["lm_head", "layers.1.mlp.up_proj"], rank=2)
    for batch in batches(*SHAPES[:2]):
        assert_same(compiled(*batch), plain(*batch))
    assert counter.frame_count == 1
    reference = rfa_fast.patch(
        tiny_language_model(2, tied=False), ["lm_head", "layers.1.mlp.up_proj"], rank=2, seed=0, backend="reference"
    )
    reference.model.lm_head.weight.data.copy_(reference.model.model.embed_tokens.weight)
    batch = next(batches(SHAPES[0]))
    fresh = rfa_fast.patch(copy.deepcopy(tiny_language_model(2)), ["lm_head", "layers.1.mlp.up_proj"], rank=2, seed=0)
    for a, b in zip(fresh.loss(*batch), reference.loss(*batch), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
def test_accumulation_normalises_by_the_whole_batch(norm, dtype, rtol):
    """Parts of different counts, one without a forget sample: the mean over all, not the mean of means."""
    torch.manual_seed(0)
    model = TinyBlocks().to(dtype)
    x, labels = torch.randn(6, 5, dtype=dtype), torch.tensor([0, 1, -100, 2, 1, 0])
    forget = torch.tensor([True, False, False, False, False, False])
    rfa = rfa_fast.patch(model, ["1.up", "2.up"], rank=2, seed=0, norm=norm, adapter_dtype=dtype)
    with torch.no_grad():
        for p in rfa.parameters():
            p.normal_(generator=torch.Generator().manual_seed(3))
    # By hand: parts of 3; each term times its own count, over the sum of the counts.
    parts = [rfa.loss(x[:3], labels[:3], forget[:3]), rfa.loss(x[3:], labels[3:], forget[3:])]
    expected = {
        "retain_align": (2 * parts[0].retain_align + 3 * parts[1].retain_align) / 5,
        "forget_align": parts[0].forget_align,
        "retain_task": (1 * parts[0].retain_task + 3 * parts[1].retain_task) / 4,
        "forget_task": parts[0].forget_task,
    }
    total = 0.25 * (expected["retain_align"] + expected["forget_align"])
    total = total + 0.5 * (expected["retain_task"] + expected["forget_task"])
    wanted = torch.autograd.grad(total, rfa.parameters())
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.0), accumulate=2, compile=False)
    losses = step(x, labels, forget)
    for name, value in expected.items():
        assert torch.allclose(getattr(losses, name), value.detach(), rtol=rtol, atol=0), name
    assert torch.allclose(losses.total, total.detach(), rtol=rtol, atol=0)
    for p, gradient in zip(rfa.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=10 * rtol, atol=rtol / 10)


def test_a_part_without_retain_samples_aims_at_the_part_before():
    rfa = rfa_fast.patch(TinyBlocks(), ["1.up", "2.up"], rank=2, seed=0)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.0), accumulate=2, compile=False)
    x, labels, forget = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) > 2
    step(x.flip(0) + 1, labels, ~forget)  # leaves other means behind
    losses = step(x, labels, forget)
    by_layer = rfa.layer_losses()
    rfa.loss(x[:3], labels[:3], forget[:3])
    expected = rfa.loss(x[3:], labels[3:], forget[3:])
    assert torch.allclose(losses.forget_align, expected.forget_align)
    assert torch.allclose(losses.forget_task, expected.forget_task)
    assert torch.allclose(sum(terms.retain for terms in by_layer.values()), losses.retain_align)
    assert torch.allclose(sum(terms.forget for terms in by_layer.values()), losses.forget_align)


def test_the_first_batch_alone_runs_uncompiled_whatever_the_lengths_of_the_others():
    rfa = rfa_fast.patch(tiny_language_model(2), "deep", rank=2, seed=0)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), backend="eager")
    uncompiled = []
    inner = step._evaluate
    step._evaluate = lambda *args: uncompiled.append(1) or inner(*args)
    for batch in batches(*SHAPES):
        step(*batch)
    assert len(uncompiled) == 1


def test_accumulation_compiles_no_more():
    plain, compiled, counter = pair(tiny_language_model(2), rank=2, options={"accumulate": 2})
    for batch in batches((4, 8), (4, 8), (6, 5)):
        assert_same(compiled(*batch), plain(*batch))
    assert counter.frame_count == 2


def test_loss_scaling():
    """GradScaler skips the step that overflows, and the next one is made."""
    rfa = rfa_fast.patch(TinyBlocks(), ["1.up", "2.up"], rank=2, seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=math.inf)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), scaler=scaler, compile=False)
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    before = parameters_of(step)
    step(*batch)
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(step).items())
    assert (step.steps, step.skipped) == (1, 1)
    scaler.update(4.0)
    step(*batch)
    assert (step.steps, step.skipped) == (2, 1)
    assert any(not torch.equal(p, before[name]) for name, p in parameters_of(step).items())


def test_a_scaler_that_is_off_leaves_the_watch_over_gradients_on():
    rfa = rfa_fast.patch(TinyBlocks(), ["1.up", "2.up"], rank=2, seed=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), scaler=scaler, compile=False)
    before = parameters_of(step)
    with pytest.raises(FloatingPointError, match="step 1: got NaN"):
        step(torch.full((6, 5), math.nan), torch.arange(6) % 3, torch.arange(6) < 2)
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(step).items())


class Frames(nn.Module):
    """Labels per row of inputs that are no tokens, and an adapted head."""

    def __init__(self):
        super().__init__()
        self.body, self.proj = nn.Linear(5, 5), nn.Linear(5, 7, bias=False)

    def get_output_embeddings(self):
        return self.proj

    def forward(self, x):
        return SimpleNamespace(logits=self.proj(self.body(x).tanh()))


def test_accumulated_parts_share_an_adapted_head_by_samples_where_there_are_no_tokens():
    torch.manual_seed(0)
    rfa = rfa_fast.patch(Frames(), ["proj"], rank=2, seed=0)
    with torch.no_grad():
        rfa.layers["proj"].lora_b.normal_()
    x, labels, forget = torch.randn(4, 3, 5), torch.randint(0, 7, (4, 3)), torch.tensor([False, True, False, False])
    parts = [rfa.loss(x[part], labels[part], forget[part]) for part in (slice(0, 2), slice(2, 4))]
    wanted = (1 * parts[0].retain_align + 2 * parts[1].retain_align) / 3
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.0), accumulate=2, compile=False)
    assert torch.allclose(step(x, labels, forget).retain_align, wanted.detach())


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_is_not_finite_reaches_no_parameter(compile):
    torch._dynamo.reset()
    rfa = rfa_fast.patch(TinyBlocks(), ["1.up", "2.up"], rank=2, seed=0)
    optimizer = torch.optim.AdamW(rfa.parameters(), lr=0.1)
    step = compile_step(rfa, optimizer, compile=compile, backend="eager")
    x, labels, forget = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    step(x, labels, forget)
    before = parameters_of(step)
    bad = x.clone()
    bad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 2: .*alignment of layer '1.up' and 1 more.*has not seen it"):
        step(bad, labels, forget)
    assert step.skipped == 1
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(step).items())
    step.nonfinite = "skip"
    step(bad, labels, forget)
    assert (step.steps, step.skipped) == (3, 2)
    assert torch.isfinite(step(x, labels, forget).total)
    # A retained sample that is not finite: its x̃ and ỹ are no good for a batch that has none of its own.
    bad[5, 0] = math.nan
    step(bad, labels, forget)
    losses = step(x, labels, torch.ones(6, dtype=torch.bool))
    assert torch.isfinite(torch.stack(losses)).all()
    assert step.skipped == 3


def test_wrong_options():
    rfa = rfa_fast.patch(TinyBlocks(), ["1.up", "2.up"], rank=2, seed=0)
    optimizer = torch.optim.SGD(rfa.parameters(), lr=0.1)
    for error, words, arguments, options in (
        (TypeError, "rfa: got TinyBlocks", (rfa.model, optimizer), {}),
        (TypeError, "optimizer: got float", (rfa, 0.1), {}),
        (ValueError, "accumulate: got 0", (rfa, optimizer), {"accumulate": 0}),
        (ValueError, "max_norm: got -1", (rfa, optimizer), {"max_norm": -1}),
        (ValueError, "nonfinite: got 'ignore'", (rfa, optimizer), {"nonfinite": "ignore"}),
        (ValueError, "autocast: got torch.float64", (rfa, optimizer), {"autocast": torch.float64}),
        (ValueError, "without '1.up.lora_a'", (rfa, torch.optim.SGD([torch.zeros(1)])), {}),
    ):
        with pytest.raises(error, match=words):
            compile_step(*arguments, **options)
    step = compile_step(rfa, optimizer, accumulate=4, compile=False)
    with pytest.raises(ValueError, match="accumulate: got 4 parts for a batch of 3"):
        step(torch.randn(3, 5), torch.arange(3), torch.arange(3) < 1)
    rfa.merge()
    with pytest.raises(ValueError, match="merged or removed"):
        step(torch.randn(4, 5), torch.arange(4) % 3, torch.arange(4) < 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.over, self.head = nn.Linear(5, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.over(self.up(x))[0][:, -1])


def test_what_does_not_compile_into_one_graph_says_what_to_do_and_runs_without():
    torch.manual_seed(0)
    torch._dynamo.reset()
    rfa = rfa_fast.patch(Recurrent(), ["up", "head"], rank=2, seed=0)
    optimizer = torch.optim.SGD(rfa.parameters(), lr=0.1)
    batch = torch.randn(4, 3, 5), torch.arange(4) % 3, torch.arange(4) < 2
    before = rfa.loss(*batch)
    with pytest.raises(RuntimeError, match=r"not compile into one graph: .*LSTM.*Take compile=False") as caught:
        compile_step(rfa, optimizer)(*batch)
    assert isinstance(caught.value.__cause__, torch._dynamo.exc.Unsupported)
    assert all(parameter.grad is None for parameter in rfa.parameters())
    after = compile_step(rfa, optimizer, compile=False)(*batch)
    assert after.total.item() == before.total.item()
