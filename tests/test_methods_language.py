"""The methods for language models against their papers' formulas, token by token, and on a transformers model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfa_fast.methods import METHODS, Batch, Method, hash_model

VOCABULARY, WIDTH = 11, 6
LENGTHS = [5, 3, 4, 2, 1]  # the last has no token to predict
FORGET = torch.tensor([True, False, True, False, True])


class Words(nn.Module):
    """An embedding, a layer and a head; predicts the next token, as transformers' causal models say of themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(torch.tanh(self.layer(self.embed(input_ids))))}


def batch(forget: Tensor = FORGET) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.clone()  # padding keeps its labels: the mask takes them out
    labels[0, :2] = -100  # a prompt
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, forget)


def log_probs(model: nn.Module, which: Batch) -> list[list[Tensor]]:
    """log p of every labelled token of every sample, one at a time."""
    found: list[list[Tensor]] = []
    assert isinstance(which.inputs, dict)
    for sample, length in enumerate(LENGTHS):
        ids, labels = which.inputs["input_ids"][sample], which.labels[sample]
        found.append([])
        for t in range(1, length):
            if labels[t] != -100:
                z = model.out(torch.tanh(model.layer(model.embed(ids[t - 1]))))  # type: ignore[operator]
                found[-1].append(z[labels[t]] - z.exp().sum().log())
    return found


def moved(name: str, **options: Any) -> tuple[Method, Words, Words]:
    """A method on a model that has moved, a twin of that model, and one of the original."""
    model, twin, original = (Words().double() for _ in range(3))
    method = METHODS[name](model, seed=3, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            if mine.requires_grad:
                mine += 0.3 * torch.randn(mine.shape, generator=generator, dtype=torch.float64)
                theirs.copy_(mine)
    return method, twin, original


def check(method: Method, twin: nn.Module, expected: Tensor) -> None:
    loss = method.loss(batch())["total"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in method.named_parameters().items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-12, msg=name)
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-8


def retain_ce(found: list[list[Tensor]]) -> Tensor:
    tokens = [token for sample, f in zip(found, FORGET, strict=True) if not f for token in sample]
    return -torch.stack(tokens).mean()


def forgotten(found: list[list[Tensor]]) -> list[list[Tensor]]:
    return [sample for sample, f in zip(found, FORGET, strict=True) if f and sample]


def test_graddiff() -> None:
    method, twin, _ = moved("graddiff", retain_weight=0.5)
    found = log_probs(twin, batch())
    tokens = [token for sample in forgotten(found) for token in sample]
    assert len(tokens) == 3 + 3
    check(method, twin, torch.stack(tokens).mean() + 0.5 * retain_ce(found))


def test_npo() -> None:
    method, twin, original = moved("npo", beta=0.3, retain_weight=0.7, forget_weight=1.5)
    found = log_probs(twin, batch())
    ratios = [
        sum(ours) - sum(theirs).detach()  # type: ignore[union-attr]
        for ours, theirs in zip(forgotten(found), forgotten(log_probs(original, batch())), strict=True)
    ]
    terms = [-torch.log(1 / (1 + torch.exp(0.3 * ratio))) for ratio in ratios]  # −log σ(−β log(π/π_ref))
    assert len(terms) == 2
    check(method, twin, 1.5 * 2 / 0.3 * torch.stack(terms).mean() + 0.7 * retain_ce(found))


def test_npo_starts_at_log_2() -> None:
    method = METHODS["npo"](Words(), seed=0, beta=0.5)
    assert method.loss(batch())["forget_loss"].item() == pytest.approx(2 / 0.5 * math.log(2))


def test_simnpo() -> None:
    method, twin, _ = moved("simnpo", beta=2.5, gamma=0.2)
    found = log_probs(twin, batch())
    means = [torch.stack(sample).mean() for sample in forgotten(found)]
    terms = [-torch.log(1 / (1 + torch.exp(2.5 * (mean + 0.2)))) for mean in means]
    check(method, twin, 0.125 * 2 / 2.5 * torch.stack(terms).mean() + retain_ce(found))


def test_rmu() -> None:
    method, twin, original = moved("rmu", layer=0, steering=2.0, alpha=0.5, targets=["layer"])
    assert list(method.named_parameters()) == ["layer.weight", "layer.bias"]
    inputs = batch().inputs
    assert isinstance(inputs, dict)
    generator = torch.Generator().manual_seed(0)
    first = METHODS["rmu"](Words(), seed=3, layer=0)._aim(torch.zeros(WIDTH))  # type: ignore[attr-defined]
    u = first.double() / first.double().norm()
    assert first.norm() == pytest.approx(6.5)
    assert (u >= 0).all()
    assert not torch.allclose(u, torch.rand(WIDTH, generator=generator, dtype=torch.float64))
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for sample, length in enumerate(LENGTHS):
        hidden = twin.layer(twin.embed(inputs["input_ids"][sample, :length]))
        frozen = original.layer(original.embed(inputs["input_ids"][sample, :length])).detach()
        forget = bool(FORGET[sample])
        aim = method._aim(hidden) if forget else frozen  # type: ignore[attr-defined]
        parts[forget].append(((hidden - aim) ** 2).sum(-1).mean())
    torch.testing.assert_close(method._aim(torch.zeros(WIDTH, dtype=torch.float64)), 2 * u, rtol=1e-6, atol=0)  # type: ignore[attr-defined]
    check(method, twin, torch.stack(parts[True]).mean() + 0.5 * torch.stack(parts[False]).mean())


@pytest.mark.parametrize("name", ["neggrad", "finetune", "scrub", "badt"])
def test_the_other_methods_take_texts(name: str) -> None:
    method, twin, original = moved(name, **({"retain_share": 1.0} if name == "badt" else {}))
    found, before = log_probs(twin, batch()), log_probs(original, batch())
    loss = method.loss(batch())
    if name == "neggrad":
        expected = torch.stack([token for sample in forgotten(found) for token in sample]).mean()
        torch.testing.assert_close(loss["total"], expected)
    elif name == "finetune":
        torch.testing.assert_close(loss["total"], retain_ce(found))
    elif name == "scrub":
        torch.testing.assert_close(loss["retain_task"], retain_ce(found))
    assert sum(map(len, before)) == sum(map(len, found)) == 9
    loss["total"].backward()


def llama(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial weights are so small that nothing depends on anything
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_rmu_trains_three_weights_and_leaves_the_head_out() -> None:
    model = llama()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = METHODS["rmu"](model, seed=0, steering=1.0, alpha=3.0)
    assert method.layers() == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    calls: list[int] = []
    model.model.layers[3].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.1
    losses = method.loss(batch())
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.named_parameters().values())
    assert len(calls) == 2  # the student's forward and the frozen model's

    def hidden() -> Tensor:
        with torch.no_grad():
            return model.model(**batch().inputs, output_hidden_states=True).hidden_states[3]

    mask = batch().inputs["attention_mask"].bool()  # type: ignore[index]
    ours = hidden()
    model.load_state_dict(original)
    square = (ours - hidden()).square().sum(-1)
    expected = torch.stack([square[i][mask[i]].mean() for i in range(5) if not FORGET[i]]).mean()
    torch.testing.assert_close(losses["retain_loss"].detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["npo", "badt", "scrub", "retrain"])
def test_references_and_removal_on_a_transformers_model(name: str, tied: bool) -> None:
    model = llama(tied)
    before, logits = hash_model(model), model(**batch().inputs).logits.detach()
    method = METHODS[name](model, seed=0)
    assert model.config.use_cache is False
    optimizer = torch.optim.AdamW(method.named_parameters().values(), lr=0.05)
    for phase in (0, 1):
        method.begin_epoch(phase, 2)
        method.loss(batch())["total"].backward()
        optimizer.step()
    assert hash_model(model) != before
    if name != "retrain":
        reference = method._reference(batch()).logits  # type: ignore[attr-defined]
        assert torch.equal(reference, logits)
    else:
        embedding = method.named_parameters()["model.embed_tokens.weight"]
        assert embedding.std() < 0.1  # transformers' own 0.02, not the original's 0.2
    method.remove()
    assert hash_model(model) == before
    assert model.config.use_cache is True
    assert torch.equal(model(**batch().inputs).logits, logits)


def test_a_tied_head_is_said_to_be_shared() -> None:
    with pytest.warns(UserWarning, match="shares its weight with model.embed_tokens"):
        method = METHODS["npo"](llama(tied=True), seed=0, targets="head")
    assert list(method.named_parameters()) == ["model.embed_tokens.weight"]
    assert list(METHODS["npo"](llama(), seed=0, targets="head").named_parameters()) == ["lm_head.weight"]
