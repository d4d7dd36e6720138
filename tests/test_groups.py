"""Group codes, row layouts, and the two ways of taking the loss."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rfa_fast
from rfa_fast.config import RFAConfig
from rfa_fast.groups import GroupContext, make_batch
from rfa_fast.padding import batch_of

CPU = torch.device("cpu")


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def context(rows="auto", **batch):
    ctx = GroupContext(RFAConfig(rows=rows))
    ctx.batch = make_batch(flags(0, 1, 0), batch.pop("valid", None), device=CPU, **batch)
    return ctx


def test_codes_of_samples_and_tokens():
    valid = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    batch = make_batch(flags(0, 1, 0), valid, device=CPU)
    assert batch.tokens.tolist() == [[0, 0], [1, -1], [-1, -1]]
    assert batch.samples.tolist() == [0, 1, -1]
    whole = make_batch(flags(0, 1, 0), flags(1, 1, 0), device=CPU, length=2)
    assert whole.samples.tolist() == [0, 1, -1]
    assert whole.tokens.tolist() == [[0, 0], [1, 1], [-1, -1]]


@pytest.mark.parametrize(
    ("rows", "length", "shape", "ambiguous", "view", "axes"),
    [
        ("auto", None, (3,), False, "batch", 1),
        ("auto", None, (3, 197), False, "batch", 1),
        ("auto", 5, (3, 5), False, "batch", 2),
        ("auto", 5, (3,), False, "batch", 1),
        ("auto", 5, (15,), False, "flat", 2),
        ("auto", None, (7, 3), True, "sequence_first", 1),
        ("auto", 3, (3, 3), False, "batch", 2),
        ("batch", 5, (3, 9), False, "batch", 1),
        ("flat", None, (12, 49), False, "flat", 1),
        ("sequence_first", 5, (5, 3), False, "sequence_first", 2),
    ],
)
def test_the_layout_follows_from_the_shape(rows, length, shape, ambiguous, view, axes):
    layout = context(rows, length=length).layout("fc", shape, ambiguous=ambiguous)
    assert (layout.view, layout.group.ndim) == (view, axes)


@pytest.mark.parametrize(
    ("length", "shape", "ambiguous", "words"),
    [
        (None, (12, 49), False, ["no reading", "rows='flat'"]),
        (5, (16,), False, ["no reading", "5 tokens"]),
        (None, (3, 3), True, ["batch and sequence_first", "exactly one"]),
        (5, (3, 9), False, ["9 rows per sample", "expected 5", "rows='batch'"]),
    ],
)
def test_a_shape_that_fits_none_or_two_is_an_error(length, shape, ambiguous, words):
    with pytest.raises(ValueError, match="layer 'fc'") as caught:
        context(length=length).layout("fc", shape, ambiguous=ambiguous)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rows_may_be_given_per_layer():
    ctx = context({"other": "batch", "fc": "flat"})
    assert ctx.layout("fc", (6,), ambiguous=False).view == "flat"
    with pytest.raises(ValueError, match="rows='flat' does not fit"):
        ctx.layout("fc", (7,), ambiguous=False)


def test_batch_of_reads_size_length_and_mask():
    mask = torch.tensor([[1, 1, 0]])
    size, length, found = batch_of({"attention_mask": mask, "input_ids": torch.ones(1, 3, dtype=torch.int64)})
    assert (size, length, found.tolist()) == (1, 3, [[True, True, False]])
    assert batch_of({"pixel_values": torch.zeros(2, 3, 4, 4)}) == (2, None, None)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 1, 3, 3\), expected \(1, 3\)"):
        batch_of({"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)})
    with pytest.raises(ValueError, match="at least one tensor"):
        batch_of({"use_cache": False})


class Tokens(nn.Module):
    """Three tokens a sample in, through a layer that sees them in the given layout."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)
        if layout == "sequence_first":
            self.batch_first = False

    def forward(self, x):
        batch, length, width = x.shape
        if self.layout == "flat":
            y = self.fc(x.reshape(batch * length, width)).reshape(batch, length, -1)
        elif self.layout == "sequence_first":
            y = self.fc(x.transpose(0, 1)).transpose(0, 1)
        else:
            y = self.fc(x)
        return self.head(y.relu().mean(1))


@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("feature_mean", ["sample", "token"])
@pytest.mark.parametrize(("layout", "rows"), [("flat", {"fc": "flat"}), ("sequence_first", "auto")])
def test_every_layout_gives_the_loss_of_batch_first(layout, rows, feature_mean, mode):
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    labels, forget = torch.tensor([0, 1, 2, 0]), flags(0, 1, 0, 1)
    results = []
    for kind, option in (("batch", "auto"), (layout, rows)):
        torch.manual_seed(1)
        net = Tokens(kind)
        rfa = rfa_fast.patch(net, ["fc"], rank=2, seed=5, feature_mean=feature_mean, rows=option, mode=mode)
        torch.nn.init.normal_(rfa.layers["fc"].lora_b, generator=torch.Generator().manual_seed(2))
        loss = rfa.loss(x, labels, forget)
        loss.total.backward()
        results.append([*loss, rfa.layers["fc"].lora_a.grad, rfa.layers["fc"].lora_b.grad])
    for ours, truth in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, truth, rtol=1e-5, atol=1e-6)


def test_loss_in_two_parts_equals_the_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    rfa = rfa_fast.patch(net, "all", rank=2, gamma=0.3, weights=(1.0, 2.0, 3.0, 0.0), seed=1)
    x, labels, forget = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), flags(0, 1, 0, 1, 0)
    whole = rfa.loss(x, labels, forget)
    with rfa.groups(forget):
        logits = net(x)
    parts = rfa.alignment_loss() + 0.7 * 3.0 * nn.functional.cross_entropy(logits[~forget], labels[~forget])
    assert float(parts.detach()) == pytest.approx(float(whole.total.detach()), rel=1e-6)


def test_outside_groups_nothing_is_recorded_and_inside_only_once():
    net = nn.Sequential(nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    with pytest.raises(ValueError, match="layer '0': got no call"), rfa.groups(flags(0, 1)):
        rfa.alignment_loss()
    with pytest.raises(ValueError, match="second batch"), rfa.groups(flags(0, 1)), rfa.groups(flags(0, 1)):
        pass
    with rfa.groups(flags(0, 1)):
        net(torch.zeros(2, 4))
        net(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got 2 calls in one forward"):
        rfa.alignment_loss()


def test_a_batch_without_retain_samples_takes_the_last_mean():
    net = nn.Sequential(nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    first, second = torch.randn(3, 4), torch.randn(2, 4)
    rfa.loss(first, torch.tensor([0, 1, 2]), flags(0, 0, 1))
    loss = rfa.loss(second, torch.tensor([0, 1]), flags(1, 1))
    with torch.no_grad(), rfa.disabled():
        mean, soft = net(first[:2]).mean(0), net(first[:2]).softmax(-1).mean(0)
        expected = (net(second) - mean).square().mean()
        task = -(net(second).log_softmax(-1) @ soft).mean()
    assert float(loss.forget_align.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss.forget_task.detach()) == pytest.approx(float(task), rel=1e-5)
    assert float(loss.retain_align.detach()) == 0.0
    assert float(loss.retain_task.detach()) == 0.0


def test_before_there_is_a_mean_the_forget_terms_are_zero_and_that_is_said_once():
    rfa = rfa_fast.patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
    with pytest.warns(UserWarning, match="no retain sample"):
        loss = rfa.loss(torch.randn(2, 4), torch.tensor([0, 1]), flags(1, 1))
    assert float(loss.total.detach()) == 0.0
    loss.total.backward()
    assert all(p.grad is not None for p in rfa.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rfa.loss(torch.randn(2, 4), torch.tensor([0, 1]), flags(1, 1))


class Recurrent(nn.Module):
    """Sequence first by torch's default, which the LSTM says and the model does not."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc, self.head = nn.LSTM(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.fc(self.rnn(x)[0]).mean(0))


class Decoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.head = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.decoder(x, x).mean(0))


@pytest.mark.parametrize(("kind", "layer"), [(Recurrent, "fc"), (Decoded, "decoder.layers.1.linear1")])
def test_a_square_input_beside_a_sequence_first_layer_is_an_error_until_rows_says(kind, layer):
    x, labels, forget = torch.randn(6, 6, 8), torch.tensor([0, 1, 0, 1, 0, 1]), flags(0, 1, 0, 1, 0, 1)
    rfa = rfa_fast.patch(kind(), [layer], rank=2)
    with pytest.raises(ValueError, match=f"layer '{layer}'.*fits batch and sequence_first, expected exactly one"):
        rfa.loss(x, labels, forget)
    rfa.remove()
    rfa_fast.patch(kind(), [layer], rank=2, rows="sequence_first").loss(x, labels, forget).total.backward()
