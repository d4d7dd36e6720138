"""A patched model against a plain one that is computed independently, in float64.

The truth never touches the package's mathematics: it is an unpatched copy whose weights are replaced by
`W + sBA` built entry by entry, with forward hooks that capture each layer's input and output, eq. 1-6
written out on what they captured, and gradients by autograd through all of it.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import rfa_fast

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear-sequence-no-bias": (lambda: nn.Linear(13, 3, bias=False), (2, 4, 13)),
    "conv1d": (lambda: Conv1D(7, 5), (2, 3, 5)),
    "conv1d-wide": (lambda: Conv1D(131, 257), (3, 257)),
    "conv-1x1": (lambda: nn.Conv2d(5, 3, 1), (2, 5, 3, 4)),
    "conv-stride-padding": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "conv-rectangular": (lambda: nn.Conv2d(3, 5, (3, 1), stride=(1, 2), padding=(2, 0), bias=False), (2, 3, 5, 7)),
    "conv-dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=3), (2, 2, 9, 8)),
    "conv-same-even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(3, 1)), (2, 3, 6, 5)),
    "conv-valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 5)),
    "conv-groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "conv-depthwise": (lambda: nn.Conv2d(3, 6, (2, 3), stride=2, padding=(1, 0), groups=3), (2, 3, 6, 7)),
    "conv-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 5, 6)),
    "conv-replicate-stride": (lambda: nn.Conv2d(3, 4, 3, 2, 1, padding_mode="replicate"), (2, 3, 5, 6)),
    "conv-circular-same": (lambda: nn.Conv2d(3, 4, (3, 2), padding="same", padding_mode="circular"), (2, 3, 5, 6)),
    "conv-reflect-groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect"), (2, 4, 5, 6)),
}
ADAPTERS = [{"adapter": "lora"}, {"adapter": "lora", "rslora": True}, {"adapter": "pissa"}, {"adapter": "dora"}]
ADAPTER_IDS = ["lora", "rslora", "pissa", "dora"]


def scatter(rfa: rfa_fast.RFA, size: float = 0.3) -> None:
    """Move every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in rfa.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


def low_rank(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """BA with outputs first, one output at a time."""
    rank = b.shape[1]
    rows = []
    for n in range(b.shape[0]):
        group = n // (b.shape[0] // groups)
        own = a[group * rank : (group + 1) * rank]
        rows.append(sum(b[n, r].reshape(()) * own[r] for r in range(rank)))
    return torch.stack(rows)


def effective(plain: nn.Module, layer: nn.Module) -> Tensor:
    """The weight of a plain layer that does what the adapted one should, in the plain layer's layout."""
    transposed = isinstance(plain, Conv1D)
    weight = plain.weight.detach().double()
    weight = weight.t() if transposed else weight
    groups = getattr(plain, "groups", 1)
    change = layer.scale * low_rank(layer.lora_a.double(), layer.lora_b.double(), groups)
    if layer.adapter == "pissa":
        change = change - layer.scale * low_rank(layer.initial_a.double(), layer.initial_b.double(), groups)
    changed = weight + change
    if layer.adapter == "dora":
        norms = torch.stack([row.square().sum().sqrt() for row in changed]).detach()
        changed = changed * (layer.magnitude.double() / norms).reshape(-1, *(1,) * (weight.ndim - 1))
    return changed.t() if transposed else changed


def with_weight(plain: nn.Module, weight: Tensor) -> None:
    """Let a plain layer compute with a tensor that autograd can reach through."""
    del plain._parameters["weight"]
    plain.weight = weight


class Net(nn.Module):
    """Two convolutions with BatchNorm and Dropout between, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(5, 6, 2, padding="same", padding_mode="circular")
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.head(torch.tanh(self.second(x)).mean((2, 3)))


NAMES = ["first", "second", "head"]
FORGET = torch.tensor([False, True, False, False, True])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    built = Net().double()
    with torch.no_grad():
        built.norm.running_mean.normal_()
        built.norm.running_var.uniform_(0.5, 2.0)
    return built.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


LABELS = torch.tensor([3, 0, 1, 0, 2])


def captured(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, and every named layer's input and output, by forward hooks."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[name], outputs[name] = args[0], out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in NAMES]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, inputs, outputs


def truth(
    plain: nn.Module,
    rfa: rfa_fast.RFA,
    x: Tensor,
    forget: Tensor,
    means: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Eq. 1-6 on hooks, with a real second copy of the model for the teacher; and the means it used."""
    config = rfa.config
    student, teacher = copy.deepcopy(plain), copy.deepcopy(plain)
    for name in NAMES:
        with_weight(student.get_submodule(name), effective(plain.get_submodule(name), rfa.layers[name]))
    logits, seen, ys = captured(student, x)
    frozen = captured(teacher, x)[2]
    if config.mode == "residual":
        frozen = {name: plain.get_submodule(name)(seen[name]) for name in NAMES}

    def size(error: Tensor) -> Tensor:
        if config.norm == "mse":
            return error.square().mean()
        return sum(e.square().sum().sqrt() for e in error) / len(error)

    retain, forgotten = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    used = {}
    for name in NAMES:
        used[name] = frozen[name][~forget].mean(0).detach() if means is None else means[name]
        reference = frozen[name] if config.mode == "residual" else frozen[name].detach()
        if not bool(forget.all()):
            retain = retain + size((ys[name] - reference)[~forget])
        if bool(forget.any()):
            forgotten = forgotten + size(ys[name][forget] - used[name])
    soft = logits[~forget].softmax(-1).mean(0).detach() if means is None else means["logits"]
    zero = torch.zeros((), dtype=torch.float64)
    retain_task = zero if bool(forget.all()) else F.cross_entropy(logits[~forget], LABELS[~forget])
    forget_task = -(logits[forget].log_softmax(-1) * soft).sum(-1).mean() if bool(forget.any()) else zero
    alpha, beta, lam, mu = config.weights
    align, task = alpha * retain + beta * forgotten, lam * retain_task + mu * forget_task
    total = config.gamma / len(NAMES) * align + (1 - config.gamma) * task
    return {
        "total": total, "align": align, "task": task, "retain_align": retain, "forget_align": forgotten,
        "retain_task": retain_task, "forget_task": forget_task, **used, "logits": soft,
    }  # fmt: skip


def assert_equal(loss: rfa_fast.RFALoss, expected: dict[str, Tensor]) -> None:
    for name, value in loss._asdict().items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-10, abs=1e-13), name


@pytest.mark.parametrize("options", ADAPTERS, ids=ADAPTER_IDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_adapters_start_at_zero(layer: str, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net = nn.Sequential(OrderedDict(layer=build())).to(dtype)
        x = torch.randn(shape).to(dtype)
        original = net(x)
        rfa = rfa_fast.patch(net, ["layer"], rank=2, **options)
        assert torch.equal(net(x), original)
        assert not rfa.layers["layer"].delta_weight().any()
        assert {p.dtype for p in rfa.parameters() if p.ndim > 1} == {torch.float32}


@pytest.mark.parametrize("options", ADAPTERS, ids=ADAPTER_IDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_output_is_the_dense_computation(layer: str, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    net = nn.Sequential(OrderedDict(layer=build())).double()
    plain = copy.deepcopy(net)
    x = torch.randn(shape, dtype=torch.float64)
    rfa = rfa_fast.patch(net, ["layer"], rank=2, alpha=3, adapter_dtype=torch.float64, **options)
    scatter(rfa)
    adapted = rfa.layers["layer"]
    assert adapted.scale == pytest.approx(3 / 2**0.5 if options.get("rslora") else 1.5, rel=1e-15)
    expected = effective(plain.layer, adapted)
    torch.testing.assert_close(adapted.delta_weight(), expected - plain.layer.weight, rtol=1e-12, atol=1e-12)
    original = plain(x)
    with_weight(plain.layer, expected)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(net(x[0]), plain(x[0]), rtol=1e-11, atol=1e-11)  # alone, as torch takes it
    assert bool(((net(x) - original).abs() > 1e-2).any())


@pytest.mark.parametrize("options", ADAPTERS, ids=ADAPTER_IDS)
@pytest.mark.parametrize("norm", ["mse", "l2"])
@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_loss_and_gradients(
    net: nn.Module, images: Tensor, mode: str, norm: str, backend: str, options: dict[str, str]
) -> None:
    plain = copy.deepcopy(net)
    rfa = rfa_fast.patch(
        net, NAMES, rank=2, alpha=3, mode=mode, norm=norm, gamma=0.3, weights=(1.5, 0.5, 2, 0.7),
        adapter_dtype=torch.float64, backend=backend, **options,
    )  # fmt: skip
    scatter(rfa)
    expected = truth(plain, rfa, images, FORGET)
    wanted = torch.autograd.grad(expected["total"], rfa.parameters())
    loss = rfa.loss(images, LABELS, FORGET)
    assert_equal(loss, expected)
    for name, got, want in zip(
        rfa.named_parameters(), torch.autograd.grad(loss.total, rfa.parameters()), wanted, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    terms = rfa.layer_losses()
    assert list(terms) == NAMES
    assert sum(t.forget.item() for t in terms.values()) == pytest.approx(expected["forget_align"].item(), rel=1e-10)


def test_modes_part_at_the_second_layer(net: nn.Module, images: Tensor) -> None:
    """Of the first adapted layer both modes see the same feature; what it adds reaches only later teachers."""
    terms = {}
    for mode in ("residual", "teacher"):
        rfa = rfa_fast.patch(net, NAMES, rank=2, mode=mode, adapter_dtype=torch.float64, seed=0)
        scatter(rfa)
        rfa.loss(images, LABELS, FORGET)
        terms[mode] = {n: (t.retain.item(), t.forget.item()) for n, t in rfa.layer_losses().items()}
        rfa.remove()
    assert terms["residual"]["first"] == pytest.approx(terms["teacher"]["first"], rel=1e-12)
    for name in ("second", "head"):
        assert terms["residual"][name] != pytest.approx(terms["teacher"][name], rel=1e-3)


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_two_parts_are_the_loss(net: nn.Module, images: Tensor, mode: str) -> None:
    rfa = rfa_fast.patch(net, NAMES, rank=2, mode=mode, gamma=0.3, weights=(1.5, 0.5, 2, 0.7))
    scatter(rfa)
    whole = rfa.loss(images, LABELS, FORGET)
    with rfa.groups(FORGET):
        logits = net(images)
        align = rfa.alignment_loss()
    soft = logits[~FORGET].softmax(-1).mean(0).detach()
    task = 2 * F.cross_entropy(logits[~FORGET], LABELS[~FORGET])
    task = task - 0.7 * (logits[FORGET].log_softmax(-1) * soft).sum(-1).mean()
    assert (align + 0.7 * task).item() == pytest.approx(whole.total.item(), rel=1e-12)
    grads = (torch.autograd.grad(total, rfa.parameters()) for total in (align + 0.7 * task, whole.total))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net(images), logits)  # outside the context a patched layer is plain y


@pytest.mark.parametrize("mode", ["residual", "teacher"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_batch_without_retain_takes_the_last_means(net: nn.Module, images: Tensor, mode: str, norm: str) -> None:
    plain = copy.deepcopy(net)
    rfa = rfa_fast.patch(net, NAMES, rank=2, mode=mode, norm=norm, adapter_dtype=torch.float64)
    scatter(rfa)
    forget = torch.ones(5, dtype=torch.bool)
    with pytest.warns(UserWarning, match="no retain sample and none came before") as caught:
        loss = rfa.loss(images, LABELS, forget)
    assert caught[0].filename == __file__  # the caller's line, however deep it is said
    assert all(value.item() == 0.0 for value in loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert rfa.loss(images, LABELS, forget).total.item() == 0.0
        first = truth(plain, rfa, images.flip(0), FORGET)
        rfa.loss(images.flip(0), LABELS, FORGET)
        scatter(rfa, 0.1)
        for _ in range(2):
            loss = rfa.loss(images, LABELS, forget)
            assert_equal(loss, truth(plain, rfa, images, forget, first))
    assert loss.forget_align.item() > 0
    assert loss.forget_task.item() > 0


@pytest.mark.parametrize("options", [*ADAPTERS, {"norm": "l2"}, {"mode": "teacher"}, {"backend": "reference"}])
@pytest.mark.parametrize("forgotten", [0, 5], ids=["all-retain", "all-forget"])
def test_empty_group_is_an_exact_zero(net: nn.Module, images: Tensor, forgotten: int, options: dict[str, str]) -> None:
    rfa = rfa_fast.patch(net, NAMES, rank=2, **options)
    forget = torch.full((5,), bool(forgotten))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = rfa.loss(images, LABELS, forget)
    loss.total.backward()
    assert loss.forget_align.item() == loss.forget_task.item() == loss.retain_align.item() == 0.0
    assert (loss.retain_task.item() > 0) is not bool(forgotten)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in rfa.parameters())


@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_train_in_between_changes_nothing(net: nn.Module, images: Tensor, mode: str) -> None:
    """BatchNorm must not drift and Dropout must not drop, whatever the user's loop does with train()."""
    rfa = rfa_fast.patch(net, NAMES, rank=2, mode=mode, seed=0)
    scatter(rfa)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers() if "norm" in name}
    calm = rfa.loss(images, LABELS, FORGET)
    net.train()
    with rfa.groups(FORGET):
        net(images)
        assert not any(module.training for module in net.modules())
    assert rfa.loss(images, LABELS, FORGET) == calm
    assert all(module.training for module in net.modules())
    assert len(buffers) == 3
    assert all(torch.equal(buffer, net.get_buffer(name)) for name, buffer in buffers.items())
