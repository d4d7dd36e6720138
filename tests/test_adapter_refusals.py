"""What `load` and `save` refuse, with the model and the folder left as they were."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rfa_fast
from rfa_fast import adapter_files
from rfa_fast.adapters import save_adapter

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "rfa_config.json"


class Net(nn.Module):
    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(inputs, 4, 3)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 5)


def net(inputs: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(inputs)


def ours(folder: Path, **options: Any) -> Path:
    rfa = rfa_fast.patch(net(), ["conv", "blocks.0", "head"], rank=2, seed=0, **options)
    return rfa.save(folder)


def peft_saved(folder: Path, **settings: Any) -> Path:
    settings = {"r": 2, "target_modules": ["conv", "blocks.0", "head"], **settings}
    peft.get_peft_model(net(), peft.LoraConfig(**settings)).save_pretrained(folder)
    return folder


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
    )


def refuses(folder: Path, error: type[Exception], match: str, model: nn.Module | None = None, **options: Any) -> None:
    model = net() if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match):
        rfa_fast.load(model, folder, **options)
    assert snapshot(model) == before


def test_missing_folder_and_files(tmp_path):
    refuses(tmp_path / "nowhere", FileNotFoundError, "nowhere: got no such folder")
    refuses(tmp_path, FileNotFoundError, r"adapter_config\.json: not found")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", FileNotFoundError, "got a file")
    (ours(tmp_path / "a") / WEIGHTS).unlink()
    refuses(tmp_path / "a", FileNotFoundError, r"adapter_model\.safetensors: not found")


@pytest.mark.parametrize("kept", [0, 5, 60, -1, -400], ids="{} bytes".format)
def test_truncated_tensors(kept, tmp_path):
    path = ours(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refuses(tmp_path, ValueError, "truncated or damaged")


def test_pickles_are_not_read(tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    ours(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).unlink()
    torch.save({"x": Payload()}, tmp_path / "a" / "adapter_model.bin")
    refuses(tmp_path / "a", ValueError, r"adapter_model\.bin: got a pickle, which can run code")
    for legacy in (False, True):
        torch.save({"x": Payload()}, tmp_path / "a" / WEIGHTS, _use_new_zipfile_serialization=not legacy)
        refuses(tmp_path / "a", ValueError, r"adapter_model\.safetensors: got a pickle, which can run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("low", [0x80, 0x50])
def test_safetensors_whose_header_is_as_long_as_a_pickle_begins_are_read(low, tmp_path):
    """The first byte of the file is the low byte of the header's length, a multiple of 8: 0x80 once in 32 files."""
    folder = ours(tmp_path / "a")
    tensors, before = load_file(folder / WEIGHTS), (folder / WEIGHTS).read_bytes()
    for more in range(0, 4096, 8):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "padding": "x" * more})
        if (folder / WEIGHTS).read_bytes()[0] == low:
            break
    assert (folder / WEIGHTS).read_bytes()[0] == low
    assert before != (folder / WEIGHTS).read_bytes()
    (folder / RECORD).unlink()  # it knows the file that was there
    assert rfa_fast.load(net(), folder).layers


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "\xff\xfe"], ids=["cut", "list", "string", "bytes"])
@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_configuration_that_is_no_json_object(name, text, tmp_path):
    (ours(tmp_path) / name).write_bytes(text.encode("latin-1"))
    refuses(tmp_path, ValueError, rf"{name}: got a (file that is not JSON|JSON (list|str))")


def test_names_of_another_model(tmp_path):
    ours(tmp_path)
    model = nn.ModuleDict({"convs": nn.Conv2d(3, 4, 3), "block": nn.Linear(6, 6), "head": nn.Linear(6, 5)})
    refuses(
        tmp_path, ValueError, r"2 of its 3 layers are not in this ModuleDict.*'blocks\.0'.*near misses: block$", model
    )


def test_shapes_of_another_model(tmp_path):
    ours(tmp_path)
    expected = r"layer 'conv': lora_A: got \(2, 3, 3, 3\), expected \(2, 5, 3, 3\)"
    refuses(tmp_path, ValueError, expected, net(inputs=5))
    model = net()
    model.head = nn.Linear(6, 7)
    refuses(tmp_path, ValueError, r"layer 'head': lora_B: got \(5, 2\), expected \(7, 2\)", model)
    model.head = nn.Conv1d(6, 5, 1)
    refuses(tmp_path, ValueError, "layer 'head': got one for a Conv1d, expected Linear, Conv2d or Conv1D", model)


def test_magnitude_of_another_shape(tmp_path):
    peft_saved(tmp_path, use_dora=True)
    key = "base_model.model.conv.lora_magnitude_vector"
    edit_tensors(tmp_path, lambda t: t | {key: t[key].reshape(-1)})
    refuses(tmp_path, ValueError, r"lora_magnitude_vector: got \(4,\), expected \(1, 4, 1, 1\)")


def test_other_weights_of_the_same_shapes(tmp_path):
    ours(tmp_path)
    model = net()
    with torch.no_grad():
        model.blocks[0].weight *= 1.05
    refuses(tmp_path, ValueError, r"trained on other weights: 1 of 3 layers differ, the first 'blocks\.0'", model)
    assert rfa_fast.load(model, tmp_path, check_base=False).names == ("conv", "blocks.0", "head")


def test_an_adapter_that_is_merged_in_already(tmp_path):
    rfa = rfa_fast.patch(net(), ["head"], rank=2)
    with torch.no_grad():
        rfa.layers["head"].lora_b += 0.1
    rfa.save(tmp_path)
    rfa.merge()
    refuses(tmp_path, ValueError, "merged in already", rfa.model)


def test_the_same_base_at_another_precision(tmp_path):
    ours(tmp_path)
    assert rfa_fast.load(net().bfloat16(), tmp_path).names == ("conv", "blocks.0", "head")


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.float16, torch.bfloat16, torch.float32])
def test_the_same_base_in_fp16(tmp_path, saved, loaded):
    """Weights as small as a large model's, of which many are subnormal in fp16."""
    base = net()
    with torch.no_grad():
        base.blocks[0].weight *= 1e-5
    names, options = ["conv", "blocks.0", "head"], {"rank": 2, "seed": 0}
    rfa = rfa_fast.patch(copy.deepcopy(base).to(saved), names, **options)
    rfa.save(tmp_path)
    assert rfa_fast.load(copy.deepcopy(base).to(loaded), tmp_path).names == tuple(names)
    again = rfa_fast.patch(copy.deepcopy(base).to(loaded), names, **options)
    again.save(tmp_path)  # replaces it without being asked twice
    # Half a percent apart, as a fine-tuned model or an adapter that is merged in already may be.
    with torch.no_grad():
        base.head.weight *= 1 + 0.005 * torch.randn(base.head.weight.shape, generator=torch.Generator().manual_seed(1))
    refuses(tmp_path, ValueError, "1 of 3 layers differ, the first 'head'", copy.deepcopy(base).to(saved))


def test_elements_that_were_changed_leave_the_hash_to_decide(tmp_path):
    ours(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    for elements in (None, {}, {"head": 3}, {"head": {"dtype": "float99"}}, {"head": {"dtype": "float32"}}):
        (tmp_path / RECORD).write_text(json.dumps(record | {"base": record["base"] | {"elements": elements}}))
        assert rfa_fast.load(net(), tmp_path).names == ("conv", "blocks.0", "head")
        refuses(tmp_path, ValueError, "trained on other weights", net().half())


def test_a_patched_model(tmp_path):
    ours(tmp_path)
    rfa = rfa_fast.patch(net(), ["blocks.1"], rank=2)
    refuses(tmp_path, ValueError, r"patched already \(layer 'blocks\.1'\)", rfa.model)


def test_a_layer_that_cannot_be_adapted(tmp_path):
    ours(tmp_path)
    model = net()
    model.head.weight = model.blocks[0].weight
    refuses(tmp_path, ValueError, "'blocks.0' cannot be adapted here: its weight is shared with head", model)
    refuses(tmp_path, TypeError, "meta", net().to("meta"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', expected 'LORA'"),
        ({"peft_type": None}, "peft_type: got None"),
        ({"bias": "lora_only"}, "bias: got 'lora_only', expected 'none'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save: got \['head'\]"),
        ({"lora_bias": True}, "got lora_bias=True"),
        ({"layer_replication": [[0, 1]]}, "got layer_replication="),
        ({"something_newer": {"on": 1}}, "got something_newer="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: got 'olora'"),
        ({"r": "2"}, "r: got '2', expected int"),
        ({"r": True}, "r: got True, expected int"),
        ({"r": 3}, r"lora_A: got \(2, 6\), expected \(3, 6\) for a weight \(6, 6\) at rank 3"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8', expected int or float"),
        ({"lora_alpha": -8}, "alpha_pattern"),
        ({"rank_pattern": ["head"]}, "rank_pattern: got .*expected dict"),
        ({"rank_pattern": {"head": "2"}}, "head: got '2', expected int"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern: got '\(', which is no regular expression"),
        ({"target_modules": "("}, r"target_modules: got '\(', which is no regular expression"),
        ({"target_modules": [3]}, "target_modules: got 3, expected a string"),
        ({"target_modules": ["conv", "head"]}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": None}, None),
        ({"target_modules": ["conv", "head", "0", "1"]}, r"asks for 4 layers.*holds 3; missing blocks\.1"),
        ({"use_dora": True}, "got lora_A, lora_B, expected lora_A, lora_B, lora_magnitude_vector"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(change, match, tmp_path):
    peft_saved(tmp_path)
    edit(tmp_path, CONFIG, lambda config: config | change)
    if match is None:
        assert len(rfa_fast.load(net(), tmp_path).names) == 3
    else:
        refuses(tmp_path, ValueError, match)


def test_tensors_left_over_missing_or_not_numbers(tmp_path):
    key = "base_model.model.head.lora_A.weight"
    cases: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
        (lambda t: t | {"base_model.model.head.weight": torch.ones(2)}, r"1 keys left over, first .*\.head\.weight'"),
        (lambda t: t | {"base_model.model.head.lora_B.bias": torch.ones(2)}, "keys left over"),
        (lambda t: {k: v for k, v in t.items() if k != key}, "layer 'head': got lora_B, expected lora_A, lora_B"),
        (lambda t: t | {key: t[key] * float("nan")}, rf"{key}: got NaN or infinity"),
        (lambda t: t | {key: t[key].int()}, rf"{key}: got torch.int32, expected a floating-point tensor"),
        (lambda t: {}, "got no tensors"),
    ]  # fmt: skip
    for change, match in cases:
        shutil.rmtree(tmp_path)
        peft_saved(tmp_path)
        edit_tensors(tmp_path, change)
        refuses(tmp_path, ValueError, match)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_else_peft_can_save(tmp_path):
    refuses(peft_saved(tmp_path / "a", target_modules=["embed"]), ValueError, "adapted embedding.*embed")
    refuses(peft_saved(tmp_path / "b", bias="lora_only"), ValueError, "bias: got 'lora_only'")
    saved = peft_saved(tmp_path / "c", modules_to_save=["head"], target_modules=["conv"])
    refuses(saved, ValueError, "modules_to_save")
    other = peft.IA3Config(target_modules=["head"], feedforward_modules=[])
    peft.get_peft_model(net(), other).save_pretrained(tmp_path / "d")
    refuses(tmp_path / "d", ValueError, "peft_type: got 'IA3'")


def test_dropout_is_said(tmp_path):
    peft_saved(tmp_path, lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout 0\.1 is not applied"):
        rfa_fast.load(net(), tmp_path)


def test_options(tmp_path):
    ours(tmp_path, gamma=0.1)
    refuses(tmp_path, ValueError, "overrides: got alpha, rank, which the saved adapter decides", rank=4, alpha=2)
    refuses(tmp_path, TypeError, "overrides: got colour", colour=1)
    refuses(tmp_path, ValueError, "mode: got 'tutor'", mode="tutor")
    loaded = rfa_fast.load(net(), tmp_path, weights=(1, 2, 3, 4))
    assert (loaded.config.gamma, loaded.config.weights) == (0.1, (1.0, 2.0, 3.0, 4.0))


def test_records_that_were_changed(tmp_path):
    ours(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    for change, match in [
        ({"format": 99}, "format: got 99, expected 1"),
        ({"options": None}, "options: got None"),
        ({"options": record["options"] | {"gamma": 7}}, "gamma: got 7"),
        ({"layers": {"conv": {"rank": 2}}}, "no rank and alpha of 'blocks.0'"),
        ({"base": {}}, "base.weights: got None"),
    ]:
        (tmp_path / RECORD).write_text(json.dumps(record | change))
        refuses(tmp_path, ValueError, match)
    edit(tmp_path, CONFIG, lambda config: config | {"lora_alpha": 3})
    (tmp_path / RECORD).write_text(json.dumps(record))
    refuses(tmp_path, ValueError, r"adapter_config\.json: got another file than rfa_config\.json was written with")
    (tmp_path / RECORD).unlink()
    assert rfa_fast.load(net(), tmp_path).layers["conv"].scale == 1.5


def test_an_adapter_peft_refuses_needs_its_record(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2))
    (rfa_fast.patch(model, ["0"], rank=2).save(tmp_path) / RECORD).unlink()
    refuses(tmp_path, FileNotFoundError, r"rfa_config\.json: not found", nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2)))


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    rfa = rfa_fast.patch(net(), ["head"], rank=2)
    with torch.no_grad():
        rfa.layers["head"].lora_b[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layer 'head': got NaN or infinity"):
        rfa.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_folders_are_replaced(tmp_path):
    rfa = rfa_fast.patch(net(), ["head"], rank=2)
    rfa.save(tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    with torch.no_grad():
        rfa.layers["head"].lora_b += 1
    rfa.save(tmp_path)
    assert (load_file(tmp_path / WEIGHTS)["base_model.model.head.lora_B.weight"] == 1).all()
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, "notes.txt", RECORD]

    held = (tmp_path / WEIGHTS).read_bytes()
    model = net()
    with torch.no_grad():
        model.head.weight += 1
    other = rfa_fast.patch(model, ["head"], rank=2)
    with pytest.raises(FileExistsError, match="an adapter of Net with other layers or other frozen weights"):
        other.save(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == held
    save_adapter(other, tmp_path, overwrite=True)
    assert rfa_fast.load(net(), tmp_path, check_base=False).names == ("head",)

    peft_saved(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="another program wrote"):
        other.save(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="got a file"):
        other.save(tmp_path / "notes.txt")


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_save_is_whole_or_found_out(moved, tmp_path, monkeypatch):
    rfa = rfa_fast.patch(net(), ["head", "conv"], rank=2, seed=0)
    rfa.save(tmp_path)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter += 1
    calls: list[Any] = []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > moved:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(adapter_files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        rfa.save(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, RECORD]
    if moved == 0:
        assert (rfa_fast.load(net(), tmp_path).layers["head"].lora_b == 0).all()
    else:
        refuses(tmp_path, ValueError, "an interrupted save")
    rfa.save(tmp_path)
    assert (rfa_fast.load(net(), tmp_path).layers["head"].lora_b == 1).all()


def test_fused_experts_are_refused_by_peft(tmp_path):
    """PEFT rewrites the targets of a mixture of experts and would put a dense layer's adapter on them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    config = Qwen3MoeConfig(vocab_size=31, num_key_value_heads=2, head_dim=8, **sizes, **experts)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    rfa_fast.patch(model, ["layers.0.mlp.up_proj"], rank=2).save(tmp_path)
    with pytest.raises(KeyError, match=r"rfa_fast\.load"):
        peft.PeftModel.from_pretrained(Qwen3MoeForCausalLM(config), tmp_path)
