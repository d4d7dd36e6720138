"""`rfa-fast bench`: what our step needs and takes on your model, beside what you would use instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from rfa_fast.commands import options
from rfa_fast.commands.info import _table
from rfa_fast.commands.method import refuse_idle_classes, refuse_typed
from rfa_fast.commands.shell import INTERRUPTED, check_output, command_line, reported, results, say
from rfa_fast.commands.unlearn import _targets
from rfa_fast.metrics import Forecast

_BATCH = "Batch"
_WHAT = "What to compare"
_RIVALS = ("floor", "peft", "paper", "finetune")


def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="A transformers folder, torchvision:NAME, or package.module:factory.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="In place of MODEL: a config.json of transformers; weights are random.",
                     rich_help_panel=options.MODEL_AND_DATA, show_default=False),
    ] = None,
    weights: options.Weights = None,
    classes: Annotated[
        int | None, typer.Option(metavar="N", help="Outputs of a torchvision model.", min=1,
                                 rich_help_panel=options.MODEL_AND_DATA, show_default="its own")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Samples per step, half of them to forget.", min=2,
                                 rich_help_panel=_BATCH, show_default="4 texts or 32 images")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Tokens of each text.", min=2, rich_help_panel=_BATCH,
                                 show_default="256, or what the model takes")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Height and width of each image.", min=1,
                                 rich_help_panel=_BATCH, show_default="the configuration's, or 224")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(metavar="WHICH", help="Layers to adapt: all, deep, middle, shallow, a regex, or, repeated, names.",
                     rich_help_panel=options.METHOD, show_default="deep")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank r of the adapters.", rich_help_panel=options.METHOD)] = 8,
    mode: Annotated[
        str, typer.Option(metavar="residual|teacher", help="Whose features our step aligns with.",
                          rich_help_panel=options.METHOD)
    ] = "residual",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute each block of a transformers model in the backward: less "
                           "memory, more time; for all contenders.", rich_help_panel=options.METHOD)
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Do not compile our step.", rich_help_panel=options.METHOD)
    ] = False,
    rival: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="floor, or peft, paper or finetune, each also with -compiled (peft-bf16 "
                     "has bf16 adapters). Repeatable.", rich_help_panel=_WHAT, show_default=", ".join(_RIVALS))
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each.", min=1, rich_help_panel=_WHAT)] = 5,
    warmup: Annotated[
        int, typer.Option(help="Steps of each before those; compilation is in the first.", min=1, rich_help_panel=_WHAT)
    ] = 2,
    forecast_only: Annotated[
        bool, typer.Option("--forecast-only", help="Compute the memory from shapes and run nothing.",
                           rich_help_panel=_WHAT)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random batches.", rich_help_panel=_WHAT)] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write bench.json there, replacing one.",
                                  rich_help_panel=options.OUTPUT, show_default=False)
    ] = None,
    progress: options.Progress = True,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Time one unlearning step on your model, and say what memory it needs, beside the alternatives.

    floor is the bare matrix products of our step, which nothing can go below.
    peft is LoRA fine-tuning without any forgetting, paper the method as its
    authors draw it (PEFT student, copied teacher, hooks), finetune trains every
    parameter. All see the same random tokens or images, in turns.

    Memory is counted from shapes before anything is run, and a rival that does
    not fit is left out. Ctrl-C keeps the rounds so far.

    [bold]Examples[/bold]

    rfa-fast bench ./my-llm --batch-size 4 --length 512

    rfa-fast bench --config ./qwen/config.json --dtype bfloat16 \\
        --batch-size 4 --length 512 --checkpointing --forecast-only

    rfa-fast bench torchvision:resnet18 --image-size 32 --batch-size 128 \\
        --targets all --rival floor --rival finetune --rounds 10

    rfa-fast bench ./my-bert --mode teacher --output runs/bench
    """
    with reported(context, debug=debug):
        if (model is None) == (config is None):
            raise ValueError(f"got {'neither' if model is None else 'both'} MODEL and --config, expected one of them")
        if mode not in ("residual", "teacher"):
            raise ValueError(f"--mode: got {mode!r}, expected residual or teacher")
        if config is not None:
            refuse_typed(context, ("weights", "classes"), "beside --config", "MODEL: a configuration says all there is")
        if forecast_only:
            refuse_typed(
                context, ("device", "rounds", "warmup", "weights"), "with --forecast-only", "a step that is timed"
            )
        if model is not None:
            refuse_idle_classes(context, model)
        if output is not None:
            check_output(output)
        from rfa_fast.experiments.bench import Bench, free_bytes, sentence, size_text
        from rfa_fast.experiments.common import bar
        from rfa_fast.experiments.geometry import batches_for
        from rfa_fast.experiments.rivals import Setting
        from rfa_fast.methods import checks

        opened = _open(
            model, config, weights, classes, dtype, trust_remote_code=trust_remote_code, shapes=forecast_only
        )
        chosen = "deep" if targets is None else _targets(targets)
        batches = batches_for(opened, size=batch_size, length=length, image_size=image_size)
        ours = ("ours" if mode == "residual" else "ours-teacher") + ("-eager" if eager else "")
        compared = Bench(
            batches, Setting(chosen, rank), (ours, *(rival if rival is not None else _RIVALS)), checkpointing, seed
        )
        compared.check(opened)
        unknown: dict[str, str] = {}
        forecasts = compared.forecasts(opened, lambda label: bar(label, enabled=progress), unknown)
        for name, reason in unknown.items():
            say(f"{name} has no forecast: {reason}")
        needs = sentence(forecasts, ours, batches)
        if not forecast_only:
            say(needs)
        # A configuration is open on "meta", which nothing can run on.
        wanted = device or ("cpu" if config is not None else None)
        place = torch.device("cpu") if forecast_only else checks.device_of(opened, wanted)
        rows = compared.fitting(forecasts, None)
        finished = True
        if not forecast_only:
            if config is not None:
                opened = _filled(config, dtype, place, free_bytes(place), forecasts.get(ours))
            opened.to(place)
            rows = compared.fitting(forecasts, free_bytes(place))
            if rows[0].problem:
                raise ValueError(
                    f"our step needs {size_text(forecasts[ours].above_weights)} beside the weights, and "
                    f"{size_text(free_bytes(place) or 0)} are free on {place}; expected a smaller batch, "
                    "--checkpointing, or --forecast-only"
                )
            for row in rows:
                if row.problem:
                    say(f"{row.name} {row.problem}")
            finished = compared.run(
                rows, opened, place, rounds=rounds, warmup=warmup, bar=lambda label: bar(label, enabled=progress)
            )
        found = {
            "command": command_line(context), "model": model or str(config), "class": type(opened).__name__,
            "batch": str(batches), "targets": chosen, "rank": rank, "checkpointing": checkpointing, "seed": seed,
            "device": str(place), "rounds": len(rows[0].seconds), "interrupted": not finished, **_circumstances(),
            "sentence": needs,
            "forecasts": {name: one.to_dict() for name, one in forecasts.items()},
            "rows": [] if forecast_only else [row.to_dict() for row in rows],
        }  # fmt: skip
        written, unwritten = None, None
        try:
            written = None if output is None else _write(output, found)  # a closed pipe then takes nothing away
        except OSError as error:
            unwritten = error  # nor does a full disk take the tables
        if forecasts:
            print_forecasts(forecasts, results())
        if not forecast_only:
            print_rows(found["rows"], results())
        results().print(Text(found["sentence"]))
        if unwritten is not None:
            raise unwritten
        if written is not None:
            say(f"Written to {written}")
        if not finished:
            say(f"Interrupted; the figures are of {found['rounds']} complete rounds.")
            raise typer.Exit(INTERRUPTED)


def _open(
    name: str | None, config: Path | None, weights: Path | None, classes: int | None, dtype: str, *,
    trust_remote_code: bool, shapes: bool,
) -> nn.Module:  # fmt: skip
    """The model; a configuration, and a folder of which only shapes are wanted, without reading any weights."""
    from rfa_fast.experiments.geometry import geometry
    from rfa_fast.models import open_model

    if config is not None:
        return geometry(config, dtype)
    if name is None:
        raise ValueError("got no MODEL")
    folder = Path(name)
    if shapes and not trust_remote_code and (folder / "config.json").is_file():
        return geometry(folder, dtype)
    # Values do not matter here, so that a torchvision model may come without weights.
    return open_model(name, weights=weights, classes=classes, dtype=dtype, trust_remote_code=trust_remote_code).model


def _filled(config: Path, dtype: str, device: torch.device, free: int | None, needed: Forecast | None) -> nn.Module:
    """The model of a configuration with random weights, if the step fits."""
    from rfa_fast.experiments.bench import size_text
    from rfa_fast.experiments.geometry import geometry

    if free is not None and needed is not None and needed.peak > free:
        raise ValueError(
            f"--config: the step needs {size_text(needed.peak)}, and {size_text(free)} are free on {device}; expected "
            "a smaller batch, --checkpointing, or --forecast-only"
        )
    return geometry(config, dtype, str(device))


def _circumstances() -> dict[str, Any]:
    from rfa_fast.experiments.comparison import machine
    from rfa_fast.methods.record import versions

    return {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions()}


def _write(folder: Path, found: Mapping[str, Any]) -> Path:
    from rfa_fast.report import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    return write_atomically(folder / "bench.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def print_forecasts(forecasts: Mapping[str, Forecast], console: Console) -> None:
    """The memory of each, and what it is made of."""
    from rfa_fast.experiments.bench import size_text

    table = _titled("Memory of a step, counted from shapes", ("Contender", "Needs", "Above the weights", "/ weights"))
    table.add_column("Most of it", overflow="fold")
    for name, one in forecasts.items():
        parts = ", ".join(f"{part.removeprefix('aten.')} {size_text(size)}" for part, size in one.largest.items())
        table.add_row(
            Text(name, style="bold"), size_text(one.peak), size_text(one.above_weights),
            f"{one.peak / max(one.weights, 1):.2f}", Text(", ".join(parts.split(", ")[:3])),
        )  # fmt: skip
    console.print(table, "")


def print_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Medians, quartiles and ratios."""
    from rfa_fast.experiments.bench import size_text

    heads = ("Contender", "Median", "Quartiles", "/ ours", "/ floor", "First", "Adds")
    table = _titled("Time of a step, in turns; memory that a warm step adds, measured", heads)
    medians = {row["name"]: row["quartiles"]["median"] for row in rows if not row["problem"]}
    for row in rows:
        if row["problem"]:
            continue
        low, median, high = (row["quartiles"][key] for key in ("low", "median", "high"))
        extra = row["extra_bytes"]
        table.add_row(
            Text(row["name"], style="bold"), time_text(median), time_text(low, high),
            _ratio(median, medians.get(rows[0]["name"])), _ratio(median, medians.get("floor")),
            time_text(row["first_seconds"]), "–" if extra is None else size_text(extra),
        )  # fmt: skip
    console.print(table, "")
    for row in rows:
        if row["problem"]:
            console.print(Text(f"{row['name']} {row['problem']}", style="yellow"))


def _titled(title: str, heads: Sequence[str]) -> Table:
    table = _table(title)
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
    return table


def time_text(*seconds: float | None) -> str:
    """Seconds for people: one, or a range in the unit of its end.

    Example:
        >>> time_text(0.01234), time_text(2.5), time_text(0.5, 1.25), time_text(None)
        ('12.3 ms', '2.50 s', '0.50–1.25 s', '–')
    """
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        return "–"
    if known[-1] >= 1:
        return "–".join(f"{value:.2f}" for value in known) + " s"
    return "–".join(f"{value * 1000:.1f}" for value in known) + " ms"


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}"
