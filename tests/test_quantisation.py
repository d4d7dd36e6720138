"""Weight-only quantisation against values by hand, a plain numpy loop, and torchao where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import rfa_fast
from rfa_fast.experiments import quantisation
from rfa_fast.experiments.quantisation import quantise_weights, round_rows


def by_loop(rows: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """The definition, one group of one row at a time, in float64."""
    top, out = 2 ** (bits - 1) - 1, np.zeros(rows.shape)
    for row, result in zip(rows.astype(np.float64), out, strict=True):
        step = group or len(row)
        for start in range(0, len(row), step):
            part = row[start : start + step]
            scale = np.abs(part).max() / top
            result[start : start + step] = np.rint(part / scale) * scale if scale else 0.0
    return out


def test_rounding_by_hand():
    # 8 bits, one scale per row: 1.27 / 127 = 0.01; halves go to even.
    rows = torch.tensor([[127.0, 0.4, -0.6, 2.5, 3.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert round_rows(rows, 8, None).tolist() == [[127, 0, -1, 2, 4], [0, 0, 0, 0, 0]]
    # 4 bits, groups of two, the last of one: scales 1, 0.5 and 2.
    assert round_rows(torch.tensor([[7.0, 2.4, -3.5, 0.3, 14.0]]), 4, 2).tolist() == [[7, 2, -3.5, 0.5, 14]]
    assert round_rows(torch.tensor([[7.0, 2.6, -0.4]]), 4, 64).tolist() == [[7, 3, 0]]
    assert round_rows(torch.tensor([[1.0, 0.6, 0.4, -2.0]]), 2, 2).tolist() == [[1, 1, 0, -2]]


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("shape", [(3, 1), (5, 64), (2, 150)], ids=str)
def test_equals_the_definition(bits, shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    group = None if bits == 8 else 64
    np.testing.assert_allclose(round_rows(rows, bits, group), by_loop(rows.numpy(), bits, group), rtol=1e-5, atol=1e-7)


class Mixed(nn.Module):
    """A layer of every kind that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.line = nn.Conv1d(2, 3, 5)
        self.norm = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.embedding = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embedding.weight


def test_every_weight_matrix_is_rounded_once_and_nothing_else():
    torch.manual_seed(0)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = quantise_weights(model, 4, group_size=10, quantiser="simulated")
    assert done.names == (
        "conv.weight", "line.weight", "attention.in_proj_weight", "attention.out_proj.weight", "apart.q_proj_weight",
        "apart.k_proj_weight", "apart.v_proj_weight", "apart.out_proj.weight", "head.weight",
    )  # fmt: skip
    for name, value in model.state_dict().items():
        if name in (*done.names, "embedding.weight"):  # the embedding is the head's
            expected = by_loop(before[name].flatten(1).numpy(), 4, 10).reshape(value.shape)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(value, before[name]), name
    assert model.head.weight is model.embedding.weight
    rounded = sum(before[name].numel() for name in done.names)
    assert done.share == pytest.approx(rounded / sum(p.numel() for p in model.parameters()))
    assert "4-bit weights, symmetric, one scale per group of 10 inputs, rounded to nearest by simulated" in str(done)
    assert "one scale per output channel" in str(quantise_weights(model, 8, quantiser="simulated"))


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "adapters live"])
def test_gpt2_keeps_its_outputs_in_the_second_axis(patched):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    layer = model.transformer.h[0].mlp.c_fc
    before = layer.weight.detach().clone()
    if patched:
        rfa_fast.patch(model, ["mlp.c_fc"], rank=2, seed=0)
        adapter = layer.lora_a.detach().clone()
    quantise_weights(model, 8, quantiser="simulated")
    np.testing.assert_allclose(layer.weight.detach(), by_loop(before.numpy().T, 8, None).T, rtol=1e-5, atol=1e-7)
    if patched:
        assert torch.equal(layer.lora_a, adapter)


def test_the_dtype_stays():
    layer = nn.Linear(3, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[7.0, 2.6, -1.4]]))
    quantise_weights(layer, 4, quantiser="simulated")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.tolist() == [[7.0, 3.0, -1.0]]


BAD = {
    "bits": ((nn.Linear(2, 2), 9), {}, ValueError, "bits: got 9, expected an integer from 2 to 8"),
    "kind of bits": ((nn.Linear(2, 2), 4.0), {}, ValueError, "bits: got 4.0"),
    "group": ((nn.Linear(2, 2), 4), {"group_size": 0}, ValueError, "group_size: got 0, expected an integer >= 1"),
    "quantiser": ((nn.Linear(2, 2), 4), {"quantiser": "gptq"}, ValueError, "quantiser: got 'gptq', expected 'auto'"),
    "nothing": ((nn.ReLU(), 4), {}, ValueError, "got ReLU without linears and convolutions"),
    "computed": (
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 4),
        {},
        TypeError,
        "got one that is computed",
    ),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_rounded(arguments, options, error, message):
    with pytest.raises(error, match=message):
        quantise_weights(*arguments, **options)


def test_torchao_is_asked_for_in_vain(monkeypatch):
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"got 'torchao', which is not installed; expected pip install 'rfa-fast\["):
        quantise_weights(nn.Linear(2, 2), 4, quantiser="torchao")
    assert quantise_weights(nn.Linear(2, 2), 4).by == "simulated"


def test_torchao_is_taken_where_it_is_installed(monkeypatch):
    """A stand-in with the three functions, as torchao names and calls them; the real one is tried below."""
    seen: list[tuple[object, ...]] = []

    def choose(rows, mapping, block, dtype, low, high):
        seen.append((mapping, block, dtype, low, high))
        return rows.abs().reshape(len(rows), -1, block[1]).amax(-1) / high, None

    def quantise(rows, block, scale, zero, dtype, low, high):
        return (rows / scale.repeat_interleave(block[1], 1)).round().clamp(low, high).to(dtype)

    def back(codes, block, scale, zero, dtype, low, high):
        return codes * scale.repeat_interleave(block[1], 1)

    fake = ModuleType("torchao.quantization.quant_primitives")
    fake.MappingType = SimpleNamespace(SYMMETRIC="symmetric")
    fake.choose_qparams_affine, fake.quantize_affine, fake.dequantize_affine = choose, quantise, back
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(quantisation, "find_spec", lambda name: object())
    monkeypatch.setattr(quantisation, "version", lambda name: "1.2")
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 2, 3)
    before = layer.weight.detach().clone()
    done = quantise_weights(layer, 4, group_size=10)
    assert done.by == "torchao 1.2"
    assert seen == [("symmetric", (1, 10), torch.int8, -7, 7)]
    expected = by_loop(before.flatten(1).numpy(), 4, 10)  # 27 inputs: the last group is filled up with zeros
    np.testing.assert_allclose(layer.weight.detach().flatten(1), expected, rtol=1e-5, atol=1e-7)
    assert quantise_weights(layer, 4, quantiser="simulated").by == "simulated"


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_rounds_to_the_same_grid(bits):
    rows = torch.randn(7, 150, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    rows[4, :64] = 0
    group = None if bits == 8 else 64
    theirs = round_rows(rows, bits, group, by_torchao=True)
    torch.testing.assert_close(theirs, round_rows(rows, bits, group), rtol=1e-5, atol=1e-6)
