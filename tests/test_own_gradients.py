"""What the derivatives by hand leave to autograd: a layer's own weight and bias, what lies in front of the adapted
layers, and every derivative behind the first."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from step_cases import TinyBlocks, tiny_language_model
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

import rfa_fast
from rfa_fast import functional
from rfa_fast.prefix_cache import PrefixCache
from rfa_fast.step import compile_step

KINDS = ("linear", "conv2d")


def case(kind, dtype=torch.float64):
    """An input, a weight, A, B, a bias and a group; two samples to retain, one to forget, one ignored."""
    torch.manual_seed(0)
    shapes = {
        "linear": ((4, 3, 5), (7, 5), (2, 5), (7, 2), (7,)),
        "conv2d": ((4, 4, 6, 5), (6, 4, 3, 3), (2, 4, 3, 3), (6, 2, 1, 1), (6,)),
    }[kind]
    return [torch.randn(shape, dtype=dtype) for shape in shapes], torch.tensor([0, 1, 0, -1], dtype=torch.int8)


def operate(kind, tensors, backend, **options):
    x, weight, a, b, bias = tensors
    operator = functional.rfa_linear if kind == "linear" else functional.rfa_conv2d
    return operator(x, weight, a, b, bias, scale=1.5, backend=backend, **options)


def total(out):
    return (out.output**3).sum() + out.retain_loss + 2 * out.forget_loss


@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_or_bias_to_train_gets_its_gradient_from_every_backend(kind, trained):
    tensors, group = case(kind)
    found = {}
    for backend in ("torch", "reference"):
        own = [t.clone() for t in tensors]
        leaves = [own[0], own[2], own[3], *(own[{"weight": 1, "bias": 4}[name]] for name in trained)]
        for leaf in leaves:
            leaf.requires_grad_()
        found[backend] = torch.autograd.grad(total(operate(kind, own, backend, group=group)), leaves)
    for ours, truth in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(ours, truth)
        assert truth.norm() > 0


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_an_adapted_layer_trains_the_weight_that_its_owner_unfroze(mode, adapter):
    torch.manual_seed(0)
    model = TinyBlocks().double()
    batch = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3, torch.arange(6) < 2
    grads = {}
    for backend in ("auto", "reference"):
        net = copy.deepcopy(model)
        rfa = rfa_fast.patch(net, ["2.up"], rank=2, seed=0, mode=mode, adapter=adapter, backend=backend)
        layer = rfa.layers["2.up"]
        with torch.no_grad():
            layer.lora_b.copy_(torch.linspace(-1, 1, layer.lora_b.numel()).view_as(layer.lora_b))
        for parameter in (layer.weight, layer.bias):
            parameter.requires_grad_()
        rfa.loss(*batch).total.backward()
        grads[backend] = [p.grad for p in (layer.weight, layer.bias, layer.lora_a, layer.lora_b)]
    for ours, truth in zip(*grads.values(), strict=True):
        assert truth is not None
        assert truth.norm() > 0
        torch.testing.assert_close(ours, truth)


def embedding_of(model):
    return model.get_input_embeddings().weight


UNFROZEN = {
    "embedding": embedding_of,
    "norm of the first block": lambda model: model.model.layers[0].input_layernorm.weight,
    "norm of the last frozen block": lambda model: model.model.layers[1].input_layernorm.weight,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", UNFROZEN)
def test_teacher_mode_trains_what_lies_in_front_of_the_adapted_layers(which, compiled):
    """Residual mode shares nothing, so the gradient of the same task term is its; the alignment is taken out."""
    model = tiny_language_model(layers=3)
    inputs = {"input_ids": torch.arange(24).reshape(4, 6) % 50}
    labels, forget = inputs["input_ids"].clone(), torch.tensor([True, False, False, True])
    grads = {}
    torch._dynamo.reset()
    for mode in ("residual", "teacher"):
        net = copy.deepcopy(model)
        rfa = rfa_fast.patch(net, r".*layers\.2\.mlp\..*", rank=2, seed=0, mode=mode, weights=(0.0, 1.0, 0.0, 1.0))
        parameter = UNFROZEN[which](net).requires_grad_()
        assert rfa._prefix.names
        before = parameter.detach().clone()
        optimizer = torch.optim.SGD([parameter, *rfa.parameters()], lr=1.0)
        compile_step(rfa, optimizer, compile=compiled, backend="aot_eager")(inputs, labels, forget)
        grads[mode] = before - parameter.detach()
    assert grads["residual"].norm() > 0
    torch.testing.assert_close(grads["teacher"], grads["residual"])


def test_teacher_mode_passes_a_gradient_on_to_embedded_inputs():
    model = tiny_language_model(layers=3)
    rfa = rfa_fast.patch(model, r".*layers\.2\.mlp\..*", rank=2, seed=0, mode="teacher")
    embedded = torch.randn(4, 6, embedding_of(model).shape[1], requires_grad=True)
    labels, forget = torch.arange(24).reshape(4, 6) % 50, torch.tensor([True, False, False, True])
    rfa.loss({"inputs_embeds": embedded}, labels, forget).total.backward()
    assert embedded.grad is not None
    assert embedded.grad.norm() > 0


def test_a_cache_refuses_what_would_be_trained_in_front_of_it():
    model = tiny_language_model(layers=3)
    inputs = {"input_ids": torch.arange(24).reshape(4, 6) % 50}
    labels, forget = inputs["input_ids"].clone(), torch.tensor([True, False, False, True])
    rfa = rfa_fast.patch(model, r".*layers\.2\.mlp\..*", rank=2, seed=0)
    step = compile_step(
        rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), compile=False, cache_prefix=PrefixCache(samples=4)
    )
    embedding_of(model).requires_grad_()
    with pytest.raises(
        ValueError, match=r"something to train in front of block .*layers\.0'.*Freeze it, or take the cache off"
    ):
        step(inputs, labels, forget)
    embedding_of(model).requires_grad_(False)
    embedded = {"inputs_embeds": embedding_of(model)[inputs["input_ids"]].requires_grad_()}
    with pytest.raises(ValueError, match="inputs with requires_grad"):
        step(embedded, labels, forget)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_group_every_derivative_is_there(kind):
    tensors, _ = case(kind)
    leaves = [t.requires_grad_() for t in (tensors[0], tensors[2], tensors[3])]

    def forward(x, a, b):
        return operate(kind, [x, tensors[1], a, b, tensors[4]], "torch").output.tanh()

    assert torch.autograd.gradcheck(forward, leaves)
    assert torch.autograd.gradgradcheck(forward, leaves)
    plain = [t.detach() for t in leaves]
    jvp, vjp = torch.func.jvp(forward, tuple(plain), tuple(torch.ones_like(t) for t in plain))[1], None
    vjp = torch.func.vjp(forward, *plain)[1](torch.ones_like(jvp))
    torch.testing.assert_close(jvp.sum(), sum(grad.sum() for grad in vjp))
    many = torch.stack([plain[2], 2 * plain[2]])
    mapped = torch.func.vmap(lambda b: forward(plain[0], plain[1], b))(many)
    torch.testing.assert_close(mapped[1], forward(plain[0], plain[1], 2 * plain[2]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_through_a_group_says_that_it_is_not_there(kind):
    tensors, group = case(kind, torch.float32)
    a = tensors[2].requires_grad_()
    (slope,) = torch.autograd.grad(total(operate(kind, tensors, "torch", group=group)), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again; backend='reference' can"):
        slope.square().sum().backward()


def test_the_layer_under_autocast_keeps_its_dtypes_without_a_group():
    (x, weight, a, b, bias), _ = case("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = a.requires_grad_(), b.requires_grad_()
        out = functional.rfa_linear(x, weight, a, b, bias, scale=1.5).output
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
    truth = F.linear(x, weight + 1.5 * (b @ a), bias)
    assert (out.float() - truth).norm() < 0.02 * truth.norm()


def test_saving_names_what_is_trained_beside_the_adapters(tmp_path):
    model = TinyBlocks()
    rfa = rfa_fast.patch(model, ["2.up"], rank=2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rfa.save(tmp_path / "adapters-alone")
    model[0].up.bias.requires_grad_()
    with pytest.warns(
        UserWarning, match=r"save: beside the adapters there is more that requires a gradient \(0\.up\.bias\)"
    ):
        rfa.save(tmp_path / "one-more")


def test_several_processes_are_told_that_nothing_is_averaged(monkeypatch):
    rfa = rfa_fast.patch(TinyBlocks(), ["2.up"], rank=2, seed=0)
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rfa.loss(*batch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.warns(UserWarning, match=r"one of 4 processes.*inside `with rfa\.groups"):
        rfa.loss(*batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        rfa.loss(*batch)
    # fully_shard gives a module this class: it averages by itself.
    rfa.model.__class__ = type("FSDPTinyBlocks", (type("FSDPModule", (), {}), TinyBlocks), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rfa.loss(*batch)


class Prompted(nn.Module):
    """A language model behind learnt embeddings, which are registered before it or after it."""

    def __init__(self, *, last):
        super().__init__()
        inner = tiny_language_model(layers=3)
        if last:
            self.inner = inner
        self.prompt = nn.Embedding(50, 16)
        self.inner = inner

    def forward(self, ids):
        return self.inner(inputs_embeds=self.inner.get_input_embeddings()(ids) + self.prompt(ids)).logits


@pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
def test_what_is_trained_in_front_is_found_wherever_it_is_registered(last):
    ids = torch.arange(24).reshape(4, 6) % 50
    labels, forget = ids.clone(), torch.tensor([True, False, False, True])
    moved = {}
    for mode in ("residual", "teacher"):
        model = Prompted(last=last)
        torch.manual_seed(1)
        nn.init.normal_(model.prompt.weight)
        weights = (0.0, 1.0, 0.0, 1.0)
        rfa = rfa_fast.patch(model, r".*layers\.2\.mlp\..*", rank=2, seed=0, mode=mode, weights=weights)
        assert rfa._prefix.names
        model.prompt.weight.requires_grad_()
        rfa.loss(ids, labels, forget).total.backward()
        moved[mode] = model.prompt.weight.grad
    assert moved["residual"].norm() > 0
    torch.testing.assert_close(moved["teacher"], moved["residual"])
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), compile=False, cache_prefix=True)
    with pytest.raises(ValueError, match=r"cache_prefix: got something to train in front of block .*layers\.0'"):
        step(ids, labels, forget)
    model.prompt.weight.requires_grad_(False)
    step(ids, labels, forget)
    model.prompt.weight.requires_grad_()
    with pytest.raises(ValueError, match="something to train in front of block"):
        step(ids, labels, forget)


def test_what_is_trained_behind_the_prefix_lets_it_be_shared_and_cached():
    """OPT registers its last norm in front of its layers."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    rfa = rfa_fast.patch(model, r".*layers\.2\.fc.*", rank=2, seed=0, mode="teacher")
    norm = model.model.decoder.final_layer_norm.weight.requires_grad_()
    calls = []
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: calls.append(0))
    ids = torch.arange(24).reshape(4, 6) % 50
    batch = {"input_ids": ids}, ids.clone(), torch.tensor([True, False, False, True])
    rfa.loss(*batch).total.backward()
    assert len(calls) == 1
    assert norm.grad.norm() > 0
    compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), compile=False, cache_prefix=True)(*batch)
