"""`rfa-fast info`: what this machine has, and which layers of a model would be adapted and why."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_fast.commands import options
from rfa_fast.commands.method import refuse_idle_classes, refuse_typed
from rfa_fast.commands.shell import reported, results
from rfa_fast.commands.unlearn import _targets

_OF_MODEL = ("weights", "targets", "rank", "adapter", "classes")
_NO_BF16 = "; no instructions for bf16 products: a bf16 model is many times slower here than a float32 one"


def info(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="A transformers folder, torchvision:NAME, or package.module:factory.",
                       show_default=False),
    ] = None,
    weights: options.Weights = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(metavar="WHICH", help="all, deep, middle, shallow, a regex, or, repeated, names.",
                     rich_help_panel=options.METHOD, show_default="all"),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank r of the adapters.", rich_help_panel=options.METHOD)] = 8,
    adapter: Annotated[
        str, typer.Option(metavar="lora|pissa|dora", help="Kind of adapter.", rich_help_panel=options.METHOD)
    ] = "lora",
    classes: Annotated[
        int | None, typer.Option(metavar="N", help="Outputs of a torchvision model.", min=1,
                                 rich_help_panel=options.MODEL_AND_DATA, show_default="its own")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a program to read.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Show versions, devices, backends, data sets and methods; with MODEL, the layers that would be adapted.

    [bold]Examples[/bold]

    rfa-fast info

    rfa-fast info torchvision:resnet18 --targets deep

    rfa-fast info ./my-bert --json
    """
    with reported(context, debug=debug):
        if model is None:
            refuse_typed(context, _OF_MODEL, "without MODEL", "MODEL, whose layers it is about")
            found = machine_facts()
        else:
            refuse_idle_classes(context, model)
            found = model_facts(
                model, weights=weights, targets=_targets(targets), rank=rank, adapter=adapter, classes=classes,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        elif model is None:
            _print_machine(found, results())
        else:
            _print_model(found, results())


def machine_facts() -> dict[str, Any]:
    """Versions, devices, backends, data sets and methods, JSON-safe.

    Example:
        >>> sorted(machine_facts())
        ['backend', 'data', 'devices', 'kernels', 'methods', 'threads', 'triton', 'versions']
    """
    from rfa_fast.data import available
    from rfa_fast.kernels.availability import triton_status
    from rfa_fast.methods import METHODS
    from rfa_fast.methods.record import versions
    from rfa_fast.ops import backends

    devices = _devices()
    types = list(dict.fromkeys(device["type"] for device in devices))
    # The backend follows the device; of several devices the last is the one people train on.
    chosen, why = backends.select("auto", torch.empty(0, device=types[-1]))
    return {
        "versions": versions(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "devices": devices,
        "backend": {"name": chosen, "why": why},
        "triton": {kind: dict(zip(("usable", "why"), triton_status(kind), strict=True)) for kind in types},
        "kernels": _kernels(types[-1]),
        "data": [{**asdict(entry), "options": list(entry.options)} for entry in available()],
        "methods": {name: (method.__doc__ or "").strip().splitlines()[0] for name, method in METHODS.items()},
    }


def _kernels(kind: str) -> dict[str, Any] | None:
    """Which tile sizes the kernels would take, and whether they are measured; `None` without Triton."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return None
    from rfa_fast.kernels import autotune, tuning

    return {
        "table": str(tuning.target_of(torch.device(kind))),
        "autotune": bool(autotune.switched_on()),
        "file": str(autotune.tuning_file()),
    }


def model_facts(
    name: str,
    *,
    weights: Path | None = None,
    targets: str | list[str] = "all",
    rank: int = 8,
    adapter: str = "lora",
    classes: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The layers of a model that would be adapted, and the others with the reason, JSON-safe.

    The model is patched to see, and let go of.

    Example:
        >>> facts = model_facts("torchvision:resnet18", targets="deep", classes=10)
        >>> len(facts["adapted"]), facts["adapted"][-1]["name"], facts["skipped"][0]["name"]
        (11, 'fc', 'conv1')
    """
    from rfa_fast import patch
    from rfa_fast.models import open_model

    opened = open_model(name, weights=weights, classes=classes, trust_remote_code=trust_remote_code)
    parameters = sum(p.numel() for p in opened.model.parameters())
    rfa = patch(opened.model, targets, rank=rank, adapter=adapter)
    report = rfa.report()
    rfa.remove()
    return {
        "model": name,
        "class": type(opened.model).__name__,
        "task": opened.task,
        "parameters": parameters,
        "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        "targets": targets,
        "trainable": sum(row.parameters for row in report.adapted),
        "backend": report.backend,
        "adapted": [{**asdict(row), "shape": list(row.shape)} for row in report.adapted],
        "skipped": [asdict(skip) for skip in report.skipped],
    }


def _devices() -> list[dict[str, str]]:
    found = [
        {"type": "cpu", "name": torch.backends.cpu.get_cpu_capability() + ("" if has_bf16_products() else _NO_BF16)}
    ]
    if torch.backends.mps.is_available():
        found.append({"type": "mps", "name": "Apple GPU"})
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        found += [{"type": kind, "name": module.get_device_name(i)} for i in range(module.device_count())]
    return found


def has_bf16_products() -> bool:
    """Whether torch's bf16 products run on instructions of this CPU, or in a plain loop; true where torch cannot tell.

    Example:
        >>> isinstance(has_bf16_products(), bool)
        True
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def _print_machine(found: dict[str, Any], console: Console) -> None:
    table = _table()
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    for name, version in found["versions"].items():
        table.add_row(name.replace("_", "-"), version)
    threads = found["threads"]
    table.add_row("threads", f"{threads['torch']} of {threads['cores']} cores (OMP_NUM_THREADS sets it)")
    for device in found["devices"]:
        table.add_row("device", f"{device['type']}: {device['name']}")
    table.add_row("backend", f"{found['backend']['name']} ({found['backend']['why']})")
    for kind, status in found["triton"].items():
        table.add_row(f"triton on {kind}", Text(("yes: " if status["usable"] else "no: ") + status["why"]))
    if found["kernels"]:
        tuned = found["kernels"]
        how = f"measured, kept in {tuned['file']}" if tuned["autotune"] else "RFA_FAST_AUTOTUNE=1 measures instead"
        table.add_row("kernels", Text(f"tile sizes of the {tuned['table']} table; {how}"))
    for name, about in found["methods"].items():
        table.add_row(f"method {name}", about)
    console.print(table, "")
    data = _table("Data sets")
    for heading in ("Name", "What", "Where it is, or how to get it"):
        data.add_column(heading, overflow="fold")
    for entry in found["data"]:
        missing = entry["found"] is None
        place = Text(f"not here; {entry['get']}" if missing else entry["found"], style="yellow" if missing else "")
        data.add_row(Text(entry["name"], style="bold"), entry["what"], place)
    console.print(data, "")


def _print_model(found: dict[str, Any], console: Console) -> None:
    share = 100 * found["trainable"] / max(found["parameters"], 1)
    console.print(Text(f"{found['model']}: {found['class']}, {found['parameters']:,} parameters, {found['dtype']}"))
    console.print(
        Text(f"{len(found['adapted'])} layers adapted, {found['trainable']:,} trainable parameters ({share:.2f} %)")
    )
    console.print(Text(f"backend: {found['backend']}"))
    adapted = _table("Adapted")
    for heading in ("Layer", "Kind", "Weight", "Rank", "Scale", "Parameters"):
        number = heading in ("Rank", "Scale", "Parameters")
        # A name may be long: it is the one to be folded, the figures are kept whole.
        adapted.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=heading != "Layer")
    for row in found["adapted"]:
        shape = "×".join(map(str, row["shape"]))
        adapted.add_row(Text(row["name"]), row["kind"], shape, str(row["rank"]), f"{row['scale']:g}",
                        f"{row['parameters']:,}")  # fmt: skip
    console.print(adapted, "")
    if found["skipped"]:
        skipped = _table("Left as they are")
        skipped.add_column("Layer", overflow="fold")
        skipped.add_column("Why", overflow="fold")
        for row in found["skipped"]:
            skipped.add_row(Text(row["name"]), Text(row["reason"]))
        console.print(skipped, "")


def _table(title: str = "") -> Table:
    return Table(
        title=title or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False, show_header=bool(title),
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
