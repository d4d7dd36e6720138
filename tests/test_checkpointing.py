"""Gradient checkpointing: the same losses and gradients, counted once, whoever switched it on and however."""

from __future__ import annotations

import pytest
import torch
from step_cases import VOCABULARY, TinyBlocks, batches, tiny_language_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import rfa_fast
from rfa_fast.step import compile_step


def gradients(rfa):
    return {name: None if p.grad is None else p.grad.clone() for name, p in rfa.named_parameters().items()}


def loss_and_gradients(rfa, batch):
    loss = rfa.loss(*batch)
    loss.total.backward()
    found = gradients(rfa)
    for p in rfa.parameters():
        p.grad = None
    return loss, found


def assert_same(ours, theirs):
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=1e-5, atol=1e-7), name
        assert "lora_b" not in name or float(gradient.norm()) > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_the_switch_of_transformers(mode, reentrant):
    rfas = [rfa_fast.patch(tiny_language_model(), "deep", seed=0, mode=mode) for _ in range(2)]
    switched = rfas[1]
    switched.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    block = switched.model.model.layers[-1]
    block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    for batch in batches((4, 8), (3, 5)):
        calls.clear()
        results = [loss_and_gradients(rfa, batch) for rfa in rfas]
        assert_same(*reversed(results))
        # The student's forward, and once more in the backward; the original model's is never repeated.
        assert len(calls) == (2 if mode == "residual" else 3)
    assert block.gradient_checkpointing
    assert not block.training
    assert block._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant
    embedding = switched.model.get_input_embeddings()
    assert len(embedding._forward_hooks) == 1


def lively(kind):
    """A small language model whose blocks have a dropout of their own, as modules (GPT-2) or as a function (OPT)."""
    torch.manual_seed(0)
    if kind == "modules":
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16, resid_pdrop=0.5)
        return GPT2LMHeadModel(config)
    config = OPTConfig(
        hidden_size=16, ffn_dim=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY, dropout=0.5,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("kind", ["modules", "function"])
def test_no_dropout_in_a_block_nor_in_its_second_run(kind, mode, train):
    rfas = [rfa_fast.patch(lively(kind), "all", rank=2, seed=0, mode=mode) for _ in range(2)]
    rfas[1].model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for rfa in rfas:
        rfa.model.train(train)
        with torch.no_grad():
            for layer in rfa.layers.values():
                layer.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    flags = [[module.training for module in rfa.model.modules()] for rfa in rfas]
    for batch in batches((4, 8), (3, 5)):
        assert_same(*reversed([loss_and_gradients(rfa, batch) for rfa in rfas]))
    assert flags == [[module.training for module in rfa.model.modules()] for rfa in rfas]


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_no_dropout_in_the_second_run_of_a_checkpoint_in_the_models_own_code(mode):
    torch.manual_seed(0)

    def net(call):
        return nn.Sequential(nn.Linear(5, 5), Block(call), Block(call), nn.Linear(5, 3))

    class Block(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.up, self.drop, self.call = nn.Linear(5, 5), nn.Dropout(0.5), call

        def forward(self, x):
            return x + self.call(lambda y: self.drop(self.up(y)).tanh(), x)

    plain, other = net(lambda run, x: run(x)), net(lambda run, x: checkpoint(run, x, use_reentrant=False))
    other.load_state_dict(plain.state_dict())
    rfas = [rfa_fast.patch(model, ["1.up", "2.up"], rank=2, seed=0, mode=mode) for model in (plain, other)]
    for rfa in rfas:
        rfa.model.train()
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    assert_same(*reversed([loss_and_gradients(rfa, batch) for rfa in rfas]))
    assert all(module.training for rfa in rfas for module in rfa.model.modules())


def test_the_prefix_stays_out_of_autograd():
    """transformers' switch lets the embeddings require a gradient; what comes before the first adapter must not."""
    rfa = rfa_fast.patch(tiny_language_model(), "deep", seed=0)
    rfa.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    seen = []
    for layer in rfa.model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    rfa.loss(*next(batches((4, 8))))
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_a_checkpoint_in_the_models_own_code(mode):
    torch.manual_seed(0)
    plain = TinyBlocks()
    other = TinyBlocks(lambda block, x: checkpoint(block, x, use_reentrant=False))
    other.load_state_dict(plain.state_dict())
    rfas = [rfa_fast.patch(model, ["1.up", "1.down", "2.up"], rank=2, seed=0, mode=mode) for model in (plain, other)]
    x, labels, forget = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6) < 2
    results = [loss_and_gradients(rfa, (x, labels, forget)) for rfa in rfas]
    assert_same(*reversed(results))


def test_two_losses_before_one_backward():
    """Each block runs again for its own batch."""
    torch.manual_seed(0)
    plain, other = TinyBlocks(), TinyBlocks(lambda block, x: checkpoint(block, x, use_reentrant=False))
    other.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, other):
        rfa = rfa_fast.patch(model, ["1.up", "2.up"], rank=2, seed=0)
        generator = torch.Generator().manual_seed(1)
        total = 0
        for forgotten in (1, 4):
            x = torch.randn(6, 5, generator=generator)
            total = total + rfa.loss(x, torch.arange(6) % 3, torch.arange(6) < forgotten).total
        total.backward()
        found.append(gradients(rfa))
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-8), name


def test_reentrant_in_the_models_own_code_is_refused():
    torch.manual_seed(0)
    model = TinyBlocks(lambda block, x: checkpoint(block, x.requires_grad_(), use_reentrant=True))
    rfa = rfa_fast.patch(model, ["1.up"], rank=2, seed=0)
    with pytest.raises(ValueError, match=r"layer '1.up': .*use_reentrant=False"):
        rfa.loss(torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2)
    with torch.no_grad():
        assert rfa.loss(torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2).total > 0


def test_a_loss_scale_reaches_every_term():
    torch.manual_seed(0)
    model = TinyBlocks(lambda block, x: checkpoint(block, x, use_reentrant=False))
    rfa = rfa_fast.patch(model, ["1.up", "2.up"], rank=2, seed=0)
    step = compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.1), compile=False)
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    step(*batch)  # B is no longer 0
    rfa.model.zero_grad()
    one = loss_and_gradients(rfa, batch)[1]
    (8 * rfa.loss(*batch).total).backward()
    for name, gradient in gradients(rfa).items():
        assert torch.allclose(gradient, 8 * one[name], rtol=1e-5), name


def test_a_backward_that_fails_leaves_its_batch_to_nobody():
    model = TinyBlocks(lambda block, x: checkpoint(block, x, use_reentrant=False)).train()
    rfa = rfa_fast.patch(model, ["1.up", "2.up"], rank=2, seed=0)
    batch = torch.randn(6, 5), torch.arange(6) % 3, torch.arange(6) < 2
    expected = loss_and_gradients(rfa, batch)

    def fails(*_):
        raise RuntimeError("out of memory")

    model.train()
    loss = rfa.loss(*batch)
    handle = model[2].up.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.total.backward()
    handle.remove()
    assert all(module.training for module in model.modules())
    del loss
    # A loss of one's own, in train mode, of a batch of another size.
    outputs = torch.randn(4, 5).requires_grad_()
    model(outputs).sum().backward()
    assert outputs.grad is not None
    for p in rfa.parameters():
        p.grad = None
    assert_same(loss_and_gradients(rfa, batch), expected)
