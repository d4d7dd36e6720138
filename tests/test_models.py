"""Whole models from their real configurations: where the adapters go, and what they do before and after training.

Weights are random (nothing is downloaded); sizes are the published ones, so that a layer that only
exists at full depth, a tied head of 151,936 rows or a grouped key-value projection is really there.
The truth is the unpatched model itself: its own loss, its own outputs, its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.initialization import no_init_weights

import rfa_fast

FORGET = torch.tensor([False, True, False])
LENGTHS = (9, 7, 5)


@dataclass
class Case:
    """A model, a padded batch for it, and the layers that the paper's placement takes."""

    model: nn.Module
    inputs: Tensor | dict[str, Tensor]
    labels: Tensor
    everywhere: list[str]
    deep: list[str]

    def rows(self, chosen: Tensor) -> Tensor | dict[str, Tensor]:
        if isinstance(self.inputs, Tensor):
            return self.inputs[chosen]
        return {key: value[chosen] for key, value in self.inputs.items()}

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Logits of the last sample, whose padding is the longest."""
        last = self.rows(torch.tensor([2]))
        return self.model(last) if isinstance(last, Tensor) else self.model(**last).logits

    @torch.no_grad()
    def own_loss(self) -> float:
        """The loss that the model itself (or torchvision's user) takes on the retain rows."""
        kept, labels = self.rows(~FORGET), self.labels[~FORGET]
        if isinstance(kept, Mapping):
            return float(self.model(**kept, labels=labels).loss)
        return float(F.cross_entropy(self.model(kept), labels))


def fill(model: nn.Module) -> nn.Module:
    """Cheap random weights for a model built without any: normal draws, repeated with a prime period."""
    model.tie_weights()  # as loading would
    noise = torch.randn(999_983, generator=torch.Generator().manual_seed(3)) * 0.02
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            flat = parameter.data.view(-1)
            if parameter.ndim == 1:
                flat.fill_(0.0 if name == "bias" else 1.0)
                continue
            for start in range(0, flat.numel(), len(noise)):
                piece = flat[start : start + len(noise)]
                piece.copy_(noise[: len(piece)])
    return model


def image_case(model: nn.Module, size: int, everywhere: list[str], deep: list[str]) -> Case:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(4))
    return Case(model, images, torch.tensor([7, 999, 0]), everywhere, deep)


def text_case(model: nn.Module, vocabulary: int, everywhere: list[str], deep: list[str]) -> Case:
    """Right-padded rows; a causal model's labels are the ids, −100 on padding and on a two-token prompt."""
    ids = torch.randint(5, vocabulary, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.tensor([1, 0, 1])
    if model.can_generate():
        labels = torch.where(mask.bool(), ids, -100)
        labels[0, :2] = -100
    return Case(model, {"input_ids": ids, "attention_mask": mask}, labels, everywhere, deep)


def resnet18() -> Case:
    stages: dict[int, list[str]] = {}
    for stage in (1, 2, 3, 4):
        stages[stage] = [f"layer{stage}.0.conv1", f"layer{stage}.0.conv2"]
        stages[stage] += [f"layer{stage}.0.downsample.0"] if stage > 1 else []
        stages[stage] += [f"layer{stage}.1.conv1", f"layer{stage}.1.conv2"]
    model = torchvision.models.resnet18(weights=None)
    return image_case(model, 96, [*sum(stages.values(), []), "fc"], [*stages[3], *stages[4], "fc"])


def vit_b_16() -> Case:
    model = torchvision.models.vit_b_16(weights=None)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at 0, where no gradient passes
    blocks = [[f"encoder.layers.encoder_layer_{i}.mlp.{j}" for j in (0, 3)] for i in range(12)]
    return image_case(model, 224, [*sum(blocks, []), "heads.head"], [*sum(blocks[6:], []), "heads.head"])


def distilbert() -> Case:
    with no_init_weights():
        model = DistilBertForSequenceClassification(DistilBertConfig())
    blocks = [[f"distilbert.transformer.layer.{i}.ffn.{name}" for name in ("lin1", "lin2")] for i in range(6)]
    return text_case(fill(model), 30522, [*sum(blocks, []), "classifier"], [*sum(blocks[3:], []), "classifier"])


def bert() -> Case:
    with no_init_weights():
        model = BertForSequenceClassification(BertConfig())
    ends = ("intermediate.dense", "output.dense")
    blocks = [[f"bert.encoder.layer.{i}.{end}" for end in ends] for i in range(12)]
    return text_case(fill(model), 30522, [*sum(blocks, []), "classifier"], [*sum(blocks[6:], []), "classifier"])


def distilgpt2() -> Case:
    with no_init_weights():
        model = GPT2LMHeadModel(GPT2Config(n_layer=6))
    blocks = [[f"transformer.h.{i}.mlp.{name}" for name in ("c_fc", "c_proj")] for i in range(6)]
    return text_case(fill(model), 50257, sum(blocks, []), sum(blocks[3:], []))


def gated(model: nn.Module, layers: int, vocabulary: int) -> Case:
    names = ("gate_proj", "up_proj", "down_proj")
    blocks = [[f"model.layers.{i}.mlp.{name}" for name in names] for i in range(layers)]
    return text_case(fill(model), vocabulary, sum(blocks, []), sum(blocks[layers // 2 :], []))


def smollm2_135m() -> Case:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    with no_init_weights():
        return gated(LlamaForCausalLM(config), 30, 49152)


def qwen2_5_05b() -> Case:
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    with no_init_weights():
        return gated(Qwen2ForCausalLM(config), 24, 151936)


MODELS: dict[str, tuple[Callable[[], Case], int]] = {  # and the published number of parameters
    "resnet18": (resnet18, 11_689_512),
    "vit_b_16": (vit_b_16, 86_567_656),
    "distilbert": (distilbert, 66_955_010),
    "bert": (bert, 109_483_778),
    "distilgpt2": (distilgpt2, 81_912_576),
    "smollm2_135m": (smollm2_135m, 134_515_008),
    "qwen2_5_05b": (qwen2_5_05b, 494_032_768),
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    build, size = MODELS[request.param]
    built = build()
    built.model.eval()
    assert sum(p.numel() for p in built.model.parameters()) == size
    return built


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Enough of a model to notice any change: a checksum of every tensor's bits, classes and flags."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        "tensors": [
            (name, t.data_ptr(), t.dtype, tuple(t.shape), int(t.detach().view(bits[t.itemsize]).sum(dtype=torch.int64)))
            for name, t in model.state_dict().items()
        ],
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
    }


def disturb(rfa: rfa_fast.RFA) -> None:
    """Give every B values, as training would."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in rfa.named_parameters().items():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def test_all_is_the_papers_placement(case: Case) -> None:
    rfa = rfa_fast.patch(case.model, "all")
    try:
        assert list(rfa.names) == case.everywhere
        skipped = {skip.name: skip.reason for skip in rfa.report().skipped}
        adaptable = {
            name for name, m in case.model.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d) or type(m).__name__ in ("Conv1D", "RFAConv1D")
        }  # fmt: skip
        assert set(skipped) | set(rfa.names) == adaptable
        assert not set(skipped) & set(rfa.names)
        assert all(skipped.values())
        if "lm_head" in adaptable:
            assert "language-model head" in skipped["lm_head"]
            assert case.model.lm_head.weight is case.model.get_input_embeddings().weight
    finally:
        rfa.remove()


def test_deep_is_the_last_half_of_the_blocks(case: Case) -> None:
    rfa = rfa_fast.patch(case.model, "deep")
    try:
        assert list(rfa.names) == case.deep
    finally:
        rfa.remove()


def test_loss_before_training(case: Case) -> None:
    """At B = 0 the task term is the model's own loss, nothing is off on retain, and every B has a gradient."""
    own = case.own_loss()
    rfa = rfa_fast.patch(case.model, "all", seed=0)
    try:
        loss = rfa.loss(case.inputs, case.labels, FORGET)
        assert loss.retain_task.item() == pytest.approx(own, rel=2e-5)
        assert loss.retain_align.item() == 0.0
        assert loss.forget_align.item() > 0.0
        loss.total.backward()
        dead = [n for n in rfa.names if not float(rfa.layers[n].lora_b.grad.norm()) > 0.0]
        assert dead == []
        assert all(bool(torch.isfinite(p.grad).all()) for p in rfa.parameters())
        # dA = Uᵀx with U = s·G'B: exactly 0 while B is.
        assert all(not layer.lora_a.grad.any() for layer in rfa.layers.values())
        trained = {id(p) for p in rfa.parameters()}
        assert all(p.grad is None for p in case.model.parameters() if id(p) not in trained)
    finally:
        rfa.remove()


def test_disabled_and_remove_are_bit_exact(case: Case) -> None:
    case.model.train()
    next(case.model.parameters()).requires_grad_(False)
    before, flags = fingerprint(case.model), {n: m.training for n, m in case.model.named_modules()}
    try:
        case.model.eval()
        original = case.outputs()
        for name, module in case.model.named_modules():
            module.training = flags[name]
        rfa = rfa_fast.patch(case.model, "deep", seed=0)
        disturb(rfa)
        assert not torch.equal(case.outputs(), original)
        with rfa.disabled():
            assert torch.equal(case.outputs(), original)
        rfa.remove()
        assert fingerprint(case.model) == before
        case.model.eval()
        assert torch.equal(case.outputs(), original)
    finally:
        case.model.eval()
        next(case.model.parameters()).requires_grad_(True)


def test_merge_equals_the_patched_model(case: Case) -> None:
    """Last, because it writes into the weights that the tests above share."""
    if case.everywhere[0].startswith("layer1"):
        case.model.double()
        case.inputs = case.inputs.double()
    tolerance = 1e-11 if next(case.model.parameters()).dtype == torch.float64 else 1e-4
    classes = [type(module) for module in case.model.modules()]
    keys = list(case.model.state_dict())
    original = case.outputs()
    rfa = rfa_fast.patch(case.model, "all", seed=0)
    disturb(rfa)
    patched = case.outputs()
    lost = rfa.merge()
    merged = case.outputs()
    size = float((patched - original).abs().max())
    assert size > 1e-3
    assert float((merged - patched).abs().max()) <= tolerance * max(size, float(patched.abs().max()))
    assert [type(module) for module in case.model.modules()] == classes
    assert list(case.model.state_dict()) == keys
    assert list(lost) == case.everywhere
    assert max(lost.values()) < 1e-4
