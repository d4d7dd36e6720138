"""Adapters of whole models through the file system: exactly our layers in PEFT, wrappers, merged checkpoints."""

from __future__ import annotations

import json
import os

import peft
import pytest
import torch
from adapter_cases import adapted_by_peft, build, linears, outputs, read_by_peft, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import rfa_fast
from rfa_fast.adapters import canonical_names, save_adapter


class Suffixes(nn.Module):
    """`fc` is a suffix of `block.fc`, and `a.fc` of no other; a dot in a name must not match any character."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "xfc": nn.Linear(6, 6)})
        self.block_fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_fc(self.block["xfc"](self.block["fc"](self.fc(x).tanh()).tanh()).tanh())


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=31, num_labels=5, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama(tied: bool = False) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, tie_word_embeddings=tied, **sizes))


VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"adapter": "dora"},
    "pissa": {"adapter": "pissa"},
    "pissa-rslora": {"adapter": "pissa", "rslora": True},
}
MODELS = {"bert": (bert, "all"), "gpt2": (gpt2, "all"), "llama": (llama, "deep")}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_transformers_models_both_ways(model, variant, tmp_path):
    make, placement = model
    tokens = torch.randint(31, (2, 5), generator=torch.Generator().manual_seed(2))
    rfa = train(rfa_fast.patch(build(make), placement, rank=2, **variant))
    expected = outputs(rfa.model, tokens)
    rfa.save(tmp_path / "ours")
    theirs = read_by_peft(build(make), tmp_path / "ours")
    assert set(adapted_by_peft(theirs)) == set(rfa.names)
    torch.testing.assert_close(outputs(theirs, tokens), expected, rtol=1e-5, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    back = rfa_fast.load(build(make), tmp_path / "theirs")
    torch.testing.assert_close(outputs(back.model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_more_layers_than_peft_lists_by_hand(tmp_path):
    """From twenty targets on PEFT shortens the list to suffixes of its own; a ResNet has one missed layer."""
    from torchvision.models import resnet18

    rfa = train(rfa_fast.patch(build(resnet18), "all", rank=2, rank_pattern={"layer1.0.conv1": 3}))
    rfa.save(tmp_path)
    theirs = read_by_peft(build(resnet18), tmp_path)
    assert len(rfa.names) == 20
    assert set(adapted_by_peft(theirs)) == set(rfa.names)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(outputs(theirs, x), outputs(rfa.model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "names", [["fc"], ["block.fc"], ["fc", "block_fc"], ["fc", "block.fc", "block.xfc"]], ids=" ".join
)
def test_exactly_our_layers_when_names_are_suffixes(names, tmp_path):
    def exactly(name: str, module: nn.Module) -> bool:
        return name in names

    ranks = {name: 2 if name == "fc" else 3 for name in names}
    alphas = {name: 2.5 if name == "fc" else 3.0 for name in names}
    rfa = train(rfa_fast.patch(build(Suffixes), exactly, rank_pattern=ranks, alpha_pattern=alphas))
    rfa.save(tmp_path)
    x = torch.randn(3, 6)

    theirs = read_by_peft(build(Suffixes), tmp_path)
    again = rfa_fast.load(build(Suffixes), tmp_path)

    assert adapted_by_peft(theirs) == {name: layer.scale for name, layer in rfa.layers.items()}
    assert set(again.names) == set(names)
    torch.testing.assert_close(outputs(theirs, x), outputs(rfa.model, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(again.model, x), outputs(rfa.model, x))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["fc"]},
        {"target_modules": ["fc"], "exclude_modules": ["block.fc"]},
        {"target_modules": r"block\..*"},
        {"target_modules": r".*fc", "exclude_modules": r"block\.x.*"},
        {"target_modules": ["fc", "xfc"], "rank_pattern": {"fc": 2, "b.*.xfc": 3}, "alpha_pattern": {"^fc": 1}},
        {"target_modules": ["block_fc"], "rank_pattern": {r".*_fc": 5}},
    ],
    ids=["suffix", "exclude", "regex", "exclude-regex", "patterns", "regex-pattern"],
)  # fmt: skip
def test_peft_target_and_pattern_rules(targets, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **targets)
    theirs = peft.get_peft_model(build(Suffixes), config)
    theirs.save_pretrained(tmp_path)
    rfa = rfa_fast.load(build(Suffixes), tmp_path)
    x = torch.randn(3, 6)
    torch.testing.assert_close(outputs(rfa.model, x), outputs(theirs.eval(), x), rtol=1e-5, atol=1e-5)
    assert {name: layer.scale for name, layer in rfa.layers.items()} == adapted_by_peft(theirs)


def test_peft_layers_to_transform(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1], init_lora_weights=False)
    theirs = peft.get_peft_model(build(llama), config)
    theirs.save_pretrained(tmp_path)
    rfa = rfa_fast.load(build(llama), tmp_path)
    assert rfa.names == ("model.layers.1.mlp.up_proj",)


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)), torch.optim.swa_utils.AveragedModel],
    ids=["compile", "DataParallel", "both", "AveragedModel"],
)
def test_wrapped_models_leak_no_prefix(wrap, tmp_path):
    wrapped = train(rfa_fast.patch(wrap(build(linears)), ["0", "2"], rank=2))
    wrapped.save(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sorted(keys) == sorted(f"base_model.model.{n}.lora_{p}.weight" for n in "02" for p in "AB")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0", "2"]

    x = torch.randn(4, 7)
    bare = rfa_fast.load(build(linears), tmp_path)
    theirs = read_by_peft(build(linears), tmp_path)
    torch.testing.assert_close(outputs(theirs, x), outputs(bare.model, x), rtol=1e-5, atol=1e-5)
    again = rfa_fast.load(wrap(build(linears)), tmp_path)
    for rfa in (bare, again):
        plain = canonical_names(rfa.model)
        assert {plain[name] for name in rfa.names} == {"0", "2"}
        for kept, read in zip(wrapped.parameters(), rfa.parameters(), strict=True):
            assert torch.equal(kept, read)


def test_a_compiled_block_inside_a_model(tmp_path):
    model = build(Suffixes)
    model.block["fc"] = torch.compile(model.block["fc"])
    rfa = train(rfa_fast.patch(model, ["fc", "block.fc._orig_mod"], rank=2))
    rfa.save(tmp_path)
    assert set(adapted_by_peft(read_by_peft(build(Suffixes), tmp_path))) == {"fc", "block.fc"}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model."])
def test_leaked_prefixes_of_others_are_read(prefix, tmp_path):
    theirs = peft.get_peft_model(build(linears), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("base_model.model.", f"base_model.model.{prefix}"): tensors[key] for key in tensors}, path)
    rfa = rfa_fast.load(build(linears), tmp_path)
    x = torch.randn(4, 7)
    torch.testing.assert_close(outputs(rfa.model, x), outputs(theirs.eval(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(bert, "all"), (gpt2, "all"), (llama, "all"), (lambda: llama(tied=True), ["lm_head"]), (gpt2, ["lm_head"])],
    ids=["bert", "gpt2", "llama", "llama-tied-head", "gpt2-tied-head"],
)
@pytest.mark.filterwarnings("ignore:lm_head")
def test_merged_model_reloads_in_transformers(make, targets, tmp_path):
    tokens = torch.randint(31, (2, 5), generator=torch.Generator().manual_seed(2))
    model = build(make)
    before = outputs(model, tokens)
    rfa = train(rfa_fast.patch(model, targets, rank=2))
    rfa.merge()
    expected = outputs(model, tokens)
    assert (expected - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, tokens), expected)


def test_rows_by_layer_name_are_kept(tmp_path):
    rfa = rfa_fast.patch(nn.DataParallel(build(linears)), ["0", "2"], rank=2, rows={"module.0": "flat"})
    rfa.save(tmp_path)
    assert rfa_fast.load(build(linears), tmp_path).config.rows == {"0": "flat"}
    assert rfa_fast.load(torch.compile(build(linears)), tmp_path).config.rows == {"_orig_mod.0": "flat"}


def test_a_layer_that_is_the_whole_model(tmp_path):
    def make() -> nn.Module:
        return nn.DataParallel(nn.Linear(7, 5))

    rfa = train(rfa_fast.patch(build(make), ["module"], rank=2))
    rfa.save(tmp_path)
    x = torch.randn(3, 7)
    assert torch.equal(outputs(rfa_fast.load(build(make), tmp_path).model, x), outputs(rfa.model, x))
    with pytest.raises(KeyError, match=r"rfa_fast\.load"):
        peft.PeftModel.from_pretrained(nn.Linear(7, 5), tmp_path)


def test_config_says_what_peft_wants(tmp_path):
    train(rfa_fast.patch(build(gpt2), "all", rank=2)).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", None, "none")
    assert config["fan_in_fan_out"] is True
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors", "rfa_config.json"]


def test_save_needs_a_patched_model(tmp_path):
    rfa = rfa_fast.patch(build(linears), ["0"], rank=2)
    rfa.merge()
    with pytest.raises(ValueError, match="merged or removed"):
        save_adapter(rfa, tmp_path)
    with pytest.raises(ValueError, match="merged or removed"):
        rfa.save(tmp_path)
