"""Teacher mode's original model: computed as far as there are samples to retain, with the same losses."""

from __future__ import annotations

import mmap

import pytest
import torch
from step_cases import VOCABULARY, TinyBlocks, batches, tiny_language_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rfa_fast
from rfa_fast import teacher
from rfa_fast.groups import Batch, GroupContext
from rfa_fast.ops import retain_rows as rows
from rfa_fast.step import compile_step

CODES = {
    "in front": [0, 0, 1, -1],
    "scattered": [1, 0, -1, 0],
    "the last": [1, 1, 1, 0],
    "all": [0, 0, 0, 0],
    "none": [1, -1, 1, 1],
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_samples_up_to_the_last_retained_one(codes, bias, compiled, monkeypatch):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 9, 5, 7), (6, 7)))
    offset = torch.randn(6, generator=generator, dtype=torch.float64) if bias else None
    samples = torch.tensor(codes, dtype=torch.int8)
    last = max((i + 1 for i, code in enumerate(codes) if code == 0), default=0)
    expected = torch.einsum("bijk,nk->bijn", x, weight) + (0 if offset is None else offset)
    product = torch.compile(rows.retain_linear, fullgraph=True) if compiled else rows.retain_linear
    for limit in (2**25, mmap.PAGESIZE):  # memory of malloc's, and pages of its own
        monkeypatch.setattr(rows, "_MALLOC_KEEPS", limit)
        with torch.no_grad():
            output = product(x, weight, offset, samples)
        assert torch.allclose(output[:last], expected[:last], rtol=1e-12, atol=1e-12)
        assert torch.equal(output[last:], torch.zeros_like(output[last:]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(bias):
    samples = torch.tensor([0, 1], dtype=torch.int8)
    arguments = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5) if bias else None, samples
    torch.library.opcheck(torch.ops.rfa_fast.retain_linear, arguments)


def test_inputs_whose_first_axis_may_be_something_else_are_left():
    weight, codes = nn.Parameter(torch.ones(1, 2)), torch.zeros(3, dtype=torch.int8)
    with torch.no_grad():
        assert rows.original_output(torch.ones(3, 4, 2), weight, None, codes) is not None
        assert rows.original_output(torch.ones(3, 2), weight, None, codes) is None
        assert rows.original_output(torch.ones(4, 3, 2), weight, None, codes) is None
        assert rows.original_output(torch.ones(3, 3, 2), weight, None, codes) is None
        assert rows.original_output(torch.ones(3, 4, 2), weight.data, None, codes) is None
        assert rows.original_output(torch.ones(3, 4, 2, device="meta"), weight, None, codes) is None
    assert rows.original_output(torch.ones(3, 4, 2), weight, None, codes) is None


MASKS = [[True, False, True, False], [False] * 4, [False] * 3 + [True], [True] * 4]


def language_batch(forget):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (len(forget), 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, 2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, ids, torch.tensor(forget)


def after_steps(*, targets, compiled=False, norm="mse", adapter="lora"):
    """Losses of a step on each of the masks (float64 unless compiled), and the adapters after them."""
    torch._dynamo.reset()
    model = tiny_language_model(4).to(torch.float32 if compiled else torch.float64)
    rfa = rfa_fast.patch(model, targets, rank=2, seed=0, mode="teacher", norm=norm, adapter=adapter)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.5), compile=compiled)
    losses = [torch.stack(tuple(step(*language_batch(mask)))).double() for mask in MASKS]
    return torch.stack(losses), [each.double() for each in rfa.parameters()]


@pytest.fixture
def whole(monkeypatch):
    """A function that makes the original model compute everything from then on, in the order of the batch."""

    def restore():
        monkeypatch.setattr(teacher.Teacher, "_applies", lambda *_: False)

    return restore


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({"targets": "deep"}, False),
        ({"targets": "deep"}, True),
        ({"targets": "all"}, False),
        ({"targets": "all"}, True),
        ({"targets": "deep", "norm": "l2"}, False),
        ({"targets": "deep", "adapter": "dora"}, False),
        ({"targets": "deep", "adapter": "pissa"}, False),
    ],
)
def test_no_loss_and_no_gradient_differs(options, compiled, whole):
    losses, adapters = after_steps(compiled=compiled, **options)
    whole()
    expected, truth = after_steps(**options)
    near = {"rtol": 1e-5, "atol": 1e-6} if compiled else {"rtol": 1e-9, "atol": 1e-9}
    assert torch.allclose(losses, expected, **near)
    for mine, theirs in zip(adapters, truth, strict=True):
        assert torch.allclose(mine, theirs, **near)


def test_one_graph_whatever_the_order():
    """Retained samples in front or not, labels that are the input ids themselves: one compilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    rfa = rfa_fast.patch(tiny_language_model(4), "deep", rank=2, seed=0, mode="teacher")
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), backend=counter)
    ids = language_batch([False] * 4)[1]
    for forget in ([False, False, True, True], [True, False, True, False], [False] * 4):
        step({"input_ids": ids}, ids, torch.tensor(forget))
    assert counter.frame_count == 1
    names = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("retain_linear" in name for name in names) == 2 * 7  # two of four blocks, every linear layer in them


def test_in_a_forward_of_ones_own_everything_is_computed():
    """`groups()` sees neither inputs nor labels, and cannot put them in order."""
    model = tiny_language_model(4)
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0, mode="teacher")
    inputs, _, forget = language_batch([True, False, False, True])
    with rfa.groups(forget):
        model(**inputs)
        features = list(rfa._context.teacher.values())
        assert all(bool(feature[0].any()) and bool(feature[3].any()) for feature in features)
        assert torch.isfinite(rfa.alignment_loss())


def test_what_a_sample_to_forget_costs():
    """Six samples of seven tokens, three of them to forget and in between: the products of half a teacher's forward."""

    def products(forget, norm="mse"):
        rfa = rfa_fast.patch(tiny_language_model(4), "deep", rank=2, seed=0, mode="teacher", norm=norm)
        batch = language_batch(forget)
        rfa.loss(*batch)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            rfa.loss(*batch)
        return counter.get_total_flops()

    some, none = products([True, False] * 3), products([False] * 6)
    attention, feed_forward = 16 * (16 + 8 + 8 + 16), 16 * 40 * 3
    assert none - some == 2 * (3 * 7) * 2 * (attention + feed_forward)  # two of the four layers, 2 per multiply-add
    assert products([True, False] * 3, "l2") == products([False] * 6, "l2")


def test_with_the_l2_norm_original_and_student_agree_before_the_first_update():
    """Bit for bit: of a difference of rounding size that norm's gradient would be of full size."""
    rfa = rfa_fast.patch(tiny_language_model(4).double(), "deep", rank=2, seed=0, mode="teacher", norm="l2")
    found = rfa.loss(*language_batch([True, False, True, False]))
    assert found.retain_align.item() == 0
    found.retain_align.backward()
    assert all(each.grad is None or not each.grad.any() for each in rfa.parameters())


class Widths(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.seen.add(tuple(output.shape))
        return output


def test_the_head_stands_aside():
    rfa = rfa_fast.patch(tiny_language_model(4), "deep", rank=2, seed=0, mode="teacher")
    batch = language_batch([True, False, True, False])
    with Widths() as shapes, torch.no_grad():
        rfa.loss(*batch)
    assert not {(4, 7, VOCABULARY), (28, VOCABULARY)} & shapes.seen
    assert "forward" not in rfa.model.lm_head.__dict__


def test_which_layers_it_is():
    net = TinyBlocks()
    assert teacher.Teacher(net, ["0", "1", "2"], ["0"]).names == ("1.up", "1.down", "2.up", "2.down")
    assert teacher.Teacher(net, [], []).names == ()
    assert not teacher.Teacher(net, [], []).saves
    net[1].batch_first = False
    assert teacher.Teacher(net, ["0", "1", "2"], ["0"]).names == ("2.up", "2.down")


def test_a_forward_that_somebody_has_put_there_is_run():
    model, ran = TinyBlocks(), []
    own = model[2].down.forward
    rfa = rfa_fast.patch(model, ["1.up"], rank=2, seed=0, mode="teacher", rows="batch")
    model[2].down.forward = lambda x: ran.append(tuple(x.shape)) or own(x)
    rfa.loss(torch.randn(4, 6, 5), torch.zeros(4, 6, dtype=torch.int64), torch.arange(4) < 2)
    assert ran == [(4, 6, 7)] * 2
    assert "forward" not in model[1].down.__dict__
    assert "forward" in model[2].down.__dict__


class Mixing(nn.Module):
    """A block whose samples see one another in its statistics."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x):
        return x + self.norm(self.up(x))


def test_samples_that_see_one_another_are_all_computed():
    torch.manual_seed(0)
    net = nn.Sequential(Mixing(), Mixing(), nn.Linear(5, 3))
    rfa = rfa_fast.patch(net, ["0.up", "1.up"], rank=2, seed=0, mode="teacher", rows="batch")
    losses = rfa.loss(torch.randn(4, 6, 5), torch.zeros(4, 6, dtype=torch.int64), torch.arange(4) < 2)
    assert losses.retain_align.item() == 0.0  # B is 0


class TokensFirst(nn.Module):
    """A block that puts the tokens in front of the batch and says so nowhere."""

    def __init__(self):
        super().__init__()
        self.inner, self.up = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.up(x + self.inner(x.transpose(0, 1)).cumsum(0).transpose(0, 1))


@pytest.mark.parametrize("length", [4, 6])
def test_as_many_tokens_as_samples(length):
    torch.manual_seed(0)
    net = nn.Sequential(TokensFirst(), TokensFirst(), nn.Linear(5, 3))
    rfa = rfa_fast.patch(net, ["1.up"], rank=2, seed=0, mode="teacher", rows="batch")
    x, forget = torch.randn(4, length, 5), torch.tensor([True, False, True, False])
    losses = rfa.loss(x, torch.zeros(4, length, dtype=torch.int64), forget)
    assert losses.retain_align.item() == 0.0  # B is 0


def whole_net():
    return teacher.Teacher(TinyBlocks(), ["0", "1", "2"], [])


def batch_of(codes):
    samples = torch.tensor(codes, dtype=torch.int8)
    tokens = samples[:, None].expand(-1, 2).clone()
    return Batch(samples, tokens, True)


def test_retained_samples_come_first():
    context = GroupContext(rfa_fast.RFAConfig(mode="teacher"))
    ids, labels = torch.arange(8).reshape(4, 2), torch.arange(4)
    inputs = {"input_ids": ids, "use_cache": False}
    moved, their_labels, batch = whole_net().retain_first(context, inputs, labels, batch_of([1, 0, -1, 0]))
    assert moved["input_ids"].tolist() == [[2, 3], [6, 7], [0, 1], [4, 5]]
    assert moved["use_cache"] is False
    assert their_labels.tolist() == [1, 3, 0, 2]
    assert batch.samples.tolist() == batch.needed.tolist() == [0, 0, 1, -1]
    assert batch.tokens.tolist() == [[0, 0], [0, 0], [1, 1], [-1, -1]]
    assert inputs["input_ids"] is ids


def test_a_batch_in_order_is_not_copied_unless_a_graph_has_to_see_it_anew():
    context = GroupContext(rfa_fast.RFAConfig(mode="teacher"))
    inputs, labels, batch = {"input_ids": torch.arange(6).reshape(3, 2)}, torch.arange(3), batch_of([0, 0, 1])
    same, their_labels, ordered = whole_net().retain_first(context, inputs, labels, batch)
    assert same is inputs
    assert their_labels is labels
    assert ordered.needed.tolist() == [0, 0, 1]
    anew, _, again = whole_net().retain_first(context, inputs, labels, batch, anew=True)
    assert anew["input_ids"] is not inputs["input_ids"]
    assert torch.equal(anew["input_ids"], inputs["input_ids"])
    assert again.needed.tolist() == [0, 0, 1]


def test_as_many_tokens_as_samples_are_put_in_order_and_computed():
    context = GroupContext(rfa_fast.RFAConfig(mode="teacher"))
    samples = torch.tensor([1, 0], dtype=torch.int8)
    batch = Batch(samples, samples[:, None].expand(-1, 2), True)
    ids = torch.tensor([[1, 2], [3, 4]])
    moved, _, ordered = whole_net().retain_first(context, {"input_ids": ids}, ids, batch)
    assert moved["input_ids"].tolist() == [[3, 4], [1, 2]]
    assert ordered.samples.tolist() == [0, 1]
    assert ordered.needed.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"mode": "residual"}, {}),
        ({"rows": "sequence_first"}, {}),
        ({}, {"position_ids": torch.zeros(3, 4, 2)}),
        ({}, {"past": [torch.zeros(4)]}),
        ({}, {"pixel_values": torch.zeros(4, 3)}),
        ({}, {"attention_mask": torch.zeros(1, 2)}),
    ],
    ids=["residual mode", "another first axis", "unknown axes", "a list", "images beside text", "one for all"],
)
def test_a_batch_that_is_left_as_it_is(options, extra):
    context = GroupContext(rfa_fast.RFAConfig(**{"mode": "teacher", **options}))
    inputs, labels, batch = {"input_ids": torch.arange(8).reshape(4, 2), **extra}, torch.arange(4), batch_of([1, 0] * 2)
    same = whole_net().retain_first(context, inputs, labels, batch)
    assert all(a is b for a, b in zip(same, (inputs, labels, batch), strict=True))
    assert batch.needed is None


def test_the_order_matters_where_a_linear_layer_runs():
    model = TinyBlocks()
    rfa = rfa_fast.patch(model, ["2.up", "2.down"], rank=2, seed=0, mode="teacher")
    assert rfa._teacher.names == ()
    assert rfa._teacher.saves
    blocks = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Sequential(nn.Conv2d(2, 2, 3)), nn.Flatten(), nn.Linear(2, 3)
    )
    rfa = rfa_fast.patch(blocks, ["0.0", "3"], rank=1, seed=0, mode="teacher")
    assert not teacher.Teacher(rfa.model, ["0", "1"], []).saves


def test_a_model_that_changes_its_logits_is_compared_with_the_original_from_the_first_batch_on():
    def halved(_, __, output):
        output.logits = output.logits / 2

    model = tiny_language_model(4)
    model.register_forward_hook(halved)
    rfa = rfa_fast.patch(model, "deep", rank=2, seed=0, mode="teacher")
    with torch.no_grad():
        for layer in rfa.layers.values():
            layer.lora_b.normal_()
    batch = next(batches((4, 8)))
    first, second = rfa.loss(*batch), rfa.loss(*batch)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first.retain_align > 0


@pytest.mark.parametrize("targets", ["deep", "all"])
def test_a_forward_that_the_original_did_not_run_before_is_refused_or_plain(targets):
    model = tiny_language_model(4)
    ids, forget = torch.arange(8).reshape(2, 4), torch.tensor([False, True])
    before = model.eval()(ids).logits
    rfa = rfa_fast.patch(model, targets, rank=2, seed=0, mode="teacher")
    with rfa.groups(forget):
        with rfa.disabled():
            assert torch.equal(model(ids).logits, before)
        with pytest.raises(ValueError, match="expected the patched model itself to be called inside groups"):
            model.forward(ids)
        model(ids)
        with rfa.disabled():
            assert torch.equal(model(ids).logits, before)
            assert not torch.equal(model(ids + 1).logits, before)
        assert rfa.alignment_loss().item() >= 0
