"""Compulsory bytes: what a sequence of launches must move if every tensor it touches were read and written once.

A kernel's inputs count once and its outputs once, whatever its tiles read twice. Which pointer is which stands in
`ACCESS`, per kernel, as two fractions of the tensor behind it: read and written, given the launch's flags and which
rows are to be forgotten; sizes come from the tensors of the captured launch. The interpreter checks the table: the
different bytes it sees a kernel touch are these (`counting.py`). What torch does between the kernels (sums of
partial results, r × r products, a vendor's GEMM) is counted from torch's own dispatch: every tensor argument once,
every result once, views and empty buffers not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from compiling import Launch
from rfa_fast.kernels.common import observed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Groups:
    """How many of the group's entries (rows, or samples) are to be kept and to be forgotten."""

    total: int
    forget: int

    @property
    def forget_share(self) -> float:
        return self.forget / self.total

    @property
    def retain_share(self) -> float:
        return 1 - self.forget_share


@dataclass
class Item:
    """One launch, or one operation of torch."""

    name: str
    read: float
    written: float
    flops: float = 0.0
    kernel: bool = False
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def moved(self) -> float:
        return self.read + self.written


def elements(tensor: Tensor) -> int:
    """Different elements of a tensor: an expanded axis is one element long."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 or size == 0 else 1
    return count


def size_of(tensor: Tensor) -> int:
    """Bytes of :func:`elements`."""
    return elements(tensor) * tensor.element_size()


Share = tuple[float, float]
Flags = Mapping[str, Any]
Rule = Callable[[Flags, Groups], Share]


def _reads(share: Callable[[Flags, Groups], float] = lambda a, g: 1.0) -> Rule:
    return lambda a, g: (float(share(a, g)), 0.0)


def _writes(share: Callable[[Flags, Groups], float] = lambda a, g: 1.0) -> Rule:
    return lambda a, g: (0.0, float(share(a, g)))


def _flag(name: str) -> Callable[[Flags, Groups], float]:
    return lambda a, g: float(bool(a[name]))


def _unless(name: str) -> Callable[[Flags, Groups], float]:
    return lambda a, g: float(not a[name])


def _goal(a: Flags, g: Groups) -> float:
    """x̃: whole where all rows (samples) share it, else those that are to be forgotten."""
    return _aimed(a["goal_ptr"], g.forget_share) * bool(a["HAS_GOAL"])


def _kept(a: Flags, g: Groups) -> float:
    return _aimed(a["kept_ptr"], g.retain_share) * bool(a["HAS_KEPT"])


def _aimed(target: Tensor, share: float) -> float:
    return 1.0 if target.shape[0] == 1 or target.stride(0) == 0 else share


def _differs(a: Flags, g: Groups) -> float:
    """Rows or samples on which G' is not G."""
    return g.forget_share * bool(a["HAS_GOAL"]) + g.retain_share * bool(a["HAS_KEPT"])


def _both(a: Flags, g: Groups) -> float:
    """Of a pair of error sums, retain and forget, those that were asked for."""
    return (bool(a["HAS_GOAL"]) + bool(a["HAS_KEPT"])) / 2


def _measured(a: Flags, g: Groups) -> float:
    return float(bool(a["HAS_GOAL"] or a["HAS_KEPT"] or a.get("HAS_COLUMNS", False)))


def _moved_rows(a: Flags, g: Groups) -> float:
    return {0: 0.0, 1: g.forget_share, 2: 1.0}[a["SELECT"]]


def _linear_forward_flops(a: Flags) -> float:
    m, n, k, r = a["M"], a["N"], a["K"], a["R"]
    return 2.0 * m * (n * k * (not a["HAS_PRODUCT"]) + n * r + k * r * bool(a["FUSE_DOWN"]))


def _conv2d_forward_flops(a: Flags) -> float:
    window, r = a["C"] * a["TAPS"], a["R"]
    low_rank = {0: 0, 1: a["N"] * r, 2: a["N"] * r + window * r}[a["LOW_RANK"]]
    return 2.0 * a["M"] * a["GROUPS"] * (a["N"] * window + low_rank)


def _conv2d_input_gradient_flops(a: Flags) -> float:
    outputs = a["SAMPLES"] * a["OUT_HEIGHT"] * a["OUT_WIDTH"]
    inputs = a["dx_ptr"].shape[1]  # of all groups
    return 2.0 * outputs * inputs * a["KERNEL_HEIGHT"] * a["KERNEL_WIDTH"] * (a["N"] + a["R"])


ACCESS: dict[str, dict[str, Rule]] = {
    "linear_forward": {
        "x_ptr": _reads(_unless("HAS_PRODUCT")),
        "w_ptr": _reads(_unless("HAS_PRODUCT")),
        "bias_ptr": _reads(_flag("HAS_BIAS")),
        "a_ptr": _reads(_flag("FUSE_DOWN")),
        "b_ptr": _reads(),
        "h_ptr": lambda a, g: (float(not a["FUSE_DOWN"]), float(bool(a["FUSE_DOWN"]))),
        "group_ptr": _reads(_flag("HAS_GROUP")),
        "goal_ptr": _reads(_goal),
        "kept_ptr": _reads(_kept),
        "y_ptr": lambda a, g: (float(bool(a["HAS_PRODUCT"])), 1.0),
        "delta_ptr": _writes(_flag("EMIT_DELTA")),
        "columns_ptr": _writes(lambda a, g: {0: 0.0, 1: 1 / 3, 2: 1.0}[a["COLUMNS"]]),
        "counts_ptr": _writes(lambda a, g: a["COLUMNS"] > 0),
        "rows_ptr": _writes(_both),
    },
    "lora_down": {"x_ptr": _reads(), "a_ptr": _reads(), "h_ptr": _writes()},
    "feature_mean": {
        "columns_ptr": _reads(lambda a, g: 1.0 if a["WITH_LOSS"] else 1 / 3),
        "counts_ptr": _reads(lambda a, g: 1.0 if a["WITH_LOSS"] else 1 / 2),
        "fallback_ptr": _reads(_flag("HAS_FALLBACK")),
        "known_ptr": _reads(_flag("HAS_FALLBACK")),
        "mean_ptr": _writes(),
        "loss_ptr": _writes(_flag("WITH_LOSS")),
    },
    "row_error": {
        "y_ptr": _reads(lambda a, g: g.forget_share),
        "goal_ptr": _reads(),
        "group_ptr": _reads(),
        "error_ptr": _writes(),
    },
    "linear_gradient": {
        "g_ptr": _reads(),
        "y_ptr": _reads(_differs),
        "h_ptr": _reads(),
        "b_ptr": _reads(),
        "group_ptr": _reads(_measured),
        "forget_ptr": _reads(lambda a, g: g.forget_share * bool(a["HAS_GOAL"])),
        "retain_ptr": _reads(lambda a, g: g.retain_share * bool(a["HAS_KEPT"])),
        "goal_ptr": _reads(_goal),
        "kept_ptr": _reads(_kept),
        "changed_ptr": _writes(
            lambda a, g: float(bool(a["HAS_GOAL"] or a["HAS_KEPT"])) if a["WRITE_ALL"] else _differs(a, g)
        ),
        "u_ptr": _writes(),
        "db_ptr": _writes(),
    },
    "linear_input_gradient": {
        "g_ptr": _reads(lambda a, g: (1 - _moved_rows(a, g)) * (not a["HAS_PRODUCT"])),
        "changed_ptr": _reads(_moved_rows),
        "group_ptr": _reads(lambda a, g: a["SELECT"] > 0),
        "w_ptr": _reads(_unless("HAS_PRODUCT")),
        "u_ptr": _reads(),
        "a_ptr": _reads(),
        "dx_ptr": lambda a, g: (float(bool(a["HAS_PRODUCT"])), 1.0),
    },
    "lora_a_gradient": {"u_ptr": _reads(), "x_ptr": _reads(), "da_ptr": _writes()},
    "conv2d_forward": {
        "x_ptr": _reads(),
        "w_ptr": _reads(),
        "bias_ptr": _reads(_flag("HAS_BIAS")),
        "a_ptr": _reads(lambda a, g: a["LOW_RANK"] == 2),
        "b_ptr": _reads(_flag("LOW_RANK")),
        "h_ptr": lambda a, g: (float(a["LOW_RANK"] == 1), float(a["LOW_RANK"] == 2)),
        "group_ptr": _reads(_measured),
        "goal_ptr": _reads(_goal),
        "kept_ptr": _reads(_kept),
        "y_ptr": _writes(),
        "rows_ptr": _writes(_measured),
    },
    "conv2d_sample_mean": {
        "x_ptr": _reads(lambda a, g: g.retain_share),
        "group_ptr": _reads(),
        "mean_ptr": _writes(),
    },
    "conv2d_epilogue": {
        "z_ptr": _reads(),
        "h_ptr": _reads(),
        "bias_ptr": _reads(_flag("HAS_BIAS")),
        "b_ptr": _reads(),
        "group_ptr": _reads(_measured),
        "goal_ptr": _reads(_goal),
        "kept_ptr": _reads(_kept),
        "y_ptr": _writes(),
        "hidden_ptr": _writes(_flag("COPY_HIDDEN")),
        "columns_ptr": _writes(_flag("HAS_COLUMNS")),
        "counts_ptr": _writes(_flag("HAS_COLUMNS")),
        "errors_ptr": _writes(lambda a, g: float(bool(a["HAS_GOAL"] or a["HAS_KEPT"]))),
    },
    "conv2d_gradient": {
        "g_ptr": _reads(),
        "y_ptr": _reads(_differs),
        "h_ptr": _reads(),
        "b_ptr": _reads(),
        "group_ptr": _reads(_measured),
        "forget_ptr": _reads(_flag("HAS_GOAL")),
        "retain_ptr": _reads(_flag("HAS_KEPT")),
        "goal_ptr": _reads(_goal),
        "kept_ptr": _reads(_kept),
        "changed_ptr": _writes(_flag("HAS_CHANGED")),
        "u_ptr": _writes(),
        "db_ptr": _writes(),
    },
    "conv2d_input_gradient": {
        "g_ptr": _reads(),
        "w_ptr": _reads(),
        "u_ptr": _reads(),
        "a_ptr": _reads(),
        "dx_ptr": _writes(),
    },
    "conv2d_lora_a_gradient": {"u_ptr": _reads(), "x_ptr": _reads(), "da_ptr": _writes()},
    "conv2d_retain_energy": {
        "h_ptr": _reads(lambda a, g: g.retain_share),
        "gram_ptr": _reads(),
        "group_ptr": _reads(),
        "energy_ptr": _writes(),
    },
    "conv2d_retain_gradient": {
        "parts_ptr": _reads(),
        "h_ptr": _reads(lambda a, g: g.retain_share * bool(a["HAS_RETAIN"])),
        "gram_ptr": _reads(_flag("HAS_RETAIN")),
        "weight_ptr": _reads(_flag("HAS_RETAIN")),
        "u_ptr": _writes(),
        "k_ptr": _writes(_flag("HAS_RETAIN")),
    },
}

FLOPS: dict[str, Callable[[Flags], float]] = {
    "linear_forward": _linear_forward_flops,
    "lora_down": lambda a: 2.0 * a["M"] * a["K"] * a["R"],
    "linear_gradient": lambda a: 4.0 * a["M"] * a["N"] * a["R"],
    "linear_input_gradient": lambda a: 2.0 * a["M"] * a["K"] * (a["N"] * (not a["HAS_PRODUCT"]) + a["R"]),
    "lora_a_gradient": lambda a: 2.0 * a["M"] * a["K"] * a["R"],
    "conv2d_forward": _conv2d_forward_flops,
    "conv2d_epilogue": lambda a: 2.0 * a["SAMPLES"] * a["PIXELS"] * a["UNIT_N"] * a["GROUPS"] * a["N"] * a["R"],
    "conv2d_gradient": lambda a: 4.0 * a["SAMPLES"] * a["PIXELS"] * a["UNIT_N"] * a["GROUPS"] * a["N"] * a["R"],
    "conv2d_input_gradient": _conv2d_input_gradient_flops,
    "conv2d_lora_a_gradient": lambda a: 2.0 * a["M"] * a["GROUPS"] * a["R"] * a["C"] * a["TAPS"],
    "conv2d_retain_energy": lambda a: 2.0 * a["M"] * a["GROUPS"] * a["R"] * a["R"],
    "conv2d_retain_gradient": lambda a: 4.0 * a["M"] * a["GROUPS"] * a["R"] * a["R"] * bool(a["HAS_RETAIN"]),
}


def kernel_item(launch: Launch, groups: Groups) -> Item:
    """The compulsory bytes of a launch, as `ACCESS` declares them.

    Raises:
        ValueError: a kernel, or a pointer of one, that the table does not know.
    """
    rules = ACCESS.get(launch.name)
    pointers = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    if rules is None or set(rules) != set(pointers):
        known = None if rules is None else sorted(rules)
        raise ValueError(f"traffic.ACCESS[{launch.name!r}]: got {known}, expected {sorted(pointers)}")
    parts = {}
    for name, tensor in pointers.items():
        read, written = rules[name](launch.arguments, groups)
        if read or written:
            parts[name] = (read * size_of(tensor), written * size_of(tensor))
    flops = FLOPS[launch.name](launch.arguments) if launch.name in FLOPS else 0.0
    read, written = (sum(part[i] for part in parts.values()) for i in (0, 1))
    return Item(launch.name, read, written, flops, kernel=True, parts=parts)


class _Torch(TorchDispatchMode):
    """Records torch's own operations among the launches."""

    def __init__(self, record: Callable[[Item], None]) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name.startswith("convolution"):
            result = tree_map(lambda t: _laid_out_like(t, args), result)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if view or "empty" in name or name in ("detach", "lift_fresh", "alias"):
            return result
        inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        flops = 0.0
        if func._overloadpacket in flop_registry:
            flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
        read = 0 if name.startswith(("zero", "fill", "full")) else sum(map(size_of, inputs.values()))
        self.record(Item(name, read, sum(map(size_of, outputs)), flops))
        return result


def _laid_out_like(result: Any, operands: Any) -> Any:
    """A convolution's result in its operands' memory format.

    A channels-last image gives a channels-last result on a CPU and on a GPU; meta tensors alone forget it, and would
    show a copy into the format that never takes place.
    """
    images = [t for t in tree_leaves(operands) if isinstance(t, Tensor) and t.ndim == 4]
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in images)
    if not last or not isinstance(result, Tensor) or result.ndim != 4:
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)


def record(run: Callable[[], Any], groups: Groups) -> tuple[Any, list[Item]]:
    """Run `run` on meta tensors: its result, and what it would launch in order."""
    items: list[Item] = []

    def observer(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        items.append(kernel_item(Launch(kernel, tuple(grid), dict(arguments)), groups))

    with observed(observer), _Torch(items.append):
        result = run()
    return result, items


def gathered(items: list[Item]) -> list[Item]:
    """The launches one by one, and what torch does between them as one item of its own at the end."""
    kernels = [item for item in items if item.kernel or item.flops >= 1e9]
    small = [item for item in items if not (item.kernel or item.flops >= 1e9)]
    if not small:
        return kernels
    rest = Item(f"{len(small)} small operations of torch", *(sum(getattr(i, n) for i in small) for n in _SUMMED))
    return [*kernels, rest]


_SUMMED = ("read", "written", "flops")
