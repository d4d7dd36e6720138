"""The options that commands share, each once: name, help text, place in `--help`.

Values that the package checks itself (ranks, norms, data sets) stay plain text and numbers here, so
that there is one list of what is allowed and one wording of the error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_AND_DATA = "Model and data"
FORGET = "What to forget (exactly one)"
METHOD = "Method"
TRAINING = "Training"
MEASURING = "Measuring"
OUTPUT = "Output"

Model = Annotated[
    str,
    typer.Argument(
        help="A transformers folder (config.json, safetensors), a name in the hub's local cache, torchvision:NAME, or "
        "package.module:factory.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights of a torchvision or factory model (.safetensors or .pth).",
                 rich_help_panel=MODEL_AND_DATA, show_default=False),
]  # fmt: skip
Data = Annotated[
    str,
    typer.Option(metavar="NAME|PATH", help="A data set by name (see rfa-fast info), or your own: .jsonl or .csv with "
                 "the columns text and label, .npz with the arrays x and y, or a folder of images by class. Other "
                 "columns: --data-option text=review --data-option label=stars.", rich_help_panel=MODEL_AND_DATA,
                 show_default=False),
]  # fmt: skip
DataOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of the data's loader, such as test_fraction=0.1 or "
                 'topics=["starwars"]; size and normalise of a folder of images are by default as the model\'s '
                 "preprocessor_config.json says. Repeatable.", rich_help_panel=MODEL_AND_DATA, show_default=False),
]  # fmt: skip
PadTo = Annotated[
    int | None,
    typer.Option(metavar="PIXELS", help="Pad images to this height and width.", rich_help_panel=MODEL_AND_DATA,
                 show_default=False),
]  # fmt: skip
Channels = Annotated[
    int | None,
    typer.Option(metavar="N", help="Show grey images as this many channels.", rich_help_panel=MODEL_AND_DATA,
                 show_default="what the model's first convolution takes"),
]  # fmt: skip
MaxLength = Annotated[
    int, typer.Option(metavar="TOKENS", help="Length that texts are cut or padded to.", rich_help_panel=MODEL_AND_DATA)
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of the tokenizer.", rich_help_panel=MODEL_AND_DATA,
                 show_default="the model's"),
]  # fmt: skip
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|float32|bfloat16|float16", help="Load the weights as this; auto: as they are stored.",
                 rich_help_panel=MODEL_AND_DATA),
]  # fmt: skip
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that a transformers folder brings.",
                 rich_help_panel=MODEL_AND_DATA),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Such as cpu, cuda, cuda:1.", rich_help_panel=MODEL_AND_DATA,
                 show_default="the CPU"),
]  # fmt: skip

ForgetClass = Annotated[
    str | None,
    typer.Option(metavar="CLASS", help="Every sample of a class: its name or number.", rich_help_panel=FORGET,
                 show_default=False),
]  # fmt: skip
ForgetSamples = Annotated[
    int | None,
    typer.Option(metavar="N", help="N random training samples, drawn by --seed.", rich_help_panel=FORGET,
                 show_default=False),
]  # fmt: skip
ForgetKeyword = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Every text that has the word (whole word, either case).",
                 rich_help_panel=FORGET, show_default=False),
]  # fmt: skip
ForgetIds = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Training samples by id, one per line.", rich_help_panel=FORGET,
                 show_default=False),
]  # fmt: skip
SplitFile = Annotated[
    Path | None,
    typer.Option("--split", metavar="FILE", help="A split.json, such as an earlier run left.", rich_help_panel=FORGET,
                 show_default=False),
]  # fmt: skip

Retrained = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A model retrained without the forgotten samples, as the row to compare with; a "
                 ".safetensors file holds other weights for MODEL.", rich_help_panel=MEASURING, show_default=False),
]  # fmt: skip
EvalBatch = Annotated[
    int | None,
    typer.Option("--eval-batch-size", metavar="N", help="Samples per batch when measuring.", min=1,
                 rich_help_panel=MEASURING, show_default="256 images or 32 texts"),
]  # fmt: skip
EvalSamples = Annotated[
    int | None,
    typer.Option("--eval-samples", metavar="N", help="Measure on at most N samples of each subset, evenly spaced.",
                 min=1, rich_help_panel=MEASURING, show_default="all"),
]  # fmt: skip
Prompt = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Let a language model go on from this, before and after. Repeatable.",
                 rich_help_panel=MEASURING, show_default=False),
]  # fmt: skip

Seed = Annotated[int, typer.Option(help="Of the split, the adapters, the order and the attack.")]
Progress = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Show progress on standard error.", rich_help_panel=OUTPUT)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
]  # fmt: skip
