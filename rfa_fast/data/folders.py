"""A folder of image files, one folder per class: decoded when taken, because it may not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import check_labels
from rfa_fast.data.draws import integer
from rfa_fast.data.images import Normalise, statistics
from rfa_fast.data.splits import stratified_split

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Image files, each decoded when it is taken, to float32 (3, size, size) and normalised.

    The shorter side is scaled to `size` and the middle is cut out; transparency is dropped.

    Args:
        files: paths of the images.
        labels: class index of each.
        classes: class names by index.
        size: height and width, in pixels.
        mean, std: (3,), what the images in [0, 1] are normalised by.
        transform: applied to each image, for augmentation.
        ids: names of the samples; the paths when not given.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> file = Path(tempfile.mkdtemp()) / "red.png"
        >>> Image.new("RGB", (6, 4), (255, 0, 0)).save(file)
        >>> data = FolderDataset([file], [0], ("red",), size=2, mean=torch.zeros(3), std=torch.ones(3))
        >>> data[0][0][:, 0, 0]
        tensor([1., 0., 0.])
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        size: int,
        mean: Tensor,
        std: Tensor,
        transform: Callable[[Tensor], Tensor] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.files = list(files)
        self.classes = tuple(classes)
        self.labels = check_labels(labels, len(self.files), self.classes)
        self.size = integer("size", size, 1)
        self.mean, self.std = mean, std
        self.transform = transform
        self.ids = list(ids) if ids is not None else [str(file) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = _decode(self.files[index], self.size).sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return (image if self.transform is None else self.transform(image)), self.labels[index]


def load_image_folder(
    root: str | os.PathLike[str],
    *,
    size: int = 224,
    normalise: Normalise = "train",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """A folder with one folder of images per class, or with two such folders `train` and `test` (or `val`).

    Args:
        root: the folder. Classes are in alphabetical order.
        size: height and width, in pixels.
        normalise: `"train"`: by mean and standard deviation of the training images, which costs one pass
            over them; `"none"`: keep [0, 1]; or `(mean, std)`, three numbers each, as the model was trained.
        test_fraction, seed: where there is no test folder, this share of each class is the test set.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folder, a class without an image, other classes in the test folder; a file that
            is no image, when it is decoded.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     Image.new("RGB", (4, 4)).save(root / name)
        >>> data = load_image_folder(root, size=4, normalise="none")
        >>> data.classes, len(data.train), len(data.test)
        (('cat', 'dog'), 2, 2)
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist, expected a folder with one folder of images per class")
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test_root is not None and (root / "train").is_dir():
        classes, files, labels = _walk(root / "train")
        other, test_files, test_labels = _walk(test_root)
        if other != classes:
            raise ValueError(
                f"{test_root}: got classes {', '.join(other)}, expected those of train: {', '.join(classes)}"
            )
    else:
        classes, found, found_labels = _walk(root)
        try:
            kept, held_out = stratified_split(found_labels, test_fraction, seed)
        except ValueError as error:
            raise ValueError(f"{root}: {error}; classes in order: {', '.join(classes)}") from error
        files, test_files = [found[i] for i in kept], [found[i] for i in held_out]
        labels, test_labels = [found_labels[i] for i in kept], [found_labels[i] for i in held_out]
    integer("size", size, 1)
    mean, std = _folder_statistics(files, size) if normalise == "train" else statistics(torch.empty(0, 3), normalise)
    train, test = (
        FolderDataset(
            paths, indices, classes, size=size, mean=mean, std=std, ids=[p.relative_to(root).as_posix() for p in paths]
        )
        for paths, indices in ((files, labels), (test_files, test_labels))
    )
    note = f"scaled and cut to {size} × {size} pixels; mean {mean.tolist()}, standard deviation {std.tolist()}"
    return DataBundle(root.name, train, test, tuple(classes), "image", str(root), "the user's own", (note,))


def _walk(root: Path) -> tuple[list[str], list[Path], list[int]]:
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{root}: got no folder, expected one folder of images per class")
    files: list[Path] = []
    labels: list[int] = []
    for index, name in enumerate(classes):
        members = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not members:
            raise ValueError(f"{root / name}: got no image, expected files ending in {', '.join(SUFFIXES)}")
        files += members
        labels += [index] * len(members)
    return classes, files, labels


def _decode(file: Path, size: int) -> Tensor:
    """The image as float32 (3, size, size) in [0, 1]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            whole: Image.Image = image
            if image.mode.startswith("I;16"):  # Pillow would clip them at 255
                whole = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode!r}, whose range is not known")
            fitted = ImageOps.fit(whole.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on a damaged file
        raise ValueError(f"{file}: got {error}, expected an image") from error
    return torch.from_numpy(np.asarray(fitted, np.float32) / 255).permute(2, 0, 1).contiguous()


def _folder_statistics(files: Sequence[Path], size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel over all pixels, (3,), summed in float64 image by image."""
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for file in files:
        image = _decode(file, size).double()
        total += image.sum(dim=(1, 2))
        squares += image.square().sum(dim=(1, 2))
    pixels = len(files) * size * size
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, torch.ones_like(std)).float()
