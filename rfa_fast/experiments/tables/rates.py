"""How long things took on this machine, kept beside the rows, for the forecast of the next run.

Seconds per sample and pass: of training, of unlearning by each method, of a forward when measuring. They are rough
(a batch's last samples, a checkpoint, another job on the machine are all in them), which is what a forecast
can be. With another number of threads, or in another precision, they say little: each is kept under its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rfa_fast.experiments.measuring import FEATURE_ITEMS
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.report import write_atomically

if TYPE_CHECKING:
    from rfa_fast.experiments.tables.plan import PlannedRow
    from rfa_fast.experiments.tables.runner import Found

TRAIN, FORWARD = "train", "forward"
_WEIGHT = 0.5  # of the latest time against those before


class Rates:
    """The rates of one pair.

    Args:
        cache: the folder that the rows are kept in.
        pair: its name.
        threads: of torch; those of this process unless given.
        autocast: name of the dtype that products are taken in, if not the model's.

    Example:
        >>> import tempfile
        >>> rates = Rates(Path(tempfile.mkdtemp()), "digits/digits-net", threads=2)
        >>> rates.note("train", seconds=3.0, passes=1500)
        >>> rates.get("train"), rates.get("forward")
        (0.002, None)
    """

    def __init__(self, cache: Path, pair: str, threads: int | None = None, autocast: str | None = None) -> None:
        self.path = cache / "rows" / pair.replace("/", "-") / "rates.json"
        count = torch.get_num_threads() if threads is None else threads
        self._kind = PAIRS[pair].kind
        self._name = f"{count}" if autocast is None else f"{count} {autocast}"
        self._values = self._read().get(self._name, {})
        self._changed: set[str] = set()

    def get(self, key: str) -> float | None:
        """Seconds per sample and pass; `None` where nothing was noted."""
        return self._values.get(key)

    def note(self, key: str, seconds: float, passes: float) -> None:
        """`passes` samples took `seconds`."""
        if not (passes > 0 and math.isfinite(seconds) and seconds > 0):
            return
        latest, before = seconds / passes, self._values.get(key)
        self._values[key] = latest if before is None else _WEIGHT * latest + (1 - _WEIGHT) * before
        self._changed.add(key)

    def note_training(self, found: Found, trained: Sequence[str]) -> None:
        """Times of Original and Retrain where they were trained just now: a file does not say with how many threads."""
        epochs = int(found.recipe.get("epochs", 1))
        kept, forgotten = found.sizes["D_r"], found.sizes["D_f"]
        for label, samples in (("Original", kept + forgotten), ("Retrain", kept)):
            if label in found.rows and label in trained:
                self.note(TRAIN, found.rows[label].seconds, samples * epochs)

    def note_row(self, row: PlannedRow, found: Found, key: str, seconds: float | None) -> None:
        """The time of a row that was just computed: its unlearning, and what was left of `seconds` for measuring."""
        unlearning = found.rows[key].seconds
        self.note(row.spec.cost_key, unlearning, passes_of(row, found.sizes, found.options[key]))
        if seconds is not None:
            self.note(FORWARD, seconds - unlearning, forwards_of(found.measured.values(), self._kind))

    def save(self) -> None:
        """Write what was noted.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._changed:
            found = self._read()  # another seed's process may have written since
            found.setdefault(self._name, {}).update({key: self._values[key] for key in self._changed})
            write_atomically(self.path, json.dumps(found, indent=1, sort_keys=True) + "\n")
            self._changed.clear()

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            return {threads: {key: float(rate) for key, rate in of.items()} for threads, of in values.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # none yet, or spoilt: a forecast is not worth an error


def passes_of(row: PlannedRow, sizes: Mapping[str, int], options: Mapping[str, object]) -> float:
    """How many samples an unlearning run goes through: D_f as often as it has epochs, or D_r once an epoch."""
    if row.spec.once:
        return float(int(str(options["max_steps"])) * int(str(options["forget_per_batch"])))
    return float(sizes["D_r"] * int(str(options.get("epochs", 1))))


def forwards_of(measured: Iterable[int], kind: str) -> float:
    """How many samples models go through when a row is measured on subsets of these sizes.

    The row's own model on all of them; Original and Retrain where features are compared, and on texts that are
    written throughout: what they predict otherwise is kept.

    Example:
        >>> forwards_of([100, 1000], "image"), forwards_of([100, 1000], "language")
        (2324.0, 3300.0)
    """
    return float(sum(3 * n if kind == "language" else n + 2 * min(n, FEATURE_ITEMS) for n in measured))
