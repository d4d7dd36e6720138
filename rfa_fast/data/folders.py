"""A folder of image files, one folder per class: decoded when taken, because it may not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import check_labels
from rfa_fast.data.draws import integer
from rfa_fast.data.images import Normalise, statistics
from rfa_fast.data.own import encodes, held_out, named_in_unicode
from rfa_fast.data.splits import stratified_split
from rfa_fast.names import some

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TRAINING = ("train", "training")
TESTING = ("test", "testing", "val", "valid", "validation", "dev")  # the first that is there counts
# What a file manager or an archiver leaves behind; hidden files are left out with it.
JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir")


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Image files, each decoded when it is taken, to float32 (3, size, size) and normalised.

    The shorter side is scaled to `size` and the middle is cut out; transparency is dropped, and of an animation
    all but the first frame.

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
    """A folder with one folder of images per class, or with two such folders `train` and `test`.

    In place of `test` there may be `testing`, `val`, `valid`, `validation` or `dev`, the first of them that is
    there; in place of `train`, `training`; each in any case. `train` alone is divided. A folder of one of these
    names that holds images beside other classes is a class. Notes say which folders and files were left out;
    hidden ones and a file manager's own are left out without a word.

    Args:
        root: the folder. Classes are in alphabetical order.
        size: height and width, in pixels.
        normalise: `"train"`: by mean and standard deviation of the training images, which costs one pass
            over them; `"none"`: keep [0, 1]; or `(mean, std)`, three numbers each, as the model was trained; the
            commands take both options from the model's folder (:mod:`rfa_fast.data.preprocessing`).
        test_fraction, seed: where there is no test folder, this share of each class is the test set.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folder, a class without an image or with folders only, a `train` or `test` among
            classes, other classes in the test folder, a name that is not UTF-8; a file that is no image, or
            too large a one, when it is decoded.

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
    named_in_unicode(root)
    training, testing, notes = _layout(root)
    found = _walk(training)
    apart = [] if training == root else _loose(root)
    if testing is not None:
        kept, test = found, _walk(testing)
        if test.classes != kept.classes:
            raise ValueError(
                f"{testing}: got classes {', '.join(test.classes)}, expected those of {training.name}: "
                f"{', '.join(kept.classes)}"
            )
        apart += test.others
    else:
        try:
            sides = stratified_split(found.labels, test_fraction, seed)
        except ValueError as error:
            raise ValueError(f"{root}: {error}; classes in order: {', '.join(found.classes)}") from error
        kept, test = (found.taken(side) for side in sides)
        instead = f"put a test set in a folder test beside {training.name if training != root else 'train'}"
        notes.append(held_out(len(test.files), len(found.files), "images", instead))
    integer("size", size, 1)
    mean, std = (
        _folder_statistics(kept.files, size) if normalise == "train" else statistics(torch.empty(0, 3), normalise)
    )
    datasets = [
        FolderDataset(
            part.files, part.labels, found.classes, size=size, mean=mean, std=std,
            ids=[file.relative_to(root).as_posix() for file in part.files],
        )
        for part in (kept, test)
    ]  # fmt: skip
    scaled = f"scaled and cut to {size} × {size} pixels; mean {mean.tolist()}, standard deviation {std.tolist()}"
    notes = [scaled, *notes, *_left_out(root, [*found.others, *apart])]
    source = str(root)
    return DataBundle(
        root.name, datasets[0], datasets[1], tuple(found.classes), "image", source, "the user's own", tuple(notes)
    )


class _Found(NamedTuple):
    """Images with their class indices, and the files that were not taken."""

    classes: list[str]
    files: list[Path]
    labels: list[int]
    others: list[Path]

    def taken(self, side: Sequence[int]) -> _Found:
        """Those in the places `side`."""
        return self._replace(files=[self.files[i] for i in side], labels=[self.labels[i] for i in side])


def _layout(root: Path) -> tuple[Path, Path | None, list[str]]:
    """The folders of the training classes and, where there is one, of the test classes; notes on the others."""
    folders = _folders(root)
    training = [folder for folder in folders if folder.name.lower() in TRAINING]
    tests = [folder for folder in folders if folder.name.lower() in TESTING]
    tests.sort(key=lambda folder: TESTING.index(folder.name.lower()))
    if training and tests:
        if len(training) > 1:
            names = ", ".join(folder.name for folder in training)
            raise ValueError(f"{root}: got {names}, expected one training folder; move the images of one to the other")
        unread = [folder.name for folder in folders if folder not in (training[0], tests[0])]
        beside = f"folders beside {training[0].name} and {tests[0].name} left out: {some(unread, 5)}"
        return training[0], tests[0], [beside] if unread else []
    if training == folders and len(training) == 1:
        return training[0], None, []
    named = [folder.name for folder in (*training, *tests)]
    note = f"taken as classes, as they hold images and not a folder per class: {some(named, 5)}"
    return root, None, [note] if named else []


def _walk(root: Path) -> _Found:
    folders = _folders(root)
    if not folders:
        raise ValueError(f"{root}: got no folder, expected one folder of images per class")
    found = _Found([folder.name for folder in folders], [], [], _loose(root))
    divided: list[Path] = []
    for index, folder in enumerate(folders):
        inside = [path for path in sorted(folder.rglob("*")) if not _junk(*path.relative_to(folder).parts)]
        images = [path for path in inside if path.suffix.lower() in SUFFIXES]
        within = {path.relative_to(folder).parts[0] for path in images}
        if not any(path.parent == folder for path in images) and len(within) != 1:  # class/images/0.png is a habit
            divided.append(folder)
            if not images or folder.name.lower() in (*TRAINING, *TESTING):
                raise _without_images(root, folder)
        found.files.extend(named_in_unicode(path) for path in images)
        found.labels.extend([index] * len(images))
        found.others.extend(path for path in inside if path.suffix.lower() not in SUFFIXES and path.is_file())
    if divided == folders:  # the classes are further down
        raise _without_images(root, folders[0])
    return found


def _without_images(root: Path, folder: Path) -> ValueError:
    """What is wrong with a class folder that holds no image itself."""
    if not _folders(folder):
        return ValueError(f"{folder}: got no image, expected files ending in {', '.join(SUFFIXES)}")
    if folder.name.lower() in (*TRAINING, *TESTING):
        return ValueError(
            f"{folder}: got a folder per class among the classes of {root}, expected train and test side by side, "
            "train alone, or classes alone; put the other classes into train, or move this folder elsewhere"
        )
    return ValueError(
        f"{folder}: got folders and no image, expected images, as each folder of {root} is a class; give the folder "
        "whose folders are the classes, call the parts train and test, or move the images up"
    )


def _folders(root: Path) -> list[Path]:
    return sorted(named_in_unicode(path) for path in root.iterdir() if path.is_dir() and not _junk(path.name))


def _loose(root: Path) -> list[Path]:
    """The files that lie in a folder of folders."""
    return sorted(path for path in root.iterdir() if path.is_file() and not _junk(path.name))


def _junk(*parts: str) -> bool:
    return any(part.startswith(".") or part.lower() in JUNK for part in parts)


def _left_out(root: Path, files: Sequence[Path]) -> list[str]:
    """Notes on the files that were not taken."""
    notes: list[str] = []
    for what, images in (("files that are no images", False), ("images that lie in no class", True)):
        names = [file.relative_to(root).as_posix() for file in files if (file.suffix.lower() in SUFFIXES) is images]
        names = [name if encodes(name) else ascii(name) for name in names]
        if names:
            notes.append(f"{len(names)} {what} left out: {some(names, 5)}")
    return notes


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
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{file}: got too large an image ({error}), expected one below that limit; scale it down, or leave it out"
        ) from error
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
