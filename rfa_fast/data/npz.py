"""The user's own images as one NumPy archive: what is in it is checked, since nobody else has seen the file."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.images import Finish, Normalise, Part, divide_images, file_labels, image_bundle, unit_pixels
from rfa_fast.data.own import class_names, held_out, largest_index, named_in_unicode


def load_npz(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    layout: Literal["CHW", "HWC"] | None = None,
    pad_to: int | None = None,
    channels: int | None = None,
    normalise: Normalise = "train",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """A NumPy archive with arrays `x` and `y`, and with `x_test` and `y_test` where there is a test set.

    Args:
        path: the .npz file. `x` is (n, H, W), (n, C, H, W) or (n, H, W, C), uint8 of 0 to 255 or floats,
            which are taken as they are; `y` is (n,), integers from 0.
        classes: class names by index; else an array `classes` of the file, else the numbers.
        layout: which of the four-dimensional ones; `None`: the one that makes the number of channels 1, 3 or 4.
        pad_to, channels, normalise, test_fraction, seed: as for :func:`load_digits`.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `classes` is no list of names.
        ValueError: not an archive or cut short, an array missing or of another shape or dtype, NaN, a
            label out of range, or too large to be a class index (:func:`~rfa_fast.data.own.largest_index`).
            Arrays of Python objects are refused: reading one runs code.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.npz"
        >>> np.savez(file, x=np.zeros((10, 5, 5), np.uint8), y=np.arange(10) % 2)
        >>> data = load_npz(file, normalise="none")
        >>> len(data.train), len(data.test), data.classes
        (8, 2, ('0', '1'))
    """
    path = named_in_unicode(Path(path))
    names = None if classes is None else class_names("classes", classes)
    arrays = _read_npz(path)
    if missing := [key for key in ("x", "y") if key not in arrays]:
        raise ValueError(f"{path}: got arrays {', '.join(arrays) or 'none'}, expected {missing[0]!r} among them")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{path}: got one of 'x_test' and 'y_test', expected both or neither")
    if names is None and "classes" in arrays:
        names = _npz_classes(path, arrays["classes"])
    given: list[Part] = []
    for suffix in ("", "_test") if "x_test" in arrays else ("",):
        images = _npz_images(path, "x" + suffix, arrays["x" + suffix], layout)
        y = arrays["y" + suffix]
        if y.shape != (len(images),) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{path}: y{suffix}: got {y.dtype} {y.shape}, expected integers ({len(images)},)")
        if names is None:
            names = _numbers(path, y)
        given.append(Part(images, file_labels(path, y.tolist(), names)))
    if len(given) == 2 and given[0].images.shape[1:] != given[1].images.shape[1:]:
        shapes = [tuple(part.images.shape[1:]) for part in given]
        raise ValueError(f"{path}: x_test: got images (C, H, W) = {shapes[1]}, expected {shapes[0]} as x has")
    parts = (given[0], given[1]) if len(given) == 2 else divide_images(*given[0].both(), test_fraction, seed)
    finish = Finish(pad_to, channels, normalise)
    bundle = image_bundle(path.stem, parts, names or (), finish, str(path), "the user's own")
    if len(given) == 2:
        return bundle
    note = held_out(
        len(bundle.test), len(given[0].labels), "images", "put a test set into the file as x_test and y_test"
    )
    return replace(bundle, notes=(*bundle.notes, note))


def _read_npz(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a .npz file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            # A member that is no array comes as bytes.
            return {key: np.asarray(archive[key]) for key in archive.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: got {error}, expected a NumPy archive of plain arrays 'x' and 'y'") from error


def _npz_classes(path: Path, classes: np.ndarray[Any, Any]) -> tuple[str, ...]:
    if classes.ndim != 1 or classes.dtype.kind not in "Uiu":
        raise ValueError(
            f"{path}: classes: got {classes.dtype} {classes.shape}, expected strings (n,), a name per class"
        )
    return class_names(f"{path}: classes", classes.tolist())


def _numbers(path: Path, y: np.ndarray[Any, Any]) -> tuple[str, ...]:
    """The names of classes that are numbers: 0 to the largest label."""
    place, most = int(y.argmax()), largest_index(len(y))
    if y[place] > most:
        raise ValueError(
            f"{path}: y: got {y[place]} at position {place}, expected a class index, at most {most} among {len(y)} "
            "labels; number the classes from 0, or name them all with an array classes"
        )
    return tuple(str(index) for index in range(int(y[place]) + 1))


def _npz_images(path: Path, name: str, x: np.ndarray[Any, Any], layout: str | None) -> Tensor:
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(f"{path}: {name}: got shape {x.shape}, expected (n, H, W), (n, C, H, W) or (n, H, W, C)")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{path}: {name}: got {x.dtype}, expected uint8 or floats")
    images = unit_pixels(x) if x.dtype == np.uint8 else torch.from_numpy(np.ascontiguousarray(x, np.float32))
    if not bool(images.isfinite().all()):
        raise ValueError(f"{path}: {name}: got NaN or infinity, expected finite values")
    if layout not in (None, "CHW", "HWC"):
        raise ValueError(f"layout: got {layout!r}, expected 'CHW' or 'HWC'")
    if x.ndim == 3:
        return images[:, None]
    if layout is None:
        fits = [order for order, axis in (("CHW", 1), ("HWC", 3)) if x.shape[axis] in (1, 3, 4)]
        if len(fits) != 1:
            raise ValueError(f"{path}: {name}: got shape {x.shape}, expected layout='CHW' or layout='HWC' to be given")
        layout = fits[0]
    return images if layout == "CHW" else images.permute(0, 3, 1, 2).contiguous()
