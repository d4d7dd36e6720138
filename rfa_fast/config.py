"""Every option of an adapted model, in one frozen dataclass that is validated once.

Options are checked where they are given, so that no module, loss or kernel further down has to
ask again. The dataclass holds plain values only and survives a trip through JSON: the deletion
record and the saved adapter both carry it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

Mode = Literal["residual", "teacher"]
Norm = Literal["mse", "l2"]
AdapterKind = Literal["lora", "pissa", "dora"]
FeatureMean = Literal["auto", "sample", "token"]
Rows = Literal["auto", "batch", "flat", "sequence_first"]
Backend = Literal["auto", "reference", "torch", "triton"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RFAConfig:
    """The options of :func:`rfa_fast.patch`, except `targets`.

    Attributes:
        rank: rank r of each adapter.
        alpha: numerator of the scale `s = alpha / rank` (`alpha / sqrt(rank)` with `rslora`).
        mode: `"residual"` aligns each layer's own residual (eq. 1-2, Algorithm 1), `"teacher"` aligns
            with the original model's features (eq. 7-8, Fig. 4).
        norm: `"mse"`, the square averaged over the feature's elements, or `"l2"`, the unsquared norm.
        gamma: weight γ of the alignment against the task, in [0, 1] (eq. 6).
        weights: (α, β, λ, μ) of eq. 4-5: retain and forget alignment, retain and forget task.
        adapter: `"lora"`, `"pissa"` or `"dora"`.
        rslora: rank-stabilised scale `alpha / sqrt(rank)`.
        adapter_dtype: dtype of A and B; fp32 whatever the model is, because a bf16 A hardly moves.
        feature_mean: `"sample"` keeps positions, `"token"` averages over all valid retain tokens;
            `"auto"` is token when the inputs carry `input_ids`.
        rank_pattern, alpha_pattern: layer name -> rank or alpha that differs from the default.
        rows: how a row of a layer's input is told its sample, for all layers or by layer name; see
            :mod:`rfa_fast.groups`.
        shift_labels: whether labels of shape (B, T) are shifted by one (`None`: for causal language models).
        vocabulary_skip: of a frozen language-model head, leave those blocks of the vocabulary out of the backward whose
            gradient is at most this fraction of its row's largest entry, `2**-8` say, which is what bf16 resolves;
            0: none. It saved nothing on the one model it was tried on: docs/how-it-works.md.
        backend: which implementation the operators take; see :mod:`rfa_fast.ops.backends`.
        seed: seeds the adapters' initialisation; `None` draws from torch's global generator.

    Example:
        >>> RFAConfig(rank=4, alpha=16).scale_of("fc")
        4.0
        >>> RFAConfig(rank=0)
        Traceback (most recent call last):
        ...
        ValueError: rank: got 0, expected an integer >= 1
    """

    rank: int = 8
    alpha: float = 32
    mode: Mode = "residual"
    norm: Norm = "mse"
    gamma: float = 0.5
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    adapter: AdapterKind = "lora"
    rslora: bool = False
    adapter_dtype: torch.dtype = torch.float32
    feature_mean: FeatureMean = "auto"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rows: Rows | Mapping[str, Rows] = "auto"
    shift_labels: bool | None = None
    vocabulary_skip: float = 0.0
    backend: Backend = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_number("alpha", self.alpha, minimum=0.0, strict=True)
        _check_number("gamma", self.gamma, minimum=0.0, maximum=1.0)
        _check_number("vocabulary_skip", self.vocabulary_skip, minimum=0.0, maximum=0.5)
        choices = {"mode": Mode, "norm": Norm, "adapter": AdapterKind, "feature_mean": FeatureMean, "backend": Backend}
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), get_args(kind))
        if isinstance(self.rows, Mapping):
            for layer, rows in self.rows.items():
                check_choice(f"rows[{layer!r}]", rows, get_args(Rows))
            object.__setattr__(self, "rows", dict(self.rows))
        else:
            check_choice("rows", self.rows, get_args(Rows))
        if not isinstance(self.rslora, bool):
            raise TypeError(f"rslora: got {self.rslora!r}, expected True or False")
        if self.shift_labels not in (None, True, False):
            raise TypeError(f"shift_labels: got {self.shift_labels!r}, expected True, False or None (automatic)")
        if self.adapter_dtype not in _FLOATS:
            raise TypeError(f"adapter_dtype: got {self.adapter_dtype!r}, expected one of {_FLOATS}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed: got {self.seed!r}, expected an integer or None")
        if isinstance(self.weights, str) or not isinstance(self.weights, Sequence) or len(self.weights) != 4:
            raise ValueError(
                f"weights: got {self.weights!r}, expected four numbers (alpha, beta, lambda, mu) of eq. 4-5"
            )
        for letter, value in zip(("alpha", "beta", "lambda", "mu"), self.weights, strict=True):
            _check_number(f"weights ({letter})", value, minimum=0.0)
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise TypeError(f"{name}: got {pattern!r}, expected a dict of layer name -> number")
            for key, value in pattern.items():
                check(f"{name}[{key!r}]", value)
            object.__setattr__(self, name, dict(pattern))

    def rank_of(self, layer: str) -> int:
        """Rank r of the named layer."""
        return self.rank_pattern.get(layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """Alpha of the named layer."""
        return self.alpha_pattern.get(layer, self.alpha)

    def scale_of(self, layer: str) -> float:
        """Scale s of the named layer: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`."""
        rank = self.rank_of(layer)
        return self.alpha_of(layer) / (math.sqrt(rank) if self.rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-safe values; :meth:`from_dict` reads them back.

        Example:
            >>> RFAConfig.from_dict(RFAConfig(rank=4).to_dict()) == RFAConfig(rank=4)
            True
        """
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        out["adapter_dtype"] = str(self.adapter_dtype).removeprefix("torch.")
        out["weights"] = list(self.weights)
        for name in ("rank_pattern", "alpha_pattern", "rows"):
            out[name] = dict(out[name]) if isinstance(out[name], Mapping) else out[name]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RFAConfig:
        """The options from what :meth:`to_dict` wrote.

        Raises:
            ValueError: an unknown option or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"options: got unknown {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
        options = dict(values)
        if isinstance(options.get("adapter_dtype"), str):
            name = options["adapter_dtype"]
            dtypes = {str(d).removeprefix("torch."): d for d in _FLOATS}
            if name not in dtypes:
                raise ValueError(f"adapter_dtype: got {name!r}, expected one of {', '.join(dtypes)}")
            options["adapter_dtype"] = dtypes[name]
        if isinstance(options.get("weights"), list):
            options["weights"] = tuple(options["weights"])
        return cls(**options)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """A word among those that there are.

    Raises:
        ValueError: another; the message lists the known ones.

    Example:
        >>> check_choice("norm", "mse", ("mse", "l2"))
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")


def _check_alpha(name: str, value: object) -> None:
    _check_number(name, value, minimum=0.0, strict=True)


def _check_number(name: str, value: object, *, minimum: float, maximum: float = math.inf, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name}: got {value!r}, expected a finite number")
    if not (minimum < value if strict else minimum <= value) or value > maximum:
        bound = f"{'>' if strict else '>='} {minimum:g}" + (f" and <= {maximum:g}" if math.isfinite(maximum) else "")
        raise ValueError(f"{name}: got {value!r}, expected a number {bound}")
