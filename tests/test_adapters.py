"""Adapters through the file system: PEFT reads ours and we read PEFT's, with equal outputs.

PEFT itself is the truth here: it shares no code with the package, so an adapter that gives the same outputs
in both has the right keys, shapes, scales and layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import peft
import pytest
import torch
from adapter_cases import adapted_by_peft, build, linears, outputs, read_by_peft, train
from torch import nn
from transformers.pytorch_utils import Conv1D

import rfa_fast
from rfa_fast.peft_format import peft_differs


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 6, 1, bias=False),
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Tanh(),
        nn.Conv2d(4, 5, (1, 3), padding=(0, 2), dilation=(2, 1)),
        nn.Conv2d(5, 4, 1, stride=2, padding_mode="reflect"),
    )


def transposed() -> nn.Module:
    return nn.Sequential(Conv1D(5, 7), nn.Tanh(), Conv1D(6, 5), nn.Tanh(), nn.Linear(6, 4))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "linear": (linears, (4, 7), ["0", "2"]),
    "conv2d": (convolutions, (2, 3, 9, 11), ["0", "2", "3", "5", "6"]),
    "conv1d": (transposed, (2, 3, 7), ["0", "2", "4"]),
}
VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"adapter": "dora"},
    "dora-rslora": {"adapter": "dora", "rslora": True},
    "pissa": {"adapter": "pissa"},
    "pissa-rslora": {"adapter": "pissa", "rslora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_peft_reads_ours(layers, variant, dtype, tmp_path):
    make, shape, names = layers
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    options = {"rank": 3, "alpha": 7, "rank_pattern": {names[-1]: 2}, "alpha_pattern": {names[0]: 5.5}, **variant}
    plain = outputs(build(make, dtype), x)
    rfa = train(rfa_fast.patch(build(make, dtype), names, adapter_dtype=dtype, **options))
    expected = outputs(rfa.model, x)
    rfa.save(tmp_path)

    theirs = read_by_peft(build(make, dtype), tmp_path)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(outputs(theirs, x), expected, rtol=tolerance, atol=tolerance)
    assert (expected - plain).abs().max() > 1e-2
    scales = adapted_by_peft(theirs)
    assert set(scales) == set(names)
    exact = variant != VARIANTS["pissa-rslora"]  # its filed alpha holds a factor of √2
    for name, layer in rfa.layers.items():
        assert scales[name] == layer.scale if exact else math.isclose(scales[name], layer.scale, rel_tol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_we_read_peft(layers, variant, dtype, tmp_path):
    make, shape, names = layers
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=names, rank_pattern={names[-1]: 2}, alpha_pattern={names[0]: 5},
        init_lora_weights=False, fan_in_fan_out=make is transposed, **variant,
    )  # fmt: skip
    theirs = peft.get_peft_model(build(make, dtype), config)
    if config.use_dora:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "magnitude" in name:
                    parameter *= torch.linspace(0.5, 1.5, parameter.numel()).reshape(parameter.shape)
    theirs.save_pretrained(tmp_path)

    rfa = rfa_fast.load(build(make, dtype), tmp_path)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(outputs(rfa.model, x), outputs(theirs.eval(), x), rtol=tolerance, atol=tolerance)
    assert {name: layer.scale for name, layer in rfa.layers.items()} == adapted_by_peft(theirs)
    assert all(p.requires_grad and p.dtype == dtype for p in rfa.parameters())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_we_read_ours_bit_for_bit(layers, variant, tmp_path):
    make, shape, names = layers
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    rfa = train(rfa_fast.patch(build(make), names, rank=2, gamma=0.25, norm="l2", **variant))
    rfa.save(tmp_path)
    again = rfa_fast.load(build(make), tmp_path, mode="teacher")
    assert torch.equal(outputs(again.model, x), outputs(rfa.model, x))
    assert again.state_tensors().keys() == rfa.state_tensors().keys()
    assert all(torch.equal(value, again.state_tensors()[key]) for key, value in rfa.state_tensors().items())
    assert (again.config.gamma, again.config.norm, again.config.mode) == (0.25, "l2", "teacher")
    assert again.config.adapter == rfa.config.adapter


def test_peft_pissa_as_trained(tmp_path):
    """PEFT files the trained pair alone and takes its start out of the weights again when it loads."""
    theirs = peft.get_peft_model(build(linears), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    theirs.save_pretrained(tmp_path)
    rfa = rfa_fast.load(build(linears), tmp_path)
    x = torch.randn(4, 7)
    assert rfa.config.adapter == "pissa"
    torch.testing.assert_close(outputs(rfa.model, x), outputs(theirs.eval(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("sizes", [(9, 2), (2, 9), (3, 3)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("kernel", [None, 1, 3], ids=["linear", "1x1", "3x3"])
def test_peft_rank_beyond_the_layer(kernel, sizes, variant, tmp_path):
    """A head of two classes at rank 8 is what PEFT's defaults give."""
    inputs, classes = sizes

    def make() -> nn.Module:
        layer = nn.Linear(inputs, classes) if kernel is None else nn.Conv2d(inputs, classes, kernel)
        return nn.Sequential(nn.Identity(), layer)

    config = peft.LoraConfig(r=20, lora_alpha=8, target_modules=["1"], init_lora_weights=False, **variant)
    theirs = peft.get_peft_model(build(make), config)
    theirs.save_pretrained(tmp_path)
    rfa = rfa_fast.load(build(make), tmp_path)
    x = torch.randn(4, inputs) if kernel is None else torch.randn(2, inputs, 5, 5)
    assert rfa.layers["1"].rank == min(classes, inputs * (kernel or 1) ** 2)
    torch.testing.assert_close(outputs(rfa.model, x), outputs(theirs.eval(), x), rtol=1e-4, atol=1e-5)


REFUSED = {
    "dilation": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    "dilation-same": lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "circular-same": lambda: nn.Conv2d(4, 4, (3, 1), padding="same", padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
}


@pytest.mark.parametrize("variant", [{}, {"adapter": "dora"}, {"adapter": "pissa"}], ids=["lora", "dora", "pissa"])
@pytest.mark.parametrize("layer", REFUSED.values(), ids=REFUSED)
def test_what_peft_would_compute_wrongly_it_refuses(layer, variant, tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), layer())

    x = torch.randn(2, 3, 7, 7)
    rfa = train(rfa_fast.patch(build(make), ["0", "1"], rank=2, **variant))
    rfa.save(tmp_path)
    with pytest.raises(KeyError, match=r"RFA: load with rfa_fast\.load"):
        peft.PeftModel.from_pretrained(build(make), tmp_path)
    assert list(json.loads((tmp_path / "rfa_config.json").read_text())["refused_by_peft"]) == ["1"]
    assert torch.equal(outputs(rfa_fast.load(build(make), tmp_path).model, x), outputs(rfa.model, x))

    # Under PEFT's own type the same tensors give an error or another function: the refusal is needed.
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LORA"}))
    try:
        got = outputs(peft.PeftModel.from_pretrained(build(make), tmp_path).eval(), x)
    except (RuntimeError, ValueError):
        return
    assert (got - outputs(rfa.model, x)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", REFUSED.values(), ids=REFUSED)
def test_what_peft_trained_wrongly_we_refuse(layer, tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Identity(), layer())

    peft.get_peft_model(build(make), peft.LoraConfig(r=2, target_modules=["1"])).save_pretrained(tmp_path)
    model = build(make)
    with pytest.raises(ValueError, match=r"layer '1'.*PEFT"):
        rfa_fast.load(model, tmp_path)
    assert type(model[1]) is nn.Conv2d


def test_convolutions_that_peft_gets_right():
    assert all(peft_differs(module) is None for module in convolutions().modules())
