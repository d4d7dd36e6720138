"""The rows of the tables: an unlearning method with the options that make it this row and no other.

A row holds what distinguishes it (a mode, a placement, γ); the rate and the batch size come from the pair
it runs on. Two tables that ask for the same options therefore ask for the same run, and the second reads it
from the cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from rfa_fast.experiments.tables.pairs import Pair
from rfa_fast.methods.batches import IMAGE_BATCH, TEXT_BATCH

_ANY = ("image", "text", "language")


@dataclass(frozen=True)
class RowSpec:
    """One row.

    Attributes:
        name: for the command line.
        label: in the table.
        method: of :data:`rfa_fast.methods.METHODS`.
        options: of :func:`rfa_fast.unlearn`, JSON-safe.
        paper: the row of the paper's table that it stands beside; empty where the paper has none.
        kinds: of pairs that it is defined for.
        head_only: adapt the pair's head alone, Table V's first placement.
        once: one pass over what is to be forgotten instead of one over what is kept (NegGrad trains on D_f alone).
        repeat: how often each sample of D_f comes (section V-B2 has five).
        base: the row that this one varies, whose settings by the user are its own; empty: none.
        varied: the options that it varies.
    """

    name: str
    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    kinds: tuple[str, ...] = _ANY
    head_only: bool = False
    once: bool = False
    repeat: int = 1
    base: str = ""
    varied: tuple[str, ...] = ()

    def with_option(self, key: str, value: Any, label: str, paper: str = "") -> RowSpec:
        """The same row with one option changed, under another label.

        Example:
            >>> ROWS["rfa-residual"].with_option("gamma", 0.1, "γ = 0.1").identity()
            'rfa gamma=0.1 mode="residual"'
        """
        name = f"{self.name}-{key}-{value}"
        options = {**self.options, key: value}
        base, varied = self.base or self.name, (*self.varied, key)
        return replace(self, name=name, label=label, paper=paper, options=options, base=base, varied=varied)

    def fixed(self, pair: Pair) -> dict[str, str]:
        """The options that make the row what it is, each with its value in words; those that it varies left out.

        Example:
            >>> from rfa_fast.experiments.tables.pairs import PAIRS
            >>> ROWS["rfa-head"].fixed(PAIRS["wmdp/qwen2.5-3b"])
            {'mode': "'residual'", 'targets': "['lm_head']"}
            >>> ROWS["rfa-l2"].with_option("norm", "mse", "mse").fixed(PAIRS["digits/digits-net"])
            {'mode': "'residual'"}
        """
        found = {key: repr(value) for key, value in self.options.items() if key not in self.varied}
        if self.head_only:
            found["targets"] = repr([pair.head])
        if self.once:
            found["forget_per_batch"] = "what makes one pass over D_f"
        return found

    @property
    def cost_key(self) -> str:
        """What the row's time depends on: the same for rows that differ in a rate, γ or a norm."""
        words = [str(self.options[key]) for key in ("mode", "adapter", "targets") if key in self.options]
        return " ".join([self.method, *words, *(["head"] if self.head_only else [])])

    def identity(
        self, of_method: Mapping[str, Any] = MappingProxyType({}), of_row: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """What the row is, whatever it is called: equal for rows that differ in their label alone.

        Args:
            of_method: the user's settings for all rows of the method; what `unlearn` does unasked goes without saying
                only where they leave it so.
            of_row: those for this row alone, which tell it from others.

        Example:
            >>> rank = ROWS["rfa-residual"].with_option("rank", 8, "rank 8")
            >>> rank.identity(), rank.identity({"rank": 4}), ROWS["rfa-residual"].identity({}, {"lr": 0.1})
            ('rfa mode="residual"', 'rfa mode="residual" rank=8', 'rfa lr=0.1 mode="residual"')
        """
        asked = {**of_method, **of_row}
        shown = {k: v for k, v in self.options.items() if k in asked or (k, v) not in _DEFAULTS}
        shown |= {key: value for key, value in of_row.items() if key not in self.options}
        words = [f"{key}={json.dumps(value)}" for key, value in sorted(shown.items())]
        if self.head_only:
            words.append("head")
        if self.repeat != 1:
            words.append(f"x{self.repeat}")
        return " ".join([self.method, *words])

    def keywords(
        self, pair: Pair, kind: str, forgotten: int, seed: int, epochs: int = 1,
        chosen: Mapping[str, Any] | None = None, *, most_epochs: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The keyword arguments of :func:`rfa_fast.unlearn` for this row on a pair.

        Args:
            pair: its settings come first, the row's own prevail.
            kind: of the scenario.
            forgotten: samples in D_f, repeated ones counted as often as they come.
            seed: of the run.
            epochs: times as many epochs as the pair has.
            chosen: the user's settings, in place of the pair's.
            most_epochs: of unlearning.

        Example:
            >>> from rfa_fast.experiments.tables.pairs import PAIRS
            >>> ROWS["neggrad"].keywords(PAIRS["digits/digits-net"], "class", forgotten=100, seed=0)["max_steps"]
            4
        """
        mode = self.options.get("mode", "")
        settings = {**pair.options(self.method, "class" if kind == "keyword" else kind, mode), **(chosen or {})}
        found = {**settings, **self.options, "seed": seed}
        if (once := found.get("epochs", 1) * epochs) != 1:
            found["epochs"] = once
        if most_epochs is not None and once > most_epochs:
            found["epochs"] = most_epochs
        if self.head_only:
            found["targets"] = [pair.head]
        if self.once:
            size = found.get("batch_size") or (IMAGE_BATCH if pair.kind == "image" else TEXT_BATCH)
            steps = -(-forgotten // max(1, size - 1))  # a batch holds a sample to keep too
            each = -(-forgotten // steps)  # as equal as can be: fewer than `steps` samples come twice
            steps *= found.pop("epochs", 1)
            found = {**found, "forget_per_batch": each, "max_steps": found.get("max_steps", steps)}
        return {"method": self.method, **found}


# What `unlearn` does unasked: a row that says so is the row that does not.
_DEFAULTS = (("targets", "all"), ("norm", "mse"), ("gamma", 0.5), ("rank", 8), ("adapter", "lora"))

_LANGUAGE = ("language",)
_LISTED = (
    RowSpec("neggrad", "NegGrad", "neggrad", paper="NegGrad", once=True),
    RowSpec("finetune", "Finetune", "finetune", paper="Finetune"),
    RowSpec("badt", "BadT", "badt", paper="BadT"),
    RowSpec("badt-5x", "BadT, D_f × 5", "badt", paper="BadT, D_f × 5", repeat=5),
    RowSpec("scrub", "SCRUB", "scrub", paper="SCRUB"),
    RowSpec("salun", "SalUn", "salun", kinds=("image", "text")),
    RowSpec("graddiff", "GradDiff", "graddiff", kinds=_LANGUAGE),
    RowSpec("npo", "NPO", "npo", kinds=_LANGUAGE),
    RowSpec("simnpo", "SimNPO", "simnpo", kinds=_LANGUAGE),
    RowSpec("rmu", "RMU", "rmu", kinds=_LANGUAGE),
    RowSpec("rfa-residual", "RFA residual", "rfa", {"mode": "residual"}, "Ours"),
    RowSpec("rfa-teacher", "RFA teacher", "rfa", {"mode": "teacher"}, "Ours"),
    RowSpec("rfa-deep", "RFA residual, latter half", "rfa", {"mode": "residual", "targets": "deep"}, "Ours"),
    RowSpec("rfa-teacher-deep", "RFA teacher, latter half", "rfa", {"mode": "teacher", "targets": "deep"}, "Ours"),
    RowSpec("rfa-head", "RFA residual, head", "rfa", {"mode": "residual"}, "Ours", head_only=True),
    RowSpec("rfa-teacher-head", "RFA teacher, head", "rfa", {"mode": "teacher"}, "Ours", head_only=True),
    RowSpec("rfa-l2", "RFA residual, l2", "rfa", {"mode": "residual", "norm": "l2"}, "Ours"),
    RowSpec("rfa-teacher-l2", "RFA teacher, l2", "rfa", {"mode": "teacher", "norm": "l2"}, "Ours"),
    RowSpec("rfa-pissa", "RFA residual, PiSSA", "rfa", {"mode": "residual", "adapter": "pissa"}, "PiSSA"),
    RowSpec("rfa-dora", "RFA residual, DoRA", "rfa", {"mode": "residual", "adapter": "dora"}, "DoRA"),
)

ROWS: Mapping[str, RowSpec] = MappingProxyType({row.name: row for row in _LISTED})
"""Name -> row, in the order of the tables."""

ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType({"rfa": ("rfa-residual", "rfa-teacher")})
"""A method with several rows -> those that its bare name stands for."""


def find_rows(names: Sequence[str]) -> list[RowSpec]:
    """The rows of these names, each once; `"rfa"` stands for both modes.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    Example:
        >>> [row.label for row in find_rows(["scrub", "rfa"])]
        ['SCRUB', 'RFA residual', 'RFA teacher']
    """
    found: dict[str, RowSpec] = {}
    for name in names:
        for known in ALIASES.get(name, (name,)):
            if known not in ROWS:
                raise ValueError(f"methods: got {name!r}, expected some of {', '.join((*ROWS, *ALIASES))}")
            found[known] = ROWS[known]
    return list(found.values())
