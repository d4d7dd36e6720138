"""Which layers of a model are adapted: from a model and `targets` to ordered names, with reasons.

Nothing is changed here. Repeated blocks are found by structure (equal classes under indexed
containers), not by a table of model families: a ResNet's residual blocks, a transformer's layers and
most models nobody listed come out of the same walk. Every layer that could have been adapted and is
not gets a reason, so that `RFA.report()` can answer "why not this one?".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rfa_fast.names import is_a, some, unwrapped

Kind = Literal["linear", "conv2d", "conv1d"]
Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

PLACEMENTS = ("all", "deep", "middle", "shallow")
_ATTENTION = re.compile(r"attn|attention|self_?att", re.IGNORECASE)
_LM_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|lm_logits)$")
_POOLER = re.compile(r"(^|\.)pooler(\.|$)")
_QUANTISED = re.compile(r"quantized|bitsandbytes|auto_gptq|awq|hqq|torchao")


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    Attributes:
        is_head: the model's classification head, which a placement took.
        tied_to: the module that shares its weight, when asking for it unties.
        is_placed: a placement took it; nobody named it.
    """

    name: str
    kind: Kind
    is_head: bool = False
    tied_to: str | None = None
    is_placed: bool = False


@dataclass(frozen=True)
class Skipped:
    """A layer that is left as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What :func:`select` decided. `blocks` are the names of the model's repeated blocks, in order."""

    adapted: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    blocks: tuple[str, ...]


def kind_of(module: nn.Module) -> Kind | None:
    """`"linear"`, `"conv2d"`, `"conv1d"` (transformers' transposed Linear), or `None`.

    Example:
        >>> kind_of(nn.Linear(2, 2)), kind_of(nn.ReLU())
        ('linear', None)
    """
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return "conv1d"
    return None


def select(model: nn.Module, targets: Targets) -> Plan:
    """The layers of `model` that `targets` asks for, in the order of `model.named_modules()`.

    Args:
        model: any module; it is not changed.
        targets: `"all"`, `"deep"`, `"middle"`, `"shallow"`; a regex (fullmatch); a list of full names or
            dotted suffixes; or a callable `(name, module) -> bool`.

    Raises:
        ValueError: nothing matched, or a listed layer cannot be adapted (the reason is given).
        TypeError: `targets` of another type, or a chosen layer with quantised, integer or meta weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [t.name for t in select(net, "deep").adapted]
        ['2']
        >>> select(net, ["3"])
        Traceback (most recent call last):
        ...
        ValueError: targets: got '3', which is no layer of this model; its layers are 0, 2
    """
    layers = {name: module for name, module in model.named_modules() if name and _looks_adaptable(module)}
    if kind_of(model) is not None:
        raise ValueError(
            f"model: got a bare {type(model).__name__}, expected one with named layers; wrap it: nn.Sequential(model)"
        )
    if not layers:
        raise ValueError(f"model: got {type(model).__name__}, expected one with Linear, Conv2d or Conv1D layers")
    obstacles, experts = _Obstacles(model), _fused_experts(model)
    blocks = repeated_blocks(model)
    placed = isinstance(targets, str) and targets in PLACEMENTS
    if isinstance(targets, str) and placed:
        chosen, reasons, head = _by_placement(model, layers, blocks, targets, obstacles)
        listed: set[str] = set()
    else:
        chosen, listed = _by_user(layers, targets)
        reasons, head = {name: "not matched by targets" for name in layers if name not in chosen}, None
    adapted: list[Target] = []
    for name in chosen:
        module = layers[name]
        if _QUANTISED.search(type(module).__module__):
            _check_weight(name, module)
        reason = obstacles.of(name, module)
        if reason is not None and name in listed:
            raise ValueError(f"targets: got {name!r}, which cannot be adapted: {reason}")
        if reason is not None:
            reasons[name] = reason
            continue
        _check_weight(name, module)
        kind = kind_of(module)
        if kind is not None:
            tied = obstacles.tied_head(name)
            adapted.append(Target(name, kind, is_head=name == head, tied_to=tied, is_placed=placed))
    if not adapted:
        asked_first = sorted(reasons, key=lambda n: n not in chosen)
        shown = [*experts[:1], *(Skipped(name, reasons[name]) for name in asked_first[:5])]
        why = "; ".join(f"{skip.name}: {skip.reason}" for skip in shown)
        raise ValueError(
            f"targets: got {targets!r}, which matched no layer that can be adapted; "
            f"layers are {some(layers, 12)}; {why}{_near(targets, layers)}"
        )
    taken = {t.name for t in adapted}
    skipped = tuple(Skipped(name, reasons.get(name, "not selected")) for name in layers if name not in taken)
    return Plan(tuple(adapted), (*skipped, *experts), tuple(blocks))


def _fused_experts(model: nn.Module) -> list[Skipped]:
    """A mixture's experts where they are no layers of their own but slices of one tensor `(experts, …, …)`."""
    return [
        Skipped(name, "a mixture's experts in one tensor, which has no place for adapters: they stay as they are")
        for name, module in model.named_modules()
        if re.search("expert", f"{name.rpartition('.')[2]} {type(module).__name__}", re.IGNORECASE)
        and any(p is not None and p.ndim == 3 and p.is_floating_point() for p in module._parameters.values())
    ]


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the outermost modules that repeat: same class, children of a Sequential or ModuleList.

    A model without any (a plain stack of layers) has its adaptable layers for blocks.

    Example:
        >>> repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        ['0', '1']
    """
    members: dict[type, list[str]] = {}
    for parent_name, parent in model.named_modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for child_name, child in parent.named_children():
                compound = not isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict) and any(
                    child.children()
                )
                if compound and any(_looks_adaptable(m) for m in child.modules()):
                    members.setdefault(type(child), []).append(f"{parent_name}.{child_name}".lstrip("."))
    repeated = {name for names in members.values() if len(names) > 1 for name in names}
    if not repeated:
        modules = dict(model.named_modules())
        return [n for n, m in modules.items() if n and _looks_adaptable(m) and not _in_other_adapter(modules, n)]
    order = [name for name, _ in model.named_modules() if name in repeated]
    return [name for name in order if not any(name.startswith(f"{other}.") for other in repeated if other != name)]


def _by_placement(
    model: nn.Module, layers: dict[str, nn.Module], blocks: list[str], placement: str, obstacles: _Obstacles
) -> tuple[list[str], dict[str, str], str | None]:
    """The paper's placement: block convolutions and feed-forward linears, and the classification head."""
    n = len(blocks)
    half = max(1, n // 2)
    span = {
        "all": range(n),
        "deep": range(n // 2, n),
        "shallow": range(half),
        "middle": range(n // 4, n // 4 + half),
    }[placement]
    where = {
        name: next((i for i, b in enumerate(blocks) if name == b or name.startswith(f"{b}.")), None) for name in layers
    }
    head = _classification_head(layers, where, blocks, obstacles)
    chosen: list[str] = []
    reasons: dict[str, str] = {}
    for name, module in layers.items():
        index = where[name]
        if name == head:
            if placement in ("all", "deep"):
                chosen.append(name)
            else:
                reasons[name] = f"the classification head belongs to 'all' and 'deep', not to {placement!r}"
        elif obstacles.is_lm_head(name):
            reasons[name] = "a language-model head is adapted only when it is named"
        elif index is None:
            reasons[name] = "outside the repeated blocks"
        elif index not in span:
            reasons[name] = f"block {blocks[index]} is not among targets={placement!r}"
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            reasons[name] = (
                "grouped convolution: a low-rank pair across groups could not be merged; name it to adapt it"
            )
        elif getattr(module, "out_features", 0) == 1:
            reasons[name] = "a gate with a single output: it weighs a branch and has no feature to align"
        elif not isinstance(module, nn.Conv2d) and _in_attention(model, name):
            reasons[name] = "attention projection: the paper adapts the feed-forward layers"
        else:
            chosen.append(name)
    return chosen, reasons, head


def _by_user(layers: dict[str, nn.Module], targets: Targets) -> tuple[list[str], set[str]]:
    """Names matched by a regex, a list or a callable; and those that a list named one by one."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets: got {targets!r}, expected one of {PLACEMENTS}, a list, a callable or a regex ({error})"
            ) from error
        return [name for name in layers if pattern.fullmatch(name)], set()
    if callable(targets):
        return [name for name, module in layers.items() if targets(name, module)], set()
    if isinstance(targets, Sequence | set | frozenset) and all(isinstance(t, str) for t in targets):
        matched: set[str] = set()
        for wanted in targets:
            hits = [name for name in layers if name == wanted or name.endswith(f".{wanted}")]
            if not hits:
                raise ValueError(
                    f"targets: got {wanted!r}, which is no layer of this model; its layers are {some(layers, 12)}"
                    f"{_near(wanted, layers)}"
                )
            matched.update(hits)
        return [name for name in layers if name in matched], matched
    raise TypeError(
        f"targets: got {targets!r}, expected a string, a list of names or a callable (name, module) -> bool"
    )


class _Obstacles:
    """Why a layer of this model could not be adapted, computed from one walk over the modules."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names_of: dict[int, list[str]] = {}
        self.owners_of: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            self.names_of.setdefault(id(module), []).append(name)
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    owner = name if key == "weight" else f"{name}.{key}".lstrip(".")
                    self.owners_of.setdefault(id(parameter), []).append(owner)
        self.output_embeddings = output_embeddings(model)

    def is_lm_head(self, name: str) -> bool:
        """The layer that turns hidden states into vocabulary logits."""
        return self.modules[name] is self.output_embeddings or bool(_LM_HEAD.search(name))

    def tied_head(self, name: str) -> str | None:
        """The module a language-model head shares its weight with."""
        others = [n for n in self._sharers(name) if n != name]
        return others[0] if others and self.is_lm_head(name) else None

    def of(self, name: str, module: nn.Module) -> str | None:
        """The reason, or `None` when nothing is in the way."""
        if _in_other_adapter(self.modules, name):
            return "another library's adapter: adapt the layer it belongs to, its base_layer"
        parent = self.modules[name.rpartition(".")[0]]
        base = {"linear": nn.Linear, "conv2d": nn.Conv2d}.get(kind_of(module) or "")
        if isinstance(parent, nn.MultiheadAttention):
            return (
                "nn.MultiheadAttention reads it by a functional call, not as a module: adapting it would train nothing"
            )
        if isinstance(parent, nn.TransformerEncoderLayer):
            return "nn.TransformerEncoderLayer reads it by a functional call on its fast path"
        if base is not None and not inherits_forward(type(module), base):
            return f"{type(module).__name__} has a forward of its own: the low-rank branch would not see the same input"
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance (by a hook of another library): unwrap the model first"
        if module._parameters.get("weight") is None:
            return "its weight is computed on the fly (a parametrisation): remove the parametrisation first"
        names = self.names_of[id(module)]
        if len(names) > 1:
            return f"one module under several names ({', '.join(names)}): one adapter cannot align two features"
        sharers = [n for n in self._sharers(name) if n != name]
        if sharers and not self.is_lm_head(name):
            return f"its weight is shared with {', '.join(sharers)}: merging would change those too"
        return None

    def _sharers(self, name: str) -> list[str]:
        weight = self.modules[name]._parameters.get("weight")
        return [] if weight is None else self.owners_of.get(id(weight), [])


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """A transformers model's language-model head, that of a wrapped one too, or `None`."""
    getter = getattr(unwrapped(model), "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def sequence_first(model: nn.Module, name: str) -> bool:
    """Whether axis 0 of the layer's input may be the sequence.

    It may when a module around the layer declares `batch_first=False`, or holds an attention or recurrent layer that
    does: torch's transformer layers, and most models around an `nn.LSTM`, say nothing themselves.
    """
    parts = name.split(".")
    for ancestor in (model.get_submodule(".".join(parts[:i])) for i in range(len(parts))):
        speakers = [m for m in ancestor.children() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
        if any(getattr(m, "batch_first", None) is False for m in (ancestor, *speakers)):
            return True
    return False


def _classification_head(
    layers: dict[str, nn.Module], where: dict[str, int | None], blocks: list[str], obstacles: _Obstacles
) -> str | None:
    """The last linear layer behind the blocks (or of a plain stack), unless the model predicts tokens."""
    if obstacles.output_embeddings is not None:
        return None
    order = list(layers)
    inside = [i for i, name in enumerate(order) if where[name] is not None]
    stack_of_layers = all(b in layers for b in blocks)
    last_block = -1 if stack_of_layers or not inside else inside[-1]
    behind = [
        name
        for i, name in enumerate(order)
        if i > last_block and kind_of(layers[name]) == "linear" and not _POOLER.search(name)
        and not obstacles.is_lm_head(name) and not _in_other_adapter(obstacles.modules, name)
    ]  # fmt: skip
    return behind[-1] if behind else None


def _in_other_adapter(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the layer belongs to a PEFT adapter rather than to the layer that PEFT wrapped, its `base_layer`."""
    parts = name.split(".")
    return any(
        part != "base_layer" and is_a(modules.get(".".join(parts[:i])), "BaseTunerLayer")
        for i, part in enumerate(parts)
    )


def _in_attention(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    if any(_ATTENTION.search(part) for part in parts):
        return True
    return any("Attention" in type(model.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts)))


def _looks_adaptable(module: nn.Module) -> bool:
    return kind_of(module) is not None or (
        bool(_QUANTISED.search(type(module).__module__))
        and (hasattr(module, "in_features") or hasattr(module, "in_channels"))
    )


def inherits_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class computes what its base does.

    Example:
        >>> inherits_forward(nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Linear)
        True
    """
    return cls.forward is base.forward and getattr(cls, "_conv_forward", None) is getattr(base, "_conv_forward", None)


def _check_weight(name: str, module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    expected = "expected floating-point weights on a real device; load the model unquantised"
    if weight is None or _QUANTISED.search(type(module).__module__):
        raise TypeError(f"layer {name!r}: got quantised weights ({type(module).__name__}), {expected}")
    if weight.device.type == "meta" or isinstance(weight, nn.parameter.UninitializedParameter):
        raise TypeError(
            f"layer {name!r}: got meta or uninitialised weights, expected real ones: load the weights first"
        )
    home = type(weight).__module__
    if (
        not home.startswith("torch.")
        or _QUANTISED.search(home)
        or not weight.is_floating_point()
        or weight.dtype.itemsize < 2
    ):
        raise TypeError(f"layer {name!r}: got {type(weight).__name__} weights of {weight.dtype}, {expected}")


def _near(targets: object, layers: Iterable[str]) -> str:
    wanted = [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, Sequence) else []
    names = list(layers)
    hits: list[str] = []
    for text in wanted:
        pool = {**{n: n for n in names}, **{n.rpartition(".")[2]: n for n in reversed(names)}}
        hits += [pool[m] for m in difflib.get_close_matches(str(text), list(pool), n=3, cutoff=0.5)]
    return f"; near misses: {', '.join(dict.fromkeys(hits))}" if hits else ""
