"""Which layers `targets` takes, on synthetic models and on small models of families that nobody listed.

Expected names are written out, or enumerated from the published architecture, never from the package.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import peft
import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import rfa_fast
from rfa_fast.targets import kind_of, output_embeddings, repeated_blocks, select, sequence_first


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Attention()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Model(nn.Module):
    """`n` blocks between a stem and a head, with a pooler and an auxiliary layer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(n))
        self.pooler = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def names(model: nn.Module, targets: object) -> list[str]:
    return [target.name for target in select(model, targets).adapted]  # type: ignore[arg-type]


def reasons(model: nn.Module, targets: object) -> dict[str, str]:
    return {skip.name: skip.reason for skip in select(model, targets).skipped}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "deep", "middle", "shallow"),
    [
        (2, [1], [0], [0]),
        (3, [1, 2], [0], [0]),
        (4, [2, 3], [1, 2], [0, 1]),
        (5, [2, 3, 4], [1, 2], [0, 1]),
        (8, [4, 5, 6, 7], [2, 3, 4, 5], [0, 1, 2, 3]),
    ],
)
def test_placements_by_depth(n: int, deep: list[int], middle: list[int], shallow: list[int]) -> None:
    model = Model(n)
    for targets, blocks in {"all": list(range(n)), "deep": deep, "middle": middle, "shallow": shallow}.items():
        expected = [f"blocks.{i}.{end}" for i in blocks for end in ("up", "down")]
        assert names(model, targets) == expected + (["head.2"] if targets in ("all", "deep") else [])
    assert [target.is_head for target in select(model, "all").adapted] == [False] * 2 * n + [True]


def test_every_layer_is_adapted_or_has_a_reason() -> None:
    model = Model(2)
    everything = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for targets in ("all", "deep", "middle", "shallow", r".*up", ["stem"], lambda name, module: name == "stem"):
        assert set(names(model, targets)) | set(reasons(model, targets)) == everything
        assert not set(names(model, targets)) & set(reasons(model, targets))
    why = reasons(model, "shallow")
    assert "outside the repeated blocks" in why["stem"]
    assert "outside the repeated blocks" in why["pooler"]
    assert "attention projection" in why["blocks.0.mixer.query"]
    assert "blocks.1 is not among targets='shallow'" in why["blocks.1.up"]
    assert "classification head belongs to 'all' and 'deep'" in why["head.2"]
    assert reasons(model, ["stem"])["pooler"] == "not matched by targets"


def test_a_plain_stack_has_its_layers_for_blocks() -> None:
    stack = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert repeated_blocks(stack) == ["0", "2", "3", "4"]
    assert names(stack, "all") == ["0", "2", "3", "4"]
    assert names(stack, "deep") == ["3", "4"]
    assert names(stack, "shallow") == ["0", "2"]


def test_selection_by_the_user() -> None:
    model = Model(3)
    assert names(model, r"blocks\.[02]\.up") == ["blocks.0.up", "blocks.2.up"]
    assert "not matched" in reasons(model, r"up|blocks.0.up")["blocks.1.up"]  # fullmatch, not search
    assert names(model, ["down", "stem"]) == ["stem", *(f"blocks.{i}.down" for i in range(3))]  # the model's order
    assert names(model, ["1.down", "blocks.1.down"]) == ["blocks.1.down"]
    assert names(model, ("stem",)) == names(model, {"stem"}) == ["stem"]
    assert names(model, ["mixer.query"]) == [f"blocks.{i}.mixer.query" for i in range(3)]  # named: attention too
    seen: list[tuple[str, nn.Module]] = []

    def wide(name: str, module: nn.Module) -> bool:
        seen.append((name, module))
        return module.out_features == 8

    assert names(model, wide) == [f"blocks.{i}.up" for i in range(3)]
    assert all(model.get_submodule(name) is module for name, module in seen)
    with pytest.raises(ValueError, match=r"'own', which is no layer of this model; its layers are stem, blocks\.0"):
        select(model, ["own"])  # a suffix starts at a dot


def test_nothing_is_changed() -> None:
    model = Model(2)
    before = copy.deepcopy(model)
    for targets in ("all", "middle", ["stem"], r".*"):
        select(model, targets)
    assert repr(model) == repr(before)
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_grouped_convolutions_only_when_named() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict(
            {"expand": nn.Conv2d(4, 8, 1), "depth": nn.Conv2d(8, 8, 3, groups=8), "one": nn.Conv2d(8, 4, 1)}
        )

    class Separable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block()

    model = nn.Sequential(Separable(), Separable())
    assert names(model, "all") == [f"{i}.inner.{end}" for i in (0, 1) for end in ("expand", "one")]
    assert "grouped convolution" in reasons(model, "all")["1.inner.depth"]
    assert names(model, ["depth"]) == ["0.inner.depth", "1.inner.depth"]


def test_subclasses() -> None:
    class Same(nn.Conv2d):
        """Inherits everything: dynamic names, same forward."""

    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    class OtherConvolution(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    layers = OrderedDict(a=nn.Conv2d(4, 4, 1), b=Same(4, 4, 1), c=Padded(4, 4, 2), d=OtherConvolution(4, 4, 1))
    model = nn.Sequential(layers)
    assert names(model, "all") == ["a", "b"]
    assert "Padded has a forward of its own" in reasons(model, "all")["c"]
    assert "OtherConvolution has a forward of its own" in reasons(model, "all")["d"]


def test_layers_behind_functional_calls_are_skipped_with_the_reason() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(OrderedDict(encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(4, 3)))
    assert names(model, "all") == ["head"]
    why = reasons(model, r".*")
    for i in range(2):
        assert "nn.TransformerEncoderLayer" in why[f"encoder.layers.{i}.linear1"]
        assert "nn.TransformerEncoderLayer" in why[f"encoder.layers.{i}.linear2"]
        assert "nn.MultiheadAttention" in why[f"encoder.layers.{i}.self_attn.out_proj"]


def test_kinds() -> None:
    kinds = [(nn.Linear(2, 2), "linear"), (nn.Conv2d(2, 2, 1), "conv2d"), (Conv1D(2, 2), "conv1d")]
    for module, kind in kinds:
        assert kind_of(module) == kind
    for other in (nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Embedding(2, 2)):
        assert kind_of(other) is None


def test_sequence_first_is_what_a_module_around_declares() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 1)
    assert sequence_first(decoder, "layers.0.self_attn.out_proj")
    assert sequence_first(decoder, "layers.0.linear1")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
    assert not sequence_first(encoder, "layers.0.linear1")
    for first in (False, True):
        recurrent = nn.ModuleDict({"rnn": nn.LSTM(4, 4, batch_first=first), "fc": nn.Linear(4, 2)})
        assert sequence_first(recurrent, "fc") is not first
    batched = nn.MultiheadAttention(4, 2, batch_first=True)
    assert not sequence_first(nn.Sequential(batched), "0.out_proj")


def test_mobilenet() -> None:
    """Inverted residuals: every ungrouped convolution of blocks 1 to 17, no depthwise one, and the classifier."""
    model = torchvision.models.mobilenet_v2(weights=None)
    expected = []
    for i in range(1, 18):
        pointwise = [f"features.{i}.conv.1"] if i == 1 else [f"features.{i}.conv.0.0", f"features.{i}.conv.2"]
        expected += pointwise
    assert names(model, "all") == [*expected, "classifier.1"]
    why = reasons(model, "all")
    assert "outside the repeated blocks" in why["features.0.0"]
    assert "grouped convolution" in why["features.5.conv.1.0"]


def test_bottleneck_resnet() -> None:
    """A smaller ResNet-50: the shortcut's convolution is one of the block's."""
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1])
    expected = []
    for stage, count in zip((1, 2, 3, 4), (1, 2, 1, 1), strict=True):
        for j in range(count):
            expected += [f"layer{stage}.{j}.conv{k}" for k in (1, 2, 3)]
            expected += [f"layer{stage}.{j}.downsample.0"] if j == 0 else []
    assert names(model, "all") == [*expected, "fc"]


SMALL = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}


def test_unlisted_families() -> None:
    vit = ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=12, image_size=8, patch_size=4))
    assert names(vit, "all") == [
        *(f"vit.layers.{i}.mlp.{end}" for i in range(4) for end in ("fc1", "fc2")),
        "classifier",
    ]

    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=12, vocab_size=31))
    expected = [f"gpt_neox.layers.{i}.mlp.dense_{end}" for i in range(4) for end in ("h_to_4h", "4h_to_h")]
    assert names(neox, "all") == expected
    assert "language-model head" in reasons(neox, "all")["lm_head"]  # not tied in this family, and left alone as well
    assert neox.lm_head.weight is not neox.gpt_neox.embed_in.weight
    assert names(neox, ["lm_head"]) == ["lm_head"]
    assert select(neox, ["lm_head"]).adapted[0].tied_to is None

    opt = OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=12, vocab_size=31, word_embed_proj_dim=8, max_position_embeddings=16)
    )
    assert names(opt, "deep") == [f"model.decoder.layers.{i}.{end}" for i in (2, 3) for end in ("fc1", "fc2")]
    assert select(opt, ["lm_head"]).adapted[0].tied_to == "model.decoder.embed_tokens"

    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=31))
    expected = [f"encoder.block.{i}.layer.1.DenseReluDense.{end}" for i in range(2) for end in ("wi", "wo")]
    expected += [f"decoder.block.{i}.layer.2.DenseReluDense.{end}" for i in range(2) for end in ("wi", "wo")]
    assert names(t5, "all") == expected

    masked = BertForMaskedLM(BertConfig(**SMALL, intermediate_size=12, vocab_size=31))
    ends = ("intermediate.dense", "output.dense")
    assert names(masked, "all") == [f"bert.encoder.layer.{i}.{end}" for i in range(4) for end in ends]
    assert output_embeddings(masked) is masked.cls.predictions.decoder
    assert "language-model head" in reasons(masked, "all")["cls.predictions.decoder"]


def test_shared_weights_are_found_under_any_name() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
            self.decode = self.encode.weight

    model = Autoencoder()
    assert names(model, "all") == ["out"]
    assert "shared with decode" in reasons(model, "all")["encode"]
    table = nn.Sequential(OrderedDict(table=nn.Embedding(5, 4), project=nn.Linear(4, 5), out=nn.Linear(5, 2)))
    table.project.weight = table.table.weight
    assert names(table, "all") == ["out"]
    assert "shared with table" in reasons(table, "all")["project"]


def test_a_rank_is_fitted_to_what_a_placement_took() -> None:
    """The squeeze of EfficientNet-B0's first block of stage 2 has 4 channels; rank 8 is the default."""
    rfa = rfa_fast.patch(torchvision.models.efficientnet_b0(num_classes=5), "shallow")
    assert rfa.config.rank_of("features.2.0.block.2.fc1") == 4
    assert rfa.config.scale_of("features.2.0.block.2.fc1") == rfa.config.scale_of("features.2.0.block.0.0")
    assert rfa.config.rank_of("features.2.0.block.0.0") == 8

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    assert rfa_fast.patch(net(), "deep").config.rank_of("4") == 2
    with pytest.raises(ValueError, match="rank: got 8, expected at most 4 for layer '0'"):
        rfa_fast.patch(net(), ["0"])
    with pytest.raises(ValueError, match="rank: got 8, expected at most 2 for layer '4'"):
        rfa_fast.patch(net(), "deep", rank_pattern={"4": 8})


def test_the_layers_of_a_peft_adapter_are_left_alone() -> None:
    config = peft.LoraConfig(r=2, target_modules=["up", "head.2"])
    model = peft.get_peft_model(Model(2), config)
    inner = "base_model.model."
    expected = [f"{inner}blocks.{i}.{n}" for i in range(2) for n in ("up.base_layer", "down")]
    assert names(model, "all") == [*expected, f"{inner}head.2.base_layer"]
    assert select(model, "all").adapted[-1].is_head
    assert "another library's adapter" in reasons(model, "all")[f"{inner}blocks.0.up.lora_A.default"]
    with pytest.raises(ValueError, match=r"up\.lora_A\.default', which cannot be adapted: another library's adapter"):
        select(model, ["lora_A.default"])


def test_a_mixtures_experts_in_one_tensor_are_named_among_what_stays() -> None:
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 40,
    }  # fmt: skip
    why = "a mixture's experts in one tensor, which has no place for adapters: they stay as they are"
    shared = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    )
    assert reasons(shared, "all")["model.layers.1.mlp.experts"] == why
    alone = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    with pytest.raises(ValueError, match=rf"matched no layer.*; model\.layers\.0\.mlp\.experts: {why}; "):
        select(alone, "deep")
    named = select(alone, r".*o_proj")
    assert [skip.name for skip in named.skipped if skip.reason == why] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
