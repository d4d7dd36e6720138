"""docs/benchmarks.md and its plots, from whatever parts were measured; nothing is measured here.

What a person has to say about a part (what was tried where a figure does not hold) stands in benchmarks/notes, one
Markdown file per part, and is put under its tables as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import step_slice
from sheet_page import table
from step_figures import GIB, Figure, figures_of, growth_series, retain_feature_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTES = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "notes"

HEAD = """# What a step costs

Written by `make bench`; do not edit. Everything here was measured on the machine named under each table, or says that
it was counted. A step is all of it: forward, loss, backward, AdamW, gradients freed, on tokens no step saw before;
compilation happens in the warm-up. Contenders run in one process in turns (A B C A B C …) on shared frozen weights;
times are medians with quartiles, ratios are between medians of the same run. Before a row is timed our total is
compared with the reference backend's under the error rule (at most twice as far from float64, at a small vocabulary),
every contender's first gradient must have a norm above 0, and after the timed steps every `lora_b` must have moved.
Adapters are fp32, dropout is off and BatchNorm keeps its statistics in every contender.

**floor**: the bare matrix products of our step, in the model's dtype, the layout and the order in which torch
dispatches them: the forward of every frozen layer, of attention (a causal one counts half) and of the head, and only
the backward products that are needed: dX behind the first adapted layer, p·W of the head. No elementwise work, no
low-rank products, no optimiser (`rfa_fast/experiments/floor.py`). **paper**: Fig. 4 with PEFT: student, copied teacher,
hooks on both, full logits. **peft**: PEFT LoRA on the model's own loss, no RFA. **finetune**: every parameter.

Memory is the resident peak after the warm-up of a process that runs one contender, minus one copy of the weights. The
interpreter with its libraries is in it; its share before there is a model stands beside it.
"""


def write(parts: Mapping[str, Mapping[str, Any]], page: Path = PAGE, notes: Path = NOTES) -> list[Path]:
    """Write the page and its plots; returns what was written."""
    pictures = page.with_suffix("")
    written = [page]
    sections = [HEAD, _summary(parts)]
    for name, part in parts.items():
        section = SECTIONS[name](part)
        draw = PLOTS.get(name)
        if draw is not None and part["rows"]:
            pictures.mkdir(parents=True, exist_ok=True)
            place = pictures / f"{name}.png"
            alt = draw(part, place)
            section += f"\n\n![{alt}]({pictures.name}/{name}.png)"
            written.append(place)
        said = notes / f"{name}.md"
        if said.is_file():
            section += "\n\n" + said.read_text(encoding="utf-8").strip()
        sections.append(section)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(section.strip() + "\n" for section in sections if section.strip()), encoding="utf-8")
    return written


def figure_table(figures: Sequence[Figure]) -> str:
    """Figures beside their bounds, in Markdown."""
    body = [
        (f.name, f.beside, f.bound_text(), f"{f.value:.3g}{f.unit}" if f.measured else "–", f.verdict())
        for f in figures
    ]
    return table(("figure", "start, or the paper's", "bound", "measured", ""), body, right=(1, 2, 3))


def _summary(parts: Mapping[str, Mapping[str, Any]]) -> str:
    figures = [f for name, part in parts.items() if name != "profile" for f in figures_of(part) if f.bound is not None]
    if not figures:
        return "Nothing was measured yet."
    held, measured = sum(f.held for f in figures), sum(f.measured for f in figures)
    text = f"**{held} of {len(figures)} bounds hold**"
    return text + ("." if measured == len(figures) else f"; {len(figures) - measured} were not measured.")


def machine(rows: Sequence[Mapping[str, Any]]) -> str:
    """The facts of the rows, each different set once."""
    lines: list[str] = []
    for row in rows:
        f = row["facts"]
        bf16 = "with" if f["bf16 instructions"] else "without"
        line = (
            f"{f['cpu']}, {f['cores']} cores, {f['threads']} threads, {f['capability']} ({bf16} bf16 products), "
            f"{f['memory GiB']} GiB; Python {f['python']}, torch {f['torch']}, transformers {f['transformers']}, "
            f"peft {f['peft']}; {f['date']}"
        )
        if line not in lines:
            lines.append(line)
    return "Measured on: " + " — and: ".join(lines) + "."


def deviations(part: Mapping[str, Any]) -> str:
    """What is not as the issue asks, of the slice."""
    got, asked = (
        {**w["geometry"], **{key: value for key, value in w.items() if key != "geometry"}}
        for w in (part["settings"]["workload"], step_slice.workload("bf16").to_dict())
    )
    other = [f"{key} {got.get(key)} in place of {asked[key]}" for key in asked if got.get(key) != asked[key]]
    if not other:
        return ""
    reason = ""
    if got["dtype"] == "fp32" and part["rows"] and not part["rows"][0]["facts"]["bf16 instructions"]:
        reason = " This CPU has no bf16 products: torch computes them in a loop that nobody would train with."
    return f"**Not the size the bounds were set for: {', '.join(other)}.**{reason}"


def slice_section(part: Mapping[str, Any]) -> str:
    """The slice: figures, rows, machine."""
    heads = (
        "contender", "step, s", "quartiles", "/ floor", "/ ours", "memory above weights, GiB", "of it interpreter",
        "trained", "gradient norm", "graph breaks",
    )  # fmt: skip
    body = []
    for row in part["rows"]:
        s, m = row["seconds"], row.get("memory") or {}
        body.append((
            row["contender"], f"{s['median']:.3g}", f"{s['q1']:.3g}–{s['q3']:.3g}", _number(row["to_floor"]),
            _number(row["to_ours"]), _gib(m.get("above")), _gib(m.get("before")), f"{row['trainable']:,}",
            _number(row["gradient_norm"]), "–" if row["graph_breaks"] is None else row["graph_breaks"],
        ))  # fmt: skip
    extra = retain_feature_bytes(part)
    parts = [
        "## The slice",
        "Qwen2.5-3B's layer geometry and vocabulary, 6 layers, random weights, half of the samples to forget, the "
        "feed-forward linears of the last 3 layers adapted."
        + (f" {part['rows'][0]['facts']['shapes']}." if part["rows"] else ""),
        deviations(part),
        figure_table(figures_of(part)),
        table(heads, body, right=tuple(range(1, 10))),
        "" if math.isnan(extra) else f"One copy of the adapted layers' retain features is {extra / GIB:.3f} GiB.",
        machine(part["rows"]),
    ]
    return "\n\n".join(text for text in parts if text)


def table12_section(part: Mapping[str, Any]) -> str:
    """Table XII's quotient."""
    heads = ("model", "contender", "step, s", "quartiles", "/ floor", "gradient norm")
    body = [
        (
            row["model"], row["contender"], f"{row['seconds']['median']:.3g}",
            f"{row['seconds']['q1']:.3g}–{row['seconds']['q3']:.3g}", _number(row["to_floor"]),
            _number(row["gradient_norm"]),
        )
        for row in part["rows"]
    ]  # fmt: skip
    shapes = "; ".join(dict.fromkeys(row["facts"]["shapes"] for row in part["rows"]))
    parts = [
        "## Table XII: ours / Finetune",
        "Random weights in the real geometry, the paper's batch sizes (128 images, 32 texts), one sample in eight to "
        "be forgotten. Finetune is the faster of eager and compiled. The retain loss is timed alone: its energy and "
        f"its two gradients, every adapted layer at its size. {shapes}.",
        figure_table(figures_of(part)),
        table(heads, body, right=(2, 3, 4, 5)),
        machine(part["rows"]),
    ]
    return "\n\n".join(parts)


def full3b_section(part: Mapping[str, Any]) -> str:
    """The whole Qwen2.5-3B."""
    heads = ("contender", "how", "weights, GiB", "peak, GiB", "peak / weights", "step, s")
    body = []
    for row in part["rows"]:
        seconds = row.get("seconds") or []
        body.append((
            row["contender"], row["kind"], _gib(row["weights"]), _gib(row["peak"]),
            "–" if row["peak"] is None else f"{row['peak'] / row['weights']:.3f}",
            f"{seconds[0]:.3g}" if seconds else "–",
        ))  # fmt: skip
    shapes = "; ".join(dict.fromkeys(row["facts"]["shapes"] for row in part["rows"]))
    parts = [
        "## Qwen2.5-3B, whole",
        "36 layers, 4 × 512 tokens, the upper half adapted, checkpointing on. Live storage is counted on fake tensors "
        "(`rfa_fast/metrics/live_storage.py`): every tensor alive at the worst moment of the second step, in eager; a "
        f"resident peak is measured and holds the interpreter, too. {shapes}.",
        figure_table(figures_of(part)),
        table(heads, body, right=(2, 3, 4, 5)),
        machine(part["rows"]),
    ]
    return "\n\n".join(parts)


def growth_section(part: Mapping[str, Any]) -> str:
    """How the cost grows."""
    series = growth_series(part)
    heads = ("varied", "from", "to", "slope of time", "expected", "slope of memory", "expected")
    body = [
        (
            name, f"{min(s['values']):g}", f"{max(s['values']):g}", _number(s["slope"]), _number(s["expected"]),
            _number(s["memory_slope"]), _number(s["memory_expected"]),
        )
        for name, s in series.items()
    ]  # fmt: skip
    how = "compiled" if part["settings"]["compiled"] else "eager"
    parts = [
        "## How the cost grows",
        f"Our step, residual mode, {how}, 36 layers of a narrow Qwen; one quantity varied at a time, each point in a "
        "process of its own. Slopes are of logarithm against logarithm, over all points. Expected for the time: the "
        "slope of the operations counted at the same points (the floor's and the low-rank products). Expected for the "
        "memory above weights and interpreter: in proportion to the tokens, independent of the rank, at most in "
        "proportion to the adapted layers.",
        table(heads, body, right=tuple(range(1, 7))),
        machine(part["rows"]),
    ]
    return "\n\n".join(parts)


def profile_section(part: Mapping[str, Any]) -> str:
    """Where the time goes."""
    parts = ["## Where the time goes", "The slice's step in eager under torch's profiler; own time of each operation."]
    for row in part["rows"]:
        body = [(f"`{o['name']}`", o["calls"], f"{o['seconds']:.3g}", f"{o['share']:.1%}") for o in row["operations"]]
        parts.append(f"### {row['contender']}: {row['seconds']:.3g} s\n")
        parts.append(table(("operation", "calls", "s", "share"), body, right=(1, 2, 3)))
    parts.append(machine(part["rows"]))
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "slice": slice_section,
    "table12": table12_section,
    "full3b": full3b_section,
    "growth": growth_section,
    "profile": profile_section,
}


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value / GIB:.2f}"


def _figure(place: Path, columns: int, draw: Callable[[Sequence[Axes]], None], rows: int = 1) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(4.2 * columns, 3.1 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots(rows, columns, squeeze=False).flatten().tolist())
    figure.savefig(place, metadata={"Software": None})


def plot_slice(part: Mapping[str, Any], place: Path) -> str:
    """Step and memory of every contender as bars; returns the text for those who do not see it."""
    rows = part["rows"]

    def draw(axes: Sequence[Axes]) -> None:
        names = [row["contender"] for row in rows]
        middle = [row["seconds"]["median"] for row in rows]
        spread = [[m - r["seconds"]["q1"] for m, r in zip(middle, rows, strict=True)],
                  [r["seconds"]["q3"] - m for m, r in zip(middle, rows, strict=True)]]  # fmt: skip
        colours = ["#3b6ea5" if name.startswith("ours") else "#9a9a9a" for name in names]
        axes[0].barh(names, middle, xerr=spread, color=colours)
        axes[0].set(xlabel="seconds per step (median, quartiles)")
        axes[0].invert_yaxis()
        known = [row for row in rows if (row.get("memory") or {}).get("above") is not None]
        shown = [row["contender"] for row in known]
        colours = ["#3b6ea5" if name.startswith("ours") else "#9a9a9a" for name in shown]
        axes[1].barh(shown, [row["memory"]["above"] / GIB for row in known], color=colours)
        axes[1].set(xlabel="memory above the weights, GiB")
        axes[1].invert_yaxis()

    _figure(place, 2, draw)
    return "Bars of seconds per step and of memory above the weights, one for each contender of the table above."


def plot_table12(part: Mapping[str, Any], place: Path) -> str:
    """Quotients beside the paper's."""
    figures = [f for f in figures_of(part) if "/ Finetune," in f.name and f.bound is not None]

    def draw(axes: Sequence[Axes]) -> None:
        names = [f.name.replace(": ours / Finetune", "") for f in figures]
        axes[0].barh(names, [f.value for f in figures], color="#3b6ea5", label="measured")
        axes[0].plot([float(f.beside or "nan") for f in figures], names, "k|", ms=12, label="the paper's")
        axes[0].axvline(1.0, color="#9a9a9a", lw=1)
        axes[0].set(xlabel="ours / Finetune")
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    _figure(place, 1, draw)
    return "Bars of the time of our step over Finetune's for each model, with the paper's quotient as a tick."


def plot_growth(part: Mapping[str, Any], place: Path) -> str:
    """Time and memory over each varied quantity, with the expected slope through the last point."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    series = growth_series(part)

    def draw(axes: Sequence[Axes]) -> None:
        for column, (name, s) in enumerate(series.items()):
            for row, (key, slope, wanted, unit) in enumerate((
                ("seconds", "slope", "expected", "seconds per step"),
                ("memory", "memory_slope", "memory_expected", "MiB above weights"),
            )):  # fmt: skip
                ax, scale = axes[row * len(series) + column], 2**20 if key == "memory" else 1
                points = [value / scale for value in s[key]]
                ax.loglog(s["values"], points, "o-", color="#3b6ea5", label=f"measured, slope {_number(s[slope])}")
                if not math.isnan(s[wanted]):
                    line = [points[-1] * (v / s["values"][-1]) ** s[wanted] for v in s["values"]]
                    ax.loglog(s["values"], line, "--", color="#9a9a9a", label=f"expected, slope {_number(s[wanted])}")
                ax.set(xlabel=name, ylabel=unit if column == 0 else "")
                ax.set_xticks(s["values"], [f"{value:g}" for value in s["values"]], fontsize=8)
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_minor_formatter(NullFormatter())
                ax.legend(fontsize=7)

    _figure(place, len(series), draw, rows=2)
    return "Step time and memory over tokens, rank and adapted layers on logarithmic axes, beside the expected slopes."


PLOTS: dict[str, Callable[[Mapping[str, Any], Path], str]] = {
    "slice": plot_slice,
    "table12": plot_table12,
    "growth": plot_growth,
}
