"""`rfa-fast evaluate`: the table for models that exist already; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rfa_fast.commands import options
from rfa_fast.commands.alike import without_weights
from rfa_fast.commands.inputs import ForgetRequest, ModelRequest, check_other, load_data, prepare, settings_of
from rfa_fast.commands.measure import Measured, Measuring, finish, scenario
from rfa_fast.commands.method import refuse_idle_length
from rfa_fast.commands.shell import check_output, command_line, reported, results, say
from rfa_fast.experiments.comparison import machine
from rfa_fast.report import RunReport


def evaluate(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Another model for the table: named like MODEL, a .safetensors file with "
                     "other weights for it, or a folder with an adapter for it. Repeatable.",
                     rich_help_panel=options.MODEL_AND_DATA, show_default=False),
    ] = None,
    weights: options.Weights = None,
    data_option: options.DataOption = None,
    pad_to: options.PadTo = None,
    channels: options.Channels = None,
    max_length: options.MaxLength = 128,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    forget_class: options.ForgetClass = None,
    forget_samples: options.ForgetSamples = None,
    forget_keyword: options.ForgetKeyword = None,
    forget_ids: options.ForgetIds = None,
    split: options.SplitFile = None,
    retrained: options.Retrained = None,
    eval_batch_size: options.EvalBatch = None,
    eval_samples: options.EvalSamples = None,
    prompt: options.Prompt = None,
    seed: Annotated[
        int, typer.Option(help="Of the split and the membership attack.", min=0, rich_help_panel=options.MEASURING)
    ] = 0,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For report.json and report.html, which are replaced.",
                           rich_help_panel=options.OUTPUT)
    ] = Path("runs/evaluate"),
    progress: options.Progress = True,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Measure one or several models on what is kept and on what is forgotten.

    [bold]Examples[/bold]

    rfa-fast evaluate runs/unlearn/model --data news.jsonl \\
        --split runs/unlearn/split.json

    rfa-fast evaluate ./my-bert --data news.jsonl --forget-class sports \\
        --against runs/unlearn/model

    rfa-fast evaluate torchvision:resnet18 --weights original.safetensors \\
        --data fashion-mnist --pad-to 32 --forget-class 3 \\
        --against runs/unlearn/model/model.safetensors \\
        --retrained retrained.safetensors
    """
    with reported(context, debug=debug):
        check_output(output)
        forget = ForgetRequest(forget_class, forget_samples, forget_keyword, forget_ids, split, seed)
        forget.check()
        others = list(against or [])
        if repeated := sorted({name for name in [model, *others] if [model, *others].count(name) > 1}):
            raise ValueError(f"--against: got {', '.join(repeated)} twice, expected each model once")
        request = ModelRequest(model, weights, tokenizer, dtype, trust_remote_code, device)
        compared = [] if retrained is None else [("Retrain", "--retrained", retrained)]
        compared += [(name, "--against", name) for name in others]
        bundle = load_data(
            data, data_option or [], pad_to=pad_to, channels=channels, model=model,
            others=[(flag, name) for _, flag, name in compared],
        )  # fmt: skip
        refuse_idle_length(context, bundle.kind)
        opened = request.open(len(bundle.classes))
        prepared = prepare(bundle, forget, opened, max_length=max_length, channels=channels)
        for note in prepared.notes:
            say(note)
        first = without_weights(opened)
        if compared:
            # Each is tried before anything is measured and opened again to be measured: one at a time in memory.
            del opened
            for _, flag, name in compared:
                check_other(flag, request.open_other(flag, name, len(bundle.classes)), first, prepared)
            opened = request.open(len(bundle.classes))
        measure = Measuring(
            prepared, eval_batch_size, eval_samples, tuple(prompt or ()), first.tokenizer, seed, progress
        )
        if prompt and not others:
            raise ValueError("--prompt: got one without --against, expected a second model whose text stands beside it")
        rows: dict[str, tuple[Measured, float | None]] = {model: (measure(opened.model, model), None)}
        del opened  # one model in memory at a time
        for label, flag, name in compared:
            rows[label] = (measure(request.open_other(flag, name, len(bundle.classes)).model, label), None)
        second = others[0] if others else None
        notes = [] if len(others) < 2 else [f"The plots show {model} and {second}."]
        shown = scenario(
            prepared, rows, before=model, after=second, notes=[*notes, *prepared.notes],
            settings={**settings_of(prepared), "models": [model, *others]},
        )  # fmt: skip
        report = RunReport("rfa-fast evaluate", [shown], seed=seed, command=command_line(context), machine=machine())
        finish(report, output, results())
