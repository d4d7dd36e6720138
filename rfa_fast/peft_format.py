"""PEFT's LoRA format on disk, read and written without PEFT.

Importing PEFT costs seconds and pulls in transformers and accelerate, and its loader replaces modules,
which a patched model must not have. What is needed of it is small: how a key is spelled, which layers a
configuration targets, which rank and alpha a layer gets. The price of restating those rules is that they
may drift from PEFT's; the tests hold every one of them against PEFT itself.

The second half of this module is what PEFT gets wrong (measured with 0.21): it builds the convolution of
`lora_A` from kernel size, stride and padding alone, so a dilation, a padding mode and groups of the adapted
layer are lost; and in a model with fused experts it takes every layer named like an expert for one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rfa_fast.targets import Kind

LORA = "LORA"
# PEFT looks this up among its own types and stops with a KeyError that shows it, so it says what to do.
RFA_ONLY = "RFA: load with rfa_fast.load, PEFT would compute another function"

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<name>.*)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?P<weight>\.weight)?")
# The settings that are read, and those that change how an adapter was started, trained or filed, but not the
# function it computes. Any other setting that is on is refused: it may be a variant that computes another one.
_READ_OR_NEUTRAL = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "init_lora_weights"),
        *("bias", "modules_to_save"),
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("fan_in_fan_out", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_core"),
        *("qalora_group_size", "velora_config", "runtime_config"),
    }
)
_EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "pissa")


@dataclass(frozen=True)
class Pair:
    """One layer's tensors as PEFT files them: A `(r, K)` or `(r, C, k, k)`, B `(N, r)` or `(N, r, 1, 1)`,
    DoRA's magnitude `(N,)` or `(1, N, 1, 1)`."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class LoraSettings:
    """What `adapter_config.json` says about the function its adapter computes."""

    peft_type: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    pissa: bool
    dropout: float
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    layers_to_transform: list[int] | None
    layers_pattern: list[str]

    def rank_of(self, name: str) -> int:
        """Rank of the named layer."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, name), self.rank)

    def alpha_of(self, name: str) -> float:
        """Alpha of the named layer."""
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, name), self.alpha)

    def targets(self, name: str) -> bool:
        """Whether PEFT would adapt a layer of this name."""
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        # PEFT resolves these two against the model before it saves; by hand they leave the tensors as the only word.
        if self.target_modules is None or self.target_modules == "all-linear":
            return False
        if not _matches(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules or not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for m in (re.match(p, name) for p in patterns) if m), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the folder of a saved adapter, with a file {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: got a file that is not JSON ({error}); save the adapter again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def read_settings(path: Path) -> LoraSettings:
    """`adapter_config.json`, refused when its adapter is more than A, B and a magnitude per layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not LoRA, a setting of the wrong type, or one that changes the adapter's
            function in a way that is not implemented here.
    """
    raw = read_json(path)
    if raw.get("peft_type") not in (LORA, RFA_ONLY):
        raise ValueError(f"{path}: peft_type: got {raw.get('peft_type')!r}, expected {LORA!r}: only LoRA can be loaded")
    if raw.get("bias") not in (None, "none"):
        raise ValueError(f"{path}: bias: got {raw['bias']!r}, expected 'none': trained biases cannot be loaded")
    if raw.get("modules_to_save"):
        raise ValueError(
            f"{path}: modules_to_save: got {raw['modules_to_save']!r}, expected none: it replaces whole layers; "
            "merge that adapter with PEFT first"
        )
    others = sorted(key for key, value in raw.items() if value and key not in _READ_OR_NEUTRAL)
    if others:
        got = ", ".join(f"{key}={raw[key]!r}" for key in others)
        raise ValueError(f"{path}: got {got}; expected plain LoRA, rsLoRA, DoRA or PiSSA, without these settings")
    start = raw.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights: got {start!r}, which changed the base weights when training began; save it "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    layers = _typed(path, raw, "layers_to_transform", (list, int), None)
    return LoraSettings(
        peft_type=raw["peft_type"],
        rank=_typed(path, raw, "r", int, 8),
        alpha=_typed(path, raw, "lora_alpha", (int, float), 8),
        rank_pattern=_pattern(path, raw, "rank_pattern", int),
        alpha_pattern=_pattern(path, raw, "alpha_pattern", (int, float)),
        rslora=_typed(path, raw, "use_rslora", bool, False),
        dora=_typed(path, raw, "use_dora", bool, False),
        pissa=start == "pissa",
        dropout=_typed(path, raw, "lora_dropout", (int, float), 0.0),
        target_modules=_typed(path, raw, "target_modules", (str, list), None),
        exclude_modules=_typed(path, raw, "exclude_modules", (str, list), None),
        layers_to_transform=[layers] if isinstance(layers, int) else layers,
        layers_pattern=_as_list(_typed(path, raw, "layers_pattern", (str, list), [])),
    )


def write_settings(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    kinds: Mapping[str, Kind],
    modules: Iterable[str],
    *,
    rslora: bool,
    dora: bool,
    peft_type: str,
    base: str | None,
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for the layers in `ranks`.

    Args:
        ranks, alphas: layer name -> rank of the filed tensors, and alpha.
        kinds: layer name -> kind.
        modules: names of all modules of the model; they decide how the layers can be named.
        rslora, dora, peft_type: as PEFT means them.
        base: name or path of the base model, if it has one.
    """
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    linears = [kind for kind in kinds.values() if kind != "conv2d"]
    return {
        "peft_type": peft_type,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(list(ranks), modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": bool(linears) and all(kind == "conv1d" for kind in linears),
        "init_lora_weights": True,
        "use_rslora": rslora,
        "use_dora": dora,
    }


def to_keys(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The tensors under the keys PEFT gives them."""
    out: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        out[f"{_PREFIX}{name}.lora_A.weight"] = pair.lora_a
        out[f"{_PREFIX}{name}.lora_B.weight"] = pair.lora_b
        if pair.magnitude is not None:
            out[f"{_PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
    return out


def from_keys(path: Path, tensors: Mapping[str, Tensor], *, dora: bool) -> dict[str, Pair]:
    """Layer name -> its tensors; every key must be used.

    Raises:
        ValueError: a key that is no part of a LoRA pair, or a pair with a part missing.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if found is None or (found["weight"] is None and found["part"] != "lora_magnitude_vector"):
            strange.append(key)
        else:
            parts.setdefault(found["name"], {})[found["part"]] = tensor
    embedded = [key for key in strange if "lora_embedding" in key]
    if embedded:
        raise ValueError(f"{path}: got an adapted embedding ({embedded[0]}), expected Linear, Conv2d and Conv1D only")
    if strange:
        raise ValueError(f"{path}: got {len(strange)} keys left over, first {strange[0]!r}; expected {_expected(dora)}")
    if not parts:
        raise ValueError(f"{path}: got no tensors, expected {_expected(dora)}")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    for name, have in parts.items():
        if set(have) != wanted:
            got, expected = ", ".join(sorted(have)), ", ".join(sorted(wanted))
            raise ValueError(f"{path}: layer {name!r}: got {got}, expected {expected}: the file is incomplete")
    return {n: Pair(p["lora_A"], p["lora_B"], p.get("lora_magnitude_vector")) for n, p in parts.items()}


def peft_differs(module: nn.Module) -> str | None:
    """Why PEFT computes another function than ours for an adapted convolution; `None` where it does not.

    Example:
        >>> peft_differs(nn.Conv2d(2, 2, 3, dilation=2))
        'PEFT drops the dilation (2, 2) of a 3x3 kernel'
        >>> peft_differs(nn.Conv2d(2, 2, 1, dilation=2)) is None
        True
    """
    if not isinstance(module, nn.Conv2d):
        return None
    kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
    size = "x".join(map(str, kernel))
    if module.groups > 1:
        return f"PEFT's A would run across the {module.groups} groups"
    if any(d > 1 and k > 1 for d, k in zip(dilation, kernel, strict=True)):
        return f"PEFT drops the dilation {dilation} of a {size} kernel"
    padded = max(kernel) > 1 and padding == "same" if isinstance(padding, str) else any(padding)
    if module.padding_mode != "zeros" and padded:
        return f"PEFT pads with zeros in place of padding_mode={module.padding_mode!r}"
    return None


def peft_misroutes(name: str, parameters: Iterable[str]) -> str | None:
    """Why PEFT would put an adapter of this layer elsewhere; `None` where it would not.

    Args:
        name: the layer.
        parameters: names of the model's parameters.

    Example:
        >>> peft_misroutes("mlp.up_proj", ["mlp.up_proj.weight", "experts.gate_up_proj"])
        "PEFT takes 'up_proj' for one of the model's fused experts"
        >>> peft_misroutes("mlp.up_proj", ["mlp.up_proj.weight"]) is None
        True
    """
    leaf = name.rpartition(".")[2]
    if leaf in _EXPERT_NAMES and any(p.rpartition(".")[2] == "gate_up_proj" for p in parameters):
        return f"PEFT takes {leaf!r} for one of the model's fused experts"
    return None


def _target_modules(names: list[str], modules: Iterable[str]) -> list[str] | str:
    """A list where PEFT's suffix rule takes exactly these layers (the form other tools read best), else a regex."""
    wanted = set(names)
    if any(_matches(names, other) for other in modules if other not in wanted):
        return "|".join(map(re.escape, names))
    return names


def _matches(rule: str | list[str], name: str) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return name in rule or any(name.endswith(f".{suffix}") for suffix in rule)


def _pattern_key(pattern: Iterable[str], name: str) -> str:
    """The first key that matches the name or a dotted suffix of it, as PEFT looks up its patterns."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), name)


def _typed(path: Path, raw: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(t.__name__ for t in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{path}: {key}: got {value!r}, expected {names}")
    for rule in _as_list(value) if "modules" in key or key == "layers_pattern" else []:
        _check_regex(path, key, rule, compiles=isinstance(value, str) or key == "layers_pattern")
    return value


def _pattern(path: Path, raw: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> dict[str, Any]:
    pattern: dict[str, Any] = _typed(path, raw, key, dict, {})
    for name in pattern:
        _check_regex(path, key, name, compiles=True)
        _typed(path, pattern, name, kind, None)
    return pattern


def _check_regex(path: Path, key: str, rule: object, *, compiles: bool) -> None:
    if not isinstance(rule, str):
        raise ValueError(f"{path}: {key}: got {rule!r}, expected a string")
    try:
        re.compile(rule if compiles else "")
    except re.error as error:
        raise ValueError(f"{path}: {key}: got {rule!r}, which is no regular expression ({error})") from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _expected(dora: bool) -> str:
    return "<layer>.lora_A.weight and <layer>.lora_B.weight" + (" and <layer>.lora_magnitude_vector" if dora else "")
