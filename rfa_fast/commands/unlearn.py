"""`rfa-fast unlearn`: open, measure, unlearn, measure, write everything down.

The order is that of what can go wrong: data, split and models are opened and checked before the run
begins, the retrained model is measured and let go of before the other one is trained, and what was
trained is on disk before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from rfa_fast.commands import options
from rfa_fast.commands.early import check_run, check_settings, refuse_other_settings
from rfa_fast.commands.inputs import (
    ForgetRequest,
    ModelRequest,
    Prepared,
    check_other,
    load_data,
    prepare,
    settings_of,
)
from rfa_fast.commands.measure import REPORT_JSON, REPORT_PAGE, Measured, Measuring, finish, scenario
from rfa_fast.commands.method import METHOD_NAMES, method_options, refuse_idle_length
from rfa_fast.commands.shell import check_output, command_line, reported, results, say
from rfa_fast.data.preprocessing import preprocessing_file
from rfa_fast.experiments.comparison import machine
from rfa_fast.methods import METHODS, NonFiniteError, UnlearnInterrupted, UnlearnResult, checks, hash_model
from rfa_fast.methods import unlearn as run_unlearn
from rfa_fast.methods.checkpoint import ADAPTER_FOLDER, RunFolder
from rfa_fast.methods.record import RECORD_FILE
from rfa_fast.metrics import feature_distance
from rfa_fast.models import save_model
from rfa_fast.report import RunReport
from rfa_fast.targets import select

MODEL_FOLDER, SPLIT_FILE = "model", "split.json"
_DISTANCE_SAMPLES = 512
_METHOD, _TRAINING, _OUTPUT = options.METHOD, options.TRAINING, options.OUTPUT


def unlearn(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
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
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {METHOD_NAMES}.", rich_help_panel=_METHOD)
    ] = "rfa",
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the method, such as retain_share=1 or beta=0.5; an "
                     "unknown one is answered with the list. Repeatable.", rich_help_panel=_METHOD, show_default=False),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(metavar="WHICH", help="Layers to adapt or train: all, deep, middle, shallow, a regex, or, "
                     "repeated, names.", rich_help_panel=_METHOD, show_default="rfa: all; others: the whole model"),
    ] = None,
    rank: Annotated[
        int, typer.Option(help="Rank r of the adapters (this and the rest: rfa alone).", rich_help_panel=_METHOD)
    ] = 8,
    alpha: Annotated[float, typer.Option(help="Scale of the adapters is alpha / rank.", rich_help_panel=_METHOD)] = 32,
    mode: Annotated[
        str, typer.Option(metavar="residual|teacher", help="Align each layer's own residual, or with the original "
                          "model's features.", rich_help_panel=_METHOD)
    ] = "residual",
    norm: Annotated[
        str, typer.Option(metavar="mse|l2", help="Of the alignment terms.", rich_help_panel=_METHOD)
    ] = "mse",
    gamma: Annotated[
        float, typer.Option(help="Weight of the alignment against the task, 0 to 1.", rich_help_panel=_METHOD)
    ] = 0.5,
    loss_weights: Annotated[
        str, typer.Option(metavar="α,β,λ,μ", help="Weights of retain and forget alignment, retain and forget task.",
                          rich_help_panel=_METHOD)
    ] = "1,1,1,1",
    adapter: Annotated[
        str, typer.Option(metavar="lora|pissa|dora", help="Kind of adapter.", rich_help_panel=_METHOD)
    ] = "lora",
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / √rank instead.", rich_help_panel=_METHOD)
    ] = False,
    backend: Annotated[
        str, typer.Option(metavar="auto|torch|reference|triton", help="Which operators run.", rich_help_panel=_METHOD)
    ] = "auto",
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.", rich_help_panel=_TRAINING)] = 5e-5,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_TRAINING)] = 0.01,
    epochs: Annotated[int, typer.Option(help="Passes over what is kept.", rich_help_panel=_TRAINING)] = 1,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Kept and forgotten samples per batch together.",
                                 rich_help_panel=_TRAINING, show_default="128 images or 32 texts")
    ] = None,
    forget_per_batch: Annotated[
        str, typer.Option(metavar="auto|natural|N", rich_help_panel=_TRAINING,
                          help="Forget samples in each batch. auto: their share, at least one, so that few among many "
                          "come several times an epoch; natural: a plain shuffle, each comes once.")
    ] = "auto",
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after so many steps.", rich_help_panel=_TRAINING,
                                 show_default=False)
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Clip the gradient to this norm.", rich_help_panel=_TRAINING,
                                   show_default=False)
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="constant|linear|cosine", rich_help_panel=_TRAINING,
                          help="Whether and how the learning rate falls to 0 until the run ends.")
    ] = "constant",
    autocast: Annotated[
        str | None, typer.Option(metavar="bfloat16", help="Compute in this where torch.autocast does.",
                                 rich_help_panel=_TRAINING, show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the split, the adapters and the order.", min=0, rich_help_panel=_TRAINING)
    ] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Steps between checkpoints.", rich_help_panel=_TRAINING,
                                 show_default="about one a minute")
    ] = None,
    retrained: options.Retrained = None,
    eval_batch_size: options.EvalBatch = None,
    eval_samples: options.EvalSamples = None,
    prompt: options.Prompt = None,
    distances: Annotated[
        bool, typer.Option("--distances/--no-distances", help="Measure how far each layer's features moved; opens the "
                           "original once more.", rich_help_panel=options.MEASURING)
    ] = True,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For everything that is written.", rich_help_panel=_OUTPUT)
    ] = Path("runs/unlearn"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output.", rich_help_panel=_OUTPUT)
    ] = False,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Write rfa's adapter alone, no merged model.",
                           rich_help_panel=_OUTPUT)
    ] = False,
    progress: options.Progress = True,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Make a trained model forget a class, samples, or texts with a word, and keep the rest.

    Prints the model before and after (and retrained, where you have that) on
    what is kept, D_r and D_rt, and on what is forgotten, D_f and D_ft, with
    membership inference and time. Writes the merged model, the adapter, the
    deletion record, split.json, report.json and report.html to --output.
    Ctrl-C keeps what was done; --resume goes on.

    [bold]Examples[/bold]

    rfa-fast unlearn ./my-bert --data news.jsonl --forget-class sports

    rfa-fast unlearn ./my-llm --data trivia --forget-keyword NASA \\
        --lr 2e-4 --prompt "The first man on the moon was"

    rfa-fast unlearn torchvision:resnet18 --weights original.safetensors \\
        --data fashion-mnist --pad-to 32 --forget-samples 128 \\
        --mode teacher --retrained retrained.safetensors

    rfa-fast unlearn my_project.nets:build --weights net.safetensors \\
        --data images.npz --forget-ids requests.txt

    rfa-fast unlearn ./my-llm --data trivia --forget-class starwars \\
        --method npo --method-option beta=0.5 --lr 1e-5
    """
    with reported(context, debug=debug, output=output):
        check_output(output)
        forget = ForgetRequest(forget_class, forget_samples, forget_keyword, forget_ids, split, seed)
        forget.check()
        adapting = {
            "rank": rank, "alpha": alpha, "mode": mode, "norm": norm, "gamma": gamma, "weights": _weights(loss_weights),
            "adapter": adapter, "rslora": rslora, "backend": backend,
        }  # fmt: skip
        placed = _targets(targets) if targets else None
        settings: dict[str, Any] = {
            "method": method, **method_options(context, method, method_option or [], placed, adapting),
            "lr": lr, "weight_decay": weight_decay, "schedule": schedule, "epochs": epochs,
            "batch_size": batch_size, "max_steps": max_steps,
            "forget_per_batch": _per_batch(forget_per_batch), "max_grad_norm": max_grad_norm,
            "autocast": checks.autocast_dtype(autocast), "seed": seed,
        }  # fmt: skip
        check_settings(settings, checkpoint_every)
        _refuse_other_run(output, resume=resume)
        request = ModelRequest(model, weights, tokenizer, dtype, trust_remote_code, device)
        bundle = load_data(
            data, data_option or [], pad_to=pad_to, channels=channels, model=model,
            others=[] if retrained is None else [("--retrained", retrained)],
        )  # fmt: skip
        refuse_idle_length(context, bundle.kind)
        opened = request.open(len(bundle.classes))
        prepared = prepare(bundle, forget, opened, max_length=max_length, channels=channels)
        for note in prepared.notes:
            say(note)
        measure = Measuring(
            prepared, eval_batch_size, eval_samples, tuple(prompt or ()), opened.tokenizer, seed, progress
        )
        source = check_run(opened.model, prepared.subsets, settings)
        if resume:
            refuse_other_settings(output, opened.model, source, settings, merge=not keep_adapter)
        reference = None
        if retrained is not None:
            other = request.open_other("--retrained", retrained, len(bundle.classes))
            check_other("--retrained", other, opened, prepared)
            reference = measure(other.model, "Retrain")
            del other
        measured = [measure(opened.model, "Before")] if resume else []

        def evaluate(of: nn.Module) -> Mapping[str, float]:
            measured.append(measure(of, "After" if measured else "Before"))
            return measured[-1].figures

        try:
            result = run_unlearn(
                opened.model, prepared.subsets["D_f"], prepared.subsets["D_r"], output_dir=output, resume=resume,
                evaluate=evaluate, progress=progress, checkpoint_every=checkpoint_every, device=device,
                merge=not keep_adapter, **settings,
            )  # fmt: skip
        except (UnlearnInterrupted, NonFiniteError):
            if output.is_dir():
                prepared.split.save(output / SPLIT_FILE)
            raise
        prepared.split.save(output / SPLIT_FILE)
        if not keep_adapter:
            save_model(opened.model, output / MODEL_FOLDER, opened.tokenizer, preprocessing_file(model))
        notes = list(prepared.notes)
        moved = _distances(request, result, prepared, measure, notes) if distances else {}
        finish(
            _report(context, model, result, prepared, measured, reference, settings, notes, moved), output, results()
        )
        written = [ADAPTER_FOLDER, RECORD_FILE, SPLIT_FILE, *([] if keep_adapter else [MODEL_FOLDER])]
        say(f"Written to {output}: {', '.join(written)}")


def _report(
    context: typer.Context,
    model: str,
    result: UnlearnResult,
    prepared: Prepared,
    measured: list[Measured],
    reference: Measured | None,
    settings: Mapping[str, Any],
    notes: list[str],
    moved: Mapping[str, Mapping[str, float]],
) -> RunReport:
    training = result.record["training"]
    rows: dict[str, tuple[Measured, float | None]] = {"Before": (measured[0], None)}
    if reference is not None:
        rows["Retrain"] = (reference, None)
    rows["After"] = (measured[-1], float(training["seconds"]))
    shown = scenario(
        prepared, rows, before="Before", after="After",
        notes=[
            f"Steps: {training['steps']}; {_times(result)}{_changed(result)} layers: {len(result.record['layers'])}.",
            *notes,
        ],
        settings={**settings_of(prepared), "model": model, "method": dict(settings)},
        losses=[{k: v for k, v in step.items() if isinstance(v, int | float)} for step in result.history],
        feature_distance=moved,
    )  # fmt: skip
    return RunReport(
        f"rfa-fast unlearn {model}", [shown], seed=settings["seed"], command=command_line(context), machine=machine()
    )


def _distances(
    request: ModelRequest, result: UnlearnResult, prepared: Prepared, measure: Measuring, notes: list[str]
) -> dict[str, dict[str, float]]:
    """How far the features of the changed layers are from those of the original, which is opened once more.

    A method that trains every weight changes norms and embeddings too; its features are those that RFA would align.
    """
    original = request.open(len(prepared.data.classes)).model
    if hash_model(original) != result.record["model"]["before"]:
        notes.append("Opened again, the model has other weights: distances to the original could not be measured")
        return {}
    known = dict(original.named_modules())
    layers = [name for name in result.record["layers"] if name in known]
    if result.record["method"] != "rfa":
        adaptable = {target.name for target in select(original, "all").adapted}
        layers = [name for name in layers if name in adaptable]
    if not layers:
        notes.append("No layer with features to compare was changed")
        return {}
    few = min(_DISTANCE_SAMPLES, measure.limit or _DISTANCE_SAMPLES)
    loaders = prepared.loaders(measure.batch_size, few, ("D_r", "D_f"))
    return {name: feature_distance(result.model, original, loader, layers) for name, loader in loaders.items()}


def _refuse_other_run(output: Path, *, resume: bool) -> None:
    """Raises FileExistsError when the folder holds something that this run would write over."""
    there = RunFolder(output).found()
    if resume and there:
        return
    others = (MODEL_FOLDER, *(() if resume else (SPLIT_FILE,)), REPORT_JSON, REPORT_PAGE)
    there += [name for name in others if (output / name).exists()]
    if there and resume:
        raise FileExistsError(
            f"--output: {output} holds no run to go on with, but {', '.join(there)}, which a new run would write over; "
            "expected the folder of an unlearning run, or an empty or new one"
        )
    if there:
        raise FileExistsError(
            f"--output: {output} already holds a run (found {', '.join(there)}); expected an empty or new folder. Say "
            "--resume to go on with an unlearning run, or name another folder"
        )


def _changed(result: UnlearnResult) -> str:
    return "adapted" if METHODS[result.record["method"]].trains == "adapters" else "trained"


def _times(result: UnlearnResult) -> str:
    """How often the steps showed a sample to forget, in the mean, as a clause; empty where the method shows none."""
    kind, options = METHODS[result.record["method"]], result.record["settings"]["options"]
    passes = kind.passes(options, result.record["settings"]["epochs"])
    if not any(kind.uses_forget(options, epoch) for epoch in range(passes)):
        return ""
    drawn = result.record["training"]["forget_samples_drawn"] / result.record["forget"]["count"]
    return f"each sample to forget came {'once' if drawn == 1 else f'{drawn:.1f} times'}; "


def _targets(targets: list[str] | None) -> str | list[str]:
    if not targets:
        return "all"
    return targets[0] if len(targets) == 1 else targets


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--loss-weights: got {text!r}, expected four numbers such as 1,1,1,0.5") from None


def _per_batch(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
