"""The handle of a patched model in its surroundings: state dict, copies, compilers, wrappers, precision, tokens."""

from __future__ import annotations

import copy
import gc
import math
import sys
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import rfa_fast

FORGET = torch.tensor([False, True, False, False])
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4), act=nn.Tanh(), flat=nn.Flatten(),
            hidden=nn.Linear(4 * 20, 6), act2=nn.Tanh(), head=nn.Linear(6, 3),
        )
    )  # fmt: skip


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 4, 5, generator=torch.Generator().manual_seed(1))


def scatter(rfa: rfa_fast.RFA, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def test_state_dict_keeps_the_original_keys(net: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2)
    rfa.loss(images, LABELS, FORGET).total.backward()
    state = net.state_dict()
    assert set(state) - set(before) == {f"{n}.lora_{x}" for n in ("conv", "head") for x in "ab"}
    assert [key for key in state if key in before] == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert {n: tuple(p.shape) for n, p in rfa.named_parameters().items()} == {
        "conv.lora_a": (2, 3, 3, 3), "conv.lora_b": (4, 2, 1, 1), "head.lora_a": (2, 6), "head.lora_b": (3, 2),
    }  # fmt: skip
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trainable == list(rfa.named_parameters())
    assert list(map(id, rfa.parameters())) == [id(net.get_parameter(name)) for name in trainable]


def test_grouped_convolution_has_one_a_per_group() -> None:
    net = nn.Sequential(nn.Conv2d(6, 4, (3, 1), groups=2))
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    assert [tuple(p.shape) for p in rfa.parameters()] == [(4, 3, 3, 1), (4, 2, 1, 1)]


def test_adapted_layer_shows_the_frozen_one(net: nn.Module) -> None:
    conv, weight = net.conv, net.conv.weight
    rfa = rfa_fast.patch(net, ["conv"], rank=2, alpha=3)
    assert rfa.layers["conv"] is net.conv is conv
    assert conv.weight is weight
    assert isinstance(conv, nn.Conv2d)
    assert (conv.in_channels, conv.kernel_size, conv.padding) == (3, (3, 3), (1, 1))
    assert (conv.rfa_name, conv.rank, conv.alpha, conv.scale, conv.adapter) == ("conv", 2, 3, 1.5, "lora")


def test_subclass_that_inherits_forward_is_adapted_and_restored() -> None:
    class Marked(nn.Linear):
        mark = "kept"

    net = nn.Sequential(Marked(4, 3))
    x = torch.randn(2, 4)
    original = net(x)
    rfa = rfa_fast.patch(net, ["0"], rank=2)
    assert isinstance(net[0], Marked)
    assert net[0].mark == "kept"
    assert torch.equal(net(x), original)
    rfa.remove()
    assert type(net[0]) is Marked


@pytest.mark.parametrize("after_a_loss", [False, True])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_deepcopy_is_independent(net: nn.Module, images: Tensor, mode: str, after_a_loss: bool) -> None:
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2, mode=mode, seed=0)
    scatter(rfa)
    if after_a_loss:
        rfa.loss(images, LABELS, FORGET)
    twin = copy.deepcopy(rfa)
    assert twin.model is not net
    assert torch.equal(twin.model(images), net(images))
    calm = rfa.loss(images, LABELS, FORGET)
    assert twin.loss(images, LABELS, FORGET) == calm
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert rfa.loss(images, LABELS, FORGET) == calm
    with twin.disabled():
        assert not torch.equal(twin.model(images), net(images))
    alone = copy.deepcopy(net)  # a model without its handle still computes y
    assert torch.equal(alone(images), net(images))
    twin.remove()
    assert type(twin.model.conv) is nn.Conv2d
    assert type(net.conv) is not nn.Conv2d


def test_seed_settles_the_start() -> None:
    """A layer starts the same whichever others are adapted, and torch's own generator is left alone."""
    starts = []
    for targets in (["0"], ["0", "1"], ["0"]):
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
        state = torch.get_rng_state()
        starts.append(rfa_fast.patch(net, targets, rank=2, seed=len(starts) // 2).layers["0"].lora_a.detach().clone())
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    torch.manual_seed(5)
    first = rfa_fast.patch(nn.Sequential(nn.Linear(5, 3)), ["0"], rank=2).layers["0"].lora_a
    second = rfa_fast.patch(nn.Sequential(nn.Linear(5, 3)), ["0"], rank=2).layers["0"].lora_a
    assert not torch.equal(first, second)
    assert float(starts[0].abs().max()) <= 1 / math.sqrt(5)  # Kaiming-uniform with a = √5


def test_patterns_and_small_heads() -> None:
    """A head with fewer outputs than the rank gets the largest rank it can hold, at the same scale."""
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    rfa = rfa_fast.patch(net, "all", rank=8, alpha=32, rank_pattern={"1": 3}, alpha_pattern={"1": 6})
    assert {n: (layer.rank, layer.scale) for n, layer in rfa.layers.items()} == {
        "0": (8, 4.0), "1": (3, 2.0), "2": (2, 4.0),
    }  # fmt: skip
    rows = {row.name: row for row in rfa.report().adapted}
    assert (rows["1"].shape, rows["1"].rank, rows["1"].parameters) == ((16, 16), 3, 96)


def test_report_as_text(net: nn.Module) -> None:
    text = str(rfa_fast.patch(net, ["hidden"], rank=2).report())
    frozen = sum(p.numel() for p in nn.ModuleList([net.conv, net.norm, net.head]).parameters()) + 6 * 80 + 6
    assert text.startswith(f"1 layers adapted, 172 trainable parameters ({100 * 172 / frozen:.2f} % of the model)")
    assert "backend: torch" in text
    hidden, conv = (next(line for line in text.splitlines() if line.startswith(f"  {n} ")) for n in ("hidden", "conv"))
    assert all(word in hidden for word in ("linear", "6×80", "rank 2", "scale 16"))
    assert conv.endswith("not matched by targets")


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_compiled_wrapper(net: nn.Module, images: Tensor, mode: str) -> None:
    """Patch, then wrap: the compiled module gives the same losses, and still does after `remove`."""
    net.eval()
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2, mode=mode, seed=0)
    scatter(rfa)
    expected = rfa.loss(images, LABELS, FORGET)
    wanted = torch.autograd.grad(rfa.config.gamma / 2 * expected.align, rfa.parameters())
    plain = net(images)
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled(images), plain)
    for _ in range(2):
        with rfa.groups(FORGET):
            torch.testing.assert_close(compiled(images), plain)
            align = rfa.alignment_loss()
        assert align.item() == pytest.approx(rfa.config.gamma / 2 * expected.align.item(), rel=1e-6)
        for got, want in zip(torch.autograd.grad(align, rfa.parameters()), wanted, strict=True):
            torch.testing.assert_close(got, want)
    with rfa.disabled():
        disabled = compiled(images)
    rfa.remove()
    torch.testing.assert_close(disabled, net(images))
    torch.testing.assert_close(compiled(images), net(images))


def test_patch_of_a_compiled_module_names_layers_as_the_model_does(net: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(net, backend="eager")
    rfa = rfa_fast.patch(compiled, ["conv", "head"], rank=2, seed=0)
    loss = rfa.loss(images, LABELS, FORGET)
    loss.total.backward()
    assert all(p.grad is not None for p in rfa.parameters())
    rfa.remove()
    assert loss == rfa_fast.patch(net, ["conv", "head"], rank=2, seed=0).loss(images, LABELS, FORGET)


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_distributed_wrapper(net: nn.Module, images: Tensor, mode: str) -> None:
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2, mode=mode, seed=0)
    scatter(rfa)
    expected = rfa.loss(images, LABELS, FORGET)
    wanted = torch.autograd.grad(expected.align * rfa.config.gamma / 2, rfa.parameters())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        wrapped.train()
        with rfa.groups(FORGET):
            logits = wrapped(images)
            align = rfa.alignment_loss()
        (align + 0 * logits.sum()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert align.item() == pytest.approx(expected.align.item() * rfa.config.gamma / 2, rel=1e-6)
    for parameter, want in zip(rfa.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)


@pytest.mark.parametrize("inside", [False, True], ids=["model", "submodule"])
def test_a_distributed_model_of_several_processes_is_refused(net: nn.Module, inside: bool) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        rfa_fast.patch(wrapped, ["head"], rank=2).remove()  # alone there is nothing to average

        class Two:
            def size(self) -> int:
                return 2

        wrapped.process_group = Two()
        with pytest.raises(
            ValueError, match=r"model: got a Distr.* of 2 processes.*inner model.*rfa\.groups\(\.\.\.\)"
        ):
            rfa_fast.patch(nn.Sequential(wrapped) if inside else wrapped, ["head"], rank=2)
    finally:
        torch.distributed.destroy_process_group()
    assert type(net.head) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("adapter", ["lora", "pissa", "dora"])
def test_bf16_base_computes_the_change(adapter: str) -> None:
    """Adapters are fp32 beside bf16 weights; Δ must be as good as bf16 allows, also when it is small.

    PiSSA starts at principal components that are far larger than what training changes: a difference
    of two bf16 products would lose it.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 32)).to(torch.bfloat16)
    x = torch.randn(64, 48).bfloat16()
    rfa = rfa_fast.patch(net, ["0"], rank=4, adapter=adapter)
    scatter(rfa, 1e-4)
    expected = x.double() @ rfa.layers["0"].delta_weight().detach().double().t()
    rfa.loss(x, torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.bool))
    got = rfa.layer_losses()["0"].retain.item()
    assert got == pytest.approx(expected.square().mean().item(), rel=0.03)


def test_autocast_is_close_to_fp32(net: nn.Module, images: Tensor) -> None:
    rfa = rfa_fast.patch(net, ["conv", "hidden", "head"], rank=2, seed=0)
    scatter(rfa)
    exact = rfa.loss(images, LABELS, FORGET)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = rfa.loss(images, LABELS, FORGET)
    assert {value.dtype for value in rough} == {torch.float32}
    for name, value in rough._asdict().items():
        assert value.item() == pytest.approx(getattr(exact, name).item(), rel=0.03), name
    rough.total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in rfa.parameters())


def test_training_lowers_the_loss_and_touches_only_the_adapters(net: nn.Module, images: Tensor) -> None:
    rfa = rfa_fast.patch(net, ["conv", "hidden", "head"], rank=2, seed=0)
    frozen = {n: t.clone() for n, t in net.state_dict().items() if "lora" not in n}
    optimizer = torch.optim.AdamW(rfa.parameters(), lr=3e-3)
    totals = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = rfa.loss(images, LABELS, FORGET)
        loss.total.backward()
        optimizer.step()
        totals.append(loss.total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in frozen.items())


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=8, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("targets", [["gate_proj", "down_proj"], ["down_proj", "lm_head"]], ids=["frozen", "adapted"])
def test_tokens_of_a_causal_model(llama: LlamaForCausalLM, targets: list[str], mode: str, norm: str) -> None:
    """Padding is in no term, a prompt (label −100) is aligned but not scored, a unit is a token."""
    plain = copy.deepcopy(llama)
    rfa = rfa_fast.patch(llama, targets, rank=2, mode=mode, norm=norm, adapter_dtype=torch.float64, seed=0)
    scatter(rfa)
    lengths, forget = torch.tensor([6, 4, 5, 2]), torch.tensor([False, True, False, True])
    ids = torch.randint(0, 29, (4, 6))
    valid = torch.arange(6) < lengths[:, None]
    labels = torch.where(valid, ids, -100)
    labels[0, :3] = -100
    keep = valid.clone()
    keep[2, 4] = False  # the user's own mask, and-ed with the attention mask

    student = copy.deepcopy(plain)
    for name in rfa.names:
        layer = rfa.layers[name]
        weight = student.get_submodule(name).weight
        weight.data = weight.data + layer.scale * layer.lora_b.detach() @ layer.lora_a.detach()

    def features(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name in rfa.names:
            model.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out))
            )
        with torch.no_grad():
            seen["logits"] = (ids, model(input_ids=ids, attention_mask=valid.long()).logits)
        return seen

    of_student, of_teacher = features(student), features(copy.deepcopy(plain))
    kept, gone = keep & ~forget[:, None], keep & forget[:, None]
    sizes: dict[str, list[Tensor]] = {"retain": [], "forget": []}
    for name in rfa.names:
        x, y = of_student[name]
        frozen = of_teacher[name][1] if mode == "teacher" else plain.get_submodule(name)(x).detach()
        for key, error in (("retain", (y - frozen)[kept]), ("forget", y[gone] - frozen[kept].mean(0))):
            sizes[key].append(error.square().mean() if norm == "mse" else error.norm(dim=-1).mean())
    logits, target = of_student["logits"][1][:, :-1], torch.where(keep, labels, -100)[:, 1:]
    scored = (target != -100) & keep[:, :-1]
    mine, theirs = scored & ~forget[:, None], scored & forget[:, None]
    soft = logits[mine].softmax(-1).mean(0)

    loss = rfa.loss({"input_ids": ids, "attention_mask": valid.long()}, labels, forget, valid=keep)
    assert loss.retain_align.item() == pytest.approx(sum(sizes["retain"]).item(), rel=1e-10)
    assert loss.forget_align.item() == pytest.approx(sum(sizes["forget"]).item(), rel=1e-10)
    assert loss.retain_task.item() == pytest.approx(F.cross_entropy(logits[mine], target[mine]).item(), rel=1e-10)
    entropy = -(logits[theirs].log_softmax(-1) * soft).sum(-1).mean()
    assert loss.forget_task.item() == pytest.approx(entropy.item(), rel=1e-10)
    loss.total.backward()
    assert all(float(p.grad.norm()) > 0 for p in rfa.parameters())
    assert "forward" not in llama.lm_head.__dict__


class Mean(nn.Module):
    """A feature per position, and a class from their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


def test_positions_keep_their_own_mean_with_sample_means() -> None:
    """Samples that are sequences: x̃ is T×D, and a position takes its own last mean where a batch has none.

    Masks come and go between batches. A position for which no retain sample was ever valid has nothing
    to align with, and is in neither the sum nor the count.
    """
    torch.manual_seed(0)
    net = Mean().double()
    rfa = rfa_fast.patch(net, ["inner"], rank=2, adapter_dtype=torch.float64)
    scatter(rfa)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    frozen = F.linear(x, net.inner.weight, net.inner.bias)
    y = net.inner(x).detach()
    never, later = torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    never[~FORGET, 4] = False  # no retain sample reaches position 4
    later[0, 3:] = later[1, 4] = False
    means: dict[int, Tensor] = {}
    for mask in (never, later, None, never, None):
        use = torch.ones(4, 5, dtype=torch.bool) if mask is None else mask
        kept, gone = use & ~FORGET[:, None], use & FORGET[:, None]
        means |= {t: frozen[:, t][kept[:, t]].mean(0) for t in range(5) if bool(kept[:, t].any())}
        off = [(y[:, t] - means[t])[gone[:, t]] for t in means]
        loss = rfa.loss(x, LABELS % 2, FORGET, valid=mask)
        assert loss.retain_align.item() == pytest.approx((y - frozen)[kept].square().mean().item(), rel=1e-10)
        assert loss.forget_align.item() == pytest.approx(torch.cat(off).square().mean().item(), rel=1e-10)
    rfa.loss(x, LABELS % 2, FORGET, valid=never)
    all_forget = torch.ones(4, dtype=torch.bool)
    expected = torch.stack([y[:, t] - means[t] for t in range(5)]).square().mean()
    assert rfa.loss(x, LABELS % 2, all_forget).forget_align.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_mean_that_is_not_finite_is_not_aimed_at_by_a_loop_of_ones_own():
    net = nn.Sequential(nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, ["0"], rank=2, seed=0)
    retain, forget = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    for x, flags, expected in (
        (torch.full((2, 4), math.nan), retain, math.nan),
        (torch.ones(2, 4), forget, 0.0),  # nothing to align with yet
    ):
        with rfa.groups(flags):
            net(x)
            assert torch.allclose(rfa.alignment_loss(), torch.tensor(expected), equal_nan=True)


def test_an_error_inside_groups_keeps_nothing_of_the_batch(net: nn.Module, images: Tensor) -> None:
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2, seed=0)
    seen: list[weakref.ref[Tensor]] = []
    net.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))

    def fail() -> None:
        with rfa.groups(FORGET):
            net(images)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    gc.collect()
    assert seen[0]() is None
    assert rfa._context.terms == {}
    with rfa.groups(FORGET):  # the next batch is as any
        net(images)
        assert rfa.alignment_loss().isfinite()


def test_weights_merged_in_inference_mode_can_be_trained(net: nn.Module, images: Tensor) -> None:
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2, seed=0)
    scatter(rfa)
    with torch.inference_mode():
        rfa.merge()
    net(images).sum().backward()
    assert net.conv.weight.grad is not None


def test_the_mean_prediction_goes_where_the_model_is(net: nn.Module, images: Tensor) -> None:
    rfa = rfa_fast.patch(net, ["conv", "head"], rank=2, seed=0)
    assert rfa._context.prediction_on(torch.device("cpu")) is None
    rfa.loss(images, LABELS, FORGET)
    assert rfa._context.prediction_on(torch.device("cpu")) is rfa._context.mean_prediction
    assert rfa._context.prediction_on(torch.device("meta")).device.type == "meta"


class Loud(nn.Linear):
    """A linear layer of one's own."""


def test_a_patched_model_with_a_layer_of_ones_own_is_copied_and_saved_whole() -> None:
    """`torch.save(model)` names classes and functions by module: the layer's own class is in none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), Loud(6, 4))
    rfa = rfa_fast.patch(net, ["0", "1"], rank=2, seed=0)
    scatter(rfa)
    x = torch.randn(3, 5)
    other = copy.deepcopy(net)
    assert [type(layer).__name__ for layer in other] == ["RFALinear", "RFALoud"]
    assert isinstance(other[1], Loud)
    assert torch.equal(other(x), net(x))
    make, arguments, *_ = net[1].__reduce_ex__(2)
    assert getattr(sys.modules[make.__module__], make.__qualname__) is make
    assert arguments == ("linear", Loud)
    assert type(make(*arguments)).__name__ == "RFALoud"
    rfa.remove()
    assert [type(layer) for layer in net] == [nn.Linear, Loud]


def test_adapters_that_somebody_froze_are_not_trained_in_silence() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    rfa = rfa_fast.patch(net, "all", rank=2)
    batch = torch.ones(2, 4), torch.tensor([0, 1]), torch.tensor([False, True])
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="got none that requires a gradient.*belongs before patch"):
        rfa.loss(*batch)
    with torch.no_grad():
        rfa.loss(*batch)  # measured only
    for parameter in rfa.parameters():
        parameter.requires_grad_(True)
    rfa.loss(*batch).total.backward()


@pytest.mark.parametrize("inside_groups", [False, True], ids=["loss", "groups"])
def test_a_look_without_gradient_leaves_what_the_next_batch_aims_at(
    net: nn.Module, images: Tensor, inside_groups: bool
) -> None:
    everything = torch.ones_like(FORGET)

    def run(*, look: bool) -> rfa_fast.RFALoss:
        rfa = rfa_fast.patch(copy.deepcopy(net), ["conv", "head"], rank=2, seed=0)
        scatter(rfa)
        rfa.loss(images, LABELS, FORGET)
        if look:
            with torch.no_grad():
                if inside_groups:
                    with rfa.groups(FORGET):
                        rfa.model(3 * images + 1)
                        rfa.alignment_loss()
                else:
                    rfa.loss(3 * images + 1, LABELS, FORGET)
                assert len(rfa.layer_losses()) == 2
        return rfa.loss(images, LABELS, everything)

    assert run(look=True) == run(look=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_mean_of_another_image_size_is_said_once(images: Tensor, compiled: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layers = (nn.Conv2d(images.shape[1], 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    rfa = rfa_fast.patch(nn.Sequential(*layers), ["0"], rank=2, seed=0)
    scatter(rfa)
    rfa.loss(images, LABELS, FORGET)
    everything, larger = torch.ones_like(FORGET), torch.nn.functional.interpolate(images, scale_factor=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rfa.loss(images, LABELS, everything).forget_align > 0
        rfa.loss(larger, LABELS, FORGET)
        rfa.loss(images, LABELS, FORGET)
        with torch.no_grad():  # a look
            rfa.loss(larger, LABELS, everything)
    if compiled:
        step = rfa_fast.compile_step(rfa, torch.optim.SGD(rfa.parameters(), lr=0.0), backend="aot_eager")
        with pytest.warns(UserWarning, match=r"layer '0': .* of another image size"):
            step(larger, LABELS, everything)
        return
    with pytest.warns(UserWarning, match=r"layer '0': .* of another image size or length, so its forget term is 0"):
        assert rfa.loss(larger, LABELS, everything).forget_align == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rfa.loss(larger, LABELS, everything)
