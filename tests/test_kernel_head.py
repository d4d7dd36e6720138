"""The kernels of the head, in Triton's interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import codes, drawn, drawn_dtypes, few_programs, launches, normal, poisoned
from rfa_fast.kernels.softmax_gradient import probability_sums, softmax_gradient
from rfa_fast.kernels.softmax_stats import softmax_stats
from rfa_fast.kernels.tuning import TARGETS, Config, candidates

from rfa_fast.objective import mean_prediction

__all__ = ["few_programs", "poisoned"]

pytestmark = pytest.mark.usefixtures("poisoned", "few_programs")

# Small tiles, so that drawn shapes have several of them and a ragged last one.
STATS, ONE_ROW = Config(2, 16, 0, warps=4, stages=1), Config(1, 32, 0, warps=4, stages=1)
GRADIENT = Config(8, 16, 4, warps=4, stages=1)
FP32 = torch.finfo(torch.float32).eps

cases = st.fixed_dictionaries(
    {
        "m": st.integers(0, 20), "v": st.integers(1, 70), "dtype": drawn_dtypes, "seed": st.integers(0, 999),
        "softcap": st.sampled_from([None, 3.0, 30.0]), "size": st.sampled_from([0.01, 1.0, 12.0]),
        "layout": st.sampled_from(["rows", "columns", "slice"]), "soft": st.booleans(), "weighted": st.booleans(),
        "in_place": st.booleans(),
    }
)  # fmt: skip


def operands(case):
    m, v, seed = case["m"], case["v"], case["seed"]
    u = (case["size"] * normal(m, v, seed=seed)).to(case["dtype"])
    if case["layout"] == "columns":
        u = u.t().contiguous().t()
    elif case["layout"] == "slice":
        padded = torch.full((m, 2 * v + 3), float("nan"), dtype=u.dtype)
        padded[:, 1 : 2 * v + 1 : 2] = u
        u = padded[:, 1 : 2 * v + 1 : 2]
    generator = torch.Generator().manual_seed(seed + 1)
    group = codes(m, seed)
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[group == 1] = 10**9  # a forget row's label is nobody's business
    labels[torch.rand(m, generator=generator) < 0.2] = -100
    soft = normal(v, seed=seed + 2).softmax(0) if case["soft"] else None
    weights = normal(m, seed=seed + 3) if case["weighted"] else None
    return u, labels, group, soft, weights


def truth(u, labels, group, soft, weights, softcap, dtype=torch.float64):
    """Loss per row, its gradient, and the column sums, by autograd in `dtype` as the reference takes them."""
    u = u.to(dtype).detach().requires_grad_()
    z = u if softcap is None else softcap * torch.tanh(u / softcap)
    wide = z.double() if dtype == torch.float64 else z.float()
    log_p = wide.log_softmax(1)
    kept, forgotten = ((labels != -100) & (group == code) for code in (0, 1))
    loss = -torch.where(kept, log_p.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1), 0)
    if soft is not None:
        loss = loss - torch.where(forgotten, log_p @ soft.to(log_p.dtype), 0)
    used = kept if soft is None else kept | forgotten
    factor = torch.ones(len(u)) if weights is None else weights
    (du,) = torch.autograd.grad((loss * factor).sum(), u)
    return {
        "lse": torch.where(used, wide.logsumexp(1), 0).detach(), "loss": loss.detach(), "du": du,
        "columns": log_p.exp()[kept].sum(0).detach(),
    }  # fmt: skip


def check(case):
    u, labels, group, soft, weights = operands(case)
    softcap = case["softcap"]
    exact = truth(u, labels, group, soft, weights, softcap)
    rival = truth(u, labels, group, soft, weights, softcap, u.dtype)
    kept = u.clone(memory_format=torch.preserve_format)
    stats = STATS if case["seed"] % 2 else ONE_ROW
    lse, loss = softmax_stats(u, labels, group, soft, softcap=softcap, config=stats)
    alone = probability_sums(u, lse, labels, group, softcap=softcap, config=GRADIENT)
    assert torch.equal(u, kept)
    du, columns = softmax_gradient(
        u, lse, labels, group, soft, weights=weights, softcap=softcap, in_place=case["in_place"], columns=True,
        config=GRADIENT,
    )  # fmt: skip
    assert (du is u) == case["in_place"]
    assert du.dtype == u.dtype
    assert torch.equal(alone, columns)
    ours = {"lse": lse.sum(0), "loss": loss, "du": du, "columns": columns}
    reach = float(kept.double().abs().max()) if kept.numel() else 0.0
    for name, true in exact.items():
        value = ours[name].double()
        assert value.shape == true.shape, name
        assert bool(torch.isfinite(value).all()), name
        if not true.numel():
            continue
        # What is subtracted, and what a result is rounded to: no result can be expected to be more exact.
        unit = 8 * FP32 * (1 + (reach if softcap is None else min(reach, softcap)))
        scale = 1 if weights is None or not len(u) else float(weights.abs().max())
        unit = max(unit, torch.finfo(u.dtype).eps) * scale if name == "du" else unit * max(1, float(true.abs().max()))
        for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            mine, theirs = float(measure(value - true)), float(measure(rival[name].double() - true))
            assert mine <= 2 * theirs + unit, (name, mine, theirs, unit)
    unused = (exact["loss"] == 0) & (exact["lse"] == 0)
    for value in (lse[:, unused], loss[unused], du[unused]):
        assert not bool(value.any())


PLAIN = {
    "dtype": torch.float32, "size": 3.0, "softcap": None, "layout": "rows", "soft": True, "weighted": True,
    "in_place": False,
}  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"m": 1, "v": 1}, id="all-one"),
        pytest.param({"m": 1, "v": 37}, id="one-row"),
        pytest.param({"m": 9, "v": 5}, id="below-a-block"),
        pytest.param({"m": 16, "v": 64}, id="whole-blocks"),
        pytest.param({"m": 19, "v": 67}, id="odd"),
        pytest.param({"m": 0, "v": 5}, id="zero-rows"),
    ],
)
@pytest.mark.parametrize("seed", [0, 4, 8, 5, 6, 7])  # all ignored, all retain, all forget, thrice mixed
def test_explicit_shapes(shape, softcap, seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    check({**PLAIN, **shape, "dtype": dtype, "softcap": softcap, "seed": seed, "in_place": seed == 6})


@pytest.mark.parametrize("layout", ["columns", "slice"])
def test_any_strides(layout):
    check({**PLAIN, "m": 11, "v": 40, "seed": 7, "layout": layout, "in_place": True})


@drawn(cases, 25)
def test_drawn_cases(case):
    check(case)


@pytest.mark.long
@drawn(cases, 300)
def test_many_drawn_cases(case):
    check(case)


def one_of_each(v):
    """A labelled retain row, a labelled forget row, and their ỹ."""
    return torch.tensor([v - 1, 0]), torch.tensor([0, 1], dtype=torch.int8), normal(v, seed=3).softmax(0)


@pytest.mark.parametrize("offset", [2.0**16, -(2.0**7), -(2.0**16)])  # exp(2⁷) is more than fp32 holds
def test_a_common_offset_of_the_logits_costs_no_digits(offset):
    u = torch.randint(-8, 8, (2, 40), generator=torch.Generator().manual_seed(0)) / 4
    labels, group, soft = one_of_each(40)
    results = []
    for added in (0.0, offset):
        lse, loss = softmax_stats(u + added, labels, group, soft, config=STATS)
        du, columns = softmax_gradient(u + added, lse, labels, group, soft, columns=True, config=GRADIENT)
        results.append((loss, du, columns))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*results, strict=True))


def test_classes_ruled_out_by_minus_infinity_are_neither_counted_nor_moved():
    u = normal(2, 40, seed=1)
    u[:, :20] = float("-inf")  # the whole first block
    labels, group, soft = one_of_each(40)
    soft = torch.where(torch.arange(40) < 20, 0, soft)
    soft = soft / soft.sum()
    lse, loss = softmax_stats(u, labels, group, soft, config=STATS)
    du, columns = softmax_gradient(u, lse, labels, group, soft, columns=True, config=GRADIENT)
    exact = truth(u[:, 20:], labels - 20 * (group == 0), group, soft[20:], None, None)
    assert torch.allclose(loss.double(), exact["loss"], rtol=1e-6)
    assert torch.allclose(du[:, 20:].double(), exact["du"], atol=1e-6)
    assert torch.allclose(columns[20:].double(), exact["columns"], atol=1e-6)
    assert not bool(du[:, :20].any())
    assert not bool(columns[:20].any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_shows_and_stays_alone(bad):
    u = normal(3, 40, seed=1)
    u[0, 33] = bad
    labels, group = torch.tensor([1, 2, 3]), torch.tensor([0, 0, -1], dtype=torch.int8)
    lse, loss = softmax_stats(u, labels, group, config=STATS)
    du, _ = softmax_gradient(u, lse, labels, group, config=GRADIENT)
    assert not bool(loss[0].isfinite())
    assert not bool(du[0].isfinite().all())
    assert bool(loss[1:].isfinite().all())
    assert bool(du[1:].isfinite().all())


def test_a_soft_label_of_zeros_gives_exact_zeros():
    u, (labels, group, soft) = normal(2, 40, seed=1), one_of_each(40)
    lse, loss = softmax_stats(u, labels, group, torch.zeros_like(soft), config=STATS)
    du, _ = softmax_gradient(u, lse, labels, group, torch.zeros_like(soft), config=GRADIENT)
    assert float(loss[1]) == 0
    assert not bool(du[1].any())
    assert float(loss[0]) > 0
    assert bool(du[0].any())


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_the_softcap_is_a_tanh_on_every_scale(cap):
    """One logit per row, from far below where tanh is linear to far above where it is 1."""
    values = torch.cat([torch.logspace(-6, 3, 200), torch.linspace(0.5, 1, 100)])
    u = torch.stack([torch.cat([values, -values]), torch.zeros(600)], 1).contiguous()
    labels, group = torch.zeros(600, dtype=torch.int64), torch.zeros(600, dtype=torch.int8)
    lse, loss = softmax_stats(u, labels, group, softcap=cap, config=Config(64, 2, 0, warps=4, stages=1))
    z = cap * torch.tanh(u.double()[:, 0] / cap)
    assert torch.allclose(loss.double(), torch.nn.functional.softplus(-z), rtol=4 * FP32, atol=4 * FP32 * cap)
    assert torch.allclose(lse.sum(0).double(), torch.nn.functional.softplus(z), rtol=4 * FP32, atol=4 * FP32 * cap)


@pytest.mark.parametrize("target", [*TARGETS, "generic"])
def test_the_shipped_configurations(target):
    """More rows than a program takes, more columns than a block has."""
    stats, gradient = candidates("softmax_stats", target)[0], candidates("softmax_gradient", target)[0]
    m, v = gradient.block_m + 3, stats.block_n + 77
    u, labels, group = normal(m, v, seed=0), torch.arange(m), codes(m, 7)
    lse, loss = softmax_stats(u, labels, group, config=stats)
    exact = truth(u, labels, group, None, None, None)
    assert torch.allclose(loss.double(), exact["loss"], rtol=1e-6)
    columns = probability_sums(u, lse, labels, group, config=gradient)
    assert torch.allclose(columns.double(), exact["columns"], rtol=1e-5, atol=1e-9)
    mean, count = mean_prediction(u, labels, group)
    assert torch.allclose(columns / count, mean, rtol=1e-5, atol=1e-9)


def test_two_runs_are_bit_equal_and_one_launch_each():
    u, labels, group, soft, _ = operands({**PLAIN, "m": 19, "v": 67, "seed": 6})
    runs = []
    for _ in range(2):
        with launches() as seen:
            lse, loss = softmax_stats(u, labels, group, soft, config=STATS)
            du, columns = softmax_gradient(u, lse, labels, group, soft, columns=True, config=GRADIENT)
        assert seen == {"softmax_stats_kernel": 1, "softmax_gradient_kernel": 1}
        runs.append((lse, loss, du, columns))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
