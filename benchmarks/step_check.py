"""`make bench-check`: the slice's ratios to the floor again; fails where one is more than 10 % worse than committed.

Both are measured on whatever machine is at hand, so the ratio to the floor of the same run is what is compared,
never seconds. Another CPU than the committed one is said, because its ratios may differ for its own reasons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from step_parts import RESULTS, Options, time_slice
from step_run import facts
from step_workloads import Workload

TOLERANCE = 0.10


def worse(
    committed: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]], tolerance: float = TOLERANCE
) -> list[str]:
    """A sentence for every row of ours whose ratio to the floor grew by more than `tolerance`, or that is missing.

    Args:
        committed, again: rows with `contender` and `to_floor`.
    """
    new = {row["contender"]: row["to_floor"] for row in again}
    faults = []
    for row in committed:
        name, before = row["contender"], row["to_floor"]
        if not name.startswith("ours") or before is None:
            continue
        if name not in new:
            faults.append(f"{name}: committed {before:.3f} × floor, not measured now")
        elif new[name] > before * (1 + tolerance):
            faults.append(
                f"{name}: committed {before:.3f} × floor, now {new[name]:.3f}, {new[name] / before - 1:+.0%} "
                f"(at most {tolerance:+.0%})"
            )
    return faults


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")] = 5,
    results: Annotated[Path, typer.Option(help="Folder with the committed slice.json.")] = RESULTS,
    everything: Annotated[bool, typer.Option(help="Time the rivals again, too; only ours can fail.")] = False,
) -> None:
    """Measure the slice's ratios to the floor again and compare them with the committed ones."""
    console = Console()
    place = results / "slice.json"
    if not place.is_file():
        console.print("bench-check: got no committed slice.json, expected one; run make bench PARTS=slice first")
        raise typer.Exit(2)
    committed = json.loads(place.read_text(encoding="utf-8"))
    rows, settings = committed["rows"], committed["settings"]
    names = tuple(row["contender"] for row in rows if everything or row["contender"].startswith(("ours", "floor")))
    options = Options(rounds=rounds, warmup=settings["warmup"], contenders=names)
    here, there = facts()["cpu"], rows[0]["facts"]["cpu"]
    if here != there:
        console.print(f"Committed on {there}, measured on {here}: ratios of different machines.", style="yellow")
    with console.status("slice") as status:
        again = time_slice(Workload(**settings["workload"]), options, status.update)
    new = {row["contender"]: row["to_floor"] for row in again}
    shown = Table(title="ratio to the floor")
    for heading in ("contender", "committed", "now"):
        shown.add_column(heading)
    for row in rows:
        if row["contender"] in new:
            shown.add_row(row["contender"], f"{row['to_floor']:.3f}", f"{new[row['contender']]:.3f}")
    console.print(shown)
    faults = worse(rows, again)
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)
    console.print("No ratio is more than 10 % worse than the committed one.")


if __name__ == "__main__":
    typer.run(main)
