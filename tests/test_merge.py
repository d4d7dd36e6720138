"""`merge` folds in exactly what the patched model computed; `remove` leaves no trace.

The truth of a merge is the patched model's own output before it, and the sum `W + sBA` written out by
hand; of a restore, the bits of every tensor and every flag before `patch`.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

import rfa_fast

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear-no-bias": (lambda: nn.Linear(13, 3, bias=False), (2, 4, 13)),
    "conv1d": (lambda: Conv1D(7, 5), (2, 3, 5)),
    "conv-stride-padding": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "conv-same-even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 6, 5)),
    "conv-dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=3), (2, 2, 9, 8)),
    "conv-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
    "conv-groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "conv-depthwise": (lambda: nn.Conv2d(3, 6, (2, 3), stride=2, groups=3), (2, 3, 6, 7)),
}
ADAPTERS = [{"adapter": "lora"}, {"adapter": "lora", "rslora": True}, {"adapter": "pissa"}, {"adapter": "dora"}]


def scatter(rfa: rfa_fast.RFA, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that `patch` could leave changed."""
    return {
        "tensors": {name: (id(t), t.dtype, t.detach().clone()) for name, t in model.named_parameters()},
        "buffers": {name: (id(t), t.dtype, t.clone()) for name, t in model.named_buffers()},
        "keys": list(model.state_dict()),
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "parameters": [list(m._parameters) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    }


def assert_same(now: dict[str, Any], before: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    for key in set(before) - set(ignore):
        if key in ("tensors", "buffers"):
            assert list(now[key]) == list(before[key])
            for name, (identity, dtype, bits) in before[key].items():
                assert now[key][name][:2] == (identity, dtype), name
                assert torch.equal(now[key][name][2], bits), name
        else:
            assert now[key] == before[key], key


@pytest.mark.parametrize("options", ADAPTERS, ids=["lora", "rslora", "pissa", "dora"])
@pytest.mark.parametrize("layer", LAYERS)
def test_merge_equals_the_patched_output(layer: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    net = nn.Sequential(OrderedDict(layer=build())).double()
    x = torch.randn(shape, dtype=torch.float64)
    before, original = trace(net), net(x)
    rfa = rfa_fast.patch(net, ["layer"], rank=2, alpha=3, **options)
    scatter(rfa)
    patched = net(x)
    change = rfa.layers["layer"].delta_weight().detach()
    assert rfa.merge() == {"layer": 0.0}  # fp64 weights take the sum without a cast
    torch.testing.assert_close(net(x), patched, rtol=1e-11, atol=1e-11)
    assert bool(((net(x) - original).abs() > 1e-2).any())
    assert torch.equal(net.layer.weight, before["tensors"]["layer.weight"][2] + change)
    assert net.layer.weight.is_contiguous()
    now = trace(net)
    assert_same(now, before, ignore=("tensors",))
    assert [name for name, (identity, _, _) in now["tensors"].items() if identity != before["tensors"][name][0]] == []


@pytest.mark.parametrize("options", [*ADAPTERS, {"mode": "teacher"}])
def test_remove_leaves_no_trace(options: dict[str, Any]) -> None:
    """Frozen parameters, mixed train flags, the user's own hooks, and optimisation steps in between."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 25, 3)
    )
    net[0].bias.requires_grad_(False)
    net[3].eval()
    calls: list[str] = []
    net[0].register_forward_hook(lambda *_: calls.append("hook"))
    net[5].register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    before = trace(net)
    net.eval()
    x = torch.randn(4, 3, 5, 5)
    original = net(x)
    net.train()
    net[3].eval()
    for finish in ("remove", "remove", "merge"):
        rfa = rfa_fast.patch(net, ["0", "5"], rank=2, **options)
        optimizer = torch.optim.AdamW(rfa.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            rfa.loss(x, torch.tensor([0, 1, 2, 0]), torch.tensor([False, True, False, False])).total.backward()
            optimizer.step()
        assert not torch.equal(net(x), original)
        with rfa.disabled():
            assert torch.equal(net(x), original)
        calls.clear()
        rfa.loss(x, torch.tensor([0, 1, 2, 0]), torch.tensor([False, True, False, False]))
        assert calls[:2] == ["hook", "pre-hook"]  # an adapted layer is still the user's module
        getattr(rfa, finish)()
        assert_same(trace(net), before, ignore=() if finish == "remove" else ("tensors",))
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_sums_in_fp32_and_casts_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(33, 17)).to(dtype)
    weight = net[0].weight.detach().clone()
    rfa = rfa_fast.patch(net, ["0"], rank=2, alpha=3)
    scatter(rfa)
    change = 1.5 * (rfa.layers["0"].lora_b @ rfa.layers["0"].lora_a).detach()
    exact = weight.float() + change
    lost = rfa.merge()
    assert net[0].weight.dtype == dtype
    torch.testing.assert_close(net[0].weight, exact.to(dtype), rtol=0, atol=0 if dtype != torch.float32 else 1e-7)
    error = float((exact.to(dtype).float() - exact).norm() / change.norm())
    assert lost["0"] == pytest.approx(error, rel=1e-3, abs=1e-7)


def test_merge_warns_when_rounding_undoes_the_change() -> None:
    torch.manual_seed(0)
    for size, warned in ((2e-2, False), (3e-5, True)):
        net = nn.Sequential(OrderedDict(quiet=nn.Linear(16, 16), loud=nn.Linear(16, 16))).to(torch.bfloat16)
        weight = net.loud.weight.detach().float()
        rfa = rfa_fast.patch(net, ["loud"], rank=2)
        scatter(rfa, size)
        change = rfa.layers["loud"].delta_weight().detach()
        share = float(((weight + change).bfloat16().float() - weight - change).norm() / change.norm())
        assert (share > 0.1) is warned
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            lost = rfa.merge()
        assert lost["loud"] == pytest.approx(share, rel=1e-4)
        assert len(seen) == warned
        if warned:
            assert all(word in str(seen[0].message) for word in ("loud", "bfloat16", f"{share:.0%}", "torch.float32"))
            assert seen[0].filename == __file__


def test_merge_dtype_keeps_the_change() -> None:
    """bf16 in, fp32 out: the whole model, buffers included, and the sum unrounded."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)).to(torch.bfloat16).eval()
    net.register_buffer("counts", torch.arange(3))
    weight, other = net[0].weight.detach().float(), net[3].weight.detach().float()
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    scatter(rfa, 3e-5)
    change = rfa.layers["0"].delta_weight().detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lost = rfa.merge(dtype=torch.float32)
    assert lost["0"] == 0.0
    assert torch.equal(net[0].weight, weight + change)
    assert torch.equal(net[3].weight, other)
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert net.counts.dtype == torch.int64
    assert net(torch.randn(2, 3, 5, 5)).dtype == torch.float32


def test_merge_refuses_nan_and_changes_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    weights = [layer.weight.detach().clone() for layer in net]
    rfa = rfa_fast.patch(net, ["0", "1"], rank=2)
    scatter(rfa)
    with torch.no_grad():
        rfa.layers["1"].lora_a[0, 0] = float("nan")
    before = trace(net)
    del before["tensors"]["1.lora_a"]
    with pytest.raises(FloatingPointError, match=r"layer '1': got NaN or infinity in its adapters, expected finite"):
        rfa.merge()
    now = trace(net)
    del now["tensors"]["1.lora_a"]
    assert_same(now, before)
    rfa.remove()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(net, weights, strict=True))


def test_too_little_memory_for_the_largest_layer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 40), nn.Linear(40, 3))
    rfa = rfa_fast.patch(net, ["0", "1", "2"], rank=2)
    scatter(rfa)
    before = trace(net)
    norm = torch.linalg.vector_norm

    def limited(tensor: Tensor) -> Tensor:
        if tensor.numel() > 150:
            raise torch.OutOfMemoryError("no memory left")
        return norm(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "vector_norm", limited)
        with pytest.raises(torch.OutOfMemoryError):
            rfa.merge()
    assert_same(trace(net), before)
    assert list(rfa.merge()) == ["0", "1", "2"]


def test_merged_model_can_be_patched_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        rfa = rfa_fast.patch(net, ["0"], rank=2)
        scatter(rfa)
        patched = net(x)
        rfa.merge()
        torch.testing.assert_close(net(x), patched, rtol=1e-12, atol=1e-12)
    for use in (rfa.merge, rfa.remove, rfa.report, rfa.parameters, rfa.alignment_loss):
        with pytest.raises(ValueError, match=r"merged or removed; call patch\(\) again"):
            use()
    with pytest.raises(ValueError, match="merged or removed"):
        rfa.loss(x, torch.tensor([0, 1]), torch.tensor([False, True]))
    with pytest.raises(ValueError, match="merged or removed"), rfa.disabled():
        pass


def test_merge_keeps_a_convolution_channels_last() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3)).to(memory_format=torch.channels_last)
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    scatter(rfa)
    rfa.merge()
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def tied() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=31, n_positions=16)).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


@pytest.mark.parametrize("finish", ["merge", "remove"])
def test_tied_head_is_untied_when_named(tied: GPT2LMHeadModel, finish: str) -> None:
    ids = torch.randint(0, 31, (3, 6))
    embeddings, original = tied.transformer.wte.weight.detach().clone(), tied(ids).logits
    before = trace(tied)
    for targets in ("all", "deep"):
        rfa = rfa_fast.patch(tied, targets)
        assert "lm_head" not in rfa.names
        rfa.remove()
        assert tied.config.tie_word_embeddings is True
    with pytest.warns(UserWarning, match=r"lm_head: its weight is tied to transformer.wte.*tie_word_embeddings=False"):
        rfa = rfa_fast.patch(tied, ["lm_head"], rank=2, seed=0)
    assert tied.config.tie_word_embeddings is False
    assert tied.lm_head.weight is not tied.transformer.wte.weight
    assert torch.equal(tied(ids).logits, original)
    scatter(rfa)
    rfa.loss({"input_ids": ids}, ids, torch.tensor([False, True, False])).total.backward()
    assert float(rfa.layers["lm_head"].lora_b.grad.norm()) > 0
    patched = tied(ids).logits
    getattr(rfa, finish)()
    assert torch.equal(tied.transformer.wte.weight, embeddings)
    if finish == "remove":
        assert tied.lm_head.weight is tied.transformer.wte.weight
        assert tied.config.tie_word_embeddings is True
        assert_same(trace(tied), before)
        assert torch.equal(tied(ids).logits, original)
        return
    torch.testing.assert_close(tied(ids).logits, patched, rtol=1e-5, atol=1e-5)
    assert tied.config.tie_word_embeddings is False
    assert not torch.equal(tied.lm_head.weight, embeddings)
    assert tied.lm_head.weight.requires_grad
    tied.tie_weights()  # what from_pretrained calls; the configuration now says no
    assert tied.lm_head.weight is not tied.transformer.wte.weight


SEQUENCES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40,
}  # fmt: skip
SEVERAL_TIES = {
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**SEQUENCES)), "lm_head"),
    "bert": (
        lambda: BertForMaskedLM(
            BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
            )
        ),
        "cls.predictions.decoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEVERAL_TIES)
def test_a_model_with_more_ties_than_the_heads_is_found_again_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, head = SEVERAL_TIES[kind]
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    with pytest.warns(UserWarning, match=f"{head}: its weight is tied.*other ties of the model stay"):
        rfa = rfa_fast.patch(model, [head], rank=2, seed=0)
    scatter(rfa)
    rfa.merge()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 2}
    if kind == "bart":
        inputs["decoder_input_ids"] = torch.arange(8).reshape(2, 4) + 3
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_merge_leaves_the_other_layers_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    other = copy.deepcopy(net)
    rfa = rfa_fast.patch(net, ["1"], rank=2)
    scatter(rfa)
    rfa.merge()
    different = [
        name for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert different == ["1.weight"]


def test_merge_rejects_a_dtype_that_is_none() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    scatter(rfa)
    before = trace(net)
    wrong: list[Any] = [torch.int8, "float32", 32]
    for dtype in wrong:
        with pytest.raises(TypeError, match=r"dtype: got .*, expected a floating-point dtype"):
            rfa.merge(dtype=dtype)
        assert_same(trace(net), before)


def test_merge_keeps_the_parameter_objects() -> None:
    """The user's own optimiser, made before `patch`, still holds the very parameters after `merge`."""
    net = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    scatter(rfa)
    rfa.merge()
    held: list[Tensor] = optimizer.param_groups[0]["params"]
    assert held[0] is net[0].weight
    assert held[0].requires_grad


def test_merge_inside_autocast_sums_in_fp32() -> None:
    def merged(enabled: bool) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 8))
        rfa = rfa_fast.patch(net, ["0"], rank=2, seed=0)
        scatter(rfa)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rfa.merge()
        weight: Tensor = net[0].weight
        return weight

    assert torch.equal(merged(True), merged(False))


@pytest.fixture
def one_process() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("finish", ["merge", "remove"])
@pytest.mark.parametrize("where", ["layer", "block", "root"])
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_a_sharded_layer_is_refused(one_process: Any, where: str, after_a_forward: bool, finish: str) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3))
    rfa = rfa_fast.patch(net, ["0.0"], rank=2, seed=0)
    scatter(rfa)
    parts: dict[str, nn.Module] = {"layer": net[0][0], "block": net[0], "root": net}
    fully_shard(parts[where], mesh=one_process, reshard_after_forward=False)
    before = net(torch.ones(2, 4)).detach() if after_a_forward else None
    with pytest.raises(
        ValueError, match=r"layer '0\.0': got .*not sharded; save the adapters and merge them into a copy"
    ):
        getattr(rfa, finish)()
    assert rfa.report() is not None  # still patched
    if before is not None:
        assert torch.equal(net(torch.ones(2, 4)), before)


def test_a_shard_beside_the_adapted_layers_is_no_obstacle(one_process: Any) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Linear(5, 3))
    rfa = rfa_fast.patch(net, ["1"], rank=2, seed=0)
    scatter(rfa)
    fully_shard(net[0], mesh=one_process)
    patched = net(torch.ones(2, 4)).detach()
    rfa.merge()
    torch.testing.assert_close(net(torch.ones(2, 4)), patched)


def test_patch_refuses_sharded_layers_by_name(one_process: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    fully_shard(net, mesh=one_process)
    classes = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match=r"layer '1': got a DTensor for its weight, .*; patch first, then shard"):
        rfa_fast.patch(net, ["1"], rank=2)
    assert [type(module) for module in net.modules()] == classes
    assert all(p.requires_grad for p in net.parameters())


def without_weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    frozen = layer._buffers.pop("weight")  # what torch makes of a weight that is not trained
    assert frozen is not None
    layer.weight = nn.Parameter(frozen, requires_grad=False)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "parametrized": (
        parametrizations.weight_norm,
        without_weight_norm,
    ),
    "parametrized-bias": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity()),
        lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "bias"),
    ),
}


@pytest.mark.parametrize("finish", ["merge", "remove"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_pruned_or_parametrized_after_patch_is_refused(change: str, finish: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(2, 4)
    rfa = rfa_fast.patch(net, ["0", "2"], rank=2, seed=0)
    scatter(rfa)
    put_on, take_off = CHANGES[change]
    put_on(net[2])
    changed = net(x).detach()
    with pytest.raises(ValueError, match=r"layer '2': got .*take the parametrization or pruning off it first"):
        getattr(rfa, finish)()
    assert torch.equal(net(x), changed)
    take_off(net[2])
    torch.testing.assert_close(net(x), changed)
    getattr(rfa, finish)()
    assert [type(module) for module in net] == [nn.Linear, nn.Tanh, nn.Linear]
    if finish == "merge":
        torch.testing.assert_close(net(x), changed)


@pytest.mark.parametrize("finish", ["merge", "remove"])
def test_requires_grad_comes_back_to_parameters_that_were_assigned(finish: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].bias.requires_grad_(False)
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)
    getattr(rfa, finish)()
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.weight", "0.bias", "2.weight"]


def test_requires_grad_comes_back_to_a_layer_pruned_meanwhile() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    prune.l1_unstructured(net[1], "weight", 0.5)
    rfa.merge()
    assert all(p.requires_grad for p in net.parameters())
