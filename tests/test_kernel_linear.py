"""The kernels of the linear layer, one by one, in Triton's interpreter against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import close, codes, drawn, drawn_dtypes, few_programs, normal, poisoned
from rfa_fast.kernels.feature_mean import feature_mean
from rfa_fast.kernels.linear_forward import MEAN, MEAN_AND_SPREAD, Rows, linear_forward
from rfa_fast.kernels.linear_gradient import linear_gradient
from rfa_fast.kernels.linear_input_gradient import BOTH_GROUPS, FORGET_ROWS, NONE, linear_input_gradient
from rfa_fast.kernels.lora_a_gradient import lora_a_gradient
from rfa_fast.kernels.lora_down import lora_down
from rfa_fast.kernels.row_error import row_error
from rfa_fast.kernels.tuning import Config

__all__ = ["few_programs", "poisoned"]

pytestmark = pytest.mark.usefixtures("poisoned", "few_programs")

# Small tiles, so that drawn shapes have several of them and a ragged last one.
TILE = Config(16, 16, 16, warps=4, stages=2, group_m=2)

cases = st.fixed_dictionaries(
    {
        **{size: st.integers(1, 40) for size in ("m", "n", "k")},
        "rank": st.sampled_from([1, 3, 8, 20, 70]),
        "dtype": drawn_dtypes,
        "seed": st.integers(0, 999),
        "bias": st.booleans(),
        "transposed": st.booleans(),
    }
)


def operands(case):
    m, n, k, rank, dtype, seed = (case[name] for name in ("m", "n", "k", "rank", "dtype", "seed"))
    x, w = normal(m, k, seed=seed, dtype=dtype), normal(n, k, seed=seed + 1, dtype=dtype)
    if case["transposed"]:
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    a, b = normal(rank, k, seed=seed + 2, dtype=dtype), normal(n, rank, seed=seed + 3, dtype=dtype)
    return x, w, a, b


def check_lora_down(case):
    x, _, a, _ = operands(case)
    close(lora_down(x, a, config=TILE), lambda x, a: x @ a.T, x, a, dtype=x.dtype)


def forward_formula(x, w, h, b, bias):
    return x @ w.T + bias + 0.5 * (h @ b.T)


def check_linear_forward(case):
    x, w, a, b = operands(case)
    m, n, dtype, seed = x.shape[0], w.shape[0], x.dtype, case["seed"]
    bias = normal(n, seed=seed + 4, dtype=dtype) if case["bias"] else None
    group, goal, kept = codes(m, seed), normal(1, n, seed=seed + 5), normal(m, n, seed=seed + 6, dtype=dtype)
    fused = case["rank"] <= 64 and seed % 2 == 0
    hidden = None if fused else lora_down(x, a, config=TILE)
    config = (
        TILE if seed % 3 else Config(16, 16, 16, warps=4, stages=2, route="vendor" if hidden is not None else "fused")
    )
    out = linear_forward(
        x, w, bias, a, b, hidden, scale=0.5, group=group, goal=Rows(goal, 1, 1), kept=Rows(kept, 1, m),
        columns=MEAN_AND_SPREAD, emit_delta=seed % 5 == 0, config=config,
    )  # fmt: skip
    shown = torch.zeros(n, dtype=dtype) if bias is None else bias
    close(out.output, forward_formula, x, w, out.hidden, b, shown, dtype=dtype)
    close(out.hidden, lambda x, a: x @ a.T, x, a, dtype=dtype)
    if out.delta is not None:
        close(out.delta, lambda h, b: 0.5 * (h @ b.T), out.hidden, b, dtype=dtype)
    exact = forward_formula(*(t.double() for t in (x, w, out.hidden, b, shown)))
    frozen = x.double() @ w.double().T + shown.double()
    eps = 4 * torch.finfo(dtype).eps
    for rows, aim, code in ((out.forget_rows, goal, 1), (out.retain_rows, kept, 0)):
        truth = torch.where((group == code)[:, None], exact - aim.double(), 0).square().sum(1)
        assert torch.allclose(rows.sum(0).double(), truth, rtol=eps, atol=eps * float(exact.abs().max()) ** 2 * n)
    mean, loss = feature_mean(out.columns, out.counts, with_loss=True, config=TILE)
    retained, forgotten = frozen[group == 0], exact[group == 1]
    truth = retained.mean(0) if len(retained) else torch.zeros(n, dtype=torch.float64)
    size = float(exact.abs().max())
    assert torch.allclose(mean.double(), truth, rtol=eps, atol=eps * size)
    spread = (forgotten - truth).square().sum() if len(retained) else torch.zeros(())
    assert float(loss.sum()) == pytest.approx(float(spread), rel=eps, abs=eps * size**2 * n)


def check_feature_mean(case):
    """Any cut of the rows into blocks gives the mean and the sum of squares about it."""
    y = normal(case["m"], case["n"], seed=case["seed"]) + 100  # far from 0: the textbook formula would cancel
    group = codes(case["m"], case["seed"])
    parts, counts = [], []
    for rows, code in zip(y.split(7), group.split(7), strict=True):
        gone = rows[code == 1]
        centre = gone.double().mean(0).float() if len(gone) else torch.zeros(case["n"])
        parts.append(torch.stack([rows[code == 0].sum(0), centre, (gone - centre).square().sum(0)]))
        counts.append(torch.tensor([float((code == 0).sum()), float((code == 1).sum())]))
    fallback, known = normal(case["n"], seed=7) + 100, torch.tensor(case["bias"])
    extra = {"fallback": fallback, "fallback_known": known} if case["transposed"] else {}
    mean, loss = feature_mean(torch.stack(parts), torch.stack(counts), **extra, with_loss=True, config=TILE)
    fresh = bool((group == 0).any())
    usable = fresh or (bool(extra) and bool(known))
    truth = y[group == 0].double().mean(0) if fresh else (fallback.double() if extra else torch.zeros(case["n"]))
    assert torch.allclose(mean.double(), truth.double(), rtol=1e-5)
    forget = (y[group == 1].double() - mean.double()).square().sum() if usable else torch.zeros(())
    # A block's centre is an fp32 number near 100: half a unit of that, times what each row adds to the derivative.
    half, gone = 100 * torch.finfo(torch.float32).eps / 2, y[group == 1].double()
    given = half * 2 * float((gone - mean.double()).abs().sum())
    assert float(loss.sum()) == pytest.approx(float(forget), rel=1e-5, abs=1e-6 + given)


def check_row_error(case):
    y, goal = normal(case["m"], case["n"], seed=case["seed"], dtype=case["dtype"]), normal(case["n"], seed=5)
    group = codes(case["m"], case["seed"])
    truth = torch.where((group == 1)[:, None], y.double() - goal.double(), 0).square().sum(1)
    assert torch.allclose(row_error(y, goal, group, config=TILE).double(), truth, rtol=1e-5, atol=1e-6)


def check_linear_gradient(case):
    x, _, a, b = operands(case)
    m, n, dtype, seed = case["m"], case["n"], case["dtype"], case["seed"]
    g, y = normal(m, n, seed=seed + 7, dtype=dtype), normal(m, n, seed=seed + 8, dtype=dtype)
    if case["transposed"]:
        g = g.t().contiguous().t()
    hidden, group = lora_down(x, a, config=TILE), codes(m, seed)
    goal, kept = normal(1, n, seed=seed + 9), normal(m, n, seed=seed + 10, dtype=dtype)
    forget, retain = normal(m, seed=1).abs() * (group == 1), normal(m, seed=2).abs() * (group == 0)
    taught, whole = seed % 2 == 0, seed % 3 == 0
    out = linear_gradient(
        g, y, hidden, b, scale=0.5, group=group, goal=Rows(goal, 1, 1), forget_weight=forget,
        kept=Rows(kept, 1, m) if taught else None, retain_weight=retain if taught else None, whole=whole, config=TILE,
    )  # fmt: skip
    total = g.double() + forget.double()[:, None] * (y.double() - goal.double())
    if taught:
        total = total + retain.double()[:, None] * (y.double() - kept.double())
    written = torch.ones(m, dtype=torch.bool) if whole else ((group >= 0) if taught else (group == 1))
    # Of the terms, not of their sum, which may cancel.
    terms = g.abs().max() + forget.max() * (y.abs().max() + goal.abs().max())
    terms = terms + retain.max() * (y.abs().max() + kept.abs().max())
    bound = 2 * torch.finfo(dtype).eps * float(terms)
    assert float((out.changed.double() - total)[written].abs().max() if written.any() else 0) <= bound
    assert bool(out.changed[~written].isnan().all())
    rounded = torch.where(written[:, None], out.changed, g)
    close(out.up, lambda g, b: 0.5 * (g @ b), rounded, b, dtype=dtype)
    close(out.lora_b, lambda g, h: 0.5 * (g.T @ h), rounded, hidden, dtype=dtype)


def check_linear_input_gradient(case):
    _, w, a, _ = operands(case)
    m, n, dtype, seed = case["m"], case["n"], case["dtype"], case["seed"]
    g, changed = normal(m, n, seed=seed + 7, dtype=dtype), normal(m, n, seed=seed + 8, dtype=dtype)
    up, group, select = (
        normal(m, case["rank"], seed=seed + 9).to(dtype).float(),
        codes(m, seed),
        (NONE, FORGET_ROWS, BOTH_GROUPS)[seed % 3],
    )
    taken = {NONE: group > 5, FORGET_ROWS: group == 1, BOTH_GROUPS: group >= 0}[select]
    changed[~taken] = float("nan")
    config = replace(TILE, route="vendor") if select == NONE and case["bias"] else TILE
    dx = linear_input_gradient(g, changed, group, w, up, a, select=select, config=config)
    source = torch.where(taken[:, None], changed, g)
    close(dx, lambda g, w, u, a: g @ w + u @ a, source, w, up, a, dtype=dtype)


def check_lora_a_gradient(case):
    x, _, _, _ = operands(case)
    up = normal(case["m"], case["rank"], seed=case["seed"]).to(case["dtype"]).float()
    close(lora_a_gradient(up, x, config=TILE), lambda u, x: u.T @ x, up, x, dtype=case["dtype"])


CHECKS = [
    check_lora_down, check_linear_forward, check_feature_mean, check_row_error, check_linear_gradient,
    check_linear_input_gradient, check_lora_a_gradient,
]  # fmt: skip
EXPLICIT = [
    pytest.param({"m": 1, "n": 1, "k": 1, "rank": 1}, id="all-one"),
    pytest.param({"m": 1, "n": 37, "k": 5, "rank": 8}, id="one-row-below-a-block"),
    pytest.param({"m": 33, "n": 65, "k": 17, "rank": 3}, id="odd"),
    pytest.param({"m": 32, "n": 16, "k": 48, "rank": 64}, id="whole-blocks"),
    pytest.param({"m": 19, "n": 34, "k": 23, "rank": 130}, id="rank-above-a-block"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("shape", EXPLICIT)
@pytest.mark.parametrize("seed", [0, 4, 8, 6, 15])  # all ignored, all retain, all forget, mixed, mixed
def test_explicit_shapes(check, shape, seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    check({**shape, "dtype": dtype, "seed": seed, "bias": seed % 2 == 0, "transposed": seed == 6})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@drawn(cases, 8)
def test_drawn_shapes(check, case):
    check(case)


def test_a_centre_that_is_rounded():
    case = {"m": 3, "n": 1, "k": 1, "rank": 1, "dtype": torch.float32, "seed": 846, "bias": False, "transposed": False}
    check_feature_mean(case)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@drawn(cases, 300)
def test_many_drawn_shapes(check, case):
    check(case)


def test_the_mean_alone_leaves_the_spread_out():
    x, w, a, b = operands({"m": 20, "n": 18, "k": 9, "rank": 3, "dtype": torch.float32, "seed": 1, "transposed": False})
    out = linear_forward(x, w, None, a, b, None, scale=1.0, group=codes(20, 1), columns=MEAN, config=TILE)
    assert bool(out.columns[:, 1:].isnan().all())
    mean, loss = feature_mean(out.columns, out.counts, with_loss=False, config=TILE)
    assert loss is None
    assert torch.allclose(mean, (x @ w.T)[codes(20, 1) == 0].mean(0), atol=1e-5)
