"""`rfa-fast experiment --list`: the tables, the rows and columns they can have, and what is on this machine."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rfa_fast.commands.info import _table
from rfa_fast.experiments.tables.catalogue import TABLES
from rfa_fast.experiments.tables.columns import DERIVED
from rfa_fast.experiments.tables.pairs import PAIRS
from rfa_fast.experiments.tables.presence import all_missing
from rfa_fast.experiments.tables.rows import ALIASES, ROWS
from rfa_fast.metrics import METRICS


def print_list(console: Console) -> None:
    """Names of tables, pairs, rows and metrics; of pairs, the command that brings what is missing."""
    missing = {name: all_missing(pair) for name, pair in PAIRS.items()}
    tables = _table("Tables and figures")
    for head in ("Name", "Paper", "What", "Runs here on"):
        tables.add_column(head, overflow="fold")
    for table in TABLES.values():
        here = [name for name in table.pairs if not missing[name]]
        paper = table.number and f"Table {table.number}"
        tables.add_row(
            Text(table.name, style="bold"), paper, table.title,
            Text(", ".join(here) if here else "nothing that is here", style="" if here else "yellow"),
        )  # fmt: skip
    console.print(tables, "")
    pairs = _table("Data and models")
    for head in ("Data", "Model", "Scenarios", "Here", "Get what is missing with"):
        pairs.add_column(head, overflow="fold")
    for name, pair in PAIRS.items():
        scenarios = ", ".join(text for texts in pair.scenarios.values() for text in texts)
        pairs.add_row(
            Text(pair.data, style="bold"), Text(pair.model, style="bold"), scenarios,
            Text("no" if missing[name] else "yes", style="yellow" if missing[name] else "green"),
            "; ".join(dict.fromkeys(missing[name].values())),
        )  # fmt: skip
    console.print(pairs, "")
    console.print(Text("Methods: ", style="bold"), ", ".join((*ROWS, *ALIASES)), sep="")
    console.print(Text("Metrics: ", style="bold"), ", ".join((*METRICS, *DERIVED)), sep="")
