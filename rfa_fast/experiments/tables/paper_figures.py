"""What the paper printed: the figures of Tables I–XIV, to stand beside ours.

The figures are kept in the layout of the paper's tables, a line per row, so that they can be proof-read
against it; they are read into numbers when they are asked for. Accuracies become fractions, as they are
everywhere in this package; the distances of Table VII are divided by 100 (its largest is what a hundred tokens
at the largest distance, √2, add up to).
`*` (Table IV: beyond the normal range) is read as infinite, `-` (Table III: no reference) as absent.
Figures 5 and 6 are drawings: the paper has no numbers for them, only sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

Figures = Mapping[str, Mapping[str, float]]
"""Row of the paper's table -> column (`"D_f/accuracy"`, `"mia_svm"`, `"seconds"`) -> figure."""

_SAMPLE, _CLASS = ("D_r", "D_f", "D_t"), ("D_r", "D_f", "D_rt", "D_ft")
_IMAGES = (("cifar-10", "sample"), ("fashion-mnist", "sample"), ("cifar-10", "class"), ("fashion-mnist", "class"))

_I = {
    "resnet18": """
Original 100.00 100.00 95.83 100.00 100.00 94.98 100.00 100.00 95.64 97.50 100.00 100.00 95.47 90.60
Retrain  100.00 96.88 95.92 100.00 97.66 94.84 100.00 0.00 95.89 0.00 100.00 0.00 96.33 0.00
NegGrad  100.00 99.22 95.70 100.00 96.88 94.65 84.54 12.42 80.62 12.20 83.51 9.87 81.87 9.70
Finetune 100.00 100.00 95.67 99.99 100.00 94.77 100.00 94.22 95.69 83.20 99.99 94.53 95.76 76.80
BadT     100.00 82.81 95.32 99.99 89.84 94.63 99.99 0.06 95.38 0.00 99.99 0.02 95.77 0.00
SCRUB    100.00 99.22 95.67 99.99 100.00 94.50 99.97 67.64 95.73 62.40 99.88 6.75 96.07 5.30
Ours     100.00 97.66 95.84 100.00 97.66 94.85 99.99 0.42 95.52 0.00 99.98 0.63 95.94 0.00""",
    "vit": """
Original 100.00 100.00 98.70 99.25 99.22 95.06 100.00 100.00 98.64 99.20 99.29 98.90 95.34 92.50
Retrain  100.00 99.22 98.74 99.88 96.09 95.35 100.00 0.00 98.64 0.00 99.95 0.00 96.71 0.00
NegGrad  99.97 98.44 98.33 99.01 96.88 94.88 37.34 0.00 36.33 0.00 33.87 0.00 33.63 0.00
Finetune 99.98 100.00 98.45 99.71 100.00 95.23 99.98 99.94 98.49 98.70 99.80 67.02 96.50 62.60
BadT     99.98 98.44 98.70 99.13 99.22 95.11 99.99 15.02 98.56 15.80 99.38 0.58 96.36 0.20
SCRUB    99.99 100.00 98.55 99.69 99.22 95.29 99.99 0.00 98.43 0.00 99.72 0.58 96.43 0.20
Ours     100.00 99.22 98.68 99.95 99.22 94.99 100.00 0.00 98.72 0.00 99.95 0.07 96.41 0.00""",
}

_II = """
Retrain 100.00 96.88 95.92 100.00 97.66 94.84
BadT    100.00 54.69 95.26 99.99 72.66 94.66
SCRUB   100.00 99.22 95.56 99.99 100.00 94.78
Ours    100.00 90.62 95.81 100.00 93.75 94.75"""

_III = """
Original 99.96 100.00 93.31 99.95 100.00 93.31 93.36
Retrain  99.99 96.88 93.17 100.00 - 93.15 -
NegGrad  97.76 94.53 88.48 49.58 54.05 49.47 55.00
Finetune 99.92 100.00 93.01 99.94 100.00 93.09 93.52
BadT     99.92 94.53 92.92 99.93 55.70 93.10 56.48
SCRUB    99.99 97.66 93.05 98.86 97.33 91.28 91.46
Ours     99.99 99.21 93.35 100.00 54.77 93.35 50.93"""

_IV = """
Original 34.46 34.96 43.47 34.45 33.51 43.42 42.24
Retrain  33.22 42.74 43.46 31.04 41.47 43.42 43.41
NegGrad  43.49 47.89 54.67 * * * *
Finetune 33.28 35.61 43.34 33.24 34.30 43.28 42.50
BadT     35.59 36.66 44.15 36.83 88.00 45.76 84.76
SCRUB    35.22 37.60 46.00 33.60 34.41 43.27 42.47
Ours     34.48 35.24 43.65 34.51 33.96 43.65 42.68"""
_IV_REPEATED = 43.10  # BadT's perplexity on D_f of a sample split when D_f is repeated five times (V-B2)

_V = """
Original 2.02 2.31 2.06 2.24 1.00
Retrain  2.00 2.54 2.07 2.41 1.00
Finetune 1.93 2.38 2.00 2.28 1.00
BadT     2.06 46.18 2.11 39.53 1.00
SCRUB    1.93 2.37 2.00 2.28 1.00
Ours     2.05 2.37 2.10 2.29 1.00"""

_VI = {
    "resnet18": """
NegGrad  0.00 0.08 0.02 0.00 0.07 0.03 0.27 1.13 0.30 1.06 0.30 1.02 0.31 1.05
Finetune 0.00 0.07 0.03 0.00 0.04 0.03 0.00 1.66 0.03 1.46 0.00 1.70 0.03 1.40
BadT     0.00 0.92 0.03 0.00 0.78 0.03 0.00 0.62 0.03 0.57 0.00 1.04 0.03 0.89
SCRUB    0.00 0.08 0.03 0.00 0.05 0.03 0.00 0.75 0.04 0.69 0.01 0.42 0.03 0.40
Ours     0.00 0.11 0.03 0.00 0.07 0.03 0.00 0.63 0.03 0.58 0.00 0.70 0.03 0.60""",
    "vit": """
NegGrad  0.00 0.04 0.02 0.01 0.06 0.03 1.11 0.94 1.13 0.96 0.99 0.40 0.99 0.41
Finetune 0.00 0.01 0.02 0.00 0.05 0.03 0.00 1.80 0.02 1.79 0.00 1.18 0.02 1.11
BadT     0.00 0.04 0.01 0.01 0.05 0.03 0.00 0.67 0.02 0.68 0.01 0.67 0.03 0.62
SCRUB    0.00 0.01 0.01 0.00 0.06 0.03 0.00 0.69 0.02 0.69 0.00 0.44 0.03 0.40
Ours     0.00 0.03 0.01 0.00 0.09 0.03 0.00 0.69 0.02 0.68 0.00 0.76 0.03 0.68""",
}

_VII = """
NegGrad  4.10 4.27 4.07 141.35 142.27 140.35 141.47
Finetune 0.43 0.60 0.41 0.44 0.60 0.39 0.42
BadT     0.72 0.85 0.68 1.24 11.24 1.20 9.17
SCRUB    1.29 1.43 1.29 1.11 1.26 1.07 1.07
Ours     0.60 0.78 0.58 0.71 0.92 0.64 0.71"""

_VIII = """
Retrain  1.65 1.21 1.61 2.30 22.70 2.28 1.92 1.92 1.96 1.88 2.20 2.39 2.23 2.20
NegGrad  0.22 0.19 0.28 0.42 0.39 0.43 2.76 3.45 2.29 2.42 1.65 1.80 1.56 1.55
Finetune 0.82 0.72 0.78 0.85 0.84 0.84 0.81 0.89 0.81 0.85 0.64 0.65 0.62 1.63
BadT     0.95 0.84 0.97 0.83 0.82 0.80 0.85 1.04 0.83 0.92 0.75 0.77 0.78 2.70
SCRUB    0.85 0.78 0.84 0.66 0.82 0.65 1.42 1.25 1.21 1.23 1.35 1.36 1.32 1.43
Ours     1.35 1.27 1.33 1.11 1.25 1.13 1.52 1.63 1.49 1.70 1.36 1.37 1.36 1.37"""

_IX = """
NegGrad  0.55 0.50 0.53 0.73 0.44 0.42 0.61
Finetune 2.85 2.88 3.59 3.06 2.34 4.73 2.68
BadT     33.27 23.63 20.34 23.50 19.55 22.91 19.31
SCRUB    0.86 1.02 0.75 0.80 0.87 1.21 0.69
Ours     0.29 0.39 0.29 0.39 0.40 0.38 0.42"""

_X = """
Original 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.00
Retrain  0.86 0.33 0.95 0.59 0.98 0.53 1.00 0.74
NegGrad  0.98 1.00 1.00 1.00 0.99 1.00 1.00 1.00
Finetune 1.00 0.73 1.00 0.82 1.00 1.00 1.00 0.75
BadT     0.06 0.00 0.05 0.00 0.99 0.00 1.00 0.02
SCRUB    0.99 0.62 1.00 0.73 1.00 0.86 1.00 0.24
Ours     0.89 0.00 0.93 0.00 0.98 0.00 0.98 0.00"""

_XI = """
Original 1.00 1.00 1.00 1.00
Retrain  0.98 0.97 0.50 0.50
NegGrad  0.98 1.00 1.00 1.00
Finetune 0.99 0.99 1.00 1.00
BadT     0.93 0.03 0.52 0.08
SCRUB    0.97 0.97 1.00 1.00
Ours     0.99 0.05 0.53 0.50"""

_XII = """
Retrain  1222.28 1099.67 2065.85 1863.91 2142.00 2003.25 710.46 684.02
NegGrad  7.86 12.74 19.39 37.29 57.10 70.71 8.51 10.87
Finetune 61.14 55.10 208.39 189.80 213.95 200.10 72.11 69.18
BadT     76.35 73.07 334.78 335.80 414.52 414.69 158.22 151.38
SCRUB    64.35 65.76 262.02 282.09 311.19 311.28 114.19 112.50
Ours     91.71 90.96 297.38 295.89 370.61 369.99 87.42 79.05"""

_XIII = """
Retrain 100.00 0.00 97.06 0.00 2.32 2.52 2.26 2.17 0.00 0.00 0.00 0.00
LoRA    99.99 0.50 96.66 0.10 1.13 1.20 1.11 1.17 2.32 2.40 2.27 2.32
PiSSA   100.00 1.12 96.56 0.50 0.75 0.81 0.76 0.78 2.04 2.09 2.04 2.05
DoRA    99.99 0.46 96.64 0.10 3.10 2.19 2.49 2.05 4.41 3.42 3.71 3.16"""

_XIV = """
1e-5 99.99 0.76 95.47 0.20
5e-5 99.99 0.42 95.52 0.00
1e-4 99.99 0.16 95.59 0.00
5e-4 99.06 0.02 95.01 0.00"""


@cache
def paper_figures(table: str, data: str, model: str, kind: str) -> Figures | None:
    """The paper's figures for one data set, model and scenario; `None` where it has none.

    Args:
        table: the paper's number, `"I"` to `"XIV"`.
        data, model: as :mod:`rfa_fast.experiments.tables.settings` names the paper's own: `"cifar-10"`,
            `"resnet18"`.
        kind: `"sample"` or `"class"`; the paper's keyword runs are its class runs on IMDB.

    Example:
        >>> paper_figures("I", "cifar-10", "resnet18", "class")["Ours"]["D_f/accuracy"]
        0.0042
        >>> paper_figures("I", "imdb", "distilbert", "class") is None
        True
    """
    return _all().get((table, data, model, "class" if kind == "keyword" else kind))


@cache
def _all() -> Mapping[tuple[str, str, str, str], Figures]:
    found: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}

    def read(table: str, text: str, columns: list[tuple[str, str, str, str]]) -> None:
        """Columns: (data, model, kind, figure)."""
        for line in text.split("\n")[1:]:
            row, *figures = line.split()
            for (data, model, kind, key), figure in zip(columns, figures, strict=True):
                if figure == "-":
                    continue
                percent = key.endswith("/accuracy") or table == "VII"
                value = math.inf if figure == "*" else round(float(figure) / 100, 6) if percent else float(figure)
                found.setdefault((table, data, model, kind), {}).setdefault(row, {})[key] = value

    def subsets(data: str, model: str, kind: str, metric: str) -> list[tuple[str, str, str, str]]:
        return [(data, model, kind, f"{subset}/{metric}") for subset in (_SAMPLE if kind == "sample" else _CLASS)]

    def images(model: str, metric: str) -> list[tuple[str, str, str, str]]:
        return [column for data, kind in _IMAGES for column in subsets(data, model, kind, metric)]

    def both(data: str, model: str, metric: str) -> list[tuple[str, str, str, str]]:
        return [column for kind in ("sample", "class") for column in subsets(data, model, kind, metric)]

    def kinds(metric: str, *pairs: tuple[str, str]) -> list[tuple[str, str, str, str]]:
        return [(data, model, kind, metric) for data, model in pairs for kind in ("sample", "class")]

    for model in ("resnet18", "vit"):
        read("I", _I[model], images(model, "accuracy"))
        read("VI", _VI[model], images(model, "activation_distance_squared"))
    read("II", _II, images("resnet18", "accuracy")[:6])
    read("III", _III, both("imdb", "distilbert", "accuracy"))
    read("IV", _IV, both("eli5-category", "distilgpt2", "perplexity"))
    found["IV", "eli5-category", "distilgpt2", "sample"]["BadT, D_f × 5"] = {"D_f/perplexity": _IV_REPEATED}
    read("V", _V, [*subsets("wmdp", "qwen2.5-3b", "class", "perplexity"), ("wmdp", "qwen2.5-3b", "class", "mia_svm")])
    read("VII", _VII, both("eli5-category", "distilgpt2", "activation_distance"))
    read("VIII", _VIII, images("resnet18", "feature_distance_1"))
    read("IX", _IX, both("eli5-category", "distilgpt2", "feature_distance_2"))
    pairs = [(data, model) for model in ("resnet18", "vit") for data in ("cifar-10", "fashion-mnist")]
    read("X", _X, kinds("mia_svm", *pairs))
    read("XI", _XI, kinds("mia_svm", ("imdb", "distilbert"), ("eli5-category", "distilgpt2")))
    # V-D does not say on which image data the times were taken; they stand beside CIFAR-10, the first named.
    timed = (("cifar-10", "resnet18"), ("cifar-10", "vit"), ("imdb", "distilbert"), ("eli5-category", "distilgpt2"))
    read("XII", _XII, kinds("seconds", *timed))
    read("XIII", _XIII, [
        column
        for metric in ("accuracy", "feature_distance_1", "feature_distance_2")
        for column in subsets("cifar-10", "resnet18", "class", metric)
    ])  # fmt: skip
    read("XIV", _XIV, subsets("cifar-10", "resnet18", "class", "accuracy"))
    for key, rows in found.items():
        if key[0] == "XII":
            _add_quotients(rows)
    return MappingProxyType(found)


def _add_quotients(rows: dict[str, dict[str, float]]) -> None:
    """Each time over Finetune's, the quotient that Table XII is read for."""
    base = rows["Finetune"]["seconds"]
    for figures in rows.values():
        figures["seconds/finetune"] = round(figures["seconds"] / base, 4)
