"""Adapters on disk: what :meth:`rfa_fast.RFA.save` writes and :func:`rfa_fast.load` reads.

The format is PEFT's, so that serving stacks that know nothing of RFA can load an adapter, and adapters that
PEFT trained can be taken further here. What its format cannot say costs a little: PiSSA is written as the LoRA
of twice the rank that equals it, and an adapter that PEFT would apply wrongly is written under a type that
PEFT refuses rather than approximated. A fingerprint of the frozen weights is kept, because an adapter moved
to other weights of the same shapes would load without a word and forget nothing.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rfa_fast import targets
from rfa_fast.adapter_files import CONFIG, RECORD, WEIGHTS, Saved, read_folder, write_folder
from rfa_fast.base_weights import describe_weights, other_weights
from rfa_fast.checks import warn_unsaved
from rfa_fast.config import RFAConfig
from rfa_fast.names import canonical_names, unwrapped
from rfa_fast.peft_format import LORA, RFA_ONLY, Pair, peft_differs, peft_misroutes, write_settings

if TYPE_CHECKING:
    from rfa_fast.modules import RFALayer
    from rfa_fast.patching import RFA

_FIXED = frozenset({"rank", "alpha", "rank_pattern", "alpha_pattern", "adapter", "rslora"})
# Wrappers by class name, so that none of their packages has to be imported, and the child that is the model.
_LEAKED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def save_adapter(rfa: RFA, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the adapters of a patched model in PEFT's format.

    A folder that already holds an adapter of the same layers on the same weights is replaced, each file at
    once, so that none is ever half written.

    Args:
        rfa: a patched model, before `merge()` or `remove()`.
        directory: created if need be; other files in it are left alone.
        overwrite: replace an adapter of another base as well.

    Returns:
        The folder.

    Raises:
        ValueError: nothing is adapted any more, or an adapter holds NaN or infinity.
        FileExistsError: `directory` is a file, or holds another adapter.

    Example:
        >>> import rfa_fast, tempfile
        >>> rfa = rfa_fast.patch(nn.Sequential(nn.Linear(4, 3)), ["0"], rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in save_adapter(rfa, folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'rfa_config.json']
    """
    folder, model, plain = Path(directory), unwrapped(rfa.model), canonical_names(rfa.model)
    layers = {plain[name]: layer for name, layer in rfa.layers.items()}
    if not layers or not all("lora_a" in layer._parameters for layer in layers.values()):
        raise ValueError("rfa: got a model whose adapters were merged or removed; save before merge() or remove()")
    pairs = {name: _packed(layer) for name, layer in layers.items()}
    for name, pair in pairs.items():
        if not all(t is None or bool(t.isfinite().all()) for t in (pair.lora_a, pair.lora_b, pair.magnitude)):
            raise ValueError(f"layer {name!r}: got NaN or infinity in its adapter, expected finite numbers; not saved")
    parameters = [name for name, _ in rfa.model.named_parameters()]
    reasons = {name: peft_differs(layer) or peft_misroutes(name, parameters) for name, layer in layers.items()}
    if "" in layers:
        reasons[""] = "PEFT cannot replace a layer that is itself the model"
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    ranks = {name: layer.rank * (2 if layer.adapter == "pissa" else 1) for name, layer in layers.items()}
    config = write_settings(
        ranks,
        {name: _alpha(layer.alpha, layer.rank, ranks[name], rfa.config.rslora) for name, layer in layers.items()},
        {name: _kind(layer) for name, layer in layers.items()},
        plain.values(),
        rslora=rfa.config.rslora,
        dora=rfa.config.adapter == "dora",
        peft_type=RFA_ONLY if refused else LORA,
        base=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    )
    options = rfa.config.to_dict()
    if isinstance(options["rows"], Mapping):
        options["rows"] = {plain.get(name, name): rows for name, rows in options["rows"].items()}
    record = {
        "options": {key: value for key, value in options.items() if key not in ("rank_pattern", "alpha_pattern")},
        "layers": {name: {"rank": layer.rank, "alpha": layer.alpha} for name, layer in layers.items()},
        "base": {
            "class": type(model).__name__,
            **describe_weights({name: layer.weight for name, layer in layers.items()}),
        },
        "refused_by_peft": refused,
    }
    warn_unsaved(rfa.model, rfa.parameters())
    write_folder(folder, config, pairs, record, overwrite=overwrite)
    return folder


def load(model: nn.Module, directory: str | os.PathLike[str], *, check_base: bool = True, **overrides: Any) -> RFA:
    """Patch a model with saved adapters: ours, or LoRA, rsLoRA, DoRA and PiSSA adapters that PEFT saved.

    Everything is checked before the model is touched.

    Args:
        model: the model the adapters were trained on, not yet patched; a compiled or wrapped one will do.
        directory: a folder that :meth:`rfa_fast.RFA.save` or PEFT's `save_pretrained` wrote.
        check_base: refuse a model whose frozen weights are not those the adapters were trained on (which is
            known for our own adapters only).
        overrides: options of :func:`rfa_fast.patch` in place of the saved ones (`mode`, `gamma`, …), except
            those the tensors decide: rank, alpha, adapter, rslora.

    Returns:
        The handle, as from :func:`rfa_fast.patch`.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a pickle, a truncated or altered file, an adapter that is not LoRA or is more than A, B and
            magnitudes, an adapter of another model, or an option out of range.
        TypeError: an unknown option or one of the wrong type, or quantised or meta weights.

    Example:
        >>> import rfa_fast, tempfile
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rfa = rfa_fast.patch(model, ["0"], rank=2, gamma=0.25)
        ...     path = rfa.save(folder)
        ...     rfa.remove()
        ...     again = rfa_fast.load(model, path, mode="teacher")
        >>> again.config.gamma, again.config.mode
        (0.25, 'teacher')
    """
    from rfa_fast.patching import patch

    saved = read_folder(Path(directory))
    actual = {plain: name for name, plain in canonical_names(model).items()}
    pairs = {_without_leaks(name, actual): pair for name, pair in saved.pairs.items()}
    _check_names(model, saved, pairs, actual)
    ranks, alphas = _ranks_and_alphas(saved, pairs)
    config = _config(saved, overrides)
    chosen = {actual[name] for name in pairs}

    def is_chosen(name: str, module: nn.Module) -> bool:
        return name in chosen

    for skipped in targets.select(model, is_chosen).skipped:
        if skipped.name in chosen:
            raise ValueError(f"{saved.folder}: layer {skipped.name!r} cannot be adapted here: {skipped.reason}")
    converted = saved.record is not None and config.adapter == "pissa"
    for name, pair in pairs.items():
        module, filed_rank = model.get_submodule(actual[name]), ranks[name] * (2 if converted else 1)
        _check_pair(saved, name, module, pair, filed_rank)
        if saved.record is None:
            pairs[name] = _fitted(pair)
            ranks[name] = pairs[name].lora_a.shape[0]
            alphas[name] = _alpha(alphas[name], filed_rank, ranks[name], config.rslora)
    if check_base and saved.record is not None:
        _check_base(model, saved, actual)
    if saved.settings.dropout:
        message = f"{saved.folder}: lora_dropout {saved.settings.dropout} is not applied: RFA trains without dropout"
        warnings.warn(message, stacklevel=2)
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config.rows, Mapping):
        options["rows"] = {actual.get(name, name): rows for name, rows in config.rows.items()}
    options["rank_pattern"] = {actual[name]: rank for name, rank in ranks.items()}
    options["alpha_pattern"] = {actual[name]: alpha for name, alpha in alphas.items()}
    rfa = patch(model, is_chosen, **options)
    for name, pair in pairs.items():
        _unpack(rfa.layers[actual[name]], pair, converted=converted)
    return rfa


def _without_leaks(name: str, known: Mapping[str, str]) -> str:
    """A saved name as the model knows it, when a wrapper's prefix was saved with it."""
    cleaned = ".".join(part for part in name.split(".") if part not in _LEAKED)
    candidates = (name, cleaned, cleaned.removeprefix("module."), cleaned.removeprefix("base_model.model."))
    return next((candidate for candidate in candidates if candidate in known), name)


def _kind(layer: RFALayer) -> targets.Kind:
    from rfa_fast.modules import RFAConv1D

    return "conv2d" if isinstance(layer, nn.Conv2d) else "conv1d" if isinstance(layer, RFAConv1D) else "linear"


def _packed(layer: RFALayer) -> Pair:
    a, b = (t.detach() for t in layer.effective_adapters())
    if layer.adapter != "dora":
        return Pair(a, b)
    magnitude = layer.magnitude.detach()
    return Pair(a, b, magnitude.reshape(1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else magnitude)


def _unpack(layer: RFALayer, pair: Pair, *, converted: bool) -> None:
    """Copy a checked pair into its layer; `converted`: take `[A; A₀]` and `[B, −B₀]` apart again."""
    a, b = pair.lora_a, pair.lora_b
    with torch.no_grad():
        if converted:
            both = a.reshape(-1, 2, layer.rank, *a.shape[1:])
            a, b = both[:, 0].flatten(0, 1), b[:, : layer.rank]
            layer.initial_a.copy_(both[:, 1].flatten(0, 1))
            layer.initial_b.copy_(-pair.lora_b[:, layer.rank :])
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
        if pair.magnitude is not None:
            layer.magnitude.copy_(pair.magnitude.reshape(-1))


def _alpha(alpha: float, rank: int, filed_rank: int, rslora: bool) -> float:
    """The alpha that gives tensors of `filed_rank` the scale that `alpha` gives tensors of `rank`."""
    factor = filed_rank / rank
    filed = alpha * (math.sqrt(factor) if rslora else factor)
    return int(filed) if filed == int(filed) else filed


def _check_names(model: nn.Module, saved: Saved, pairs: Mapping[str, Pair], actual: Mapping[str, str]) -> None:
    """Every saved layer is one of this model, and every layer the configuration asks for was saved."""
    modules = {name: model.get_submodule(actual[name]) for name in actual}
    layers = [name for name, module in modules.items() if targets.kind_of(module) is not None]
    patched = [name for name, module in modules.items() if "rfa_name" in module.__dict__]
    if patched:
        raise ValueError(f"model: got one that is patched already (layer {patched[0]!r}); merge() or remove() it first")
    unknown = [name for name in pairs if name not in modules]
    if unknown:
        raise ValueError(
            f"{saved.folder}: got an adapter of another model: {len(unknown)} of its {len(pairs)} layers are not in "
            f"this {type(unwrapped(model)).__name__}, the first {unknown[0]!r}; {_near(unknown[0], layers)}"
        )
    for name in pairs:
        if name not in layers:
            got = type(modules[name]).__name__
            raise ValueError(f"{saved.folder}: layer {name!r}: got one for a {got}, expected Linear, Conv2d or Conv1D")
    missing = [name for name in layers if name not in pairs and saved.settings.targets(name)]
    if missing:
        raise ValueError(
            f"{saved.folder}: {CONFIG} asks for {len(pairs) + len(missing)} layers of this model, {WEIGHTS} holds "
            f"{len(pairs)}; missing {', '.join(missing[:5])}: the adapter is incomplete, or of another model"
        )


def _near(name: str, layers: Iterable[str]) -> str:
    known, leaf = list(layers), name.rpartition(".")[2]
    close = difflib.get_close_matches(name, known, n=3)
    close = close or [other for other in known if other.rpartition(".")[2] == leaf][:3]
    return f"near misses: {', '.join(close)}" if close else f"its layers are {', '.join(known[:8])}, …"


def _ranks_and_alphas(saved: Saved, names: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of each layer, under the names of the model."""
    filed = dict(zip(names, saved.pairs, strict=True))
    if saved.record is None:
        settings = saved.settings
        return {n: settings.rank_of(f) for n, f in filed.items()}, {n: settings.alpha_of(f) for n, f in filed.items()}
    layers = saved.record["layers"]
    for name in saved.pairs:
        if not isinstance(layers.get(name), dict) or not {"rank", "alpha"} <= set(layers[name]):
            raise ValueError(f"{saved.folder / RECORD}: layers: got no rank and alpha of {name!r}; save it again")
    return {n: layers[f]["rank"] for n, f in filed.items()}, {n: layers[f]["alpha"] for n, f in filed.items()}


def _config(saved: Saved, overrides: Mapping[str, Any]) -> RFAConfig:
    """The options to patch with, apart from rank and alpha: the saved ones, then `overrides`."""
    known, settings = {field.name for field in fields(RFAConfig)}, saved.settings
    strange, fixed = sorted(set(overrides) - known), sorted(_FIXED & set(overrides))
    if strange:
        raise TypeError(f"overrides: got {', '.join(strange)}, expected some of {', '.join(sorted(known - _FIXED))}")
    if fixed:
        raise ValueError(f"overrides: got {', '.join(fixed)}, which the saved adapter decides; expected other options")
    options: dict[str, Any] = {
        "adapter": "dora" if settings.dora else "pissa" if settings.pissa else "lora",
        "rslora": settings.rslora,
        "adapter_dtype": "float64" if saved.wide else "float32",
    }
    if saved.record is not None:
        options = {key: value for key, value in saved.record["options"].items() if key not in ("rank", "alpha")}
    return RFAConfig.from_dict({**options, **overrides})


def _fitted(pair: Pair) -> Pair:
    """The same product at a rank the layer can hold: PEFT takes rank 8 for a head of two classes as well.

    With r > N: Bᵀ = QR gives BA = Rᵀ(QᵀA), of rank N; with r > K: A = QR gives BA = (BQ)R, of rank K.
    """
    a, b = pair.lora_a.flatten(1).double(), pair.lora_b.flatten(1).double()
    largest = min(b.shape[0], a.shape[1])
    if a.shape[0] <= largest:
        return pair
    if b.shape[0] == largest:
        q, r = torch.linalg.qr(b.T)
        a, b = q.T @ a, r.T
    else:
        q, r = torch.linalg.qr(a)
        a, b = r, b @ q
    shape_a, shape_b = (largest, *pair.lora_a.shape[1:]), (b.shape[0], largest, *pair.lora_b.shape[2:])
    return Pair(a.reshape(shape_a).to(pair.lora_a), b.reshape(shape_b).to(pair.lora_b), pair.magnitude)


def _check_pair(saved: Saved, name: str, module: nn.Module, pair: Pair, rank: int) -> None:
    """The pair has the shapes of its layer, and PEFT applied it to the layer as we do."""
    reason = peft_differs(module) if saved.settings.peft_type == LORA else None
    if reason is not None:
        raise ValueError(f"{saved.folder}: layer {name!r}: got a pair that belongs to no merged weight: {reason}")
    kind, weight = targets.kind_of(module), module.get_parameter("weight")
    outputs, *inputs = weight.shape[::-1] if kind == "conv1d" else weight.shape
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    ahead, behind = ((1,), (1, 1)) if kind == "conv2d" else ((), ())
    expected = [("lora_A", pair.lora_a, (groups * rank, *inputs)), ("lora_B", pair.lora_b, (outputs, rank, *behind))]
    if pair.magnitude is not None:
        expected.append(("lora_magnitude_vector", pair.magnitude, (*ahead, outputs, *behind)))
    for part, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{saved.folder}: layer {name!r}: {part}: got {tuple(tensor.shape)}, expected {shape} for a weight "
                f"{tuple(weight.shape)} at rank {rank}; the adapter, or its {CONFIG}, belongs to another model"
            )


def _check_base(model: nn.Module, saved: Saved, actual: Mapping[str, str]) -> None:
    base = (saved.record or {}).get("base", {})
    weights = base.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"{saved.folder / RECORD}: base.weights: got {weights!r}, expected a hash per layer")
    known = {name: model.get_submodule(actual[name]).get_parameter("weight") for name in weights if name in actual}
    if other := other_weights(base, describe_weights(known)):
        raise ValueError(
            f"{saved.folder}: got an adapter trained on other weights: {len(other)} of {len(weights)} layers differ, "
            f"the first {other[0]!r} (another checkpoint, or the adapter is merged in already); pass check_base=False "
            "to load it all the same"
        )
