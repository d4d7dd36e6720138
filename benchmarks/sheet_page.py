"""docs/kernels.md, written from what was compiled, counted and computed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from layers import RANK, TUNED_FOR, Unfused
from roofline import DEVICES, seconds
from sheet_compile import Row
from sheet_traffic import Traffic
from traffic import Item

_HEAD = """# The kernels: what they compile to, and what they move

Written by `make kernel-sheet`; do not edit. **No GPU has run any of this.** Every figure says how it came about:

- **compiled**: Triton {triton} compiled each launch, captured from its launcher, for the target named, with the
  specialisation its runtime would choose; registers and spills are `cuobjdump --dump-resource-usage` of the cubin
  (local memory and stack count as spills) or the metadata of the AMD assembly (vector registers of both kinds,
  scratch); shared memory is Triton's own figure; matrix instructions are those in the PTX or the assembly.
- **computed**: occupancy from these and the architecture's limits (`benchmarks/occupancy.py` has the formula and its
  sources); roofline times from bytes, operations and data-sheet peaks (`benchmarks/roofline.py`):
  `time = max(bytes / bandwidth, FLOP / peak)`, launch by launch, summed.
- **counted**: requested bytes are active mask lanes × element size of every load and store of every program of the
  grid, run in Triton's interpreter at the layer's real size; products and 16-bit conversions are skipped there,
  because masks and addresses do not depend on them (a test compares with a full run).
- **declared and checked**: compulsory bytes take every tensor a launch reads once and every tensor it writes once.
  `benchmarks/traffic.py` declares which these are; the interpreter's count of *different* bytes must be the same
  wherever requested bytes stand below; the end of this page names any exception.

torch {torch}, Python {python}. How fast the kernels are is another question: `make bench-gpu` answers it on a GPU.
"""


def page(rows: Sequence[Row], traffics: Sequence[Traffic], *, partial: bool = False, faults: Sequence[str] = ()) -> str:
    """The whole document; `partial`: options left something out; `faults`: what is not as it should be."""
    facts = {"triton": version("triton"), "torch": version("torch"), "python": platform.python_version()}
    note = "**A part of the sheet only: options left the rest out.**" if partial else ""
    parts = [_HEAD.format(**facts), note, _compiled(rows), _traffic(traffics), _faults(faults)]
    return "\n".join(part.strip() + "\n" for part in parts if part)


def table(heads: Sequence[str], body: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """A table in Markdown; columns in `right` are set flush right."""
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    lines = [heads, rule, *([str(cell) for cell in line] for line in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(instruction: str) -> str:
    """A matrix instruction without what is always the same.

    Example:
        >>> short("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16")
        'wgmma m64n128k16'
    """
    for word in (".sync.aligned", ".mma_async", ".row.col", ".f32", ".bf16", ".f16", ".cta_group::1", "_bf16", "_f16"):
        instruction = instruction.replace(word, "")
    return instruction.replace("mma.m", "mma.sync m").replace("wgmma.", "wgmma ").replace(".kind::f16", "")


def _faults(faults: Sequence[str]) -> str:
    return "\n".join(["## Not as it should be", "", *(f"- {fault}" for fault in faults)]) if faults else ""


def _compiled(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    narrow = [row for row in rows if row.dtype != "fp32"]
    cases = sum(row.cases for row in rows)
    spilled = sum(len(row.spills) for row in rows)
    parts = [
        f"""## Compiled

{cases} compilations: every kernel of `kernels/`, every configuration of `kernels/tuning.py`, five targets; bf16 with
rank 8 and 64, fp16 with rank 8, every option that leads to different code (`benchmarks/cases.py`). A row stands for
all its cases: registers from the least to the most, everything else at its worst. **{spilled} of them spill.**
"generic" rows are the configuration that any other GPU takes, here on sizes that nothing divides
(77 × 133 × 99, say), which take it on these GPUs as well.

For comparison: LoRAFusion's forward kernel, which computes no loss, compiles to 208 registers on sm_90 (128 × 256 × 64,
8 warps) and to 244 on sm_80 (128 × 128 × 32, 4 warps), without spills."""
    ]
    for kernel in dict.fromkeys(row.kernel for row in narrow):
        own = [row for row in narrow if row.kernel == kernel]
        parts.append(f"### `{kernel}`\n\n" + _kernel_table(own))
    wide = [row for row in rows if row.dtype == "fp32"]
    if wide:
        text = """### fp32

fp32 operands take the generic configuration at half the depth, or a smaller one where that would spill. Exact products
run outside the tensor cores, one fused multiply-add at a time."""
        body = [
            (
                f"`{row.kernel}`",
                row.target,
                row.config,
                row.cases,
                _span(row.registers),
                row.spilled,
                _kib(row.shared),
                f"{row.occupancy:.0%}",
            )
            for row in wide
        ]
        heads = ("kernel", "target", "configuration", "cases", "registers", "spilled bytes", "shared KiB", "occupancy")
        parts.append(text + "\n\n" + table(heads, body, right=(3, 4, 5, 6, 7)))
    return "\n\n".join(parts)


def _kernel_table(rows: Sequence[Row]) -> str:
    heads = (
        "target", "configuration", "dtype", "cases", "registers", "spilled bytes", "shared KiB", "blocks per SM",
        "occupancy", "bound by", "matrix instruction",
    )  # fmt: skip
    body = []
    for row in rows:
        found = ", ".join(dict.fromkeys(short(name) for name in row.instructions)) or "–"
        body.append(
            (
                row.target, row.config + (" (generic)" if row.generic else ""), row.dtype, row.cases,
                _span(row.registers), row.spilled, _kib(row.shared), row.blocks, f"{row.occupancy:.0%}", row.bound_by,
                found,
            )
        )  # fmt: skip
    return table(heads, body, right=(3, 4, 5, 6, 7, 8))


def _span(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}–{values[1]}"


def _kib(size: int) -> str:
    return f"{size / 1024:.1f}"


def _traffic(traffics: Sequence[Traffic]) -> str:
    if not traffics:
        return ""
    peaks = "; ".join(f"{name} {d.bandwidth / 1e12:g} TB/s, {d.flops / 1e12:g} TFLOP/s" for name, d in DEVICES.items())
    parts = [
        f"""## Bytes of real layers

bf16, rank {RANK}, squared norm, residual mode, x̃ computed inside, every second row (sample) to be forgotten; launched
as the operators launch it, with the configurations of {TUNED_FOR}. "unfused" is the same work in steps: a masked read
counts only the rows it needs (half), a new tensor that a later step reads whole is written whole. "minimum" is x, W
and y (backward: G, W and dX), each once. Small operations of torch are the sums of partial results and the r × r
products between our kernels; they are counted as torch dispatches them, and run outside the interpreter.

Roofline peaks: {peaks} (dense bf16)."""
    ]
    summary = []
    for t in traffics:
        bound, held = f"≤ {t.bound:.2f}", "held" if t.held else "**not held**"
        summary.append(
            (
                t.layer.name,
                t.passed,
                _mb(t.moved),
                _mb(t.moved_unfused),
                f"{t.ratio:.3f}",
                bound,
                held,
                _mb(t.layer.minimum),
            )
        )
    heads = ("layer", "pass", "ours MB", "unfused MB", "ratio", "bound", "", "minimum MB")
    parts.append(table(heads, summary, right=(2, 3, 4, 5, 7)))
    for t in traffics:
        parts.append(f"### {t.layer.name}: {t.passed}\n\n" + _lists(t))
    return "\n\n".join(parts)


def _lists(t: Traffic) -> str:
    heads = ("ours", "read MB", "written MB", "compulsory MB", "requested MB", "GFLOP", *(f"{d} µs" for d in DEVICES))
    body = []
    asked = list(t.requested) or [None] * len(t.ours)
    for item, requested in zip(t.ours, asked, strict=True):
        name = f"`{item.name}`" if item.kernel else item.name
        body.append(_line(name, item, "–" if requested is None else _mb(requested)))
    counted = sum(r for r in asked if r is not None)
    body.append(_sum(t.ours, _mb(counted) if counted else "–"))
    ours = table(heads, body, right=tuple(range(1, len(heads))))
    body = [_line(item.name, item, None) for item in t.unfused]
    body.append(_sum(t.unfused, None))
    heads = ("unfused", "read MB", "written MB", "compulsory MB", "GFLOP", *(f"{d} µs" for d in DEVICES))
    return ours + "\n\n" + table(heads, body, right=tuple(range(1, len(heads))))


def _line(name: str, item: Item | Unfused, requested: str | None) -> tuple[str, ...]:
    times = tuple(f"{seconds(d, item.moved, item.flops) * 1e6:.1f}" for d in DEVICES)
    middle = () if requested is None else (requested,)
    return (name, _mb(item.read), _mb(item.written), _mb(item.moved), *middle, f"{item.flops / 1e9:.2f}", *times)


def _sum(items: Sequence[Item] | Sequence[Unfused], requested: str | None) -> tuple[str, ...]:
    read, written, flops = (sum(getattr(item, name) for item in items) for name in ("read", "written", "flops"))
    times = tuple(f"{sum(seconds(d, item.moved, item.flops) for item in items) * 1e6:.1f}" for d in DEVICES)
    middle = () if requested is None else (requested,)
    cells = ("sum", _mb(read), _mb(written), _mb(read + written), *middle, f"{flops / 1e9:.2f}", *times)
    return tuple(f"**{cell}**" for cell in cells)


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"
