"""The results as files: CSV for a program, Markdown for a page of text, LaTeX for a paper.

The CSV has a line per figure with everything that is known of it. The other two have a table per block, our
mean and interval beside the paper's figure, and the summary of gaps below; percentages have two
decimals, as the paper's tables do.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from rfa_fast.experiments.tables.columns import metric_of
from rfa_fast.experiments.tables.results import BlockResult, GapSummary, RowResult
from rfa_fast.report import Metric, write_atomically

FIELDS = (
    "table", "paper_table", "data", "model", "scenario", "method", "column", "metric", "subset", "mean",
    "half_width_95", "low", "high", "n", "values", "gap_to_retrain", "gap_half_width_95", "paper", "paper_source",
    "recipe",
)  # fmt: skip


def write_files(
    folder: Path, title: str, results: Sequence[BlockResult], summaries: Sequence[GapSummary]
) -> list[Path]:
    """Write `table.csv`, `table.md` and `table.tex`, each whole or not at all.

    Raises:
        OSError: the folder cannot be written; what was there before is untouched.
    """
    return [
        write_atomically(folder / "table.csv", as_csv(results)),
        write_atomically(folder / "table.md", as_markdown(title, results, summaries)),
        write_atomically(folder / "table.tex", as_latex(title, results, summaries)),
    ]


def as_csv(results: Sequence[BlockResult]) -> str:
    """A line per row and column, fractions and seconds as they are, a header first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        block = result.block
        common = {
            "table": block.table.name, "paper_table": block.table.number, "data": block.pair.data,
            "model": block.pair.model, "scenario": block.scenario, "paper_source": result.source,
            "recipe": result.recipe,
        }  # fmt: skip
        for row in (*result.baselines, *result.rows):
            for column in result.columns:
                key, gap = column.key, row.gaps.get(column.key)
                figure, paper = row.figures.get(key), row.paper.get(key)
                if figure is None and paper is None:
                    continue
                subset, _, _ = key.rpartition("/")
                line: dict[str, object] = {
                    **common, "method": row.label, "column": key, "metric": metric_of(key),
                    "subset": subset if metric_of(key) != key else "", "paper": "" if paper is None else paper,
                }  # fmt: skip
                if figure is not None:
                    line |= {
                        "mean": figure.mean, "half_width_95": _blank(figure.half), "low": figure.low,
                        "high": figure.high, "n": figure.n,
                        "values": " ".join(f"{seed}:{value!r}" for seed, value in row.values[key].items()),
                    }  # fmt: skip
                if gap is not None:
                    line |= {"gap_to_retrain": gap.mean, "gap_half_width_95": _blank(gap.half)}
                writer.writerow(line)
    return text.getvalue()


def as_markdown(title: str, results: Sequence[BlockResult], summaries: Sequence[GapSummary]) -> str:
    """A heading, a table and its notes for every block."""
    lines = [f"# {_md(title)}", ""]
    for result in results:
        lines += [f"## {_md(result.name)}", "", f"{_md(result.title)}. {_md(result.recipe)}.", ""]
        papers = _papers(result)
        heads = ["Method"]
        for column in result.columns:
            heads.append(f"{_head(column)}{' %' if column.unit else ''}")
            heads += ["paper"] if column.key in papers else []
        lines += [_line([_md(head) for head in heads]), _line(["---", *["---:"] * (len(heads) - 1)])]
        for row in (*result.baselines, *result.rows):
            cells = [_md(row.label)]
            for column in result.columns:
                cells.append(figure_text(row, column))
                cells += [paper_text(row, column)] if column.key in papers else []
            lines.append(_line(cells))
        source = [f"paper: {result.source}."] if papers else []
        lines += ["", *(f"- {_md(note)}" for note in [*source, *result.notes()]), ""]
    if summaries:
        lines += ["## Mean absolute gap to Retrain", ""]
        for summary in summaries:
            lines += [_line([_md(f"{summary.pair}, {summary.metric}"), "gap", "rank"]), _line(["---", "---:", "---:"])]
            lines += [_line([_md(label), *_gap_cells(summary, label)]) for label in summary.gaps]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_latex(title: str, results: Sequence[BlockResult], summaries: Sequence[GapSummary]) -> str:
    """A `table` environment for every block; booktabs is all that it needs."""
    parts = [f"% {re.sub(r'[^ -~]+', ' ', title)}\n% \\usepackage{{booktabs}}"]
    for result in results:
        papers = _papers(result)
        heads = ["Method"]
        for column in result.columns:
            heads.append(_tex_head(column))
            heads += ["\\textit{paper}"] if column.key in papers else []
        rows = []
        for row in (*result.baselines, *result.rows):
            cells = [_tex(row.label)]
            for column in result.columns:
                cells.append(figure_text(row, column).replace(" ± ", " $\\pm$ ").replace("–", "--"))
                cells += [paper_text(row, column).replace("–", "--")] if column.key in papers else []
            rows.append(cells)
        source = f" Paper: {result.source}." if papers else ""
        caption = _tex(f"{result.block.table.title}. {result.name}. {result.title}. {result.recipe}.{source}")
        parts.append(_tex_table(caption, heads, rows))
    for summary in summaries:
        rows = [
            [_tex(label), *(cell.replace("–", "--") for cell in _gap_cells(summary, label))] for label in summary.gaps
        ]
        caption = _tex(f"Mean absolute gap to Retrain: {summary.pair}, {summary.metric}.")
        parts.append(_tex_table(caption, ["Method", "gap", "rank"], rows))
    return "\n\n".join(parts) + "\n"


def figure_text(row: RowResult, column: Metric) -> str:
    """`"93.20 ± 0.41"`, without the interval where there is none.

    Example:
        >>> from rfa_fast.experiments.tables.aggregate import Summary
        >>> row = RowResult("RFA", {"D_f/accuracy": Summary(0.932, 0.0041, 0.93, 0.934, 3)})
        >>> figure_text(row, Metric("D_f/accuracy", "D_f", "%"))
        '93.20 ± 0.41'
    """
    found = row.figures.get(column.key)
    if found is None:
        return "–"
    return column.format(found.mean, 1) + ("" if math.isnan(found.half) else f" ± {column.format(found.half, 1)}")


def paper_text(row: RowResult, column: Metric) -> str:
    """The paper's figure, or a dash."""
    found = row.paper.get(column.key)
    return "–" if found is None else column.format(found, 1)


def _papers(result: BlockResult) -> set[str]:
    return {key for row in (*result.baselines, *result.rows) for key in row.paper}


def _gap_cells(summary: GapSummary, label: str) -> list[str]:
    gap = summary.gaps[label]
    if math.isnan(gap):
        return ["–", "–"]
    return [f"{100 * gap:.2f} points" if summary.percent else f"{gap:.3f}", str(summary.ranks[label])]


def _head(column: Metric) -> str:
    return f"{column.group} {column.label}".strip()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    """The text without a sign that Markdown or a browser would read as markup."""
    text = re.sub(r"[\\|*`\[\]~]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # between letters, as in D_f, it is none
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, written)
    return re.sub(r"\s+", " ", text)


def _tex_head(column: Metric) -> str:
    label = re.sub(r"^D_(\w+)$", r"$\\mathcal{D}_{\1}$", column.label)
    label = label if label.startswith("$") else _tex(label)
    unit = " (\\%)" if column.unit else ""
    return f"{_tex(column.group)} {label}{unit}".strip()


_TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "γ": r"$\gamma$", "×": r"$\times$", "±": r"$\pm$",
        "√": r"$\surd$", "−": "--", "–": "--", "“": "``", "”": "''", "…": r"\ldots{}", "→": r"$\to$"}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in re.sub(r"\s+", " ", text))


def _tex_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "\\begin{table}", "\\centering", f"\\caption{{{caption}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", "\\toprule", f"{' & '.join(heads)} \\\\", "\\midrule",
        *(f"{' & '.join(cells)} \\\\" for cells in rows), "\\bottomrule", "\\end{tabular}", "\\end{table}",
    ]  # fmt: skip
    return "\n".join(lines)


def _blank(value: float) -> float | str:
    return "" if math.isnan(value) else value
