"""What a user can get wrong when patching a model and taking its loss: each a clear error, nothing changed.

Every test goes through `refused`, which compares the model before and after: bits of every tensor,
classes, attributes, `requires_grad`, train flags, and, for a patched model, the state that training
mutates. What only the first step can show is in test_bad_steps.py.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.ao.nn.quantized import dynamic as quantized_dynamic
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import rfa_fast

FORGET = torch.tensor([False, True, False])
LABELS = torch.tensor([0, 1, 2])


def stack(**layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(layers))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return stack(fc1=nn.Linear(4, 6), act=nn.ReLU(), fc2=nn.Linear(6, 6), out=nn.Linear(6, 3))


def trace(model: nn.Module, rfa: rfa_fast.RFA | None) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        real = isinstance(tensor, Tensor) and not isinstance(tensor, nn.parameter.UninitializedParameter)
        known = real and not isinstance(tensor, Wrapped) and tensor.device.type != "meta" and not tensor.is_quantized
        tensors[name] = (type(tensor), tensor.detach().clone() if known else None)
    if rfa is not None:
        tensors |= {f"rfa {name}": (type(t), t.clone()) for name, t in rfa.state_tensors().items()}
    return {
        "tensors": tensors,
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "requires_grad": [(id(p), p.requires_grad) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


@contextmanager
def refused(model: nn.Module, error: type[Exception], *words: str, rfa: rfa_fast.RFA | None = None) -> Iterator[None]:
    """The block raises, says all the words, and leaves the model (and its handle's state) as it was."""
    before = trace(model, rfa)
    with pytest.raises(error) as caught:
        yield
    now = trace(model, rfa)
    for key in before:
        if key == "tensors":
            assert list(now[key]) == list(before[key])
            for name, (kind, value) in before[key].items():
                assert now[key][name][0] is kind, name
                assert value is None or torch.equal(now[key][name][1], value), name
        else:
            assert now[key] == before[key], key
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value!r} does not say {missing}"


def broken(model: nn.Module, layer: str, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(model.get_submodule(layer), name, value)
    return model


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Packed(nn.Linear):
    """As bitsandbytes has it: a Linear that unpacks its weight in a forward of its own."""

    __module__ = "bitsandbytes.nn.modules"

    def forward(self, x: Tensor) -> Tensor:
        return x


class Wrapped(Tensor):
    """As quantisation libraries have it: a tensor that says it is fp32 and holds int8 inside."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Wrapped:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        plain = [a.inner.float() if isinstance(a, Wrapped) else a for a in args]
        return func(*plain, **(kwargs or {}))


class OtherName(nn.Module):
    """Holds a layer's weight under a name of its own, as tied autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.decode_weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.encode(x), self.decode_weight))


def one_module_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return stack(first=layer, second=layer, out=nn.Linear(4, 3))


def shared_weight() -> nn.Module:
    model = stack(first=nn.Linear(4, 4), second=nn.Linear(4, 4), out=nn.Linear(4, 3))
    model.second.weight = model.first.weight
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


def integer(dtype: torch.dtype) -> nn.Module:
    return broken(plain(), "fc1", weight=nn.Parameter(torch.zeros(6, 4, dtype=dtype), requires_grad=False))


def wrapped() -> nn.Module:
    weight = Wrapped(torch.ones(6, 4, dtype=torch.int8))
    return broken(plain(), "fc1", weight=nn.Parameter(weight, requires_grad=False))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return stack(encoder=nn.TransformerEncoder(layer, 2), out=nn.Linear(4, 3))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)


def replaced_forward() -> nn.Module:
    model = plain()
    model.fc1.forward = lambda x: x.repeat(1, 2)[:, :6]  # type: ignore[method-assign]
    return model


def quiet(build: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it is going away
        return build()


PATCH: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], tuple[str, ...]]] = {
    # targets that name nothing
    "regex": (plain, r"fc_\d", {}, ValueError, (r"'fc_\\d'", "fc1, fc2, out", "near misses: fc")),
    "name": (plain, ["fc1", "fc9"], {}, ValueError, ("'fc9'", "fc1, fc2, out", "near misses: fc")),
    "callable": (plain, lambda name, module: False, {}, ValueError, ("lambda", "fc1, fc2, out")),
    "nothing": (plain, [], {}, ValueError, ("targets: got []", "fc1, fc2, out")),
    "not a regex": (plain, "fc(", {}, ValueError, ("'fc('", "'all', 'deep', 'middle', 'shallow'")),
    "number": (plain, 3, {}, TypeError, ("targets: got 3", "expected a string, a list of names or a callable")),
    "numbers": (plain, [0, 1], {}, TypeError, ("targets: got [0, 1]", "expected a string, a list of names")),
    "no layers": (lambda: stack(a=nn.ReLU()), "all", {}, ValueError, ("Sequential", "Linear, Conv2d or Conv1D")),
    # layers that an adapter would train to no effect, or wrongly
    "attention": (vit, ["out_proj"], {}, ValueError, ("self_attention.out_proj", "MultiheadAttention", "functional")),
    "attention regex": (vit, r".*\.out_proj", {}, ValueError, ("out_proj", "MultiheadAttention", "functional")),
    "encoder layer": (transformer, ["linear1"], {}, ValueError, ("layers.0.linear1", "nn.TransformerEncoderLayer")),
    "own forward": (lambda: stack(a=OwnForward(4, 4), out=nn.Linear(4, 3)), ["a"], {}, ValueError,
                    ("'a'", "OwnForward has a forward of its own")),
    "replaced forward": (replaced_forward, ["fc1"], {}, ValueError, ("'fc1'", "forward was replaced")),
    "one module twice": (one_module_twice, ["first"], {}, ValueError, ("'first'", "first, second")),
    "shared weight": (shared_weight, ["second"], {}, ValueError, ("'second'", "shared with first")),
    "shared weight regex": (shared_weight, "first|second", {}, ValueError, ("first|second", "shared with")),
    "shared under another name": (OtherName, ["encode"], {}, ValueError, ("'encode'", "shared", "decode_weight")),
    "weight norm": (lambda: stack(a=parametrizations.weight_norm(nn.Linear(4, 3))), ["a"], {}, ValueError,
                    ("'a'", "parametrisation")),
    "pruned": (lambda: stack(a=prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)), ["a"], {}, ValueError,
               ("'a'", "computed on the fly")),
    # weights that cannot take a sum
    "meta": (on_meta, "all", {}, TypeError, ("layer 'fc1'", "meta", "load the weights first")),
    "lazy linear": (lambda: stack(a=nn.LazyLinear(3)), "all", {}, TypeError, ("layer 'a'", "uninitialised")),
    "lazy convolution": (lambda: stack(a=nn.LazyConv2d(3, 3)), ["a"], {}, TypeError, ("layer 'a'", "uninitialised")),
    "int8": (lambda: integer(torch.int8), "all", {}, TypeError, ("layer 'fc1'", "torch.int8", "floating-point")),
    "int64": (lambda: integer(torch.int64), ["fc1"], {}, TypeError, ("layer 'fc1'", "torch.int64", "floating-point")),
    "float8": (lambda: integer(torch.float8_e4m3fn), ["fc1"], {}, TypeError, ("layer 'fc1'", "torch.float8_e4m3fn")),
    "quantised linear": (lambda: stack(a=quantized.Linear(4, 3)), ["a"], {}, TypeError, ("layer 'a'", "quantised")),
    "quantised dynamic": (lambda: stack(a=quantized_dynamic.Linear(4, 3), out=nn.Linear(3, 3)), "all", {}, TypeError,
                          ("layer 'a'", "quantised")),
    "quantised convolution": (lambda: stack(a=quantized.Conv2d(3, 3, 3), out=nn.Linear(3, 3)), ["a"], {}, TypeError,
                              ("layer 'a'", "quantised")),
    "packed linear": (lambda: stack(a=Packed(4, 4), out=nn.Linear(4, 3)), ["a"], {}, TypeError,
                      ("layer 'a'", "quantised", "Packed")),
    "packed linear everywhere": (lambda: stack(a=Packed(4, 4), out=nn.Linear(4, 3)), "all", {}, TypeError,
                                 ("layer 'a'", "quantised", "Packed")),
    "wrapped tensor": (wrapped, ["fc1"], {}, TypeError, ("layer 'fc1'", "Wrapped", "expected floating-point")),
    # options that do not fit the model
    "rank": (plain, ["fc1"], {"rank": 5}, ValueError, ("rank: got 5", "at most 4", "'fc1'", "(6, 4)")),
    "rank of a convolution": (lambda: stack(a=nn.Conv2d(3, 20, 1)), ["a"], {"rank": 8}, ValueError, ("at most 3",)),
    "rank of a group": (lambda: stack(a=nn.Conv2d(8, 8, 3, groups=4)), ["a"], {"rank": 3}, ValueError, ("at most 2",)),
    "rank of a Conv1D": (lambda: stack(a=Conv1D(4, 20)), ["a"], {"rank": 5}, ValueError, ("got 5", "at most 4")),
    "rank of a named head": (plain, ["out"], {"rank": 4}, ValueError, ("rank: got 4", "at most 3", "'out'")),
    "rank in a pattern": (plain, "all", {"rank_pattern": {"out": 4}}, ValueError, ("got 4", "at most 3")),
    "pattern": (plain, "deep", {"rank_pattern": {"fc9": 4}}, ValueError, ("rank_pattern: got 'fc9'", "out")),
    "alpha pattern": (plain, "deep", {"alpha_pattern": {"fc9": 4}}, ValueError, ("alpha_pattern: got 'fc9'",)),
    "rows": (plain, "deep", {"rows": {"fc9": "flat"}}, ValueError, ("rows: got 'fc9'", "out")),
    "option": (plain, "all", {"rnak": 2}, TypeError, ("rnak", "rank, alpha, mode")),
    "value": (plain, "all", {"mode": "student"}, ValueError, ("mode: got 'student'", "'residual', 'teacher'")),
}  # fmt: skip


@pytest.mark.parametrize("entry", PATCH)
def test_patch_refuses(entry: str) -> None:
    build, targets, options, error, words = PATCH[entry]
    model = quiet(build)
    model.train()
    with refused(model, error, *words):
        rfa_fast.patch(model, targets, **{"rank": 2, **options})


def test_patch_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model: got str, expected a torch\.nn\.Module"):
        rfa_fast.patch("resnet18")  # type: ignore[arg-type]


def test_patch_refuses_a_bare_layer_and_says_why() -> None:
    layer = nn.Linear(4, 4)
    with refused(layer, ValueError, "got a bare Linear", "nn.Sequential"):
        rfa_fast.patch(layer, "all", rank=2)


@pytest.mark.parametrize("whole", [True, False])
def test_patch_refuses_a_patched_model(whole: bool) -> None:
    model = stack(inner=plain(), out=nn.Linear(3, 3))
    rfa = rfa_fast.patch(model if whole else model.inner, ["fc1", "fc2"], rank=2)
    name = "inner.fc1" if whole else "fc1"
    with refused(model, ValueError, "already patched", "fc1 and 1 more", "merge() or remove()", rfa=rfa):
        rfa_fast.patch(model, ["out"], rank=2)
    assert rfa.layers[name].lora_a is model.inner.fc1.lora_a
    rfa.remove()
    rfa_fast.patch(model, ["out"], rank=2).remove()


def test_patch_that_fails_half_way_is_undone() -> None:
    """PiSSA's decomposition of the second layer fails; the first was already adapted."""
    model = plain()
    with torch.no_grad():
        model.fc2.weight.fill_(float("nan"))
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises((FloatingPointError, torch.linalg.LinAlgError)):
        rfa_fast.patch(model, ["fc1", "fc2"], rank=2, adapter="pissa")
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert rfa_fast.patch(model, ["fc1"], rank=2, adapter="pissa").names == ("fc1",)


INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

LOSS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "forget short": ({"forget": FORGET[:2]}, ValueError, ("forget: got 2 flags", "expected 3")),
    "forget long": ({"forget": FORGET.repeat(2)}, ValueError, ("forget: got 6 flags", "expected 3")),
    "forget square": ({"forget": FORGET[:, None]}, ValueError, ("forget: got shape (3, 1)", "expected (B,)")),
    "forget int": ({"forget": FORGET.long()}, TypeError, ("forget: got torch.int64", "expected a bool tensor")),
    "forget float": ({"forget": FORGET.float()}, TypeError, ("forget: got torch.float32", "expected a bool tensor")),
    "forget list": ({"forget": [False, True, False]}, TypeError, ("forget: got list", "expected a bool tensor")),
    "forget None": ({"forget": None}, TypeError, ("forget: got NoneType", "expected a bool tensor")),
    "forget device": ({"forget": FORGET.to("meta")}, ValueError, ("forget: got device meta", "device cpu")),
    "valid short": ({"valid": FORGET[:2]}, ValueError, ("valid: got shape (2,)", "expected (3,)")),
    "valid int": ({"valid": FORGET.long()}, TypeError, ("valid: got torch.int64", "expected a bool tensor")),
    "valid cube": ({"valid": FORGET[:, None, None]}, ValueError, ("valid: got shape (3, 1, 1)", "(3,) or")),
    "valid device": ({"valid": FORGET.to("meta")}, ValueError, ("valid: got device meta", "device cpu")),
    "labels short": ({"labels": LABELS[:2]}, ValueError, ("labels: got shape (2,)", "expected (3,)")),
    "labels float": ({"labels": LABELS.float()}, TypeError, ("labels: got torch.float32", "int64")),
    "labels list": ({"labels": [0, 1, 2]}, TypeError, ("labels: got list", "int64")),
    "labels scalar": ({"labels": torch.tensor(1)}, ValueError, ("labels: got shape ()", "expected (3,)")),
    "labels device": ({"labels": LABELS.to("meta")}, ValueError, ("labels: got device meta", "device cpu")),
    "labels high": ({"labels": torch.tensor([0, 1, 3])}, ValueError, ("labels: got 3", "[0, 3)", "-100")),
    "labels low": ({"labels": torch.tensor([-1, 1, 2])}, ValueError, ("labels: got -1", "[0, 3)", "-100")),
    "labels of tokens": ({"labels": LABELS[:, None]}, ValueError, ("labels: got shape (3, 1)", "logits")),
    "inputs string": ({"inputs": "text"}, TypeError, ("inputs: got str", "a tensor or a dict")),
    "inputs list": ({"inputs": [1.0]}, TypeError, ("inputs: got list", "a tensor or a dict")),
    "inputs scalar": ({"inputs": torch.tensor(1.0)}, ValueError, ("inputs: got shape ()", "batch axis")),
    "inputs empty": ({"inputs": {}}, ValueError, ("inputs: got keys []", "a batch axis")),
    "inputs with labels": ({"inputs": {"input": INPUTS, "labels": LABELS}}, ValueError, ("'labels'", "of their own")),
}


@pytest.mark.parametrize("entry", LOSS)
@pytest.mark.parametrize("mode", ["residual", "teacher"])
def test_loss_refuses(entry: str, mode: str) -> None:
    """A bad batch after a good one: the means of the good one are still there, and the next one works."""
    changed, error, words = LOSS[entry]
    model = plain()
    rfa = rfa_fast.patch(model, ["fc1", "fc2"], rank=2, mode=mode)
    model.train()
    good = {"inputs": INPUTS, "labels": LABELS, "forget": FORGET, "valid": None}
    calm = rfa.loss(**good)  # type: ignore[arg-type]
    other = {**good, "inputs": 2 * INPUTS}
    with refused(model, error, *words, rfa=rfa):
        rfa.loss(**{**other, **changed})  # type: ignore[arg-type]
    assert rfa.loss(**good) == calm  # type: ignore[arg-type]


def test_labels_that_are_not_read_may_be_anything() -> None:
    rfa = rfa_fast.patch(plain(), ["fc1"], rank=2)
    calm = rfa.loss(INPUTS, LABELS, FORGET)
    assert rfa.loss(INPUTS, torch.tensor([0, 999, 2]), FORGET) == calm
    kept = rfa.loss(INPUTS, torch.tensor([0, 1, -100]), FORGET)
    assert kept.align == calm.align
    logits = rfa.model(INPUTS)
    assert kept.retain_task.item() == pytest.approx(F.cross_entropy(logits[:1], LABELS[:1]).item(), rel=1e-6)
    invalid = rfa.loss(INPUTS, torch.tensor([0, 1, 77]), FORGET, valid=torch.tensor([True, True, False]))
    assert invalid.retain_task.item() == pytest.approx(kept.retain_task.item(), rel=1e-6)
