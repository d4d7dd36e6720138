"""The kernels of the convolution, one by one, in Triton's interpreter against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import close, codes, drawn, drawn_dtypes, few_programs, launches, normal, poisoned
from rfa_fast.kernels.conv2d_epilogue import conv2d_epilogue
from rfa_fast.kernels.conv2d_forward import conv2d_down, conv2d_forward, conv2d_plain
from rfa_fast.kernels.conv2d_geometry import (
    channels_last,
    convolution,
    geometry,
    input_gradient,
    joint_weight,
    memory_format,
    resolve_padding,
    weight_gradient,
)
from rfa_fast.kernels.conv2d_gradient import conv2d_gradient
from rfa_fast.kernels.conv2d_input_gradient import conv2d_input_gradient
from rfa_fast.kernels.conv2d_lora_a_gradient import conv2d_lora_a_gradient
from rfa_fast.kernels.conv2d_retain import conv2d_retain_energy, conv2d_retain_gradient, gram_matrices
from rfa_fast.kernels.conv2d_sample_mean import conv2d_sample_mean
from rfa_fast.kernels.feature_mean import feature_mean
from rfa_fast.kernels.tuning import Config
from torch.nn import functional as F

__all__ = ["few_programs", "poisoned"]

pytestmark = pytest.mark.usefixtures("poisoned", "few_programs")

# Small tiles, so that drawn shapes have several of them and a ragged last one.
TILE = Config(16, 16, 16, warps=4, stages=2, group_m=2)


cases = st.fixed_dictionaries(
    {
        "b": st.integers(1, 4), "c": st.integers(1, 20), "n": st.integers(1, 20),
        "groups": st.sampled_from([1, 1, 2, 3]),
        "spare": st.tuples(st.integers(0, 4), st.integers(0, 4)),
        "kernel": st.sampled_from([(1, 1), (3, 3), (2, 4), (3, 1), (1, 2)]),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 3), st.integers(1, 2)),
        "padding": st.sampled_from([0, (2, 1), "same"]), "rank": st.sampled_from([1, 3, 8, 20, 70]),
        "layout": st.sampled_from(["nchw", "channels-last", "sliced"]), "dtype": drawn_dtypes,
        "seed": st.integers(0, 999), "bias": st.booleans(),
    }
)  # fmt: skip


class Layer:
    """The tensors of a drawn case."""

    def __init__(self, case):
        self.groups, self.seed, self.dtype, self.rank = (case[k] for k in ("groups", "seed", "dtype", "rank"))
        inputs, outputs = case["c"] * self.groups, case["n"] * self.groups
        stride = (1, 1) if case["padding"] == "same" else case["stride"]
        padding = resolve_padding(case["padding"], case["kernel"], stride, case["dilation"])
        size = []
        for axis in (0, 1):
            window = case["dilation"][axis] * (case["kernel"][axis] - 1) + 1
            size.append(max(1, window - padding[axis] - padding[axis + 2]) + case["spare"][axis])
        self.x = laid_out(self.make(case["b"], inputs, *size), case["layout"])
        self.weight = self.make(outputs, case["c"], *case["kernel"])
        self.a = self.make(self.groups * self.rank, case["c"], *case["kernel"]).float()
        self.b = self.make(outputs, self.rank, 1, 1).float()
        self.bias = self.make(outputs) if case["bias"] else None
        self.where = geometry(self.x, self.weight, stride, padding, case["dilation"], self.groups)
        self.shape = (case["b"], outputs, self.where.out_height, self.where.out_width)
        self.layout = memory_format(self.x)
        self.group = codes(case["b"], self.seed)
        self.goal = normal(*self.shape[1:], seed=self.seed + 50).expand(self.shape)
        self.kept = self.make(*self.shape)

    def make(self, *shape):
        self.seed += 1
        return normal(*shape, seed=self.seed, dtype=self.dtype)

    @property
    def shown_bias(self):
        return torch.zeros(self.shape[1], dtype=self.dtype) if self.bias is None else self.bias

    def product(self, x, weight):
        return convolution(x, weight, self.where)

    def rows(self, image):
        return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])

    def image(self, rows):
        return rows.reshape(self.shape[0], *self.shape[2:], -1).permute(0, 3, 1, 2)

    def grouped(self, image):
        return image.view(self.shape[0], self.groups, -1, *self.shape[2:])

    def lift(self, hidden, b):
        return 0.5 * F.conv2d(hidden, b, groups=self.groups)

    def output(self, x, weight, hidden, b, bias):
        return self.product(x, weight) + bias[:, None, None] + self.lift(hidden, b)


def laid_out(x, layout):
    if layout == "sliced":
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 1), float("nan"), dtype=x.dtype)
        wide[:, 1:, 1:-1, :-1] = x
        return wide[:, 1:, 1:-1, :-1]
    return x.contiguous(memory_format=torch.channels_last if layout == "channels-last" else torch.contiguous_format)


def sample_errors(exact, aim, group, code):
    off = torch.where((group == code)[:, None, None, None], exact - aim.double(), 0)
    return off.square().sum((1, 2, 3))


def near(ours, truth, layer, size):
    eps = 4 * torch.finfo(layer.dtype).eps
    assert torch.allclose(ours.double(), truth, rtol=eps, atol=eps * size)


def check_forward(case):
    layer = Layer(case)
    fused = layer.rank <= 64 and layer.seed % 2 == 0
    hidden = None if fused else conv2d_down(layer.x, layer.a, where=layer.where, config=TILE)
    out = conv2d_forward(
        layer.x, layer.weight, layer.bias, layer.a, layer.b, hidden, where=layer.where, scale=0.5, group=layer.group,
        goal=layer.goal if layer.seed % 3 else None, kept=layer.kept if layer.seed % 5 else None, config=TILE,
    )  # fmt: skip
    image = layer.image(out.hidden)
    close(image, layer.product, layer.x, layer.a, dtype=layer.dtype)
    operands = (layer.x, layer.weight, image, layer.b, layer.shown_bias)
    close(out.output, layer.output, *operands, dtype=layer.dtype)
    assert out.output.is_contiguous(memory_format=layer.layout)
    exact = layer.output(*(t.double() for t in operands))
    size = float(exact.abs().max() + 4) ** 2 * exact[0].numel()
    for errors, aim, code in ((out.forget_samples, layer.goal, 1), (out.retain_samples, layer.kept, 0)):
        if errors is not None:
            near(errors, sample_errors(exact, aim, layer.group, code), layer, size)


def check_mean(case):
    """x̃ to the precision of fp32, whatever the layer's dtype: a 16-bit product takes the mean in two parts."""
    layer = Layer(case)
    mean = conv2d_sample_mean(layer.x, layer.group, config=Config(2, 16, 0, warps=4, stages=1))
    found = conv2d_plain(mean, layer.weight, layer.bias, where=layer.where, dtype=torch.float32, config=TILE)
    kept = layer.x[layer.group == 0].double()
    truth = kept.mean(0) if len(kept) else torch.zeros_like(layer.x[0]).double()
    assert torch.allclose(mean[0].double(), truth, rtol=1e-6, atol=1e-6)
    frozen = layer.product(truth[None], layer.weight.double()) + layer.shown_bias.double()[:, None, None]
    assert torch.allclose(found.double(), frozen, rtol=1e-4, atol=1e-5 * float(frozen.abs().max() + 1) * 10)
    assert found.is_contiguous(memory_format=layer.layout)


def check_epilogue(case):
    layer = Layer(case)
    each, samples = layer.shape[1] // layer.groups, layer.shape[0]
    joint = layer.product(layer.x, joint_weight(layer.weight, layer.a, layer.groups, layer.layout))
    both = layer.grouped(joint.contiguous(memory_format=layer.layout))
    image, down = both[:, :, :each], both[:, :, each : each + layer.rank]
    output = torch.empty(layer.shape, dtype=layer.dtype, memory_format=layer.layout)
    inside = layer.seed % 2 == 0
    done = conv2d_epilogue(
        image, down, output, layer.b, layer.bias, scale=0.5, group=layer.group, goal=None if inside else layer.goal,
        kept=layer.kept if layer.seed % 3 else None, columns=inside, copy_hidden=True,
        config=replace(TILE, block_k=2, group_m=2),
    )  # fmt: skip
    frozen, hidden = (t.reshape(samples, -1, *layer.shape[2:]) for t in (image, down))
    assert torch.equal(done.hidden, layer.rows(hidden))
    shift = layer.shown_bias[:, None, None]
    close(output, lambda f, h, b, s: f + s + layer.lift(h, b), frozen, hidden, layer.b, shift, dtype=layer.dtype)
    exact = frozen.double() + shift.double() + layer.lift(hidden.double(), layer.b.double())
    size = float(exact.abs().max() + 4) ** 2 * exact[0].numel()
    for errors, aim, code in ((done.forget_samples, layer.goal, 1), (done.retain_samples, layer.kept, 0)):
        if errors is not None:
            near(errors, sample_errors(exact, aim, layer.group, code), layer, size)
    if inside:
        flat, loss = feature_mean(done.columns, done.counts, with_loss=True, config=TILE)
        kept = (frozen.double() + shift.double())[layer.group == 0]
        truth = kept.mean(0) if len(kept) else torch.zeros(layer.shape[1:]).double()
        order = truth.permute(1, 2, 0) if channels_last(output) else truth
        assert torch.allclose(flat.double(), order.reshape(-1), rtol=1e-5, atol=1e-5)
        forget = sample_errors(exact, truth, layer.group, 1).sum() if len(kept) else torch.zeros(())
        near(loss.sum(), forget.double(), layer, size * samples)


def check_gradient(case):
    layer = Layer(case)
    grad = laid_out(layer.make(*layer.shape), case["layout"])
    output = layer.make(*layer.shape).contiguous(memory_format=layer.layout)
    hidden = layer.make(layer.shape[0] * layer.where.pixels, layer.groups * layer.rank)
    forget = normal(layer.shape[0], seed=1).abs() * (layer.group == 1)
    retain = normal(layer.shape[0], seed=2).abs() * (layer.group == 0)
    aimed, taught = layer.seed % 4 != 1, layer.seed % 3 == 0
    changed = torch.empty_like(output) if layer.seed % 5 else None
    out = conv2d_gradient(
        grad, output, hidden, layer.b, None if changed is None else layer.grouped(changed), groups=layer.groups,
        scale=0.5, group=layer.group, goal=layer.goal if aimed else None, forget_weight=forget if aimed else None,
        kept=layer.kept if taught else None, retain_weight=retain if taught else None, config=TILE,
    )  # fmt: skip
    total = grad.double()
    for asked, weight, aim in ((aimed, forget, layer.goal), (taught, retain, layer.kept)):
        if asked:
            total = total + weight.double()[:, None, None, None] * (output.double() - aim.double())
    size = float(total.abs().max())
    if changed is not None:
        near(changed, total, layer, size)
    wide = total.reshape(layer.shape[0], layer.groups, -1, layer.where.pixels)
    b = layer.b.double().reshape(layer.groups, -1, layer.rank)
    h = hidden.double().reshape(layer.shape[0], -1, layer.groups, layer.rank)
    up = 0.5 * torch.einsum("bgnp,gnr->bpgr", wide, b)
    near(out.up.sum(0), up.reshape(hidden.shape), layer, size * float(b.abs().max()) * b.shape[1])
    down = 0.5 * torch.einsum("bgnp,bpgr->gnr", wide, h)
    near(out.lora_b, down.reshape(-1, layer.rank), layer, size * float(h.abs().max()) * h.shape[0] * h.shape[1])


def check_retain(case):
    layer = Layer(case)
    hidden = layer.make(layer.shape[0] * layer.where.pixels, layer.groups * layer.rank)
    gram = gram_matrices(layer.b, layer.groups, 0.5)
    energy = conv2d_retain_energy(hidden, gram, layer.group, pixels=layer.where.pixels, config=TILE)
    delta = layer.lift(layer.image(hidden.double()), layer.b.double())
    truth = sample_errors(delta, torch.zeros(()), layer.group, 0)
    assert torch.allclose(energy.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.max() + 1))
    parts = normal(layer.seed % 3 + 1, *hidden.shape, seed=3)
    weight = normal(layer.shape[0], seed=2).abs() * (layer.group == 0) if layer.seed % 4 else None
    up = torch.empty((layer.shape[0], layer.groups * layer.rank, *layer.shape[2:]), memory_format=layer.layout)
    seen = conv2d_retain_gradient(parts, hidden, layer.grouped(up), gram, weight, config=TILE)
    h = hidden.double().reshape(layer.shape[0], -1, layer.groups, layer.rank)
    total = parts.double().sum(0).reshape(h.shape)
    if weight is not None:
        weighted = weight.double()[:, None, None, None] * h
        total = total + torch.einsum("bpgr,grs->bpgs", weighted, gram.double())
        truth = torch.einsum("bpgr,bpgs->grs", h, weighted)
        assert torch.allclose(seen.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max() + 1))
    assert (seen is None) == (weight is None)
    size = float(total.abs().max() + 1)
    assert torch.allclose(layer.rows(up).double(), total.reshape(hidden.shape), rtol=1e-5, atol=1e-5 * size)


def check_input_gradient(case):
    layer = Layer(case)
    grad = laid_out(layer.make(*layer.shape), case["layout"])
    up = layer.make(layer.shape[0], layer.groups * layer.rank, *layer.shape[2:])
    out = conv2d_input_gradient(
        grad, layer.weight, layer.grouped(up), layer.a, where=layer.where, memory_format=layer.layout, config=TILE
    )

    def formula(grad, weight, up, a):
        return input_gradient(grad, weight, layer.where) + input_gradient(up, a, layer.where)

    close(out, formula, grad, layer.weight, up, layer.a, dtype=layer.dtype)
    assert out.is_contiguous(memory_format=layer.layout)


def check_lora_a_gradient(case):
    layer = Layer(case)
    up = layer.make(layer.shape[0], layer.groups * layer.rank, *layer.shape[2:]).contiguous(memory_format=layer.layout)
    out = conv2d_lora_a_gradient(layer.grouped(up), layer.x, where=layer.where, config=TILE)
    shape = layer.a.shape[0]
    close(out, lambda up, x: weight_gradient(up, x, shape, layer.where), up, layer.x, dtype=layer.dtype)


CHECKS = [
    check_forward, check_mean, check_epilogue, check_gradient, check_retain, check_input_gradient,
    check_lora_a_gradient,
]  # fmt: skip
BASE = {
    "b": 3, "c": 5, "n": 7, "groups": 1, "spare": (3, 2), "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1),
    "padding": (1, 1), "rank": 3, "layout": "channels-last", "dtype": torch.float32, "bias": True,
}  # fmt: skip
EXPLICIT = {
    "one-pixel-of-one-sample": {"b": 1, "c": 1, "n": 1, "spare": (0, 0), "kernel": (1, 1), "padding": 0, "rank": 1},
    # A single output channel: y's image has no stride but 1, while x' lies beside h.
    "one-output-channel": {"b": 2, "c": 2, "n": 1, "spare": (0, 1), "kernel": (1, 1), "padding": 0, "rank": 1},
    "depthwise-bf16": {"groups": 4, "c": 1, "n": 1, "dtype": torch.bfloat16, "layout": "nchw"},
    "same-even-kernel": {"padding": "same", "kernel": (2, 4), "rank": 8},
    "stride-beyond-the-kernel": {"stride": (3, 2), "kernel": (2, 1), "padding": 0, "layout": "sliced"},
    "stride-and-dilation-share-a-factor": {"stride": (2, 3), "dilation": (2, 3), "padding": (2, 3)},
    "pointwise-fp16": {"kernel": (1, 1), "padding": 0, "stride": (2, 2), "dtype": torch.float16, "rank": 8},
    "rank-64": {"rank": 64, "n": 18, "c": 17},
    "rank-70-by-groups": {"rank": 70, "groups": 2},
}


def name(check):
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("layer", list(EXPLICIT))
@pytest.mark.parametrize("check", CHECKS, ids=name)
def test_explicit_layers(check, layer):
    check(BASE | {"seed": 6 + 5 * (list(EXPLICIT).index(layer) % 2)} | EXPLICIT[layer])


@pytest.mark.parametrize("check", CHECKS, ids=name)
@drawn(cases, 4)
def test_drawn_layers(check, case):
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS, ids=name)
@drawn(cases, 300)
def test_many_drawn_layers(check, case):
    check(case)


@pytest.mark.parametrize("code", [0, 1, -1], ids=["retain", "forget", "ignored"])
@pytest.mark.parametrize("check", [check_forward, check_mean, check_epilogue, check_gradient], ids=name)
def test_batches_of_one_group(check, code, monkeypatch):
    monkeypatch.setitem(globals(), "codes", lambda samples, seed: torch.full((samples,), code, dtype=torch.int8))
    check(BASE | {"seed": 7})


def test_no_sample_launches_nothing():
    layer = Layer(BASE | {"seed": 3})
    x, none, group = layer.x[:0], torch.empty(0, *layer.shape[1:]), layer.group[:0]
    hidden, thin = torch.empty(0, layer.rank), torch.empty(0, 1, layer.rank, *layer.shape[2:])
    gram, where = gram_matrices(layer.b, 1, 1.0), layer.where
    with launches() as seen:
        out = conv2d_forward(
            x, layer.weight, None, layer.a, layer.b, None, where=where, scale=1.0, group=group, goal=none, config=TILE
        )
        product = torch.empty(0, 1, *layer.shape[1:])
        done = conv2d_epilogue(
            product, thin, none, layer.b, None, scale=1.0, group=group, columns=True, config=replace(TILE, block_k=2)
        )
        pair = conv2d_gradient(
            none, none, hidden, layer.b, None, groups=1, scale=1.0, group=None, goal=None, forget_weight=None,
            kept=None, retain_weight=None, config=TILE,
        )  # fmt: skip
        dx = conv2d_input_gradient(
            none, layer.weight, thin, layer.a, where=where, memory_format=torch.contiguous_format, config=TILE
        )
        da = conv2d_lora_a_gradient(thin, x, where=where, config=TILE)
        energy = conv2d_retain_energy(hidden, gram, group, pixels=where.pixels, config=TILE)
        k = conv2d_retain_gradient(pair.up, hidden, thin, gram, torch.empty(0), config=TILE)
    assert not seen
    assert out.output.shape == none.shape
    assert dx.shape == x.shape
    zeros = (da, pair.lora_b, k, energy, done.columns, done.counts, out.forget_samples)
    assert all(float(t.abs().sum()) == 0.0 for t in zeros)


@pytest.mark.parametrize("layout", ["nchw", "channels-last"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_joint_weight_makes_both_products(groups, layout):
    layer = Layer(BASE | {"seed": 5, "groups": groups, "layout": layout})
    both = layer.grouped(layer.product(layer.x, joint_weight(layer.weight, layer.a, groups, layer.layout)))
    each = layer.shape[1] // groups
    assert both.shape[2] % 8 == 0
    for part, weight in ((both[:, :, :each], layer.weight), (both[:, :, each : each + 3], layer.a)):
        assert torch.allclose(part.flatten(1, 2), layer.product(layer.x, weight), atol=1e-5)
    assert float(both[:, :, each + 3 :].abs().max()) == 0.0


@pytest.mark.parametrize("kernel", [(2, 4), (3, 3), (1, 2)])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_windows_are_torchs(padding, kernel):
    x, weight = normal(2, 4, 7, 6, seed=1), normal(6, 2, *kernel, seed=2)
    around = resolve_padding(padding, kernel, (1, 1), (2, 1))
    where = geometry(x, weight, (1, 1), around, (2, 1), 2)
    truth = F.conv2d(x, weight, padding=padding, dilation=(2, 1), groups=2)
    assert truth.shape[2:] == (where.out_height, where.out_width)
    assert torch.allclose(convolution(x, weight, where), truth, atol=1e-5)
