"""A folder of images as a transformers model takes them: the size and the normalisation that its own folder says.

A classifier answers for images of the size and the normalisation that it was trained with. Shown in another, it
still answers, and its figures are those of a worse model. What transformers writes beside a model as
`preprocessor_config.json` is plain JSON and is read as such: none of its code is run, and what it asks for and a
folder of images does not do is said in a note.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfa_fast.data.catalogue import loader_of, options_of
from rfa_fast.data.folders import load_image_folder
from rfa_fast.files import read_object
from rfa_fast.hub import hub_folder

FILE = "preprocessor_config.json"
_OPTIONS = ("size", "normalise")
_BILINEAR = 2
# What changes an image beside size and normalisation, where it is set.
_UNFOLLOWED = (
    "crop_pct",
    "do_color_quantize",
    "do_flip_channel_order",
    "do_grayscale",
    "include_top",
    "rescale_offset",
)


def preprocessing_file(model: str) -> Path | None:
    """The file in a model's folder, or in the hub's cache, that says how images are shown to it; `None` without one.

    Args:
        model: the word that the model is opened by.

    Example:
        >>> preprocessing_file("torchvision:resnet18") is None
        True
    """
    folder = _folder_of(model)
    return folder / FILE if folder is not None and (folder / FILE).is_file() else None


def shown_to(
    data: str, model: str, typed: Collection[str], others: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The options `size` and `normalise` of a folder of images that its model's folder asks for, and notes on them.

    Args:
        data: the word that the data are loaded by; for anything but a folder of images there are none, and of
            images a note on what the model's folder asks for.
        model: the word that the model is opened by.
        typed: names of the options that the user gave, which are left alone.
        others: flag and word of the models to compare with.

    Raises:
        ValueError: a file that is no JSON object, or a value in it that a folder of images cannot follow; names the
            option that overrides it. Another model that was made for other images.

    Example:
        >>> import tempfile
        >>> images, model = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> values = {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        >>> _ = (model / FILE).write_text(json.dumps(values))
        >>> shown_to(str(images), str(model), ["size"])[0]
        {'normalise': [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]}
    """
    if loader_of(data) is not load_image_folder:
        return {}, _advice(data, model, typed)
    options, notes = _asked_for(model, typed)
    for flag, other in others:
        for option, value in _asked_for(other, typed)[0].items():
            # Without a size of its own a model may take any; that is seen when it is run.
            if value != options.get(option) and (option in options or option == "normalise"):
                raise ValueError(
                    f"{flag}: got {other}, made for {option}={value}, expected {options.get(option, 'none')}, as "
                    f"{model}; evaluate it by itself, or say for both --data-option {option}=…"
                )
    return options, notes


def _advice(data: str, model: str, typed: Collection[str]) -> list[str]:
    """What a set of images, which comes in its own size and number of channels, is not normalised by unasked."""
    loader, file = loader_of(data), preprocessing_file(model)
    if file is None or loader is None or "normalise" not in {*options_of(loader)} - {*typed}:
        return []
    normalise = _normalise(file, read_object(file, "how images are shown to the model"))
    if normalise is None:
        return []
    return [
        f"{file} asks for normalise={normalise}; {data} is normalised by its own mean and standard deviation, "
        "--data-option normalise=…, one number per channel, shows it as the model was trained"
    ]


def _folder_of(model: str) -> Path | None:
    return Path(model) if Path(model).is_dir() else hub_folder(model)


def _asked_for(model: str, typed: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    folder = _folder_of(model)
    if folder is None or set(_OPTIONS) <= set(typed):
        return {}, []
    file = folder / FILE
    values = read_object(file, "how images are shown to the model") if file.is_file() else None
    options: dict[str, Any] = {}
    origins: dict[Path, list[str]] = {}
    remarks: list[str] = []
    if "size" not in typed:
        size, origin = (None, file) if values is None else (_size(file, values, remarks), file)
        if size is None:
            size, origin = _configured_size(folder / "config.json"), folder / "config.json"
        if size is not None:
            options["size"] = size
            origins.setdefault(origin, []).append(f"size={size}")
    if "normalise" not in typed and values is not None:
        if (normalise := _normalise(file, values)) is not None:
            options["normalise"] = normalise
            origins.setdefault(file, []).append(f"normalise={normalise}")
        else:
            remarks.append(
                f"{file} names no image_mean: images are normalised by their own, --data-option normalise=… says "
                "otherwise"
            )
    if values is not None and (unfollowed := _unfollowed(values)):
        remarks.append(f"not followed: {', '.join(unfollowed)}")
    taken = [f"{' and '.join(named)} taken from {origin}" for origin, named in origins.items()]
    overrides = (
        f"--data-option {' and '.join(f'{option}=…' for option in options)} say{'s'[: 2 - len(options)]} otherwise"
    )
    parts = [*([f"{', '.join(taken)}; {overrides}"] if taken else []), *remarks]
    return options, ["; ".join(parts)] if parts else []


def _size(file: Path, values: Mapping[str, Any], remarks: list[str]) -> int | None:
    """Height and width in the end; `None` where the file does not say, or in a way that depends on the image."""
    cut = bool(values.get("do_center_crop")) and values.get("crop_size") is not None
    name = "crop_size" if cut else "size"
    value = values.get(name)
    sides = [value[key] for key in ("height", "width") if key in value] if isinstance(value, dict) else value
    if isinstance(sides, list) and len(sides) == 2:
        if sides[0] != sides[1]:
            raise ValueError(
                f"{file}: {name}: got {sides[0]} × {sides[1]} pixels, expected a square, which images of a folder are "
                "cut to; say --data-option size=PIXELS, or store the images in that shape as an .npz file"
            )
        if not cut:
            remarks.append("images that are not square are cut, not stretched as there")
        value = sides[0]
    elif isinstance(value, dict):
        value = value.get("shortest_edge")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{file}: {name}: got {value!r}, expected pixels, at least 1; say --data-option size=PIXELS")
    return value


def _configured_size(file: Path) -> int | None:
    """What a model's configuration says; a file that cannot be read is left to who opens the model."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))["image_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _normalise(file: Path, values: Mapping[str, Any]) -> str | list[list[float]] | None:
    """Mean and standard deviation of images in [0, 1]; `None` where the file does not say."""
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(
            f"{file}: rescale_factor: got {factor!r}, expected a number above 0; say --data-option normalise=…"
        )
    # They count in bytes times that factor, a folder of images in [0, 1].
    scale = 255 * factor
    if values.get("do_normalize", True) is False:
        return "none" if math.isclose(scale, 1) else [[0.0] * 3, [1 / scale] * 3]
    if values.get("image_mean") is None and values.get("image_std") is None:
        return None
    mean, std = (_three(file, values, name) for name in ("image_mean", "image_std"))
    return [mean, std] if math.isclose(scale, 1) else [[value / scale for value in row] for row in (mean, std)]


def _three(file: Path, values: Mapping[str, Any], name: str) -> list[float]:
    value = values.get(name)
    row = [value] * 3 if isinstance(value, int | float) else value
    if (
        not isinstance(row, list)
        or len(row) != 3
        or not all(isinstance(v, int | float) and math.isfinite(v) and (v > 0 or name == "image_mean") for v in row)
    ):
        above = "" if name == "image_mean" else " above 0"
        raise ValueError(
            f"{file}: {name}: got {value!r}, expected three numbers{above}, for red, green and blue; say --data-option "
            "'normalise=[[…], […]]', mean and standard deviation"
        )
    return [float(v) for v in row]


def _unfollowed(values: Mapping[str, Any]) -> list[str]:
    """What else is done to an image there, and not here."""
    found = [f"{name}={json.dumps(values[name])}" for name in _UNFOLLOWED if values.get(name)]
    if values.get("resample", _BILINEAR) not in (_BILINEAR, None):
        found.append(f"resample={json.dumps(values['resample'])}")
    size, cut = (_edge(values.get(name)) for name in ("size", "crop_size"))
    if values.get("do_center_crop") and size is not None and cut is not None and size != cut:
        found.append(f"size={size} before the cut")
    return found


def _edge(value: Any) -> Any:
    return (
        next((value[key] for key in ("shortest_edge", "height") if key in value), None)
        if isinstance(value, dict)
        else value
    )
