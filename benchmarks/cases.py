"""Every kernel as it is launched in real use: the launchers, on shapes without data.

A case is a launcher with one set of options. Per kernel there are the options that lead to different code; a case
whose name starts with "unaligned" has sizes that nothing divides, which is what takes the generic configuration.
A kernel of the tuning tables that is not here, or a jit kernel that no case launches, makes the sheet fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from cases_conv2d import CONV2D
from rfa_fast.kernels.common import MAX_BLOCK_R
from rfa_fast.kernels.feature_mean import feature_mean
from rfa_fast.kernels.linear_forward import MEAN, MEAN_AND_SPREAD, Rows, linear_forward
from rfa_fast.kernels.linear_gradient import linear_gradient
from rfa_fast.kernels.linear_input_gradient import BOTH_GROUPS, FORGET_ROWS, NONE, linear_input_gradient
from rfa_fast.kernels.lora_a_gradient import lora_a_gradient
from rfa_fast.kernels.lora_down import lora_down
from rfa_fast.kernels.row_error import row_error
from rfa_fast.kernels.softmax_gradient import probability_sums, softmax_gradient
from rfa_fast.kernels.softmax_stats import softmax_stats
from rfa_fast.kernels.tuning import Config
from shapes import Case, meta

UNALIGNED = "unaligned"
RANKS = (8, 64)
M, N, K = 2048, 11008, 2048  # rows, and Qwen2.5-3B's gate
ODD = (77, 133, 99)
VOCABULARY = 151936  # Qwen2.5's


def _linear_forward(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(sizes: tuple[int, int, int] = (M, N, K), *, down: bool = False, route: str = "fused", **named: str | int):
        m, n, k = sizes
        x, w, h = meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, rank, dtype=dtype)
        aims = {"vector": Rows(meta(1, n), 1, 1), "rows": Rows(meta(m, n, dtype=dtype), 1, m)}
        options = {key: aims.get(value, value) for key, value in named.items()}
        if named:
            options["group"] = meta(m, dtype=torch.int8)
        return lambda: linear_forward(
            x, w, meta(n, dtype=dtype), meta(rank, k), meta(n, rank), None if down else h, scale=4.0,
            config=replace(config, route=route), **options,
        )  # fmt: skip

    cases = {
        "target inside": case(columns=MEAN_AND_SPREAD),
        "target inside, l2": case(columns=MEAN),
        "target given": case(goal="vector"),
        "teacher": case(goal="rows", kept="rows"),
        "teacher, Δ": case(goal="rows", kept="rows", emit_delta=True),
        "no loss": case(),
        "vendor's product, target inside": case(route="vendor", columns=MEAN_AND_SPREAD),
        "vendor's product, teacher": case(route="vendor", goal="rows", kept="rows"),
        "unaligned, teacher": case(ODD, goal="rows", kept="rows"),
        "unaligned, target inside": case(ODD, columns=MEAN_AND_SPREAD),
    }
    if rank <= MAX_BLOCK_R:
        cases["h inside, target inside"] = case(down=True, columns=MEAN_AND_SPREAD)
        cases["h inside, target given"] = case(down=True, goal="vector")
    return cases


def _linear_gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(m: int = M, n: int = N, *, goal: bool = True, kept: bool = False, whole: bool = False) -> Case:
        g, y, h = meta(m, n, dtype=dtype), meta(m, n, dtype=dtype), meta(m, rank, dtype=dtype)
        return lambda: linear_gradient(
            g, y, h, meta(n, rank), scale=4.0, group=meta(m, dtype=torch.int8),
            goal=Rows(meta(1, n), 1, 1) if goal else None, forget_weight=meta(m) if goal else None,
            kept=Rows(meta(m, n, dtype=dtype), 1, m) if kept else None, retain_weight=meta(m) if kept else None,
            whole=whole, config=config,
        )  # fmt: skip

    return {
        "residual": case(),
        "residual, G' whole": case(whole=True),
        "teacher": case(kept=True),
        "no loss": case(goal=False),
        "unaligned, teacher": case(*ODD[:2], kept=True),
    }


def _linear_input_gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(select: int, sizes: tuple[int, int, int] = (M, N, K), *, route: str = "fused") -> Case:
        m, n, k = sizes
        g, w = meta(m, n, dtype=dtype), meta(n, k, dtype=dtype)
        return lambda: linear_input_gradient(
            g, meta(m, n, dtype=dtype), meta(m, dtype=torch.int8), w, meta(m, rank), meta(rank, k), select=select,
            config=replace(config, route=route),
        )  # fmt: skip

    return {
        "residual": case(FORGET_ROWS),
        "teacher": case(BOTH_GROUPS),
        "no loss": case(NONE),
        "vendor's product": case(NONE, route="vendor"),
        "unaligned": case(FORGET_ROWS, ODD),
    }


def _lora_down(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    return {
        "plain": lambda: lora_down(meta(M, K, dtype=dtype), meta(rank, K), config=config),
        "unaligned": lambda: lora_down(meta(ODD[0], ODD[2], dtype=dtype), meta(rank, ODD[2]), config=config),
    }


def _lora_a_gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    return {
        "plain": lambda: lora_a_gradient(meta(M, rank), meta(M, K, dtype=dtype), config=config),
        "unaligned": lambda: lora_a_gradient(meta(ODD[0], rank), meta(ODD[0], ODD[2], dtype=dtype), config=config),
    }


def _feature_mean(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(n: int = N, *, loss: bool = True, fallback: bool = False) -> Case:
        earlier = {"fallback": meta(n), "fallback_known": meta(dtype=torch.bool)} if fallback else {}
        return lambda: feature_mean(meta(16, 3, n), meta(16, 2), with_loss=loss, config=config, **earlier)

    return {
        "mean and loss": case(fallback=True),
        "mean": case(loss=False),
        "unaligned": case(ODD[1], fallback=True),
    }


def _row_error(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    def case(m: int, n: int) -> Case:
        return lambda: row_error(meta(m, n, dtype=dtype), meta(n), meta(m, dtype=torch.int8), config=config)

    return {"plain": case(M, N), "unaligned": case(*ODD[:2])}


def _softmax(config: Config, dtype: torch.dtype, vocabulary: int, softcap: float | None) -> dict[str, Case]:
    rows = 512
    logits, labels = meta(rows, vocabulary, dtype=dtype), meta(rows, dtype=torch.int64)
    codes, lse, soft = meta(rows, dtype=torch.int8), meta(2, rows), meta(vocabulary)
    named = {"softcap": softcap, "config": config}
    return {
        "loss": lambda: softmax_stats(logits, labels, codes, soft, **named),
        "gradient": lambda: softmax_gradient(logits, lse, labels, codes, soft, weights=meta(rows), **named),
        "gradient, columns": lambda: softmax_gradient(logits, lse, labels, codes, soft, columns=True, **named),
        "columns": lambda: probability_sums(logits, lse, labels, codes, **named),
    }


def _softmax_stats(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    return {
        "loss": _softmax(config, dtype, VOCABULARY, None)["loss"],
        "softcap": _softmax(config, dtype, VOCABULARY, 30.0)["loss"],
        "unaligned": _softmax(config, dtype, 50257, 30.0)["loss"],
    }


def _softmax_gradient(config: Config, dtype: torch.dtype, rank: int) -> dict[str, Case]:
    usual, capped, odd = (
        _softmax(config, dtype, v, cap) for v, cap in ((VOCABULARY, None), (VOCABULARY, 30.0), (50257, 30.0))
    )
    return {
        "gradient": usual["gradient"],
        "gradient, columns": usual["gradient, columns"],
        "columns": usual["columns"],
        "softcap": capped["gradient, columns"],
        "unaligned": odd["gradient, columns"],
    }


CASES: dict[str, Callable[[Config, torch.dtype, int], dict[str, Case]]] = {
    "linear_forward": _linear_forward,
    "linear_gradient": _linear_gradient,
    "linear_input_gradient": _linear_input_gradient,
    "lora_down": _lora_down,
    "lora_a_gradient": _lora_a_gradient,
    "feature_mean": _feature_mean,
    "row_error": _row_error,
    **CONV2D,
    "softmax_stats": _softmax_stats,
    "softmax_gradient": _softmax_gradient,
}
# Kernels whose work is one large product per tile; the others are bound by what they read.
MATRIX_KERNELS = ("linear_forward", "linear_input_gradient", "conv2d_forward", "conv2d_input_gradient")
# Kernels whose configuration depends on whether the layer's sizes are aligned.
BY_ALIGNMENT = (*MATRIX_KERNELS, "linear_gradient", "conv2d_gradient", "conv2d_lora_a_gradient")
# Kernels whose code does not depend on the rank: one rank tells all.
RANKLESS = ("feature_mean", "row_error", "conv2d_sample_mean", "softmax_stats", "softmax_gradient")
